"""A broker of one's own: on the running loop, or in a thread for code that blocks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec

from broker.auth.tokens import local_principal
from broker.config.model import Config
from broker.core.access import Grant, Principal, Role
from broker.node.broker import Broker

SECRET = "s" * 43
CALLER = "c" * 43
"""a token that may call at `data` only"""


def config(port: int = 0, **sections: Any) -> Config:
    server = {"port": port} | sections.pop("server", {})
    return msgspec.convert({"server": server} | sections, Config)


def new_broker(port: int = 0, **sections: Any) -> Broker:
    caller = Principal(name="caller", grants=(Grant(Role.CALLER, ("data",)),))
    return Broker(config(port, **sections), fixed={SECRET: local_principal(), CALLER: caller})


@asynccontextmanager
async def broker_running(port: int = 0, **sections: Any) -> AsyncIterator[Broker]:
    broker = new_broker(port, **sections)
    await broker.start()
    try:
        await broker.listen()
        yield broker
        broker.router.check()
    finally:
        await broker.stop()


def run(main: Callable[[], Awaitable[None]], timeout_s: float = 40) -> None:
    """Run a test on a loop of its own; fails if a task or a thread of ours is left."""

    async def guarded() -> None:
        async with asyncio.timeout(timeout_s):
            await main()
        await until(lambda: len(asyncio.all_tasks()) == 1, "no task is left")

    asyncio.run(guarded())
    assert not our_threads()


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("worker-", "broker-client"))]


async def until(condition: Callable[[], object], what: str, timeout_s: float = 20) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.005)


@contextmanager
def broker_thread(**sections: Any) -> Iterator[tuple[Broker, asyncio.AbstractEventLoop]]:
    """A broker in a thread, for what blocks; `url` and so on may be read, everything else goes through the loop."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    broker = new_broker(**sections)

    async def begin() -> None:
        await broker.start()
        await broker.listen()
        started.set()

    def turn() -> None:
        loop.run_until_complete(begin())
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield broker, loop
    finally:
        asyncio.run_coroutine_threadsafe(broker.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
    assert not our_threads()
