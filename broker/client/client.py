"""`Client`: the same as `AsyncClient`, for threads: it has an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import ssl
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, Self, TypeVar

from broker.client.async_client import AsyncClient
from broker.client.async_client import Subscription as AsyncSubscription
from broker.client.requests import DEFAULT_TIMEOUT_S, UNSET, Unset, encode_params, options_for
from broker.client.subscription import Message
from broker.peer.errors import BrokerError, ConnectionLost
from broker.peer.session import Options, Pending

Result = TypeVar("Result")
Future = concurrent.futures.Future


class Subscription:
    """Broadcasts of one endpoint or topic: `for message in subscription`. See `AsyncClient.subscribe`."""

    __slots__ = ("_client", "_inner")

    def __init__(self, client: Client, inner: AsyncSubscription) -> None:
        self._client = client
        self._inner = inner

    @property
    def endpoint(self) -> str | None:
        """The endpoint listened to; None for what goes to everybody."""
        return self._inner.endpoint

    @property
    def topic(self) -> str | None:
        """The topic listened to; None for the endpoint's own broadcasts."""
        return self._inner.topic

    @property
    def dropped(self) -> int:
        """Messages that were never read because too many were waiting."""
        return self._inner.dropped

    def get(self, timeout: float | None = None) -> Message:
        """The next message. Raises TimeoutError after `timeout` seconds, StopIteration after `close`."""
        message = self._client._run(_next(self._inner, timeout))
        if message is None:
            raise StopIteration
        return message

    def close(self) -> None:
        """Listen no more."""
        self._client._run(self._inner.close())

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        return self.get()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return str(self._inner)


async def _next(subscription: AsyncSubscription, timeout: float | None) -> Message | None:  # noqa: ASYNC109
    try:
        return await subscription.get(timeout)
    except StopAsyncIteration:
        return None


