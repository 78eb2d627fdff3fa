"""`Worker`: serves functions under an endpoint, from wherever it runs, for as long as it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar, overload

from broker._version import VERSION
from broker.auth.targets import find_target
from broker.core.access import is_name
from broker.peer.connection import Connection, Near, near_of
from broker.peer.errors import BrokerError, ConnectionLost
from broker.peer.session import Asked, Heard, Options
from broker.peer.values import encode
from broker.worker.answering import Answering
from broker.worker.methods import Function, Method, describe_all, make_method, public_methods

log = logging.getLogger("broker.worker")

CAPACITY = 64
DRAIN_S = 25.0
_ASKING = Options(timeout=10.0, idempotent=True)
_LEAVING = Options(timeout=2.0, idempotent=True)

Decorated = TypeVar("Decorated", bound=Function)


class Worker:
    """Serves an endpoint. Methods are added before it starts.

    `url` and `token` default to BROKER_URL and BROKER_TOKEN, then to the broker running on this machine; a `Broker` of
    this process in place of the URL is served without a socket. At most
    `capacity` requests are given to it at a time; functions that are no coroutines run in threads, at most that many.
    `name` is shown by `broker describe`; `drain` is how many seconds it gives requests to finish when it is told to
    stop. `wait` (default) goes on trying while there is no broker yet. `grace` is for how many seconds a broken
    connection ends nothing (the broker may cut it): requests under way go on, and are answered when it is back.
    `deadline` is what requests here have where their caller names none, for methods that take hours, and `idle` how
    long their streams may stand still, both in seconds; the broker may cut them.

        worker = Worker("data")

        @worker.method
        def read(path: str) -> bytes:
            return Path(path).read_bytes()

        worker.run()

    A generator, sync or async, streams: what it yields goes to the caller item by item, as fast as that takes it; while
    it does not, the function is suspended. What a generator returns is the result. `current().parts()` are what the
    caller streams, `current().progress()` tells it how far this is.

    An exception becomes the caller's RemoteError with its type and text; `Fault` says more. When a request is
    cancelled, a coroutine is cancelled, a generator closed, and `broker.worker.current().cancelled` becomes true for
    others. After a lost connection it comes back by itself and serves again.
    """

    def __init__(
        self,
        endpoint: str,
        url: str | Near | None = None,
        token: str | None = None,
        *,
        name: str = "",
        capacity: int = CAPACITY,
        drain: float = DRAIN_S,
        grace: float = 0.0,
        deadline: float | None = None,
        idle: float | None = None,
        wait: bool = True,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not is_name(endpoint):
            raise ValueError(f"{endpoint!r} is no name of an endpoint; names are 1 to 128 of A-Z a-z 0-9 _ . -")
        if not 1 <= capacity <= 1_000_000:
            raise ValueError(f"capacity {capacity} is not between 1 and 1000000")
        if not 0 <= grace < float("inf"):
            raise ValueError(f"grace {grace} is not a number of seconds, at least 0")
        for option, given in (("deadline", deadline), ("idle", idle)):
            if given is not None and not 0 < given < float("inf"):
                raise ValueError(f"{option} {given} is not a number of seconds above 0")
        self.endpoint = endpoint
        self.name = name or f"{platform.node()}:{os.getpid()}"
        self.capacity = capacity
        self.methods: dict[str, Method] = {}
        self.info: dict[str, Any] = {}
        """what `broker.describe` shows beside name and methods, from the next start or reconnection on"""
        self.peer = ""
        """what the broker calls this worker; empty while it does not serve"""
        self._doc = ""
        self._fallback: Callable[[str, Any], Any] | None = None
        self._near = near_of(url, token)
        self._target = find_target(url if isinstance(url, str) else None, token)
        self.drain = drain
        self._grace_s = grace
        self._times = {"deadline": deadline, "idle": idle}
        self._wait = wait
        self._ssl_context = ssl_context
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop
        self._ended: asyncio.Future[None]
        self._answering: Answering
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
        from broker.worker.process import run_until_signalled

        run_until_signalled(self)

    async def start(self) -> Self:
        """Connect and serve, on the running event loop. Raises Refused, Denied, and without `wait` CannotConnect."""
        connection = self._begin()
        try:
            await connection.open(patient=self._wait)
            await self._settle(self._ask_to_serve(connection))
        except BaseException:
            await connection.close()
            raise
        return self

    def _begin_near(self) -> asyncio.Future[Any]:
        """As `start` with a broker that is near, up to where there is something to wait for: for `_settle`.

        What is asked in this process from now on finds it.
        """
        connection = self._begin()
        connection.open_near()
        return self._ask_to_serve(connection)

    def _begin(self) -> Connection:
        if self._connection is not None:
            raise RuntimeError("a worker starts once; make another")
        if not self.methods and self._fallback is None:
            raise ValueError(f"worker of {self.endpoint} has no methods; add some before it starts")
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._ended = self._loop.create_future()
        connection = self._connection = Connection(
            self._target, self, grace_s=self._grace_s, ssl_context=self._ssl_context, near=self._near
        )  # fmt: skip
        self._answering = Answering(connection, self.endpoint, self.methods, self._fallback, self.capacity)
        return connection

    def _ask_to_serve(self, connection: Connection) -> asyncio.Future[Any]:
        params, _ = encode(self._description())
        told: asyncio.Future[Any] = self._loop.create_future()
        connection.ask("broker.serve", params, (), _ASKING, told)
        return told

    async def _settle(self, asked: asyncio.Future[Any]) -> None:
        connection = self._connection
        assert connection is not None
        told = await asked
        self.peer = told["peer"]
        params, _ = encode(self._description())
        connection.session.stand(("serve", self.endpoint), "broker.serve", params)
        names = ", ".join(self.methods) if self._fallback is None else "any method"
        log.info("serving %s at %s as %s: %s", self.endpoint, connection.url, self.peer, names)

    def _description(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            "name": self.name,
            "sdk": f"python {VERSION}",
            "methods": describe_all(self.methods),
            **self.info,
        }
        if self._doc:
            info["doc"] = self._doc
        description: dict[str, Any] = {"endpoint": self.endpoint, "capacity": self.capacity, "info": info}
        description |= {name: seconds for name, seconds in self._times.items() if seconds is not None}
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
        self._answering.cancel_all()
        await connection.close()
        await self._answering.end(now=now)
        if not self._ended.done():
            self._ended.set_result(None)

    async def _drain(self, connection: Connection) -> None:
        ends_at = time.monotonic() + self.drain
        connection.session.unstand(("serve", self.endpoint))
        if connection.is_up:
            params, _ = encode({"endpoint": self.endpoint})
            try:
                await connection.request("broker.unserve", params, (), _LEAVING)
            except BrokerError as error:
                log.debug("leaving: %s", error)
        session = connection.session
        while (connection.is_up or self._grace_s) and time.monotonic() < ends_at:
            if self._answering.is_idle and not session.has_unsent:
                return
            await asyncio.sleep(0.01)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def executing(self) -> int:
        """Requests under way here, cancelled ones whose function has not returned among them."""
        return len(self._answering.running) if self._connection is not None else 0

    @property
    def is_answering_here(self) -> bool:
        """Whether the calling coroutine answers one of the requests under way here."""
        return self._connection is not None and self._answering.is_here

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
        """A request, or a notification."""
        self._answering.asked(asked)

    def cancel_asked(self, number: int | str) -> None:
        """Nobody waits for that answer any more."""
        self._answering.cancel_asked(number)

    def item(self, number: int | str, value: Any) -> None:
        """The caller of a request has sent one more part."""
        self._answering.item(number, value)

    def items_ended(self, number: int | str) -> None:
        """The caller of a request has sent its last part."""
        self._answering.items_ended(number)

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
