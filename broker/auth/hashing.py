"""Slow hashes off the event loop: two threads, a bounded line before them, and no one in it twice."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from broker.auth.facts import Refused

THREADS = 2
WAITING_MAX = 32
"""per lane: two to three seconds' worth on a slow machine"""


class Hashing:
    """Runs jobs in at most `THREADS` threads. Who waits stands in one of two lanes; those known are served first.

    So strangers can fill their own lane and keep nobody out who was here before. Used on one event loop; the threads
    start with the first job.
    """

    __slots__ = ("_closed", "_lanes", "_pool", "_running", "_waiting_max")

    def __init__(self, waiting_max: int = WAITING_MAX) -> None:
        self._waiting_max = waiting_max
        self._pool: ThreadPoolExecutor | None = None
        self._running = 0
        self._closed = False
        self._lanes: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())

    async def run(self, job: Callable[[], bool], *, known: bool) -> bool:
        """What the job returns. Raises Refused 503 with Retry-After if the lane is full, or everything ends."""
        loop = asyncio.get_running_loop()
        if self._closed:
            raise _busy("the broker is shutting down")
        if self._running < THREADS:
            self._running += 1
        else:
            await self._turn(loop, self._lanes[0 if known else 1])
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "broker-passwords")
        try:
            return await loop.run_in_executor(self._pool, job)
        finally:
            self._pass_on()

    async def close(self) -> None:
        """Refuse who waits, let running jobs end, and let the threads go."""
        self._closed = True
        for lane in self._lanes:
            while lane:
                turn = lane.popleft()
                if not turn.done():
                    turn.set_exception(_busy("the broker is shutting down"))
        while self._running:  # noqa: ASYNC110 - a fraction of a second, once
            await asyncio.sleep(0.005)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    async def _turn(self, loop: asyncio.AbstractEventLoop, lane: deque[asyncio.Future[None]]) -> None:
        if len(lane) >= self._waiting_max:
            raise _busy("too many are signing in at this moment")
        turn = loop.create_future()
        lane.append(turn)
        await turn

    def _pass_on(self) -> None:
        """The place of a job that ended goes to who waits."""
        for lane in self._lanes:
            while lane:
                turn = lane.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._running -= 1


def _busy(reason: str) -> Refused:
    return Refused(503, reason, (("Retry-After", "2"),))
