"""What workers really answer, attachments between all kinds of peers, and peers that go in the middle of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.transports.websocket.harness import Peer, config, head, joined, run, serving, split, until


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, {"result": None}),
        ({"result": None}, {"result": None}),
        ({"result": 1, "error": {"code": 5, "message": "x"}}, {"error": {"code": 5, "message": "x"}}),
        ({"error": {"code": 0, "message": ""}}, {"error": {"code": 0, "message": ""}}),
        (
            {"error": {"code": 1, "message": "x", "data": "text"}},
            {"error": {"code": 1, "message": "x", "data": "text"}},
        ),
        ({"error": "broke"}, {"error": {"code": -32603, "message": "Internal error", "data": "broke"}}),
        ({"error": {"code": "5"}}, {"error": {"code": -32603, "message": "Internal error", "data": {"code": "5"}}}),
        (
            {"error": {"code": -32003, "message": "mine"}},
            {"error": {"code": -32000, "message": "mine", "data": {"cause": {"code": -32003, "message": "mine"}}}},
        ),
    ],
)
def test_replies_of_workers_as_they_really_come(members: dict[str, object], expected: dict[str, object]) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            wire_id = await caller.ask("m")
            await worker.answer(await worker.taken(), **members)
            assert await caller.reply(wire_id) == {"jsonrpc": "2.0", "id": wire_id, **expected}
            ended = world.counters.ended
            assert ended["worker_error" if "error" in expected else "ok"] == 1
            assert ended["deadline"] == 0, "what the error says plays no part in the books"

    run(main)


@pytest.mark.parametrize("code", [-32600, -32700])
def test_a_library_that_cannot_read_the_call_ends_the_only_one_it_has(code: int) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            wire_id = await caller.ask("m")
            await worker.taken()
            error = {"code": code, "message": "cannot read this"}
            await worker.send({"jsonrpc": "2.0", "id": None, "error": error})
            assert (await caller.reply(wire_id))["error"] == error
            assert world.counters.strikes == 0

    run(main)


def test_a_nameless_reply_ends_none_of_two() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            asked = [await caller.ask("m"), await caller.ask("m")]
            calls = [await worker.taken(), await worker.taken()]
            for error in ({"code": -32600, "message": "x"}, {"code": -32603, "message": "x"}):
                await worker.send({"jsonrpc": "2.0", "id": None, "error": error})
            for call in calls:
                await worker.answer(call, result="fine")
            for wire_id in asked:
                assert (await caller.reply(wire_id))["result"] == "fine"
            (view,) = [p for p in (await caller.call("broker.admin.peers"))["result"] if p["role"] == "worker"]
            assert view["nameless_replies"] == 2, "shown among the peers"

    run(main)


def test_a_worker_marks_its_own_error_retryable() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            wire_id = await caller.ask("m", meta={})
            await worker.answer(await worker.taken(), error={"code": 1, "message": "x"}, meta={"retryable": True})
            assert (await caller.reply(wire_id))["meta"]["retryable"] is True

    run(main)


def test_a_reply_with_broken_base64_is_a_bad_reply() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            wire_id = await caller.ask("m")
            await worker.answer(await worker.taken(), result={"$base64": "x"})
            reply = await caller.reply(wire_id)
            assert (reply["error"]["code"], reply["error"]["data"]["outcome"]) == (-32011, "bad_reply")
            await worker.sync()

    run(main)


# ---------------------------------------------------------------- attachments


KINDS = [("binary", "binary"), ("binary", "text"), ("text", "binary"), ("text", "text")]


def outgoing(peer_kind: str, message: dict[str, Any], member: str, data: bytes) -> object:
    if peer_kind == "binary":
        return joined({**message, member: {"name": "a.dcm", "data": {"$buffer": 0}}}, data)
    return {**message, member: {"name": "a.dcm", "data": {"$base64": base64.b64encode(data).decode()}}}


def incoming(peer_kind: str, raw: str | bytes, member: str) -> bytes:
    """The data, after checks that it came in the form this peer takes."""
    if peer_kind == "binary":
        assert isinstance(raw, bytes)
        text, attachment = split(raw)
        content = json.loads(text)[member]
        assert content == {"name": "a.dcm", "data": {"$buffer": 0}}
        assert (len(raw) - len(attachment)) % 8 == 0
        return attachment
    assert isinstance(raw, str)
    content = json.loads(raw)[member]
    assert list(content["data"]) == ["$base64"]
    return base64.b64decode(content["data"]["$base64"], validate=True)


@pytest.mark.parametrize(("caller_kind", "worker_kind"), KINDS)
@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_bytes_arrive_as_they_were(caller_kind: str, worker_kind: str, size: int) -> None:
    async def main() -> None:
        data = os.urandom(size)
        async with serving() as world:
            worker = await world.worker("lab", "&binary=1" if worker_kind == "binary" else "")
            caller = await world.caller("lab", "listen=0" + ("&binary=1" if caller_kind == "binary" else ""))
            await caller.send(outgoing(caller_kind, {"jsonrpc": "2.0", "id": 1, "method": "m"}, "params", data))
            raw = await worker.raw()
            assert incoming(worker_kind, raw, "params") == data
            wire_id = json.loads(split(raw)[0] if isinstance(raw, bytes) else raw)["id"]
            await worker.send(outgoing(worker_kind, {"jsonrpc": "2.0", "id": wire_id}, "result", data[::-1]))
            assert incoming(caller_kind, await caller.raw(), "result") == data[::-1]

    run(main, "uvloop")


def test_json_without_attachments_always_goes_in_text_frames() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab", "&binary=1"), await world.caller("lab", "listen=0&binary=1")
            await caller.send(joined({"jsonrpc": "2.0", "id": 1, "method": "m"}))
            call = await worker.raw()
            assert isinstance(call, str)
            await worker.answer(json.loads(call), result=1)
            assert isinstance(await caller.raw(), str)

    run(main)


def test_who_has_sent_a_binary_frame_is_sent_them() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab"), await world.caller("lab")
            await caller.send(joined({"jsonrpc": "2.0", "id": 1, "method": "m", "params": {"$buffer": 0}}, b"x"))
            call = await worker.raw()
            assert isinstance(call, str), "the worker has not"
            answer = {"jsonrpc": "2.0", "id": json.loads(call)["id"], "result": {"$base64": "eA=="}}
            await worker.send(answer)
            assert isinstance(await caller.raw(), bytes)

    run(main)


@pytest.mark.parametrize("padding", [b"", b" ", b"   \t\n"])
def test_the_text_may_end_in_spaces(padding: bytes) -> None:
    import struct

    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab", "&binary=1"), await world.caller("lab")
            text = b'{"jsonrpc":"2.0","id":1,"method":"m","params":[{"$buffer":1},{"$buffer":0}]}' + padding
            table = struct.pack(">IIII", 3, 16, 16 + len(text), 17 + len(text))
            await caller.send(table + text + b"a" + b"bc")
            message, attachments = await worker.read()
            assert message["params"] == [{"$buffer": 1}, {"$buffer": 0}]
            assert attachments == [b"a", b"bc"]

    run(main)


def test_indices_are_the_receivers_to_check() -> None:
    async def main() -> None:
        async with serving() as world:
            binary, text = await world.worker("bin", "&binary=1"), await world.worker("txt")
            caller = await world.peer("/ws")
            for endpoint, worker in (("bin", binary), ("txt", text)):
                params = [{"$buffer": 9}, {"$buffer": 0}]
                message = {"jsonrpc": "2.0", "id": 1, "method": f"{endpoint}/m", "params": params}
                await caller.send(joined(message, b"x"))
                call = await worker.read()
                assert head(call)["params"][0] == {"$buffer": 9}
                await worker.answer(call, result=1)
                await caller.reply(1)

    run(main)


def test_few_bytes_that_refer_to_many_do_not_fill_the_memory() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab"), await world.caller("lab")
            listener = await world.peer("/ws/lab")
            params = [{"$buffer": 0}] * 100_000  # 130 GB as base64
            message = {"jsonrpc": "2.0", "id": 1, "method": "m", "params": params}
            await caller.send(joined(message, b"x" * 1_000_000))
            assert (await caller.reply(1))["error"]["data"]["outcome"] == "too_large"
            publish = {"endpoint": "lab", "data": params}
            message = {"jsonrpc": "2.0", "id": 2, "method": "broker.publish", "params": publish}
            await caller.send(joined(message, b"x" * 1_000_000))
            assert "result" in await caller.reply(2)
            await until(lambda: world.counters.copies_dropped == 1, "the copy is dropped and counted")
            await caller.send(joined({"jsonrpc": "2.0", "method": "m", "params": params}, b"x" * 1_000_000))
            await caller.sync()
            assert world.counters.notifications_dropped == 1
            assert await worker.silent()
            assert await listener.silent()

    run(main)


async def answering(worker: Peer) -> None:
    """Answer every call with the size of its parameter."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            call = await worker.read()
            if "id" in call:
                await worker.answer(call, result=len(call["params"][0]))


