"""One direct test per rule of the protocol for JSON-RPC on a WebSocket, with bare clients."""

# ruff: noqa: UP031 - JSON is full of braces

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.transports.websocket.harness import ADMIN, LISTENER, Peer, World, config, run, serving, until


async def pair(world: World, query: str = "", caller: str = "listen=0") -> tuple[Peer, Peer]:
    """A worker and a caller of the endpoint `lab`."""
    worker = await world.worker("lab", query)
    return worker, await world.caller("lab", caller)


def code_of(reply: Any) -> int:
    assert "result" not in reply, reply
    return int(reply["error"]["code"])


def data_of(reply: Any) -> Any:
    return reply["error"]["data"]


# ---------------------------------------------------------------- who is attached where


def test_a_caller_and_a_worker_use_bare_methods() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            wire_id = await caller.ask("read", {"file": "a.dcm"})
            call = await worker.taken()
            assert call == {"jsonrpc": "2.0", "id": call["id"], "method": "read", "params": {"file": "a.dcm"}}
            assert isinstance(call["id"], str)
            await worker.answer(call, result=[1, 2])
            assert await caller.reply(wire_id) == {"jsonrpc": "2.0", "id": wire_id, "result": [1, 2]}

    run(main, "uvloop")


@pytest.mark.parametrize(
    "value", ['{"b": 1.0,"a":1e2, "é":"\\u00e9"}', "12345678901234567890123", '"\\/"', "null", "[ ]", "-0", "1E400"]
)
def test_params_results_and_error_data_pass_as_they_came(value: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.send('{"jsonrpc":"2.0","id":1,"method":"m","params":%s}' % value)
            text = await worker.raw()
            assert isinstance(text, str)
            assert text.endswith(',"params":%s}' % value)
            await worker.send('{"jsonrpc":"2.0","id":%s,"result":%s}' % (json.dumps(json.loads(text)["id"]), value))
            assert await caller.raw() == '{"jsonrpc":"2.0","id":1,"result":%s}' % value
            await caller.ask("m", id=2)
            error = '{"code":-1,"message":"no","data":%s}' % value
            wire_id = json.dumps((await worker.taken())["id"])
            await worker.send('{"jsonrpc":"2.0","id":%s,"error":%s}' % (wire_id, error))
            assert await caller.raw() == '{"jsonrpc":"2.0","id":2,"error":%s}' % error

    run(main)


def test_params_that_are_absent_stay_absent() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.ask("m")
            assert "params" not in await worker.taken()

    run(main)


def test_a_worker_calls_as_a_caller_does() -> None:
    async def main() -> None:
        async with serving() as world:
            first, second = await world.worker("lab"), await world.worker("lab")
            wire_id = await first.ask("sum", [1, 2])
            taker, call = await whoever([first, second])  # it may be the one that asks
            await taker.answer(call, result=3)
            assert (await first.reply(wire_id))["result"] == 3

    run(main)


async def whoever(workers: list[Peer]) -> tuple[Peer, Any]:
    """The worker that gets the next call, and the call."""
    import asyncio

    tasks = {asyncio.create_task(worker.taken()): worker for worker in workers}
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    task = done.pop()
    return tasks[task], task.result()


@pytest.mark.parametrize("method", ["read", "lab/a/b", "/read", "lab/", "a b/c", "lab/read\n", "../x", "lab/é"])
def test_an_unattached_link_calls_endpoint_slash_method(method: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker("lab")
            caller = await world.peer("/ws")
            reply = await caller.call(method)
            assert code_of(reply) == -32600
            assert "endpoint/method" in data_of(reply)["detail"]
            wire_id = await caller.ask("lab/read", [1])
            assert (await worker.serve_one())["method"] == "read"
            assert (await caller.reply(wire_id))["result"] == "done"

    run(main)


@pytest.mark.parametrize("method", ["", "a/b", ".hidden", "-x", "x" * 129, "m\n", "m\u0000", "__proto__/x", "ü"])
def test_an_attached_link_calls_names(method: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            reply = await caller.call(method)
            assert code_of(reply) == -32600
            assert reply["error"]["message"] == "Invalid Request"
            assert await worker.silent()

    run(main)


@pytest.mark.parametrize("method", ["__proto__", "constructor", "0", "x" * 128, "a.b-c_d"])
def test_every_name_is_a_method(method: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            wire_id = await caller.ask(method)
            assert (await worker.serve_one())["method"] == method
            assert (await caller.reply(wire_id))["result"] == "done"

    run(main)


def test_attaching_to_an_endpoint_nobody_serves_is_allowed() -> None:
    async def main() -> None:
        async with serving() as world:
            caller = await world.caller("nobody")
            reply = await caller.call("m")
            assert code_of(reply) == -32601
            assert data_of(reply)["outcome"] == "no_endpoint"
            assert data_of(reply)["retryable"] is True, "the broker has just started"

    run(main)


def test_broker_serve_makes_a_worker_of_several_endpoints() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.peer("/ws")
            for endpoint in ("one", "two"):
                assert (await worker.call("broker.serve", {"endpoint": endpoint}))["result"]["endpoint"] == endpoint
            caller = await world.peer("/ws")
            for method in ("one/a", "two/b"):
                wire_id = await caller.ask(method)
                assert (await worker.serve_one(method))["method"] == method, "an unattached worker is told where"
                assert (await caller.reply(wire_id))["result"] == method
            unserved = await worker.call("broker.unserve", {"endpoint": "one"})
            assert unserved["result"] == {"endpoint": "one", "served": True}
            assert data_of(await caller.call("one/a"))["outcome"] == "no_worker"

    run(main)


def test_workers_that_declare_methods_get_no_others() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.peer("/ws")
            await worker.call("broker.serve", {"endpoint": "lab", "methods": ["a"], "info": {"v": 1}})
            caller = await world.caller("lab")
            reply = await caller.call("b")
            assert (code_of(reply), data_of(reply)["outcome"]) == (-32601, "no_method")
            wire_id = await caller.ask("a")
            await worker.serve_one()
            assert "result" in await caller.reply(wire_id)
            described = (await caller.call("broker.describe"))["result"]
            assert described["workers"][0]["methods"] == ["a"]
            assert described["workers"][0]["info"] == {"v": 1}

    run(main)


def test_methods_of_the_brokers_own_are_never_a_workers() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            for method in ("broker.nonsense", "broker."):
                assert code_of(await caller.call(method)) == -32601
            assert code_of(await caller.call("$/nonsense")) == -32601, "a request, so answered"
            await caller.send({"jsonrpc": "2.0", "method": "$/nonsense"})  # a notification, so ignored
            assert await caller.silent()
            assert await worker.silent()

    run(main)


def test_the_brokers_own_methods_name_what_is_wrong_with_their_parameters() -> None:
    async def main() -> None:
        async with serving() as world:
            caller = await world.caller("lab")
            for method, params, named in (
                ("broker.serve", {"endpoint": "a/b"}, "endpoint"),
                ("broker.serve", {"endpoint": "lab\n"}, "endpoint"),
                ("broker.serve", {"endpont": "lab"}, "endpont"),
                ("broker.serve", {"capacity": 0}, "capacity"),
                ("broker.call", {"method": "m", "timeout": "5"}, "timeout"),
                ("broker.call", {}, "method"),
                ("broker.call", {"method": "broker.ping"}, "broker."),
                ("broker.call", [1], "object"),
                ("broker.subscribe", {"topic": "a b"}, "topic"),
                ("broker.subscribe", {"since": -5}, "since"),
                ("broker.publish", {"to": "nobody", "data": 1}, "nobody"),
                ("broker.publish", {"topic": "broker.peers", "data": 1}, "broker."),
            ):
                reply = await caller.call(method, params)
                assert code_of(reply) == -32602, (method, params, reply)
                assert named in data_of(reply)["detail"], (named, reply)

    run(main)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("wire_id", [0, "", "0", -1, 2**64 - 1, -(2**63), "x" * 128, 'q"\\\u00e9\n', "\U0001f600" * 32])
def test_ids_come_back_with_type_and_value(wire_id: object) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.ask("m", id=wire_id)
            call = await worker.serve_one()
            assert isinstance(call["id"], str)
            assert call["id"] != wire_id
            assert (await caller.reply(wire_id))["result"] == "done"
            assert code_of(await caller.call("broker.nonsense", id=wire_id)) == -32601

    run(main)


@pytest.mark.parametrize(
    "text", ["null", "true", "false", "1.0", "1e3", "0.5", str(2**64), "-9223372036854775809", "[]", "{}",
             '"%s"' % ("x" * 129), "1" * 1000]
)  # fmt: skip
def test_what_is_no_id_is_an_invalid_request_and_answered_without_one(text: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.send('{"jsonrpc":"2.0","id":%s,"method":"m"}' % text)
            reply = await caller.read()
            assert reply["id"] is None
            assert code_of(reply) == -32600
            assert await worker.silent()
            assert world.counters.accepted == 1, "only the ping"

    run(main)


def test_the_forwarded_id_is_new_for_every_attempt() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            seen = set()
            for _ in range(5):
                wire_id = await caller.ask("m", id="same")
                seen.add((await worker.serve_one())["id"])
                await caller.reply(wire_id)
            assert len(seen) == 5

    run(main)


def test_ids_of_two_sessions_do_not_meet() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            other = await world.caller()
            await caller.ask("m", "first", id=7)
            first = await worker.taken()
            await other.ask("m", "second", id=7)
            second = await worker.taken()
            await worker.answer(second, result="second")
            await worker.answer(first, result="first")
            assert (await caller.reply(7))["result"] == "first"
            assert (await other.reply(7))["result"] == "second"

    run(main)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("meta", "named"),
    [
        ({"timout": 5}, "timout"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"timeout": 4000}, "timeout"),
        ({"retries": 1}, "retries"),
        ({"retries": 11, "idempotent": True}, "retries"),
        ({"wait": 1}, "wait"),
        ({"trace": "x" * 257}, "trace"),
        ([], "meta"),
        (None, "meta"),
        ("x", "meta"),
    ],
)
def test_wrong_options_are_invalid_parameters(meta: object, named: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            reply = await caller.call("m", meta=meta)
            assert code_of(reply) == -32602
            assert named in data_of(reply)["detail"]
            assert await worker.silent()

    run(main)


def test_unknown_members_of_the_envelope_are_ignored_and_not_passed_on() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            wire_id = await caller.ask("m", extra={"a": 1}, Method="x", auth="secret")
            call = await worker.taken()
            assert set(call) == {"jsonrpc", "id", "method"}
            await worker.answer(call, result=1, extra=2)
            assert set(await caller.reply(wire_id)) == {"jsonrpc", "id", "result"}

    run(main)


def test_a_worker_is_told_what_is_left_only_if_it_asked() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world, "&meta=1")
            await caller.ask("m", meta={"timeout": 9, "trace": "00-abc", "idempotent": True})
            meta = (await worker.taken())["meta"]
            assert 8 < meta.pop("timeout") <= 9
            assert meta == {"trace": "00-abc", "idempotent": True}
            bare = await world.worker("bare")
            other = await world.caller("bare")
            await other.ask("m", meta={"timeout": 9})
            assert "meta" not in await bare.taken()

    run(main)


def test_the_time_in_the_queue_is_taken_from_what_is_left() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world, "&meta=1&capacity=1")
            await caller.ask("m", meta={"timeout": 9})
            first = await worker.taken()
            await caller.ask("m", meta={"timeout": 9})
            await until(lambda: world.broker.router.pending.count == 2, "the second waits")
            engine, waited = world.broker.engine, 5.0
            real = engine.now
            engine.now = lambda: real() + waited
            await worker.answer(first, result=1)
            assert 3 < (await worker.taken())["meta"]["timeout"] < 4.5

    run(main)


def test_replies_carry_meta_for_who_asked() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            asking = await world.caller(query="meta=1&listen=0")
            nothing: dict[str, object] = {}
            for peer, members, told in (
                (caller, nothing, False),
                (caller, {"meta": {}}, True),
                (asking, nothing, True),
            ):
                wire_id = await peer.ask("m", **members)
                await worker.serve_one()
                reply = await peer.reply(wire_id)
                assert ("meta" in reply) is told
                if told:
                    assert reply["meta"]["attempts"] == 1
                    assert reply["meta"]["elapsed_ms"] > 0
                    assert reply["meta"]["worker"] == (await worker.call("broker.ping"))["result"]["peer"]

    run(main)


def test_broker_call_is_for_libraries_that_can_add_no_member() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            free = await world.peer("/ws")
            for peer, where in ((caller, {}), (free, {"endpoint": "lab"})):
                wire_id = await peer.ask("broker.call", {**where, "method": "m", "params": {"a": 1}, "timeout": 5})
                call = await worker.serve_one()
                assert (call["method"], call["params"]) == ("m", {"a": 1})
                reply = await peer.reply(wire_id)
                assert reply["result"] == "done"
                assert "meta" not in reply
            assert code_of(await free.call("broker.call", {"method": "m"})) == -32602
            lost = await caller.call("broker.call", {"method": "m", "timeout": 0.05})
            assert data_of(lost)["outcome"] == "deadline"

    run(main)


def test_a_connection_may_set_defaults_in_its_query() -> None:
    async def main() -> None:
        async with serving() as world:
            _, caller = await pair(world, caller="timeout=0.05&listen=0")
            assert data_of(await caller.call("m"))["outcome"] == "deadline"
            waiting = await world.caller("later", "wait=1&listen=0")
            wire_id = await waiting.ask("m")
            worker = await world.worker("later")
            await worker.serve_one()
            assert "result" in await waiting.reply(wire_id)

    run(main)


# ---------------------------------------------------------------- notifications, batches, cancel


def test_a_notification_goes_to_one_worker_and_is_not_answered() -> None:
    async def main() -> None:
        async with serving() as world:
            workers = [await world.worker() for _ in range(3)]
            caller = await world.caller()
            accepted = world.counters.accepted
            for _ in range(3):
                await caller.send({"jsonrpc": "2.0", "method": "note", "params": [1]})
            await caller.sync()
            assert world.counters.notifications == 3
            assert world.counters.accepted == accepted + 1, "not in the books"
            got = []
            for worker in workers:
                await worker.sync()
                got.append(len([m for m in worker.inbox if m.get("method") == "note"]))
                assert all("id" not in m for m in worker.inbox)
            assert got == [1, 1, 1], "by policy, each in turn"
            assert caller.inbox == []

    run(main)


def test_a_notification_nobody_can_take_is_counted_and_not_answered() -> None:
    async def main() -> None:
        async with serving() as world:
            caller = await world.caller("empty")
            await caller.send({"jsonrpc": "2.0", "method": "note"})
            assert await caller.silent()
            assert world.counters.notifications_dropped == 1

    run(main)


def test_a_batch_is_answered_by_one_array_when_the_last_has_ended() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.send(
                [
                    {"jsonrpc": "2.0", "id": 1, "method": "slow"},
                    {"jsonrpc": "2.0", "id": "2", "method": "broker.ping"},
                    {"jsonrpc": "2.0", "method": "note"},
                    {"jsonrpc": "2.0", "id": 3, "method": "a/b"},
                    {"foo": 1},
                    7,
                    [],
                    {"jsonrpc": "2.0", "id": 1, "method": "again"},
                    {"jsonrpc": "2.0", "id": 4, "method": "late", "meta": {"timeout": 0.05}},
                ]
            )
            call = await worker.taken()
            assert call["method"] == "slow", "workers never get a batch"
            assert (await worker.taken())["method"] == "note"
            assert (await worker.taken())["method"] == "late"
            await worker.told("$/cancelRequest")
            await worker.answer(call, result="at last")
            replies = await caller.read()
            assert isinstance(replies, list)
            by_id = {json.dumps(reply["id"]): reply for reply in replies if reply["id"] is not None}
            assert set(by_id) == {"1", '"2"', "3", "4"}
            assert by_id["1"]["result"] == "at last"
            assert "peer" in by_id['"2"']["result"]
            assert code_of(by_id["3"]) == -32600
            assert code_of(by_id["4"]) == -32003
            nameless = sorted(code_of(reply) for reply in replies if reply["id"] is None)
            assert nameless == [-32600, -32600, -32600, -32010]
            assert await caller.silent()

    run(main)


def test_an_id_used_twice_in_one_batch_is_a_duplicate() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.send([{"jsonrpc": "2.0", "id": 5, "method": "m"}] * 2)
            await worker.serve_one("first")
            replies = await caller.read()
            assert [reply["id"] for reply in replies] == [None, 5]
            assert data_of(replies[0])["id"] == 5
            assert replies[1]["result"] == "first"
            assert await worker.silent()

    run(main)


def test_an_id_in_flight_alone_is_a_duplicate_within_a_batch() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.ask("m", id=5)
            call = await worker.taken()
            await caller.send([{"jsonrpc": "2.0", "id": 5, "method": "m"}, {"jsonrpc": "2.0", "id": 6, "method": "n"}])
            await worker.serve_one("second")
            replies = await caller.read()
            assert [reply["id"] for reply in replies] == [None, 6]
            await worker.answer(call, result="alone")
            assert await caller.reply(5) == {"jsonrpc": "2.0", "id": 5, "result": "alone"}

    run(main)


def test_a_batch_of_notifications_is_not_answered() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            await caller.send([{"jsonrpc": "2.0", "method": "a"}, {"jsonrpc": "2.0", "method": "b"}])
            assert [(await worker.taken())["method"] for _ in range(2)] == ["a", "b"]
            assert await caller.silent()

    run(main)


@pytest.mark.parametrize(
    ("text", "code"),
    [("[]", -32600), (" \n[]", -32600), ("[1,2", -32700), ("[" + ",".join(["1"] * 1001) + "]", -32600)],
)
def test_what_is_no_batch_is_answered_once(text: str, code: int) -> None:
    async def main() -> None:
        async with serving() as world:
            caller = await world.caller()
            await caller.send(text)
            reply = await caller.read()
            assert isinstance(reply, dict)
            assert (reply["id"], code_of(reply)) == (None, code)
            assert await caller.silent()

    run(main)


def test_a_batch_of_a_thousand_is_no_more_than_one_array() -> None:
    async def main() -> None:
        async with serving() as world:
            caller = await world.caller()
            await caller.send([{"jsonrpc": "2.0", "id": n, "method": "broker.ping"} for n in range(1000)])
            replies = await caller.read()
            assert [reply["id"] for reply in replies] == list(range(1000))

    run(main)


def test_cancel_ends_the_request_frees_the_place_and_tells_the_worker() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world, "&capacity=1")
            await caller.ask("m", id="a")
            call = await worker.taken()
            await caller.ask("m", id="b")
            await caller.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": "a"}})
            reply = await caller.reply("a")
            assert (code_of(reply), data_of(reply)["cause"]) == (-32005, "caller")
            assert (await worker.told("$/cancelRequest"))["params"] == {"id": call["id"]}
            other = await worker.taken()
            assert other["id"] != call["id"], "the place is free at once"
            await worker.answer(call, error={"code": -32800, "message": "cancelled"})
            await worker.answer(other, result=1)
            assert (await caller.reply("b"))["result"] == 1
            assert world.counters.strikes == 0
            assert world.counters.late_replies == 1

    run(main)


def test_cancelling_what_is_not_there_is_nothing() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            other = await world.caller()
            await other.ask("m", id=1)
            call = await worker.taken()
            for wire_id in (1, "1", "zz", 0):
                await caller.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": wire_id}})
            assert await caller.silent()
            await worker.answer(call, result=1)
            assert "result" in await other.reply(1), "another session's id was not meant"
            for params in ({}, [1], {"id": None}, {"id": 1.5}):
                await caller.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": params})
                assert code_of(await caller.read()) in (-32600, -32602)
            assert await caller.silent()

    run(main)


def test_a_worker_that_knows_no_cancel_gets_no_strike_for_saying_so() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, _ = await pair(world)
            for _ in range(5):
                await worker.send(
                    {"jsonrpc": "2.0", "id": None, "error": {"code": -32601, "message": "Method not found"}}
                )
            await worker.sync()
            assert world.counters.strikes == 0
            assert world.counters.nameless_replies == 5

    run(main)


# ---------------------------------------------------------------- what reaches whom


def test_listeners_only_hear() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            listener = await world.peer("/ws/lab?role=listener", LISTENER)
            assert data_of(await listener.call("m"))["outcome"] == "denied"
            assert data_of(await listener.call("broker.publish", {"data": 1}))["outcome"] == "denied"
            assert data_of(await listener.call("broker.serve"))["outcome"] == "denied"
            publisher = await world.caller()
            await publisher.call("broker.publish", {"endpoint": "lab", "data": "news"})
            heard = (await listener.told("broker.message"))["params"]
            assert heard == {"endpoint": "lab", "seq": 1, "data": "news"}
            assert await worker.silent(), "workers hear only if they ask"

    run(main)


def test_listen_is_a_callers_to_decline_and_a_workers_to_ask_for() -> None:
    async def main() -> None:
        async with serving() as world:
            deaf = await world.caller("lab", "listen=0")
            usual = await world.caller("lab", "listen=1")
            bare = await world.peer("/ws/lab")
            worker = await world.worker("lab", "&listen=1")
            quiet = await world.worker("lab")
            reply = await deaf.call("broker.publish", {"endpoint": "lab", "data": [1]})
            assert reply["result"] == {"seq": 1, "listeners": 3}
            for peer in (usual, bare, worker):
                assert (await peer.told("broker.message"))["params"]["data"] == [1]
            for peer in (deaf, quiet):
                assert await peer.silent()

    run(main)


def test_publishers_hear_themselves_in_order_and_without_gaps() -> None:
    async def main() -> None:
        async with serving() as world:
            peer = await world.peer("/ws/lab")
            for number in range(20):
                await peer.ask("broker.publish", {"endpoint": "lab", "data": number})
            heard = [(await peer.told("broker.message"))["params"] for _ in range(20)]
            assert [(m["seq"], m["data"]) for m in heard] == [(n + 1, n) for n in range(20)]

    run(main)


def test_topics_have_their_own_subscribers_and_numbers() -> None:
    async def main() -> None:
        async with serving() as world:
            peer, other = await world.caller(), await world.caller()
            assert (await peer.call("broker.subscribe", {"topic": "t"}))["result"]["seq"] == 0
            assert (await other.call("broker.publish", {"topic": "t", "data": 1}))["result"]["listeners"] == 1
            assert (await other.call("broker.publish", {"endpoint": "lab", "data": 2}))["result"]["listeners"] == 0
            assert (await other.call("broker.publish", {"topic": "u", "data": 3}))["result"]["listeners"] == 0
            await other.call("broker.publish", {"topic": "t", "data": 4})
            heard = [(await peer.told("broker.message"))["params"] for _ in range(2)]
            assert heard == [
                {"endpoint": "lab", "topic": "t", "seq": 1, "data": 1},
                {"endpoint": "lab", "topic": "t", "seq": 2, "data": 4},
            ]
            assert (await peer.call("broker.unsubscribe", {"topic": "t"}))["result"]["subscribed"] is True
            assert (await other.call("broker.publish", {"topic": "t", "data": 5}))["result"]["listeners"] == 0
            assert await peer.silent()

    run(main)


def test_a_broadcast_to_one_peer_and_one_to_all_carry_no_number() -> None:
    async def main() -> None:
        async with serving() as world:
            lab, other, free = await world.peer("/ws/lab"), await world.peer("/ws/other"), await world.peer("/ws")
            worker, deaf = await world.worker(), await world.caller()
            name = (await other.call("broker.ping"))["result"]["peer"]
            assert (await lab.call("broker.publish", {"to": name, "data": "you"}))["result"]["listeners"] == 1
            assert (await other.told("broker.message"))["params"] == {"data": "you"}
            assert (await free.call("broker.publish", {"data": "all"}))["result"]["listeners"] == 3
            for peer in (lab, other, free):
                assert (await peer.told("broker.message"))["params"] == {"data": "all"}
            for peer in (worker, deaf):
                assert await peer.silent()

    run(main)


def test_comings_and_goings_are_published_for_who_asks() -> None:
    async def main() -> None:
        async with serving() as world:
            watcher = await world.caller()
            await watcher.call("broker.subscribe", {"topic": "broker.peers"})
            worker = await world.worker()
            name = (await worker.call("broker.ping"))["result"]["peer"]
            told = (await watcher.told("broker.message"))["params"]
            assert (told["endpoint"], told["topic"], told["seq"]) == ("lab", "broker.peers", 1)
            assert told["data"] == {"event": "serving", "peer": name, "role": "worker", "workers": 1}
            await worker.socket.close()
            told = (await watcher.told("broker.message"))["params"]
            assert told["data"] == {"event": "unserved", "peer": name, "role": "worker", "workers": 0}

    run(main)


# ---------------------------------------------------------------- outcomes


def test_the_brokers_own_outcomes_say_where_the_request_stood() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            reply = await caller.call("m", meta={"timeout": 0.05})
            data = data_of(reply)
            assert code_of(reply) == -32003
            assert 50 <= data.pop("elapsed_ms") < 5000
            assert data == {
                "outcome": "deadline", "retryable": False, "dispatched": True, "endpoint": "lab", "method": "m",
                "attempts": 1, "phase": "executing",
            }  # fmt: skip
            await worker.sync()

    run(main)


def test_a_request_that_only_waited_is_retryable_after_its_deadline() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world, "&capacity=1")
            await caller.ask("m")
            await worker.taken()
            data = data_of(await caller.call("m", meta={"timeout": 0.05}))
            assert (data["phase"], data["retryable"], data["dispatched"]) == ("queued", True, False)
            assert await worker.silent(), "expired work is never given out"

    run(main)


