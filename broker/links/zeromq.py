"""One peer over ZeroMQ, at either end: what a WebSocket is elsewhere. A carrier has the socket and writes for it.

What `Link` promises holds here too: bounded outbox, `congested`, `closed` exactly once, no callback of the receiver
from inside `send`, `close` or `abort`, nothing raised because the other end is gone. Heartbeats are ZeroMQ's own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from broker.core.messages import Call
from broker.links.end import CLOSING, GONE, OPEN, SLOW_CONSUMER, LinkEnd, Receiver
from broker.links.link import READING_S, TOO_MANY
from broker.wire.attachments import ATTACHMENTS_MAX, pack, unpack_pieces
from broker.wire.frames import BROKEN, TOO_BIG
from broker.wire.multipart import Frame, Multipart, MultipartError, is_reply, parent_of_answer
from broker.wire.multipart_plain import PlainReader, PlainWriter
from broker.wire.session import DELIMITER
from broker.wire.signature import History, keyed, sign, verify

if TYPE_CHECKING:
    import asyncio

    from broker.links.loop import LoopLinks

SENT, FULL, UNREACHABLE = 0, 1, 2
"""what became of a message that was given to a socket"""
DATE_S = 1.0
"""how old the date in a header may be: making one anew for each costs 2 µs"""
PLAIN_MAX = 65_536
"""bytes of a message up to which it may be read without JSON-RPC in between"""
ASIDE_MAX = 1000
"""requests of one peer whose answers go over another socket than its own"""
LEAST_BYTES = 500
"""what a message counts for in an inbox beside its bytes: 410 bytes of objects for six short frames"""


class Seal:
    """The key that signs the messages of a door, and the signatures it has accepted."""

    __slots__ = ("_mac", "history")

    def __init__(self, key: bytes, scheme: str) -> None:
        self._mac = keyed(key, scheme)
        self.history = History()

    def sign(self, frames: list[Frame]) -> list[Frame]:
        """A whole message: delimiter, signature, the frames."""
        return [DELIMITER, sign(self._mac, frames[:4]), *frames]

    def check(self, signature: bytes, frames: list[Frame]) -> None:
        """See that this signature is the four frames', and new. Raises SignatureError; a refusal leaves no trace."""
        if self._mac is not None:
            verify(self._mac, signature, frames)
            self.history.check(signature)
            self.history.remember(signature)


class Carrier(Protocol):
    """Who writes for a link."""

    def send(self, link: ZmqLink, frames: list[Frame]) -> int:
        """Give the socket one message: SENT, FULL (there is no room for this peer now) or UNREACHABLE."""
        ...

    def blocked(self, link: ZmqLink) -> None:
        """Flush this link again when there may be room."""

    def ended(self, link: ZmqLink, broken: bool) -> None:
        """The link is no more; `broken` if the other end was not told so."""


class Writer:
    """Writes the plain messages of one link, as `broker.wire.native.Writer` does for a WebSocket."""

    __slots__ = ("_link", "_plain")

    def __init__(self, link: ZmqLink, plain: PlainWriter) -> None:
        self._link = link
        self._plain = plain

    def write(self, message: object, n: int = 0) -> bool:
        """Send a plain call or result; False if that is left to the caller: it is not plain, or there is no room."""
        link = self._link
        if n or not link.is_open or (type(message) is Call and link.is_crowded()):
            return False
        frames = self._plain.frames(message)
        if frames is None:
            return False
        link.push(frames)
        if type(message) is Call:
            message.attempt.mark = link.enqueued
        return True


