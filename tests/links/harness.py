"""A small server over the links and raw clients, for the tests of this folder."""

from __future__ import annotations

import asyncio
import base64
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from benchmarks.echo import self_signed
from broker.links.acceptor import AcceptLimits, Acceptor, Opens
from broker.links.handshake import Refusal, check_upgrade, choose_subprotocol, switching_protocols, upgrade_request
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.links.take import take

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
ENDS = [(kind, loop) for kind in ("socket", "stream", "tls") for loop in LOOPS]
MASK = b"\x0a\x0b\x0c\x0d"


def run(main: Callable[[], Awaitable[None]], loop: str = "asyncio", timeout_s: float = 40) -> None:
    """Run a test on a loop of its own; fails if a task is left."""

    async def guarded() -> None:
        async with asyncio.timeout(timeout_s):
            await main()
        # Tornado's serving loops and closing transports end in the turns after their sockets are gone.
        await until(lambda: len(asyncio.all_tasks()) == 1, "no task is left")

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(guarded())


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    """Wait for a condition, politely."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.005)


class Recorder:
    """A receiver that keeps everything."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.messages: list[tuple[bytes, bool]] = []
        self.congestion: list[bool] = []
        self.closings: list[tuple[int, str]] = []

    def message(self, payload: bytes, binary: bool) -> None:
        assert not self.closings, "a message after the end"
        self.messages.append((payload, binary))

    def congested(self, congested: bool) -> None:
        assert not self.closings, "a signal after the end"
        self.congestion.append(congested)

    def closed(self, code: int, reason: str) -> None:
        self.closings.append((code, reason))


class Echoing(Recorder):
    """Answers every message with itself."""

    def message(self, payload: bytes, binary: bool) -> None:
        super().message(payload, binary)
        self.link.send(payload, binary)


class Server:
    """What `serving` yields."""

    def __init__(self, links: LoopLinks, kind: str, receiver: type[Recorder], start: bool) -> None:
        self.start = start
        self.links = links
        self.kind = kind
        self.receiver = receiver
        self.peers: list[Recorder] = []
        self.failures: list[BaseException] = []
        self.port = 0
        self.acceptor: Acceptor
        self.client_context: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"{'wss' if self.client_context else 'ws'}://localhost:{self.port}/ws"

    async def peer(self, index: int = 0) -> Recorder:
        await until(lambda: len(self.peers) > index, f"peer {index} is there")
        return self.peers[index]


class Upgrading(RequestHandler):
    def initialize(self, server: Server) -> None:
        self.server = server

    def prepare(self) -> None:
        self.server.acceptor.requested(self.request.connection.stream)  # type: ignore[union-attr]

    async def get(self) -> None:
        if self.request.path == "/plain":
            self.finish("plain")
            return
        judged = check_upgrade(self.request.method or "", self.request.headers)
        if isinstance(judged, Refusal):
            self.set_status(judged.status)
            self.finish(judged.reason)
            return
        chosen = choose_subprotocol(judged.subprotocols)
        reply = switching_protocols(judged.key, chosen)
        stream = self.detach()
        self.server.acceptor.authenticated(stream)
        try:
            link = await take(
                stream, reply, self.server.links, subprotocol=chosen, keep_stream=self.server.kind != "socket"
            )
        except OSError as error:
            self.server.failures.append(error)
            return
        peer = self.server.receiver(link)
        self.server.peers.append(peer)
        if self.server.start:
            link.start(peer)


@asynccontextmanager
async def serving(
    kind: str = "socket",
    *,
    limits: LinkLimits | None = None,
    receiver: type[Recorder] = Recorder,
    start: bool = True,
    accept_limits: AcceptLimits | None = None,
    opens: Opens | None = None,
) -> AsyncIterator[Server]:
    """Serve WebSockets on a free port; afterwards nothing may be left."""
    links = LoopLinks(limits)
    server = Server(links, kind, receiver, start)
    http = HTTPServer(Application([("/.*", Upgrading, {"server": server})]), idle_connection_timeout=10)
    context = None
    if kind == "tls":
        with tempfile.TemporaryDirectory() as folder:
            context = self_signed(Path(folder))
            server.client_context = ssl.create_default_context(cafile=str(Path(folder, "cert.pem")))
    server.acceptor = Acceptor(http, ssl_context=context, limits=accept_limits, opens=opens)
    server.acceptor.add_sockets(bind_sockets(0, "127.0.0.1"))
    server.port = server.acceptor.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        server.acceptor.close()
        await links.close()
        await http.close_all_connections()
    assert links.links == []
    assert not links.liveness.ticking
    assert [len(peer.closings) for peer in server.peers] == [1] * len(server.peers)


def frame(opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True) -> bytes:
    """A frame as a client sends it."""
    first, bit, size = (0x80 if final else 0) | opcode, 0x80 if masked else 0, len(payload)
    if size < 126:
        head = bytes([first, bit | size])
    elif size < 65_536:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if not masked:
        return head + payload
    key = (MASK * (size // 4 + 1))[:size]
    return head + MASK + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


class RawClient:
    """A WebSocket client that does exactly what it is told, and nothing by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def frame(self) -> tuple[int, bytes]:
        """The next frame of the server: opcode and payload."""
        first, second = await self.reader.readexactly(2)
        size = second & 127
        if size == 126:
            size = int.from_bytes(await self.reader.readexactly(2), "big")
        elif size == 127:
            size = int.from_bytes(await self.reader.readexactly(8), "big")
        assert second < 128, "a server masked"
        return first & 15, await self.reader.readexactly(size)

    async def rest(self) -> bytes:
        """Everything until the server ends the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b"reset"

    async def gone(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass


def opening() -> bytes:
    return upgrade_request("localhost", "/ws", base64.b64encode(b"k" * 16).decode())


@asynccontextmanager
async def raw_client(server: Server, first: bytes = b"", *, limit: int = 1 << 16) -> AsyncIterator[RawClient]:
    """Open a raw connection; ``first`` goes out in one write with the request."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1",
        server.port,
        ssl=server.client_context,
        server_hostname="localhost" if server.client_context else None,
        limit=limit,
    )
    client = RawClient(reader, writer)
    writer.write(opening() + first)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    try:
        yield client
    finally:
        await client.gone()
