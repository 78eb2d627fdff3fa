"""The request a function is working on: what it may ask about it while it runs."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from broker.peer.session import Asked


class NoRequest(LookupError):
    """`current()` was called outside a function that answers a request."""


class Request:
    """One request while a worker's function answers it. Usable from any thread."""

    __slots__ = ("_event", "asked", "begun", "cancelled", "deadline", "task")

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.begun = False
        """whether a thread has taken it"""
        self.cancelled = False
        """whether nobody waits for the answer any more; a function that blocks should look now and then, and return"""
        self.deadline: float | None = None if asked.timeout is None else time.monotonic() + asked.timeout
        """when the answer is due, on the clock of `time.monotonic()`; None for a notification"""
        self.task: asyncio.Task[None] | None = None
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
    def left_s(self) -> float | None:
        """Seconds until the answer is due, at least 0; None for a notification."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def wait_cancelled(self, timeout: float | None = None) -> bool:
        """Block until nobody waits any more, or for `timeout` seconds; whether it is so. For threads only."""
        if self._event is None:
            self._event = threading.Event()
        if self.cancelled:  # looked at after the event is there, so that `cancel` sees one or the other
            return True
        return self._event.wait(timeout)

    def cancel(self) -> None:
        """Nobody waits any more. The worker calls it."""
        self.cancelled = True
        if self._event is not None:
            self._event.set()
        if self.task is not None:
            self.task.cancel()


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
