"""Replies that come item by item: what has come and is not read yet, and the asynchronous stream over it."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, Self

from broker.peer.calls import Tell
from broker.peer.connection import Connection
from broker.peer.errors import Cancelled
from broker.peer.session import Pending


class Signal(Protocol):
    """An event, of asyncio or of threads."""

    def set(self) -> None:
        """Wake who waits for it."""


class Inflow:
    """What came of one request and is not read yet; the connection tells it, on its loop, as reader and as waiter.

    `signal` is set after every change. It never holds the stream that reads it: that one may be forgotten.
    Bounded by the credit its reader gives with `Connection.consumed`.
    """

    __slots__ = (
        "_callbacks", "call", "connection", "ended", "error", "has_begun", "is_well", "items", "result", "signal",
        "tell",
    )  # fmt: skip

    def __init__(self, signal: Signal, tell: Tell | None) -> None:
        self.signal = signal
        self.items: deque[Any] = deque()
        self.connection: Connection | None = None
        self.call: Pending | None = None
        self.has_begun = False
        self.ended = False
        self.is_well = False
        self.error: BaseException | None = None
        self.result: Any = None
        self.tell = tell
        """who is told how far the worker is"""
        self._callbacks: list[Callable[[Any], object]] = []

    # ------------------------------------------------------------ from the connection

    def item(self, value: Any) -> None:
        """One more item."""
        self.has_begun = True
        if not self.ended:
            self.items.append(value)
            self.signal.set()

    def done(self) -> bool:
        """Whether it has ended."""
        return self.ended

    def set_result(self, result: Any, /) -> None:
        """It ended well."""
        self.result = result
        self.is_well = True
        self._end()

    def set_exception(self, exception: Any, /) -> None:
        """It ended badly: the reader is told after the last item."""
        self.error = exception
        self._end()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Call this when it has ended, on the loop."""
        self._callbacks.append(callback)

    def _end(self) -> None:
        if self.ended:
            return
        self.ended = True
        self.signal.set()
        for callback in self._callbacks:
            callback(self)
        self._callbacks.clear()

    # ------------------------------------------------------------ from the reader, on the loop

    def begin(self, connection: Connection, call: Pending) -> None:
        """The request is on its way."""
        self.connection, self.call = connection, call

    def leave(self) -> None:
        """Nobody reads it any more: what has come is dropped, and the request cancelled unless it has ended."""
        if self.is_over:
            return
        self.is_well = False
        if not self.ended:
            self._end()
            if self.connection is not None and self.call is not None:
                self.connection.cancel(self.call)
        self.items.clear()

    def took(self, items: int = 1) -> None:
        """Items were read: as many more may come."""
        if not self.ended:
            assert self.connection is not None
            assert self.call is not None
            self.connection.consumed(self.call, items)

    @property
    def timing(self) -> dict[str, Any] | None:
        """What the broker told of its times; None for nothing."""
        return self.call.timing if self.call is not None else None

    @property
    def is_over(self) -> bool:
        """Whether it has ended and nothing of it is unread."""
        return self.ended and not self.items

    def take_error(self) -> BaseException | None:
        """How it ended badly; told once."""
        error, self.error = self.error, None
        return error


def fail(connection: Connection, call: Pending, error: BaseException) -> None:
    """End a call on this side with an error of ours; the broker is told that nobody waits for it any more."""
    if isinstance(error, StopIteration):  # no future takes it
        error = RuntimeError(f"{error!r} was raised")
    try:
        if not call.waiter.done():
            call.waiter.set_exception(error)
    except concurrent.futures.InvalidStateError:
        pass  # cancelled by another thread in this very moment
    connection.cancel(call)


class Ended:
    """What is known of a reply that came item by item, after its last."""

    __slots__ = ("_inflow",)

    _inflow: Inflow

    @property
    def result(self) -> Any:
        """What the method returned after its last item. Raises RuntimeError before the end, and after a bad one."""
        if not self._inflow.is_over or not self._inflow.is_well:
            raise RuntimeError("a stream has its result after its last item")
        return self._inflow.result

    @property
    def timing(self) -> dict[str, Any] | None:
        """What the broker told of its times, in milliseconds, if `timing` was asked for; None before the end."""
        return self._inflow.timing


class Stream(Ended):
    """The items of one reply, as they come: `async for item in stream`. Made by `AsyncClient.stream`.

    What the reader does not take stops the worker: a few items are under way at most. An error is raised once, after
    the items that came before it. Leaving the loop early, `aclose()`, the end of `async with`, and forgetting the
    stream cancel the request at the worker. Cancelling the task that waits for one item loses none.
    """

    __slots__ = ("__weakref__", "_is_left", "_loop", "_signal")

    def __init__(self, inflow: Inflow, signal: asyncio.Event) -> None:
        self._inflow = inflow
        self._signal = signal
        self._loop = asyncio.get_running_loop()
        self._is_left = False

    async def aclose(self) -> None:
        """Read no more: the request is cancelled unless it has ended."""
        self._inflow.leave()

    def __aiter__(self) -> AsyncIterator[Any]:
        return _Reading(self)

    async def __anext__(self) -> Any:
        if self._is_left:
            raise left_early()
        inflow = self._inflow
        while not inflow.items:
            self._signal.clear()
            if inflow.ended:
                if (error := inflow.take_error()) is not None:
                    raise error
                raise StopAsyncIteration
            await self._signal.wait()
        item = inflow.items.popleft()
        inflow.took()
        return item

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        """The loop over it is left, or it is forgotten; on any thread, at any moment."""
        if self._inflow.is_over:
            return
        self._is_left = True
        try:
            self._loop.call_soon_threadsafe(self._inflow.leave)
        except RuntimeError:
            pass  # the loop is closed, and everything with it


class _Reading:
    """One loop over a stream: when it is dropped, because the loop was left, the stream is left too."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Any]:
        return self._stream.__anext__()  # not awaited here: a traceback would hold this, and with it the stream

    def __del__(self) -> None:
        self._stream._leave()


def left_early() -> Cancelled:
    """What who reads on after leaving the loop is told: else half a stream would pass for a whole one."""
    return Cancelled("the loop over the stream was left before its end; that cancels the request")
