"""The opening of a WebSocket: who may come in, as what, and how refusals are told."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from broker.auth.tokens import TokenStore
from broker.core.access import Grant, Principal, Role
from broker.core.errors import ENDPOINT_CLOSED
from broker.transports.websocket import handler, plain
from tests.links.harness import RawClient, frame
from tests.transports.websocket.harness import (
    ADMIN,
    CALLER,
    ELSEWHERE,
    LISTENER,
    PRINCIPALS,
    WORKER,
    World,
    config,
    run,
    serving,
    until,
)


async def refusal(world: World, path: str = "/ws/lab", **options: Any) -> tuple[int, Any, Mapping[str, str]]:
    """Status, body and headers of a refused opening; the connection ends with it."""
    with pytest.raises(InvalidStatus) as caught:
        await world.peer(path, **options)
    response = caught.value.response
    assert response.headers["Connection"] == "close"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "Server" not in response.headers
    return response.status_code, json.loads(response.body or b"{}"), response.headers


def bearer(token: str) -> Any:
    return "bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


# ---------------------------------------------------------------- credentials


def test_without_a_credential_nobody_comes_in() -> None:
    async def main() -> None:
        async with serving() as world:
            for path in ("/ws", "/ws/lab", "/ws/lab?role=worker", "/ws/lab?role=nonsense", "/ws/a/b"):
                if path == "/ws/a/b":
                    assert (await refusal(world, path, secret=None))[0] == 404
                    continue
                status, body, headers = await refusal(world, path, secret=None)
                assert (status, body) == (401, {"error": "a credential is required", "status": 401})
                assert headers["WWW-Authenticate"] == "Bearer"
            assert len(world.broker.router.sessions) == 0
            assert world.counters.attached == 0

    run(main)


def test_a_wrong_credential_is_one_identical_refusal(tmp_path: Any) -> None:
    async def main() -> None:
        store = TokenStore(tmp_path / "tokens.json")
        _, expired = store.create("old", ("caller",), ("*",), 1.0)
        revoked_record, revoked = store.create("gone", ("caller",), ("*",))
        store.revoke(revoked_record.id)
        await asyncio.sleep(1.1)
        async with serving(tokens=store) as world:
            answers = []
            for secret in (expired, revoked, "brk_" + "x" * 43, "", "é" * 40):
                status, body, headers = await refusal(world, secret=secret.encode().decode("latin-1"))
                answers.append((status, json.dumps(body), sorted(name for name in headers)))
            assert len(set(map(str, answers))) == 1
            assert answers[0][0] == 401

    run(main)


def test_an_error_of_the_http_library_says_what_it_is() -> None:
    async def main() -> None:
        async with serving() as world:
            status, body, _ = await refusal(world, "/ws/%ff")
            assert (status, body) == (400, {"error": "Bad Request", "status": 400})

    run(main)


@pytest.mark.parametrize(("door", "name"), [(handler, "take"), (plain, "own")])
def test_a_token_revoked_during_the_opening_lets_nobody_in(
    door: Any, name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An opening may wait two seconds, for a peer that does not read an earlier answer."""

    async def main() -> None:
        store = TokenStore(tmp_path / "tokens.json")
        record, secret = store.create("ann", ("caller",), ("*",))

        take = getattr(door, name)

        async def take_late(*given: Any, **named: Any) -> Any:
            store.revoke(record.id)
            assert store.refresh() == {record.id}, "the sessions of this token have been closed"
            return await take(*given, **named)

        monkeypatch.setattr(door, name, take_late)
        async with serving(tokens=store) as world:
            more = {} if door is plain else {"headers": {"X-Not-Plain": "1"}}
            peer = await world.peer("/ws/lab", secret, **more)
            assert await peer.closed() == (4401, "the credential has ended")
            assert world.counters.attached == 0

    run(main)