@pytest.mark.parametrize("binary", [0, 1])
def test_however_much_comes_at_once_a_worker_that_reads_is_no_slow_consumer(binary: int) -> None:
    """14 MB in one message, for a worker whose outbox holds 8 MiB and is called congested a turn later."""

    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab", f"&binary={binary}"), await world.caller("lab")
            task = asyncio.create_task(answering(worker))
            batch = [{"jsonrpc": "2.0", "id": n, "method": "m", "params": ["x" * 14_000]} for n in range(1000)]
            await caller.send(batch)
            assert {reply.get("result") for reply in await caller.read()} == {14_000}
            await caller.send([{"jsonrpc": "2.0", "method": "m", "params": ["x" * 14_000]} for _ in range(1000)])
            assert (await caller.call("m", ["x"]))["result"] == 1
            assert world.broker.links.counters.slow_closes == 0
            task.cancel()

    run(main)


def test_what_waited_for_a_worker_does_not_drown_it() -> None:
    async def main() -> None:
        async with serving() as world:
            caller, other = await world.caller("lab"), await world.caller("lab")
            for number in range(150):
                meta = {"wait": True}
                message = {"jsonrpc": "2.0", "id": f"q{number}", "method": "m", "params": ["x" * 100_000], "meta": meta}
                await caller.send(message)
            await other.ask("m", ["x" * 100_000], meta={"wait": True, "timeout": 0.3})
            await caller.sync()
            worker = await world.worker("lab")
            await asyncio.sleep(0.5)  # the deadline passes while the worker reads nothing
            assert (await other.read())["error"]["data"]["outcome"] == "deadline"
            task = asyncio.create_task(answering(worker))
            for number in range(150):
                assert (await caller.reply(f"q{number}"))["result"] == 100_000
            assert world.broker.links.counters.slow_closes == 0
            task.cancel()

    run(main)


