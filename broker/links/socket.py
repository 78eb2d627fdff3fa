"""The link over a socket of its own: an asyncio transport without a coroutine or future per message."""

from __future__ import annotations

import asyncio
import os
from typing import cast

from broker.links.limits import LinkCounters, LinkLimits
from broker.links.link import Link
from broker.links.loop import WHOLE_RECEIVE_BYTES, LoopLinks
from broker.wire import native
from broker.wire.frames import CARRY_MAX_BYTES, FrameParser

_TLS_WRITE_BUFFER_BYTES = 65_536
GATHER_BYTES, GATHERED_MAX = 4096, 1000
"""of each piece on average, from which on they are written without being joined first, and so many at most: 0.3 to
0.4 µs less for each of 16 KiB, nothing below 4 KiB"""


class SocketLink(Link, asyncio.BufferedProtocol):
    """A link over an asyncio or uvloop transport: a taken plain socket, or a client's connection.

    All links of a loop receive into one buffer, which is free again before the next read. The transport
    never holds more than one turn's write: what the kernel does not take stays in the outbox.
    """

    __slots__ = ("_fd", "_in_transport", "_rest_size", "_transport", "turn_bytes")

    _transport: asyncio.Transport

    def __init__(
        self,
        links: LoopLinks,
        *,
        client: bool = False,
        remote: str = "",
        early: bytes = b"",
        limits: LinkLimits | None = None,
    ) -> None:
        super().__init__(links, client=client, remote=remote, early=early, limits=limits)
        self.turn_bytes = self._limits.write_turn_bytes
        self._in_transport = 0
        self._fd = -1
        self._rest_size = 0

    # ── asyncio's side ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hold the transport still until `start`."""
        self._transport = cast("asyncio.Transport", transport)
        # A TLS transport of asyncio with a bound of 0 pauses and is never resumed.
        tls = transport.get_extra_info("ssl_object") is not None
        self._transport.set_write_buffer_limits(high=_TLS_WRITE_BUFFER_BYTES if tls else 0)
        if not tls and not self._transport.get_write_buffer_size():
            plain = transport.get_extra_info("socket")
            self._fd = -1 if plain is None else plain.fileno()
        self._transport.pause_reading()
        self._links.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer that all links of this loop share, behind the beginning of a frame that waits for more."""
        links, parser = self._links, self._parser
        if self.reader is None or parser.is_collecting:
            self._rest_size = 0
            return links.receive_room
        rest = parser.rest
        size = self._rest_size = len(rest) if len(rest) <= CARRY_MAX_BYTES else 0
        if not size:
            return links.whole_receive_room
        links.receive_buffer[:size] = rest
        return links.receive_buffer[size : size + WHOLE_RECEIVE_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what came."""
        links, size = self._links, self._rest_size
        if self.reader is None or not self._begun or self._no_more or len(self._parser.rest) != size:
            self._feed(bytes(links.receive_buffer[size : size + nbytes]))
            return
        self.heard = True
        links.counters.bytes_in += nbytes
        self._receive(self._parser.feed_buffer(links.receive_buffer, size + nbytes))

    def eof_received(self) -> None:
        """The peer says nothing more: asyncio closes the transport."""

    def pause_writing(self) -> None:
        """The kernel's buffer is full."""
        self.blocked = True
        self._links.liveness.blocked(self)

    def resume_writing(self) -> None:
        """The kernel took what the transport held."""
        self.flushed += self._in_transport
        self._in_transport = 0
        self.blocked = False
        self._links.liveness.unblocked(self)
        self._writer.mark(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, and its number may be another's from now on."""
        self._fd = -1
        self._lost()

    # ── the link's side ──

    def _hand(self, pieces: list[bytes | memoryview], taken: int = 0) -> None:
        if self._transport.is_closing():
            self._pieces.clear()
            return
        # The transport holds nothing now: with a bound of 0 it pauses with the first byte it keeps, and what is blocked
        # is not handed anything. It closes the socket only after `is_closing` is true. So the detour over it can be
        # left out; it gets what the kernel does not take, and finds out itself what is wrong.
        count = len(pieces)
        data: bytes | memoryview = b""
        if taken:
            data = b"".join(pieces)
            size = len(data)
        elif count == 1 or self._fd < 0 or self.enqueued - self.flushed < GATHER_BYTES * count or count > GATHERED_MAX:
            data = pieces[0] if count == 1 else b"".join(pieces)
            size = len(data)
            if self._fd >= 0:
                try:
                    taken = os.write(self._fd, data)
                except OSError:
                    taken = 0
        else:
            size = sum(map(len, pieces))
            try:
                taken = os.writev(self._fd, pieces)
            except OSError:
                taken = 0
        if taken < size:
            self._transport.write(memoryview(data or b"".join(pieces))[taken:])
        if self.blocked:
            self._in_transport = min(size, self._transport.get_write_buffer_size())
        self.flushed += size - self._in_transport
        counters = self._links.counters
        counters.writes += 1
        counters.bytes_out += size

    def progress(self) -> int:
        """Return `flushed`, after asking the transport what it still holds."""
        if self.blocked and self._in_transport:
            left = min(self._in_transport, self._transport.get_write_buffer_size())
            self.flushed += self._in_transport - left
            self._in_transport = left
        return self.flushed

    def _pause_transport(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _resume_transport(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _finish_writing(self) -> None:
        # With bytes of the peer unread, close() would reset the connection and the peer might never see our
        # close frame. So: half-close, read on, and go when the peer does (or the close timeout ends).
        if self._transport.is_closing():
            return
        if self._mask is None and self._transport.can_write_eof():
            self._transport.write_eof()
        elif self._parser.violation is not None:
            self._transport.close()

    def _abort_transport(self) -> None:
        self._transport.abort()


if native.Writer is not None:
    native.know_socket(
        SocketLink, LinkLimits, LoopLinks, LinkCounters, FrameParser, SocketLink.get_buffer, SocketLink.buffer_updated
    )
    SocketLink.get_buffer = native.get_buffer  # type: ignore[method-assign, assignment]
    SocketLink.buffer_updated = native.buffer_updated  # type: ignore[method-assign, assignment]
