"""The faults of rt-cloud's own server, each as a test that fails where it is made again, and daemons that misbehave."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import threading
import zlib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.worker.confined import Confined, FileRefused
from tests.transports.rtcloud.daemon import Daemon, encode
from tests.transports.rtcloud.harness import hand, rt_config, rt_serving
from tests.transports.rtcloud.test_daemon import DataInterface, here
from tests.transports.websocket.harness import ADMIN, World, run, until


def answers(request: dict[str, Any], value: object, part_bytes: int = 10 << 20) -> list[dict[str, Any]]:
    """The messages by which a daemon would answer."""
    return [json.loads(text) for text in encode(request, value, part_bytes)]


def outcome(reply: Any) -> str:
    return str(reply["error"]["data"]["outcome"])


# ---------------------------------------------------------------- the ten faults


@pytest.mark.parametrize("cookie", ["", "Cookie: login=made-up.signature\r\n"])
def test_fault_rt_01_nothing_before_authentication_is_looked_at(cookie: str) -> None:
    """A socket that is refused is not served: a frame right behind its handshake answers nothing."""

    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data")
            wire_id = await caller.ask("C.a", [])
            request = await daemon.asked()
            forged = json.dumps(answers(request, "forged")[0]).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
            host = f"127.0.0.1:{world.broker.port}"
            head = (
                f"GET /wsData HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                f"Sec-WebSocket-Key: {'A' * 22}==\r\n{cookie}\r\n"
            )
            writer.write(head.encode() + b"\x81\xfe" + len(forged).to_bytes(2) + bytes(4) + forged)
            answer = await reader.read()  # up to the end, which comes by itself
            writer.close()
            assert answer.startswith(b"HTTP/1.1 401 ") and b"forged" not in answer
            assert world.counters.attached == 2 and world.counters.late_replies == world.counters.foreign_replies == 0
            await daemon.say(answers(request, "true")[0])
            assert (await caller.reply(wire_id))["result"] == "true"

    run(main)


def test_fault_rt_02_another_daemons_call_id_is_a_strike_and_ids_cannot_be_foreseen() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as one, hand(world) as other:
            await here(world, count=2)
            caller = await world.caller("data")
            ids = [await caller.ask("C.a", [n]) for n in range(8)]
            requests = [[await each.asked() for _ in range(4)] for each in (one, other)]
            numbers = [request["callId"] for pair in requests for request in pair]
            gaps = {abs(a - b) for a in numbers for b in numbers if a is not b}
            assert len(set(numbers)) == 8 and min(gaps) > 1 << 20 and min(numbers) > 0 and max(numbers) < 1 << 53
            for request in requests[0][:3]:
                await other.say(answers(request, "not mine")[0])
            await other.socket.wait_closed()
            assert other.socket.close_code == 4400
            assert world.counters.foreign_replies == 3
            for request in requests[0]:
                await one.say(answers(request, "mine")[0])
            by_id = [await caller.reply(wire_id) for wire_id in ids]
            assert sorted(r.get("result", "") or outcome(r) for r in by_id) == ["mine"] * 4 + ["worker_lost"] * 4

    run(main)


def test_fault_rt_03_a_disconnect_ends_its_requests_at_once() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data", "listen=0&stream=in&binary=1")
            ids = [await caller.ask("C.a", [], meta={"timeout": 3000}) for _ in range(3)]
            requests = [await daemon.asked() for _ in ids]
            await daemon.say(answers(requests[0], bytes(40), 10)[0])
            await until(lambda: world.counters.parts_down == 1, "one is half answered")
            daemon.socket.transport.abort()
            for wire_id in ids:
                assert outcome(await caller.reply(wire_id)) == "worker_lost"
            assert not len(world.broker.call_ids) and world.books_balance()

    run(main)


def test_fault_rt_04_what_timed_out_stays_nowhere_and_its_late_reply_is_counted() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data")
            live = await caller.ask("C.live", [], meta={"timeout": 3000})
            kept = await daemon.asked()
            late = [await caller.ask("C.late", [], meta={"timeout": 0.1}) for _ in range(5)]
            requests = [await daemon.asked() for _ in late]
            for wire_id in late:
                assert outcome(await caller.reply(wire_id)) == "deadline"
            assert len(world.broker.call_ids) == 1  # without any other reply having come
            for request in requests:
                await daemon.say(answers(request, "late")[0])
            await until(lambda: world.counters.late_replies == 5, "they are counted")
            await daemon.say(answers(kept, "in time")[0])
            assert (await caller.reply(live))["result"] == "in time"
            assert not len(world.broker.call_ids) and world.counters.strikes == 0

    run(main)


def test_fault_rt_05_equal_contents_parts_out_of_order_and_duplicates() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data", "listen=0&binary=1")
            ids = [await caller.ask("C.get", [n]) for n in range(2)]
            first, second = [answers(await daemon.asked(), b"0123456789", 4) for _ in ids]
            for message in (first[2], second[1], first[0], first[0], second[1], second[2], first[1], second[0]):
                await daemon.say(message)
            for wire_id in ids:
                message, (data,) = await caller.reply(wire_id)
                assert message["result"] == {"$buffer": 0} and data == b"0123456789"
            await daemon.say(second[2])
            await until(lambda: world.counters.late_replies == 1, "what comes after the end is late")

    run(main)


def test_fault_rt_06_a_dead_listener_stops_no_broadcast_and_all_can_be_closed() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            listeners = [await world.peer("/ws/data?role=listener") for _ in range(4)]
            listeners[1].socket.transport.abort()
            speaker = await world.peer()
            await speaker.call("broker.publish", {"endpoint": "data", "data": 7})
            for listener in (listeners[0], *listeners[2:]):
                told = await listener.told("broker.message")
                while told["params"].get("topic") or told["params"]["data"] != 7:
                    told = await listener.told("broker.message")
            stopping = asyncio.create_task(world.broker.stop())
            await daemon.socket.wait_closed()
            assert daemon.socket.close_code == 4412
            assert (await listeners[0].closed())[0] == 4412
            await stopping

    run(main)


def test_fault_rt_07_refused_sockets_are_nobodys_end_and_codes_are_legal() -> None:
    async def main() -> None:
        from websockets.exceptions import InvalidStatus

        async with rt_serving(rt_config(endpoints={"subject": {"closed": "moved away"}})) as world:
            for _ in range(3):
                with pytest.raises(InvalidStatus):
                    async with hand(world, cookie="wrong"):
                        pass
            async with hand(world, "/wsSubject") as shut:
                await shut.socket.wait_closed()
                assert (shut.socket.close_code, shut.socket.close_reason) == (4404, "moved away")
            assert world.counters.attached == world.counters.detached == 0
            async with hand(world):
                await here(world)
            await until(lambda: world.counters.detached == 1, "a real one has left")

    run(main)


def test_fault_rt_08_a_second_daemon_shares_the_load() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as old, hand(world) as new:
            await here(world, count=2)
            caller = await world.caller("data")
            ids = [await caller.ask("C.a", [n]) for n in range(10)]
            for daemon in (old, new):
                for request in [await daemon.asked() for _ in range(5)]:
                    await daemon.say(answers(request, request["args"][0])[0])
            assert [(await caller.reply(wire_id))["result"] for wire_id in ids] == list(range(10))

    run(main)


def test_fault_rt_09_folders_are_no_prefixes(tmp_path: Path) -> None:
    allowed, evil = tmp_path / "data", tmp_path / "dataevil"
    for folder in (allowed, evil):
        folder.mkdir()
        (folder / "f").write_bytes(b"x")
    place = Confined(allowed)
    assert place.resolve("f") == ("f",)
    for path in ("../dataevil/f", str(evil / "f"), "../data/../dataevil/f", "x/../../dataevil/f", "/etc/passwd"):
        with pytest.raises(FileRefused):
            place.resolve(path)


def test_fault_rt_10_requests_can_be_cancelled_are_bounded_and_cost_no_thread() -> None:
    async def main() -> None:
        settings = rt_config(limits={"capacity": 3, "queue_max": 2})
        async with rt_serving(settings) as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data")
            threads = threading.active_count()
            ids = [await caller.ask("C.a", [n]) for n in range(6)]
            assert outcome(await caller.reply(ids[5])) == "overloaded"
            requests = [await daemon.asked() for _ in range(3)]
            assert threading.active_count() == threads
            await caller.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": ids[0]}})
            assert outcome(await caller.reply(ids[0])) == "cancelled"
            assert (await daemon.asked())["args"] == [3]  # its place is free at once
            await daemon.say(answers(requests[0], 1)[0])
            await until(lambda: world.counters.late_replies == 1, "its answer is dropped")

    run(main)


# ---------------------------------------------------------------- bad input


def damaged(message: dict[str, Any], **members: Any) -> dict[str, Any]:
    return message | members


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("wrong_md5", {"hash": "0" * 32}, "MD5 of part 1"),
    ("wrong_md5_of_the_whole", {"fileHash": "0" * 32}, "MD5 of the whole"),
    ("part_beyond_the_total", {"partId": 2}, "part 2 of 1"),
    ("no_base64", {"data": "%%%%"}, "base64"),
    (
        "bomb",
        {"compressed": True, "data": base64.b64encode(zlib.compress(bytes(50 << 20), 9)).decode()},
        "unpacks to more",
    ),
]


@pytest.mark.parametrize(("members", "words"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_bad_input_of_a_daemon_is_a_clear_outcome_and_its_link_stays(members: dict[str, Any], words: str) -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data")
            for _ in range(5):
                wire_id = await caller.ask("C.get", [])
                await daemon.say(damaged(answers(await daemon.asked(), b"abc")[0], **members))
                reply = await caller.reply(wire_id)
                assert outcome(reply) == "bad_reply" and words in reply["error"]["data"]["detail"]
            wire_id = await caller.ask("C.get", [])
            await daemon.say(answers(await daemon.asked(), "good")[0])
            assert (await caller.reply(wire_id))["result"] == "good"

    run(main)


def test_bad_input_missing_parts_end_at_the_deadline() -> None:
    async def main() -> None:
        async with rt_serving(rt_config(limits={"idle_s": 0.3})) as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data", "listen=0&binary=1")
            wire_id = await caller.ask("C.get", [])
            messages = answers(await daemon.asked(), b"0123456789", 4)
            await daemon.say(messages[0])
            await daemon.say(messages[2])
            reply = await caller.reply(wire_id)
            assert outcome(reply) == "deadline" and "nothing came for 0.3 s" in reply["error"]["data"]["detail"]
            await daemon.say(messages[1])
            await until(lambda: world.counters.late_replies == 1, "what comes now is late")
            assert world.broker.router.state.budget.outboxes == 0

    run(main)


def test_bad_input_an_empty_file_ends_at_the_deadline() -> None:
    async def main() -> None:
        async with rt_serving() as world, Daemon(world.broker.url, {"D": DataInterface()}):
            await here(world)
            caller = await world.caller("data")
            reply = await caller.call("D.getFile", ["empty"], meta={"timeout": 0.2})
            assert outcome(reply) == "deadline" and reply["error"]["data"]["phase"] == "executing"
            assert (await caller.call("D.getFile", ["full"]))["result"] == {"$base64": "dGhlIGJ5dGVzIG9mIGZ1bGw="}

    run(main)


def test_bad_input_an_unknown_call_id_is_counted_and_ends_nothing() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data")
            wire_id = await caller.ask("C.get", [])
            request = await daemon.asked()
            for call_id in (1, 2, 3, request["callId"] + 1, -5, 0):
                await daemon.say(answers(request | {"callId": call_id}, "x")[0])
            await until(lambda: world.counters.late_replies == 6, "all are counted")
            await daemon.say(answers(request, "good")[0])
            assert (await caller.reply(wire_id))["result"] == "good"

    run(main)


@pytest.mark.parametrize("nonsense", ["", "hello", "[]", b"\x00\x01", '{"cmd": "error"}'])
def test_bad_input_nonsense_is_counted_and_never_answered(nonsense: str | bytes) -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            for _ in range(2):
                await daemon.say(nonsense)
            await until(lambda: world.counters.malformed == 2, "it is counted")
            caller = await world.caller("data")
            wire_id = await caller.ask("C.get", [])
            request = await daemon.asked()  # and nothing before it
            assert request["cmd"] == "rpc"
            await daemon.say(answers(request, 1)[0])
            assert (await caller.reply(wire_id))["result"] == 1

    run(main)


def test_bad_input_of_a_caller_does_not_cost_the_daemon_its_link() -> None:
    """Where one decoder just about takes the depth, the next has less of the stack left."""

    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            caller = await world.peer("/ws", ADMIN)

            async def answer() -> None:
                while True:
                    call = await daemon.asked()
                    await daemon.say({"status": 400, "callId": call["callId"], "error": "heard"})

            answering = asyncio.create_task(answer())
            said = []
            for depth in range(700, 1000):
                nested = "[" * depth + "]" * depth
                await caller.socket.send(f'{{"jsonrpc":"2.0","id":1,"method":"data/C.a","params":{nested}}}')
                said.append((await caller.read())["error"]["message"])
                if said[-1] == "Parse error":
                    break
            assert said[0] == "heard" and said[-1] == "Parse error"
            assert set(said[1:-1]) == {"heard", "the daemon was not asked: the params are nested too deeply"}
            assert not answering.done() and world.broker.router.counters.detached == 0
            answering.cancel()

    run(main)


def test_bad_input_abuse_ends_the_link() -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            for _ in range(3):
                await daemon.say("no json")
            await daemon.socket.wait_closed()
            assert daemon.socket.close_code == 4400

    run(main)


def test_errors_of_a_daemon_are_worker_errors() -> None:
    async def main() -> None:
        async with rt_serving() as world, Daemon(world.broker.url, {"D": DataInterface()}):
            await here(world)
            caller = await world.caller("data")
            reply = await caller.call("Nothing.a", [])
            assert reply["error"]["code"] == -32000
            assert reply["error"]["message"] == "RPC Exception: rpc: class Nothing is not registered"
            assert reply["error"]["data"] == {"dialect": "rtcloud", "status": 400}
            assert world.counters.ended["worker_error"] == 1

    run(main)


def test_parts_that_hold_too_much_for_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("broker.transports.rtcloud.peer.HELD_MAX_BYTES", 1 << 20)
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            caller = await world.caller("data", "listen=0&binary=1")
            wire_id = await caller.ask("C.get", [])
            messages = answers(await daemon.asked(), bytes(1 << 20) * 3, 400_000)
            for message in messages[1:]:
                await daemon.say(
                    message | {"compressed": False, "data": base64.b64encode(bytes(message["dataSize"])).decode()}
                )
            reply = await caller.reply(wire_id)
            assert outcome(reply) == "bad_reply" and "should have come before" in reply["error"]["data"]["detail"]
            assert balanced(world)

    run(main)


def balanced(world: World) -> bool:
    state = world.broker.router.state
    return state.budget.outboxes == 0 and not len(world.broker.call_ids) and world.books_balance()


def test_a_request_that_may_be_repeated_goes_to_another_daemon() -> None:
    """Also if half of its answer has come, as long as its caller has seen nothing of it."""

    async def main() -> None:
        async with rt_serving() as world, hand(world) as one, hand(world) as other:
            await here(world, count=2)
            caller = await world.caller("data", "listen=0&binary=1")
            wire_id = await caller.ask("C.get", [], meta={"idempotent": True})
            request = await one.asked()
            await one.say(answers(request, b"0123456789", 4)[0])
            await until(lambda: world.counters.parts_down == 1, "half of it has come")
            one.socket.transport.abort()
            for message in answers(await other.asked(), b"abcdefghij", 4):
                await other.say(message)
            assert (await caller.reply(wire_id))[1] == [b"abcdefghij"]

    run(main)


def bound_messages(world: World) -> None:
    """At 1 MiB, so that a daemon's outbox is full soon; less than a configuration may say: daemons send more."""
    world.broker.links.limits = dataclasses.replace(world.broker.links.limits, message_max_bytes=1 << 20)