@pytest.mark.parametrize("where", ["header", "subprotocol", "ticket"])
def test_every_place_of_a_credential_lets_in(where: str) -> None:
    async def main() -> None:
        async with serving() as world:
            if where == "header":
                peer = await world.peer("/ws/lab", CALLER)
            elif where == "subprotocol":
                peer = await world.peer("/ws/lab", None, subprotocols=[bearer(CALLER)])
                assert peer.socket.subprotocol is None, "the credential is never echoed"
            else:
                ticket = json.loads((await world.http("/ticket", CALLER, "POST")).body)["ticket"]
                peer = await world.peer(f"/ws/lab?ticket={ticket}", None)
            assert "peer" in (await peer.call("broker.ping"))["result"]

    run(main)


def test_a_bad_credential_is_refused_and_never_skipped() -> None:
    async def main() -> None:
        async with serving() as world:
            ticket = json.loads((await world.http("/ticket", ADMIN, "POST")).body)["ticket"]
            good, bad = [bearer(ADMIN)], "wrong" * 10
            assert (await refusal(world, secret=bad, subprotocols=good))[0] == 401
            assert (await refusal(world, f"/ws/lab?ticket={ticket}", secret=bad))[0] == 401
            assert (await refusal(world, f"/ws/lab?ticket={ticket}", secret=None, subprotocols=[bearer(bad)]))[0] == 401
            assert (await refusal(world, "/ws/lab?ticket=wrong", secret=None))[0] == 401
            headers = {"Authorization": "Basic YTpi"}
            assert (await refusal(world, secret=None, headers=headers, subprotocols=good))[0] == 401
            assert (await refusal(world, secret=None, subprotocols=[bearer(ADMIN), bearer(CALLER)]))[0] == 400
            # The first good one decides, whatever else there is; and the ticket was not spent by any of these.
            caller = await world.peer(f"/ws/lab?ticket={ticket}", CALLER, subprotocols=[bearer(bad)])
            (mine,) = (await (await world.peer("/ws")).call("broker.admin.peers"))["result"][:1]
            assert mine["principal"] == "carol"
            await world.peer(f"/ws/lab?ticket={ticket}", None)
            await caller.sync()

    run(main)


def test_a_ticket_is_good_once_and_for_no_other_ticket() -> None:
    async def main() -> None:
        async with serving(config(auth={"ticket_s": 0.2})) as world:
            answer = await world.http("/ticket", CALLER, "POST")
            issued = json.loads(answer.body)
            assert (answer.code, issued["expires_in_s"]) == (200, 0.2)
            assert "=" not in issued["ticket"]
            peer = await world.peer(f"/ws/lab?ticket={issued['ticket']}", None)
            assert (await refusal(world, f"/ws/lab?ticket={issued['ticket']}", secret=None))[0] == 401
            later = json.loads((await world.http("/ticket", CALLER, "POST")).body)["ticket"]
            await asyncio.sleep(0.25)
            assert (await refusal(world, f"/ws/lab?ticket={later}", secret=None))[0] == 401
            third = json.loads((await world.http("/ticket", CALLER, "POST")).body)["ticket"]
            assert (await world.http(f"/ticket?ticket={third}", None, "POST")).code == 403
            for method, status in (("GET", 405), ("POST", 401)):
                assert (await world.http("/ticket", None, method)).code == status
            await peer.sync()

    run(main)


def test_too_many_guesses_are_throttled_and_the_right_one_still_passes() -> None:
    async def main() -> None:
        async with serving(config(auth={"guesses_per_minute": 5})) as world:
            statuses = [(await refusal(world, secret="wrong" * 8))[0] for _ in range(8)]
            assert statuses == [401] * 5 + [429] * 3
            await (await world.peer("/ws", ADMIN)).sync()
            assert await world.metric("broker_door_total", result="throttled") == 3

    run(main)


def test_a_session_ends_when_its_token_does(tmp_path: Any) -> None:
    async def main() -> None:
        store = TokenStore(tmp_path / "tokens.json")
        record, secret = store.create("visitor", ("caller",), ("lab",))
        async with serving(tokens=store) as world:
            peer, other = await world.peer("/ws/lab", secret), await world.peer("/ws/lab")
            TokenStore(tmp_path / "tokens.json").revoke(record.id)  # as another process does
            assert await peer.closed() == (4401, "the token was revoked")
            assert (await refusal(world, secret=secret))[0] == 401
            await other.sync()

    run(main)