def test_what_a_worker_that_vanished_was_never_sent_may_be_repeated() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab"), await world.caller("lab")
            worker.socket.transport.pause_reading()
            for number in range(200):
                await caller.ask("m", [number, "x" * 100_000])
            await caller.sync()
            worker.socket.transport.abort()
            replies = [await caller.reply(number + 1) for number in range(200)]
            ended = [(r["error"]["data"]["outcome"], r["error"]["data"]["retryable"]) for r in replies]
            assert {outcome for outcome, _ in ended} <= {"worker_lost", "no_worker"}
            assert ended[0] == ("worker_lost", False), "it may have been read"
            assert ended[-1][1], "it was never written"
            assert sorted(retryable for _, retryable in ended) == [retryable for _, retryable in ended]

    run(main)


def test_a_worker_that_is_sent_away_is_given_nothing_more() -> None:
    """Its half of the close handshake may take two seconds; what is asked meanwhile goes to others."""

    async def main() -> None:
        async with serving() as world:
            bad, caller, admin = await world.worker("lab"), await world.caller("lab"), await world.peer("/ws")
            bad.socket.transport.pause_reading()
            held = await caller.ask("m")
            await caller.sync()
            (mine,) = [p for p in (await admin.call("broker.admin.peers"))["result"] if p["role"] == "worker"]
            good = await world.worker("lab")
            await admin.call("broker.admin.close", {"peer": mine["peer"]})
            began = asyncio.get_running_loop().time()
            lost = (await caller.reply(held))["error"]["data"]
            assert (lost["outcome"], lost["retryable"]) == ("worker_lost", False), "it will be written"
            for _ in range(4):
                call = asyncio.create_task(good.serve_one("good"))
                assert (await caller.call("m"))["result"] == "good"
                await call
            assert asyncio.get_running_loop().time() - began < 1.5

    run(main)


def test_broadcasts_reach_each_kind_in_its_form() -> None:
    async def main() -> None:
        async with serving() as world:
            binary, text = await world.peer("/ws/lab?binary=1"), await world.peer("/ws/lab")
            publisher = await world.caller()
            data = {"endpoint": "lab", "data": {"$base64": "b25l"}}
            await publisher.call("broker.publish", data)
            message, attachments = await binary.read()
            assert message["params"] == {"endpoint": "lab", "seq": 1, "data": {"$buffer": 0}}
            assert attachments == [b"one"]
            assert (await text.read())["params"]["data"] == {"$base64": "b25l"}

    run(main)


# ---------------------------------------------------------------- leaving


def test_an_idempotent_request_goes_to_another_worker() -> None:
    async def main() -> None:
        async with serving() as world:
            first, caller = await world.worker(), await world.caller()
            wire_id = await caller.ask("m", meta={"idempotent": True})
            first_call = await first.taken()
            second = await world.worker()
            first.socket.transport.abort()
            call = await second.taken()
            assert call["id"] != first_call["id"]
            await second.answer(call, result="again")
            reply = await caller.reply(wire_id)
            assert (reply["result"], reply["meta"]["attempts"]) == ("again", 2)

    run(main)


def test_a_peer_that_leaves_in_a_batch_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            await caller.send([{"jsonrpc": "2.0", "id": n, "method": "m"} for n in range(50)])
            for _ in range(50):
                await worker.taken()
            caller.socket.transport.abort()
            await until(lambda: world.broker.router.pending.count == 0, "nothing is pending")
            assert world.counters.ended["cancelled"] == 50
            for _ in range(50):
                await worker.told("$/cancelRequest")
            world.broker.router.check()

    run(main)


