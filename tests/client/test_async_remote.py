"""Remote objects on an event loop: nothing is asked but what is awaited."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker.client.async_client import AsyncClient
from broker.client.remote import AsyncRemoteMethod
from broker.node.broker import Broker
from broker.peer import errors
from tests.client.test_remote import Calculator, worker_of
from tests.peer.harness import SECRET, broker_running, run, until


@asynccontextmanager
async def calculating() -> AsyncIterator[tuple[Broker, AsyncClient]]:
    async with (
        broker_running() as broker,
        worker_of(broker, "data", Calculator(), thread__count=lambda: 3),
        AsyncClient(broker.url, SECRET) as client,
    ):
        yield broker, client


def test_awaited() -> None:
    async def main() -> None:
        async with calculating() as (broker, client):
            remote = client.remote("data")
            assert "Not described yet" in (remote.__doc__ or "")
            assert await remote.add(1, b=7) == 8
            assert await remote.shape(b"abc", mark=b"x") == [3, b"x"]
            assert await remote.thread.count() == 3
            assert await remote.count(2) == [0, 1, "counted"]
            stream = await remote.count.stream(3)
            assert [item async for item in stream] == [0, 1, 2]
            with pytest.raises(AttributeError, match=r"no method ad; did you mean add\?"):
                await remote.ad(1)
            with pytest.raises(TypeError, match="missing a required argument"):
                await remote.add()
            assert not hasattr(remote, "_repr_html_") and not hasattr(remote.add, "_repr_html_")
            assert "data/add(a: int" in repr(remote.add)

            ready = await client.remote("data")
            assert {"add", "thread"} <= set(dir(ready)) and set(dir(ready.thread)) >= {"count"}
            assert str(inspect.signature(ready.add)) == "(a: int, b: int = 2) -> int"
            assert "Adds what it is given." in (ready.__doc__ or "")
            assert repr(ready.thread) == "<remote data/thread>"
            with pytest.raises(errors.NoEndpoint):
                await client.remote("nobody").anything(1)
            assert isinstance(ready.whatever, AsyncRemoteMethod)
            asking = asyncio.create_task(client.remote("data").add(1))
            assert await asking == 3
            await until(lambda: not broker.router.pending.count, "all have ended")

    run(main)


def test_awaited_after_the_worker_has_changed() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            remote = client.remote("lab")
            async with worker_of(broker, "lab", tell=lambda: "old", gone=lambda: 1):
                assert await remote.tell() == "old"
            async with worker_of(broker, "lab", tell=lambda what: what, fresh=lambda: "new"):
                assert await remote.fresh() == "new"
                assert await remote.tell("new") == "new"
                with pytest.raises(AttributeError):
                    await remote.gone()

    run(main)
