"""What JSON-RPC batches gather (section 6 of its specification), whatever they came over."""

from __future__ import annotations

import msgspec

from broker.core.errors import TOO_LARGE, Outcome
from broker.core.messages import Body, End
from broker.wire.attachments import expand
from broker.wire.jsonrpc import encode_error


def in_text(end: End, size_max: int) -> End:
    """A reply as it stands in a batch, which is one text: attachments as base64, or `too_large` if that is too much."""
    body = end.body
    if body is None or not body.attachments:
        return end
    if body.expanded_size() > size_max:
        outcome = Outcome(kind=TOO_LARGE, detail="the reply as base64 is larger than a message may be", dispatched=True)
        return End(end.wire_id, outcome, None, end.meta)
    return msgspec.structs.replace(end, body=Body(expand(bytes(body.raw), body.attachments)))


class Batch:
    """The replies to one batch, gathered until the last member has ended. `size_max` bounds them in bytes."""

    __slots__ = ("_replies", "_room", "left")

    def __init__(self, size_max: int) -> None:
        self.left = 0
        self._room = size_max
        self._replies: list[bytes] = []

    def add(self, reply: bytes) -> None:
        """One more reply that nobody waits for."""
        self._room -= len(reply)
        self._replies.append(reply)

    def end(self, wire_id: object, reply: bytes) -> None:
        """One member has ended; a reply for which there is no room is replaced by the error that says so."""
        self.left -= 1
        if len(reply) > self._room and isinstance(wire_id, bytes):
            detail = "the replies of its batch together are larger than a message may be"
            reply = encode_error(wire_id, Outcome(kind=TOO_LARGE, detail=detail, dispatched=True))
        self.add(reply)

    def text(self) -> bytes:
        """The array of replies; empty if there are none."""
        return b"[%b]" % b",".join(self._replies) if self._replies else b""
