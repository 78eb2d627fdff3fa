"""A TCP proxy that spoils what goes through it: cuts, silence, delay, throttling, freezing.

Each name has a port of its own, so that trouble can be aimed at one peer, and asked about afterwards.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable

CHUNK_BYTES = 65_536
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time at all: closing sends RST"""


class Way:
    """One direction of a pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.open = asyncio.Event()
        self.open.set()
        self.delay_s = 0.0
        self.rate: float | None = None
        """bytes per second at most"""
        self.bytes = 0

    async def run(self) -> None:
        """Hand on until the end of what comes, or until it is cancelled."""
        while data := await self.reader.read(CHUNK_BYTES):
            await self.open.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            rate = self.rate
            step = 4096 if rate else len(data)
            for at in range(0, len(data), step):
                chunk = data[at : at + step]
                if rate:
                    await asyncio.sleep(len(chunk) / rate)
                    await self.open.wait()
                self.writer.write(chunk)
                self.bytes += len(chunk)
                await self.writer.drain()


class Pair:
    """A connection of a peer and the one to the broker that belongs to it."""

    def __init__(self, name: str, near: Way, far: Way) -> None:
        self.name = name
        self.there = Way(near.reader, far.writer)
        self.back = Way(far.reader, near.writer)
        self._tasks = [asyncio.ensure_future(way.run()) for way in (self.there, self.back)]

    async def last(self) -> None:
        """Until one side ends, or it is cut."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        """End both connections; with RST, unless they have ended properly."""
        for task in self._tasks:
            task.cancel()
        for way in (self.there, self.back):
            sock = way.writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0 and not way.reader.at_eof():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            way.writer.transport.abort() if not way.reader.at_eof() else way.writer.close()

    def hold(self) -> None:
        """Hand on nothing more, in neither direction, and tell nobody: a cable that was cut, or a frozen middlebox."""
        self.there.open.clear()
        self.back.open.clear()

    def go_on(self) -> None:
        """Hand on again, what has waited first."""
        for way in (self.there, self.back):
            way.open.set()
            way.delay_s, way.rate = 0.0, None

    def slow_down(self, delay_s: float = 0.0, rate: float | None = None) -> None:
        """From now on every chunk comes so much later, or so many bytes a second."""
        for way in (self.there, self.back):
            way.delay_s, way.rate = delay_s, rate


class Proxy:
    """All pairs, by the name of the peer. `on_event` hears what happens to them."""

    def __init__(self, target_port: int, on_event: Callable[[str], None] = lambda text: None) -> None:
        self.target_port = target_port
        self.pairs: dict[str, list[Pair]] = {}
        self.ports: dict[str, int] = {}
        self.opened = 0
        self._on_event = on_event
        self._spoiled: dict[str, deque[tuple[float, float]]] = {}
        self._servers: list[asyncio.Server] = []
        self._timers: dict[asyncio.TimerHandle, None] = {}

    async def listen(self, name: str) -> int:
        """A port for this name."""
        self.pairs[name] = []
        self._spoiled[name] = deque(maxlen=1000)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(name, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        self._servers.append(server)
        self.ports[name] = int(server.sockets[0].getsockname()[1])
        return self.ports[name]

    async def _serve(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        pair = Pair(name, Way(reader, writer), Way(far_reader, far_writer))
        self.pairs[name].append(pair)
        try:
            await pair.last()
        except asyncio.CancelledError:
            pair.reset()
        finally:
            self.pairs[name].remove(pair)

    async def close(self) -> None:
        """Reset everything and listen no more."""
        for timer in self._timers:
            timer.cancel()
        for server in self._servers:
            server.close()
        for pair in self.all_pairs():
            pair.reset()
        while self.all_pairs():
            await asyncio.sleep(0.01)

    def all_pairs(self) -> list[Pair]:
        """Every connection there is, in a fixed order."""
        return [pair for pairs in self.pairs.values() for pair in pairs]

    # ------------------------------------------------------------ trouble

    def was_spoiled(self, name: str, since: float) -> bool:
        """Whether any connection of this name was in trouble at any time after `since` (`time.monotonic`)."""
        return any(until >= since for _, until in self._spoiled[name])

    def _note(self, pair: Pair, what: str, lasts_s: float) -> None:
        now = time.monotonic()
        self._spoiled[pair.name].append((now, now + lasts_s + 0.5))
        self._on_event(f"{pair.name}: {what}")

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.pop(timer, None)
            act()

        timer = asyncio.get_running_loop().call_later(seconds, run)
        self._timers[timer] = None

    def cut(self, pair: Pair) -> None:
        """End it with RST."""
        self._note(pair, "cut", 0.0)
        pair.reset()

    def silence(self, pair: Pair, seconds: float) -> None:
        """Half-open: nothing goes through any more, and much later it is found to be dead."""
        self._note(pair, f"silent for {seconds:.2f} s, then cut", seconds)
        pair.hold()
        self._later(seconds, pair.reset)

    def freeze(self, pair: Pair, seconds: float) -> None:
        """Nothing goes through for a while; then all of it does."""
        self._note(pair, f"frozen for {seconds:.2f} s", seconds)
        pair.hold()
        self._later(seconds, pair.go_on)

    def slow(self, pair: Pair, seconds: float, delay_s: float, rate: float | None) -> None:
        """Late, or in small sips, for a while."""
        self._note(pair, f"slow for {seconds:.2f} s: {delay_s:.3f} s late, {rate and round(rate)} bytes/s", seconds * 2)
        pair.slow_down(delay_s, rate)
        self._later(seconds, pair.go_on)
