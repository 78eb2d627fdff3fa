"""What both kinds of link share: one bounded outbox, the frame loop, the close handshake.

    OPEN ── close(), a violation, the peer's close frame ──▸ CLOSING ── socket gone ──▸ GONE

While CLOSING the outbox is still written, and nothing a peer says is looked at but its close frame. No
callback of a receiver is ever made from inside `Link.send`, `Link.close` or `Link.abort`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Protocol

from broker.links.end import CLOSING, GONE, OPEN, SLOW_CONSUMER, LinkEnd, Receiver
from broker.links.limits import UNSPLIT_BYTES, LinkCounters, LinkLimits
from broker.wire import native
from broker.wire.frames import (
    BINARY,
    BROKEN,
    CLOSE,
    PING,
    PONG,
    TEXT,
    FrameParser,
    close_payload,
    frame_header,
    masked_frame,
    masked_header,
    parse_close,
)

if TYPE_CHECKING:
    import asyncio

    from broker.links.loop import LoopLinks

TOO_MANY = 4429

READING_S = 1.0
_LINKS_PER_SLICE = 128
_PING_FRAME = frame_header(PING, 0)


class Flushed(Protocol):
    """What a writer writes."""

    dirty: bool

    def flush(self) -> None:
        """Write what has gathered, as far as this turn's bound goes."""


class Writer:
    """Writes what has gathered in the outboxes of one loop: once per loop turn, one write per link.

    A turn writes at most `LinkLimits.write_turn_bytes` per link and looks at 128 links; the rest follows in
    the next turn, after the loop has looked at its other work.
    """

    __slots__ = ("_counters", "_dirty", "_flush_link", "_loop", "_scheduled")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        counters: LinkCounters | None = None,
        flush_link: Callable[[Flushed], int | None] = methodcaller("flush"),
    ) -> None:
        """Make one; `flush_link` flushes and returns the bytes that are to be counted here."""
        self._loop = loop
        self._counters = counters or LinkCounters()
        self._flush_link = flush_link
        self._dirty: list[Flushed] = []
        self._scheduled = False

    def mark(self, link: Flushed) -> None:
        """Have a link flushed at the end of this loop turn."""
        if not link.dirty:
            if not self._scheduled:  # first, so that a loop that has no room for it leaves nothing half done
                self._loop.call_soon(self._flush)
                self._scheduled = True
            self._dirty.append(link)
            link.dirty = True

    def _flush(self) -> None:
        links, self._dirty = self._dirty, []
        if len(links) > _LINKS_PER_SLICE:
            self._dirty = links[_LINKS_PER_SLICE:]
            del links[_LINKS_PER_SLICE:]
            self._loop.call_soon(self._flush)
        else:
            self._scheduled = False
        flush_link = self._flush_link
        flushed = writes = written = 0
        try:
            for link in links:
                flushed += 1
                if size := flush_link(link):
                    writes += 1
                    written += size
        finally:
            self._counters.writes += writes
            self._counters.bytes_out += written
            if flushed < len(links):
                self.mark_again(links[flushed:])

    def mark_again(self, links: list[Flushed]) -> None:
        """An exception that ends programs came through before they were flushed; this one may go on."""
        for link in links:
            link.dirty = False
            self.mark(link)


