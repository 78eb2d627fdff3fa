"""What a broker is to the program around it: asking, serving, hooks and broadcasts in one process, without a socket.

`Broker` inherits this, so that one object has it all and `broker.py` stays about routes and sockets. What goes through
here goes the way of every peer: an `AsyncClient` for coroutines, a `Client` for threads and a `Worker` for each set of
functions, on links in memory. So the outcomes, bounds and streams are those of the SDK.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec

from broker.client.async_client import AsyncClient
from broker.client.client import Client, running_here
from broker.client.client import Stream as ThreadStream
from broker.client.parts import Parts
from broker.client.progress import ProgressFunction
from broker.client.requests import UNSET, Unset, check_names, publish_params, stream_options
from broker.client.stream import Stream
from broker.config.model import Config
from broker.config.rules import CLOSE_REASON_MAX_BYTES
from broker.core.access import Principal, is_name
from broker.core.commands import PendingView, view_pending
from broker.core.errors import CANCELLED, GOING_AWAY
from broker.core.limits import EndpointLimits
from broker.core.outcomes import outcome_of
from broker.core.router import Router
from broker.engine.engine import Engine
from broker.links.loop import LoopLinks
from broker.links.pair import PairLink
from broker.node.local import Local, NearPeer, OwnPeer
from broker.node.presence import Hook, Peer, Presence
from broker.node.settings import core_limits, endpoint_limits
from broker.peer.calls import size_of
from broker.peer.errors import BrokerError, Cancelled, TooLarge
from broker.peer.session import VALUE_MAX_BYTES
from broker.peer.values import encode
from broker.worker.requests import current
from broker.worker.worker import CAPACITY, Worker

log = logging.getLogger("broker")

Result = TypeVar("Result")
OnMessage = Callable[[Peer, str, Any], Any]
"""`on_message(peer, method, params)`: what it returns is the answer; a coroutine, a generator of parts, or a function,
which runs in a thread"""
CallBack = Callable[[Any, "BrokerError | None"], object]
"""`callback(value, error)`, one of which is None"""

Hooks = tuple["Hook | None", "Hook | None"]

LOOK_S = 0.01
OPTIONS = ("progress", "parts")
STREAM_OPTIONS = ("timing", *OPTIONS)


class Served:
    """Functions of this process under an endpoint, made by `Broker.serve` and `Broker.endpoint`."""

    def __init__(self, home: Embedding, endpoint: str, make: Callable[[], Worker] | None, hooks: Hooks) -> None:
        self.endpoint = endpoint
        self.hooks = hooks
        self._home = home
        self._make = make
        self._worker: Worker | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def executing(self) -> int:
        """Requests under way here."""
        return 0 if self._worker is None else self._worker.executing

    def publish(self, data: Any, *, topic: str | None = None) -> None:
        """Broadcast to the endpoint's listeners, or to one topic's; from any thread."""
        self._home.broadcast(self.endpoint, data, topic)

    async def close(self, *, now: bool = False) -> None:
        """Serve it no more: take no new requests, finish those under way (with `now` none), tell the hooks no more.

        Raises RuntimeError in a coroutine that answers one of these requests: it would wait for itself.
        """
        if not now and self._worker is not None and self._worker.is_answering_here:
            raise RuntimeError(
                f"this request is one of those to be finished; close {self.endpoint} in a task of its own"
            )
        self._home._forget(self)
        await self._end(now=now)

    def _begin(self) -> None:
        """On the loop: from here on requests come."""
        if self._make is not None:
            self._worker = worker = self._make()
            self._run(self._settle(worker, worker._begin_near()))

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, worker: Worker, asked: asyncio.Future[Any]) -> None:
        try:
            await worker._settle(asked)
        except BrokerError as error:
            if worker is self._worker:
                log.warning("%s is not served by this process: %s", self.endpoint, error)

    def _suspend(self) -> None:
        """The endpoint is closed for now: what is under way here ends."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._run(worker.stop(now=True))

    async def _end(self, *, now: bool) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop(now=now)
        if self._tasks:
            await asyncio.wait(self._tasks)


