"""Faults of the list in docs/hostile.md that need a whole broker but no process of its own, each by its number."""

from __future__ import annotations

import asyncio
import time
import tracemalloc

import pytest

from broker.core.budget import Budget
from broker.core.messages import Broadcast
from broker.core.sessions import Session
from broker.core.topics import Fanouts
from tests.links.harness import frame
from tests.transports.websocket.harness import Peer, World, config, run, serving, until
from tests.transports.websocket.test_bad_input import raw_peer


def test_fault_02_a_cut_cable_is_noticed_and_the_deadline_holds_meanwhile() -> None:
    async def main() -> None:
        settings = config(limits={"ping_interval_s": 0.4, "ping_timeout_s": 0.4})
        async with serving(settings) as world:
            caller = await world.caller()
            async with raw_peer(world, "/ws/lab?role=worker") as dead:  # answers no ping, reads nothing
                short = await caller.ask("m", meta={"timeout": 0.2})
                long = await caller.ask("m", meta={"timeout": 30})
                began = time.monotonic()
                assert (await caller.reply(short))["error"]["data"]["outcome"] == "deadline"
                lost = await caller.reply(long)
                assert lost["error"]["data"]["outcome"] == "worker_lost"
                assert time.monotonic() - began < 5, "pings, not the deadline, told"
                assert world.broker.links.counters.ping_timeouts == 1
                assert dead.reader is not None
            await caller.sync()

    run(main, "uvloop")


def test_fault_03_a_worker_that_hangs_loses_its_place_at_the_deadline() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab", "&capacity=1"), await world.caller()
            began = time.monotonic()
            wire_id = await caller.ask("m", meta={"timeout": 0.3})
            hung = await worker.taken()
            waiting = await caller.ask("m", meta={"timeout": 20})
            reply = await caller.reply(wire_id)
            took = time.monotonic() - began
            assert reply["error"]["data"]["phase"] == "executing"
            assert took >= 0.3, "never early"
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == hung["id"]
            await worker.serve_one("the place is free")
            assert (await caller.reply(waiting))["result"] == "the place is free"
            await worker.answer(hung, result="too late")
            await worker.sync()
            assert world.counters.late_replies == 1

    run(main)


def test_fault_04_callers_that_go_leave_no_memory_behind() -> None:
    """Ten thousand requests whose callers are gone before an answer, in short cycles."""

    async def main() -> None:
        async with serving(config(limits={"accepts_per_s": 100_000})) as world:
            worker = await world.worker("lab", "&capacity=100000")
            router = world.broker.router

            async def cycle(number: int) -> None:
                async with raw_peer(world) as raw:
                    call = b'{"jsonrpc":"2.0","id":%d,"method":"m","params":"' + b"x" * 200 + b'"}'
                    raw.writer.write(b"".join(frame(1, call % n) for n in range(500)))
                    await until(lambda: router.counters.accepted >= number * 500, "all are in")
                await until(lambda: router.pending.count == 0, "nothing is pending")

            async def forget(peer: Peer) -> None:
                while True:
                    await peer.socket.recv()

            reading = asyncio.create_task(forget(worker))
            try:
                for number in range(1, 11):
                    await cycle(number)
                tracemalloc.start()
                await cycle(11)
                before = tracemalloc.get_traced_memory()[0]
                for number in range(12, 22):
                    await cycle(number)
                grown = tracemalloc.get_traced_memory()[0] - before
                tracemalloc.stop()
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            assert router.counters.ended["cancelled"] == 10_500
            assert router.counters.cancels == 10_500
            assert len(router.sessions) == 1
            assert not any(session.attempts for session in router.sessions.by_id.values())
            assert len(router.pending.deadlines) == 0
            assert grown < 100_000, f"{grown} bytes are left of 5,000 requests"

    run(main, "uvloop")


def test_fault_09_many_deadlines_in_one_slot_are_ended_in_slices_and_in_order() -> None:
    async def main() -> None:
        settings = config(limits={"prune_slice": 100, "queue_max": 10_000})
        async with serving(settings) as world:
            caller = await world.caller("lab", "wait=1&timeout=0.3&listen=0")
            router = world.broker.router
            ended_at_once = []
            tick = router.tick

            def watched(now: float, limit: int) -> bool:
                before = router.pending.count
                more = tick(now, limit)
                ended_at_once.append(before - router.pending.count)
                return more

            router.tick = watched  # type: ignore[method-assign]
            turns = 0

            async def count_turns() -> None:
                nonlocal turns
                while True:
                    await asyncio.sleep(0)
                    turns += bool(ended_at_once)

            for number in range(5000):
                await caller.ask("m", id=number)
            counting = asyncio.create_task(count_turns())
            replies = [await caller.read() for _ in range(5000)]
            counting.cancel()
            assert max(ended_at_once) <= 100
            assert sum(ended_at_once) == 5000
            assert turns >= 49, "the loop had its turn between the slices"
            assert [reply["id"] for reply in replies] == list(range(5000))
            assert {reply["error"]["data"]["outcome"] for reply in replies} == {"deadline"}

    run(main)


