"""The opening handshake by RFC 6455, 4.1 and 4.2."""

from __future__ import annotations

import pytest
from tornado.httputil import HTTPHeaders

from broker.links.handshake import (
    HandshakeError,
    Refusal,
    Upgrade,
    accept_key,
    check_reply,
    check_upgrade,
    choose_subprotocol,
    switching_protocols,
    upgrade_request,
)

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
GOOD = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


def headers(**changes: str | list[str] | None) -> HTTPHeaders:
    given = HTTPHeaders()
    for name, value in (GOOD | {name.replace("_", "-"): value for name, value in changes.items()}).items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                given.add(name, one)
    return given


def test_a_good_request_is_an_upgrade_with_what_it_offers() -> None:
    assert check_upgrade("GET", headers()) == Upgrade(KEY, ())
    offered = headers(Sec_WebSocket_Protocol=["jsonrpc, bearer.abc", "x"])
    assert check_upgrade("GET", offered) == Upgrade(KEY, ("jsonrpc", "bearer.abc", "x"))
    assert isinstance(check_upgrade("GET", headers(Upgrade="WebSocket", Connection="upgrade")), Upgrade)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Upgrade": None}, 426),
        ({"Upgrade": "h2c"}, 426),
        ({"Connection": None}, 400),
        ({"Connection": "keep-alive"}, 400),
        ({"Sec_WebSocket_Version": None}, 426),
        ({"Sec_WebSocket_Version": "8"}, 426),
        ({"Sec_WebSocket_Version": ["13", "8"]}, 426),
        ({"Sec_WebSocket_Key": None}, 400),
        ({"Sec_WebSocket_Key": "short"}, 400),
        ({"Sec_WebSocket_Key": "AAAA"}, 400),
        ({"Sec_WebSocket_Key": KEY + "="}, 400),
        ({"Sec_WebSocket_Key": "ü" * 24}, 400),
        ({"Sec_WebSocket_Key": [KEY, KEY]}, 400),
        ({"Host": None}, 400),
        ({"Host": ["localhost", "evil"]}, 400),
        ({"Host": "localhost,evil"}, 400),
        ({"Sec_WebSocket_Protocol": "a b"}, 400),
    ],
)
def test_a_request_that_breaks_a_rule_is_refused(changes: dict[str, str | list[str] | None], status: int) -> None:
    refusal = check_upgrade("GET", headers(**changes))
    assert isinstance(refusal, Refusal)
    assert refusal.status == status


def test_another_method_or_http_version_is_refused() -> None:
    assert check_upgrade("POST", headers()) == Refusal(
        405, "a WebSocket is opened with GET, not 'POST'", (("Allow", "GET"),)
    )
    refusal = check_upgrade("GET", headers(), "HTTP/1.0")
    assert isinstance(refusal, Refusal)


def test_a_wrong_version_is_told_the_right_one() -> None:
    refusal = check_upgrade("GET", headers(Sec_WebSocket_Version="8"))
    assert isinstance(refusal, Refusal)
    assert refusal.headers == (("Sec-WebSocket-Version", "13"),)


def test_the_accept_key_is_that_of_the_specification() -> None:
    assert accept_key(KEY) == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_credentials_are_never_chosen_as_subprotocol() -> None:
    assert choose_subprotocol(["bearer.abc", "jsonrpc"]) == "jsonrpc"
    assert choose_subprotocol(["bearer.abc"]) is None
    assert choose_subprotocol(["bearer.abc", "resume.1.x"], ["bearer.abc", "resume.1.x"]) is None
    assert choose_subprotocol([]) is None


def test_the_101_says_what_was_chosen_and_nothing_else() -> None:
    reply = switching_protocols(KEY, "jsonrpc", [("X-Trace", "1")])
    assert reply == (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: jsonrpc\r\n"
        b"X-Trace: 1\r\n\r\n"
    )
    assert b"Protocol:" not in switching_protocols(KEY)
    assert b"Extensions" not in reply


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "\0", "€"])
def test_a_header_cannot_smuggle_another(value: str) -> None:
    with pytest.raises(ValueError, match="no header may hold"):
        switching_protocols(KEY, None, [("X", value)])
    with pytest.raises(ValueError, match="no header may hold"):
        upgrade_request("localhost", "/", KEY, (), [("Authorization", value)])


def test_a_request_of_ours_is_one_that_we_take() -> None:
    raw = upgrade_request("localhost:8765", "/ws?a=1", KEY, ["jsonrpc", "bearer.x"], [("Origin", "http://localhost")])
    start, _, rest = raw.decode().partition("\r\n")
    assert start == "GET /ws?a=1 HTTP/1.1"
    assert check_upgrade("GET", HTTPHeaders.parse(rest)) == Upgrade(KEY, ("jsonrpc", "bearer.x"))


@pytest.mark.parametrize("target", ["ws", "/a b", ""])
def test_a_target_that_is_no_path_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="must begin with a slash"):
        upgrade_request("localhost", target, KEY)


def reply(**changes: str | list[str] | None) -> HTTPHeaders:
    good: dict[str, str | list[str] | None] = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": accept_key(KEY),
    }
    given = HTTPHeaders()
    for name, value in (good | {name.replace("_", "-"): value for name, value in changes.items()}).items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                given.add(name, one)
    return given


def test_a_good_reply_names_the_subprotocol() -> None:
    assert check_reply(KEY, ["jsonrpc"], reply()) is None
    assert check_reply(KEY, ["jsonrpc"], reply(Sec_WebSocket_Protocol="jsonrpc")) == "jsonrpc"


@pytest.mark.parametrize(
    "changes",
    [
        {"Upgrade": None},
        {"Connection": "close"},
        {"Sec_WebSocket_Accept": None},
        {"Sec_WebSocket_Accept": accept_key("other")},
        {"Sec_WebSocket_Extensions": "permessage-deflate"},
        {"Sec_WebSocket_Protocol": "other"},
        {"Sec_WebSocket_Protocol": ["jsonrpc", "jsonrpc"]},
    ],
)
def test_a_reply_that_breaks_a_rule_is_refused(changes: dict[str, str | list[str] | None]) -> None:
    with pytest.raises(HandshakeError):
        check_reply(KEY, ["jsonrpc"], reply(**changes))