class Embedding:
    """The part of `Broker` that programs use which have it in their own process and event loop.

    `request_from_thread` and `stream_from_thread` are for other threads than the event loop's; `submit`, `call_back`,
    `broadcast`, `endpoint`, `serve`, `reject`, `peers`, `pending` and `cancel` for any. Everything else belongs to the
    loop. Before `start` only `endpoint`, `serve`, `reject` and `local` may be called.
    """

    config: Config
    engine: Engine
    router: Router
    links: LoopLinks

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._own = Local(self, kind=OwnPeer)
        self._served: list[Served] = []
        self._rejected: dict[str, str] = {}
        self._client: AsyncClient
        self._threads: Client
        self._presence: Presence

    # ------------------------------------------------------------ coming in

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it runs on. Raises RuntimeError before its start and after its end."""
        if self._loop is None:
            raise RuntimeError("the broker does not run; `await broker.start()` comes first")
        return self._loop

    def local(self, principal: Principal | None = None) -> Local:
        """What `Client`, `AsyncClient` and `Worker` take in place of a URL, to come in as this principal.

        Without one they may do everything, as they do when they are given the broker itself.
        """
        return Local(self, principal)

    def open_link(self, links: LoopLinks) -> PairLink:
        """What makes the broker itself usable in place of a URL; see `Local.open_link`."""
        return self.local().open_link(links)

    # ------------------------------------------------------------ asking

    async def request(
        self, method: str, params: Any = None, *, timeout: float | Unset | None = UNSET, **options: Any  # noqa: ASYNC109
    ) -> Any:  # fmt: skip
        """Ask `endpoint/method` and wait for the result. See `AsyncClient.call`."""
        self._check_here()
        check_names("request", options, OPTIONS)
        return await self._client.call(method, params, timeout=timeout, **options)

    def request_from_thread(
        self, method: str, params: Any = None, *, timeout: float | Unset | None = UNSET, **options: Any
    ) -> Any:
        """The same for a thread, which waits. Raises RuntimeError on the loop, where that would be for ever."""
        if running_here() is self.loop:
            raise RuntimeError("this is for threads, and this is the broker's event loop: use await broker.request(…)")
        check_names("request_from_thread", options, OPTIONS)
        return self._threads.call(method, params, timeout=timeout, **options)

    def submit(self, method: str, params: Any = None, **options: Any) -> Future[Any]:
        """Ask without waiting, from any thread; cancelling the future cancels the request. See `Client.submit`."""
        self._check_running()
        check_names("submit", options, STREAM_OPTIONS)
        return self._threads.submit(method, params, **options)

    def call_back(self, method: str, params: Any, callback: CallBack, **options: Any) -> Future[Any]:
        """Ask, from any thread; `callback(value, error)` is called on the loop, once, whatever the outcome.

        What it raises is logged. The future is there to cancel it. Raises TypeError for what is no function, or a
        coroutine function.
        """
        _check_callable("the callback", callback)
        check_names("call_back", options, STREAM_OPTIONS)
        if inspect.iscoroutinefunction(callback):
            raise TypeError("the callback is a coroutine function; give a plain one, which may create a task")

        def ended(future: Future[Any]) -> None:
            try:  # in a turn of its own, not in the midst of what brought the answer
                self.engine.loop.call_soon_threadsafe(_tell, callback, future)
            except RuntimeError:
                pass  # cancelled after the end of the loop

        future = self.submit(method, params, **options)
        self._threads._schedule(future.add_done_callback, ended)
        return future

    def _soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function on the loop: at once if that runs in this thread and no other was first."""
        if self._is_here() and not self._threads._errands:
            function(*arguments)
        else:
            self._threads._schedule(function, *arguments)

    def stream(
        self, method: str, params: Any = None, *, progress: ProgressFunction | None = None, parts: Parts | None = None,
        **options: Any,
    ) -> Stream:  # fmt: skip
        """Ask, and iterate over what comes: `async for part in broker.stream(…)`. See `AsyncClient.stream`."""
        self._check_here()
        given = stream_options(options, progress)
        return self._client._stream(self._client._ready_now(), method, params, given, progress, parts)

    def stream_from_thread(self, method: str, params: Any = None, **options: Any) -> ThreadStream:
        """The same for a thread: `for part in broker.stream_from_thread(…)`. See `Client.stream`."""
        self._check_running()
        check_names("stream_from_thread", options, STREAM_OPTIONS)
        return self._threads.stream(method, params, **options)

    def broadcast(
        self, endpoint: str | None, data: Any, topic: str | None = None, *, only: Peer | str | None = None
    ) -> None:
        """Tell an endpoint's listeners, a topic's, with None everybody, or `only` one peer. From any thread.

        Nobody is waited for, and one who does not read keeps nobody else from hearing it. Raises TooLarge and
        ValueUnfit for what cannot be sent, ValueError for a wrong name.
        """
        self._check_running()
        for name in (endpoint, topic):
            if name is not None:
                _check_name(name)
        to = only.name if isinstance(only, Peer) else only
        raw, attachments = encode(publish_params(endpoint, data, topic, to))
        if size_of(raw, attachments) > VALUE_MAX_BYTES:
            raise TooLarge(f"a broadcast of {size_of(raw, attachments)} bytes is above the bound of {VALUE_MAX_BYTES}")
        self._soon(self._publish, raw, attachments)

    def _publish(self, raw: bytes, attachments: list[bytes | memoryview]) -> None:
        try:
            self._client._ready_now().notify("broker.publish", raw, attachments)
        except BrokerError as error:
            log.debug("a broadcast is lost: %s", error)

    # ------------------------------------------------------------ serving

    def endpoint(
        self, name: str, on_message: OnMessage | None = None, on_connect: Hook | None = None,
        on_disconnect: Hook | None = None, *, capacity: int = CAPACITY,
    ) -> Served:  # fmt: skip
        """Answer an endpoint by one function, and be told who comes to it and leaves it.

        `on_message(peer, method, params)` gets every call and notification of any method there, at most `capacity` at
        a time. The hooks run on the loop with the `Peer`, once each for whoever attaches to the endpoint, serves it or
        listens to it. Raises ValueError for a wrong name, or where hooks are set already, TypeError for what is no
        function.
        """
        for what, function in (
            ("on_message", on_message),
            ("on_connect", on_connect),
            ("on_disconnect", on_disconnect),
        ):
            if function is not None:
                _check_callable(what, function)
        make = None
        if on_message is not None:
            answer = self._answering(on_message)

            def make_worker() -> Worker:
                worker = Worker(name, self._own, name=f"{name} in process", capacity=capacity)
                worker.add_fallback(answer)
                return worker

            make = make_worker
        return self._serve(name, make, (on_connect, on_disconnect))

    def serve(self, name: str, functions: object, *, capacity: int = CAPACITY) -> Served:
        """Serve an endpoint by functions of this process: a dict by name, a list of them, an object or a module.

        Coroutine functions run on the loop, others in threads, at most `capacity`; as with `Worker`, generators stream.
        Raises ValueError and TypeError for what cannot be served.
        """

        def make() -> Worker:
            worker = Worker(name, self._own, name=f"{name} in process", capacity=capacity)
            if isinstance(functions, Mapping):
                for method, function in functions.items():
                    worker.add(function, method)
            elif isinstance(functions, Iterable) and not isinstance(functions, str):
                for function in functions:
                    worker.add(function)
            elif inspect.isroutine(functions):
                worker.add(functions)
            else:
                worker.add_object(functions)
            return worker

        if not make().methods:
            raise ValueError(f"no functions to serve {name} with")
        return self._serve(name, make, (None, None))

    def _serve(self, name: str, make: Callable[[], Worker] | None, hooks: Hooks) -> Served:
        _check_name(name)
        if any(hooks) and any(other.endpoint == name and any(other.hooks) for other in self._served):
            raise ValueError(f"{name} has its hooks already; close them first")
        if make is not None:
            make()  # so that what is wrong is said here
            if any(other.endpoint == name and other._make is not None for other in self._served):
                log.warning(
                    "%s is served twice in this process: its calls are shared, each goes to one of the two", name
                )
        served = Served(self, name, make, hooks)
        self._served.append(served)
        self._do(lambda: self._begin_served(served))
        return served

    def _begin_served(self, served: Served) -> None:
        if any(served.hooks):
            self._presence.watch(served.endpoint, *served.hooks)
        if served.endpoint not in self._rejected:
            try:
                served._begin()
            except BaseException:  # the broker drains, say
                self._forget(served)
                raise

    def _forget(self, served: Served) -> None:
        if served in self._served:
            self._served.remove(served)
            if any(served.hooks) and self._loop is not None:
                self._presence.unwatch(served.endpoint)

    def _answering(self, on_message: OnMessage) -> Callable[[str, Any], Any]:
        """The function a worker calls with the method and params, of the same kind as `on_message`."""
        call = getattr(type(on_message), "__call__", None)  # noqa: B004 - an object whose call is a coroutine function

        def answer(method: str, params: Any) -> Any:
            return on_message(self._caller(), method, params)

        async def answer_later(method: str, params: Any) -> Any:
            return await on_message(self._caller(), method, params)

        async def answer_in_parts(method: str, params: Any) -> AsyncIterator[Any]:
            async with aclosing(on_message(self._caller(), method, params)) as parts:
                async for part in parts:
                    yield part

        if inspect.isasyncgenfunction(on_message) or inspect.isasyncgenfunction(call):
            return answer_in_parts
        return answer_later if inspect.iscoroutinefunction(on_message) or inspect.iscoroutinefunction(call) else answer

    def _caller(self) -> Peer:
        name, principal = current().caller or ("", "")
        return self._presence.find(name, principal)

    # ------------------------------------------------------------ peers

    def reject(self, name: str, reason: str | None) -> None:
        """Close an endpoint: who attaches to it is told the reason with 4404, and so is everybody who is there.

        Calls to it end as `denied`. None opens it again. Raises ValueError for a reason that is empty or longer than
        123 bytes.
        """
        _check_name(name)
        if reason is not None and not 1 <= len(reason.encode()) <= CLOSE_REASON_MAX_BYTES:
            raise ValueError(f"a reason has 1 to {CLOSE_REASON_MAX_BYTES} bytes of UTF-8")
        if self._loop is None:
            self._note_rejected(name, reason)
        self._do(lambda: self._reject(name, reason))

    def _note_rejected(self, name: str, reason: str | None) -> None:
        if reason is None:
            self._rejected.pop(name, None)
        else:
            self._rejected[name] = reason

    def _reject(self, name: str, reason: str | None) -> None:
        was_open = name not in self._rejected
        self._note_rejected(name, reason)
        self.router.reconfigure(core_limits(self.config), self._endpoint_limits(self.config), self.engine.now())
        self.engine.perform()
        if was_open == (reason is None):
            return
        for served in self._served:
            if served.endpoint == name:
                served._begin() if reason is None else served._suspend()

    def _endpoint_limits(self, config: Config) -> dict[str, EndpointLimits]:
        """What is configured of single endpoints, and which of them the program has closed."""
        limits = endpoint_limits(config)
        for name, reason in self._rejected.items():
            limits[name] = msgspec.structs.replace(limits.get(name, EndpointLimits()), closed=reason)
        return limits

    def peers(self, endpoint: str) -> list[Peer]:
        """Who is attached to an endpoint, serves it or listens to it, in the order they came."""
        self._check_running()
        return self._on_loop(lambda: self._presence.peers(endpoint))

    def pending(self) -> list[PendingView]:
        """Every request that has not ended, whoever asked."""
        self._check_running()
        return self._on_loop(
            lambda: view_pending(self.router.state.requests(), self.router.state.peer_name, self.engine.now())
        )

    def cancel(self, number: int) -> bool:
        """End a request by its `PendingView.request`; its caller is told `cancelled`. False if it has ended."""
        self._check_running()
        return self._on_loop(lambda: self._cancel(number))

    def _cancel(self, number: int) -> bool:
        request = next((each for each in self.router.state.requests() if each.id == number), None)
        if request is not None:
            now = self.engine.now()
            self.router.requests.stop(request, outcome_of(CANCELLED, request, now, cause="admin"), now)
            self.engine.perform()
        return request is not None

    async def close_all(self, reason: str = "closed by the program around the broker") -> int:
        """Close the connections of all peers but those of this process, and wait until they are gone; how many it were.

        Clients with `reconnect` come back. Takes at most twice `limits.close_timeout_s`. Raises ValueError for a reason
        longer than 123 bytes.
        """
        if len(reason.encode()) > CLOSE_REASON_MAX_BYTES:
            raise ValueError(f"a reason has at most {CLOSE_REASON_MAX_BYTES} bytes of UTF-8")
        self._check_here()
        sessions = [s for s in self.router.sessions.by_id.values() if not isinstance(s.link, NearPeer)]
        links = self.links.links
        for session in sessions:
            if self.router.attaching.forget(session, self.engine.now()):
                self.engine.perform()
            elif session.link is not None:
                session.link.close(GOING_AWAY.code, reason)
        ends_at = self.engine.now() + 2 * self.config.limits.close_timeout_s
        while not set(links).isdisjoint(self.links.links) and self.engine.now() < ends_at:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)  # the links have no event for some of them
        return len(sessions)

    # ------------------------------------------------------------ life

    def _begin(self) -> None:
        """The parts are there, and the loop runs."""
        self._loop = self.engine.loop
        self._client = AsyncClient(self._own)
        self._threads = Client(self._own)
        self._presence = Presence(self.router, self.loop)
        self.engine.place_changed = self._presence.changed
        for served in list(self._served):
            self._begin_served(served)

    def _leave(self) -> None:
        """The broker closes all links next: nobody needs to be warned of that."""
        for served in self._served:
            if served._worker is not None:
                served._worker._stopping = True

    async def _end(self) -> None:
        """No link is left: let go of clients, workers, tasks and threads."""
        self._loop = None
        for served in list(self._served):
            await served._end(now=False)  # nothing is under way any more; threads get a moment to end
        await self._threads._close_on_loop()
        await self._client.close()
        await self._presence.end()

    def _check_running(self) -> None:
        _ = self.loop

    def _check_here(self) -> None:
        """Raises RuntimeError in other threads and on other loops, and before the start."""
        if running_here() is not self.loop:
            raise RuntimeError(
                "this is for coroutines on the event loop that the broker was started on; "
                "elsewhere take request_from_thread, stream_from_thread, submit or call_back"
            )

    def _is_here(self) -> bool:
        return running_here() is self.engine.loop

    def _do(self, action: Callable[[], None]) -> None:
        """Change something on the loop, from any thread. Before the start it is enough that it is written down."""
        if self._loop is None:
            return
        if self._loop.is_running():
            self._on_loop(action)
        else:  # between `run_sync(broker.start)` and the start of a tornado program's loop, say
            self._loop.call_soon_threadsafe(action)

    def _on_loop(self, action: Callable[[], Result]) -> Result:
        """Do something on the loop and wait for it, from any thread."""
        if self._is_here() or not self.loop.is_running():
            return action()
        future: Future[Result] = Future()
        self._threads._schedule(_settle, future, action)
        return future.result()


def _check_name(name: str) -> None:
    if not is_name(name):
        raise ValueError(f"{name!r} is no name of an endpoint; names are 1 to 128 of A-Z a-z 0-9 _ . -")


def _check_callable(what: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{what} is of type {type(value).__name__}; give a function")


def _settle(future: Future[Result], action: Callable[[], Result]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)


def _tell(callback: CallBack, future: Future[Any]) -> None:
    try:
        if future.cancelled():
            callback(None, Cancelled("taken back here"))
        elif (error := future.exception()) is not None:
            callback(None, error)  # type: ignore[arg-type]
        else:
            callback(future.result(), None)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # the result of a cancelled future raises CancelledError, say
        log.exception("%r failed", callback)
