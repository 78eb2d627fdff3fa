"""`POST /rpc`: JSON-RPC 2.0 over HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.transports.http.harness import ask, wire, written
from tests.transports.websocket.harness import CALLER, config, run, serving, until


def message(wire_id: object, method: str, **members: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": wire_id, "method": method, **members}


@pytest.mark.parametrize("wire_id", [0, "", "a\u20ac", -5, 2**63])
def test_a_call_keeps_its_id(wire_id: object) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            asking = asyncio.create_task(ask(world, "/rpc", message(wire_id, "lab/read", params=[1])))
            call = await worker.serve_one({"a": 1})
            assert (call["method"], call["params"]) == ("read", [1])
            answer = await asking
            assert answer.status == 200 and answer.json == {"jsonrpc": "2.0", "id": wire_id, "result": {"a": 1}}
            assert answer.outcome == "ok"

    run(main)


def test_an_error_is_200_with_its_outcome_in_the_headers() -> None:
    async def main() -> None:
        async with serving(config(limits={"start_grace_s": 0})) as world:
            answer = await ask(world, "/rpc", message(1, "nobody/m"))
            assert (answer.status, answer.outcome) == (200, "no_endpoint")
            assert answer.json["error"]["code"] == -32601
            answer = await ask(world, "/rpc", message(1, "broker.ping"))
            assert answer.json["result"]["node"] == world.broker.node

    run(main)


def test_options_in_the_query_and_in_meta() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            answer = await ask(world, "/rpc?timeout=0.1", message(1, "lab/m"))
            assert answer.outcome == "deadline" and "meta" not in answer.json
            answer = await ask(world, "/rpc", message(1, "lab/m", meta={"timeout": 0.1}))
            assert answer.outcome == "deadline" and answer.json["meta"]["attempts"] == 1
            assert worker is not None

    run(main)


def test_a_batch_is_answered_when_its_last_member_has_ended() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            batch = [
                message(1, "lab/slow"),
                message(2, "broker.ping"),
                {"jsonrpc": "2.0", "method": "lab/note"},
                message(1, "lab/again"),
                {"foo": 1},
                message(3, "lab/late", meta={"timeout": 0.1}),
                message(4, "broker.serve", params={"endpoint": "lab"}),
            ]
            asking = asyncio.create_task(ask(world, "/rpc", batch))
            call = await worker.find(lambda m: m.get("method") == "slow")
            await worker.told("$/cancelRequest")
            assert not asking.done()
            await worker.answer(call, result="slow")
            replies = (await asking).json
            assert len(replies) == 6
            by_id = {reply["id"]: reply for reply in replies if reply["id"] is not None}
            assert by_id[1]["result"] == "slow" and "node" in by_id[2]["result"]
            assert by_id[3]["error"]["data"]["outcome"] == "deadline"
            assert "GET /events/" in by_id[4]["error"]["data"]["detail"]
            nameless = [reply["error"] for reply in replies if reply["id"] is None]
            assert sorted(error["code"] for error in nameless) == [-32600, -32010]
            assert world.books_balance()

    run(main)


def test_what_needs_no_answer_gets_204() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            note = {"jsonrpc": "2.0", "method": "lab/note", "params": [1]}
            assert (await ask(world, "/rpc", note)).status == 204
            assert (await worker.taken())["method"] == "note"
            assert (await ask(world, "/rpc", [note, note])).status == 204
            assert (await ask(world, "/rpc", {"jsonrpc": "2.0", "id": "x", "result": 1})).status == 204
            assert (await ask(world, "/rpc", {"jsonrpc": "2.0", "method": "$/whatever"})).status == 204

    run(main)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"lab/m","params":["\xff"]}', -32700),
        (b"[]", -32600),
        (b"[1,", -32700),
        (b"7", -32600),
        (b'{"jsonrpc":"1.0","id":1,"method":"m"}', -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"lab/m"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"id":2,"method":"lab/m"}', -32600),
        (b'{"jsonrpc":"2.0","method":"broker.serve","params":{"endpoint":"lab"}}', -32600),
        (json.dumps([message(n, "broker.ping") for n in range(11)]).encode(), -32600),
    ],
)
def test_what_is_no_message_gets_400(body: bytes, code: int) -> None:
    async def main() -> None:
        async with serving(config(limits={"batch_max": 10})) as world:
            answer = await ask(world, "/rpc", body)
            assert (answer.status, answer.json["error"]["code"]) == (400, code)
            assert world.counters.malformed == 1 and world.counters.accepted == 0

    run(main)


@pytest.mark.parametrize("method", ["broker.serve", "broker.subscribe", "broker.unserve", "broker.unsubscribe"])
def test_what_needs_a_lasting_connection_is_refused(method: str) -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await ask(world, "/rpc", message(1, method, params={"endpoint": "lab"}))
            assert (answer.status, answer.outcome) == (200, "invalid")
            assert not world.broker.router.registry.by_name

    run(main)


def test_the_callers_hang_up_cancels_every_member() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            body = json.dumps([message(1, "lab/a"), message(2, "lab/b")]).encode()
            async with wire(world) as connection:
                connection.send(written(world, "/rpc", body, CALLER, "POST", {}))
                assert {(await worker.taken())["method"] for _ in range(2)} == {"a", "b"}
            for _ in range(2):
                await worker.told("$/cancelRequest")
            await until(lambda: world.counters.ended["cancelled"] == 2, "both have ended")
            assert world.books_balance()

    run(main)


def test_replies_larger_than_a_message_are_told() -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 4096})) as world:
            worker = await world.worker()
            asking = asyncio.create_task(ask(world, "/rpc", [message(1, "lab/a"), message(2, "lab/b")]))
            for _ in range(2):
                await worker.serve_one("x" * 3000)
            replies = {reply["id"]: reply for reply in (await asking).json}
            assert len(replies[1]["result"]) == 3000
            assert replies[2]["error"]["data"]["outcome"] == "too_large"

    run(main)
