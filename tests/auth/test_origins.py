"""Which names the broker answers to and which pages may use it."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.auth.facts import Refused, RequestFacts
from broker.auth.origins import Authority, HostRules, Origin, parse_authority, parse_origin

LOOPBACK = HostRules([("127.0.0.1", 8787)], ["broker.example", "proxy.example:443"], ["https://page.example"])


def facts(host: str | None, *origins: str, secure: bool = False) -> RequestFacts:
    headers = [("host", host)] if host is not None else []
    headers += [("origin", origin) for origin in origins]
    return RequestFacts(method="GET", path="/ws", headers=tuple(headers), remote="127.0.0.1", secure=secure)


def status(rules: HostRules, request: RequestFacts) -> int:
    try:
        rules.check(request)
    except Refused as refused:
        return refused.status
    return 200


@pytest.mark.parametrize("host", ["localhost:8787", "127.0.0.1:8787", "[::1]:8787", "LOCALHOST:8787", "[0:0::1]:8787"])
def test_a_loopback_broker_answers_to_the_loopback_names(host: str) -> None:
    assert status(LOOPBACK, facts(host)) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8787",
        "localhost",
        "localhost:80",
        "localhost:9999",
        "localhost.:8787",
        "localhost.evil.example:8787",
        "evil-localhost:8787",
        "127.0.0.1.evil.example:8787",
        "127.0.0.2:8787",
        "0.0.0.0:8787",
        "127.1:8787",
        "2130706433:8787",
        "0x7f000001:8787",
        "[::]:8787",
        "[::ffff:127.0.0.1]:8787",
        "proxy.example:8787",
    ],
)
def test_row_05_dns_rebinding(host: str) -> None:
    """Host and Origin agree with each other, as they do when a page's own name was pointed here."""
    assert status(LOOPBACK, facts(host)) == 421
    assert status(LOOPBACK, facts(host, f"http://{host}")) == 421


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        " ",
        "localhost:8787, evil.example",
        "user@localhost:8787",
        "localhost:8787@evil.example",
        "localhost:",
        "localhost:0",
        "localhost:08787",
        "localhost:65536",
        "localhost:99999999999",
        "localhost:8787 ",
        " localhost:8787",
        "localhost:8787\n",
        "localhost\x00:8787",
        "localhost:8787/",
        "localhost:8787#",
        "local\thost:8787",
        "::1:8787",
        "[::1",
        "[::1]x:8787",
        "[::1%lo]:8787",
        "[:::1]:8787",
        "loca\u212ahost:8787",  # the Kelvin sign, whose lower case is k
        "localho\u017ft:8787",
        "localhost:\u0668\u0667\u0668\u0667",
        "a" * 254,
    ],
)
def test_a_missing_or_malformed_host_is_400(host: str | None) -> None:
    assert status(LOOPBACK, facts(host)) == 400


def test_row_27_two_host_headers_are_400_even_when_equal() -> None:
    doubled = RequestFacts(method="GET", path="/", headers=(("host", "localhost:8787"),) * 2)
    assert status(LOOPBACK, doubled) == 400


def test_a_target_with_a_host_of_its_own_is_400() -> None:
    absolute = RequestFacts(method="GET", path="http://evil.example/ws", headers=(("host", "localhost:8787"),))
    assert status(LOOPBACK, absolute) == 400


def test_the_configured_name_and_the_allowed_ones() -> None:
    rules = HostRules([("Broker.Lab.example", 8787)], ["other.example", "::1", "10.0.0.5:9000"])
    assert status(rules, facts("broker.lab.example:8787")) == 200
    assert status(rules, facts("localhost:8787")) == 421, "not a loopback bind"
    assert status(rules, facts("other.example")) == 200
    assert status(rules, facts("other.example:1234")) == 200
    assert status(rules, facts("[::1]:1")) == 200
    assert status(rules, facts("10.0.0.5:9000")) == 200
    assert status(rules, facts("10.0.0.5:9001")) == 421


def test_an_allowed_host_with_the_scheme_s_port_is_meant_without_one_too() -> None:
    assert status(LOOPBACK, facts("proxy.example", secure=True)) == 200
    assert status(LOOPBACK, facts("proxy.example")) == 421, "without TLS the port left out is 80"


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", ""])
def test_a_wildcard_bind_answers_to_addresses_but_to_no_name(wildcard: str) -> None:
    rules = HostRules([(wildcard, 8787)])
    for own in ("10.1.2.3:8787", "[2001:db8::1]:8787", "127.0.0.1:8787", "localhost:8787"):
        assert status(rules, facts(own)) == 200
    for other in ("evil.example:8787", "10.1.2.3:80", "10.1.2:8787", "010.1.2.3:8787", "[::1]"):
        assert status(rules, facts(other)) == 421


def test_an_ipv6_bind_is_written_in_brackets() -> None:
    rules = HostRules([("2001:DB8:0::1", 8787)])
    assert status(rules, facts("[2001:db8::1]:8787")) == 200
    assert status(rules, facts("[2001:db8::2]:8787")) == 421


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8787", 200),
        ("HTTP://LOCALHOST:8787", 200),
        ("https://page.example", 200),
        ("https://page.example:443", 200),
        ("https://PAGE.example", 200),
        ("null", 403),
        ("", 403),
        ("*", 403),
        ("http://evil.example", 403),
        ("https://localhost:8787", 403),
        ("ws://localhost:8787", 403),
        ("http://127.0.0.1:8787", 403),
        ("http://localhost", 403),
        ("http://localhost:9000", 403),
        ("http://page.example", 403),
        ("https://page.example:8443", 403),
        ("https://page.example.", 403),
        ("https://page.example.evil.example", 403),
        ("https://sub.page.example", 403),
        ("https://evilpage.example", 403),
        ("https://page.example/", 403),
        ("https://page.example#", 403),
        ("https://page.example?x", 403),
        ("https://page.example@evil.example", 403),
        ("https://user@page.example", 403),
        ("https://page.example\n", 403),
        ("https://page.example\x00", 403),
        ("https:// page.example", 403),
        ("https://page.example https://evil.example", 403),
        ("https://page.example,https://page.example", 403),
        ("https:page.example", 403),
        ("//page.example", 403),
        ("page.example", 403),
        ("http\u017f://page.example", 403),
    ],
)
def test_row_04_origin(origin: str, expected: int) -> None:
    assert status(LOOPBACK, facts("localhost:8787", origin)) == expected


