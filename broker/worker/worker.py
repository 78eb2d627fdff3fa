"""`Worker`: serves functions under an endpoint, from wherever it runs, for as long as it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import signal
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self, TypeVar, overload

import msgspec

from broker._version import VERSION
from broker.auth.targets import find_target
from broker.core.access import is_name
from broker.peer.connection import Connection
from broker.peer.errors import BrokerError, ConnectionLost
from broker.peer.session import Asked, Heard, Options
from broker.peer.values import ValueUnfit, decode, encode
from broker.worker.faults import BAD_PARAMS, Failure, Fault, failure_of
from broker.worker.methods import Function, Method, describe, make_method, no_method, public_methods, wrong_params
from broker.worker.pool import Pool
from broker.worker.requests import Request, enter

log = logging.getLogger("broker.worker")

CAPACITY = 64
DRAIN_S = 25.0
ENDS_S = 1.0
"""how long a stopping worker waits for its threads and coroutines; one that never ends is left, and dies with the
process"""
_ASKING = Options(timeout=10.0, idempotent=True)
_LEAVING = Options(timeout=2.0, idempotent=True)

Decorated = TypeVar("Decorated", bound=Function)
Answer = tuple[bytes, list["bytes | memoryview"]] | Failure


class Worker:
    """Serves an endpoint. Methods are added before it starts.

    `url` and `token` default to BROKER_URL and BROKER_TOKEN, then to the broker running on this machine. At most
    `capacity` requests are given to it at a time; functions that are no coroutines run in threads, at most that many.
    `name` is shown by `broker describe`; `drain` is how many seconds it gives requests to finish when it is told to
    stop. `wait` (default) goes on trying while there is no broker yet.

        worker = Worker("data")

        @worker.method
        def read(path: str) -> bytes:
            return Path(path).read_bytes()

        worker.run()

    An exception becomes the caller's RemoteError with its type and text; `Fault` says more. When a request is
    cancelled, a coroutine is cancelled, and `broker.worker.current().cancelled` becomes true for others. After a lost
    connection it comes back by itself and serves again.
    """

    def __init__(
        self,
        endpoint: str,
        url: str | None = None,
        token: str | None = None,
        *,
        name: str = "",
        capacity: int = CAPACITY,
        drain: float = DRAIN_S,
        wait: bool = True,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not is_name(endpoint):
            raise ValueError(f"{endpoint!r} is no name of an endpoint; names are 1 to 128 of A-Z a-z 0-9 _ . -")
        if not 1 <= capacity <= 1_000_000:
            raise ValueError(f"capacity {capacity} is not between 1 and 1000000")
        self.endpoint = endpoint
        self.name = name or f"{platform.node()}:{os.getpid()}"
        self.capacity = capacity
        self.methods: dict[str, Method] = {}
        self.peer = ""
        """what the broker calls this worker; empty while it does not serve"""
        self._doc = ""
        self._fallback: Callable[[str, Any], Any] | None = None
        self._target = find_target(url, token)
        self._drain_s = drain
        self._wait = wait
        self._ssl_context = ssl_context
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop
        self._ended: asyncio.Future[None]
        self._running: dict[Request, None] = {}
        self._by_id: dict[int | str, Request] = {}
        self._pool: Pool | None = None
        self._answers: deque[tuple[Request, Answer]] = deque()
        self._woken = False
        self._is_stuck = False
        self._stopping = False
        self._thread = 0

    # ------------------------------------------------------------ what it serves

    @overload
    def method(self, function: Decorated, /) -> Decorated: ...
    @overload
    def method(self, name: str | None = None, /) -> Callable[[Decorated], Decorated]: ...
    def method(self, function: Any = None, /) -> Any:
        """Serve a function: `@worker.method`, or `@worker.method("another.name")`. Raises ValueError for a bad name."""
        if callable(function):
            self.add(function)
            return function

        def decorate(decorated: Decorated) -> Decorated:
            self.add(decorated, function)
            return decorated

        return decorate

    def add(self, function: Function, name: str | None = None) -> None:
        """Serve a function, under its own name unless another is given. Raises ValueError if the name is taken."""
        method = make_method(function, name)
        if method.name in self.methods:
            raise ValueError(f"{self.endpoint} has a method {method.name} already")
        self.methods[method.name] = method

    def add_object(self, source: object) -> Self:
        """Serve an object's public methods, or the public functions a module defines. Raises ValueError for none."""
        methods = list(public_methods(source))
        if not methods:
            raise ValueError(f"{source!r:.80} has no public methods to serve")
        for method in methods:
            self.add(method.function, method.name)
        self._doc = self._doc or (type(source).__doc__ or "").strip()[:2000]
        return self

    def add_fallback(self, function: Callable[[str, Any], Any]) -> None:
        """Serve every other method by `function(method, params)`; params as they came, None for none."""
        self._fallback = function

    # ------------------------------------------------------------ life

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C, which drain; a second one ends at once. For the main thread.

        Raises what ended it otherwise: Refused, Denied, ConnectionLost, and without `wait` CannotConnect.
        """
        loop = _new_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._run())
        finally:
            asyncio.set_event_loop(None)
            _end(loop)

    async def start(self) -> Self:
        """Connect and serve, on the running event loop. Raises Refused, Denied, and without `wait` CannotConnect."""
        if self._connection is not None:
            raise RuntimeError("a worker starts once; make another")
        if not self.methods and self._fallback is None:
            raise ValueError(f"worker of {self.endpoint} has no methods; add some before it starts")
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._ended = self._loop.create_future()
        self._connection = Connection(self._target, self, ssl_context=self._ssl_context)
        try:
            await self._connection.open(patient=self._wait)
            await self._serve(self._connection)
        except BaseException:
            await self._connection.close()
            raise
        return self

    async def _serve(self, connection: Connection) -> None:
        params, _ = encode(self._description())
        told = await connection.request("broker.serve", params, (), _ASKING)
        self.peer = told["peer"]
        connection.session.stand(("serve", self.endpoint), "broker.serve", params)
        names = ", ".join(self.methods) if self._fallback is None else "any method"
        log.info("serving %s at %s as %s: %s", self.endpoint, connection.url, self.peer, names)

    def _description(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            "name": self.name,
            "sdk": f"python {VERSION}",
            "methods": {name: describe(method) for name, method in self.methods.items()},
        }
        if self._doc:
            info["doc"] = self._doc
        description: dict[str, Any] = {"endpoint": self.endpoint, "capacity": self.capacity, "info": info}
        if self._fallback is None:
            description["methods"] = list(self.methods)
        return description

    async def wait(self) -> None:
        """Serve until `stop`; raises what ended it otherwise (Denied, ConnectionLost)."""
        await asyncio.shield(self._ended)

    async def stop(self, *, now: bool = False) -> None:
        """Take no more requests, finish those under way (at most `drain` seconds; with `now` none), and go."""
        connection = self._connection
        if connection is None:
            return
        self._stopping = True
        if not now:
            await self._drain(connection)
        for request in list(self._running):
            self._cancel(request)
        tasks = {request.task: request for request in self._running if request.task is not None}
        await connection.close()
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
        self._running.clear()
        self._by_id.clear()
        if not self._ended.done():
            self._ended.set_result(None)

    async def _drain(self, connection: Connection) -> None:
        ends_at = time.monotonic() + self._drain_s
        connection.session.unstand(("serve", self.endpoint))
        if connection.is_up:
            params, _ = encode({"endpoint": self.endpoint})
            try:
                await connection.request("broker.unserve", params, (), _LEAVING)
            except BrokerError as error:
                log.debug("leaving: %s", error)
        session = connection.session
        while connection.is_up and time.monotonic() < ends_at:
            # A cancelled request has nobody who waits for it; its thread may block for ever.
            if not session.outbox and all(request.cancelled for request in self._running):
                return
            await asyncio.sleep(0.01)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _run(self) -> None:
        ending = asyncio.Event()
        ending_now = asyncio.Event()

        def end() -> None:
            if ending.is_set():
                ending_now.set()
            else:
                log.info("draining: %d requests under way, at most %g s", len(self._running), self._drain_s)
            ending.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        serving = loop.create_task(self._serve_until_ended())
        told = loop.create_task(ending.wait())
        hurried = loop.create_task(ending_now.wait())
        try:
            await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            elif self._connection is None or not self.peer:
                serving.cancel()
            else:
                stopping = loop.create_task(self.stop())
                await asyncio.wait((stopping, hurried), return_when=asyncio.FIRST_COMPLETED)
                if not stopping.done():
                    stopping.cancel()
                    await self.stop(now=True)
        finally:
            for task in (serving, told, hurried):
                task.cancel()
            await asyncio.wait((serving, told, hurried))
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _serve_until_ended(self) -> None:
        await self.start()
        try:
            await self.wait()
        except BrokerError:
            await self.stop(now=True)
            raise

    # ------------------------------------------------------------ telling

    def publish(self, data: Any, *, topic: str | None = None) -> None:
        """Broadcast to the endpoint's listeners, or to one topic's subscribers; from any thread, without an answer.

        What is published while there is no connection is lost. Raises ValueUnfit for data that cannot be sent.
        """
        params: dict[str, Any] = {"endpoint": self.endpoint, "data": data}
        if topic is not None:
            params["topic"] = topic
        raw, attachments = encode(params)
        if threading.get_ident() == self._thread:
            self._publish(raw, attachments)
        elif self._thread:
            try:
                self._loop.call_soon_threadsafe(self._publish, raw, attachments)
            except RuntimeError:
                pass  # the loop is closed: the worker has gone

    def _publish(self, raw: bytes, attachments: list[bytes | memoryview]) -> None:
        try:
            if self._connection is not None:
                self._connection.notify("broker.publish", raw, attachments)
        except ConnectionLost:
            log.debug("a broadcast is lost: there is no connection now")

    # ------------------------------------------------------------ what the connection tells

    def asked(self, asked: Asked) -> None:
        """A request, or a notification: begin to answer it."""
        request = Request(asked)
        method = self.methods.get(asked.method)
        if asked.endpoint != self.endpoint or (method is None and self._fallback is None):
            self._answer(request, no_method(asked.method, list(self.methods)))
            self._flush()
            return
        self._running[request] = None
        if asked.id is not None:
            self._by_id[asked.id] = request
        if method is None:
            method = self._method_for(asked.method)
        if method.is_async:
            request.task = self._loop.create_task(self._answer_async(request, method))
        else:
            if self._pool is None:
                self._pool = Pool(self.capacity, f"worker-{self.endpoint}")
            self._pool.put(lambda: self._answer_in_thread(request, method))

    def _method_for(self, name: str) -> Method:
        assert self._fallback is not None
        method = make_method(self._fallback, "fallback")
        return Method(name, method.function, method.is_async, whole=True)

    def cancel_asked(self, number: int | str) -> None:
        """Nobody waits for that answer any more."""
        request = self._by_id.get(number)
        if request is not None:
            self._cancel(request)

    def _cancel(self, request: Request) -> None:
        request.cancel()
        if request.task is not None:  # a task that was never begun does not settle by itself
            request.task.add_done_callback(lambda _: self._settle(request))
        elif request.begun:
            self._tell_stuck()
        else:  # it waits for a thread, perhaps for ever; what it carries need not
            request.asked = msgspec.structs.replace(request.asked, params=msgspec.Raw(), attachments=())
            self._settle(request)

    def _tell_stuck(self) -> None:
        """Say it, once, when every thread works for nobody: functions that do not look at `current().cancelled`."""
        stuck = [request for request in self._running if request.begun and request.cancelled]
        if len(stuck) >= self.capacity and not self._is_stuck:
            self._is_stuck = True
            text = "all %d threads are busy with requests that nobody waits for any more, the first with %s/%s; "
            log.warning(text + "others wait until one returns", len(stuck), stuck[0].endpoint, stuck[0].method)

    def heard(self, broadcast: Heard) -> None:
        """A worker listens to nothing."""

    def link_changed(self, up: bool, why: str) -> None:
        """Lost, or back: what is served is said again by the session."""
        if up:
            log.info("connected to %s", self._connection.url if self._connection else "")
        elif not self._stopping:
            log.warning("%s; coming back", why)

    def standing_refused(self, key: tuple[str, ...], error: BrokerError) -> None:
        """The broker does not let it serve again: that is the end."""
        self.gave_up(error)

    def gave_up(self, error: BrokerError) -> None:
        """There will be no connection any more."""
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # whoever waits gets it; nobody has to

    # ------------------------------------------------------------ answering

    async def _answer_async(self, request: Request, method: Method) -> None:
        enter(request)
        answer: Answer
        try:
            answer = encode(await _call(method, request.asked))
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
        self._flush()

    def _answer_in_thread(self, request: Request, method: Method) -> None:
        answer: Answer
        request.begun = True
        asked = request.asked  # before the look at `cancelled`: what is cancelled loses its parameters
        if request.cancelled:
            answer = Failure(0, "")  # nobody waits: it is not begun
        else:
            enter(request)
            try:
                answer = encode(_call(method, asked))
            except _Unfit as unfit:
                answer = unfit.failure
            except BaseException as error:  # the worker outlives whatever a function does, sys.exit too
                answer = self._failure(request, error)
        self._answers.append((request, answer))
        if not self._woken:
            self._woken = True  # many threads, one wake-up
            try:
                self._loop.call_soon_threadsafe(self._collect)
            except RuntimeError:
                pass  # the loop is closed: the worker has gone

    def _collect(self) -> None:
        self._woken = self._is_stuck = False
        answers = self._answers
        while answers:
            request, answer = answers.popleft()
            self._settle(request)
            self._answer(request, answer)
        self._flush()

    def _settle(self, request: Request) -> None:
        self._running.pop(request, None)
        if request.asked.id is not None:
            self._by_id.pop(request.asked.id, None)

    def _answer(self, request: Request, answer: Answer) -> None:
        number = request.asked.id
        if number is None or self._connection is None:
            return
        session = self._connection.session
        if isinstance(answer, Failure):
            session.fail(number, answer.code, answer.message, answer.data, retryable=answer.retryable)
        else:
            session.answer(number, *answer)

    def _flush(self) -> None:
        if self._connection is not None:
            self._connection.flush()

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


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Leave nothing of the loop. Not `asyncio.Runner`: it waits for ever for a task that swallows its cancelling."""
    try:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=ENDS_S))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
