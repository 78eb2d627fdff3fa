"""Sends what a caller gives in parts: one after the other, as the worker takes them."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from inspect import isasyncgen, isgenerator
from typing import Any, Protocol, TypeAlias

from broker.client.stream import fail
from broker.peer.connection import Connection
from broker.peer.session import Pending
from broker.peer.values import ValueUnfit, encode

log = logging.getLogger("broker.client")

Parts: TypeAlias = Iterable[Any] | AsyncIterable[Any]
"""what may be sent in parts; each part is a value of any size"""
Encoded: TypeAlias = tuple[bytes, "list[bytes | memoryview]"]

_END = object()


class Ending(Protocol):
    """What tells when it has ended: a future of either kind, or an inflow."""

    def add_done_callback(self, callback: Callable[[Any], object], /) -> object:
        """Call this when it has ended, on any thread."""
        ...


def check_parts(parts: object, *, again: bool = False) -> None:
    """Raises TypeError for what is no iterable of parts, or with `again` for what can be iterated over only once."""
    if parts is None:
        return
    if isinstance(parts, (str, bytes, bytearray, memoryview, dict)):
        raise TypeError(f"parts is a {type(parts).__name__}; give an iterable of parts, such as [data]")
    if not isinstance(parts, (Iterable, AsyncIterable)):
        raise TypeError(f"parts is a {type(parts).__name__}; give an iterable, or an async iterable")
    if again and (isinstance(parts, AsyncIterator) or iter_is_self(parts)):
        raise TypeError("parts can be iterated over once only; every request of a map needs its own: give a list")


def iter_is_self(parts: object) -> bool:
    """Whether it is an iterator, which is used up by the first who reads it."""
    return hasattr(parts, "__next__")


class Feeds:
    """The requests of one client to which parts are being sent. Everything on its loop."""

    __slots__ = ("_tasks",)

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, connection: Connection, call: Pending, parts: Parts, ending: Ending) -> None:
        """Send the parts, each when the one before has found room, for as long as the request has not ended.

        An exception of `parts`, or a part that cannot be sent, ends the request and goes to its waiter. At the end
        `parts` is closed if it is a generator. A list is read on the loop; any other plain iterable in a thread of its
        own, as it may block.
        """
        task = connection.loop.create_task(_send(connection, call, parts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ending.add_done_callback(lambda _: connection.loop.call_soon_threadsafe(task.cancel))

    async def ended(self) -> None:
        """Wait until nothing is sent any more; the requests have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)


async def _send(connection: Connection, call: Pending, parts: Parts) -> None:
    try:
        async with aclosing(_encoded(parts)) as ready:
            async for raw, attachments in ready:
                if not connection.send_item(call, raw, attachments):
                    return
                await connection.room(call)
        connection.send_item(call, b"", last=True)
    except asyncio.CancelledError as error:
        if not _is_ours():
            fail(connection, call, error)
        raise
    except BaseException as error:
        fail(connection, call, error)


def _is_ours() -> bool:
    """Whether it was the request's end that cancelled this task, not the parts themselves."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _encoded(parts: Parts) -> AsyncGenerator[Encoded, None]:
    if isinstance(parts, AsyncIterable):
        return _awaited(parts)
    if isinstance(parts, (list, tuple)):
        return _at_hand(parts)
    return _in_thread(parts)


async def _at_hand(parts: Iterable[Any]) -> AsyncGenerator[Encoded, None]:
    for part in parts:
        yield _encode(part)


async def _awaited(parts: AsyncIterable[Any]) -> AsyncGenerator[Encoded, None]:
    try:
        async for part in parts:
            yield _encode(part)
    finally:
        if isasyncgen(parts):
            await parts.aclose()


async def _in_thread(parts: Iterable[Any]) -> AsyncGenerator[Encoded, None]:
    taker = _Taker(parts)
    try:
        while (encoded := await taker.next()) is not None:
            yield encoded
    finally:
        taker.stop()


class _Taker:
    """Takes parts from an iterable that may block, in a thread that ends with it.

    A daemon, as a `next` that never returns can be ended by nobody: it keeps neither the request nor the process.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._wanted: queue.SimpleQueue[asyncio.Future[Encoded | None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._take, args=(parts,), name="broker-client-parts", daemon=True).start()

    async def next(self) -> Encoded | None:
        """The next part; None at the end. Raises what the iterable does."""
        future: asyncio.Future[Encoded | None] = self._loop.create_future()
        self._wanted.put(future)
        return await future

    def stop(self) -> None:
        """No more is wanted."""
        self._wanted.put(None)

    def _take(self, parts: Iterable[Any]) -> None:
        iterator = None
        try:
            while (future := self._wanted.get()) is not None:
                try:
                    if iterator is None:
                        iterator = iter(parts)
                    part = next(iterator, _END)
                    encoded = None if part is _END else _encode(part)
                except BaseException as error:
                    self._loop.call_soon_threadsafe(_settle, future, None, error)
                else:
                    self._loop.call_soon_threadsafe(_settle, future, encoded, None)
        except RuntimeError:
            pass  # the loop was closed, and with it went who wanted the parts
        if isgenerator(parts):
            try:
                parts.close()
            except Exception:
                log.exception("%r failed while it was closed", parts)


def _settle(future: asyncio.Future[Encoded | None], encoded: Encoded | None, error: BaseException | None) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):  # no future takes it
        error = RuntimeError(f"{error!r} was raised")
    if error is None:
        future.set_result(encoded)
    else:
        future.set_exception(error)


def _encode(part: Any) -> Encoded:
    try:
        return encode(part)
    except ValueUnfit as error:
        raise ValueUnfit(f"a part cannot be sent: {error}") from None