class Link(LinkEnd):
    """One WebSocket connection after its handshake, at either end.

    Not thread-safe: everything is called on the event loop. Nothing raises because a connection is gone:
    what is sent then is dropped, and `Receiver.closed` tells once.
    """

    __slots__ = (
        "_begun",
        "_early",
        "_ended_early",
        "_hard_bytes",
        "_holding",
        "_mask",
        "_no_more",
        "_parser",
        "_pieces",
        "_ping_count",
        "_ping_second",
        "_read_at",
        "_read_mark",
        "_writer",
        "blocked",
        "heard",
        "heard_at",
        "pinged_at",
    )

    turn_bytes: int

    def __init__(
        self,
        links: LoopLinks,
        *,
        client: bool = False,
        remote: str = "",
        early: bytes = b"",
        limits: LinkLimits | None = None,
    ) -> None:
        super().__init__(links, limits or links.limits, remote)
        self._writer = links.writer
        self.reader = reader = links.new_reader(masked=not client, limits=self._limits)
        self._parser = FrameParser(
            masked=not client,
            unmask=links.unmask,
            message_max_bytes=self._limits.message_max_bytes,
            fragments_max=self._limits.fragments_max,
            reader=reader,
        )
        self._mask: Callable[[], bytes] | None = links.next_mask if client else None
        self._begun = False  # the turn after `start` has come
        self._early = early  # bytes that came before it
        self._ended_early = False
        self._pieces: list[bytes | memoryview] = []  # a memoryview is the middle of a frame
        self._hard_bytes = self._limits.outbox_hard_bytes
        self._read_mark = 0  # `flushed` when it was last seen to grow, above the hard bound
        self._read_at = 0.0
        self._no_more = False  # nothing that the peer still sends means anything
        self._holding = False  # events wait in the parser for the next loop turn
        self._ping_count, self._ping_second = 0, 0
        self.blocked = False
        self.heard = False
        self.heard_at = 0.0
        self.pinged_at = 0.0

    def new_writer(self, prefix: bytes, endpoint: str, meta: bool) -> native.Writer | None:
        """What writes plain messages into the outbox in C; None where nothing is read in C."""
        if self.reader is None or self._mask is not None:
            return None
        return native.Writer(prefix, endpoint, self, self._writer, self._limits.outbox_soft_bytes, meta)

    # ── what the owner calls ──

    def start(self, receiver: Receiver) -> None:
        """Begin to read; ``receiver`` gets everything, also what came before. Once per link."""
        if self._started:
            raise RuntimeError(f"{self!r} was started before")
        self._started = True
        self._receiver = receiver
        self._loop.call_soon(self._begin)

    def open_with(self, response: bytes) -> None:
        """Queue what comes before all frames: the server's part of the handshake."""
        self.push(response)

    def send(self, payload: bytes | memoryview, binary: bool = False) -> None:
        """Queue one whole message; text must be UTF-8. Joined with others of this loop turn."""
        opcode = BINARY if binary else TEXT
        size = len(payload)
        if self._mask is not None or size > UNSPLIT_BYTES:
            self._send_split(opcode, (payload,), size)
        else:
            self.push(frame_header(opcode, size) + payload)

    def send_parts(self, parts: list[bytes | memoryview], binary: bool = False) -> None:
        """Queue one whole message that is given in pieces, without joining them first. The list is used up."""
        if len(parts) == 1:
            self.send(parts[0], binary)
            return
        size = 0
        for part in parts:
            size += len(part)
        opcode = BINARY if binary else TEXT
        if self._mask is not None or size > UNSPLIT_BYTES:
            self._send_split(opcode, parts, size)
        else:
            parts.insert(0, frame_header(opcode, size))
            self.push(b"".join(parts))

    def send_frame(self, frame: bytes) -> bool:
        """Queue a broadcast: a whole unmasked frame that was built once for all listeners.

        Returns False, and counts, when it was dropped: the outbox is above its soft bound or the link is not
        open. Raises ValueError at a client's end, whose frames are masked.
        """
        if self._mask is not None:
            raise ValueError("a client's frames are masked one by one, send() does it")
        if self._state or self.enqueued - self.flushed > self._limits.outbox_soft_bytes:
            self.broadcasts_dropped += 1
            self._links.counters.broadcasts_dropped += 1
            return False
        if len(frame) > UNSPLIT_BYTES + 10:
            return self._accept([frame[:UNSPLIT_BYTES], memoryview(frame)[UNSPLIT_BYTES:]], len(frame))
        return self.push(frame)

    def pause_reading(self) -> None:
        """Stop reading; at most 512 messages that were already parsed still come."""
        if not self.paused and self._state == OPEN:
            self.paused = True
            self._pause_transport()

    def resume_reading(self) -> None:
        """Read on after `pause_reading`."""
        if self.paused:
            self.paused = False
            if self._holding:
                self._loop.call_soon(self._continue)
            elif self._begun:
                self._loop.call_soon(self._read_on)

    def close(self, code: int, reason: str = "") -> None:
        """Write what is queued, then a close frame, and wait at most `close_timeout_s` for the answer.

        Messages that still come are not looked at. A second call does nothing. Raises ValueError for a code
        that must not be sent.
        """
        if self._state != OPEN:
            return
        self._code, self._reason = code, reason
        self._enter_closing(close_payload(code, reason))

    def abort(self, code: int = BROKEN, reason: str = "") -> None:
        """Drop the connection at once, with what is queued; the receiver is told ``code``."""
        if self._state == GONE:
            return
        if self._state == OPEN:
            self._code, self._reason = code, reason
            self._state = CLOSING
        self._pieces.clear()
        if self._ended_early:
            self._loop.call_soon(self._end)
        else:
            self._abort_transport()

    # ── the outbox ──

    def _send_split(self, opcode: int, parts: Sequence[bytes | memoryview], size: int) -> None:
        if self._state:
            return
        if self._mask is None:
            header = frame_header(opcode, size)
            self._accept([header, *(memoryview(part) for part in parts if part)], len(header) + size)
            return
        mask, unmask = self._mask(), self._links.unmask
        payload = b"".join(parts)
        if size <= UNSPLIT_BYTES:
            self.push(masked_frame(opcode, payload, mask, unmask))
            return
        # Masking in pieces stays in the processor's cache: six times faster for 16 MiB than in one go.
        header = masked_header(opcode, size, mask)
        step = 1 << 18
        masked = [memoryview(unmask(mask, payload[at : at + step])) for at in range(0, size, step)]
        self._accept([header, *masked], len(header) + size)

    def push(self, piece: bytes) -> bool:
        """Queue what is a whole unmasked frame already."""
        if self._state:
            return False
        size = len(piece)
        if self.enqueued - self.flushed + size > self._hard_bytes and not self._make_room(size):
            return False
        self.enqueued += size
        self._pieces.append(piece)
        if not self.dirty:
            self._writer.mark(self)
        return True

    def _accept(self, pieces: list[bytes | memoryview], size: int) -> bool:
        if self._state:
            return False
        if self.enqueued - self.flushed + size > self._hard_bytes and not self._make_room(size):
            return False
        self.enqueued += size
        self._pieces += pieces
        self._writer.mark(self)
        return True

    def _make_room(self, size: int) -> bool:
        """At the hard bound the kernel is asked first; who then has no room for more is a slow consumer."""
        while self._pieces and not self.blocked:
            self._hand(self._cut())
        self.progress()
        waiting = self.enqueued - self.flushed
        if not waiting:
            # A message larger than the bound stands alone, with room for the ordinary bound behind it.
            self._hard_bytes = max(self._hard_bytes, size + self._limits.outbox_hard_bytes)
        if waiting + size <= self._hard_bytes:
            return True
        if waiting + size <= self._limits.outbox_reading_bytes and self._is_reading():
            return True
        self.slow(f"{waiting} bytes wait in the outbox, and {size} more came")
        return False

    def _is_reading(self) -> bool:
        """Whether the kernel has taken something within the last second: large messages may then coincide."""
        now = self._loop.time()
        if self.flushed != self._read_mark:
            self._read_mark, self._read_at = self.flushed, now
        return now - self._read_at < READING_S

    def flush(self, taken: int = 0) -> None:
        """Hand what is queued to the kernel, as far as this turn's bound goes. The writer calls it.

        With `taken`, all that is queued is within that bound, and so many bytes of it have been written already.
        """
        self.dirty = False
        if self._state == GONE:
            return
        if self._pieces and not self.blocked:
            if self.enqueued - self.flushed <= self.turn_bytes:
                pieces, self._pieces = self._pieces, []
            else:
                pieces = self._cut()
            self._hand(pieces, taken)
            if self._pieces and not self.blocked:
                self._writer.mark(self)
        waiting = self.enqueued - self.flushed
        if waiting <= self._limits.outbox_soft_bytes // 2:
            self._hard_bytes = self._limits.outbox_hard_bytes
        self._watch_bounds(waiting)
        if self._state == CLOSING and self.enqueued == self.flushed:
            self._drained()

    def _cut(self) -> list[bytes | memoryview]:
        """Take the front of the queue, at most one turn's bytes; only the middle of large frames is split."""
        room = self.turn_bytes
        pieces = self._pieces
        taken: list[bytes | memoryview] = []
        whole = 0
        for piece in pieces:
            if len(piece) > room:
                if isinstance(piece, memoryview) and room:
                    taken.append(piece[:room])
                    pieces[whole] = piece[room:]
                break
            taken.append(piece)
            room -= len(piece)
            whole += 1
        del pieces[:whole]
        return taken

    def slow(self, reason: str) -> None:
        """Close as a slow consumer: what waits is dropped, all but the frame being written."""
        if self._state == GONE:
            return
        self._links.counters.slow_closes += 1
        if self._state == CLOSING:
            self._abort_transport()
            return
        self._code, self._reason = SLOW_CONSUMER, reason
        split = 0
        while split < len(self._pieces) and isinstance(self._pieces[split], memoryview):
            split += 1
        dropped = sum(map(len, self._pieces[split:]))
        del self._pieces[split:]
        self.enqueued -= dropped
        self._enter_closing(close_payload(SLOW_CONSUMER, "slow consumer"))
        self._loop.call_soon(self._report)

    def progress(self) -> int:
        """Return `flushed`, brought up to date with what the kernel has taken of a blocked write."""
        return self.flushed

    # ── the frame loop ──

    def _begin(self) -> None:
        """First turn after `start`."""
        self._begun = True
        if self._state == GONE:
            self._end()
        else:
            self._read_on()

    def _read_on(self) -> None:
        """Hear what waits here, then what the transport brings; if that is gone already, it was all."""
        while self._early and not self._holding and not self.paused:
            early, self._early = self._early, b""
            self._feed(early)
        if self._holding or self._early or self._state == GONE:
            return
        if self._ended_early:
            self._end()
        elif not self.paused:
            self._resume_transport()

    def _feed(self, data: bytes) -> None:
        """Take a chunk from the transport."""
        self.heard = True
        self._links.counters.bytes_in += len(data)
        if self._no_more:
            return
        if not self._begun:
            self._early += data
            self._pause_transport()
            return
        self._receive(self._parser.feed(data))

    def _receive(self, events: list[Any]) -> None:
        """Give the receiver what the parser made of a chunk: tuples, or what was decoded in C already."""
        parser = self._parser
        self._links.counters.frames_in += len(events)
        receiver: Any = self._receiver
        decoded: list[Any] = []  # a run of what was
        try:
            for event in events:
                if type(event) is not tuple:
                    decoded.append(event)
                    continue
                if decoded:
                    if self._state == OPEN:
                        receiver.decoded(decoded)
                    decoded = []
                opcode, payload = event
                if opcode <= BINARY:
                    if self._state == OPEN:
                        receiver.message(payload, opcode == BINARY)
                elif opcode == PING:
                    self._pinged(payload)
                elif opcode == CLOSE:
                    self._peer_closes(payload)
            if decoded and self._state == OPEN:
                receiver.decoded(decoded)
        except Exception:
            self._receiver_failed()
        if parser.violation is not None and not self._no_more:
            self._violated(*parser.violation)
        elif parser.more and not self._holding:
            self._holding = True
            self._pause_transport()
            self._loop.call_soon(self._continue)

    def decoding_failed(self, error: Exception) -> None:
        """The receiver raised this when it was given what was decoded: the link ends."""
        try:
            raise error
        except Exception:
            self._receiver_failed()

    def _continue(self) -> None:
        """Parse on where the last turn stopped for fairness."""
        if self.paused or self._state == GONE or not self._holding:
            return
        self._holding = False
        self._feed(b"")
        self._read_on()

    def _pinged(self, payload: bytes) -> None:
        self.pinged_at = self._loop.time()
        second = int(self.pinged_at)
        if second != self._ping_second:
            self._ping_second, self._ping_count = second, 0
        self._ping_count += 1
        if self._ping_count > self._limits.pings_per_s_max:
            if self._state == OPEN:
                self._links.counters.ping_floods += 1
                self.close(TOO_MANY, f"more than {self._limits.pings_per_s_max} pings in a second")
        elif self.enqueued - self.flushed > self._limits.outbox_soft_bytes:
            self._links.counters.pongs_dropped += 1
        else:
            self.push(self._control_frame(PONG, payload))

    def ping(self) -> None:
        """Queue a ping; `heard` tells whether anything came."""
        self.push(self._control_frame(PING, b"") if self._mask else _PING_FRAME)

    def _control_frame(self, opcode: int, payload: bytes) -> bytes:
        if self._mask is not None:
            return masked_frame(opcode, payload, self._mask(), self._links.unmask)
        return frame_header(opcode, len(payload)) + payload

    # ── the end ──

    def _enter_closing(self, payload: bytes) -> None:
        self._state = CLOSING
        frame = self._control_frame(CLOSE, payload)
        self.enqueued += len(frame)
        self._pieces.append(frame)
        self._writer.mark(self)
        self._links.liveness.closing(self)
        if self.paused:
            self.resume_reading()

    def _peer_closes(self, payload: bytes) -> None:
        """Answer the peer's close frame with its own code, or take it as the answer to ours (5.5.1)."""
        self._no_more = True
        if self._state == OPEN:
            self._code, self._reason = parse_close(payload)
            self._enter_closing(payload[:2])
        else:
            self._writer.mark(self)
        self._report()

    def _violated(self, code: int, reason: str) -> None:
        """Tell the peer what it did against the RFC; nothing it sends is understood any more (7.1.7)."""
        self._links.counters.protocol_errors += 1
        self._no_more = True
        if self._state == OPEN:
            self._code, self._reason = code, reason
            self._enter_closing(close_payload(code, reason))
        else:
            self._writer.mark(self)
        self._report()

    def _drained(self) -> None:
        """Everything is written, our close frame last. If nothing is left to hear, we go (7.1.1)."""
        if self._no_more:
            self._finish_writing()

    def _lost(self) -> None:
        """The transport is gone, however it came to it."""
        if self._state == OPEN and (self._holding or self._early or not self._begun):
            self._ended_early = True  # what came before is still to be heard
        else:
            self._end()

    def _end(self) -> None:
        if self._state != GONE:
            self._state = GONE
            self._pieces.clear()
            self._early = b""
            self._links.count(-self._counted)
            self._counted = 0
            self._links.forget(self)
        if self._begun:
            self._report()

    # ── what a kind of link does in its own way ──

    def _hand(self, pieces: list[bytes | memoryview], taken: int = 0) -> None:
        """Give bytes to the transport; set `blocked` if it did not take all, count `flushed`.

        Of a socket the first `taken` have been written already.
        """
        raise NotImplementedError

    def _pause_transport(self) -> None:
        raise NotImplementedError

    def _resume_transport(self) -> None:
        raise NotImplementedError

    def _finish_writing(self) -> None:
        """Nothing more will be written or understood: let the peer see the end."""
        raise NotImplementedError

    def _abort_transport(self) -> None:
        raise NotImplementedError


if native.Writer is not None:
    native.know_outbox(Link, Writer, Writer._flush, _LINKS_PER_SLICE)
    Writer._flush = native.flush_all  # type: ignore[method-assign, assignment]
