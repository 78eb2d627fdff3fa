"""Runs the functions that answer requests: coroutines on the event loop, others in threads, their items one by one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec

from broker.peer.errors import TooLarge
from broker.peer.values import ValueUnfit, decode, encode
from broker.worker.faults import BAD_PARAMS, Failure, Fault, failure_of
from broker.worker.methods import Function, Method, make_method, no_method, wrong_params
from broker.worker.parts import Parts
from broker.worker.pool import Pool
from broker.worker.progress import ProgressTold
from broker.worker.requests import Request, enter

if TYPE_CHECKING:
    from broker.peer.connection import Connection
    from broker.peer.session import Asked

log = logging.getLogger("broker.worker")

ENDS_S = 1.0
"""how long a stopping worker waits for its threads and coroutines; one that never ends is left, and dies with the
process"""
STUCK_S = 0.1
"""how long every thread has to work for nobody until that is said"""

Encoded = tuple[bytes, list["bytes | memoryview"]]
Answer = Encoded | Failure

NOBODY = Failure(0, "")
"""the answer to a request that nobody waits for any more; the session drops it"""


class Item(msgspec.Struct, frozen=True):
    """What a function in a thread has yielded."""

    value: Encoded


class Answering:
    """The requests under way at one worker. Not thread-safe, but for what its own threads do.

    What a function gives goes to `connection`: the value it returns, or the items it yields, each when the caller has
    room for it. While it has none the function is suspended, and when nobody waits any more it is closed.
    """

    __slots__ = (
        "_by_id", "_capacity", "_connection", "_endpoint", "_fallback", "_from_threads", "_loop", "_methods", "_pool",
        "_stuck_timer", "_woken", "running",
    )  # fmt: skip

    def __init__(
        self, connection: Connection, endpoint: str, methods: Mapping[str, Method], fallback: Function | None,
        capacity: int,
    ) -> None:  # fmt: skip
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._endpoint = endpoint
        self._methods = methods
        self._fallback = fallback
        self._capacity = capacity
        self.running: dict[Request, None] = {}
        self._by_id: dict[int | str, Request] = {}
        self._pool: Pool | None = None
        self._from_threads: deque[tuple[Request, Answer | Item]] = deque()
        self._woken = False
        self._stuck_timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ what the broker says

    def asked(self, asked: Asked) -> None:
        """A request, or a notification: begin to answer it."""
        request = Request(asked)
        method = self._methods.get(asked.method)
        if asked.endpoint != self._endpoint or (method is None and self._fallback is None):
            self._answer(request, no_method(asked.method, list(self._methods)))
            self._connection.flush()
            return
        self.running[request] = None
        number = asked.id
        if number is not None:
            self._by_id[number] = request
            if asked.stream_out:
                request.incoming = Parts(partial(self._connection.consumed, number))
            if asked.progress:
                request.progress_told = ProgressTold(partial(self._connection.progress, number))
        if method is None:
            method = self._method_for(asked.method)
        if method.is_async:
            if number is not None:
                request.sender = partial(self._send_item, number)
            request.task = self._loop.create_task(self._answer_in_task(request, method))
        else:
            if self._pool is None:
                self._pool = Pool(self._capacity, f"worker-{self._endpoint}")
            self._pool.put(lambda: self._answer_in_thread(request, method))

    def _method_for(self, name: str) -> Method:
        assert self._fallback is not None
        method = make_method(self._fallback, "fallback")
        return Method(name, method.function, method.is_async, whole=True)

    def item(self, number: int | str, value: Any) -> None:
        """The caller of a request has sent one more."""
        request = self._by_id.get(number)
        if request is not None and request.incoming is not None:
            request.incoming.put(value)

    def items_ended(self, number: int | str) -> None:
        """The caller of a request has sent its last."""
        request = self._by_id.get(number)
        if request is not None and request.incoming is not None:
            request.incoming.end()

    def cancel_asked(self, number: int | str) -> None:
        """Nobody waits for that answer any more: its caller, its time or its link has gone."""
        request = self._by_id.get(number)
        if request is not None:
            self._cancel(request)

    def _cancel(self, request: Request) -> None:
        if request.cancelled:
            return  # once: a second time would interrupt what a coroutine does at its end
        request.cancel()
        if request.task is not None:  # a task that was never begun does not settle by itself
            request.task.add_done_callback(lambda _: self._settle(request))
        elif not request.begun:  # it waits for a thread, perhaps for ever; what it carries need not
            request.asked = msgspec.structs.replace(request.asked, params=msgspec.Raw(), attachments=())
            self._settle(request)
        elif self._stuck_timer is None and self._stuck():
            self._stuck_timer = self._loop.call_later(STUCK_S, self._tell_stuck)

    def _stuck(self) -> list[Request]:
        """Requests that nobody waits for and that hold a thread, if they hold all of them."""
        stuck = [request for request in self.running if request.begun and request.cancelled]
        return stuck if len(stuck) >= self._capacity else []

    def _tell_stuck(self) -> None:
        """Say it when every thread works for nobody: functions that do not look at `current().cancelled`."""
        self._stuck_timer = None
        stuck = self._stuck()
        if stuck:
            text = "all %d threads are busy with requests that nobody waits for any more, the first with %s/%s; "
            log.warning(text + "others wait until one returns", len(stuck), stuck[0].endpoint, stuck[0].method)

    # ------------------------------------------------------------ ending

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything here; a cancelled request's thread may block for ever."""
        return all(request.cancelled for request in self.running)

    @property
    def is_here(self) -> bool:
        """Whether the calling coroutine answers one of the requests under way."""
        here = asyncio.current_task()
        return any(request.task is here for request in self.running)

    def cancel_all(self) -> None:
        """Nobody waits for anything any more."""
        for request in list(self.running):
            self._cancel(request)

    async def end(self, *, now: bool) -> None:
        """Wait a little (for threads not `now`) until what was cancelled has ended, and forget it."""
        tasks = {request.task: request for request in self.running if request.task is not None}
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=ENDS_S)
            for task in stuck:
                request = tasks[task]
                log.warning("%s/%s is cancelled and does not end; left behind", request.endpoint, request.method)
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()
            ends_at = time.monotonic() + (0.0 if now else ENDS_S)
            while pool.is_alive and time.monotonic() < ends_at:  # noqa: ASYNC110 - threads have no events of asyncio's
                await asyncio.sleep(0.002)
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None
        self.running.clear()
        self._by_id.clear()

    # ------------------------------------------------------------ on the event loop

    async def _answer_in_task(self, request: Request, method: Method) -> None:
        enter(request)
        answer: Answer
        try:
            given = _call(method, request.asked)
            if not isinstance(given, AsyncIterator):
                given = await given
            answer = await self._stream(request, given) if isinstance(given, AsyncIterator) else encode(given)
        except asyncio.CancelledError as error:
            if request.cancelled:
                self._settle(request)
                raise
            answer = self._failure(request, error)
        except _Unfit as unfit:
            answer = unfit.failure
        except BaseException as error:  # the worker outlives whatever a function does, sys.exit too
            answer = self._failure(request, error)
        self._settle(request)
        self._answer(request, answer)
        self._connection.flush()

    async def _stream(self, request: Request, items: AsyncIterator[Any]) -> Answer:
        """Pass on what comes, for as long as somebody takes it."""
        number = request.asked.id
        try:
            async for item in items:
                if number is None or not await self._send_item(number, item):
                    return NOBODY
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()
        return encode(None)

    async def _send_item(self, number: int | str, item: Any) -> bool:
        """Pass on one item, and wait for room for the next. Whether somebody took it."""
        if not self._connection.send_item(number, *encode(item)):
            return False
        if not self._connection.session.has_room(number):
            await self._connection.room(number)
        return True

    # ------------------------------------------------------------ in threads

    def _answer_in_thread(self, request: Request, method: Method) -> None:
        answer: Answer
        request.begun = True
        asked = request.asked  # before the look at `cancelled`: what is cancelled loses its parameters
        if request.cancelled:
            answer = NOBODY  # it is not begun
        else:
            enter(request)
            try:
                given = _call(method, asked)
                answer = self._stream_in_thread(request, given) if isinstance(given, Iterator) else encode(given)
            except _Unfit as unfit:
                answer = unfit.failure
            except BaseException as error:  # the worker outlives whatever a function does, sys.exit too
                answer = self._failure(request, error)
        self._tell_loop(request, answer)

    def _stream_in_thread(self, request: Request, items: Iterator[Any]) -> Answer:
        """Pass on what comes, for as long as somebody takes it; between two items this thread waits for room."""
        gate = request.gate = SimpleQueue()
        try:
            while not request.cancelled:
                try:
                    item = next(items)
                except StopIteration as end:
                    return encode(end.value)
                if request.asked.id is None or not self._tell_loop(request, Item(encode(item))):
                    break
                del item  # while it waits, what it has given is not held twice
                if not request.cancelled:  # looked at after the gate is there, so that `cancel` sees one or the other
                    gate.get()
            return NOBODY
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _tell_loop(self, request: Request, told: Answer | Item) -> bool:
        """Whether there is still a loop."""
        self._from_threads.append((request, told))
        if not self._woken:
            self._woken = True  # many threads, one wake-up
            try:
                self._loop.call_soon_threadsafe(self._collect)
            except RuntimeError:
                return False  # it is closed: the worker has gone
        return True

    def _collect(self) -> None:
        self._woken = False
        told = self._from_threads
        while told:
            request, answer = told.popleft()
            if isinstance(answer, Item):
                self._send_for(request, answer.value)
            else:
                self._settle(request)
                self._answer(request, answer)
        self._connection.flush()

    def _send_for(self, request: Request, item: Encoded) -> None:
        """Send what a thread has given; it goes on when there is room for more, or at once if nobody waits."""
        number, gate = request.asked.id, request.gate
        assert number is not None and gate is not None
        try:
            is_awaited = self._connection.send_item(number, *item)
        except TooLarge as error:
            self._answer(request, self._failure(request, error))
            request.cancel()
            return
        if not is_awaited or self._connection.session.has_room(number):
            gate.put(None)
        else:
            request.waiting = self._loop.create_task(self._open_gate(request, number, gate))

    async def _open_gate(self, request: Request, number: int | str, gate: SimpleQueue[None]) -> None:
        try:
            await self._connection.room(number)
        finally:
            request.waiting = None
            gate.put(None)

    # ------------------------------------------------------------ telling

    def _settle(self, request: Request) -> None:
        self.running.pop(request, None)
        number = request.asked.id
        if number is not None and self._by_id.get(number) is request:
            del self._by_id[number]

    def _answer(self, request: Request, answer: Answer) -> None:
        number = request.asked.id
        if number is None:
            return
        if request.progress_told is not None and not request.cancelled:
            request.progress_told.finish()
        session = self._connection.session
        if isinstance(answer, Failure):
            session.fail(number, answer.code, answer.message, answer.data, retryable=answer.retryable)
        else:
            session.answer(number, *answer)

    def _failure(self, request: Request, error: BaseException) -> Failure:
        failure = failure_of(error)
        if not request.cancelled:
            name = f"{request.endpoint}/{request.method}"
            plain = isinstance(error, (Fault, ValueUnfit, SystemExit))  # what they say is all there is to know
            log.warning("%s failed: %s", name, failure.message, exc_info=None if plain else error)
        return failure


class _Unfit(Exception):
    """Raised where a request cannot be begun; `failure` is its answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _call(method: Method, asked: Asked) -> Any:
    """Call the function. Raises _Unfit if it cannot be called like this, else what it raises."""
    try:
        params = decode(asked.params, asked.attachments)
    except ValueUnfit as error:
        raise _Unfit(Failure(BAD_PARAMS, "Invalid params", {"detail": str(error)})) from None
    arguments: list[Any] = []
    named: dict[str, Any] = {}
    if method.whole:
        arguments = [method.name, params]
    elif isinstance(params, dict):
        named = params
    elif isinstance(params, list):
        arguments = params
    elif params is not None:
        detail = f"params is {params!r:.40}; give an object (by name) or an array (by position)"
        raise _Unfit(Failure(BAD_PARAMS, "Invalid params", {"detail": detail}))
    try:
        return method.function(*arguments, **named)
    except TypeError as error:
        failure = wrong_params(method, arguments, named, error)
        if failure is None:
            raise
        raise _Unfit(failure) from None
