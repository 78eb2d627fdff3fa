"""`GET /events/{endpoint}`: broadcasts as server-sent events."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker.transports.http import events
from tests.transports.http.harness import Wire, ask, wire, written
from tests.transports.websocket.harness import CALLER, ELSEWHERE, LISTENER, World, config, run, serving, until


@asynccontextmanager
async def listening(
    world: World, path: str = "/events/lab", secret: str = LISTENER, **headers: str
) -> AsyncIterator[Wire]:
    async with wire(world) as connection:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.send(written(world, path, None, secret, "GET", given))
        status, headers = await connection.header()
        assert status == 200 and headers["content-type"] == "text/event-stream"
        assert headers["x-accel-buffering"] == "no" and headers["cache-control"] == "no-store"
        await connection.until(b": listening\n\n")
        yield connection


async def next_event(connection: Wire) -> dict[str, Any]:
    text = (await connection.until(b"}\n\n")).decode()
    lines = [line.split(": ", 1) for line in text.splitlines() if line.startswith(("id: ", "event: ", "data: "))]
    event: dict[str, Any] = dict(lines)
    event["data"] = json.loads(event["data"])
    return event


def test_broadcasts_come_as_events() -> None:
    async def main() -> None:
        async with serving() as world, listening(world) as listener:
            for n in (1, 2):
                await ask(world, "/broadcast/lab", {"n": n}, secret=CALLER)
                event = await next_event(listener)
                data = {"endpoint": "lab", "seq": n, "data": {"n": n}}
                assert event == {"id": f"{n}.{world.broker.node}", "event": "message", "data": data}
            await ask(world, "/broadcast", "to all")
            event = await next_event(listener)
            assert event == {"event": "message", "data": {"data": "to all"}}

    run(main)


def test_a_topic_alone() -> None:
    async def main() -> None:
        async with serving() as world, listening(world, "/events/lab?topic=t") as listener:
            await ask(world, "/broadcast/lab", "no", secret=CALLER)
            await ask(world, "/broadcast", "no")
            await ask(world, "/broadcast/lab?topic=t", "yes", secret=CALLER)
            event = await next_event(listener)
            assert event["data"] == {"endpoint": "lab", "topic": "t", "seq": 1, "data": "yes"}

    run(main)


KEEPING = {"lab": {"history": 100}}


@pytest.mark.parametrize("topic", [None, "t"])
def test_the_last_event_id_brings_what_was_missed(topic: str | None) -> None:
    query = f"?topic={topic}" if topic else ""

    async def main() -> None:
        async with serving(config(endpoints=KEEPING)) as world:
            async with listening(world, f"/events/lab{query}") as listener:
                await ask(world, f"/broadcast/lab{query}", 1, secret=CALLER)
                last = (await next_event(listener))["id"]
            for n in (2, 3):
                await ask(world, f"/broadcast/lab{query}", n, secret=CALLER)
            async with listening(world, f"/events/lab{query}", Last_Event_ID=last) as listener:
                assert [(await next_event(listener))["data"]["data"] for _ in range(2)] == [2, 3]
                await ask(world, f"/broadcast/lab{query}", 4, secret=CALLER)
                event = await next_event(listener)
                assert (event["data"]["seq"], event["id"]) == (4, last.replace("1", "4", 1))

    run(main)


@pytest.mark.parametrize(
    ("last", "first"),
    [("0", 1), ("2", 3), ("7", 1), ("2.another-life", 1), ("", 4), ("two", 4), ("-1", 4), ("9" * 30, 4), ("²", 4)],
)
def test_last_event_ids_of_another_life_are_void_and_others_not_looked_at(last: str, first: int) -> None:
    async def main() -> None:
        async with serving(config(endpoints=KEEPING)) as world:
            for n in (1, 2, 3):
                await ask(world, "/broadcast/lab", n, secret=CALLER)
            async with listening(world, Last_Event_ID=last) as listener:
                await ask(world, "/broadcast/lab", 4, secret=CALLER)
                heard = [(await next_event(listener))["data"]["seq"] for _ in range(first, 5)]
                assert heard == list(range(first, 5))

    run(main)


def test_comings_and_goings() -> None:
    async def main() -> None:
        async with serving() as world, listening(world, "/events/lab?topic=broker.peers") as listener:
            await world.worker()
            assert (await next_event(listener))["data"]["data"]["event"] == "serving"

    run(main)


@pytest.mark.parametrize(
    ("path", "secret", "status"),
    [
        ("/events/lab", None, 401),
        ("/events/lab", ELSEWHERE, 403),
        ("/events/shut", LISTENER, 403),
        ("/events/lab?topc=t", LISTENER, 400),
        ("/events/lab?topic=a/b", LISTENER, 400),
        ("/events/.lab", LISTENER, 400),
    ],
)
def test_who_may_not_listen(path: str, secret: str | None, status: int) -> None:
    async def main() -> None:
        settings = config(endpoints={"shut": {"closed": "for good"}, "lab": {}})
        async with serving(settings) as world:
            answer = await ask(world, path, method="GET", secret=secret)
            assert answer.status == status, answer.body

    run(main)


def test_a_topic_beyond_the_bound_is_429() -> None:
    async def main() -> None:
        async with serving(config(limits={"topics_per_endpoint_max": 1})) as world:
            async with listening(world, "/events/lab?topic=a"):
                answer = await ask(world, "/events/lab?topic=b", method="GET")
                assert (answer.status, answer.outcome) == (429, "overloaded")
            await until(lambda: len(world.broker.router.sessions) == 0, "both have left")

    run(main)


def test_an_endpoint_beyond_the_bound_is_429() -> None:
    async def main() -> None:
        async with serving(config(limits={"endpoints_known_max": 1})) as world:
            await world.worker("lab")
            answer = await ask(world, "/events/lab2", method="GET")
            assert answer.status == 429, answer.body

    run(main)


def test_who_leaves_is_gone() -> None:
    async def main() -> None:
        async with serving() as world:
            async with listening(world):
                assert world.broker.router.registry.by_name["lab"].listeners == 1
            await until(lambda: len(world.broker.router.sessions) == 0, "the session is gone")
            assert world.broker.router.registry.by_name["lab"].listeners == 0

    run(main)


def test_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.EventsHandler, "heartbeat_s", 0.05)

    async def main() -> None:
        async with serving() as world, listening(world) as listener:
            for _ in range(3):
                await listener.until(b":\n\n")

    run(main)


def test_stopping_says_when_to_come_back_and_ends_the_stream() -> None:
    async def main() -> None:
        async with serving() as world, listening(world) as listener:
            await world.broker.drain(0)
            answer = await ask(world, "/events/lab", method="GET")
            assert answer.status == 200 and answer.body == b"retry: 2000\n\n", "503 would stop an EventSource"
            stopping = asyncio.create_task(world.broker.stop())
            assert b"retry: 2000\n\n" in await listener.rest()
            await stopping

    run(main)


def test_an_administrator_ends_a_stream_with_a_reason() -> None:
    async def main() -> None:
        async with serving() as world, listening(world) as listener:
            (session,) = world.broker.router.sessions.by_id.values()
            assert session.link is not None
            session.link.close(4403, "enough")
            rest = await listener.until(b"}\n\n")
            assert b'event: close\ndata: {"code":4403,"reason":"enough"}' in rest
            assert len(world.broker.router.sessions) == 0

    run(main)


def test_head_opens_no_stream() -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await ask(world, "/events/lab", method="HEAD")
            assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream"
            assert world.counters.attached == 0

    run(main)


def test_a_reader_that_does_not_read_is_bounded_and_closed() -> None:
    async def main() -> None:
        limits = {"outbox_soft_bytes": 64 << 10, "outbox_hard_bytes": 128 << 10, "stall_s": 0.3}
        async with serving(config(limits=limits)) as world, listening(world) as reading:
            quiet = socket.create_connection(("127.0.0.1", world.broker.port))
            quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            quiet.sendall(written(world, "/events/lab", None, LISTENER, "GET", {}))
            await until(lambda: len(world.broker.router.sessions) == 2, "the quiet one listens")
            link = list(world.broker.router.sessions.by_id.values())[1].link
            publisher = await world.caller()
            seen = 0
            while len(world.broker.router.sessions) == 3:  # until the quiet one is closed
                await publisher.call("broker.publish", {"data": "x" * 40_000})
                assert link.pending_bytes <= 64 << 10  # type: ignore[union-attr]
                await next_event(reading)
                seen += 1
            quiet.close()
            assert world.counters.copies_dropped > 0
            assert world.broker.links.counters.slow_closes == 1
            assert seen > 0, "the one that reads has missed nothing"

    run(main)


def test_one_event_larger_than_the_bound_stands_alone() -> None:
    async def main() -> None:
        limits = {"outbox_soft_bytes": 4096, "outbox_hard_bytes": 8192}
        async with serving(config(limits=limits)) as world, listening(world) as listener:
            await ask(world, "/broadcast/lab", "x" * 300_000)
            assert b"x" * 300_000 in await listener.until(b"}\n\n")

    run(main)