def test_calls_wait_for_a_daemon_that_does_not_read() -> None:
    async def main() -> None:
        settings = rt_config(limits={"outbox_soft_bytes": 65_536, "stall_s": 60})
        async with AsyncExitStack() as stack:
            world = await stack.enter_async_context(rt_serving(settings))
            bound_messages(world)
            daemon = await stack.enter_async_context(hand(world))
            await here(world)
            caller = await world.caller("data")
            daemon.socket.transport.pause_reading()
            big = "x" * 200_000
            ids = [await caller.ask("C.put", [n, big]) for n in range(80)]
            expired = await caller.ask("C.put", [80, big], meta={"timeout": 0.05})
            await caller.sync()
            assert outcome(await caller.reply(expired)) == "deadline"
            (session,) = [each for each in world.broker.router.sessions.by_id.values() if each.dialect == "rtcloud"]
            assert session.congested
            daemon.socket.transport.resume_reading()
            for _ in ids:
                request = await daemon.asked()
                await daemon.say(answers(request, request["args"][0])[0])
            assert [(await caller.reply(wire_id))["result"] for wire_id in ids] == list(range(80))
            await until(lambda: not session.congested, "it reads again")
            assert balanced(world)

    run(main)


def test_what_waited_for_a_daemon_does_not_drown_it() -> None:
    """All of it falls to the first that comes, within one turn: it is written as far as there is room."""

    async def main() -> None:
        settings = rt_config(limits={"outbox_soft_bytes": 65_536, "outbox_hard_bytes": 65_536})
        async with rt_serving(settings) as world:
            bound_messages(world)
            caller = await world.caller("data")
            big = "x" * 200_000
            ids = [await caller.ask("C.put", [n, big], meta={"wait": True}) for n in range(80)]
            await caller.sync()
            async with hand(world) as daemon:
                for _ in ids:
                    request = await daemon.asked()
                    assert max(link.outbox_bytes for link in world.broker.links.links) < 2 << 20
                    await daemon.say(answers(request, request["args"][0])[0])
                assert [(await caller.reply(wire_id))["result"] for wire_id in ids] == list(range(80))
                assert world.broker.links.counters.slow_closes == 0

    run(main)


@pytest.mark.parametrize("how", ["drain", "revoke"])
def test_a_daemon_is_sent_away_with_a_reason(how: str) -> None:
    async def main() -> None:
        async with rt_serving() as world, hand(world) as daemon:
            await here(world)
            (session,) = world.broker.router.sessions.by_id.values()
            assert session.link is not None
            code = 4412 if how == "drain" else 4401
            session.link.close(code, how)
            await daemon.socket.wait_closed()
            assert (daemon.socket.close_code, daemon.socket.close_reason) == (code, how)
            await until(lambda: not world.broker.router.sessions.by_id, "its session has ended")

    run(main)