def test_no_worker_says_that_the_endpoint_is_known() -> None:
    async def main() -> None:
        async with serving(config(endpoints={"known": {}})) as world:
            caller = await world.caller("known")
            reply = await caller.call("m")
            assert (code_of(reply), data_of(reply)["outcome"]) == (-32001, "no_worker")
            assert data_of(reply)["retryable"] is True

    run(main)


def test_worker_lost_is_told_at_once() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            wire_id = await caller.ask("m")
            await worker.taken()
            await worker.socket.close(1001, "off")
            reply = await caller.reply(wire_id)
            assert (code_of(reply), data_of(reply)["outcome"]) == (-32002, "worker_lost")
            assert data_of(reply)["retryable"] is False
            assert "1001 off" in data_of(reply)["detail"]

    run(main)


def test_bounds_are_overloaded_and_named() -> None:
    async def main() -> None:
        settings = config(limits={"queue_max": 1, "in_flight_max": 3})
        async with serving(settings) as world:
            worker, caller = await pair(world, "&capacity=1")
            other = await world.caller()
            await caller.ask("m")
            await caller.ask("m")
            data = data_of(await caller.call("m"))
            assert (data["outcome"], data["bound"]) == ("overloaded", "queue")
            assert data["retry_after_ms"] > 0
            assert data["retryable"] is True
            assert code_of(await other.call("m")) == -32004
            second = await world.worker("many")
            crowd = await world.caller("many")
            for _ in range(3):
                await crowd.ask("m")
            assert data_of(await crowd.call("m"))["bound"] == "in_flight"
            await second.sync()
            await worker.sync()

    run(main)


