"""The client's end against our own server, a foreign one, and servers that misbehave."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import websockets

from broker.links.connect import connect
from broker.links.handshake import HandshakeError, accept_key
from broker.links.limits import LinkLimits
from broker.links.loop import LoopLinks
from broker.wire.frames import TEXT, text_frame
from tests.links.harness import ENDS, LOOPS, Recorder, frame, run, serving, until

loops = pytest.mark.parametrize("loop", LOOPS)


@asynccontextmanager
async def answering(reply: bytes, *, close: bool = True) -> AsyncIterator[int]:
    """A server that answers any request with ``reply``, its key's accept put in for ACCEPT."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0].decode()
            writer.write(reply.replace(b"ACCEPT", accept_key(key).encode()))
            if not close:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


@pytest.mark.parametrize(("kind", "loop"), ENDS)
def test_the_chosen_subprotocol_is_known_at_both_ends(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server:
            link = await connect(
                server.url, server.links, subprotocols=["bearer.x", "jsonrpc"], ssl_context=server.client_context
            )
            assert link.subprotocol == "jsonrpc"
            assert (await server.peer()).link.subprotocol == "jsonrpc"
            link.start(Recorder(link))

    run(main, loop)


@loops
def test_a_foreign_server_is_spoken_with(loop: str) -> None:
    async def echo(foreign: websockets.ServerConnection) -> None:
        async for message in foreign:
            await foreign.send(message)

    async def main() -> None:
        links = LoopLinks()
        async with websockets.serve(echo, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            link = await connect(f"ws://127.0.0.1:{port}/", links)
            heard = Recorder(link)
            link.start(heard)
            link.send("grüße".encode())
            link.send(b"b" * 300_000, binary=True)
            await until(lambda: len(heard.messages) == 2, "both came back")
            assert heard.messages == [("grüße".encode(), False), (b"b" * 300_000, True)]
            link.close(1000)
            await until(lambda: not links.links, "closed")
            assert heard.closings == [(1000, "")]

    run(main, loop)


@loops
def test_what_the_server_sends_with_its_101_is_heard(loop: str) -> None:
    async def main() -> None:
        links = LoopLinks()
        reply = SWITCH + b"Sec-WebSocket-Accept: ACCEPT\r\n\r\n" + text_frame(b"welcome")
        async with answering(reply) as port:
            link = await connect(f"ws://127.0.0.1:{port}/", links)
            heard = Recorder(link)
            link.start(heard)
            await until(lambda: bool(heard.closings), "told")
            assert heard.messages == [(b"welcome", False)]
            assert heard.closings == [(1006, "")]

    run(main, loop)


@loops
def test_a_server_that_masks_is_refused(loop: str) -> None:
    async def main() -> None:
        links = LoopLinks(LinkLimits(close_timeout_s=0.2))
        reply = SWITCH + b"Sec-WebSocket-Accept: ACCEPT\r\n\r\n" + frame(TEXT, b"x")
        async with answering(reply, close=False) as port:
            link = await connect(f"ws://127.0.0.1:{port}/", links)
            heard = Recorder(link)
            link.start(heard)
            await until(lambda: not links.links, "gone")
            assert heard.closings == [(1002, "a server must not mask its frames")]

    run(main, loop)


@loops
@pytest.mark.parametrize("length", [b"Content-Length: 6\r\n", b""])
def test_a_refusal_carries_status_headers_and_body(loop: str, length: bytes) -> None:
    async def main() -> None:
        links = LoopLinks()
        async with answering(b"HTTP/1.1 401 Unauthorized\r\nX-A: b\r\n" + length + b"\r\nreason") as port:
            with pytest.raises(HandshakeError, match="HTTP 401") as caught:
                await connect(f"ws://127.0.0.1:{port}/", links)
            assert (caught.value.status, caught.value.body) == (401, b"reason")
            assert ("X-A", "b") in caught.value.headers
        assert links.links == []

    run(main, loop)


@loops
@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 101 X\r\n\r\n",
        SWITCH + b"Sec-WebSocket-Accept: wrong\r\n\r\n",
        SWITCH + b"Sec-WebSocket-Accept: ACCEPT\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 100_000,
    ],
    ids=["ssh", "bare", "accept", "extension", "endless"],
)
def test_a_wrong_reply_is_an_error_and_leaves_nothing(loop: str, reply: bytes) -> None:
    async def main() -> None:
        links = LoopLinks()
        async with answering(reply, close=False) as port:
            with pytest.raises(HandshakeError):
                await connect(f"ws://127.0.0.1:{port}/", links)
        assert links.links == []

    run(main, loop)


@loops
def test_a_server_that_says_nothing_is_given_up(loop: str) -> None:
    async def main() -> None:
        links = LoopLinks()
        async with answering(b"", close=False) as port:
            with pytest.raises(TimeoutError):
                await connect(f"ws://127.0.0.1:{port}/", links, open_timeout_s=0.1)
        async with answering(b"") as port:
            with pytest.raises(ConnectionError):
                await connect(f"ws://127.0.0.1:{port}/", links)
        with pytest.raises(ConnectionRefusedError):
            await connect(f"ws://127.0.0.1:{port}/", links)

    run(main, loop)


def test_an_unknown_certificate_is_refused() -> None:
    async def main() -> None:
        async with serving("tls") as server:
            with pytest.raises(ssl.SSLCertVerificationError):
                await connect(server.url, server.links)

    run(main)


@pytest.mark.parametrize("url", ["http://localhost/", "ws://", "localhost:80", "ws://u:p@localhost/", "ws://a/#b"])
def test_a_url_that_is_no_websocket_is_refused(url: str) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="WebSocket"):
            await connect(url, LoopLinks())

    run(main)
