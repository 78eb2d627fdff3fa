"""A WebSocket peer: its link on one side, its session in the router on the other, the codec between."""

from __future__ import annotations

import sys

import msgspec

from broker.core.errors import DUPLICATE_ID, INVALID_REQUEST
from broker.core.events import Asked, Congested, Detached, Malformed, Refused
from broker.core.ids import AttemptId
from broker.core.messages import Body, Call, CancelAttempt, End, Message
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links.link import Link
from broker.wire.attachments import AttachmentError, unpack
from broker.wire.batches import Batch, in_text
from broker.wire.frames import binary_frame, text_frame
from broker.wire.jsonrpc import BadMessage, Decoded, JsonRpc, is_batch, split_batch

NEVER_WRITTEN = sys.maxsize
"""mark of an attempt whose call its link has not taken"""


class WebSocketPeer:
    """Receives for its link, and is what the core knows as the session's link.

    Calls for a worker whose outbox is crowded are held here until there is room: however much falls to it within one
    turn of the loop, before it can be called congested, none of it makes it a slow consumer.
    """

    __slots__ = (
        "_batch_max", "_batched", "_codec", "_engine", "_feeding", "_held", "_link", "_message_max_bytes", "_session",
    )  # fmt: skip

    def __init__(self, engine: Engine, link: Link, codec: JsonRpc, message_max_bytes: int, batch_max: int) -> None:
        self._engine = engine
        self._link = link
        self._codec = codec
        self._message_max_bytes = message_max_bytes
        self._batch_max = batch_max
        self._session: Session | None = None
        self._batched: dict[object, Batch] | None = None
        self._feeding: Batch | None = None
        self._held: dict[AttemptId, Call] = {}

    def start(self, session: Session) -> None:
        """Begin to listen to the link, on behalf of this session."""
        self._session = session
        self._codec.session = session
        self._link.start(self)
        if self._held:  # what waited for a worker was given to it while it was attached
            self._engine.feed(Congested(session, True))

    # ------------------------------------------------------------ from the link

    def message(self, payload: bytes, binary: bool) -> None:
        """One whole message. Whatever is wrong with it is told and counted; the link stays."""
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

    def congested(self, congested: bool) -> None:
        """The outbox rose above its soft bound, or fell again."""
        if not congested:
            self._release()
        if self._session is not None and congested == self._link.is_crowded():
            self._engine.feed(Congested(self._session, congested))

    def closed(self, code: int, reason: str) -> None:
        """The link is no more."""
        self._leave(code, reason, self._link.flushed_at_last)

    def _leave(self, code: int, reason: str, flushed: int) -> None:
        session, self._session = self._session, None
        self._held.clear()
        if session is not None:
            self._engine.feed(Detached(session, code, reason, flushed))

    def _release(self) -> None:
        """Write calls that were held, as many as there is room for. What has expired meanwhile ends in its turn."""
        now = self._engine.now()
        while self._held and not self._link.is_crowded():
            call = self._held.pop(next(iter(self._held)))
            left_s = call.attempt.request.deadline - now
            if left_s > 0:
                call = msgspec.structs.replace(call, left_s=left_s)
                self._link.send_parts(self._codec.encode(call), self._codec.takes_binary(call.body))
                call.attempt.mark = self._link.enqueued

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
        """Each member goes its own way; the array of replies goes out when the last has ended (section 6)."""
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
                if isinstance(event, (Asked, Refused)) and event.wire_id is not None:
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
        batch.end(end.wire_id, b"".join(self._codec.encode(in_text(end, self._message_max_bytes))))
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
        """Write one message."""
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
            if self._held.pop(message.attempt_id, None) is None:
                link.send_parts(codec.encode(message))
        elif link.is_crowded():
            self._engine.router.counters.notifications_dropped += 1
        else:
            link.send_parts(codec.encode(message), codec.takes_binary(getattr(message, "body", None)))

    def _hold(self, call: Call) -> None:
        call.attempt.mark = NEVER_WRITTEN
        self._held[call.attempt.id] = call
        if self._session is not None and not self._session.congested:
            self._engine.feed(Congested(self._session, True))

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Write one of many copies."""
        body = getattr(message, "body", None)
        binary = self._codec.takes_binary(body)
        key = "jsonrpc binary" if binary else "jsonrpc text"
        frame = frames.get(key)
        if frame is None:
            frame = frames[key] = self._broadcast_frame(message, body, binary)
        if not frame:
            return False
        return self._link.send_frame(frame)

    def _broadcast_frame(self, message: Message, body: Body | None, binary: bool) -> bytes:
        """The frame all peers of this kind share; empty if it is larger than a message may be."""
        if body is not None and body.attachments and not binary and body.expanded_size() > self._message_max_bytes:
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
