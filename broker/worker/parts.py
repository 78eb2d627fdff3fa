"""What the caller of a request sends while a function works on it, item by item."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from broker.peer.errors import Cancelled


class Parts:
    """The items a caller sends, in its order: `for` in functions that run in threads, `async for` in coroutines.

    Ends when the caller has sent its last. The caller is held back while nobody takes them, so that 8 to 24 parts, the
    more the smaller, wait here. Raises Cancelled (in a coroutine the task is cancelled) when nobody waits for the
    answer any more. Every item is given once, whoever asks: iterating again goes on.
    """

    __slots__ = (
        "_arrived", "_cancelled", "_consumed", "_ended", "_items", "_loop", "_taken", "_telling", "_thread", "_waiting",
    )  # fmt: skip

    def __init__(self, consumed: Callable[[int], None] | None = None) -> None:
        self._items: deque[Any] = deque()
        self._arrived = threading.Condition()
        self._ended = self._cancelled = False
        self._waiting: asyncio.Future[None] | None = None
        self._consumed = consumed
        self._taken = 0
        self._telling = False
        self._thread = 0
        if consumed is not None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.get_ident()

    # ------------------------------------------------------------ for the function

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if threading.get_ident() == self._thread:
            raise RuntimeError("waiting here would stop the whole worker; use `async for item in current().parts()`")
        with self._arrived:
            while not self._items and not self._ended and not self._cancelled:
                self._arrived.wait()
            self._check_cancelled()
            if not self._items:
                raise StopIteration
            item = self._items.popleft()
            self._taken += 1
            told, self._telling = self._telling, True
        if not told:
            try:
                self._loop.call_soon_threadsafe(self._tell_taken)
            except RuntimeError:
                pass  # the loop is closed: the worker has gone
        return item

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while not self._items and not self._ended and not self._cancelled:
            loop = asyncio.get_running_loop()
            if loop is not self._loop:
                raise RuntimeError("this is another event loop than the worker's; use `for` in a thread")
            if self._waiting is None or self._waiting.done():
                self._waiting = loop.create_future()
            await asyncio.shield(self._waiting)  # others may wait for it too, who are not cancelled with this task
        self._check_cancelled()
        if not self._items:
            raise StopAsyncIteration
        item = self._items.popleft()
        assert self._consumed is not None
        self._consumed(1)
        return item

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled("nobody waits for the answer any more")

    # ------------------------------------------------------------ for the worker, on its loop

    def put(self, item: Any) -> None:
        """One more has come."""
        with self._arrived:
            self._items.append(item)
            self._arrived.notify()
        self._wake()

    def end(self) -> None:
        """There will be no more."""
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()
        self._wake()

    def cancel(self) -> None:
        """Nobody waits for the answer any more: whoever iterates is told, and what was not taken is dropped."""
        with self._arrived:
            self._cancelled = True
            self._items.clear()
            self._arrived.notify_all()
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _tell_taken(self) -> None:
        with self._arrived:
            taken, self._taken = self._taken, 0
            self._telling = False
        assert self._consumed is not None
        self._consumed(taken)


def no_parts() -> Parts:
    """Those of a caller that sends none."""
    parts = Parts()
    parts.end()
    return parts
