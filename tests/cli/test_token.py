"""`broker token`: what goes to standard output, what to standard error, and with which exit code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from broker.auth.tokens import TokenStore, digest_of
from broker.cli.main import main


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("BROKER_CONFIG", "BROKER_AUTH__TOKENS_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Result:
        code = main(["token", *arguments])
        return Result(code, *capfd.readouterr())

    return run


def default_store(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "state" / "broker" / "tokens.json")


def test_create_prints_the_secret_alone_on_standard_output(run: Run, tmp_path: Path) -> None:
    result = run(
        "create", "camera", "--role", "worker", "--role", "listener", "--endpoint", "data*", "--expires", "30d"
    )
    assert result.exit_code == 0
    secret = result.stdout.rstrip("\n")
    assert result.stdout == secret + "\n"
    principal = default_store(tmp_path).lookup(digest_of(secret))
    assert principal is not None
    record = default_store(tmp_path).tokens()[0]
    assert (record.name, record.roles, record.endpoints) == ("camera", ("worker", "listener"), ("data*",))
    assert record.expires == pytest.approx(record.created + 30 * 86400)
    assert secret not in result.stderr
    assert f"token {record.id} for camera: worker, listener at data*; expires " in result.stderr


def test_create_for_programs(run: Run, tmp_path: Path) -> None:
    result = run("create", "camera", "--endpoint", "data", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["name"], told["roles"], told["endpoints"], told["state"]) == ("camera", ["caller"], ["data"], "valid")
    assert default_store(tmp_path).lookup(digest_of(told["token"])) is not None


def test_create_without_arguments_makes_a_caller_for_every_endpoint(run: Run, tmp_path: Path) -> None:
    result = run("create")
    assert result.exit_code == 0
    record = default_store(tmp_path).tokens()[0]
    assert (record.name, record.roles, record.endpoints, record.expires) == (record.id, ("caller",), ("*",), None)
    assert "never expires" in result.stderr


@pytest.mark.parametrize(
    ("length", "seconds"), [("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600)]
)
def test_lengths(run: Run, tmp_path: Path, length: str, seconds: int) -> None:
    assert run("create", "--expires", length).exit_code == 0
    record = default_store(tmp_path).tokens()[0]
    assert record.expires == pytest.approx(record.created + seconds)


@pytest.mark.parametrize("length", ["", "0d", "30", "d", "-1d", "1.5h", "1y", "1d\n", "9999999d", "٣d"])
def test_a_bad_length_says_what_would_be_right(run: Run, length: str) -> None:
    result = run("create", f"--expires={length}")
    assert result.exit_code == 2
    assert "write 90s, 15m, 12h, 30d or 2w" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a b",), "the name 'a b'"),
        (("admin",), "the broker's own"),
        (("a", "--role", "boss"), "'boss' is not one of"),
        (("a", "--endpoint", "../x"), "'../x' is no endpoint pattern"),
        (("a", "--endpoint", ""), "'' is no endpoint pattern"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_clear_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    result = run("create", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("broker: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_list_shows_every_token_and_no_secret(run: Run, tmp_path: Path) -> None:
    secret = run("create", "camera", "--role", "worker", "--expires", "1d").stdout.strip()
    run("create", "alice")
    run("revoke", "alice")
    table = run("list")
    assert table.exit_code == 0
    header, camera, alice = table.stdout.splitlines()
    assert header.split() == ["id", "name", "state", "roles", "endpoints", "created", "expires"]
    assert camera.split()[1:5] == ["camera", "valid", "worker", "*"]
    assert alice.split()[1:5] == ["alice", "revoked", "caller", "*"]
    assert alice.endswith("never")
    listed = json.loads(run("list", "--json").stdout)
    assert [(row["name"], row["state"], row["roles"]) for row in listed] == [
        ("camera", "valid", ["worker"]),
        ("alice", "revoked", ["caller"]),
    ]
    assert listed[0]["revoked"] is None
    digest = default_store(tmp_path).tokens()[0].digest
    for output in (table.stdout + table.stderr, json.dumps(listed)):
        assert secret not in output
        assert digest not in output


def test_list_of_nothing(run: Run) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no tokens" in result.stderr
    assert json.loads(run("list", "--json").stdout) == []


def test_revoke_by_name_and_by_id(run: Run, tmp_path: Path) -> None:
    for by in ("name", "id"):
        secret = run("create", "alice").stdout.strip()
        record = default_store(tmp_path).tokens()[-1]
        result = run("revoke", getattr(record, by))
        assert result.exit_code == 0
        assert f"token {record.id} of alice revoked" in result.stderr
        assert default_store(tmp_path).lookup(digest_of(secret)) is None


def test_revoke_of_an_unknown_one_names_the_nearest(run: Run) -> None:
    run("create", "alice")
    result = run("revoke", "alcie")
    assert result.exit_code == 2
    assert "no token has the id or name 'alcie'; did you mean 'alice'?" in result.stderr


def test_the_file_by_option_by_environment_and_by_configuration(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("create", "--tokens-file", str(tmp_path / "option.json")).exit_code == 0
    assert (tmp_path / "option.json").exists()
    monkeypatch.setenv("BROKER_AUTH__TOKENS_FILE", str(tmp_path / "variable.json"))
    assert run("create").exit_code == 0
    assert (tmp_path / "variable.json").exists()
    monkeypatch.delenv("BROKER_AUTH__TOKENS_FILE")
    (tmp_path / "broker.toml").write_text(f'[auth]\ntokens_file = "{tmp_path}/configured.json"\n')
    assert run("create", "--config", str(tmp_path / "broker.toml")).exit_code == 0
    assert (tmp_path / "configured.json").exists()
    assert not (tmp_path / "state").exists()


def test_a_configuration_that_cannot_be_used_is_bad_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text("[auth]\ntoken_file = 1\n")
    result = run("create", "--config", str(tmp_path / "broker.toml"))
    assert result.exit_code == 2
    assert "auth.token_file" in result.stderr


def test_a_damaged_file_is_bad_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("{")
    for command in (("list",), ("create",), ("revoke", "a")):
        result = run(*command, "--tokens-file", str(tmp_path / "tokens.json"))
        assert result.exit_code == 2
        assert "tokens.json is damaged" in result.stderr


def test_every_command_has_a_help_text(run: Run) -> None:
    for name in ("create", "list", "revoke"):
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "--tokens-file" in result.stdout
