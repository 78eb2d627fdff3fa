"""Finds links that are dead, stalled or overdue, with one timer for all links of a loop.

All times come from the sweep itself: a link only raises its `heard` flag for each chunk. Between two
sweeps nothing is known, so silence is rounded up and patience down: a link is noticed dead within
``ping_interval_s + ping_timeout_s`` and a closing one dropped within ``close_timeout_s``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.links.limits import LinkCounters, LinkLimits
from broker.links.link import Link
from broker.wire.frames import BROKEN

if TYPE_CHECKING:
    import asyncio

_TICK_S = 0.5


class Liveness:
    """The sweep over the links of one loop. The timer runs only while there are links.

    A sweep that comes late by more than its period (the process was stopped, the loop blocked) forgives:
    every patience starts anew, so that what waits in the sockets is read first.
    """

    __slots__ = (
        "_blocked",
        "_closing",
        "_counters",
        "_due",
        "_limits",
        "_links",
        "_loop",
        "_next_pass",
        "_now",
        "_pinged",
        "_timer",
        "pass_s",
        "tick_s",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: LinkLimits, counters: LinkCounters) -> None:
        self._loop = loop
        self._limits = limits
        self._counters = counters
        self._links: dict[Link, None] = {}
        self._pinged: dict[Link, float] = {}
        self._blocked: dict[Link, tuple[int, float | None]] = {}  # flushed and since when
        self._closing: dict[Link, float | None] = {}
        self._timer: asyncio.TimerHandle | None = None
        times = [limits.stall_s / 8, limits.close_timeout_s / 4, limits.ping_timeout_s / 4]
        if limits.ping_interval_s:
            times.append(limits.ping_interval_s / 8)
        self.tick_s = min(_TICK_S, *times)
        self.pass_s = max(self.tick_s, limits.ping_interval_s / 8)
        self._now = self._due = self._next_pass = 0.0

    def __len__(self) -> int:
        return len(self._links)

    @property
    def links(self) -> list[Link]:
        """All links whose sockets are not gone yet, oldest first."""
        return list(self._links)

    @property
    def ticking(self) -> bool:
        """Whether the timer is armed."""
        return self._timer is not None

    def add(self, link: Link) -> None:
        """Watch a link from now on."""
        if self._timer is None:
            self._now = self._loop.time()
            self._next_pass = self._now + self.pass_s
            self._arm()
        link.heard_at = self._now
        self._links[link] = None

    def forget(self, link: Link) -> None:
        """Watch a link no more; its socket is gone."""
        self._links.pop(link, None)
        self._pinged.pop(link, None)
        self._blocked.pop(link, None)
        self._closing.pop(link, None)
        if not self._links and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def blocked(self, link: Link) -> None:
        """Watch the outbox of a link whose kernel buffer is full."""
        self._blocked.setdefault(link, (link.flushed, None))

    def unblocked(self, link: Link) -> None:
        """The kernel took everything that was given to it."""
        self._blocked.pop(link, None)

    def closing(self, link: Link) -> None:
        """Drop a link at the latest `close_timeout_s` from now."""
        self._closing.setdefault(link, None)

    def _arm(self) -> None:
        self._due = self._loop.time() + self.tick_s
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        late = now - self._due > self.tick_s
        if self._links:
            self._arm()
        self.sweep(now, late=late)

    def sweep(self, now: float, *, late: bool = False) -> None:
        """Look at everything whose time may have come at ``now`` (the loop's clock, seconds)."""
        self._now = now
        if late:
            self._forgive(now)
        if self._pinged:
            self._expire_pinged(now)
        if self._blocked:
            self._expire_blocked(now)
        if self._closing:
            self._expire_closing(now)
        if self._limits.ping_interval_s and now >= self._next_pass:
            self._next_pass = now + self.pass_s
            self._ping_silent(now)

    def _forgive(self, now: float) -> None:
        self._pinged = dict.fromkeys(self._pinged, now)
        self._blocked = {link: (flushed, now) for link, (flushed, _) in self._blocked.items()}
        self._closing = dict.fromkeys(self._closing, now)

    def _expire_pinged(self, now: float) -> None:
        for link, since in list(self._pinged.items()):
            if link.heard or link.paused or not link.is_open:
                del self._pinged[link]
            elif now - since >= self._limits.ping_timeout_s:
                del self._pinged[link]
                self._counters.ping_timeouts += 1
                link.abort(BROKEN, "ping timeout")

    def _expire_blocked(self, now: float) -> None:
        for link, (flushed, since) in list(self._blocked.items()):
            reached = link.progress()
            if reached != flushed or since is None:
                self._blocked[link] = (reached, now)
            elif now - since >= self._limits.stall_s:
                del self._blocked[link]
                link.slow(f"nothing read for {self._limits.stall_s:g} s")

    def _expire_closing(self, now: float) -> None:
        patience_s = self._limits.close_timeout_s - self.tick_s
        for link, since in list(self._closing.items()):
            if since is None:
                self._closing[link] = now
            elif now - since >= patience_s:
                del self._closing[link]
                link.abort()

    def _ping_silent(self, now: float) -> None:
        silence_s = max(self._limits.ping_interval_s - 2 * self.pass_s - self.tick_s, self.pass_s)
        for link in list(self._links):
            if link.heard or link.paused:
                link.heard = False
                link.heard_at = now
            elif now - link.heard_at >= silence_s and link not in self._pinged and link.is_open:
                self._pinged[link] = now
                link.ping()
