"""The plainest opening request: what is taken for one is what tornado reads in the same bytes; all else is nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders, HTTPServerRequest, parse_request_start_line

from broker.links.handshake import Upgrade, check_upgrade
from broker.links.opening import read_opening

PLAIN = (
    b"GET /ws/lab?role=worker&meta=1 HTTP/1.1\r\nHost: localhost:80\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer abc\r\n\r\n"
)


def test_the_plain_request_is_read() -> None:
    request = read_opening(PLAIN)
    assert request is not None
    assert (request.path, request.query) == ("/ws/lab", (("role", "worker"), ("meta", "1")))
    assert request.get_list("Authorization") == ["Bearer abc"]
    assert request.get_list("Origin") == []
    assert check_upgrade("GET", request) == Upgrade("dGhlIHNhbXBsZSBub25jZQ==")


def changed(old: bytes, new: bytes) -> bytes:
    assert old in PLAIN
    return PLAIN.replace(old, new, 1)


NOT_PLAIN = [
    b"", b"\r\n\r\n", PLAIN[:-1], PLAIN[:-2], PLAIN + b"x", PLAIN + PLAIN, PLAIN + b"body\r\n\r\n", b"\r\n" + PLAIN,
    b"\x16\x03\x01" + PLAIN, PLAIN.replace(b"\r\n", b"\n"), changed(b"Host", "Höst".encode()),
    changed(b"abc", "ä".encode()), changed(b"abc", b"\xff"), changed(b"abc", b"a\tb"), changed(b"abc", b"a\x00b"),
    changed(b"abc", b"a\rb"), changed(b"abc", b"a\nb"), changed(b"Bearer abc", b""),
    *(changed(b"GET", method) for method in (b"POST", b"get", b"GET ", b" GET")),
    *(changed(b"HTTP/1.1", version) for version in (b"HTTP/1.0", b"HTTP/2", b"http/1.1", b"HTTP/1.1 ")),
    *(changed(b"/ws/lab", path) for path in (
        b"ws/lab", b"/", b"//ws", b"/ws/", b"/ws//lab", b"/ws/%6cab", b"*", b"http://localhost/ws", b"/ws/l:b",
        b"/ws/l b", b"/ws/lab#x",
    )),
    *(changed(b"role=worker&meta=1", query) for query in (
        b"", b"role", b"role=", b"=worker", b"role=worker&", b"&role=worker", b"role=a&role=b", b"role=%61",
        b"role=a+b",
        b"role=a;b=c", b"role=a=b", b"role=a?b",
    )),
    *(changed(b"Authorization: ", name) for name in (
        b"Authorization:", b"Authorization : ", b"Authorization:  ", b" Authorization: ", b"Authorization\t: ",
        b"Authorization: \t", b"Host: ", b"HOST: ", b"Origin: ", b"Cookie: ", b"Content-Length: ",
        b"Transfer-Encoding: ", b"Expect: ", b"X-Forwarded-For: ", b"X-Forwarded-Proto: ", b"Forwarded: ",
        b"Sec-Fetch-Site: ", b"X-Scheme: ", b"X-Real-Ip: ", b": ", b"",
    )),
]  # fmt: skip


def test_what_is_not_plain_is_nothing() -> None:
    assert [data for data in NOT_PLAIN if read_opening(data) is not None] == []
    assert read_opening(PLAIN) is not None


PIECES = [
    b"GET ", b"/ws", b"/lab", b"?role=worker", b"&meta=1", b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"Host: a",
    b"User-Agent: b c",
    b"Authorization: Bearer x", b"Origin: http://a", b"Accept: ", b"Accept: */*", b" ", b"\t", b":", b"=", b"%20",
    b"\n",
    b"\x00", b"\x7f", b"\x85", b"Content-Length: 1", b"Upgrade: websocket",
]  # fmt: skip


def cut_and_filled(data: bytes, at: list[tuple[int, int, bytes]]) -> bytes:
    for begin, size, piece in at:
        begin %= len(data) + 1
        data = data[:begin] + piece + data[begin + size :]
    return data


CHANGES = st.tuples(st.integers(0, 400), st.integers(0, 30), st.sampled_from(PIECES) | st.binary(max_size=3))
REQUESTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    st.lists(CHANGES, max_size=4).map(lambda changes: cut_and_filled(PLAIN, changes)),
)


@settings(max_examples=1500, deadline=None)
@given(REQUESTS)
def test_what_is_taken_says_the_same_to_tornado(data: bytes) -> None:
    request = read_opening(data)
    if request is None:
        return
    first, _, rest = data.decode("ascii").partition("\r\n")
    start = parse_request_start_line(first)
    headers = HTTPHeaders.parse(rest)
    assert (start.method, start.version) == ("GET", "HTTP/1.1")
    assert sorted((name.lower(), value) for name, value in headers.get_all()) == sorted(request.headers.items())
    headers["Host"] = "localhost"  # which rules of our own judge, stricter than tornado's
    theirs = HTTPServerRequest(start_line=start, headers=headers)
    assert theirs.path == request.path
    query = [(name, value.decode()) for name, values in theirs.query_arguments.items() for value in values]
    assert tuple(query) == request.query
