"""A clock and a network that exist only in memory: an event loop that never waits, and connections made of delays.

The same seed gives the same run: whatever could come from the system (time, sockets) comes from here.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

KERNEL_BYTES = 65_536
"""what is under way in one direction before its sender has to wait"""


class _Selector(selectors.BaseSelector):
    """Never looks at a file: waiting is what moves the clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits, and nothing will ever happen")
        self.now += max(0.0, timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, int(fileobj), events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Any:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while everybody waits."""

    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


@contextmanager
def virtual_time() -> Iterator[VirtualLoop]:
    """A loop by whose clock `time.monotonic` goes meanwhile."""
    loop = VirtualLoop()
    real = time.monotonic
    time.monotonic = loop.time
    try:
        asyncio.set_event_loop(loop)
        yield loop
    finally:
        time.monotonic = real
        asyncio.set_event_loop(None)
        loop.close()


class Pretended:
    """What every pretend transport answers a link."""

    outgoing: bytearray
    closing: bool

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return len(self.outgoing)

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True


class End(Pretended):
    """One end of a connection: what asyncio calls a transport."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.loop = wire.loop
        self.other: End
        self.protocol: asyncio.BufferedProtocol
        self.delay_s = 0.0
        self.outgoing = bytearray()
        self.under_way = 0
        self.arrived: deque[bytes] = deque()
        self.reading = False
        self.closing = False
        self.lost = False
        self.blocked = False
        self.eof_asked = self.eof_sent = self.eof_seen = False
        self.latest = 0.0
        self.way: deque[Callable[[], None]] = deque()

    # ------------------------------------------------------------ what a link calls

    def write(self, data: bytes) -> None:
        if self.lost or self.eof_asked:
            return
        self.outgoing += data
        self._pump()
        if self.outgoing and not self.blocked:
            self.blocked = True
            self.protocol.pause_writing()

    def write_eof(self) -> None:
        self.eof_asked = True
        self._pump()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self.loop.call_soon(self._deliver)

    def close(self) -> None:
        if not self.closing:
            self.closing = self.eof_asked = True
            self._pump()

    def abort(self) -> None:
        self._lose()
        self.loop.call_later(self.delay_s, self.other._lose)

    # ------------------------------------------------------------ what goes through

    def _pump(self) -> None:
        """From this end's buffer onto the way, as far as there is room."""
        while self.outgoing and self.under_way < KERNEL_BYTES and not self.lost:
            size = min(len(self.outgoing), KERNEL_BYTES - self.under_way, self.wire.chunk())
            chunk = bytes(self.outgoing[:size])
            del self.outgoing[:size]
            self.under_way += size
            self._later(lambda chunk=chunk: self.other.arrives(chunk))  # type: ignore[misc]
        if not self.outgoing:
            if self.blocked:
                self.blocked = False
                self.loop.call_soon(self._unblock)
            if self.eof_asked and not self.eof_sent:
                self.eof_sent = True
                self._later(self.other.ends)
                if self.closing:
                    self._lose()

    def _unblock(self) -> None:
        if not self.lost:
            self.protocol.resume_writing()

    def _later(self, act: Callable[[], None]) -> None:
        self.latest = max(self.latest, self.loop.time() + self.delay_s)
        self.way.append(act)
        self.loop.call_at(self.latest, self._next)

    def _next(self) -> None:
        self.way.popleft()()  # timers of one moment run in any order, what is under way does not

    def arrives(self, chunk: bytes) -> None:
        """Something has come through to this end."""
        if not self.lost:
            self.arrived.append(chunk)
            self._deliver()

    def _deliver(self) -> None:
        while self.arrived and self.reading and not self.wire.held and not self.lost:
            chunk = self.arrived.popleft()
            while chunk and not self.lost:
                buffer = self.protocol.get_buffer(-1)
                size = min(len(chunk), len(buffer))
                cast(memoryview, buffer)[:size] = chunk[:size]
                self.protocol.buffer_updated(size)
                self.other.under_way -= size
                chunk = chunk[size:]
            self.other._pump()
        if self.eof_seen and not self.arrived and self.reading and not self.wire.held and not self.lost:
            self.eof_seen = False
            self.protocol.eof_received()
            self.close()

    def ends(self) -> None:
        """The other end will say nothing more."""
        self.eof_seen = True
        self._deliver()

    def _lose(self) -> None:
        if not self.lost:
            self.lost = self.closing = True
            self.loop.call_soon(self.protocol.connection_lost, None)


class Wire:
    """A connection: two ends with delays, and whatever befalls it."""

    def __init__(self, name: str, rng: random.Random, delay_s: float) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        self.random = rng
        self.held = False
        self.near, self.far = End(self), End(self)
        self.near.other, self.far.other = self.far, self.near
        self.near.delay_s = self.far.delay_s = delay_s

    @property
    def is_open(self) -> bool:
        """Whether anything can still come through."""
        return not (self.near.lost or self.far.lost)

    def chunk(self) -> int:
        """How much goes at once: now and then a few bytes only, so that frames come in pieces."""
        return self.random.choice((1 << 20, 1 << 20, 1 << 20, 1400, 17))

    def cut(self, later_s: float = 0.0) -> None:
        """It is broken; one end learns of it at once, the other so much later. What was under way is lost."""
        first, second = (self.near, self.far) if self.random.random() < 0.5 else (self.far, self.near)
        first._lose()
        self.loop.call_later(later_s, second._lose)

    def hold(self) -> None:
        """Nothing comes through."""
        self.held = True

    def go_on(self) -> None:
        """It does again, in order."""
        self.held = False
        for end in (self.near, self.far):
            self.loop.call_soon(end._deliver)
