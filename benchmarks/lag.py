"""How late an event loop is, sampled every millisecond, and a raw WebSocket client for benchmarks of a whole broker."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Sequence

from broker.auth.tokens import EVERYTHING
from broker.config.model import Config
from broker.core.access import Principal
from broker.node.broker import Broker

SECRET = "benchmark-secret-0123456789-abcdefghij"
SAMPLE_S = 0.001


class LagProbe:
    """Takes samples from `start` to `stop`: by how much a timer of one millisecond came too late."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        due = time.monotonic() + SAMPLE_S

        def look() -> None:
            self.samples.append(max(0.0, time.monotonic() - due))
            self.start()

        self._timer = loop.call_later(SAMPLE_S, look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def share(values: Sequence[float], part: float) -> float:
    """The value that `part` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0


def many_files() -> None:
    """Let this process have as many file descriptors as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def broker_for(settings: Config) -> Broker:
    """A broker in this process that knows one secret."""
    return Broker(settings, fixed={SECRET: Principal("benchmark", EVERYTHING)})


def opening(port: int, path: str) -> bytes:
    """The request that opens a WebSocket."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2tra2tra2tra2tra2traw==\r\n"
        f"Authorization: Bearer {SECRET}\r\n\r\n"
    ).encode()


async def connected(port: int, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open WebSocket, by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(opening(port, path))
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        raise ConnectionError(head.decode("latin-1"))
    return reader, writer


def masked(text: bytes) -> bytes:
    """A text frame as a client sends it; the mask is all zeros, which changes nothing."""
    size = len(text)
    head = bytes((0x81, 0x80 | size)) if size < 126 else bytes((0x81, 0xFE)) + size.to_bytes(2, "big")
    return head + bytes(4) + text


async def message(reader: asyncio.StreamReader) -> bytes:
    """The next message of the server."""
    _, size = await reader.readexactly(2)
    if size == 126:
        size = int.from_bytes(await reader.readexactly(2), "big")
    elif size == 127:
        size = int.from_bytes(await reader.readexactly(8), "big")
    return await reader.readexactly(size)