def test_row_04_no_origin_is_no_browser_and_two_are_refused() -> None:
    assert status(LOOPBACK, facts("localhost:8787")) == 200
    assert status(LOOPBACK, facts("localhost:8787", "https://page.example", "https://page.example")) == 403


def test_row_04_the_own_origin_follows_the_checked_host_and_tls() -> None:
    rules = HostRules([("0.0.0.0", 443)], ["broker.example"])
    assert status(rules, facts("broker.example", "https://broker.example", secure=True)) == 200
    assert status(rules, facts("broker.example", "https://broker.example:443", secure=True)) == 200
    assert status(rules, facts("broker.example:443", "https://broker.example", secure=True)) == 200
    assert status(rules, facts("broker.example", "http://broker.example", secure=True)) == 403


def test_allowed_origins_may_have_schemes_without_ports() -> None:
    rules = HostRules([("localhost", 8787)], (), ["vscode-webview://abc", "http://page.example:8080"])
    assert status(rules, facts("localhost:8787", "vscode-webview://abc")) == 200
    assert status(rules, facts("localhost:8787", "http://page.example:8080")) == 200
    assert rules.allows_origin("http://page.example:8080")
    assert not rules.allows_origin("http://localhost:8787")
    assert not rules.allows_origin("null")


@pytest.mark.parametrize("entry", ["*", "null", "page.example", "https://page.example/", "https://*.example", ""])
def test_a_bad_allowed_origin_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="allowed origin") as caught:
        HostRules([("localhost", 8787)], (), [entry])
    assert repr(entry) in str(caught.value)


@pytest.mark.parametrize("entry", ["*", "http://broker.example", "broker.example:x", "ünicode.example", ""])
def test_a_bad_allowed_host_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="allowed host") as caught:
        HostRules([("localhost", 8787)], [entry])
    assert repr(entry) in str(caught.value)


def test_a_refusal_shows_what_came_escaped_and_cut() -> None:
    with pytest.raises(Refused) as caught:
        LOOPBACK.check(facts("localhost:8787", "http://\x1b[31m" + "é" * 5000))
    assert caught.value.reason.isascii()
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 700


nasty = st.text(alphabet=string.ascii_letters + string.digits + "@:/.-_[]%#?\\, \t\r\n\x00*\u212a\u0130é", max_size=40)
pieces = st.lists(
    st.sampled_from(
        [
            "http",
            "https",
            "ws",
            "://",
            "//",
            "/",
            ":",
            "@",
            ".",
            "..",
            "localhost",
            "LOCALHOST",
            "127.0.0.1",
            "[::1]",
            "[::]",
            "8787",
            "80",
            "0",
            "65536",
            "page.example",
            "broker.example",
            "null",
            ",",
            "%",
            "\r",
            "\n",
            "\x00",
            "\u212a",
            "#",
            "?",
        ]
    ),
    max_size=8,
).map("".join)


@given(nasty | pieces)
def test_hypothesis_only_names_of_the_list_pass_as_host(host: str) -> None:
    passed = status(LOOPBACK, facts(host)) == 200
    lowered = host.lower()
    name, _, port = lowered.partition(":")
    own = lowered in {"localhost:8787", "127.0.0.1:8787", "[::1]:8787", "proxy.example:443"}
    own |= lowered == "broker.example" or (name == "broker.example" and port in map(str, range(1, 65536)))
    assert passed is (own and host.isascii())


@given(nasty | pieces)
def test_hypothesis_only_origins_of_the_list_pass(origin: str) -> None:
    passed = status(LOOPBACK, facts("localhost:8787", origin)) == 200
    own = origin.lower() in {"http://localhost:8787", "https://page.example", "https://page.example:443"}
    assert passed is (own and origin.isascii())


@given(nasty | pieces)
def test_hypothesis_what_parses_has_nothing_hidden_in_it(text: str) -> None:
    try:
        authority = parse_authority(text)
    except ValueError:
        return
    assert authority.port is None or 1 <= authority.port <= 65535
    written = authority.host if authority.port is None else f"{authority.host}:{authority.port}"
    assert parse_authority(written) == authority, "the written form means the same"
    assert parse_authority(text.upper()) == authority
    assert not set(authority.host) & set("@/#?\\, \t\r\n\x00%")


@given(
    st.sampled_from(["http", "https"]),
    st.ip_addresses() | st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
    st.none() | st.integers(1, 65535),
)
def test_hypothesis_well_formed_origins_parse_to_their_triple(scheme: str, host: object, port: int | None) -> None:
    written = f"[{host}]" if ":" in str(host) else str(host)
    suffix = "" if port is None else f":{port}"
    default = 443 if scheme == "https" else 80
    origin = parse_origin(f"{scheme}://{written}{suffix}")
    authority = parse_authority(f"{written}{suffix}")
    assert origin == Origin(scheme, authority.host, port or default)
    assert authority == Authority(origin.host, port)
    assert parse_origin(f"{scheme.upper()}://{written.upper()}{suffix}") == origin