# ---------------------------------------------------------------- roles and endpoints


@pytest.mark.parametrize(
    ("path", "secret", "status"),
    [
        ("/ws/lab?role=worker", CALLER, 403),
        ("/ws/lab?role=worker", LISTENER, 403),
        ("/ws/lab", LISTENER, 403),
        ("/ws/lab", WORKER, 403),
        ("/ws/lab", ELSEWHERE, 403),
        ("/ws/lab?role=listener", ELSEWHERE, 403),
        ("/ws/lab?role=worker", ELSEWHERE, 403),
        ("/ws/other?role=worker", CALLER, 403),
        ("/ws/la", CALLER, 403),
        ("/ws/lab?role=boss", ADMIN, 400),
        ("/ws?role=worker", ADMIN, 400),
        ("/ws/lab?rôle=worker", ADMIN, 400),
        ("/ws/lab?timout=5", ADMIN, 400),
        ("/ws/lab?timeout=5&timeout=6", ADMIN, 400),
        ("/ws/lab?timeout=-1", ADMIN, 400),
        ("/ws/lab?timeout=nan", ADMIN, 400),
        ("/ws/lab?priority=11", ADMIN, 400),
        ("/ws/lab?idle=0", ADMIN, 400),
        ("/ws/lab?grace=-1", ADMIN, 400),
        ("/ws/lab?received=-3", ADMIN, 400),
        ("/ws/lab?stream=up", ADMIN, 400),
        ("/ws/lab?capacity=0&role=worker", ADMIN, 400),
        ("/ws/lab?capacity=5", ADMIN, 400),
        ("/ws/a%0Ab", ADMIN, 400),
        ("/ws/..%2Fx", ADMIN, 400),
        ("/ws/" + "x" * 129, ADMIN, 400),
        ("/ws/l%C3%A9", ADMIN, 400),
        ("/ws/", ADMIN, 404),
        ("/nothing", ADMIN, 404),
    ],
)
def test_refusals_name_what_was_wrong(path: str, secret: str, status: int) -> None:
    async def main() -> None:
        async with serving() as world:
            code, body, _ = await refusal(world, path.encode().decode("latin-1"), secret=secret)
            assert code == status, body
            assert body["status"] == status
            name = path.partition("?")[2].partition("=")[0]
            if status == 400 and name.isascii() and name:
                assert name in body["error"]
            assert secret not in body["error"]
            assert world.counters.attached == 0

    run(main)


def test_grants_are_patterns_over_whole_names() -> None:
    async def main() -> None:
        async with serving() as world:
            await world.peer("/ws/lab", CALLER)
            await world.peer("/ws/lab-2", CALLER)
            await world.peer("/ws/lab?role=listener", CALLER)
            await world.peer("/ws/lab?role=worker", WORKER)
            await world.peer("/ws/lab?role=listener", LISTENER)
            await world.peer("/ws/other?role=worker", ELSEWHERE)

    run(main)


def test_a_closed_endpoint_tells_its_reason_and_ends() -> None:
    async def main() -> None:
        settings = config(endpoints={"old": {"closed": "moved to new, ask Ann"}})
        async with serving(settings) as world:
            for role in ("caller", "worker", "listener"):
                began = time.monotonic()
                peer = await world.peer(f"/ws/old?role={role}")
                with pytest.raises(ConnectionClosed) as caught:
                    await peer.send({"jsonrpc": "2.0", "id": 1, "method": "m"})
                    await peer.raw()
                assert caught.value.rcvd is not None
                assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4404, "moved to new, ask Ann")
                await peer.socket.wait_closed()
                assert time.monotonic() - began < 1.5, "a good client does not wait for a time-out"
            assert not ENDPOINT_CLOSED.come_back
            assert world.counters.attached == 0
            assert (await refusal(world, "/ws/old", secret=None))[0] == 401, "only who may come in is told"
            free = await world.peer("/ws")
            for method, params in (("old/m", None), ("broker.serve", {"endpoint": "old"})):
                assert (await free.call(method, params))["error"]["code"] == -32006

    run(main)


