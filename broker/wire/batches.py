"""What JSON-RPC batches gather (section 6 of its specification), whatever they came over."""

from __future__ import annotations

from broker.core.errors import TOO_LARGE, Outcome
from broker.wire.jsonrpc import encode_error


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
