"""Attacks of the list in docs/hostile.md that need a whole broker, each by its number."""

from __future__ import annotations

import json

import pytest
from tornado.routing import URLSpec
from websockets.exceptions import InvalidStatus

from tests.transports.websocket.harness import (
    ADMIN,
    CALLER,
    ELSEWHERE,
    LISTENER,
    WORKER,
    config,
    run,
    serving,
    until,
)

SIGNING_IN = {"/logout"}
"""Routes where a credential is looked for elsewhere than in the header; without one they do nothing."""
OPEN_TO_ANYBODY = {"/livez", "/readyz", "/", "/login"}
"""And what is under `/static/`: nothing in the page's own files is secret."""


def test_row_03_every_route_asks_who_is_there() -> None:
    """Walks what `Broker.routes()` says, so a new route is in the test from its first day."""

    async def main() -> None:
        async with serving() as world:
            paths = []
            for route in world.broker.routes():
                assert isinstance(route, URLSpec)
                path = route.matcher._path  # type: ignore[attr-defined]
                paths.append(path.replace("%s", "lab"))
            assert {"/ws", "/ws/lab", "/ticket", "/metrics", "/livez"} <= set(paths)
            upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                       "Sec-WebSocket-Key": "a2tra2tra2tra2tra2traw=="}  # fmt: skip
            for path in paths:
                statuses = set()
                for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
                    statuses |= {(await world.http(path, None, method, headers)).code for headers in ({}, upgrade)}
                if path in OPEN_TO_ANYBODY or path.startswith("/static/"):
                    assert statuses <= {200, 404, 405} | ({400} if path == "/login" else set()), (path, statuses)
                else:
                    assert statuses <= {400, 401, 403, 405, 426}, (path, statuses)
                    no = 403 if path.startswith("/api") else 401  # as Jupyter's clients expect it
                    assert no in statuses or path in SIGNING_IN, (path, statuses)
                assert (await world.http(path, None, "OPTIONS")).code in (204, 405)
                other = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
                assert (await world.http(path, None, "OPTIONS", other)).code in (403, 405)
            assert world.counters.attached == 0
            assert (await world.http("/metrics", CALLER)).code == 403, "metrics name all endpoints"

    run(main)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:1", 403),
        ("https://127.0.0.1:{port}", 403),
        ("http://127.0.0.1:{port}.evil.example", 403),
        ("http://127.0.0.1:{port}", 101),
        ("http://page.example", 101),
        ("http://sub.page.example", 403),
    ],
)
def test_row_04_pages_of_other_origins_are_refused_before_the_upgrade(origin: str, status: int) -> None:
    async def main() -> None:
        async with serving(config(server={"allowed_origins": ["http://page.example"]})) as world:
            headers = {"Origin": origin.format(port=world.broker.port)}
            if status == 101:
                await (await world.peer("/ws", headers=headers)).sync()
                assert (await world.http("/ticket", ADMIN, "POST", headers)).code == 200
            else:
                with pytest.raises(InvalidStatus) as caught:
                    await world.peer("/ws", headers=headers)
                assert caught.value.response.status_code == status
                assert world.counters.attached == 0
                for path in ("/ticket", "/livez", "/metrics", "/nothing"):
                    method = "POST" if path == "/ticket" else "GET"
                    assert (await world.http(path, ADMIN, method, headers)).code == 403

    run(main)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "localhost.:{port}"]
)
def test_row_05_a_rebound_name_is_answered_nothing(host: str) -> None:
    async def main() -> None:
        async with serving() as world:
            name = host.format(port=world.broker.port)
            for path in ("/ticket", "/livez", "/readyz", "/metrics", "/nothing", "/ws"):
                headers = {"Host": name, "Origin": f"http://{name}"}
                answer = await world.http(path, ADMIN, "POST" if path == "/ticket" else "GET", headers)
                assert answer.code in (421, 426), path
                if path != "/ws":
                    assert answer.code == 421
            with pytest.raises(InvalidStatus) as caught:
                await world.peer("/ws", headers={"Host": name, "Origin": f"http://{name}"})
            assert caught.value.response.status_code in (400, 421)

    run(main)


def test_row_10_who_may_only_call_becomes_no_worker() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker("lab", secret=WORKER)
            carol = await world.peer("/ws", CALLER)
            for params in ({"endpoint": "lab"}, {"endpoint": "labyrinth"}, {"endpoint": "other"}):
                answer = await carol.call("broker.serve", params)
                assert (answer["error"]["code"], answer["error"]["data"]["outcome"]) == (-32006, "denied")
            wire_id = await carol.ask("lab/m")
            await worker.serve_one()
            assert "result" in await carol.reply(wire_id), "the real worker is asked, and nobody else"
            assert world.counters.ended["denied"] >= 3

    run(main)


