"""Daemons with different classes at one endpoint: requests go where the class is, as far as that can be known."""

from __future__ import annotations

import asyncio

import pytest

from broker.client.async_client import AsyncClient
from broker.peer import errors
from tests.transports.rtcloud.daemon import Daemon
from tests.transports.rtcloud.harness import rt_config, rt_serving
from tests.transports.rtcloud.test_daemon import DataInterface, here
from tests.transports.websocket.harness import run


class BidsInterface:
    """What another daemon has."""

    def entries(self) -> list[str]:
        return ["sub-01"]


async def ask_many(client: AsyncClient, method: str, count: int) -> int:
    """Ask so often, one after the other; how often it went wrong."""
    wrong = 0
    for _ in range(count):
        try:
            await client.call(method, ["x"] if method.endswith("getFile") else [], timeout=20)
        except errors.RemoteError as error:
            assert "is not registered" in error.detail
            wrong += 1
    return wrong


def test_what_a_daemon_lacks_is_learned_from_its_answers() -> None:
    async def main() -> None:
        async with (
            rt_serving() as world,
            Daemon(world.broker.url, {"DataInterface": DataInterface()}) as data,
            Daemon(world.broker.url, {"BidsInterface": BidsInterface()}) as bids,
            AsyncClient(world.broker) as client,
        ):
            await here(world, count=2)
            assert await ask_many(client, "data/DataInterface.getFile", 20) <= 1
            assert await ask_many(client, "data/BidsInterface.entries", 20) <= 1
            assert data.answered + bids.answered == 40
            assert await ask_many(client, "data/DataInterface.getFile", 10) == 0
            many = [client.call("data/BidsInterface.entries") for _ in range(20)]
            assert await asyncio.gather(*many) == [["sub-01"]] * 20
            assert world.broker.router.counters.doubts <= 2

            assert data.socket is not None
            await data.socket.close()
            await here(world, count=1)
            with pytest.raises(errors.RemoteError, match="class DataInterface is not registered"):
                await client.call("data/DataInterface.getFile", ["x"])  # nobody better is there

    run(main)


def test_large_results_count_as_answers() -> None:
    async def main() -> None:
        async with (
            rt_serving() as world,
            Daemon(world.broker.url, {"DataInterface": DataInterface()}, part_bytes=1 << 20) as data,
            Daemon(world.broker.url, {}),
            AsyncClient(world.broker) as client,
        ):
            await here(world, count=2)
            wrong = 0
            for _ in range(6):
                try:
                    assert len(await client.call("data/DataInterface.getImage", [3 << 20], timeout=20)) == 3 << 20
                except errors.RemoteError:
                    wrong += 1
            assert wrong <= 1
            assert data.answered >= 5

    run(main)


def test_it_can_be_turned_off() -> None:
    async def main() -> None:
        async with (
            rt_serving(rt_config(rtcloud={"pass_over_s": 0})) as world,
            Daemon(world.broker.url, {"DataInterface": DataInterface()}),
            Daemon(world.broker.url, {}),
            AsyncClient(world.broker) as client,
        ):
            await here(world, count=2)
            assert await ask_many(client, "data/DataInterface.getFile", 10) == 5

    run(main)


def test_classes_that_are_configured_are_known_from_the_first_request() -> None:
    async def main() -> None:
        paths = {"wsData": "data", "wsBids": "data"}
        classes = {"wsData": ["DataInterface"], "wsBids": ["BidsInterface"]}
        async with (
            rt_serving(rt_config(rtcloud={"endpoints": paths, "classes": classes})) as world,
            Daemon(world.broker.url, {"DataInterface": DataInterface()}) as data,
            Daemon(world.broker.url, {"BidsInterface": BidsInterface()}, path="/wsBids") as bids,
            AsyncClient(world.broker) as client,
        ):
            await here(world, count=2)
            assert await ask_many(client, "data/DataInterface.getFile", 5) == 0
            assert await ask_many(client, "data/BidsInterface.entries", 5) == 0
            assert (data.answered, bids.answered) == (5, 5)
            with pytest.raises(errors.NoMethod):
                await client.call("data/SubjectInterface.show")
            described = (await client.describe("data"))["workers"]
            assert sorted(worker["methods"] for worker in described) == [["BidsInterface.*"], ["DataInterface.*"]]

            remote = await client.remote("data")
            assert {"BidsInterface", "DataInterface"} <= set(dir(remote))
            assert await remote.DataInterface.getFile("a") == b"the bytes of a"
            assert await client.remote("data", "BidsInterface").entries() == ["sub-01"]
            with pytest.raises(AttributeError, match=r"no method BidsInterfac; did you mean BidsInterface\?"):
                await remote.BidsInterfac()

    run(main)
