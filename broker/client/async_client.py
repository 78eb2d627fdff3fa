"""`AsyncClient`: asks, tells, publishes and listens, on the running event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self

from broker.auth.targets import find_target
from broker.client.requests import DEFAULT_TIMEOUT_S, UNSET, Unset, encode_params, options_for, publish_params
from broker.client.subscription import Inbox, Message
from broker.peer.connection import Connection
from broker.peer.errors import BrokerError, ConnectionLost
from broker.peer.session import Asked, Heard, Options

Key = tuple[str | None, str | None]


class Subscription:
    """Broadcasts of one endpoint or topic: `async for message in subscription`.

    Ends with `close()`, or by raising ConnectionLost when there will be no connection any more. It survives
    reconnecting; what came meanwhile is missing, and counted in `Message.missed`. At most 1,000 unread messages are
    kept; `dropped` counts those that had to go.
    """

    __slots__ = ("_client", "_closed", "_error", "_inbox", "_waiting", "endpoint", "topic")

    def __init__(self, client: AsyncClient, endpoint: str | None, topic: str | None) -> None:
        self.endpoint = endpoint
        self.topic = topic
        self._client = client
        self._inbox = Inbox()
        self._waiting: asyncio.Future[None] | None = None
        self._closed = False
        self._error: BrokerError | None = None

    @property
    def dropped(self) -> int:
        """Messages that were never read because too many were waiting."""
        return self._inbox.dropped

    async def close(self) -> None:
        """Listen no more."""
        await self._client._unsubscribe(self)

    async def get(self, timeout: float | None = None) -> Message:  # noqa: ASYNC109 - the same in both clients
        """The next message. Raises TimeoutError after `timeout` seconds, StopAsyncIteration after `close`."""
        try:
            async with asyncio.timeout(timeout):
                return await self.__anext__()
        except TimeoutError:
            raise TimeoutError(f"no broadcast of {self} within {timeout} s") from None

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        while True:
            message = self._inbox.take()
            if message is not None:
                return message
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            if self._waiting is None:
                self._waiting = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._waiting)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __str__(self) -> str:
        return f"{self.endpoint or 'everybody'}{f' topic {self.topic}' if self.topic else ''}"

    # ------------------------------------------------------------ from the client

    def _begin_at(self, seq: int | None) -> None:
        self._inbox.begin_at(seq)

    def _put(self, heard: Heard) -> None:
        self._inbox.put(heard)
        self._wake()

    def _end(self, error: BrokerError | None) -> None:
        self._closed = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        self._waiting = None


class AsyncClient:
    """A caller and listener. Not thread-safe: it belongs to the event loop it is first used on.

    `url` and `token` default to BROKER_URL and BROKER_TOKEN, then to the broker running on this machine. `timeout` is
    the deadline of every call that names none, in seconds; None leaves it to the broker. `reconnect` opens a broken
    connection again, with full jitter: calls made meanwhile wait for it until their own deadline. `ssl_context`
    replaces the system's for https URLs.

        async with AsyncClient() as client:
            text = await client.call("data/read", {"path": "a.txt"}, timeout=5)

    Whatever ends badly raises a `BrokerError`; see `broker.errors`.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        reconnect: bool = True,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._target = find_target(url, token)
        self._timeout = timeout
        self._options = options_for(timeout)
        self._reconnect = reconnect
        self._ssl_context = ssl_context
        self._connection: Connection | None = None
        self._subscriptions: dict[Key, list[Subscription]] = {}

    # ------------------------------------------------------------ life

    async def connect(self) -> Self:
        """Connect now; otherwise the first request does. Raises CannotConnect, Refused, InvalidRequest."""
        await self._ready(self._options)
        return self

    async def close(self) -> None:
        """End: calls in flight raise ConnectionLost, subscriptions stop. Leaves no task and no socket."""
        connection = self._connection
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription._end(None)
        self._subscriptions.clear()
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """Where the broker is; empty before the first connection."""
        return self._connection.url if self._connection else ""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connection is not None and self._connection.is_up

    # ------------------------------------------------------------ asking

    async def call(
        self, method: str, params: Any = None, *, timeout: float | Unset | None = UNSET, idempotent: bool = False,  # noqa: ASYNC109 - it is sent
        retries: int | None = None, wait: bool = False, trace: str | None = None,
    ) -> Any:  # fmt: skip
        """Ask `endpoint/method` (or one of the broker's own, `broker.…`) and wait for the result.

        `params` is a dict (by name) or a list (by position) of whatever JSON knows, bytes and numpy arrays. `timeout`
        in seconds; `idempotent` allows the broker to try it on another worker if one is lost, at most `retries`
        times; `wait` queues it where no worker is there yet. Bytes come back as bytes, arrays as read-only arrays.

        Raises the exception of its outcome (`RemoteError`, `DeadlineExceeded`, `NoWorker`, …), ConnectionLost, and
        ValueError or TypeError for parameters that cannot be sent. Cancelling the task cancels the request.
        """
        loop = asyncio.get_running_loop()
        raw, attachments = encode_params(method, params)
        options = self._options if timeout is UNSET else options_for(timeout)
        if idempotent or wait or retries is not None or trace is not None:
            options = Options(timeout=options.timeout, idempotent=idempotent, retries=retries, wait=wait, trace=trace)
        connection = self._connection
        if connection is None or not connection.is_up or connection.loop is not loop:
            connection, options = await self._ready(options)
        future = loop.create_future()
        call = connection.ask(method, raw, attachments, options, future)
        try:
            return await future
        except asyncio.CancelledError:
            connection.cancel(call)
            raise

    async def submit(self, method: str, params: Any = None, **options: Any) -> asyncio.Future[Any]:
        """Ask without waiting: a future of the result; cancelling it cancels the request. Options as for `call`."""
        connection, given = await self._ready(self._options_for(options))
        return self._submit(connection, method, params, given)

    def _options_for(self, options: dict[str, Any]) -> Options:
        return options_for(**({"timeout": self._timeout} | options))

    def _submit(self, connection: Connection, method: str, params: Any, options: Options) -> asyncio.Future[Any]:
        raw, attachments = encode_params(method, params)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call = connection.ask(method, raw, attachments, options, future)

        def cancelled(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                connection.cancel(call)

        future.add_done_callback(cancelled)
        return future

    async def map(
        self, method: str, many: Iterable[Any] | AsyncIterable[Any], *, concurrency: int = 16,
        return_exceptions: bool = False, **options: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """The results for many params, in their order; at most `concurrency` requests are in flight.

        With `return_exceptions` an error takes the place of its result; else the first one is raised, and the
        requests still in flight are cancelled, as they are when the iteration is left early. Options as for `call`.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency {concurrency} is not at least 1")
        given = self._options_for(options)
        connection, _ = await self._ready(given)
        window: deque[asyncio.Future[Any]] = deque()
        try:
            async for params in _each(many):
                if len(window) >= concurrency:
                    yield await _result(window.popleft(), return_exceptions)
                window.append(self._submit(connection, method, params, given))
            while window:
                yield await _result(window.popleft(), return_exceptions)
        finally:
            for future in window:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # nobody will ask for it any more

    async def notify(self, method: str, params: Any = None) -> None:
        """Tell a worker something: no answer, no error, and no promise that it arrives.

        Raises ConnectionLost if there is no connection now.
        """
        raw, attachments = encode_params(method, params)
        connection, _ = await self._ready(self._options)
        connection.notify(method, raw, attachments)

    async def publish(
        self, endpoint: str | None, data: Any = None, *, topic: str | None = None, to: str | None = None
    ) -> dict[str, Any]:
        """Broadcast to an endpoint's listeners, to a topic's subscribers, to one peer (`to`), or with None to all.

        Returns `{"seq": n or None, "listeners": n}`.
        """
        result: dict[str, Any] = await self.call("broker.publish", publish_params(endpoint, data, topic, to))
        return result

    async def subscribe(self, endpoint: str | None, *, topic: str | None = None) -> Subscription:
        """Listen to an endpoint's broadcasts, to one of its topics, or with None to what goes to everybody.

            async with await client.subscribe("data") as messages:
                async for message in messages: ...

        Raises Denied without the role. Renewed by itself after reconnecting.
        """
        if endpoint is None and topic is not None:
            raise ValueError("a topic belongs to an endpoint; name it")
        connection, options = await self._ready(self._options)
        subscription = Subscription(self, endpoint, topic)
        self._subscriptions.setdefault((endpoint, topic), []).append(subscription)
        if endpoint is None:
            return subscription
        raw, _ = encode_params("broker.subscribe", _place(endpoint, topic))
        try:
            told = await connection.request("broker.subscribe", raw, (), options)
        except BaseException:
            self._drop(subscription)
            raise
        subscription._begin_at(told.get("seq"))
        connection.session.stand(("subscribe", endpoint, topic or ""), "broker.subscribe", raw)
        return subscription

    # ------------------------------------------------------------ asking about the broker

    async def endpoints(self) -> list[dict[str, Any]]:
        """The endpoints this credential may know of, with their workers, queue and load."""
        result: list[dict[str, Any]] = await self.call("broker.endpoints")
        return result

    async def describe(self, endpoint: str) -> dict[str, Any]:
        """One endpoint with its workers, their methods, and what they say of themselves."""
        result: dict[str, Any] = await self.call("broker.describe", {"endpoint": endpoint})
        return result

    async def ping(self) -> dict[str, Any]:
        """Whether the broker answers: `{"node", "peer", "uptime_s", "version"}`."""
        result: dict[str, Any] = await self.call("broker.ping")
        return result

    # ------------------------------------------------------------ details

    async def _ready(self, options: Options) -> tuple[Connection, Options]:
        """The connection, opened if this is the first that is wanted of it; the options with the time that is left."""
        loop = asyncio.get_running_loop()
        if self._connection is None:
            self._connection = Connection(
                self._target, self, reconnect=self._reconnect, ssl_context=self._ssl_context
            )  # fmt: skip
        connection = self._connection
        if connection.loop is not loop:
            raise RuntimeError("this client belongs to another event loop; make one for each, or use Client")
        if connection.is_up:
            return connection, options
        options.check()
        began = loop.time()
        await connection.open(timeout_s=options.timeout)
        return connection, options.less(loop.time() - began)

    async def _unsubscribe(self, subscription: Subscription) -> None:
        if not self._drop(subscription):
            return
        key = (subscription.endpoint, subscription.topic)
        connection = self._connection
        if key in self._subscriptions or subscription.endpoint is None or connection is None:
            return
        connection.session.unstand(("subscribe", subscription.endpoint, subscription.topic or ""))
        if connection.is_up:
            raw, _ = encode_params("broker.unsubscribe", _place(*key))
            try:
                await connection.request("broker.unsubscribe", raw, (), self._options)
            except ConnectionLost:
                pass  # then it is subscribed to nothing

    def _drop(self, subscription: Subscription) -> bool:
        subscription._end(None)
        key = (subscription.endpoint, subscription.topic)
        others = self._subscriptions.get(key, [])
        if subscription not in others:
            return False
        others.remove(subscription)
        if not others:
            del self._subscriptions[key]
        return True

    # ------------------------------------------------------------ what the connection tells

    def asked(self, request: Asked) -> None:
        """A client serves nothing: the broker gives it no requests."""
        if request.id is not None and self._connection is not None:
            self._connection.session.fail(request.id, -32601, "Method not found")
            self._connection.flush()

    def cancel_asked(self, number: int | str) -> None:
        """Nothing runs here."""

    def heard(self, broadcast: Heard) -> None:
        """Hand a broadcast to whoever subscribed."""
        for subscription in self._subscriptions.get((broadcast.endpoint, broadcast.topic), ()):
            subscription._put(broadcast)

    def link_changed(self, up: bool, why: str) -> None:
        """Calls wait by themselves."""

    def standing_refused(self, key: tuple[str, ...], error: BrokerError) -> None:
        """A subscription is not allowed on the new connection: its readers are told."""
        _, endpoint, topic = key
        for subscription in self._subscriptions.pop((endpoint, topic or None), ()):
            subscription._end(error)

    def gave_up(self, error: BrokerError) -> None:
        """No connection any more: readers are told."""
        for subscriptions in list(self._subscriptions.values()):
            for subscription in list(subscriptions):
                subscription._end(error)
        self._subscriptions.clear()


def _place(endpoint: str | None, topic: str | None) -> dict[str, str]:
    place = {"endpoint": endpoint, "topic": topic}
    return {name: value for name, value in place.items() if value is not None}


async def _each(many: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(many, AsyncIterable):
        async for one in many:
            yield one
    else:
        for one in many:
            yield one


async def _result(future: asyncio.Future[Any], return_exceptions: bool) -> Any:
    try:
        return await future
    except BrokerError as error:
        if return_exceptions:
            return error
        raise
