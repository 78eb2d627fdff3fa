"""The adapter: a real tornado server's requests become facts that lose and add nothing."""

import asyncio

import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from broker.auth.facts import RequestFacts, facts_of
from broker.auth.proxies import TrustedProxies


async def _ask(raw: bytes, proxies: TrustedProxies) -> tuple[RequestFacts | None, bytes]:
    seen: list[RequestFacts] = []

    class Answer(RequestHandler):
        def get(self) -> None:
            seen.append(facts_of(self.request, proxies))

    server = HTTPServer(Application([(r"/.*", Answer)]))
    sock, port = bind_unused_port()
    server.add_socket(sock)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw)
        reply = await reader.read()  # they ask for the connection to be closed
        writer.close()
        await writer.wait_closed()
    finally:
        server.stop()
        await server.close_all_connections()
    return (seen[0] if seen else None), reply


def ask(*lines: str, proxies: TrustedProxies | None = None) -> RequestFacts:
    raw = "\r\n".join([*lines, "Connection: close"]).encode("latin-1") + b"\r\n\r\n"
    facts, _ = asyncio.run(_ask(raw, proxies or TrustedProxies()))
    assert facts is not None
    return facts


def test_headers_keep_every_line_and_names_become_lower_case() -> None:
    facts = ask(
        "GET /ws/data?ticket=a%2Db&ticket=c&empty= HTTP/1.1",
        "Host: localhost:1",
        "AUTHORIZATION: Bearer one",
        "authorization: Bearer two",
        "Origin: null",
    )
    assert (facts.method, facts.path) == ("GET", "/ws/data")
    assert facts.header("authorization") == ("Bearer one", "Bearer two")
    assert facts.header("origin") == ("null",)
    assert facts.header("cookie") == ()
    assert facts.parameter("ticket") == ("a-b", "c")
    assert facts.parameter("empty") == ("",)
    assert facts.parameter("absent") == ()
    assert (facts.remote, facts.secure) == ("127.0.0.1", False)


def test_forwarding_headers_count_from_a_trusted_proxy_only() -> None:
    lines = ("GET / HTTP/1.1", "Host: x", "X-Forwarded-For: 192.0.2.7", "X-Forwarded-Proto: https")
    believed = ask(*lines, proxies=TrustedProxies(["127.0.0.1"]))
    assert (believed.remote, believed.secure) == ("192.0.2.7", True)
    not_believed = ask(*lines)
    assert (not_believed.remote, not_believed.secure) == ("127.0.0.1", False)


def test_bytes_that_are_no_utf_8_in_the_query_are_no_crash() -> None:
    assert ask("GET /?ticket=%FF%00 HTTP/1.1", "Host: x").parameter("ticket") == ("\ufffd\x00",)


@pytest.mark.parametrize("hosts", [("a", "b"), ("localhost", "localhost"), ()])
def test_row_27_tornado_itself_answers_a_doubled_or_missing_host_with_400(hosts: tuple[str, ...]) -> None:
    raw = "\r\n".join(["GET / HTTP/1.1", *(f"Host: {host}" for host in hosts)]).encode() + b"\r\n\r\n"
    facts, reply = asyncio.run(_ask(raw, TrustedProxies()))
    assert facts is None
    assert reply.startswith(b"HTTP/1.1 400")
