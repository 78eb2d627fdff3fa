"""A broker over real sockets and bare `websockets` clients, for tests of everything above the core."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from broker.auth.tokens import EVERYTHING, TokenStore
from broker.auth.users import UserStore
from broker.config.model import Config
from broker.core.access import Grant, Principal, Role
from broker.node.broker import Broker
from tests.links.harness import RawClient, run, until

__all__ = ["RawClient", "run", "until"]

ADMIN = "admin-secret-for-tests-0123456789abcdef"
CALLER = "caller-secret-for-tests-0123456789abcde"
WORKER = "worker-secret-for-tests-0123456789abcde"
LISTENER = "listener-secret-for-tests-0123456789abc"
ELSEWHERE = "elsewhere-secret-for-tests-0123456789ab"
PRINCIPALS = {
    ADMIN: Principal("admin", EVERYTHING),
    CALLER: Principal("carol", (Grant(Role.CALLER, ("lab*",)),)),
    WORKER: Principal("wanda", (Grant(Role.WORKER, ("lab*",)),)),
    LISTENER: Principal("liam", (Grant(Role.LISTENER, ("lab*",)),)),
    ELSEWHERE: Principal("eve", (Grant(Role.CALLER | Role.WORKER, ("other",)),)),
}
PATIENCE_S = 20


def config(**sections: Mapping[str, Any]) -> Config:
    """A configuration on a free port; sections as in the file."""
    sections = {**sections, "server": {"port": 0, **sections.get("server", {})}}
    return msgspec.convert(sections, Config)


class Peer:
    """A bare client: says exactly what it is told, keeps what it was not asked for."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.inbox: list[Any] = []
        self._ids = 0

    async def send(self, message: object) -> None:
        """Text and bytes as they are, everything else as JSON."""
        await self.socket.send(message if isinstance(message, (str, bytes)) else json.dumps(message))

    async def raw(self) -> str | bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.socket.recv()

    async def read(self) -> Any:
        """The next message, kept ones first; a binary one as (message, attachments)."""
        if self.inbox:
            return self.inbox.pop(0)
        return decoded(await self.raw())

    async def find(self, wanted: Any) -> Any:
        """The next message for which `wanted` holds; others are kept."""
        for at, message in enumerate(self.inbox):
            if wanted(message):
                return self.inbox.pop(at)
        while not wanted(message := decoded(await self.raw())):
            self.inbox.append(message)
        return message

    async def reply(self, wire_id: object) -> Any:
        """The reply with this id, of this type."""
        return await self.find(
            lambda m: "method" not in head(m) and head(m).get("id", "-") == wire_id
            and type(head(m)["id"]) is type(wire_id)
        )  # fmt: skip

    async def ask(self, method: str, params: object = None, **members: object) -> object:
        """Send a call; returns its id."""
        self._ids += 1
        message = {"jsonrpc": "2.0", "id": self._ids, "method": method, **members}
        if params is not None:
            message["params"] = params
        await self.send(message)
        return message["id"]

    async def call(self, method: str, params: object = None, **members: object) -> Any:
        return await self.reply(await self.ask(method, params, **members))

    async def taken(self) -> Any:
        """The next call or notification, as a worker gets it."""
        return await self.find(lambda m: "method" in head(m) and not head(m)["method"].startswith(("broker.", "$/")))

    async def told(self, method: str) -> Any:
        """The next notification of the broker's own, such as `broker.message`."""
        return await self.find(lambda m: head(m).get("method") == method)

    async def answer(self, call: Any, **members: object) -> None:
        await self.send({"jsonrpc": "2.0", "id": head(call)["id"], **members})

    async def serve_one(self, result: object = "done") -> Any:
        """Take one call and answer it."""
        call = await self.taken()
        await self.answer(call, result=result)
        return call

    async def sync(self) -> None:
        """Everything sent before this has been dealt with."""
        assert "result" in await self.call("broker.ping")

    async def silent(self) -> bool:
        """Whether nothing but the answer to a ping comes."""
        await self.sync()
        return self.inbox == []

    async def closed(self) -> tuple[int, str]:
        """Code and reason of the close; what comes before it is kept."""
        try:
            while True:
                self.inbox.append(decoded(await self.raw()))
        except ConnectionClosed as error:
            return (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, "")