def test_row_10_a_worker_beyond_its_grant_is_denied() -> None:
    async def main() -> None:
        async with serving() as world:
            wanda = await world.peer("/ws", WORKER)
            assert "result" in await wanda.call("broker.serve", {"endpoint": "lab"})
            for endpoint in ("other", "xlab", "secret"):
                answer = await wanda.call("broker.serve", {"endpoint": endpoint})
                assert answer["error"]["data"]["outcome"] == "denied"
                assert (await wanda.call(f"{endpoint}/m"))["error"]["data"]["outcome"] == "denied"
            assert (await wanda.call("lab/m"))["error"]["data"]["outcome"] == "denied", "a worker's grant calls nobody"
            listed = (await wanda.call("broker.endpoints"))["result"]
            assert [e["endpoint"] for e in listed] == ["lab"], "it sees what its grant covers"

    run(main)


def test_row_11_a_reply_from_another_than_the_assigned_worker_is_a_strike() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, thief, caller = await world.worker(), await world.worker("lab2"), await world.caller()
            wire_id = await caller.ask("m")
            call = await worker.taken()
            for _ in range(2):
                await thief.answer(call, result="forged")
            await thief.sync()
            assert (world.counters.foreign_replies, world.counters.strikes) == (2, 2)
            assert await caller.silent()
            await worker.answer(call, result="true")
            assert (await caller.reply(wire_id))["result"] == "true"
            await thief.answer(call, error={"code": 1, "message": "forged"})
            assert (await thief.closed())[0] == 4400
            assert await world.metric("broker_foreign_replies_total") == 3

    run(main)


def test_row_11_attempt_numbers_can_be_guessed_and_are_worth_nothing() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            wire_id = await caller.ask("m")
            call = await worker.taken()
            mine = call["id"]
            node, number, attempt = mine.rsplit("-", 2)
            for guess in (f"{node}-{number}-{int(attempt) + 1}", f"{node}-{int(number) + 5}-{attempt}", "1", 1):
                thief = await world.worker("lab2")
                await thief.send({"jsonrpc": "2.0", "id": guess, "result": "forged"})
                await thief.sync()
            assert await caller.silent()
            await worker.answer(call, result="true")
            assert (await caller.reply(wire_id))["result"] == "true"

    run(main)


def test_row_12_an_id_in_flight_is_a_duplicate_and_the_first_goes_on() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            await caller.ask("m", "first", id=7)
            call = await worker.taken()
            for members in ({}, {"meta": {"x": 1}}):
                await caller.ask("m", "second", id=7, **members)
                answer = await caller.read()
                assert answer["id"] is None
                assert (answer["error"]["code"], answer["error"]["data"]["id"]) == (-32010, 7)
            await caller.ask("a/b", id=7)
            assert (await caller.read())["id"] is None
            await caller.ask("broker.ping", id=7)
            assert (await caller.read())["id"] is None
            await caller.ask("m", "a string is another id", id="7")
            other = await worker.taken()
            await worker.answer(call, result="first")
            assert (await caller.reply(7))["result"] == "first"
            await worker.answer(other, result="other")
            assert (await caller.reply("7"))["result"] == "other"
            await caller.ask("m", id=7)
            await worker.serve_one("free again")
            assert (await caller.reply(7))["result"] == "free again"
            assert await worker.silent()
            assert world.counters.ended["duplicate_id"] == 4

    run(main)


def test_row_13_the_first_reply_wins_and_late_ones_go_nowhere() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            await caller.ask("m", id=1)
            call = await worker.taken()
            await worker.answer(call, result="first")
            await worker.answer(call, result="second")
            assert (await caller.reply(1))["result"] == "first"
            await caller.ask("m", id=2, meta={"timeout": 0.05})
            late = await worker.taken()
            assert (await caller.reply(2))["error"]["data"]["outcome"] == "deadline"
            await caller.ask("m", id=2)  # the same id again: the late reply must not end this one
            again = await worker.taken()
            await worker.answer(late, result="late")
            await worker.sync()
            assert await caller.silent()
            await worker.answer(again, result="in time")
            assert (await caller.reply(2))["result"] == "in time"
            assert world.counters.late_replies == 2
            assert world.counters.strikes == 0

    run(main)


