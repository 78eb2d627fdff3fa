"""A program that has brokers in it: a tornado application with routes of its own, on a free port."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler
from websockets.asyncio.client import connect

from broker import Broker
from tests.transports.websocket.harness import ADMIN, PRINCIPALS, Peer, config, until


class Own(RequestHandler):
    """What the program has beside the broker."""

    def get(self) -> None:
        self.finish("the program's own")


class Host:
    """What `hosting` yields."""

    def __init__(self, port: int, stack: AsyncExitStack) -> None:
        self.port = port
        self._stack = stack

    async def peer(self, path: str = "/broker/ws", secret: str | None = ADMIN, **options: Any) -> Peer:
        headers = dict(options.pop("headers", {}))
        if secret is not None:
            headers["Authorization"] = f"Bearer {secret}"
        options = {"compression": None, "ping_interval": None, "max_size": None, "close_timeout": 2} | options
        url = f"ws://127.0.0.1:{self.port}{path}"
        socket = await connect(url, additional_headers=headers, proxy=None, **options)
        self._stack.push_async_callback(socket.close)
        return Peer(socket)

    async def http(self, path: str, secret: str | None = None, **options: Any) -> HTTPResponse:
        headers = dict(options.pop("headers", {}))
        if secret is not None:
            headers["Authorization"] = f"Bearer {secret}"
        client = AsyncHTTPClient(force_instance=True)
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            return await client.fetch(url, headers=headers, raise_error=False, follow_redirects=False, **options)
        finally:
            client.close()


@asynccontextmanager
async def hosting(settings: dict[str, Any] | None = None, /, **brokers: Broker) -> AsyncIterator[Host]:
    """Brokers that were started, each under its name as the prefix, in an application with these settings.

    They are stopped, and nothing of them is left.
    """
    routes = [rule for prefix, broker in brokers.items() for rule in broker.routes(f"/{prefix}")]
    server = HTTPServer(Application([("/", Own), *routes], **(settings or {})))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        async with AsyncExitStack() as stack:
            yield Host(sockets[0].getsockname()[1], stack)
            for broker in brokers.values():
                broker.router.check()
    finally:
        server.stop()
        for broker in brokers.values():
            await broker.stop()
        await server.close_all_connections()
    for broker in brokers.values():
        await until(lambda broker=broker: nothing_left(broker), "all has gone")  # type: ignore[misc]
        broker.router.check()


def nothing_left(broker: Broker) -> bool:
    return not (broker.links.links or broker.links.pairs or len(broker.router.sessions) or broker.router.pending.count)


async def embedded(**options: Any) -> Broker:
    """A broker that runs and does not listen."""
    broker = Broker(options.pop("settings", None) or config(), fixed=PRINCIPALS, **options)
    await broker.start()
    return broker


async def in_threads(many: int, function: Callable[[int], Any]) -> list[Any]:
    """Run a function in so many threads; what each returned or raised."""
    results: list[Any] = [None] * many

    def one(number: int) -> None:
        try:
            results[number] = function(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(number,), name=f"test-{number}") for number in range(many)]
    for thread in threads:
        thread.start()
    await until(lambda: not any(thread.is_alive() for thread in threads), "all threads have ended")
    return results


async def in_thread(function: Callable[[], Any]) -> Any:
    """Run a function in a thread; raises what it raises."""
    (result,) = await in_threads(1, lambda _: function())
    if isinstance(result, BaseException):
        raise result
    return result


def descriptors() -> set[str]:
    """The open files of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {Path('/proc/self/fd', name).readlink()}")
        except OSError:
            pass  # it was the listing itself
    return found