def test_denied_is_said_whether_or_not_the_endpoint_exists() -> None:
    async def main() -> None:
        async with serving() as world:
            await world.worker("secret")
            caller = await world.peer("/ws", LISTENER)
            for method in ("secret/m", "nothing/m", "lab/m"):
                reply = await caller.call(method)
                assert (code_of(reply), data_of(reply)["outcome"]) == (-32006, "denied")
            answers = [data_of(await caller.call(f"{name}/m"))["detail"] for name in ("secret", "absent")]
            assert answers[0].replace("secret", "absent") == answers[1]

    run(main)


def test_too_large_for_a_peer_without_binary_frames() -> None:
    from tests.transports.websocket.harness import joined

    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 65_536})) as world:
            text_worker, binary_caller = await pair(world, caller="listen=0&binary=1")
            message = {"jsonrpc": "2.0", "id": 1, "method": "m", "params": {"$buffer": 0}}
            await binary_caller.send(joined(message, b"x" * 60_000))
            reply = await binary_caller.reply(1)
            assert (code_of(reply), data_of(reply)["outcome"]) == (-32008, "too_large")
            assert await text_worker.silent()
            text_caller = await world.caller()
            wire_id = await text_caller.ask("m")
            call = await text_worker.taken()
            answer = {"jsonrpc": "2.0", "id": call["id"], "result": {"$buffer": 0}}
            await text_worker.send(joined(answer, b"x" * 60_000))
            assert data_of(await text_caller.reply(wire_id))["outcome"] == "too_large"

    run(main)


