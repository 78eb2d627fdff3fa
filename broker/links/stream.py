"""The link over a kept tornado stream: the way under TLS, and wherever the socket cannot be taken."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, cast

from tornado.iostream import IOStream, SSLIOStream, StreamClosedError

from broker.links.end import GONE, OPEN
from broker.links.limits import LinkLimits
from broker.links.link import Link

if TYPE_CHECKING:
    from broker.links.loop import LoopLinks

_READ_BYTES = 262_144
_READS_PER_TURN = 4
_LEFT_OVER_BYTES = 1 << 30
_WRITE_BYTES = 65_536
SILENCE_S = 0.1
"""nothing comes for so long from who broke the protocol under TLS: it has seen our close frame, or never will"""


class StreamLink(Link):
    """A link over an `IOStream` or `SSLIOStream` that tornado's HTTP server has let go of.

    At most one write is outstanding, at most 64 KiB of it (so that progress can be seen), and its result is
    always looked at. At most one read is outstanding.
    """

    __slots__ = ("_finished", "_reading", "_silent", "_stream", "_writing_bytes", "turn_bytes")

    def __init__(
        self,
        links: LoopLinks,
        stream: IOStream,
        *,
        remote: str = "",
        early: bytes = b"",
        limits: LinkLimits | None = None,
    ) -> None:
        super().__init__(links, remote=remote, early=early, limits=limits)
        self.turn_bytes = min(_WRITE_BYTES, self._limits.write_turn_bytes)
        self._stream = stream
        self._reading = False
        self._finished = False
        self._silent = False
        self._writing_bytes = 0
        links.add(self)
        stream.set_close_callback(self._lost)

    def adopt(self, reading: asyncio.Future[bytes]) -> None:
        """Take over a read that was begun before the link existed."""
        self._reading = True
        reading.add_done_callback(self._arrived)

    # ── reading ──

    def _pause_transport(self) -> None:
        pass  # no further read is begun; what an outstanding one brings is kept in `_early`

    def _resume_transport(self) -> None:
        self._read()

    def _may_read(self) -> bool:
        waits = self.paused or self._holding or self._early  # what came before is heard first
        return self._begun and self._state != GONE and not waits

    def _read(self) -> None:
        """Begin reads until one has to wait; the loop gets a turn after a few that did not."""
        for _ in range(_READS_PER_TURN):
            if self._reading or not self._may_read():
                return
            try:
                future = cast("asyncio.Future[bytes]", self._stream.read_bytes(_READ_BYTES, partial=True))
            except StreamClosedError:
                return
            if not future.done():
                self._reading = True
                future.add_done_callback(self._arrived)
                return
            if not self._take(future):
                return
        self._loop.call_soon(self._read)

    def _arrived(self, future: asyncio.Future[bytes]) -> None:
        self._reading = False
        if self._take(future):
            self._read()

    def _take(self, future: asyncio.Future[bytes]) -> bool:
        self._silent = False
        if future.cancelled() or future.exception() is not None:
            return False  # the stream's close callback tells
        if self._may_read():
            self._feed(future.result())
        else:
            self.heard = True
            self._early += future.result()
        return True

    # ── writing ──

    def _hand(self, pieces: list[bytes | memoryview], taken: int = 0) -> None:
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        size = len(data)
        counters = self._links.counters
        counters.writes += 1
        counters.bytes_out += size
        try:
            future = self._stream.write(data)
        except StreamClosedError:
            self._pieces.clear()
            return
        if future.done():
            if future.exception() is None:
                self.flushed += size
            return
        self.blocked = True
        self._writing_bytes = size
        self._links.liveness.blocked(self)
        future.add_done_callback(self._written)

    def _written(self, future: asyncio.Future[None]) -> None:
        self.blocked = False
        self._links.liveness.unblocked(self)
        if not future.cancelled() and future.exception() is None:
            self.flushed += self._writing_bytes
            self._writer.mark(self)

    # ── the end ──

    def _lost(self) -> None:
        if self._state == OPEN:
            self._early += self._left_over()
        super()._lost()
        if self._ended_early and self._begun:
            self._read_on()

    def _left_over(self) -> bytes:
        """Return what tornado read ahead of us to see whether the peer is still there."""
        try:
            future = cast("asyncio.Future[bytes]", self._stream.read_bytes(_LEFT_OVER_BYTES, partial=True))
        except StreamClosedError:
            return b""
        return future.result()

    def _finish_writing(self) -> None:
        if self._finished:
            return
        self._finished = True
        if not isinstance(self._stream, SSLIOStream):
            # As in SocketLink: half-close and read on, so that no reset overtakes our close frame.
            try:
                self._stream.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._stream.close()
        elif self._parser.violation is None:
            self._stream.close()
        else:
            # TLS has no half-close. After a violation the peer may still be sending, and closing now could reset the
            # connection before it has read our close frame: it goes, falls silent, or the close timeout ends.
            self._silent = False
            self._leave_when_silent()

    def _leave_when_silent(self) -> None:
        if self._silent:
            self._stream.close()
        elif self._state != GONE:
            self._silent = True
            self._loop.call_later(SILENCE_S, self._leave_when_silent)

    def _abort_transport(self) -> None:
        self._stream.close()