def test_attachments_in_the_replies_of_a_batch_are_base64_even_for_who_takes_binary_frames() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab", "&binary=1"), await world.caller("lab", "listen=0&binary=1")
            await caller.send([{"jsonrpc": "2.0", "id": number, "method": "m"} for number in range(3)])
            calls = [await worker.taken() for _ in range(3)]
            for call, data in zip(calls[:2], (b"\0\xff", b"two"), strict=True):
                await worker.send(joined({"jsonrpc": "2.0", "id": call["id"], "result": {"$buffer": 0}}, data))
            bomb = {"jsonrpc": "2.0", "id": calls[2]["id"], "result": [{"$buffer": 0}] * 100_000}
            await worker.send(joined(bomb, b"x" * 1_000_000))
            one, two, three = sorted(await caller.read(), key=lambda reply: str(reply["id"]))
            assert one["result"] == {"$base64": base64.b64encode(b"\0\xff").decode()}
            assert two["result"] == {"$base64": base64.b64encode(b"two").decode()}
            assert three["error"]["data"]["outcome"] == "too_large"
            await caller.sync()

    run(main)


def test_the_replies_of_a_batch_together_are_bounded() -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 65_536})) as world:
            worker, caller = await world.worker(), await world.caller()
            await caller.send([{"jsonrpc": "2.0", "id": n, "method": "m"} for n in range(5)])
            for _ in range(5):
                await worker.serve_one("x" * 30_000)
            replies = await caller.read()
            assert [reply["id"] for reply in replies] == list(range(5))
            assert ["result" in reply for reply in replies] == [True, True, False, False, False]
            assert replies[4]["error"]["data"]["outcome"] == "too_large"

    run(main)


def test_two_brokers_live_side_by_side() -> None:
    async def main() -> None:
        async with serving() as one, serving() as two:
            peers = [(await w.worker(), await w.caller()) for w in (one, two)]
            for number, (worker, caller) in enumerate(peers):
                wire_id = await caller.ask("m")
                await worker.serve_one(number)
                assert (await caller.reply(wire_id))["result"] == number
            assert one.broker.node != two.broker.node
            foreign = (await peers[0][1].ask("m"), await peers[0][0].taken())[1]
            await peers[1][0].answer(foreign, result="of another broker")
            await peers[1][0].sync()
            assert two.counters.late_replies == 1
            await peers[0][0].answer(foreign, result="right")

    run(main)


def test_thousands_of_requests_in_flight_each_find_their_caller() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker("lab", "&capacity=100000")
            callers = [await world.caller() for _ in range(8)]

            async def work() -> None:
                pending = []
                for _ in range(4000):
                    pending.append(await worker.taken())
                    if len(pending) == 500:
                        for call in reversed(pending):
                            await worker.answer(call, result=call["params"])
                        pending.clear()

            async def ask(peer: Peer, name: int) -> None:
                for number in range(500):
                    await peer.ask("m", [name, number], id=number)
                for number in range(500):
                    assert (await peer.reply(number))["result"] == [name, number]

            await asyncio.gather(work(), *(ask(peer, name) for name, peer in enumerate(callers)))
            assert world.counters.ended["ok"] == 4000

    run(main, "uvloop")


def test_credit_stays_behind_the_call_it_is_for() -> None:
    """A worker whose outbox is crowded gets the call later; credit before it would be for an id it does not know."""

    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller(query="listen=0&stream=in")
            (session,) = [each for each in world.broker.router.sessions.by_id.values() if each.registrations]
            peer: Any = session.link
            sent: list[bytes] = []
            real, crowded = peer._link, [False]

            class Crowded:
                """The link, as crowded as it is said to be."""

                def __getattr__(self, name: str) -> Any:
                    return getattr(real, name)

                def is_crowded(self) -> bool:
                    return crowded[0]

                def send_parts(self, parts: Any, binary: bool = False) -> None:
                    sent.append(b"".join(parts))
                    real.send_parts(parts, binary)

            peer._link = Crowded()
            await worker.sync()
            sent.clear()
            crowded[0] = True
            wire_id = await caller.ask("m")
            for upto in (6, 9):
                await caller.send({"jsonrpc": "2.0", "method": "$/credit", "params": {"id": wire_id, "upto": upto}})
            await caller.sync()
            assert not sent
            crowded[0] = False
            peer.congested(False)
            told = [json.loads(text) for text in sent]
            assert [each["method"] for each in told[:2]] == ["m", "$/credit"]
            assert [each["params"]["upto"] for each in told[1:]] == [6, 9]
            await worker.answer(await worker.taken(), result=1)
            assert (await caller.reply(wire_id))["result"] == 1

    run(main)
