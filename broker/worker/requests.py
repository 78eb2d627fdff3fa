"""The request a function is working on: what it may ask about it, take from it and tell about it while it runs."""

from __future__ import annotations

import math
import threading
import time
from contextvars import ContextVar
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from broker.worker.parts import Parts, no_parts

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from broker.peer.session import Asked
    from broker.worker.progress import ProgressTold


class NoRequest(LookupError):
    """`current()` was called outside a function that answers a request."""


class Request:
    """One request while a worker's function answers it. Usable from any thread."""

    __slots__ = (
        "_event", "asked", "begun", "cancelled", "deadline", "gate", "incoming", "progress_told", "sender", "task",
        "waiting",
    )  # fmt: skip

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.begun = False
        """whether a thread has taken it"""
        self.cancelled = False
        """whether nobody waits for the answer any more; a function that blocks should look now and then, and return"""
        self.deadline: float | None = None if asked.timeout is None else time.monotonic() + asked.timeout
        """when the answer is due, on the clock of `time.monotonic()`; None for a notification"""
        self.task: asyncio.Task[None] | None = None
        self.gate: SimpleQueue[None] | None = None
        """what a thread waits at until its caller takes more items"""
        self.waiting: asyncio.Task[None] | None = None
        """who will open the gate"""
        self.incoming: Parts | None = None
        self.progress_told: ProgressTold | None = None
        self.sender: Callable[[Any], Awaitable[bool]] | None = None
        self._event: threading.Event | None = None

    @property
    def endpoint(self) -> str:
        """The endpoint that was asked."""
        return self.asked.endpoint

    @property
    def method(self) -> str:
        """The method that was asked for."""
        return self.asked.method

    @property
    def trace(self) -> str | None:
        """The caller's trace id; never to be trusted for access."""
        return self.asked.trace

    @property
    def caller(self) -> tuple[str, str] | None:
        """Who asks: its name as a peer, and its principal. Told in the process of the broker only, else None."""
        return self.asked.caller

    @property
    def left_s(self) -> float | None:
        """Seconds until the answer is due, at least 0; None for a notification.

        As the broker told when the request came. A stream whose caller named no timeout may go on for longer, as long
        as something flows.
        """
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def has_parts(self) -> bool:
        """Whether the caller sends parts."""
        return self.incoming is not None

    def parts(self) -> Parts:
        """What the caller sends, item by item: `for` in a thread, `async for` in a coroutine; none if it sends none.

        They are held back until they are taken, which stalls nobody but this caller. Raises Cancelled from the
        iteration when nobody waits for the answer any more.
        """
        return self.incoming or no_parts()

    async def send(self, item: Any) -> bool:
        """One more item of the reply, from a coroutine; what the coroutine returns is the result, after all items.

        Waits until the caller takes more. False if nobody waits for the answer any more (a notification's caller never
        does). Raises ValueUnfit for what cannot be sent, TooLarge, and RuntimeError in a function that has a thread.
        """
        if self.task is None:
            raise RuntimeError("send() is for coroutines; a function in a thread yields its items")
        return self.sender is not None and await self.sender(item)

    def progress(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """Tell the caller how far this is: `done`, of `total` if that is known, in whatever unit; `text` says more.

        Does nothing if it did not ask. Passed on at most 20 times a second, and the last one before the
        answer; what finds the way to the caller crowded is lost. Raises TypeError for what is no number or no text.
        """
        if self.progress_told is None or self.cancelled:
            return
        if text is not None and not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; give a str, or None")
        self.progress_told.tell((_number(done), None if total is None else _number(total), text))

    def wait_cancelled(self, timeout: float | None = None) -> bool:
        """Block until nobody waits any more, or for `timeout` seconds; whether it is so. For threads only."""
        if self._event is None:
            self._event = threading.Event()
        if self.cancelled:  # looked at after the event is there, so that `cancel` sees one or the other
            return True
        return self._event.wait(timeout)

    def cancel(self) -> None:
        """Nobody waits any more. The worker calls it, on its event loop."""
        self.cancelled = True
        if self._event is not None:
            self._event.set()
        if self.incoming is not None:
            self.incoming.cancel()
        if self.progress_told is not None:
            self.progress_told.drop()
        if self.waiting is not None:
            self.waiting.cancel()
        if self.gate is not None:
            self.gate.put(None)
        if self.task is not None:
            self.task.cancel()


def _number(value: Any) -> float:
    """A plain number, of numpy's too. Raises TypeError for what is none."""
    number = value if type(value) is int else float("nan") if isinstance(value, (str, bytes)) else float(value)
    if not math.isfinite(number):
        raise TypeError(f"{value!r:.40} is no number")
    return number


_current: ContextVar[Request] = ContextVar("broker_request")


def current() -> Request:
    """The request that the calling function answers. Raises NoRequest outside of one."""
    request = _current.get(None)
    if request is None:
        raise NoRequest("this is no function that answers a request")
    return request


def enter(request: Request) -> None:
    """From here on, in this thread or task, `current()` is this request. The worker calls it."""
    _current.set(request)