def test_fault_10_the_wall_clock_moves_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            for hours in (3600.0, -3600.0):
                real = time.time()
                monkeypatch.setattr(time, "time", lambda at=real + hours: at)
                wire_id = await caller.ask("m", meta={"timeout": 0.2})
                asked = time.monotonic()
                call = await worker.taken()
                assert (await caller.reply(wire_id))["error"]["data"]["outcome"] == "deadline"
                assert time.monotonic() - asked >= 0.2
                wire_id = await caller.ask("m", meta={"timeout": 20})
                await worker.serve_one("in time")
                assert (await caller.reply(wire_id))["result"] == "in time"
                assert call
                monkeypatch.undo()

    run(main)


# ---------------------------------------------------------------- broadcasts though some are dead or do not read


@pytest.mark.parametrize("publish", [{"endpoint": "lab", "data": "news"}, {"data": "news"}], ids=["endpoint", "all"])
def test_a_broadcast_reaches_every_client_though_one_is_dead_and_one_does_not_read(publish: dict[str, str]) -> None:
    async def main() -> None:
        settings = config(limits={"outbox_soft_bytes": 65_536, "stall_s": 30, "fanouts_max": 10_000})
        async with serving(settings) as world:
            live = [await world.peer("/ws/lab") for _ in range(20)]
            publisher = await world.caller()
            async with raw_peer(world, "/ws/lab"), raw_peer(world, "/ws/lab") as dead:
                dead.writer.transport.abort()  # dead, and at first nobody has noticed
                filler = {**publish, "data": "x" * 100_000}
                for _ in range(100):  # more than the buffers of the one that does not read
                    assert "result" in await publisher.call("broker.publish", filler)
                    for peer in live:
                        await peer.told("broker.message")
                reply = await publisher.call("broker.publish", publish)
                assert reply["result"]["listeners"] == 21
                for peer in live:
                    assert (await peer.told("broker.message"))["params"]["data"] == "news"
                assert world.counters.copies_dropped > 0, "the one that does not read lost some"

    run(main, "uvloop")


class Watched(Fanouts):
    """Remembers how many copies each slice had."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self.sizes: list[int] = []

    def slice(self, limit: int) -> tuple[Broadcast, tuple[Session, ...], dict[str, bytes]] | None:
        piece = super().slice(limit)
        self.sizes.append(0 if piece is None else len(piece[1]))
        return piece


def test_a_publish_goes_out_in_slices() -> None:
    """`python -m benchmarks.publish` measures how long one to 10,000 holds the loop; here it is counted."""

    async def main() -> None:
        async with serving(config(limits={"fanout_slice": 7})) as world:
            listeners = [await world.peer("/ws/lab") for _ in range(40)]
            publisher = await world.caller()
            router = world.broker.router
            router.fanouts = router.state.fanouts = watched = Watched(router.state.budget)
            await publisher.call("broker.publish", {"endpoint": "lab", "data": 1})
            for peer in listeners:
                await peer.told("broker.message")
            assert watched.sizes == [7, 7, 7, 7, 7, 5]

    run(main)


async def ended(world: World, outcome: str) -> int:
    return int(await world.metric("broker_requests_ended_total", outcome=outcome))


def test_fault_01_a_worker_that_vanishes_ends_its_hundred_requests_and_the_books_balance() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            for number in range(100):
                await caller.ask("m", id=number)
            for _ in range(100):
                await worker.taken()
            worker.socket.transport.abort()
            replies = [await caller.read() for _ in range(100)]
            assert {reply["error"]["data"]["outcome"] for reply in replies} == {"worker_lost"}
            assert sorted(reply["id"] for reply in replies) == list(range(100))
            assert await ended(world, "worker_lost") == 100
            accepted = await world.metric("broker_requests_accepted_total")
            assert accepted == world.counters.accepted == sum(world.counters.ended.values())
            assert await world.metric("broker_requests_pending") == 0

    run(main)
