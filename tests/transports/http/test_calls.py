"""`POST /call/…` and `POST /broadcast`: bodies in and out, outcomes as status and headers, the caller's hang-up."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from broker.core.errors import KINDS, WORKER_ERROR, Outcome
from broker.core.messages import Body, End
from broker.wire.calls import Accepts, encode_event, read_accept, read_body, read_key, read_trace, render, status_of
from tests.transports.http.harness import ask, wire, written
from tests.transports.websocket.harness import (
    CALLER,
    ELSEWHERE,
    LISTENER,
    Peer,
    World,
    config,
    joined,
    run,
    serving,
    until,
)


async def answered(
    world: World, worker: Peer, path: str, body: object = None, reply: Any = None, **options: Any
) -> Any:
    """Ask while the worker answers once; the call as the worker got it, and the answer."""
    asking = asyncio.create_task(ask(world, path, body, **options))
    call = await worker.taken()
    await worker.answer(call, **({"result": "done"} if reply is None else reply))
    return call, await asking


def test_a_call_and_its_result() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            call, answer = await answered(world, worker, "/call/lab/read", {"path": "a"}, {"result": {"n": [1, None]}})
            assert call["method"] == "read" and call["params"] == {"path": "a"}
            assert answer.status == 200 and answer.json == {"n": [1, None]}
            assert answer.headers["content-type"].startswith("application/json")
            assert answer.outcome == "ok" and answer.headers["broker-retryable"] == "false"
            assert float(answer.headers["broker-elapsed-ms"]) > 0
            assert "broker-attempts" not in answer.headers
            assert world.books_balance() and world.counters.ended["ok"] == 1

    run(main)


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_json_is_json_under_any_content_type(content_type: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            call, _ = await answered(world, worker, "/call/lab/m", [1], headers={"Content-Type": content_type})
            assert call["params"] == [1]

    run(main)


def test_no_body_is_no_params() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            call, _ = await answered(world, worker, "/call/lab/m")
            assert "params" not in call

    run(main)


def test_octets_in_are_the_first_attachment() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            path = "/call/lab/store?params=%7B%22data%22:%7B%22$buffer%22:0%7D%7D"
            data = bytes(range(256))
            asking = asyncio.create_task(
                ask(world, path, data, headers={"Content-Type": "Application/Octet-Stream; x=y"})
            )
            call = await worker.taken()
            assert call[0]["params"] == {"data": {"$buffer": 0}} and call[1] == [data]
            await worker.answer(call, result=1)
            assert (await asking).json == 1

    run(main)


@pytest.mark.parametrize("member", ["result", "error"])
def test_few_bytes_that_refer_to_many_do_not_fill_the_memory(member: str) -> None:
    """Who takes attachments as they are is not judged by their size as base64; that holds for one of them alone."""

    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            references = [{"$buffer": 0}] * 100_000  # 130 GB as base64
            value = references if member == "result" else {"code": 1, "message": "x", "data": references}
            asking = asyncio.create_task(
                ask(world, "/call/lab/m", headers={"Accept": "application/octet-stream, application/json"})
            )
            call = await worker.taken()
            reply = {"jsonrpc": "2.0", "id": call["id"], member: value}
            await worker.send(joined(reply, b"x" * 1_000_000, b"y"))
            answer = await asking
            assert answer.status == 406
            assert "as base64" in answer.json["error"]

    run(main)


def test_octets_out_are_the_only_attachment() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            octets = {"Accept": "application/octet-stream"}
            reply = {"result": {"data": {"$base64": "AAEC"}}}
            _, answer = await answered(world, worker, "/call/lab/read", reply=reply, headers=octets)
            assert answer.status == 200 and answer.body == b"\0\1\2"
            assert answer.headers["content-type"] == "application/octet-stream"
            _, answer = await answered(world, worker, "/call/lab/read", reply=reply)
            assert answer.json == reply["result"]
            two = {"result": [{"$base64": "AAEC"}, {"$base64": "AAEC"}]}
            _, answer = await answered(world, worker, "/call/lab/read", reply=two, headers=octets)
            assert answer.status == 406 and answer.outcome == "ok"
            _, answer = await answered(world, worker, "/call/lab/read", headers=octets)
            assert answer.status == 406
            both = {"Accept": "application/octet-stream, application/json"}
            _, answer = await answered(world, worker, "/call/lab/read", headers=both)
            assert answer.json == "done"
            failed = {"error": {"code": 5, "message": "no"}}
            _, answer = await answered(world, worker, "/call/lab/read", reply=failed, headers=octets)
            assert answer.status == 500 and answer.json == {"error": failed["error"]}

    run(main)


@pytest.mark.parametrize(("code", "status"), [(-32601, 404), (-32602, 400), (-32000, 500), (7, 500)])
def test_a_workers_own_error(code: int, status: int) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            error = {"code": code, "message": "no", "data": {"outcome": "ok"}}
            _, answer = await answered(
                world, worker, "/call/lab/m", reply={"error": error, "meta": {"retryable": True}}
            )  # fmt: skip
            assert answer.status == status and answer.json == {"error": error}
            assert answer.outcome == "worker_error" and answer.headers["broker-retryable"] == "true"

    run(main)


def test_every_outcome_has_its_status() -> None:
    for kind in KINDS:
        if kind is not WORKER_ERROR:
            end = End(b"1", Outcome(kind=kind), Body(b"1") if kind.name == "ok" else None)
            assert status_of(end) == render(end, Accepts(octets=False, json=True), 1 << 24).status == kind.http


def test_outcomes_as_they_come() -> None:
    async def main() -> None:
        async with serving(config(limits={"start_grace_s": 0})) as world:
            answer = await ask(world, "/call/nobody/m")
            assert (answer.status, answer.outcome) == (404, "no_endpoint")
            assert answer.json["error"]["code"] == -32601 and answer.json["error"]["data"]["endpoint"] == "nobody"
            answer = await ask(world, "/call/other/m", secret=CALLER)
            assert (answer.status, answer.outcome) == (403, "denied")
            worker = await world.worker()
            for path, headers in (("/call/lab/m?timeout=0.1", {}), ("/call/lab/m", {"Broker-Timeout": "0.1"})):
                answer = await ask(world, path, headers=headers)
                assert (answer.status, answer.outcome) == (504, "deadline")
                assert answer.json["error"]["data"]["phase"] == "executing"
            asking = asyncio.create_task(ask(world, "/call/lab/m"))
            await until(lambda: world.broker.router.pending.count == 1, "it is asked")
            worker.socket.transport.abort()
            answer = await asking
            assert (answer.status, answer.outcome) == (502, "worker_lost")
            answer = await ask(world, "/call/lab/m")
            assert (answer.status, answer.outcome, answer.headers["retry-after"]) == (503, "no_worker", "1")
            assert answer.headers["broker-retryable"] == "true"
            assert world.books_balance()

    run(main)


def test_overloaded_says_when_to_come_again() -> None:
    async def main() -> None:
        async with serving(config(limits={"queue_max": 0, "capacity": 1})) as world:
            worker = await world.worker()
            first = asyncio.create_task(ask(world, "/call/lab/m"))
            call = await worker.taken()
            answer = await ask(world, "/call/lab/m")
            assert (answer.status, answer.outcome, answer.headers["retry-after"]) == (429, "overloaded", "1")
            assert answer.json["error"]["data"]["bound"] == "queue"
            await worker.answer(call, result=1)
            assert (await first).status == 200

    run(main)


def test_wait_queues_until_a_worker_comes() -> None:
    async def main() -> None:
        async with serving() as world:
            asking = asyncio.create_task(ask(world, "/call/lab/m?wait=1"))
            await until(lambda: world.broker.router.pending.count == 1, "it waits")
            worker = await world.worker()
            await worker.serve_one()
            assert (await asking).json == "done"

    run(main)


def test_idempotent_is_tried_elsewhere() -> None:
    async def main() -> None:
        async with serving() as world:
            first = await world.worker()
            asking = asyncio.create_task(ask(world, "/call/lab/m?idempotent=1"))
            await first.taken()
            second = await world.worker()
            first.socket.transport.abort()
            await second.serve_one()
            answer = await asking
            assert answer.json == "done"
            assert answer.headers["broker-attempts"] == "2"

    run(main)


def test_a_traceparent_is_continued_and_a_bad_one_dropped() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&meta=1")
            good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            call, _ = await answered(world, worker, "/call/lab/m", headers={"traceparent": good})
            assert call["meta"]["trace"] == good
            call, _ = await answered(world, worker, "/call/lab/m", headers={"traceparent": "nonsense"})
            assert "trace" not in call["meta"]

    run(main)
    assert read_trace("00-" + "0" * 32 + "-b7ad6b7169203331-01") is None


def test_two_with_one_key_are_executed_once() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            keyed = {"Idempotency-Key": '"8e03978e-40d5"'}
            both = [asyncio.create_task(ask(world, "/call/lab/m", [1], headers=keyed)) for _ in range(2)]
            call = await worker.taken()
            await until(lambda: world.counters.keys_joined == 1, "the second has joined")
            await worker.answer(call, result="once")
            answers = [await each for each in both]
            assert [(answer.status, answer.json) for answer in answers] == [(200, "once")] * 2
            assert sorted("broker-repeated" in answer.headers for answer in answers) == [False, True]
            bare = {"Idempotency-Key": "8e03978e-40d5"}  # the same key, as many write it
            answer = await ask(world, "/call/lab/m", [1], headers=bare)
            assert (answer.json, answer.headers["broker-repeated"], answer.outcome) == ("once", "true", "ok")
            answer = await ask(world, "/call/lab/m", [2], headers=keyed)
            assert (answer.status, answer.outcome) == (409, "key_conflict")
            assert await worker.silent() and world.books_balance()
            assert await world.metric("broker_keys_joined_total") == 1
            assert await world.metric("broker_keys_repeated_total") == 1
            assert await world.metric("broker_keys_kept") == 1

    run(main)


def test_who_hangs_up_leaves_the_work_to_the_other() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with wire(world) as connection:
                connection.send(written(world, "/call/lab/m", b"", CALLER, "POST", {"Idempotency-Key": "k"}))
                call = await worker.taken()
                other = asyncio.create_task(ask(world, "/call/lab/m", secret=CALLER, headers={"Idempotency-Key": "k"}))
                await until(lambda: world.counters.keys_joined == 1, "the second has joined")
            await until(lambda: world.counters.ended["cancelled"] == 1, "the first has left")
            await worker.answer(call, result=7)
            assert (await other).json == 7
            assert await worker.silent(), "the worker has noticed nothing"

    run(main)


@pytest.mark.parametrize("key", ["", '"', '""', "x" * 256, '"a', "a b", '"\\n"', "\u00e4"])
def test_what_is_no_key_is_invalid(key: str) -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await ask(world, "/call/lab/m", headers={"Idempotency-Key": key})
            assert (answer.status, answer.outcome) == (400, "invalid")

    run(main)


def test_keys_as_headers_hold_them() -> None:
    assert read_key("a-b") == read_key('"a-b"') == "a-b"
    assert read_key('"a \\"b\\" \\\\"') == 'a "b" \\'
    assert read_key("x" * 255) == read_key('"%s"' % ("x" * 255)) == "x" * 255


def test_the_callers_hang_up_cancels() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with wire(world) as connection:
                connection.send(written(world, "/call/lab/m", b"", CALLER, "POST", {}))
                call = await worker.taken()
                assert len(world.broker.router.sessions) == 2
            told = await worker.told("$/cancelRequest")
            assert told["params"]["id"] == call["id"]
            await until(lambda: len(world.broker.router.sessions) == 1, "the session is gone")
            assert world.counters.ended["cancelled"] == 1 and world.books_balance()

    run(main)


def test_a_session_lasts_as_long_as_its_request_and_the_connection_longer() -> None:
    async def main() -> None:
        async with serving() as world:
            async with wire(world) as connection:
                for _ in range(3):
                    connection.send(written(world, "/call/lab/m", b"{}", CALLER, "POST", {}))
                    assert (await connection.answer()).status == 404
                    assert len(world.broker.router.sessions) == 0
            assert await world.metric("broker_sessions_attached_total") == 3
            assert await world.metric("broker_sessions_detached_total") == 3

    run(main)


@pytest.mark.parametrize(
    ("path", "body", "headers", "says"),
    [
        ("/call/lab/m?timout=3", b"", {}, "did you mean timeout=?"),
        ("/call/lab/m?timeout=3&timeout=4", b"", {}, "given twice"),
        ("/call/lab/m?timeout=3", b"", {"Broker-Timeout": "3"}, "given twice"),
        ("/call/lab/m?timeout=-1", b"", {}, "not a positive number"),
        ("/call/lab/m?timeout=nan", b"", {}, "timeout"),
        ("/call/lab/m?timeout=1e9", b"", {}, "above the bound"),
        ("/call/lab/m?retries=2", b"", {}, "idempotent"),
        ("/call/lab/m?wait=maybe", b"", {}, "wait"),
        ("/call/lab/m?params=1", b"", {}, "octet-stream"),
        ("/call/lab/m?params=%7B", b"", {"Content-Type": "application/octet-stream"}, "params= is no JSON"),
        ("/call/lab/m", b"{", {}, "no JSON"),
        ("/call/lab/m", b"1 2", {}, "no JSON"),
        ("/call/lab/m", b"NaN", {}, "no JSON"),
        ("/call/lab/m", b'"\xff"', {}, "no UTF-8"),
        ("/call/lab/m", b"[" * 100_000 + b"]" * 100_000, {}, "nested too deeply"),
        ("/call/lab/m", b'{"$base64":"?"}', {}, None),
        ("/call/lab/m", b'{"a":{"$base64":"A"}}', {}, "base64"),
        ("/call/lab/broker.ping", b"", {}, "/call/{endpoint}/{method}"),
        ("/call/..%2f..%2fetc/passwd", b"", {}, "/call/{endpoint}/{method}"),
        ("/call/lab/m%0a", b"", {}, "/call/{endpoint}/{method}"),
    ],
)
def test_bad_input_is_invalid_and_says_why(path: str, body: bytes, headers: dict[str, str], says: str | None) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            if says is None:  # looks like base64 and is a string: passed as it is
                call, _ = await answered(world, worker, path, body, headers=headers)
                assert call["params"] == json.loads(body)
                return
            answer = await ask(world, path, body, headers=headers)
            assert (answer.status, answer.outcome) == (400, "invalid"), answer.body
            assert says in answer.json["error"]["data"]["detail"]
            assert world.books_balance() and worker.inbox == []

    run(main)


# ---------------------------------------------------------------- broadcasts


def test_a_broadcast_reaches_the_listeners() -> None:
    async def main() -> None:
        async with serving() as world:
            listener = await world.peer("/ws/lab?role=listener", LISTENER)
            answer = await ask(world, "/broadcast/lab", {"n": 1})
            assert (answer.status, answer.json) == (200, {"seq": 1, "listeners": 1})
            told = await listener.told("broker.message")
            assert told["params"] == {"endpoint": "lab", "seq": 1, "data": {"n": 1}}
            answer = await ask(world, "/broadcast", "all")
            assert answer.json == {"seq": None, "listeners": 1}
            assert (await listener.told("broker.message"))["params"] == {"data": "all"}
            await listener.call("broker.subscribe", {"topic": "t"})
            octets = {"Content-Type": "application/octet-stream"}
            assert (await ask(world, "/broadcast/lab?topic=t", b"\0\1", headers=octets)).json["listeners"] == 1
            told = await listener.told("broker.message")
            assert told["params"]["topic"] == "t" and told["params"]["data"] == {"$base64": "AAE="}

    run(main)


def test_broadcasts_that_are_refused() -> None:
    async def main() -> None:
        async with serving() as world:
            for path, secret, status, outcome in (
                ("/broadcast/lab", ELSEWHERE, 403, "denied"),
                ("/broadcast", LISTENER, 403, "denied"),
                ("/broadcast/lab?topic=broker.peers", CALLER, 400, "invalid"),
                ("/broadcast?topic=t", CALLER, 400, "invalid"),
                ("/broadcast/lab?tpic=t", CALLER, 400, "invalid"),
            ):
                answer = await ask(world, path, {}, secret=secret)
                assert (answer.status, answer.outcome) == (status, outcome), path

    run(main)


# ---------------------------------------------------------------- the codec


def test_what_accept_says() -> None:
    assert read_accept("*/*") == Accepts(octets=False, json=True)
    assert read_accept("text/html") == Accepts(octets=False, json=True)
    assert read_accept("Application/Octet-Stream;q=1") == Accepts(octets=True, json=False)
    assert read_accept("application/octet-stream, */*;q=0.1") == Accepts(octets=True, json=True)


def test_blanks_around_json_are_no_part_of_it() -> None:
    assert read_body(b' {"a": 1}\r\n', "", None, "params") == Body(b'{"a": 1}')
    assert read_body(b" \n", "", None, "params") == Body(b"")


def test_an_event_stays_one_line() -> None:
    from broker.core.messages import Broadcast

    event = encode_event(Broadcast("lab", None, 7, Body(b'{\r\n"a":\n"x\\ny"}')), "n.2")
    lines = event.decode().split("\n")
    assert lines[:2] == ["id: 7.n.2", "event: message"] and lines[3:] == ["", ""]
    assert json.loads(lines[2].removeprefix("data: ")) == {"endpoint": "lab", "seq": 7, "data": {"a": "x\ny"}}
