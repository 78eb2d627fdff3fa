"""A WebSocket peer: its link on one side, its session in the router on the other, the codec between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from broker.core.errors import DUPLICATE_ID, INVALID_REQUEST, SLOW_READER
from broker.core.events import Asked, Congested, Detached, Malformed, Refused
from broker.core.kept import NEVER_WRITTEN, Kept
from broker.core.messages import (
    Ack,
    Body,
    Broadcast,
    Call,
    CancelAttempt,
    Credit,
    End,
    Message,
    Notify,
    Part,
    Progress,
)
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links.end import PlainWriting
from broker.links.held import HeldCalls
from broker.links.pair import AnyLink
from broker.wire import native
from broker.wire.attachments import AttachmentError, unpack
from broker.wire.batches import Batch, in_text
from broker.wire.frames import binary_frame, text_frame
from broker.wire.jsonrpc import BINARY_FRAME, TEXT_FRAME, BadMessage, Decoded, JsonRpc, is_batch, split_batch

ACK_MESSAGES, ACK_BYTES = 32, 1 << 20
"""after how many messages, or how much, a peer whose session has grace is told that they have arrived"""
AT_ONCE = 250
"""messages that were only kept and are sent within one turn of the loop: 2 ms"""

_CAN_BE_DROPPED = (Notify, Broadcast, Progress)
_FOLLOWS_A_CALL = (Part, Credit)


def _body(message: Message) -> Body | None:
    """What a message carries, if anything."""
    return getattr(message, "body", None)


class WebSocketPeer:
    """Receives for its link, and is what the core knows as the session's link.

    Calls for a worker whose outbox is crowded are held here until there is room.

    If the session outlives its links, the messages of the peer are counted in its `Kept`, and what it is sent bears
    numbers.
    """

    __slots__ = (
        "_acked", "_batch_max", "_batched", "_codec", "_engine", "_feeding", "_held", "_kept", "_link",
        "_message_max_bytes", "_session", "_stopped_at", "_unacked_bytes", "_writer", "decoded",
    )  # fmt: skip

    def __init__(self, engine: Engine, link: AnyLink, codec: JsonRpc, message_max_bytes: int, batch_max: int) -> None:
        self._engine = engine
        self._link = link
        self._codec = codec
        self._message_max_bytes = message_max_bytes
        self._batch_max = batch_max
        self._session: Session | None = None
        self._batched: dict[object, Batch] | None = None
        self._feeding: Batch | None = None
        self._held = HeldCalls()
        self._kept: Kept | None = None
        self._acked = self._unacked_bytes = 0
        self._stopped_at = 0  # from which number on they are not sent for now, but only kept
        self.decoded: Callable[[list[Any]], None] = engine.feed_all
        self._writer: PlainWriting | None = None

    def start(self, session: Session) -> None:
        """Begin to listen to the link, on behalf of this session."""
        self._session = session
        self._codec.session = session
        self._kept = session.kept
        if self._kept is not None:
            self._acked = self._kept.received
        if self._link.decoder is not None:
            self._codec.read_by(self._link.decoder)
            self._writer = self._link.new_writer(*self._codec.plain)
            if self._kept is not None:
                self.decoded = self._decoded_and_counted
        self._link.start(self)
        if self._held:  # what waited for a worker was given to it while it was attached
            self._engine.feed(Congested(session, True))
        if self._stopped_at:
            self._go_on()

    # ------------------------------------------------------------ from the link

    def message(self, payload: bytes, binary: bool) -> None:
        """One whole message. Whatever is wrong with it is told and counted; the link stays."""
        if self._kept is not None:
            self._count(self._kept, 1, len(payload))
        try:
            if binary:
                event = self._decode_binary(payload)
            elif payload.startswith(b"{") or not is_batch(payload):
                event = self._codec.decode(payload)
            else:
                self._take_batch(payload)
                return
        except BadMessage as bad:
            self._link.send(bad.answer)
            self._malformed(bad)
            return
        if event is not None:
            self._engine.feed(event)

    def _decoded_and_counted(self, events: list[Any]) -> None:
        """The same for messages that came as events. `decoded` is this, or where there is nothing to count the engine's
        `feed_all` itself.
        """
        kept, reader = self._kept, self._link.decoder
        if kept is not None and reader is not None:
            size, reader.decoded_bytes = reader.decoded_bytes, 0
            self._count(kept, len(events), size)
        self._engine.feed_all(events)

    def _count(self, kept: Kept, messages: int, size: int) -> None:
        """So many more messages of a session that outlives its links; now and then the peer is told."""
        kept.received += messages
        self._unacked_bytes += size
        if kept.received - self._acked >= ACK_MESSAGES or self._unacked_bytes >= ACK_BYTES:
            self._acked, self._unacked_bytes = kept.received, 0
            self._link.send_parts(self._codec.encode(Ack(kept.received)))

    def congested(self, congested: bool) -> None:
        """The outbox rose above its soft bound, or fell again."""
        if not congested:
            self._release()
            if self._stopped_at:
                self._go_on()
        if self._session is not None and congested == self._link.is_crowded():
            self._engine.feed(Congested(self._session, congested))

    def closed(self, code: int, reason: str) -> None:
        """The link is no more."""
        self._leave(code, reason, self._link.flushed_at_last)

    def _leave(self, code: int, reason: str, flushed: int) -> None:
        session, self._session = self._session, None
        self._held.drop_all()
        if session is not None:
            self._engine.feed(Detached(session, code, reason, flushed, self))

    def _release(self) -> None:
        """Write calls that were held, as many as there is room for. What has expired meanwhile ends in its turn."""
        now = self._engine.now()
        while not self._link.is_crowded() and (taken := self._held.take(now)) is not None:
            call, behind = taken
            self._link.send_parts(self._codec.encode(call), self._codec.takes_binary(call.body))
            call.attempt.mark = self._link.enqueued
            for message in behind:
                self._link.send_parts(self._codec.encode(message), self._codec.takes_binary(_body(message)))

    def _decode_binary(self, payload: bytes) -> Decoded:
        self._codec.binary = True
        try:
            text, attachments = unpack(payload)
            if not text.isascii():
                text.decode()  # text frames have been checked by the link
        except AttachmentError as error:
            raise BadMessage(INVALID_REQUEST, str(error), strike=True) from None
        except UnicodeDecodeError as error:
            raise BadMessage(INVALID_REQUEST, f"part 0 is no UTF-8: {error}", strike=True) from None
        if is_batch(text):
            raise BadMessage(INVALID_REQUEST, "a batch comes in a text frame, without attachments")
        return self._codec.decode(text, attachments)

    def _malformed(self, bad: BadMessage) -> None:
        if self._session is not None:
            self._engine.feed(Malformed(self._session, str(bad), bad.strike))

    def _take_batch(self, payload: bytes) -> None:
        """Each member goes its own way; the array of replies goes out when the last has ended (section 6).

        In a session that outlives its links they go out one by one: a reply that waited for others, behind its number,
        would be taken for one that has arrived when its peer acknowledges what came after that number.
        """
        members = split_batch(payload, self._batch_max)
        batch = self._feeding = Batch(self._message_max_bytes)
        batch.left = 1  # for this loop itself, so that the array is not sent before all members are fed
        for member in members:
            try:
                event = self._codec.decode(member)
            except BadMessage as bad:
                batch.add(bad.answer)
                self._malformed(bad)
                continue
            if event is not None and self._session is not None:
                if isinstance(event, Asked) and (event.options.stream_in or event.options.stream_out):
                    whole = msgspec.structs.replace(event.options, stream_in=False, stream_out=False)
                    event = msgspec.structs.replace(event, options=whole)
                if isinstance(event, (Asked, Refused)) and event.wire_id is not None and self._kept is None:
                    self._expect(batch, event.wire_id, self._session)
                self._engine.feed(event)
        self._feeding = None
        batch.left -= 1
        self._send_batch(batch)

    def _expect(self, batch: Batch, wire_id: object, session: Session) -> None:
        batch.left += 1
        self._batched = self._batched or {}
        if wire_id not in session.requests:  # an id in flight ends as a duplicate, at once
            self._batched[wire_id] = batch

    def _collect(self, end: End) -> bool:
        """Put the end of a batch's member among its replies; False if it was no member."""
        batch: Batch | None
        if end.outcome.kind is DUPLICATE_ID:
            batch = self._feeding
        else:
            batch = self._batched.pop(end.wire_id, None) if self._batched else None
        if batch is None:
            return False
        pieces = self._codec.encode(in_text(end, self._message_max_bytes))
        batch.end(end.wire_id, b"".join(pieces))
        self._send_batch(batch)
        return True

    def _send_batch(self, batch: Batch) -> None:
        if batch.left == 0 and (text := batch.text()):
            self._link.send(text)

    # ------------------------------------------------------------ from the router, by the engine

    @property
    def takes_binary(self) -> bool:
        """Whether this peer takes binary frames."""
        return self._codec.binary

    def deliver(self, message: Message) -> None:
        """Write one message: in C if it is plain, and nothing stands in its way."""
        writer = self._writer
        if writer is not None and not (self._held or self._batched or self._feeding) and writer.write(message):
            return
        codec, link = self._codec, self._link
        if type(message) is Call:
            if self._held or link.is_crowded():
                self._hold(message)
            else:
                link.send_parts(codec.encode(message), codec.binary and message.body.attachments != ())
                message.attempt.mark = link.enqueued
        elif type(message) is End:
            if (self._batched or self._feeding) and self._collect(message):
                return
            body = message.body
            link.send_parts(codec.encode(message), codec.binary and body is not None and body.attachments != ())
        elif type(message) is CancelAttempt:
            if not self._held.drop(message.attempt_id):
                link.send_parts(codec.encode(message))
        elif type(message) in _FOLLOWS_A_CALL and message.attempt_id in self._held:  # type: ignore[union-attr]
            self._held.follow(message.attempt_id, message)  # type: ignore[union-attr]
        elif type(message) in _CAN_BE_DROPPED and link.is_crowded():
            self._engine.router.counters.notifications_dropped += 1
        else:
            link.send_parts(codec.encode(message), codec.takes_binary(_body(message)))

    def _hold(self, call: Call) -> None:
        self._held.hold(call)
        self._crowded()

    def _crowded(self) -> None:
        if self._session is not None and not self._session.congested:
            self._engine.feed(Congested(self._session, True))

    def deliver_numbered(self, message: Message, n: int) -> None:
        """Write one message with its number; behind a call for which there is no room, none until there is.

        Before `start` none is written: what is kept of a session that goes on is sent from there, in slices.
        """
        if self._stops(n):
            if type(message) is Call:
                message.attempt.mark = NEVER_WRITTEN
            return
        if self._writer is not None and self._writer.write(message, n):
            return
        codec, link = self._codec, self._link
        if type(message) is Call and link.is_crowded():
            message.attempt.mark = NEVER_WRITTEN
            self._stopped_at = n
            self._crowded()
            return
        link.send_parts(codec.encode_numbered(message, n), codec.takes_binary(_body(message)))
        if type(message) is Call:
            message.attempt.mark = link.enqueued

    def _stops(self, n: int) -> bool:
        """Whether message `n` is only kept for now, and sent in its turn."""
        if not self._stopped_at and self._kept is None:
            self._stopped_at = n
        return self._stopped_at > 0

    def _go_on(self) -> None:
        """There is room again: send what was only kept meanwhile, a slice at a time."""
        kept, n = self._kept, self._stopped_at
        if kept is None or self._session is None or not n:
            return
        self._stopped_at = 0
        if kept.lost >= n:
            self.close(SLOW_READER.code, "more came than is kept for a slow reader")
            return
        messages = kept.since(n, self._engine.now(), AT_ONCE + 1)
        for number, message in messages[:AT_ONCE]:
            self.deliver_numbered(message, number)
        if len(messages) > AT_ONCE and not self._stopped_at:
            self._stopped_at = messages[AT_ONCE][0]
            self._engine.loop.call_soon(self._go_on)

    def broadcast_numbered(self, message: Message, frames: dict[str, bytes], n: int) -> bool:
        """Write one of many copies, which no other can share because of its number."""
        if self._stops(n):
            return True  # it is kept
        body = _body(message)
        if self._link.is_crowded() or (body is not None and not self._fits(body)):
            self._link.broadcasts_dropped += 1
            return False
        self._link.send_parts(self._codec.encode_numbered(message, n), self._codec.takes_binary(body))
        return True

    def _fits(self, body: Body) -> bool:
        """Whether a broadcast is within the bound for messages as this peer gets it."""
        return self._codec.takes_binary(body) or body.expanded_size() <= self._message_max_bytes

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Write one of many copies."""
        body = _body(message)
        binary = self._codec.takes_binary(body)
        key = BINARY_FRAME if binary else TEXT_FRAME
        frame = frames.get(key)
        if frame is None:
            frame = frames[key] = self._broadcast_frame(message, body, binary)
        if not frame:
            return False
        return self._link.send_frame(frame)

    def _broadcast_frame(self, message: Message, body: Body | None, binary: bool) -> bytes:
        """The frame all peers of this kind share; empty if it is larger than a message may be."""
        if body is not None and body.attachments and not self._fits(body):
            return b""
        payload = b"".join(self._codec.encode(message))
        if len(payload) > self._message_max_bytes:
            return b""
        return binary_frame(payload) if binary else text_frame(payload)

    def close(self, code: int, reason: str) -> None:
        """Write what is queued, say why, and end. The session ends now: nothing more would reach the peer."""
        self._link.close(code, reason)
        self._engine.loop.call_soon(self._leave, code, reason, self._link.enqueued)

    def pause_reading(self) -> None:
        """Read no more until `resume_reading`."""
        self._link.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self._link.resume_reading()


if native.Writer is not None:
    native.know_peer(Session, WebSocketPeer)
