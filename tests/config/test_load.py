"""Loading: precedence, types, and the text of every error."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config.load import ConfigError, chosen_file, load, load_with_origins
from broker.config.model import Config, Endpoint

SECRET = "s3cret-" + "x" * 40


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.toml"


def _error(file: Path | None = None, environment: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, environment or {}, {name.replace("__", "."): value for name, value in flags.items()})
    return str(caught.value)


def _file_error(file: Path, text: str) -> str:
    file.write_text(text)
    error = _error(file)
    assert error.startswith(f"{file}: ")
    return error.removeprefix(f"{file}: ")


def test_nothing_given_is_the_defaults() -> None:
    assert load() == Config()


def test_flags_win_over_environment_over_file_over_defaults(file: Path) -> None:
    file.write_text("[server]\nport = 1\ndrain_s = 1\nhost = 'localhost'\n[limits]\nslot_ms = 20\n")
    environment = {"BROKER_SERVER__PORT": "2", "BROKER_SERVER__DRAIN_S": "2.5"}
    loaded = load_with_origins(file, environment, {"server.port": 3, "server.host": None})
    server = loaded.config.server
    assert (server.port, server.drain_s, server.host) == (3, 2.5, "localhost")
    assert loaded.config.limits.slot_ms == 20
    assert loaded.config.limits.queue_max == Config().limits.queue_max
    assert loaded.origins == {
        ("server", "port"): "command line",
        ("server", "drain_s"): "BROKER_SERVER__DRAIN_S",
        ("server", "host"): str(file),
        ("limits", "slot_ms"): str(file),
    }


def test_types_of_the_environment() -> None:
    config = load(
        environment={
            "BROKER_SERVER__INSECURE": "true",
            "BROKER_SERVER__ALLOWED_HOSTS": " a.example, b.example:8787 ,",
            "BROKER_SERVER__TRUSTED_PROXIES": "",
            "BROKER_LIMITS__STALL_S": "2",
            "BROKER_LOG__LEVEL": "debug",
            "BROKER_log__format": "json",
            "BROKER_AUTH__ADMIN_TOKEN": SECRET,
        }
    )
    assert config.server.insecure is True
    assert config.server.allowed_hosts == ("a.example", "b.example:8787")
    assert config.server.trusted_proxies == ()
    assert config.limits.stall_s == 2
    assert (config.log.level, config.log.format) == ("debug", "json")
    assert config.auth.admin_token == SECRET


def test_endpoints_from_all_sides(file: Path) -> None:
    file.write_text(
        '[endpoints.plain]\n[endpoints."with.dots"]\nclosed = "moved"\n[endpoints.data]\npolicy = "newest"\n'
    )
    config = load(
        file,
        {
            "BROKER_ENDPOINTS__data__QUEUE_MAX": "5",
            "BROKER_ENDPOINTS__a__b.c-D__DEADLINE_S": "1.5",
            "BROKER_ENDPOINTS___x__CLOSED": "no",
        },
        {"endpoints.plain.deadline_max_s": 100},
    )
    assert config.endpoints == {
        "plain": Endpoint(deadline_max_s=100),
        "with.dots": Endpoint(closed="moved"),
        "data": Endpoint(policy="newest", queue_max=5),
        "a__b.c-D": Endpoint(deadline_s=1.5),
        "_x": Endpoint(closed="no"),
    }


def test_other_variables_are_not_touched() -> None:
    environment = {
        "BROKER_URL": "ws://x",
        "BROKER_TOKEN": "x",
        "BROKER_CONFIG": "x",
        "BROKER_PORT_8787_TCP_ADDR": "x",
        "broker_server__port": "x",
        "MY_BROKER_SERVER__PORT": "x",
        "A__B": "x",
    }
    assert load(environment=environment) == Config()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[server]\nprot = 1", "unknown key server.prot; did you mean server.port?"),
        ("[server]\nqueue_max = 1", "unknown key server.queue_max; did you mean limits.queue_max?"),
        ("[server]\ndedline_max_s = 1", "unknown key server.dedline_max_s; did you mean limits.deadline_max_s?"),
        ("port = 1", "unknown key port; did you mean server.port?"),
        ("prot = 1", "unknown key prot; did you mean server.port?"),
        ("[servr]\nport = 1", "unknown key servr; did you mean [server]?"),
        ("[zzz]", "unknown key zzz; known there: server, auth, limits, endpoints, rtcloud, zeromq, kernels, log"),
        ("[log]\nzzz = 1", "unknown key log.zzz; known there: level, format"),
        ("[log]\nLevel = 'info'", "unknown key log.Level; did you mean log.level?"),
        (
            "[endpoints.data]\nclosd = ''",
            "unknown key endpoints.data.closd; did you mean endpoints.data.closed?",
        ),
        (
            '[endpoints."a.b"]\nclosd = ""',
            'unknown key endpoints."a.b".closd; did you mean endpoints."a.b".closed?',
        ),
        ("[endpoints.a.b]\nclosed = ''", 'a name with dots is quoted: expected [endpoints."a.b"]'),
        ("[endpoints]\ndata = 1", "endpoints.data = 1: expected a table, [endpoints.data]"),
        ("endpoints = 1", "endpoints = 1: expected a table, [endpoints.NAME]"),
        ("server = 'x'", 'server = "x": expected a table, [server]'),
        ("[[server]]", "server = [{}]: expected a table, [server]"),
        (
            '[endpoints."../x"]',
            'endpoints."../x": expected as an endpoint\'s name at most 128 of the characters '
            "A-Z a-z 0-9 _ . - and neither . nor - at its start",
        ),
        (
            '[endpoints."a\\n"]',
            'endpoints."a\\n": expected as an endpoint\'s name at most 128 of the characters '
            "A-Z a-z 0-9 _ . - and neither . nor - at its start",
        ),
    ],
)
def test_unknown_keys_name_file_key_and_the_nearest(file: Path, text: str, error: str) -> None:
    assert _file_error(file, text) == error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[server]\nport = 'x'", 'server.port = "x": expected a whole number from 0 to 65_535'),
        ("[server]\nport = 65536", "server.port = 65_536: expected a whole number from 0 to 65_535"),
        ("[server]\nport = -1", "server.port = -1: expected a whole number from 0 to 65_535"),
        ("[server]\nport = 1.0", "server.port = 1: expected a whole number from 0 to 65_535"),
        ("[server]\nport = 1.5", "server.port = 1.5: expected a whole number from 0 to 65_535"),
        ("[server]\nport = true", "server.port = true: expected a whole number from 0 to 65_535"),
        ("[server.port]\nx = 1", "server.port = {'x': 1}: expected a whole number from 0 to 65_535"),
        ("[server]\ninsecure = 1", "server.insecure = 1: expected true or false"),
        ("[server]\nhost = ''", 'server.host = "": expected an IP address or a host name'),
        ("[server]\nhost = 'a b'", 'server.host = "a b": expected an IP address or a host name'),
        ("[server]\ndrain_s = nan", "server.drain_s = nan: expected a number from 0 to 3600"),
        ("[server]\ndrain_s = inf", "server.drain_s = inf: expected a number from 0 to 3600"),
        (
            "[server]\ndrain_s = 2020-01-01",
            "server.drain_s = datetime.date(2020, 1, 1): expected a number from 0 to 3600",
        ),
        ("[limits]\nstall_s = 0", "limits.stall_s = 0: expected a number above 0, at most 3600"),
        ("[log]\nlevel = 'loud'", 'log.level = "loud": expected "debug", "info", "warning" or "error"'),
        (
            "[endpoints.a]\npolicy = 'best'",
            'endpoints.a.policy = "best": expected "least_pending", "round_robin", "newest" or "sticky"',
        ),
        (
            "[endpoints.a]\nqueue_max = -1",
            "endpoints.a.queue_max = -1: expected a whole number from 0 to 10_000_000",
        ),
        (
            "[endpoints.a]\ndeadline_s = 'x'",
            'endpoints.a.deadline_s = "x": expected a number above 0, at most 31_622_400',
        ),
        (
            "[server]\nallowed_origins = 'https://a'",
            'server.allowed_origins = "https://a": expected a list of origins such as https://lab.example:8443, '
            "without a path",
        ),
        (
            "[server]\nallowed_origins = ['https://a/']",
            'server.allowed_origins = ["https://a/"]: expected a list of origins such as https://lab.example:8443, '
            "without a path",
        ),
        (
            "[server]\nallowed_origins = ['null']",
            'server.allowed_origins = ["null"]: expected a list of origins such as https://lab.example:8443, '
            "without a path",
        ),
        (
            "[server]\nallowed_hosts = [1]",
            "server.allowed_hosts = [1]: expected a list of host names, each with or without a port",
        ),
        (
            "[server]\ntls_key = 1",
            "server.tls_key = 1: expected the path of a file",
        ),
        (
            "[server]\ntls_key = 'a\\u0000b'".replace("'", '"'),
            'server.tls_key = "a\\u0000b": expected the path of a file, in UTF-8, no control characters',
        ),
        (
            '[endpoints.a]\nclosed = "a\\nb"',
            'endpoints.a.closed = "a\\nb": expected a text of at most 123 bytes, in UTF-8, no control characters',
        ),
        (
            f"[server]\nport = '{'9' * 200}'",
            f'server.port = "{"9" * 79}…: expected a whole number from 0 to 65_535',
        ),
    ],
)
def test_wrong_values_name_file_key_value_and_what_is_right(file: Path, text: str, error: str) -> None:
    assert _file_error(file, text) == error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "[limits]\ndeadline_s = 4000",
            "limits.deadline_s = 4000: expected at most limits.deadline_max_s, which is 3600",
        ),
        (
            "[limits]\noutbox_soft_bytes = 9_000_000",
            "limits.outbox_soft_bytes = 9_000_000: expected at most limits.outbox_hard_bytes, which is 8_388_608",
        ),
        (
            "[limits]\ndeadline_max_s = 20",
            "limits.deadline_max_s = 20: expected at least limits.deadline_s, which is 30",
        ),
        (
            "[endpoints.a]\ndeadline_s = 4000",
            "endpoints.a.deadline_s = 4000: expected at most the longest timeout there, 3600 (deadline_max_s)",
        ),
        (
            "[endpoints.a]\ndeadline_s = 40\ndeadline_max_s = 35.5",
            "endpoints.a.deadline_s = 40: expected at most the longest timeout there, 35.5 (deadline_max_s)",
        ),
        (
            f"[endpoints.a]\nclosed = '{'é' * 62}'",
            f'endpoints.a.closed = "{"é" * 62}": expected at most 123 bytes of UTF-8',
        ),
        (
            "[server]\nhost = '0.0.0.0'",
            'server.host = "0.0.0.0": other machines can reach this address and there is no TLS: expected a loopback '
            "address such as 127.0.0.1, or tls_certificate and tls_key, or insecure = true (--insecure)",
        ),
        (
            "[server]\ntrusted_proxies = ['10.0.0.1', 'proxy.example']",
            'server.trusted_proxies = ["10.0.0.1", "proxy.example"]: expected IP addresses or networks such as '
            "10.0.0.0/8, but 'proxy.example' does not appear to be an IPv4 or IPv6 network",
        ),
    ],
)
def test_values_that_do_not_go_together(file: Path, text: str, error: str) -> None:
    assert _file_error(file, text) == error


def test_a_certificate_needs_its_key_and_the_other_way_round(file: Path) -> None:
    assert _file_error(file, "[server]\ntls_certificate = '/tls/c.pem'") == (
        'server.tls_certificate = "/tls/c.pem": expected tls_key beside it, the file of its private key'
    )
    assert _file_error(file, "[server]\ntls_key = '/tls/k.pem'") == (
        'server.tls_key = "/tls/k.pem": expected tls_certificate beside it, the file of its certificate'
    )
    # A path of the file is meant from where that stands; a long one is shown in part.
    assert _file_error(file, "[server]\ntls_key = 'k.pem'").startswith(f'server.tls_key = "{str(file.parent)[:60]}')


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LOCALHOST"])
def test_loopback_needs_no_tls(host: str) -> None:
    assert load(overrides={"server.host": host}).server.host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "lab.example", "localhost.example", "*", "127.0.0.1.x"])
def test_public_addresses_need_tls_or_insecure(host: str, tmp_path: Path) -> None:
    assert "other machines can reach this address" in _error(server__host=host)
    assert load(overrides={"server.host": host, "server.insecure": True}).server.insecure
    tls = {"server.host": host, "server.tls_certificate": "c", "server.tls_key": "k"}
    assert load(overrides=tls).server.tls_key == "k"


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("BROKER_SERVER__PROT", "1", "unknown variable BROKER_SERVER__PROT; did you mean BROKER_SERVER__PORT?"),
        ("BROKER_SERVR__HOST", "1", "unknown variable BROKER_SERVR__HOST; did you mean BROKER_SERVER__HOST?"),
        (
            "BROKER_SERVER__SLOT_MS",
            "1",
            "unknown variable BROKER_SERVER__SLOT_MS; did you mean BROKER_LIMITS__SLOT_MS?",
        ),
        ("BROKER_LOG__ZZZ", "1", "unknown variable BROKER_LOG__ZZZ; known there: level, format"),
        (
            "BROKER_ZZZ__ZZZ",
            "1",
            "unknown variable BROKER_ZZZ__ZZZ; "
            "known there: server, auth, limits, endpoints, rtcloud, zeromq, kernels, log",
        ),
        (
            "BROKER__",
            "1",
            "unknown variable BROKER__; known there: server, auth, limits, endpoints, rtcloud, zeromq, kernels, log",
        ),
        ("BROKER_SERVER__PORT__X", "1", "unknown variable BROKER_SERVER__PORT__X; did you mean BROKER_SERVER__PORT?"),
        (
            "BROKER_ENDPOINTS__CLOSED",
            "1",
            "unknown variable BROKER_ENDPOINTS__CLOSED; did you mean BROKER_ENDPOINTS__NAME__CLOSED?",
        ),
        (
            "BROKER_ENDPOINTS__data__CLOSD",
            "1",
            "unknown variable BROKER_ENDPOINTS__data__CLOSD; did you mean BROKER_ENDPOINTS__data__CLOSED?",
        ),
        (
            "BROKER_ENDPOINTS__-a__CLOSED",
            "1",
            'BROKER_ENDPOINTS__-a__CLOSED: endpoints."-a": expected as an endpoint\'s name at most 128 of the '
            "characters A-Z a-z 0-9 _ . - and neither . nor - at its start",
        ),
        (
            "BROKER_SERVER__PORT",
            "many",
            'BROKER_SERVER__PORT: server.port = "many": expected a whole number from 0 to 65_535',
        ),
        (
            "BROKER_SERVER__PORT",
            "",
            'BROKER_SERVER__PORT: server.port = "": expected a whole number from 0 to 65_535',
        ),
        (
            "BROKER_SERVER__INSECURE",
            "yes",
            'BROKER_SERVER__INSECURE: server.insecure = "yes": expected true or false',
        ),
        (
            "BROKER_SERVER__DRAIN_S",
            "nan",
            'BROKER_SERVER__DRAIN_S: server.drain_s = "nan": expected a number from 0 to 3600',
        ),
        (
            "BROKER_SERVER__ALLOWED_ORIGINS",
            "https://a, *",
            'BROKER_SERVER__ALLOWED_ORIGINS: server.allowed_origins = "https://a, *": expected a list of origins '
            "such as https://lab.example:8443, without a path",
        ),
        (
            "BROKER_SERVER__TLS_KEY",
            "a\udcff",
            'BROKER_SERVER__TLS_KEY: server.tls_key = "a\\udcff": expected the path of a file, in UTF-8, '
            "no control characters",
        ),
        (
            "BROKER_SERVER__HOST",
            "0.0.0.0",
            'BROKER_SERVER__HOST: server.host = "0.0.0.0": other machines can reach this address and there is no '
            "TLS: expected a loopback address such as 127.0.0.1, or tls_certificate and tls_key, or insecure = true "
            "(--insecure)",
        ),
    ],
)
def test_errors_of_the_environment(variable: str, value: str, error: str) -> None:
    assert _error(environment={variable: value}) == error


def test_errors_of_flags() -> None:
    assert _error(server__port=-5) == "command line: server.port = -5: expected a whole number from 0 to 65_535"
    assert _error(server__prt=5) == "command line: unknown key server.prt; did you mean server.port?"
    assert _error(port=5) == "command line: unknown key port; did you mean server.port?"


@pytest.mark.parametrize("token", ["short", SECRET + " ", SECRET + "\n", "ü" * 40, "x" * 513, SECRET + "\x00"])
def test_secrets_never_stand_in_errors(file: Path, token: str) -> None:
    error = _error(environment={"BROKER_AUTH__ADMIN_TOKEN": token})
    assert error == (
        "BROKER_AUTH__ADMIN_TOKEN: auth.admin_token = <secret>: expected 32 to 512 visible ASCII characters, or nothing"
    )
    file.write_text("[auth]\nadmin_token = 12345678901234567890\n")
    assert "1234" not in _error(file)


def test_an_unreadable_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert _error(missing) == f"{missing}: cannot be read: No such file or directory"
    assert _error(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    address = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        assert _error(address) == f"{address}: cannot be read: {os.strerror(6)}"


def test_files_that_are_no_toml(file: Path) -> None:
    assert _file_error(file, "[server]\nport 1\n") == (
        "no valid TOML: Expected '=' after a key in a key/value pair (at line 2, column 6)"
    )
    assert _file_error(file, "[server]\nport = 1\nport = 2\n") == (
        "no valid TOML: Cannot overwrite a value (at line 3, column 9)"
    )
    assert _file_error(file, "x = " + "[" * 100_000) == "no valid TOML: nested too deep"
    file.write_bytes(b"[server]\nhost = '\xff'\n")
    assert _error(file) == f"{file}: no valid TOML: byte 17 is not UTF-8"


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    file = folder / "broker.toml"
    file.write_text("[auth]\ntokens_file = 'tokens.json'\n[server]\ntls_certificate='/a/c.pem'\ntls_key = '~/k.pem'\n")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    config = load(Path("etc/broker.toml"))
    assert config.auth.tokens_file == str(folder / "tokens.json")
    assert config.server.tls_certificate == "/a/c.pem"
    assert config.server.tls_key == "/home/somebody/k.pem"
    assert load(environment={"BROKER_AUTH__TOKENS_FILE": "t.json"}).auth.tokens_file == "t.json"
    assert load(environment={"BROKER_AUTH__TOKENS_FILE": ""}).auth.tokens_file == ""
    nobody = "~no-such-user-of-this-machine/x"
    assert load(environment={"BROKER_AUTH__TOKENS_FILE": nobody}).auth.tokens_file == nobody


def test_which_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert chosen_file(None, {}) is None
    assert chosen_file(None, {"BROKER_CONFIG": ""}) is None
    assert chosen_file(None, {"BROKER_CONFIG": "~/b.toml"}) == Path("/home/somebody/b.toml")
    assert chosen_file("a.toml", {"BROKER_CONFIG": "b.toml"}) == Path("a.toml")


_JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["server.port", "limits.stall_s", "server.x", "", "a.b.c.d"]) | st.text(), _JSONISH)
)
def test_any_flags_load_or_raise_one_clear_error(flags: dict[str, object]) -> None:
    try:
        load(overrides=flags)
    except ConfigError as error:
        assert str(error).startswith("command line: ")


@given(st.dictionaries(st.text().map(lambda text: "BROKER_" + text) | st.text(), st.text()))
def test_any_environment_loads_or_raises_one_clear_error(environment: dict[str, str]) -> None:
    try:
        load(environment=environment)
    except ConfigError as error:
        assert "BROKER_" in str(error)


# ---------------------------------------------------------------- rt-cloud


def test_paths_of_daemons_are_a_table_or_one_line(file: Path) -> None:
    assert load().rtcloud.endpoints == {"wsData": "data", "wsSubject": "subject"} and not load().rtcloud.enabled
    file.write_text('[rtcloud]\nenabled = true\n[rtcloud.endpoints]\nwsScan-1 = "lab.data"\n')
    assert load(file).rtcloud.endpoints == {"wsScan-1": "lab.data"}
    file.write_text('[rtcloud]\nendpoints = { wsA = "a", wsB = "a" }\n')
    assert load(file).rtcloud.endpoints == {"wsA": "a", "wsB": "a"}
    environment = {"BROKER_RTCLOUD__ENDPOINTS": " wsA = a, wsB=b ,"}
    assert load(file, environment).rtcloud.endpoints == {"wsA": "a", "wsB": "b"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[rtcloud.endpoints]\n", "rtcloud.endpoints"),
        ('[rtcloud.endpoints]\n"ws/data" = "a"\n', "rtcloud.endpoints"),
        ('[rtcloud.endpoints]\n"" = "a"\n', "rtcloud.endpoints"),
        ('[rtcloud.endpoints]\nwsData = "a/b"\n', "rtcloud.endpoints"),
        ('[rtcloud.endpoints]\nwsData = ""\n', "rtcloud.endpoints"),
        ("[rtcloud.endpoints]\nwsData = 5\n", "rtcloud.endpoints"),
        ('[rtcloud]\nenabled = true\nendpoints = { ws = "a" }\n', "it has /ws"),
        ('[rtcloud]\nenabled = true\nendpoints = { metrics = "a" }\n', "it has /metrics"),
        ("[rtcloud]\nenabled = true\n[limits]\nmessage_max_bytes = 1000000\n", "limits.message_max_bytes"),
        ("[rtcloud]\nenabled = 1\n", "rtcloud.enabled"),
        ('[rtcloud]\nenabled = true\n[rtcloud.classes]\nwsOther = ["A"]\n', "wsOther does not"),
        ("[rtcloud.classes]\nwsData = []\n", "rtcloud.classes"),
        ('[rtcloud.classes]\nwsData = "A"\n', "rtcloud.classes"),
        ('[rtcloud.classes]\nwsData = ["A.b"]\n', "rtcloud.classes"),
        ("[rtcloud]\npass_over_s = -1\n", "rtcloud.pass_over_s"),
        (
            "[rtcloud]\nenabled = true\ntest_user = true\n[server]\nhost = '0.0.0.0'\ninsecure = true\n",
            "rtcloud.test_user = true: everybody knows that password",
        ),
    ],
)
def test_what_is_wrong_about_daemons_is_named(file: Path, text: str, named: str) -> None:
    assert named in _file_error(file, text)


def test_own_paths_are_those_of_the_routes() -> None:
    import asyncio

    from broker.config.rules import OWN_PATHS
    from broker.node.broker import Broker

    async def main() -> set[str]:
        async with Broker() as broker:
            return {route.matcher._path.split("/")[1] for route in broker.routes()}  # type: ignore[attr-defined]

    assert asyncio.run(main()) - {""} == OWN_PATHS
