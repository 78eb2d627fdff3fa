"""One count of the bytes this broker holds for others, whoever holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.messages import Body
    from broker.core.pending import Request

SMALL_BYTES = 4096
"""Payloads of requests up to this size are not counted, so that small requests cost nothing; how many is bounded."""


class Budget:
    """Bytes held in all (`used`), and how many of them outside of the core (`outboxes`): in what links have not written
    yet, in HTTP bodies that are on their way in.

    Whoever keeps a payload adds its size to `used`, and takes it off again when the payload goes: payloads of pending
    requests, parts gathered, messages kept for a session, history, cached replies. What two of them hold counts twice,
    as a broadcast does in every outbox, so that the count is never below what is there.
    """

    __slots__ = ("outboxes", "used")

    def __init__(self) -> None:
        self.used = 0
        self.outboxes = 0

    def hold(self, request: Request, size: int) -> None:
        """A request holds so much more, or less where `size` is negative; what it holds goes when it ends."""
        request.held += size
        self.used += size


def size_of(body: Body) -> int:
    """Bytes of a payload, as they are held."""
    size = len(body.raw)
    return size + sum(map(len, body.attachments)) if body.attachments else size  # without any, a fifth of the time
