"""A TCP proxy that a test can cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """Passes bytes on to a port of this host."""

    def __init__(self) -> None:
        self.port = 0
        """where it passes things on to"""
        self._links: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.host = ""
        """what it is called in the header Host"""
        self.accepted = 0
        self.passed = 0
        """bytes passed on, both ways"""
        self.cut_at: int | None = None
        """cut once so many bytes have been passed on"""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}"

    def cut(self) -> None:
        """Break every connection there is, with what is under way."""
        self.cut_at = None
        links, self._links = self._links, []
        for writer in links:
            writer.transport.abort()

    def close(self) -> None:
        """Let nobody through until `open`: connections are accepted and wait."""
        self._open.clear()

    def open(self) -> None:
        """Let everybody through again."""
        self._open.set()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._links.append(writer)
        await self._open.wait()
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.transport.abort()
            return
        self._links.append(inner_writer)
        if writer.transport.is_closing():
            inner_writer.transport.abort()
        for source, sink in ((reader, inner_writer), (inner_reader, writer)):
            task = asyncio.get_running_loop().create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                self.passed += len(data)
                if self.cut_at is not None and self.passed >= self.cut_at:
                    sink.write(data[: len(data) // 2])  # in the midst of a message
                    self.cut()
                    return
                sink.write(data)
                await sink.drain()
            sink.close()
        except OSError:
            sink.transport.abort()

    async def _stop(self) -> None:
        self.cut()
        self._open.set()
        while self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def proxying() -> AsyncIterator[Proxy]:
    """A proxy that listens; give it a port."""
    proxy = Proxy()
    server = await asyncio.start_server(proxy._accepted, "127.0.0.1", 0)
    proxy.host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy._stop()
