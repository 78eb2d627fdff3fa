"""Two ends of a link in one process: no socket, no frames, the same bounds and the same callbacks as a WebSocket.

What one end sends reaches the receiver of the other in the next turn of the loop, together with all that has gathered
until then (`Writer`). Like `Link`, no end ever calls a receiver from inside `send`, `close` or `abort`, and nothing
raises because the other end is gone. Broadcasts come as the frame that all listeners share; its header is taken off.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypeAlias

from broker.links.end import CLOSING, GONE, OPEN, SLOW_CONSUMER, LinkEnd, Receiver
from broker.links.link import Link
from broker.links.zeromq import ZmqLink
from broker.wire.frames import BINARY, BROKEN, TOO_BIG

if TYPE_CHECKING:
    import asyncio

    from broker.links.loop import LoopLinks


def make_pair(here: LoopLinks, there: LoopLinks, *, remote: str = "in process") -> tuple[PairLink, PairLink]:
    """Both ends of one link, each with the bounds of its own links; `close` of either closes it.

    Raises ValueError if they do not turn on the same event loop.
    """
    if here.loop is not there.loop:
        raise ValueError("both ends of a pair belong to one event loop")
    ends = PairLink(here, remote), PairLink(there, remote)
    ends[0].other, ends[1].other = ends[1], ends[0]
    for end in ends:
        end._links.join(end)
    return ends


class PairLink(LinkEnd):
    """One end. `enqueued` counts the bytes it has been given, `flushed` those that reached the other end's receiver."""

    __slots__ = ("_close_timer", "_outbox", "other")

    other: PairLink

    def __init__(self, links: LoopLinks, remote: str) -> None:
        super().__init__(links, links.limits, remote)
        self._outbox: deque[tuple[bytes, bool]] = deque()
        self._close_timer: asyncio.TimerHandle | None = None
        self.subprotocol = "jsonrpc"

    # ── what the owner calls ──

    def start(self, receiver: Receiver) -> None:
        """Begin to read; ``receiver`` gets everything, also what came before. Once per end."""
        if self._started:
            raise RuntimeError(f"{self!r} was started before")
        self._started = True
        self._receiver = receiver
        if self._state == GONE:
            self._loop.call_soon(self._part)
        else:
            self.other._mark()

    def send(self, payload: bytes | memoryview, binary: bool = False) -> None:
        """Queue one whole message. Joined with others of this loop turn."""
        if self._state:
            return
        waiting, size = self.enqueued - self.flushed, len(payload)
        if waiting and waiting + size > self._bound_bytes:
            self._links.counters.slow_closes += 1
            self._end(SLOW_CONSUMER, f"{waiting} bytes wait in the outbox, and {size} more came")
            return
        self.enqueued += size
        self._outbox.append((bytes(payload), binary))
        if not self.dirty:
            self._links.writer.mark(self)

    def send_parts(self, parts: list[bytes | memoryview], binary: bool = False) -> None:
        """Queue one whole message that is given in pieces."""
        self.send(parts[0] if len(parts) == 1 else b"".join(parts), binary)

    def send_frame(self, frame: bytes) -> bool:
        """Queue an unmasked frame that was built once for all listeners. False if a bound dropped it."""
        if self._state or self.enqueued - self.flushed > self._limits.outbox_soft_bytes:
            self.broadcasts_dropped += 1
            self._links.counters.broadcasts_dropped += 1
            return False
        short = frame[1]  # RFC 6455, section 5.2: the length itself, or 126 and two bytes, or 127 and eight
        self.send(frame[2 if short < 126 else 4 if short == 126 else 10 :], frame[0] & 0x0F == BINARY)
        return True

    def pause_reading(self) -> None:
        """Take no more from the other end until `resume_reading`."""
        self.paused = True

    def resume_reading(self) -> None:
        """Take it again."""
        if self.paused:
            self.paused = False
            self.other._mark()

    def close(self, code: int, reason: str = "") -> None:
        """Hand over what is queued, for at most `close_timeout_s`, then end. What still comes is not looked at."""
        if self._state == OPEN:
            self._state, self._code, self._reason = CLOSING, code, reason
            self.paused = False
            self._mark()

    def abort(self, code: int = BROKEN, reason: str = "") -> None:
        """End at once, with what is queued; both receivers are told ``code``."""
        if self._state == CLOSING:
            code, reason = self._code, self._reason
        self._end(code, reason)

    # ── from one end to the other ──

    @property
    def _bound_bytes(self) -> int:
        """What may wait here: who takes what comes does so in the next turn, however much falls to them in one."""
        takes = self.other._started and not self.other.paused
        return self._limits.outbox_reading_bytes if takes else self._limits.outbox_hard_bytes

    def _mark(self) -> None:
        if self._state != GONE:
            self._links.writer.mark(self)

    def flush(self) -> None:
        """Give the other end what has gathered, about one turn's bytes. The writer calls it."""
        self.dirty = False
        outbox, other = self._outbox, self.other
        room = self._limits.write_turn_bytes
        while outbox and room > 0 and other._started and not other.paused:
            payload, binary = outbox.popleft()
            self.flushed += len(payload)
            room -= len(payload)
            if other._state == OPEN:
                other._take(payload, binary)
        if self._state == GONE:
            return
        if outbox and room <= 0:
            self._mark()
        self._watch_bounds(self.enqueued - self.flushed)
        if self._state == CLOSING:
            self._close_on()

    def _take(self, payload: bytes, binary: bool) -> None:
        """One message from the other end."""
        if len(payload) > self._limits.message_max_bytes:
            self._links.counters.protocol_errors += 1
            self.close(TOO_BIG, f"a message of {len(payload)} bytes is above the bound")
            return
        try:
            self._receiver.message(payload, binary)
        except Exception:
            self._receiver_failed()

    # ── the end ──

    def _close_on(self) -> None:
        """What is queued has been handed over, or is waited for."""
        if not self._outbox or self.other._state != OPEN:
            self._end(self._code, self._reason)
        elif self._close_timer is None:
            self._close_timer = self._loop.call_later(self._limits.close_timeout_s, self.abort)

    def _end(self, code: int, reason: str) -> None:
        """Both ends are gone; each receiver is told in the next turn, once."""
        for end in (self, self.other):
            if end._state != GONE:
                end._state, end._code, end._reason = GONE, code, reason
                end._outbox.clear()
                if end._close_timer is not None:
                    end._close_timer.cancel()
                    end._close_timer = None
                end._links.count(-end._counted)
                end._counted = 0
                self._loop.call_soon(end._part)

    def _part(self) -> None:
        self._links.part(self)
        if self._started:
            self._report()


AnyLink: TypeAlias = Link | PairLink | ZmqLink
"""What a peer talks over: a WebSocket, an end of a pair, or ZeroMQ."""
