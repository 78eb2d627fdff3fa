"""`subscribe(…, since=…)` against a real broker: what was before, what came without a connection, other lives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.client.async_client import AsyncClient, Subscription
from broker.client.client import Client
from tests.peer.harness import SECRET, broker_running, broker_thread, run, until

KEEPING: dict[str, Any] = {"endpoints": {"data": {"history": 5}}}


async def heard(messages: Subscription, count: int) -> list[tuple[int | None, Any, int]]:
    got = [await messages.get(20) for _ in range(count)]
    return [(message.seq, message.data, message.missed) for message in got]


async def publish(client: AsyncClient, *data: Any) -> None:
    for each in data:
        await client.publish("data", each)


def test_what_is_kept_comes_first_and_then_what_comes() -> None:
    async def main() -> None:
        async with broker_running(**KEEPING) as broker, AsyncClient(broker.url, SECRET) as client:
            await publish(client, "a", "b", "c")
            async with await client.subscribe("data", since=1) as messages:
                await publish(client, "d")
                assert await heard(messages, 3) == [(2, "b", 0), (3, "c", 0), (4, "d", 0)]
                assert messages.epoch == broker.node
            await publish(client, "e", "f", "g")
            async with await client.subscribe("data", since=0) as messages:
                assert (await heard(messages, 1)) == [(3, "c", 2)], "two had to go"

    run(main)


def test_what_comes_while_there_is_no_connection_comes_afterwards() -> None:
    async def main() -> None:
        async with (
            broker_running(**KEEPING) as broker,
            AsyncClient(broker.url, SECRET) as client,
            AsyncClient(broker.url, SECRET) as publisher,
        ):
            await publisher.connect()
            async with await client.subscribe("data", since=0) as messages:
                me = (await client.ping())["peer"]
                await publish(publisher, "a", "b")
                assert await heard(messages, 2) == [(1, "a", 0), (2, "b", 0)]
                session = broker.router.state.peer(me)
                assert session is not None and session.link is not None
                session.link.close(1001, "for the test")
                await until(lambda: broker.router.state.peer(me) is None, "the session is gone")
                await publish(publisher, "c")
                assert await heard(messages, 1) == [(3, "c", 0)]
                assert (await client.ping())["peer"] != me
                await publish(publisher, "d")
                assert await heard(messages, 1) == [(4, "d", 0)]

    run(main)


def test_a_broker_started_anew_gives_all_it_has() -> None:
    async def main() -> None:
        async with broker_running(**KEEPING) as broker:
            port = broker.port
            client = AsyncClient(broker.url, SECRET)
            messages = await client.subscribe("data", since=0)
            await publish(client, "a", "b")
            await heard(messages, 2)
            before = messages.epoch
        async with broker_running(port, **KEEPING) as broker:
            async with AsyncClient(broker.url, SECRET) as publisher:
                await publish(publisher, "x", "y", "z")
                assert await heard(messages, 3) == [(1, "x", 0), (2, "y", 0), (3, "z", 0)]
                assert messages.epoch == broker.node != before
                again = await publisher.subscribe("data", since=2, epoch=before)
                assert await heard(again, 3) == [(1, "x", 0), (2, "y", 0), (3, "z", 0)]
                other = AsyncClient(broker.url, SECRET)
                same = await other.subscribe("data", since=2, epoch=broker.node)
                assert await heard(same, 1) == [(3, "z", 0)]
                await other.close()
            await client.close()

    run(main)


def test_what_was_before_comes_to_one_reader_only() -> None:
    async def main() -> None:
        async with broker_running(**KEEPING) as broker, AsyncClient(broker.url, SECRET) as client:
            await publish(client, "a")
            first = await client.subscribe("data", since=0)
            assert await heard(first, 1) == [(1, "a", 0)]
            with pytest.raises(ValueError, match="listened to already"):
                await client.subscribe("data", since=0)
            second = await client.subscribe("data")
            await publish(client, "b")
            assert await heard(first, 1) == await heard(second, 1) == [(2, "b", 0)]
            with pytest.raises(ValueError, match="name it"):
                await client.subscribe(None, since=0)

    run(main)


def test_from_a_thread() -> None:
    with broker_thread(**KEEPING) as (broker, _), Client(broker.url, SECRET) as client:
        client.publish("data", "a")
        client.publish("data", "b")
        with client.subscribe("data", since=1) as messages:
            message = messages.get(20)
            assert (message.seq, message.data) == (2, "b")
            assert messages.epoch == broker.node


def test_the_loop_is_free_while_much_is_heard_again() -> None:
    async def main() -> None:
        keeping: dict[str, Any] = {"endpoints": {"data": {"history": 3000}}, "limits": {"fanout_slice": 50}}
        async with broker_running(**keeping) as broker, AsyncClient(broker.url, SECRET) as client:
            await asyncio.gather(*(client.publish("data", number) for number in range(900)))
            async with AsyncClient(broker.url, SECRET) as other:
                messages = await other.subscribe("data", since=0)
                assert (await other.ping())["node"] == broker.node, "it is answered meanwhile"
                assert [data for _, data, _ in await heard(messages, 900)] == list(range(900))

    run(main)