def head(message: Any) -> dict[str, Any]:
    if isinstance(message, tuple):
        message = message[0]
    return message if isinstance(message, dict) else {}


def decoded(raw: str | bytes) -> Any:
    if isinstance(raw, str):
        return json.loads(raw)
    text, *attachments = split(raw)
    return json.loads(text), attachments


def split(frame: bytes) -> list[bytes]:
    """The parts of a binary message, by the words of the protocol and no code of the broker's."""
    (count,) = struct.unpack_from(">I", frame)
    offsets = [*struct.unpack_from(f">{count}I", frame, 4), len(frame)]
    return [frame[a:b] for a, b in itertools.pairwise(offsets)]


def joined(message: object, *attachments: bytes) -> bytes:
    parts = [json.dumps(message).encode(), *attachments]
    at, offsets = 4 * (len(parts) + 1), []
    for part in parts:
        offsets.append(at)
        at += len(part)
    return struct.pack(f">{len(parts) + 1}I", len(parts), *offsets) + b"".join(parts)


class World:
    """A broker that listens, and its clients."""

    def __init__(self, broker: Broker, stack: AsyncExitStack) -> None:
        self.broker = broker
        self._stack = stack

    @property
    def counters(self) -> Any:
        return self.broker.router.counters

    @property
    def url(self) -> str:
        return self.broker.url.replace("http", "ws", 1)

    async def peer(self, path: str = "/ws", secret: str | None = ADMIN, **options: Any) -> Peer:
        """Connect; an answer other than 101 raises websockets' InvalidStatus."""
        headers = dict(options.pop("headers", {}))
        if secret is not None:
            headers["Authorization"] = f"Bearer {secret}"
        options = {"compression": None, "ping_interval": None, "max_size": None, "close_timeout": 2} | options
        socket = await connect(self.url + path, additional_headers=headers, proxy=None, **options)
        self._stack.push_async_callback(socket.close)
        return Peer(socket)

    async def worker(self, endpoint: str = "lab", query: str = "", **options: Any) -> Peer:
        return await self.peer(f"/ws/{endpoint}?role=worker{query}", **options)

    async def caller(self, endpoint: str = "lab", query: str = "listen=0", **options: Any) -> Peer:
        return await self.peer(f"/ws/{endpoint}?{query}", **options)

    async def http(
        self, path: str, secret: str | None = ADMIN, method: str = "GET", headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> HTTPResponse:  # fmt: skip
        given = dict(headers or {})
        if secret is not None:
            given["Authorization"] = f"Bearer {secret}"
        body = b"" if method in {"POST", "PUT", "PATCH"} else None
        client = AsyncHTTPClient(force_instance=True)
        try:
            return await client.fetch(
                self.broker.url + path, method=method, headers=given, raise_error=False, body=body, **options
            )
        finally:
            client.close()

    async def metric(self, name: str, **labels: str) -> float:
        """One sample of `/metrics`."""
        from prometheus_client.parser import text_string_to_metric_families

        text = (await self.http("/metrics")).body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        raise AssertionError(f"no metric {name} {labels}")

    def books_balance(self) -> bool:
        counters = self.counters
        return bool(counters.accepted == sum(counters.ended.values()) + self.broker.router.pending.count)


@asynccontextmanager
async def serving(
    settings: Config | None = None,
    *,
    tokens: TokenStore | None = None,
    users: UserStore | None = None,
    fixed: Mapping[str, Principal] | None = None,
    **more: Any,
) -> AsyncIterator[World]:
    """A broker on a free port. Afterwards its tables are empty and its invariants hold."""
    secrets = PRINCIPALS if fixed is None else fixed
    broker = Broker(settings or config(), tokens=tokens, users=users, fixed=secrets, **more)
    await broker.start()
    try:
        await broker.listen()
        async with AsyncExitStack() as stack:
            yield World(broker, stack)
            broker.router.check()
        await until(lambda: not broker.links.links, "all links are gone")
    finally:
        await broker.stop()
    broker.router.check()
    assert broker.router.pending.count == 0
    assert len(broker.router.sessions) == 0
