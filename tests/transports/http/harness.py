"""Requests to a broker as curl and hostile peers write them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tests.transports.websocket.harness import ADMIN, PATIENCE_S, World


class Answer:
    """What came back."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def outcome(self) -> str:
        return self.headers.get("broker-outcome", "")

    def all_headers(self, name: str) -> list[str]:
        """Every value of a header that may come several times."""
        return self.headers[name].split("\n") if name in self.headers else []


class Wire:
    """One TCP connection to a broker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, head: bool = False) -> Answer:
        """The next answer, its body by Content-Length."""
        async with asyncio.timeout(PATIENCE_S):
            status, headers = await self.header()
            size = 0 if head else int(headers.get("content-length", "0"))
            return Answer(status, headers, await self.reader.readexactly(size))

    async def header(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(PATIENCE_S):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = text.strip().split("\r\n")
        headers: dict[str, str] = {}
        for name, value in (line.split(": ", 1) for line in lines):
            key = name.lower()
            headers[key] = f"{headers[key]}\n{value}" if key in headers else value
        return int(first.split()[1]), headers

    async def until(self, text: bytes) -> bytes:
        """Everything up to and with this text, chunks' sizes left in."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(text)

    async def rest(self) -> bytes:
        """Everything until the broker ends the connection."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


def written(
    world: World, path: str, body: bytes | None, secret: str | None, method: str, headers: Mapping[str, str]
) -> bytes:
    lines = {"Host": f"127.0.0.1:{world.broker.port}"}
    if secret is not None:
        lines["Authorization"] = f"Bearer {secret}"
    if body is not None:
        lines["Content-Length"] = str(len(body))
    lines |= headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + (body or b"")


@asynccontextmanager
async def wire(world: World) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port, limit=1 << 25)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


async def ask(
    world: World,
    path: str,
    body: object = None,
    *,
    secret: str | None = ADMIN,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own; a body that is no bytes goes as JSON."""
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    if method == "POST" and content is None:
        content = b""
    async with wire(world) as connection:
        connection.send(written(world, path, content, secret, method, headers or {}))
        return await connection.answer(head=method == "HEAD")
