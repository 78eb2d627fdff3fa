"""`AsyncClient`: asks, tells, publishes and listens, on the running event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ssl
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self, TypeAlias

from broker.auth.targets import find_target
from broker.client.parts import Feeds, Parts, check_parts
from broker.client.progress import ProgressFunction, Teller
from broker.client.remote import AsyncRemote, Book
from broker.client.requests import (
    DEFAULT_GRACE_S,
    DEFAULT_TIMEOUT_S,
    LEFT_TO_BROKER,
    UNSET,
    Unset,
    all_options,
    check_grace,
    check_names,
    encode_params,
    options_for,
    publish_params,
    stream_options,
)
from broker.client.stream import Inflow, Stream, fail
from broker.client.subscription import Inbox, Message
from broker.peer.calls import Tell
from broker.peer.connection import Connection, Near, near_of
from broker.peer.errors import BrokerError, ConnectionLost
from broker.peer.session import Asked, Heard, Options, Pending

Key = tuple[str | None, str | None]
AnyFuture: TypeAlias = asyncio.Future[Any] | concurrent.futures.Future[Any]


class Subscription:
    """Broadcasts of one endpoint or topic: `async for message in subscription`.

    Ends with `close()`, or by raising ConnectionLost when there will be no connection any more. It survives
    reconnecting; what came meanwhile is missing, and counted in `Message.missed`, or, with `since`, comes as far as the
    broker keeps it. At most 1,000 unread messages are kept; `dropped` counts those that had to go. `epoch` names the
    life of the topic at the broker, within which `Message.seq` counts.
    """

    __slots__ = ("_client", "_closed", "_error", "_inbox", "_keeps", "_waiting", "endpoint", "epoch", "topic")

    def __init__(self, client: AsyncClient, endpoint: str | None, topic: str | None, since: int | None = None) -> None:
        self.epoch = ""
        self._keeps = since is not None
        self.endpoint = endpoint
        self.topic = topic
        self._client = client
        self._inbox = Inbox()
        self._inbox.begin_at(since)
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

    def _told(self, told: dict[str, Any], fresh: bool = True) -> None:
        """What the broker says of the topic, asked for or renewed; if it is `fresh`, no message has come since then."""
        other_life = self.epoch not in ("", told["epoch"]) or (self._inbox.last or 0) > told["seq"]
        if other_life and self._keeps and fresh:
            self._inbox.begin_anew()
        self.epoch = told["epoch"]
        self._inbox.begin_at(0 if self._keeps else told["seq"])

    def _params(self) -> dict[str, Any]:
        """How to ask for it (again)."""
        since = {"since": self._inbox.last or 0, "epoch": self.epoch or None} if self._keeps else {}
        return {name: value for name, value in (_place(self.endpoint, self.topic) | since).items() if value is not None}

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

    `url` and `token` default to BROKER_URL and BROKER_TOKEN, then to the broker running on this machine; a `Broker` of
    this process in place of the URL is used without a socket, and needs no token. `timeout` is
    the deadline of every call that names none and sends no parts, in seconds; None leaves it to the broker. `reconnect`
    opens a broken connection again, with full jitter: calls made meanwhile wait for it until their own deadline.
    `grace` in seconds is how long the broker is to keep this session when its connection breaks (at most
    `limits.grace_max_s`): who is back by then goes on with its calls, streams and subscriptions as if nothing had been.
    With 0 a broken connection ends what was under way. `ssl_context` replaces the system's for https URLs.

        async with AsyncClient() as client:
            text = await client.call("data/read", {"path": "a.txt"}, timeout=5)

    Whatever ends badly raises a `BrokerError`; see `broker.errors`.
    """

    def __init__(
        self,
        url: str | Near | None = None,
        token: str | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        reconnect: bool = True,
        grace: float = DEFAULT_GRACE_S,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._near = near_of(url, token)
        self._target = find_target(url if isinstance(url, str) else None, token)
        self._timeout = timeout
        self._options = options_for(timeout)
        self._reconnect = reconnect
        self._grace_s = check_grace(grace)
        self._grace_timer: asyncio.TimerHandle | None = None
        self._links_made = 0
        self._feeds = Feeds()
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
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        await self._feeds.ended()

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
        self, method: str, params: Any = None, *, timeout: float | Unset | None = UNSET, idle: float | None = None,  # noqa: ASYNC109 - it is sent
        idempotent: bool = False, retries: int | None = None, key: str | None = None, priority: int = 0,
        group: str | None = None, wait: bool = False, trace: str | None = None,
        progress: ProgressFunction | None = None, parts: Parts | None = None,
    ) -> Any:  # fmt: skip
        """Ask `endpoint/method` (or one of the broker's own, `broker.…`) and wait for the result.

        `params` is a dict (by name) or a list (by position) of whatever JSON knows, bytes and numpy arrays. Bytes come
        back as bytes, arrays as read-only arrays; params and result may be of any size that memory holds. The result of
        a method that yields is the list of its items; `stream` gives them one by one.

        `timeout` in seconds is the deadline of the whole; with `parts` and without it the broker lets them go on for as
        long as they flow. `idle` is how long they may stand still. `idempotent` allows the broker to try it on another
        worker if one is lost, at most `retries` times. A second request with the same `key` and content joins the first
        one or gets its reply again. `priority` from -9 to 9: higher goes first. Requests of one `group` go to one
        worker where the endpoint is sticky, and displace each other where the newest wins. `wait` queues it where no
        worker is there yet. `trace` is a W3C traceparent for the worker.

        `progress(done, total, text)` is called on the loop with what the worker tells; what it raises is logged.
        `parts` are sent one by one as the worker takes them: a list, an async iterable, or any other iterable, which is
        read in a thread of its own. What it raises cancels the request and is raised here.

        Raises the exception of its outcome (`RemoteError`, `DeadlineExceeded`, `NoWorker`, …), ConnectionLost, and
        ValueError or TypeError for what cannot be sent. Cancelling the task cancels the request.
        """
        loop = asyncio.get_running_loop()
        raw, attachments = encode_params(method, params)
        options = (self._options if parts is None else LEFT_TO_BROKER) if timeout is UNSET else options_for(timeout)
        if (
            idempotent or wait or retries is not None or trace is not None or idle is not None or key is not None
            or priority or group is not None or progress is not None
        ):  # fmt: skip
            options = all_options(
                options.timeout, idle=idle, idempotent=idempotent, retries=retries, key=key, priority=priority,
                group=group, wait=wait, trace=trace, progress=progress,
            )  # fmt: skip
        check_parts(parts)
        connection = self._connection
        if connection is None or not connection.is_up or connection.loop is not loop:
            connection, options = await self._ready(options)
        future = loop.create_future()
        if progress is None and parts is None:
            call = connection.ask(method, raw, attachments, options, future)
        else:
            tell = None if progress is None else Teller(progress)
            call = self._ask(connection, method, raw, attachments, options, future, tell, parts)
        try:
            return await future
        except asyncio.CancelledError:
            connection.cancel(call)
            raise

    async def submit(
        self, method: str, params: Any = None, *, progress: ProgressFunction | None = None, parts: Parts | None = None,
        **options: Any,
    ) -> asyncio.Future[Any]:  # fmt: skip
        """Ask without waiting: a future of the result; cancelling it cancels the request. Options as for `call`."""
        check_parts(parts)
        connection, given = await self._ready(self._options_for(options, progress, parts))
        return self._submit(connection, method, params, given, progress, parts)

    async def stream(
        self, method: str, params: Any = None, *, progress: ProgressFunction | None = None, parts: Parts | None = None,
        **options: Any,
    ) -> Stream:  # fmt: skip
        """Ask, and get the items that the method yields as they come. Options as for `call`, but no `key`.

            async with await client.stream("data/rows", {"table": "a"}) as rows:
                async for row in rows: ...
            rows.result  # what the method returned

        The request is on its way when this returns; how it ends, badly too, the iteration tells. A method that does
        not yield gives no item and its result. Without `timeout` the broker's deadline holds until the first item, then
        the stream may go on for as long as it flows. With `timing=True` the stream's `timing` tells where time went.
        """
        check_parts(parts)
        connection, given = await self._ready(stream_options(options, progress))
        return self._stream(connection, method, params, given, progress, parts)

    def _stream(
        self, connection: Connection, method: str, params: Any, given: Options, progress: ProgressFunction | None,
        parts: Parts | None,
    ) -> Stream:  # fmt: skip
        raw, attachments = encode_params(method, params)
        signal = asyncio.Event()
        inflow = Inflow(signal, None if progress is None else Teller(progress))
        self._begin_stream(connection, method, raw, attachments, given, inflow, parts)
        return Stream(inflow, signal)

    def _options_for(self, options: dict[str, Any], progress: ProgressFunction | None, parts: Parts | None) -> Options:
        check_names("submit", options, ("timing", "progress", "parts"))
        timeout = self._timeout if parts is None else None
        return all_options(**({"timeout": timeout} | options), progress=progress)

    def _submit(
        self, connection: Connection, method: str, params: Any, options: Options,
        progress: ProgressFunction | None = None, parts: Parts | None = None,
    ) -> asyncio.Future[Any]:  # fmt: skip
        raw, attachments = encode_params(method, params)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        tell = None if progress is None else Teller(progress)
        call = self._ask(connection, method, raw, attachments, options, future, tell, parts)

        def cancelled(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                connection.cancel(call)

        future.add_done_callback(cancelled)
        return future

    def _ask(
        self, connection: Connection, method: str, raw: bytes, attachments: list[bytes | memoryview],
        options: Options, future: AnyFuture, tell: Tell | None, parts: Parts | None,
    ) -> Pending:  # fmt: skip
        """Ask for a result, with or without progress and parts; on the loop. Raises as `Connection.ask`."""
        call = connection.ask(method, raw, attachments, options, future, tell=tell, sends=parts is not None)
        if parts is not None:
            self._feeds.begin(connection, call, parts, future)
        return call

    def _begin_stream(
        self, connection: Connection, method: str, raw: bytes, attachments: list[bytes | memoryview],
        options: Options, inflow: Inflow, parts: Parts | None,
    ) -> None:  # fmt: skip
        """Ask for items; on the loop. Raises as `Connection.ask`."""
        call = connection.ask(
            method, raw, attachments, options, inflow, reader=inflow, tell=inflow.tell, sends=parts is not None
        )  # fmt: skip
        inflow.begin(connection, call)
        if parts is not None:
            self._feeds.begin(connection, call, parts, inflow)

    async def map(
        self, method: str, many: Iterable[Any] | AsyncIterable[Any], *, concurrency: int = 16,
        return_exceptions: bool = False, progress: ProgressFunction | None = None, parts: Parts | None = None,
        **options: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """The results for many params, in their order; at most `concurrency` requests are in flight.

        With `return_exceptions` an error takes the place of its result; else the first one is raised, and the
        requests still in flight are cancelled, as they are when the iteration is left early. Options as for `call`;
        every request tells the same `progress`, and sends the same `parts` (a list).
        """
        if concurrency < 1:
            raise ValueError(f"concurrency {concurrency} is not at least 1")
        check_parts(parts, again=True)
        given = self._options_for(options, progress, parts)
        connection, _ = await self._ready(given)
        window: deque[asyncio.Future[Any]] = deque()
        try:
            async for params in _each(many):
                if len(window) >= concurrency:
                    yield await _result(window.popleft(), return_exceptions)
                window.append(self._submit(connection, method, params, given, progress, parts))
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

    async def subscribe(
        self, endpoint: str | None, *, topic: str | None = None, since: int | None = None, epoch: str | None = None
    ) -> Subscription:
        """Listen to an endpoint's broadcasts, to one of its topics, or with None to what goes to everybody.

            async with await client.subscribe("data") as messages:
                async for message in messages: ...

        `since` brings, before what comes then, all that the broker has kept with a higher `seq` (0: all it has), and
        what comes while there is no connection. `epoch` is that of the `Subscription` the number is from: if the broker
        has been started anew since, everything it keeps comes.

        Raises Denied without the role, ValueError for `since` where this client listens already. Renewed by itself
        after reconnecting.
        """
        key = (endpoint, topic)
        if endpoint is None and (topic is not None or since is not None):
            raise ValueError("a topic, and what is kept of one, belongs to an endpoint; name it")
        if since is not None and key in self._subscriptions:
            raise ValueError(f"{endpoint} is listened to already; what was before would come to all who listen")
        connection, options = await self._ready(self._options)
        subscription = Subscription(self, endpoint, topic, since)
        self._subscriptions.setdefault(key, []).append(subscription)
        if endpoint is None:
            return subscription
        subscription.epoch = epoch or ""
        raw, _ = encode_params("broker.subscribe", subscription._params())
        try:
            told = await connection.request("broker.subscribe", raw, (), options)
        except BaseException:
            self._drop(subscription)
            raise
        subscription._told(told, fresh=subscription._inbox.last == since)
        if not any(each._keeps for each in self._subscriptions.get(key, ())):
            connection.session.stand(("subscribe", endpoint, topic or ""), "broker.subscribe", raw)
        else:
            self._stand(subscription)
        return subscription

    def _stand(self, subscription: Subscription) -> None:
        """After reconnecting, ask for what has come since the last message."""
        if not subscription._keeps or self._connection is None:
            return
        raw, _ = encode_params("broker.subscribe", subscription._params())

        def told(value: Any) -> None:
            subscription._told(value)
            self._stand(subscription)

        key = ("subscribe", subscription.endpoint or "", subscription.topic or "")
        self._connection.session.stand(key, "broker.subscribe", raw, told)

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

    def remote(
        self, endpoint: str, name: str | None = None, *, timeout: float | Unset | None = UNSET,
        **options: Any,
    ) -> AsyncRemote:  # fmt: skip
        """The methods of an endpoint as attributes, or those below a name: `Class` of an rt-cloud daemon.

            data = client.remote("data", "DataInterface", timeout=10)
            image = await data.getFile("/data/scan.dcm")
            async for part in await data.getFile.stream("/data/scan.dcm"): ...

        `timeout` and `options` are those of `call`, but `parts`, for every call. `await client.remote(…)` asks the
        workers' description at once, else the first call does: names, signatures, documentation. A name that no worker
        has, is an AttributeError when it is called. Raises ValueError for what is no name, TypeError for an option.
        """
        return AsyncRemote(self, Book(self, endpoint, timeout, options), name)

    # ------------------------------------------------------------ details

    async def _ready(self, options: Options) -> tuple[Connection, Options]:
        """The connection, opened if this is the first that is wanted of it; the options with the time that is left."""
        loop = asyncio.get_running_loop()
        connection = self._made()
        if connection.loop is not loop:
            raise RuntimeError("this client belongs to another event loop; make one for each, or use Client")
        if connection.is_up:
            return connection, options
        options.check()
        began = loop.time()
        await connection.open(timeout_s=options.timeout)
        return connection, options.less(loop.time() - began)

    def _made(self) -> Connection:
        """The connection, which may not be open yet."""
        if self._connection is None:
            self._connection = Connection(
                self._target, self, reconnect=self._reconnect, ssl_context=self._ssl_context, grace_s=self._grace_s,
                near=self._near,
            )  # fmt: skip
        return self._connection

    def _ready_now(self) -> Connection:
        """The connection, opened if need be. On its loop, and to a broker that is near only; raises as `connect`."""
        connection = self._made()
        if not connection.is_up:
            connection.open_near()
        return connection

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

    def item(self, number: int | str, value: Any) -> None:
        """Nothing is sent to a client in parts but replies."""

    def items_ended(self, number: int | str) -> None:
        """As `item`."""

    def heard(self, broadcast: Heard) -> None:
        """Hand a broadcast to whoever subscribed."""
        for subscription in self._subscriptions.get((broadcast.endpoint, broadcast.topic), ()):
            subscription._put(broadcast)
            if subscription.epoch and subscription._keeps:
                self._stand(subscription)

    def link_changed(self, up: bool, why: str) -> None:
        """Calls wait by themselves, but not for ever: without a deadline, until the broker has forgotten them."""
        self._links_made += up
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        if not up and self._grace_s and self._connection is not None:
            self._grace_timer = self._connection.loop.call_later(self._grace_s, self._grace_over, why)

    def _grace_over(self, why: str) -> None:
        connection = self._connection
        assert connection is not None
        for call in list(connection.session.pending.values()):
            if call.deadline is None and call.sent and not call.standing and not _may_be_asked_again(call):
                text = f"{why}, and there was none again within {self._grace_s:g} s"
                error = ConnectionLost(text, may_have_executed=True, endpoint=call.endpoint, method=call.method)
                fail(connection, call, error)

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


def _may_be_asked_again(call: Pending) -> bool:
    """Whether a call whose session is lost is asked again in the next one."""
    has_begun = isinstance(call.reader, Inflow) and call.reader.has_begun
    return call.options.idempotent and not has_begun


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