def test_shutting_down_is_told_while_draining() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            in_flight = await caller.ask("m")
            call = await worker.taken()
            drained = world.broker.drain(10)
            import asyncio

            task = asyncio.create_task(drained)
            await until(lambda: world.broker.router.draining, "draining")
            reply = await caller.call("m")
            assert (code_of(reply), data_of(reply)["retryable"]) == (-32007, True)
            await worker.answer(call, result="still")
            assert (await caller.reply(in_flight))["result"] == "still", "what is in flight may end"
            assert await task is True

    run(main)


def test_admin_methods_are_for_administrators() -> None:
    async def main() -> None:
        async with serving() as world:
            ordinary = await world.peer("/ws", LISTENER)
            admin = await world.peer("/ws", ADMIN)
            for method in ("broker.admin.peers", "broker.admin.pending", "broker.admin.nonsense"):
                assert code_of(await ordinary.call(method)) == -32006
            assert code_of(await ordinary.call("broker.admin.close", {"peer": "x"})) == -32006
            peers = (await admin.call("broker.admin.peers"))["result"]
            assert [peer["principal"] for peer in peers] == ["liam", "admin"]
            name = peers[0]["peer"]
            closed = await admin.call("broker.admin.close", {"peer": name, "reason": "x" * 5000})
            assert closed["result"] == {"peer": name, "closed": True}
            assert (await ordinary.closed())[0] == 4403

    run(main)


def test_an_administrator_cancels_a_request() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await pair(world)
            wire_id = await caller.ask("m")
            await worker.taken()
            admin = await world.peer("/ws")
            (pending,) = (await admin.call("broker.admin.pending"))["result"]
            assert (pending["endpoint"], pending["state"]) == ("lab", "executing")
            cancelled = await admin.call("broker.admin.cancel", {"request": pending["request"]})
            assert cancelled["result"]["cancelled"] is True
            assert data_of(await caller.reply(wire_id))["cause"] == "admin"

    run(main)