# ---------------------------------------------------------------- subprotocols, bounds, draining


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([], None),
        (["jsonrpc"], "jsonrpc"),
        (["other", "jsonrpc"], "jsonrpc"),
        (["other"], None),
        (["JSONRPC"], None),
        (["jsonrpc", bearer(CALLER)], "jsonrpc"),
        ([bearer(CALLER)], None),
    ],
)
def test_no_subprotocol_is_needed_and_jsonrpc_is_echoed(offered: list[Any], chosen: str | None) -> None:
    async def main() -> None:
        async with serving() as world:
            secret = None if bearer(CALLER) in offered else CALLER
            peer = await world.peer("/ws/lab", secret, subprotocols=offered or None)
            assert peer.socket.subprotocol == chosen
            await peer.sync()

    run(main)


def test_sessions_are_bounded() -> None:
    async def main() -> None:
        async with serving(config(limits={"sessions_max": 2})) as world:
            first = await world.peer("/ws")
            await world.peer("/ws")
            status, body, headers = await refusal(world)
            assert (status, body["error"]) == (503, "2 sessions are connected")
            assert headers["Retry-After"] == "5"
            await first.socket.close()
            await until(lambda: len(world.broker.router.sessions) == 1, "one has left")
            await world.peer("/ws")

    run(main)


def test_nobody_comes_in_while_the_broker_drains() -> None:
    async def main() -> None:
        async with serving() as world:
            assert await world.broker.drain(1) is True
            status, _, headers = await refusal(world)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert (await world.http("/readyz", None)).code == 503
            assert (await world.http("/livez", None)).code == 200

    run(main)


def test_what_a_refused_socket_sends_is_never_looked_at() -> None:
    async def main() -> None:
        async with serving() as world:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
            head = (
                f"GET /ws/lab HTTP/1.1\r\nHost: 127.0.0.1:{world.broker.port}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2tra2tra2tra2tra2tr\r\n\r\n"
            )
            writer.write(head.replace("a2tra2tra2tra2tra2tr", base64.b64encode(b"k" * 16).decode()).encode())
            writer.write(frame(1, b'{"jsonrpc":"2.0","id":1,"method":"broker.ping"}'))
            writer.write(f"GET /livez HTTP/1.1\r\nHost: 127.0.0.1:{world.broker.port}\r\n\r\n".encode())
            answer = await RawClient(reader, writer).rest()
            assert answer.startswith(b"HTTP/1.1 401 ")
            assert answer.count(b"HTTP/1.1") == 1
            assert b"jsonrpc" not in answer
            writer.close()
            assert world.counters.accepted == 0

    run(main)


def test_a_client_that_leaves_during_the_opening_is_nobody() -> None:
    async def main() -> None:
        async with serving() as world:
            for _ in range(20):
                _, writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
                writer.write(
                    f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{world.broker.port}\r\nUpgrade: websocket\r\n"
                    f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {ADMIN}\r\n"
                    f"Sec-WebSocket-Key: {base64.b64encode(b'k' * 16).decode()}\r\n\r\n".encode()
                )
                writer.transport.abort()
            await until(lambda: len(world.broker.router.sessions) == 0, "nobody stays")
            await (await world.peer("/ws")).sync()
            await until(lambda: len(world.broker.links.links) == 1, "no link stays")

    run(main)


def test_a_credential_that_expires_ends_its_session() -> None:
    async def main() -> None:
        grants = (Grant(Role.CALLER, ("lab",)),)
        secret = "short-lived-secret-for-tests-0123456789"
        fixed = {**PRINCIPALS, secret: Principal("guest", grants, time.time() + 0.6)}
        async with serving(fixed=fixed) as world:
            worker = await world.worker()
            peer = await world.peer("/ws/lab", secret)
            wire_id = await peer.ask("m")
            call = await worker.taken()
            assert await peer.closed() == (4401, "the credential has expired")
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            assert wire_id
            assert world.counters.ended["cancelled"] == 1

    run(main)
