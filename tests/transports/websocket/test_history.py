"""History over real sockets: much of it, slow readers, others who are not held up."""

from __future__ import annotations

import json

from tests.transports.websocket.harness import World, config, run, serving, until

KIB = 1024
KEEPING = {"lab": {"history": 500, "history_max_bytes": 64 * KIB * KIB}}
BOUNDS = {"outbox_soft_bytes": 256 * KIB, "outbox_hard_bytes": 1024 * KIB, "stall_s": 30.0, "fanout_slice": 10}


async def publish(world: World, count: int, size: int) -> None:
    publisher = await world.caller()
    for number in range(count):
        await publisher.call("broker.publish", {"endpoint": "lab", "data": [number, "x" * size]})


def test_much_more_than_an_outbox_holds_comes_whole_and_in_order() -> None:
    async def main() -> None:
        async with serving(config(endpoints=KEEPING, limits=BOUNDS)) as world:
            await publish(world, 100, 50 * KIB)
            late, other = await world.peer("/ws"), await world.peer("/ws")
            answer = await late.call("broker.subscribe", {"endpoint": "lab", "since": 0})
            assert (answer["result"]["seq"], answer["result"]["first"]) == (100, 1)
            await other.sync()
            for number in range(100):
                told = (await late.told("broker.message"))["params"]
                assert (told["seq"], told["data"][0]) == (number + 1, number)
            await until(lambda: not len(world.broker.router.state.replays), "it has caught up")
            await publish(world, 1, 1)
            assert (await late.told("broker.message"))["params"]["seq"] == 101
            assert world.counters.copies_dropped == 0

    run(main)


def test_who_stops_reading_in_the_middle_goes_on_where_he_was() -> None:
    async def main() -> None:
        async with serving(config(endpoints=KEEPING, limits=BOUNDS)) as world:
            await publish(world, 150, 50 * KIB)
            slow, quick = await world.peer("/ws"), await world.peer("/ws")
            slow.socket.transport.pause_reading()
            await slow.send({
                "jsonrpc": "2.0", "id": 1, "method": "broker.subscribe", "params": {"endpoint": "lab", "since": 0}
            })  # fmt: skip
            replays = world.broker.router.state.replays
            await until(lambda: len(replays) == 1 and not replays.ready, "his replay waits for him")
            await quick.call("broker.subscribe", {"endpoint": "lab", "since": 140})
            assert [(await quick.told("broker.message"))["params"]["seq"] for _ in range(10)] == list(range(141, 151))
            await publish(world, 5, 10)
            assert len(replays) == 1 and not replays.ready
            slow.socket.transport.resume_reading()
            heard = [(await slow.told("broker.message"))["params"]["seq"] for _ in range(155)]
            assert heard == list(range(1, 156))
            assert world.counters.copies_dropped == 0

    run(main)


def test_what_is_too_old_goes_though_nobody_does_anything() -> None:
    async def main() -> None:
        async with serving(config(endpoints={"lab": {"history": 5, "history_s": 1}})) as world:
            await publish(world, 1, 10 * KIB)
            budget = world.broker.router.state.budget
            assert budget.used > 10 * KIB
            await until(lambda: budget.used == 0, "it is gone")

    run(main)


def test_a_session_that_comes_back_hears_the_rest_once() -> None:
    async def main() -> None:
        async with serving(config(endpoints=KEEPING, limits=BOUNDS)) as world:
            await publish(world, 100, 50 * KIB)
            first = await world.peer("/ws?grace=30")
            told = (await first.told("broker.session"))["params"]
            await first.call("broker.subscribe", {"endpoint": "lab", "since": 0})
            heard = [(await first.told("broker.message")) for _ in range(5)]
            received = heard[-1]["meta"]["n"]
            first.socket.transport.abort()
            state = world.broker.router.state
            await until(lambda: state.sessions.suspended == 1, "it has no link")
            await publish(world, 3, 10)
            again = await world.peer(
                f"/ws?grace=30&received={received}",
                subprotocols=["jsonrpc", f"resume.{told['id']}.{told['secret']}"],
            )  # fmt: skip
            assert (await again.told("broker.session"))["params"]["resumed"] is True
            seqs = [message["params"]["seq"] for message in heard]
            while seqs[-1] < 103:
                message = await again.told("broker.message")
                seqs.append(message["params"]["seq"])
                await again.send(
                    json.dumps({"jsonrpc": "2.0", "method": "$/ack", "params": {"n": message["meta"]["n"]}})
                )
            assert seqs == list(range(1, 104))

    run(main)
