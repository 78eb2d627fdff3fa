"""How far a function says it is, on its way to the caller: as often as somebody can look, and the last one too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

EVERY_S = 0.05
"""at most one message in this time, however often a function tells"""

Told = tuple[float, float | None, str | None]


class ProgressTold:
    """What one function tells, from any thread. The first is passed on at once, then the latest every 50 ms.

    `send` is called on the event loop where this is made; where it says that there is no room, the latest goes later.
    """

    __slots__ = ("_is_due", "_is_over", "_latest", "_loop", "_send", "_sent", "_thread", "_timer")

    def __init__(self, send: Callable[[float, float | None, str | None], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._send = send
        self._latest: Told | None = None
        self._sent: Told | None = None
        self._is_due = False
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, told: Told) -> None:
        """So far it is now. Cheap: most of the time it only remembers."""
        self._latest = told  # first this, then the look: `_pass_on` does it the other way round and misses nothing
        if self._is_due:
            return
        self._is_due = True
        if threading.get_ident() == self._thread:
            self._pass_on()
            return
        try:
            self._loop.call_soon_threadsafe(self._pass_on)
        except RuntimeError:
            pass  # the loop is closed: the worker has gone

    def finish(self) -> None:
        """Pass on what has not been: the answer comes next. On the event loop."""
        if not self._is_over:
            self._pass_on_latest()
            self.drop()

    def drop(self) -> None:
        """Nobody waits any more: pass nothing on. On the event loop."""
        self._is_over = self._is_due = True  # whoever tells on is only remembered
        if self._timer is not None:
            self._timer.cancel()

    def _pass_on(self) -> None:
        if self._is_over:
            return
        if self._latest is not self._sent:
            self._pass_on_latest()
            self._timer = self._loop.call_later(EVERY_S, self._pass_on)
            return
        self._is_due = False
        if self._latest is not self._sent:
            self._is_due = True
            self._pass_on()

    def _pass_on_latest(self) -> None:
        latest = self._latest
        if latest is not None and latest is not self._sent and self._send(*latest):
            self._sent = latest
