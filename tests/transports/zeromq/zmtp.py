"""ZMTP 3.0 by hand (https://rfc.zeromq.org/spec/23/), for what no library would send."""

from __future__ import annotations

import asyncio

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
COMMAND, LONG, MORE = 4, 2, 1


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value


def frame(data: bytes, flags: int = 0) -> bytes:
    if len(data) < 256:
        return bytes([flags, len(data)]) + data
    return bytes([flags | LONG]) + len(data).to_bytes(8, "big") + data


class Wire:
    """A connection after its handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def push(self, data: bytes, most_bytes: int) -> int:
        """Write it again and again; how many bytes went, which is less than so many if the connection was ended."""
        sent = 0
        try:
            while sent < most_bytes:
                self.writer.write(data)
                sent += len(data)
                async with asyncio.timeout(1):  # an ended connection may leave its writer before a window of zero
                    await self.writer.drain()
        except (ConnectionError, TimeoutError):
            pass
        return sent

    def close(self) -> None:
        """End it at once."""
        self.writer.transport.abort()

    async def ended(self) -> None:
        """Wait until the other end has ended it."""
        try:
            async with asyncio.timeout(10):
                while await self.reader.read(65_536):
                    pass
        except ConnectionError:
            pass
        self.close()


async def speak(url: str, kind: bytes = b"DEALER", identity: bytes = b"") -> Wire:
    """Connect to `tcp://ip:port` as a socket of this kind."""
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(GREETING)
    await reader.readexactly(64)
    writer.write(frame(b"\x05READY" + _property(b"Socket-Type", kind) + _property(b"Identity", identity), COMMAND))
    head = await reader.readexactly(2)
    await reader.readexactly(head[1])
    return Wire(reader, writer)
