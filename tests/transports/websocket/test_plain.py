"""Openings by the plain door and by tornado's HTTP server: the same answer, session and counts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.auth.tokens import TokenStore
from broker.core.access import Principal
from broker.core.errors import DRAINED
from broker.core.events import Drain
from tests.transports.websocket.harness import ADMIN, CALLER, LISTENER, WORKER, World, config, run, serving, until

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def opening(port: int, path: str = "/ws/lab", secret: str | None = ADMIN, more: str = "", **other: str) -> bytes:
    """The plain request; `other` replaces headers, or takes them out if empty."""
    headers = {
        "Host": f"127.0.0.1:{port}", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
    }  # fmt: skip
    if secret is not None:
        headers["Authorization"] = f"Bearer {secret}"
    headers.update({name.replace("_", "-"): value for name, value in other.items()})
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines]).encode() + b"\r\n" + more.encode() + b"\r\n"


async def answered(world: World, request: bytes, cut: int = 0) -> tuple[bytes, list[Any]]:
    """The head of the answer, and what has come of it in the broker."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
    before = set(world.broker.router.sessions.by_id)
    try:
        writer.write(request[:cut])
        if cut:
            await until(lambda: world.broker._acceptor.unauthenticated > 0, "it is there")  # type: ignore[union-attr]
        writer.write(request[cut:])
        head = await reader.readuntil(b"\r\n\r\n")
        sessions = [session for number, session in world.broker.router.sessions.by_id.items() if number not in before]
        name = writer.get_extra_info("sockname")
        facts: list[Any] = [
            (
                one.principal, one.role, one.endpoint, one.listen, one.capacity, one.grace_s, one.grants, one.token_id,
                one.login_id, one.dialect, one.expires_at is None, one.remote == f"{name[0]}:{name[1]}",
                one.link._codec.binary, one.link._codec.meta,  # type: ignore[union-attr]
            )
            for one in sessions
        ]  # fmt: skip
    finally:
        writer.close()
    await until(lambda: set(world.broker.router.sessions.by_id) == before, "it is gone again")
    await until(lambda: world.broker._acceptor.unauthenticated == 0, "nobody waits")  # type: ignore[union-attr]
    auth = world.broker.authenticator.counters
    facts += [(name, getattr(auth, name)) for name in auth.__slots__]
    facts += [world.counters.attached, world.counters.detached, world.broker._acceptor.counters]  # type: ignore[union-attr]
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Date:")]
    return b"\r\n".join(sorted(lines)), facts


PLAIN: list[dict[str, Any]] = [
    {}, {"path": "/ws"}, {"path": "/ws/lab?role=worker&capacity=7&meta=1"}, {"path": "/ws/lab?listen=0&binary=true"},
    {"secret": CALLER}, {"path": "/ws/lab?role=worker", "secret": WORKER},
    {"secret": LISTENER, "path": "/ws/lab?role=listener"},
    {"Sec_WebSocket_Protocol": "jsonrpc"}, {"User_Agent": "me (0)", "Accept": "*/*", "Sec_WebSocket_Extensions": "x-y"},
    {"Connection": "keep-alive, Upgrade"}, {"Upgrade": "WebSocket"}, {"Authorization": f"bearer {ADMIN}"},
    {"Host": "localhost:PORT"},
]  # fmt: skip
LEFT: list[dict[str, Any]] = [
    {"secret": None}, {"secret": "wrong-secret-of-somebody-0123456789abcd"}, {"path": "/ws/other", "secret": CALLER},
    {"path": "/ws/lab?role=worker", "secret": CALLER}, {"path": "/ws/lab?role=king"}, {"path": "/ws/lab?what=1"},
    {"path": "/ws?role=worker"}, {"path": "/ws/-lab"}, {"path": "/ws/lab/more"}, {"path": "/wss"}, {"path": "/"},
    {"path": "/livez"}, {"Host": "evil.example"}, {"Host": ""}, {"Host": "127.0.0.1:PORT,x"},
    {"Origin": "http://127.0.0.1:PORT"}, {"Origin": "http://evil.example"}, {"Upgrade": "h2c"}, {"Upgrade": ""},
    {"Connection": "close"}, {"Sec_WebSocket_Version": "8"}, {"Sec_WebSocket_Key": "short"}, {"Sec_WebSocket_Key": ""},
    {"Sec_WebSocket_Protocol": "jsonrpc, other"}, {"Sec_WebSocket_Protocol": "resume.1.abc"},
    {"Authorization": "Basic abc"}, {"more": f"Authorization: Bearer {ADMIN}\r\n"}, {"Cookie": "a=b"},
    {"Content_Length": "0"}, {"path": "/ws/lab?ticket=abc"}, {"X_Forwarded_For": "1.2.3.4"},
    {"path": "/ws/lab?timeout=%31"},
]  # fmt: skip


