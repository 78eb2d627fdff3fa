"""`POST /rpc`: JSON-RPC 2.0, single messages and batches."""

from __future__ import annotations

import asyncio

import msgspec

from broker.core.errors import INVALID_JSON, INVALID_REQUEST
from broker.core.events import Asked, Cancel, Malformed, Refused
from broker.core.messages import Credit, End, Part, Progress
from broker.core.sessions import Session
from broker.transports.http.peer import HttpPeer
from broker.transports.http.query import OPTIONS, check_names, read_options
from broker.transports.http.session import Receiver
from broker.wire.batches import Batch
from broker.wire.calls import JSON, Reply, outcome_headers
from broker.wire.jsonrpc import BadMessage, Decoded, JsonRpc, is_batch, split_batch

FOR_LINKS = frozenset({"broker.serve", "broker.unserve", "broker.subscribe", "broker.unsubscribe"})
"""methods that mean nothing to a session that ends with its answer"""
NO_STREAMS = "one answer holds no stream: use the WebSocket, or POST /call/ with Accept: application/x-ndjson"


class RpcHandler(Receiver):
    """Methods are `endpoint/method` and `broker.*`. A reply is 200 whatever it says, as JSON-RPC's libraries expect;
    204 where there is none, 400 for what is no message.
    """  # fmt: skip

    _codec: JsonRpc
    _batch: Batch | None = None
    _waits = False

    def post(self) -> asyncio.Future[None]:
        """Ask."""
        content = self.content()
        options = read_options(check_names(self.facts, OPTIONS))
        session = self.attach(HttpPeer(self._end, self.closed, self._told), self.principal, dialect="jsonrpc-http")
        self._codec = JsonRpc(
            node=self.engine.router.node,
            session_id=session.id,
            defaults=msgspec.structs.replace(options, meta=False),
        )
        self._codec.session = session
        try:
            _check_utf8(content)
            if is_batch(content):
                self._take_batch(content, session)
            else:
                self._take(content, session)
        except BadMessage as bad:
            self._malformed(bad, session)
            self.reply(Reply(400, JSON, (), bad.answer))
        return self.ended

    def _take(self, content: bytes, session: Session) -> None:
        event = self._decode(content, session)
        self._waits = isinstance(event, (Asked, Refused)) and event.wire_id is not None
        if event is not None:
            self.engine.feed(event)
        if not self._waits:
            self._done(b"")

    def _take_batch(self, content: bytes, session: Session) -> None:
        """Each member goes its own way; the array of replies is the answer when the last has ended."""
        batch = Batch(self.body_max_bytes)
        batch.left = 1  # for this loop itself
        for member in split_batch(content, self.limits().batch_max):
            self._batch = batch
            try:
                event = self._decode(member, session)
            except BadMessage as bad:
                batch.add(bad.answer)
                self._malformed(bad, session)
                continue
            if event is not None and self.session is not None:
                if isinstance(event, (Asked, Refused)) and event.wire_id is not None:
                    batch.left += 1
                self.engine.feed(event)
        batch.left -= 1
        if batch.left == 0:
            self._done(batch.text())

    def _decode(self, text: bytes, session: Session) -> Decoded:
        event = self._codec.decode(text)
        if isinstance(event, Asked) and not event.endpoint and event.method in FOR_LINKS:
            detail = f"{event.method} needs a connection that stays: use the WebSocket, or GET /events/ to listen"
            if event.wire_id is None:
                raise BadMessage(INVALID_REQUEST, detail)
            return Refused(session, event.wire_id, INVALID_REQUEST, detail, "", event.method)
        if (
            isinstance(event, Asked)
            and event.wire_id is not None
            and (event.options.stream_in or event.options.stream_out)
        ):
            return Refused(session, event.wire_id, INVALID_REQUEST, NO_STREAMS, event.endpoint, event.method)
        return event

    def _told(self, message: Part | Credit | Progress) -> None:
        """`broker.call` asked for parts; there is nowhere to put them."""
        if isinstance(message, Part) and message.wire_id is not None and self.session is not None:
            self.engine.feed(Cancel(self.session, message.wire_id))

    def _malformed(self, bad: BadMessage, session: Session) -> None:
        if self.session is not None:
            self.engine.feed(Malformed(session, str(bad), bad.strike))

    def _end(self, end: End) -> None:
        """One request of this session has ended."""
        text = b"".join(self._codec.encode(end))
        batch = self._batch
        if batch is None:
            self._waits = False
            self.reply(Reply(200, JSON, outcome_headers(end), text))
            return
        batch.end(end.wire_id, text)
        if batch.left == 0:
            self._done(batch.text())

    def _done(self, text: bytes) -> None:
        if text:
            self.reply(Reply(200, JSON, (), text))
        elif self.session is not None:
            self.set_status(204)
            self.finish()


def _check_utf8(content: bytes) -> None:
    if not content.isascii():
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise BadMessage(INVALID_JSON, f"the body is no UTF-8: {error}") from None