class ZmqLink(LinkEnd):
    """One peer. `enqueued` counts the bytes it was given, `flushed` those that the socket has taken.

    The socket's own queue is short (`SEND_QUEUE_MAX`), so that the outbox is where messages wait; large ones count
    until the socket has let go of them.
    """

    __slots__ = (
        "_aside", "_carrier", "_close_timer", "_codec", "_date_at", "_inbox", "_inbox_bytes", "_outbox", "_plain",
        "_read_at", "_read_mark", "_seal", "_session", "_username", "on_bad", "route", "since", "tracked",
    )  # fmt: skip

    def __init__(
        self, links: LoopLinks, carrier: Carrier, seal: Seal, *, session: str, username: str = "", remote: str = "",
        route: tuple[bytes, ...] = (), numbers: bool = False, reader: PlainReader | None = None,
    ) -> None:  # fmt: skip
        super().__init__(links, links.limits, remote)
        self._plain = reader
        self._carrier = carrier
        self._seal = seal
        self._session, self._username = session, username
        self._codec = Multipart(session, username, numbers=numbers)
        self._date_at = float("-inf")
        self._outbox: deque[tuple[int, list[Frame]]] = deque()
        self._inbox: deque[list[Frame]] = deque()
        self._inbox_bytes = 0
        self._close_timer: asyncio.TimerHandle | None = None
        self._read_mark, self._read_at = 0, 0.0
        self._aside: dict[Frame, Callable[[list[Frame]], int]] = {}  # by the parent header of what they send
        self.tracked: deque[tuple[object, int]] = deque()  # large frames the socket may still hold
        self.since = 0.0  # when `flushed` was last seen to grow while blocked
        self.route = route
        """the identities in front of what is sent to it"""
        self.on_bad: Callable[[MultipartError], None] = lambda _: None
        """told of each message that is none of the dialect, after it was answered"""
        links.join(self)

    # ── what the owner calls ──

    @property
    def decoder(self) -> PlainReader | None:
        """What makes events of its common messages; None at the end of an SDK."""
        return self._plain

    def new_writer(self, prefix: bytes, endpoint: str, meta: bool) -> Writer | None:
        """What writes the common messages without JSON-RPC in between; `send_parts` is for those it leaves."""
        return None if self._plain is None else Writer(self, PlainWriter(self._codec, prefix, endpoint, meta))

    def start(self, receiver: Receiver) -> None:
        """Begin to take what comes; ``receiver`` gets all, also what came before. Once per link."""
        if self._started:
            raise RuntimeError(f"{self!r} was started before")
        self._started = True
        self._receiver = receiver
        self._loop.call_soon(self._part if self._state == GONE else self._go_on)

    def send(self, payload: bytes | memoryview, binary: bool = False) -> None:
        """Send one whole JSON-RPC message."""
        self.send_parts([payload], binary)

    def send_parts(self, parts: list[bytes | memoryview], binary: bool = False) -> None:
        """Send one whole JSON-RPC message that is given in pieces; a binary frame's as `pack` makes them."""
        if self._state:
            return
        if binary:
            text, attachments = unpack_pieces(parts)
            self.push([*self._codec.write(text), *attachments])
        else:
            self.push(self._codec.write(bytes(parts[0]) if len(parts) == 1 else b"".join(parts)))

    def send_plain(self, kind: bytes, content: object, parent: bytes = b"", metadata: object = None) -> None:
        """Send a message of the door itself: `attach_request`, `attach_reply`."""
        if not self._state:
            self.push(self._codec.plain(kind, content, parent, metadata))

    def send_frame(self, frame: bytes) -> bool:
        """Send a broadcast, given as the WebSocket frame that all listeners share. False if a bound dropped it."""
        if self._state or self.enqueued - self.flushed > self._limits.outbox_soft_bytes:
            self.broadcasts_dropped += 1
            self._links.counters.broadcasts_dropped += 1
            return False
        short = frame[1]  # RFC 6455, section 5.2: the length itself, or 126 and two bytes, or 127 and eight
        payload = frame[2 if short < 126 else 4 if short == 126 else 10 :]
        self.send(payload, frame[0] & 0x0F == 2)
        return True

    def pause_reading(self) -> None:
        """Take no more until `resume_reading`. What comes waits, up to a bound: a ROUTER cannot pause one peer."""
        self.paused = True

    def resume_reading(self) -> None:
        """Take it again."""
        if self.paused:
            self.paused = False
            self._loop.call_soon(self._go_on)

    def close(self, code: int, reason: str = "") -> None:
        """Send what is queued and why this ends, for at most `close_timeout_s`. What still comes is not looked at."""
        if self._state != OPEN:
            return
        self._state, self._code, self._reason = CLOSING, code, reason
        self.paused = False
        self._outbox.append((0, self._seal.sign(self._codec.plain(b"detach", {"code": code, "reason": reason}))))
        self._close_timer = self._loop.call_later(self._limits.close_timeout_s, self.abort)
        if not self.dirty:
            self._links.writer.mark(self)

    def abort(self, code: int = BROKEN, reason: str = "") -> None:
        """End at once, with what is queued; the receiver is told ``code``."""
        if self._state == CLOSING:
            code, reason = self._code, self._reason
        self.end(code, reason, broken=True)

    # ── what comes in, from the carrier ──

    def take(self, frames: list[Frame]) -> None:
        """One message, verified: header, parent header, metadata, content, buffers."""
        if self._state:
            return
        if not self._inbox and self._started and not self.paused:
            self._give(frames)
            return
        self._inbox.append(frames)
        self._inbox_bytes += LEAST_BYTES + sum(map(len, frames))
        if self._inbox_bytes > self._limits.outbox_hard_bytes + self._limits.message_max_bytes:
            self._links.counters.inboxes_full += 1
            self._inbox.clear()
            self.close(TOO_MANY, "too much came while nothing was read, because this peer does not read either")

    def answer_by(self, frames: list[Frame], send: Callable[[list[Frame]], int]) -> None:
        """Have what is said about this request, which came over another socket, sent there until it is answered."""
        parent = parent_of_answer(frames[0])
        if parent and len(self._aside) < ASIDE_MAX:
            self._aside[parent] = send

    def _go_on(self) -> None:
        while self._inbox and not self.paused and self._state == OPEN:
            frames = self._inbox.popleft()
            self._inbox_bytes -= LEAST_BYTES + sum(map(len, frames))
            self._give(frames)

    def _give(self, frames: list[Frame]) -> None:
        size = sum(map(len, frames))
        counters = self._links.counters
        counters.frames_in += 1
        counters.bytes_in += size
        try:
            if size > self._limits.message_max_bytes:
                self._links.counters.protocol_errors += 1
                self.close(TOO_BIG, f"a message of {size} bytes is above the bound")
                return
            if self._plain is not None and size <= PLAIN_MAX and len(frames) == 4:
                event = self._plain.read(frames)
                if event is not None:
                    self._plain.decoded_bytes += size
                    self._receiver.decoded([event])  # type: ignore[attr-defined]
                    return
            text = self._codec.read(frames)
            if not text.isascii():
                text.decode()
            if len(frames) == 4:
                self._receiver.message(text, False)
                return
            if len(frames) - 4 > ATTACHMENTS_MAX:
                raise MultipartError("malformed", f"more than {ATTACHMENTS_MAX} buffers")
            self._receiver.message(b"".join(pack([text], frames[4:])), True)
        except MultipartError as bad:
            self._refuse(bad)
        except UnicodeDecodeError as error:
            self._refuse(MultipartError("malformed", f"no UTF-8: {error}"))
        except Exception:
            self._receiver_failed()

    def _refuse(self, bad: MultipartError) -> None:
        self.push(self._codec.refusal(bad.msg_id, bad.kind, str(bad)))
        self.on_bad(bad)

    # ── the outbox ──

    def push(self, frames: list[Frame]) -> None:
        """Sign and send a message whose frames are made, while the link is open."""
        now = self._loop.time()
        if now - self._date_at > DATE_S:
            self._date_at = now
            date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self._codec.set_date(self._session, self._username, date)
        size = sum(map(len, frames))
        aside = self._send_of(frames) if self._aside else None
        frames = self._seal.sign(frames)
        if aside is not None and aside(frames) == SENT:
            return
        if not self._outbox:
            outcome = self._send(frames)
            if outcome == SENT:
                self.enqueued += size
                self.flushed += size
                return
            if outcome == UNREACHABLE:
                self.end(BROKEN, "the other end is gone", broken=False)
                return
        if not self._has_room(size):
            waiting = self.enqueued - self.flushed
            self.slow(f"{waiting} bytes wait in the outbox, and {size} more came")
            return
        self.enqueued += size
        self._outbox.append((size, frames))
        self._links.count(size)
        self._counted += size
        self._carrier.blocked(self)

    def _send_of(self, frames: list[Frame]) -> Callable[[list[Frame]], int] | None:
        """Who sends this, if it is about a request that came over another socket."""
        parent = frames[1]
        return self._aside.pop(parent, None) if is_reply(frames[0]) else self._aside.get(parent)

    def _send(self, frames: list[Frame]) -> int:
        counters = self._links.counters
        if self.tracked and self._still_held() > self._limits.outbox_soft_bytes:
            return FULL
        outcome = self._carrier.send(self, frames)
        if outcome == SENT:
            counters.writes += 1
        return outcome

    def _still_held(self) -> int:
        """Bytes of large frames that the socket has not written yet."""
        while self.tracked and self.tracked[0][0].done:  # type: ignore[attr-defined]
            self.tracked.popleft()
        return sum(size for _, size in self.tracked)

    def _has_room(self, size: int) -> bool:
        waiting = self.enqueued - self.flushed
        if not waiting or waiting + size <= self._limits.outbox_hard_bytes:
            return True  # a message larger than the bound stands alone
        return waiting + size <= self._limits.outbox_reading_bytes and self._is_reading()

    def _is_reading(self) -> bool:
        """Whether the socket has taken something within the last second: large messages may then coincide."""
        now = self._loop.time()
        if self.flushed != self._read_mark:
            self._read_mark, self._read_at = self.flushed, now
        return now - self._read_at < READING_S

    def slow(self, detail: str) -> None:
        """End a link whose reader does not keep up."""
        self._links.counters.slow_closes += 1
        self._outbox.clear()
        self.close(SLOW_CONSUMER, detail)

    @property
    def waits(self) -> bool:
        """Whether something waits for the socket to have room."""
        return bool(self._outbox)

    def flush(self) -> None:
        """Give the socket what has gathered. The carrier and the writer call it."""
        self.dirty = False
        outbox = self._outbox
        while outbox and self._state != GONE:
            outcome = self._send(outbox[0][1])
            if outcome == UNREACHABLE:
                self.end(BROKEN, "the other end is gone", broken=False)
                return
            if outcome == FULL:
                self._carrier.blocked(self)
                break
            size, _ = outbox.popleft()
            self.flushed += size
            self.since = 0.0
        if self._state == GONE:
            return
        self._watch_bounds(self.enqueued - self.flushed if self._outbox else 0)
        if self._state == CLOSING and not outbox:
            self.end(self._code, self._reason, broken=False)

    # ── the end ──

    def detached(self, code: int, reason: str) -> None:
        """The other end says that it leaves."""
        if self._state == CLOSING:
            code, reason = self._code, self._reason
        self.end(code, reason, broken=False)

    def end(self, code: int, reason: str, *, broken: bool) -> None:
        """No more; the receiver is told in the next turn, once."""
        if self._state == GONE:
            return
        self._state, self._code, self._reason = GONE, code, reason
        self._outbox.clear()
        self._inbox.clear()
        self.tracked.clear()
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        self._links.count(-self._counted)
        self._counted = 0
        self._carrier.ended(self, broken)
        self._loop.call_soon(self._part)

    def _part(self) -> None:
        self._links.part(self)
        if self._started:
            self._report()