@pytest.mark.parametrize("plain", [True, False])
def test_both_doors_answer_alike(plain: bool, tmp_path: Any) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    _, stored = store.create("ann", ("caller",), ("*",))

    async def main() -> None:
        async with serving(tokens=store) as world, serving(tokens=store) as other:
            acceptor, opens = world.broker._acceptor, other.broker._acceptor
            assert acceptor is not None and opens is not None
            acceptor._opens = None
            taken: list[bool] = []
            ask = opens._opens
            assert ask is not None

            def noted(*given: Any) -> bool:
                taken.append(ask(*given))
                return taken[-1]

            opens._opens = noted
            for change in [*PLAIN, {"secret": stored}] if plain else LEFT:
                both = []
                for one in (world, other):
                    port = str(one.broker.port)
                    ported = {name: value and value.replace("PORT", port) for name, value in change.items()}
                    head, facts = await answered(one, opening(one.broker.port, **ported))
                    both.append((head.replace(port.encode(), b"PORT"), facts))
                assert both[0] == both[1], change
                assert taken == [plain], change
                assert b"101 Switching" in both[0][0] or not plain
                taken.clear()

    run(main)


def test_a_request_that_comes_in_two_goes_by_the_http_server() -> None:
    async def main() -> None:
        async with serving() as world:
            head, facts = await answered(world, opening(world.broker.port), cut=30)
            assert b"101 Switching Protocols" in head
            assert facts[0][0] == "admin"

    run(main)


def test_the_door_is_left_to_a_program_with_an_authentication_of_its_own() -> None:
    seen: list[str] = []

    def authenticate(request: Any) -> Principal | None:
        seen.append(request.path)
        return None

    async def main() -> None:
        async with serving(authenticate=authenticate) as world:
            head, _ = await answered(world, opening(world.broker.port))
            assert b"101 Switching Protocols" in head
            assert seen == ["/ws/lab"]

    run(main)


def test_who_comes_while_the_broker_drains_or_is_full_is_told_so() -> None:
    async def main() -> None:
        async with serving(config(limits={"sessions_max": 1})) as world:
            await world.peer("/ws/lab")
            head, _ = await answered(world, opening(world.broker.port))
            assert b"503" in head and b"Retry-After: 5" in head
            world.broker.engine.feed(Drain())
            head, _ = await answered(world, opening(world.broker.port))
            assert b"503" in head and b"Retry-After: 1" in head

    run(main)


def test_a_broker_that_drains_during_the_opening_says_so() -> None:
    async def main() -> None:
        async with serving() as world:
            acceptor = world.broker._acceptor
            assert acceptor is not None
            ask = acceptor._opens
            assert ask is not None

            def drained(*given: Any) -> bool:
                taken = ask(*given)
                world.broker.engine.feed(Drain())
                return taken

            acceptor._opens = drained
            peer = await world.peer("/ws/lab")
            assert (await peer.closed())[0] == DRAINED.code
            assert world.counters.attached == 0

    run(main)
