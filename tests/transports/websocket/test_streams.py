"""Parts, credit and progress over real sockets, for peers that take binary frames and peers that do not."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.transports.websocket.harness import Peer, config, head, joined, run, serving


def note(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


async def part_of(peer: Peer) -> Any:
    return await peer.told("$/part")


@pytest.mark.parametrize("binary", [True, False])
def test_attachments_of_parts_reach_every_kind_of_peer(binary: bool) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            caller = await world.caller(query=f"stream=in&listen=0{'&binary=1' if binary else ''}")
            wire_id = await caller.ask("m")
            call = await worker.taken()
            await worker.send(joined(note("$/part", id=call["id"], seq=0, data={"$buffer": 0}), b"\x00\xff"))
            got = await part_of(caller)
            data = head(got)["params"]["data"]
            if binary:
                assert data == {"$buffer": 0} and got[1] == [b"\x00\xff"]
            else:
                assert base64.b64decode(data["$base64"]) == b"\x00\xff"
            await worker.answer(call, result=None)
            assert (await caller.reply(wire_id))["result"] is None
            assert world.counters.parts_down == 1 and world.counters.part_bytes_down == 16

    run(main)


def test_a_caller_sends_parts_and_the_worker_grants_them() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(query="&meta=1"), await world.caller()
            wire_id = await caller.ask("m", meta={"stream": "out"})
            call = await worker.taken()
            assert call["meta"]["stream"] == "out"
            for seq in range(4):
                await caller.send(note("$/part", id=wire_id, seq=seq, data=seq))
            await worker.send(note("$/credit", id=call["id"], upto=5))
            assert (await caller.told("$/credit"))["params"] == {"id": wire_id, "upto": 5}
            await caller.send(note("$/part", id=wire_id, seq=4, data=4, last=True))
            got = [(await part_of(worker))["params"] for _ in range(5)]
            assert got == [{"id": call["id"], "seq": seq, "data": seq} for seq in range(4)] + [
                {"id": call["id"], "seq": 4, "last": True, "data": 4}
            ]
            await worker.answer(call, result="sum")
            assert (await caller.reply(wire_id))["result"] == "sum"

    run(main)


def test_parts_stay_behind_a_call_that_waits_for_room() -> None:
    """A worker that does not read: its calls are held back, and so is what belongs to them."""

    async def main() -> None:
        settings = config(limits={"outbox_soft_bytes": 4096, "stall_s": 60})
        async with serving(settings) as world:
            worker = await world.worker(query="&capacity=1000")
            caller = await world.caller(query="listen=0&stream=out")
            worker.socket.transport.pause_reading()
            big = "x" * 200_000
            ids = []
            for _ in range(80):
                ids.append(await caller.ask("m", [big]))
                await caller.send(note("$/part", id=ids[-1], seq=0, data=ids[-1], last=True))
            await caller.sync()
            worker.socket.transport.resume_reading()
            calls: dict[str, Any] = {}
            for _ in range(2 * len(ids)):
                message = await worker.read()
                if message["method"] == "m":
                    calls[message["id"]] = None
                else:
                    assert message["params"]["id"] in calls, "a part came before its call"
                    calls[message["params"]["id"]] = message["params"]["data"]
                    await worker.answer({"id": message["params"]["id"]}, result=message["params"]["data"])
            for wire_id in ids:
                assert (await caller.reply(wire_id))["result"] == wire_id

    run(main)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("$/part", {"seq": 0, "data": 1}),
        ("$/part", {"id": 1, "data": 1}),
        ("$/part", {"id": 1, "seq": -1}),
        ("$/part", {"id": 1, "seq": 1.5}),
        ("$/part", {"id": 1, "seq": 0, "more": 1}),
        ("$/part", {"id": None, "seq": 0}),
        ("$/part", [1, 2]),
        ("$/credit", {"id": 1}),
        ("$/credit", {"id": 1, "upto": -5}),
        ("$/credit", {"id": 1, "upto": 1 << 60}),
        ("$/progress", {}),
        ("$/progress", {"token": [1]}),
        ("$/ack", {}),
        ("$/ack", {"n": "x"}),
        ("$/ack", 5),
    ],
)
def test_what_is_no_part_credit_progress_or_ack_is_answered_and_counted(method: str, params: Any) -> None:
    async def main() -> None:
        async with serving() as world:
            caller = await world.caller()
            await caller.send({"jsonrpc": "2.0", "method": method, "params": params})
            reply = await caller.read()
            assert reply["id"] is None and reply["error"]["code"] in (-32600, -32602)
            assert world.counters.malformed == 1 and world.counters.strikes == 0
            await caller.sync()

    run(main)


def test_parts_and_credit_for_nobody_harm_nobody() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, other, caller = await world.worker(), await world.worker(), await world.caller()
            wire_id = await caller.ask("m")
            call = await worker.taken()
            for peer in (other, caller):
                await peer.send(note("$/part", id=call["id"], seq=0, data="forged"))
                await peer.send(note("$/credit", id=call["id"], upto=9))
                await peer.send(note("$/progress", id=call["id"], value="forged"))
                await peer.send(note("$/part", id="unknown", seq=0, data=1))
                await peer.send(note("$/cancelRequest", id="unknown"))
                await peer.sync()
            await worker.answer(call, result="mine")
            assert (await caller.reply(wire_id))["result"] == "mine"
            assert world.counters.parts_dropped == 4 and world.counters.progress_dropped == 2
            assert caller.inbox == worker.inbox == []

    run(main)


def test_members_of_a_batch_do_not_stream() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller(query="listen=0&stream=in")
            await caller.send([{"jsonrpc": "2.0", "id": 1, "method": "m"}])
            call = await worker.taken()
            await worker.send(note("$/part", id=call["id"], seq=0, data=1))
            await worker.answer(call, result=None)
            assert await caller.read() == [{"jsonrpc": "2.0", "id": 1, "result": [1]}]

    run(main)


def test_a_worker_is_told_what_its_caller_wants() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(query="&meta=1"), await world.caller()
            for asked, told in (
                ({"stream": "in"}, {"stream": "in"}),
                ({"stream": "both", "progress": True}, {"stream": "both", "progress": True}),
                ({"progress": "bar", "idle": 5}, {"progress": "bar", "idle": 5.0}),
                ({"timeout": 5}, {}),
            ):
                await caller.ask("m", meta=asked)
                call = await worker.serve_one()
                del call["meta"]["timeout"]
                assert call["meta"] == told

    run(main)