class Client:
    """A caller and listener for any number of threads, in a notebook or another event loop as well.

    Arguments and methods are those of `AsyncClient`. Ctrl-C during a call cancels the request at the worker.

        with Client() as client:
            text = client.call("data/read", {"path": "a.txt"}, timeout=5)
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
        self._inner = AsyncClient(url, token, timeout=timeout, reconnect=reconnect, ssl_context=ssl_context)
        self._timeout = timeout
        self._options = options_for(timeout)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._closed = False

    # ------------------------------------------------------------ life

    def connect(self) -> Self:
        """Connect now; otherwise the first request does. Raises CannotConnect, Refused, InvalidRequest."""
        self._run(self._inner.connect())
        return self

    def close(self) -> None:
        """End: calls in flight raise ConnectionLost, subscriptions stop. Leaves no thread and no socket."""
        self._check_thread()
        with self._lock:
            closed, self._closed = self._closed, True
            loop, thread = self._loop, self._thread
        if closed or loop is None or thread is None:
            return
        if self._process == os.getpid():
            asyncio.run_coroutine_threadsafe(self._inner.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where the broker is; empty before the first connection."""
        return self._inner.url

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._inner.is_connected

    # ------------------------------------------------------------ asking

    def call(
        self, method: str, params: Any = None, *, timeout: float | Unset | None = UNSET, idempotent: bool = False,
        retries: int | None = None, wait: bool = False, trace: str | None = None,
    ) -> Any:  # fmt: skip
        """Ask `endpoint/method` and wait for the result. See `AsyncClient.call`."""
        options = self._options if timeout is UNSET else options_for(timeout)
        if idempotent or wait or retries is not None or trace is not None:
            options = Options(timeout=options.timeout, idempotent=idempotent, retries=retries, wait=wait, trace=trace)
        return self._wait(self._submit(method, params, options))

    def submit(self, method: str, params: Any = None, **options: Any) -> Future[Any]:
        """Ask without waiting: a `concurrent.futures.Future`; cancelling it cancels the request. Options as `call`."""
        options.setdefault("timeout", self._timeout)
        return self._submit(method, params, options_for(**options))

    def map(
        self, method: str, many: Iterable[Any], *, concurrency: int = 16, return_exceptions: bool = False,
        **options: Any,
    ) -> Iterator[Any]:  # fmt: skip
        """The results for many params, in their order; at most `concurrency` in flight. See `AsyncClient.map`."""
        if concurrency < 1:
            raise ValueError(f"concurrency {concurrency} is not at least 1")
        window: deque[Future[Any]] = deque()
        try:
            for params in many:
                if len(window) >= concurrency:
                    yield self._result(window.popleft(), return_exceptions)
                window.append(self.submit(method, params, **options))
            while window:
                yield self._result(window.popleft(), return_exceptions)
        finally:
            for future in window:
                future.cancel()

    def notify(self, method: str, params: Any = None) -> None:
        """Tell a worker something, without an answer. See `AsyncClient.notify`."""
        self._run(self._inner.notify(method, params))

    def publish(
        self, endpoint: str | None, data: Any = None, *, topic: str | None = None, to: str | None = None
    ) -> dict[str, Any]:
        """Broadcast. See `AsyncClient.publish`."""
        return self._run(self._inner.publish(endpoint, data, topic=topic, to=to))

    def subscribe(self, endpoint: str | None, *, topic: str | None = None) -> Subscription:
        """Listen: `for message in client.subscribe("data")`. See `AsyncClient.subscribe`."""
        return Subscription(self, self._run(self._inner.subscribe(endpoint, topic=topic)))

    # ------------------------------------------------------------ asking about the broker

    def endpoints(self) -> list[dict[str, Any]]:
        """The endpoints this credential may know of, with their workers, queue and load."""
        return self._run(self._inner.endpoints())

    def describe(self, endpoint: str) -> dict[str, Any]:
        """One endpoint with its workers, their methods, and what they say of themselves."""
        return self._run(self._inner.describe(endpoint))

    def ping(self) -> dict[str, Any]:
        """Whether the broker answers: `{"node", "peer", "uptime_s", "version"}`."""
        return self._run(self._inner.ping())

    # ------------------------------------------------------------ details

    def _submit(self, method: str, params: Any, options: Options) -> Future[Any]:
        raw, attachments = encode_params(method, params)
        if not self._inner.is_connected:
            _, options = self._run(self._inner._ready(options))
        future: Future[Any] = Future()
        self._schedule(self._ask, method, raw, attachments, options, future)
        return future

    def _ask(
        self, method: str, raw: bytes, attachments: list[bytes | memoryview], options: Options, future: Future[Any]
    ) -> None:
        """On the loop: put the request on its way, unless it was cancelled meanwhile."""
        connection = self._inner._connection
        assert connection is not None
        try:
            if not future.cancelled():
                call = connection.ask(method, raw, attachments, options, future)
                future.add_done_callback(lambda future: self._settled(future, call))
        except Exception as error:
            future.set_exception(error)

    def _settled(self, future: Future[Any], call: Pending) -> None:
        """On whichever thread ended it."""
        if future.cancelled():
            future.set_running_or_notify_cancel()
            connection = self._inner._connection
            assert connection is not None
            try:
                self._schedule(connection.cancel, call)
            except ConnectionLost:
                pass  # closing ended it

    def _schedule(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function on the loop. Raises ConnectionLost after `close`: what is scheduled before it still runs."""
        with self._lock:
            if self._closed:
                raise ConnectionLost("the client is closed")
            self._running_loop().call_soon_threadsafe(function, *arguments)

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the loop and wait for its result; interrupting the wait cancels it."""
        try:
            with self._lock:
                if self._closed:
                    raise ConnectionLost("the client is closed")
                future = asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())
        except BaseException:
            coroutine.close()
            raise
        return self._wait(future)

    def _wait(self, future: Future[Result]) -> Result:
        try:
            if not future.done():
                self._check_thread()
            return future.result()
        except BaseException:
            future.cancel()  # does nothing if it has ended; after Ctrl-C it tells the worker
            raise

    def _result(self, future: Future[Any], return_exceptions: bool) -> Any:
        try:
            return self._wait(future)
        except BrokerError as error:
            if return_exceptions:
                return error
            raise

    def _check_thread(self) -> None:
        """Raises RuntimeError in the client's own thread, where waiting would be for ever."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "the client cannot wait in its own thread, where done callbacks and progress functions run; "
                "take submit(), or a thread of your own"
            )

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop in its thread, started now if need be. Called with the lock held."""
        if self._process != os.getpid():
            raise RuntimeError(f"this client was made in process {self._process}; after a fork make a new one")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_turn, args=(self._loop,), name="broker-client", daemon=True)
            self._thread.start()
        return self._loop


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """The thread: run the loop until it is stopped, then leave nothing of it."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
    finally:
        loop.close()