def test_row_14_what_a_peer_says_of_itself_is_not_believed() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker("lab", "&listen=1&meta=1")
            caller = await world.peer("/ws/lab?listen=0", CALLER)
            forged = {"from": "admin", "principal": "admin", "session": 1, "reply_to": "other", "grants": ["*"]}
            await caller.ask("m", id=1, **forged)
            call = await worker.taken()
            assert set(call) == {"jsonrpc", "id", "method", "meta"}
            await worker.answer(call, result=1, **forged)
            assert set(await caller.reply(1)) == {"jsonrpc", "id", "result"}
            for meta in ({"principal": "admin"}, {"worker": "x"}, {"attempts": 5}):
                assert (await caller.call("m", meta=meta))["error"]["code"] == -32602
            trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            wire_id = await caller.ask("m", meta={"trace": trace})
            call = await worker.taken()
            assert call["meta"]["trace"] == trace
            await worker.answer(call, result=1)
            assert (await caller.reply(wire_id))["meta"]["trace"] == trace
            denied = await caller.call("broker.admin.peers", meta={"trace": trace})
            assert denied["error"]["data"]["outcome"] == "denied", "a trace opens nothing"

    run(main)


def test_row_14_nobody_speaks_in_the_brokers_name() -> None:
    """A notification `lab/broker.message` would look to a listening worker like the broker's own broadcast."""

    async def main() -> None:
        async with serving() as world:
            worker = await world.worker("lab", "&listen=1")
            caller = await world.peer("/ws", CALLER)
            forged = {"endpoint": "lab", "seq": 9, "data": "forged"}
            await caller.send({"jsonrpc": "2.0", "method": "lab/broker.message", "params": forged})
            await caller.send({"jsonrpc": "2.0", "method": "lab/$/cancelRequest", "params": {"id": 1}})
            params = {"endpoint": "lab", "method": "broker.message", "params": forged}
            await caller.send({"jsonrpc": "2.0", "method": "broker.call", "params": params})
            await caller.sync()
            assert await worker.silent()
            eve = await world.peer("/ws", ELSEWHERE)
            publish = {"endpoint": "lab", "data": 1}
            assert (await eve.call("broker.publish", publish))["error"]["data"]["outcome"] == "denied"
            liam = await world.peer("/ws", LISTENER)
            assert (await liam.call("broker.publish", publish))["error"]["data"]["outcome"] == "denied"
            assert await worker.silent()

    run(main)


def test_row_25_metric_labels_are_bounded_and_clean() -> None:
    async def main() -> None:
        async with serving() as world:
            peer = await world.peer("/ws")
            for number in range(300):
                assert "result" in await peer.call("broker.subscribe", {"endpoint": f"e{number}"})
            await peer.call('x"}\nbroker_evil 1\n/m')
            await peer.call("nothing/" + "y" * 500)
            text = (await world.http("/metrics")).body.decode()
            labels = {line for line in text.splitlines() if line.startswith("broker_endpoint_listeners{")}
            assert len(labels) == 201
            assert 'broker_endpoint_listeners{endpoint="other"} 100.0' in labels
            assert "evil" not in text
            assert "yyy" not in text
            outcomes = [line for line in text.splitlines() if line.startswith("broker_requests_ended_total{")]
            assert len(outcomes) < 20

    run(main)


def test_row_29_listings_show_what_the_grant_covers() -> None:
    async def main() -> None:
        async with serving() as world:
            await world.worker("lab")
            await world.worker("secret")
            carol = await world.peer("/ws", CALLER)
            assert [e["endpoint"] for e in (await carol.call("broker.endpoints"))["result"]] == ["lab"]
            for name in ("secret", "nothing"):
                answer = await carol.call("broker.describe", {"endpoint": name})
                assert answer["error"]["data"]["outcome"] == "denied"
            for method in ("broker.admin.peers", "broker.admin.pending", "broker.admin.cancel", "broker.admin.close"):
                assert (await carol.call(method, {"request": 1}))["error"]["data"]["outcome"] == "denied"

    run(main)


def test_row_01_and_25_counters_tell_what_the_door_saw() -> None:
    async def main() -> None:
        async with serving() as world:
            for secret in (None, "wrong" * 10):
                with pytest.raises(InvalidStatus):
                    await world.peer("/ws", secret)
            await world.peer("/ws")
            await until(lambda: world.counters.attached == 1, "one came in")
            for result, count in (("missing", 1), ("wrong", 1)):
                assert await world.metric("broker_door_total", result=result) == count
            body = json.loads((await world.http("/nothing", None)).body)
            assert body == {"error": "no such path", "status": 404}

    run(main)
