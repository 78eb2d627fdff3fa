"""What the links of one event loop share: writer, sweep, receive buffer, bounds, counters."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from broker.core.budget import Budget
from broker.links import compiled
from broker.links.limits import LinkCounters, LinkLimits
from broker.links.link import Link, Writer
from broker.links.liveness import Liveness
from broker.wire import native
from broker.wire.frames import CARRY_MAX_BYTES, EVENTS_MAX, Unmask, xor_mask
from broker.wire.native import Reader

if TYPE_CHECKING:
    from broker.links.pair import PairLink
    from broker.links.zeromq import ZmqLink

# Larger does not make many small frames cheaper, and from 128 KiB on each chunk's copy is memory newly mapped:
# a 16 MiB echo costs about 20 ms of CPU with 64 KiB and mostly 33 ms with 256 KiB.
RECEIVE_BYTES = 64 << 10
WHOLE_RECEIVE_BYTES = 256 << 10
"""where frames are read in the buffer itself, without a copy of the chunk: fewer are cut in two (10 % off at 16 KiB)"""


def fastest_unmask() -> Unmask:
    """Return tornado's C function where it was built, else the one of `wire.frames` (tens of times faster
    than tornado's own Python one).
    """
    try:
        from tornado.speedups import websocket_mask
    except ImportError:
        return xor_mask
    unmask: Unmask = websocket_mask
    return unmask


class LoopLinks:
    """Made inside a running event loop, handed to `take` and `connect`; several may live side by side."""

    __slots__ = (
        "_gone",
        "_masks",
        "budget",
        "counters",
        "limits",
        "liveness",
        "loop",
        "native",
        "pairs",
        "receive_buffer",
        "receive_room",
        "unmask",
        "whole_receive_room",
        "writer",
    )

    def __init__(
        self,
        limits: LinkLimits | None = None,
        counters: LinkCounters | None = None,
        *,
        budget: Budget | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.limits = limits or LinkLimits()
        self.counters = counters or LinkCounters()
        self.budget = budget or Budget()
        self.liveness = Liveness(self.loop, self.limits, self.counters)
        self.pairs: dict[PairLink | ZmqLink, None] = {}
        self.receive_buffer = memoryview(bytearray(CARRY_MAX_BYTES + WHOLE_RECEIVE_BYTES))
        self.receive_room = self.receive_buffer[:RECEIVE_BYTES]
        self.whole_receive_room = self.receive_buffer[:WHOLE_RECEIVE_BYTES]
        self.unmask = fastest_unmask()
        self.native = Reader is not None and compiled.wanted()  # whether links read and write in C
        self.writer = Writer(self.loop, self.counters, native.flush) if self.native else Writer(self.loop)
        self._masks = b""
        self._gone = asyncio.Event()

    @property
    def links(self) -> list[Link]:
        """All links whose sockets are not gone yet."""
        return self.liveness.links

    def new_reader(self, *, masked: bool, limits: LinkLimits) -> Reader | None:
        """What takes plain frames out of one link's bytes in C; None where that was not built, or is not wanted."""
        return Reader(masked, limits.message_max_bytes, EVENTS_MAX) if self.native else None

    def next_mask(self) -> bytes:
        """Return 4 unpredictable bytes (RFC 6455, 10.3), drawn from the system 4 KiB at a time."""
        if not self._masks:
            self._masks = os.urandom(4096)
        mask, self._masks = self._masks[:4], self._masks[4:]
        return mask

    def count(self, size: int) -> None:
        """So many bytes more wait in an outbox, or fewer. A link says it once per turn, not for each message."""
        self.budget.used += size
        self.budget.outboxes += size

    def add(self, link: Link) -> None:
        """A link's transport is there."""
        self.counters.opened += 1
        self.liveness.add(link)

    def forget(self, link: Link) -> None:
        """A link's transport is gone."""
        self.counters.closed += 1
        self.liveness.forget(link)
        self._look_whether_gone()

    def join(self, link: PairLink | ZmqLink) -> None:
        """An end of a pair is there, or a peer over ZeroMQ: links that need no sweep."""
        self.pairs[link] = None

    def part(self, link: PairLink | ZmqLink) -> None:
        """It is gone."""
        self.pairs.pop(link, None)
        self._look_whether_gone()

    def _look_whether_gone(self) -> None:
        if not self.liveness and not self.pairs:
            self._gone.set()

    def _all(self) -> list[Link | PairLink | ZmqLink]:
        return [*self.links, *self.pairs]

    async def close(self, code: int = 1001, reason: str = "going away") -> None:
        """Close every link and return when all sockets are gone, after `close_timeout_s` at the latest."""
        for link in self._all():
            link.close(code, reason)
        if not await self._all_gone(self.limits.close_timeout_s):
            for link in self._all():
                link.abort()
            await self._all_gone(self.limits.close_timeout_s)

    async def _all_gone(self, timeout_s: float) -> bool:
        if not self.links and not self.pairs:
            return True
        self._gone.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._gone.wait()
        except TimeoutError:
            return False
        return True
