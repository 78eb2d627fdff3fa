"""Broadcasts on their way to whoever reads them: a bounded queue per subscription."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from broker.peer.session import Heard

QUEUE_MAX = 1000
"""broadcasts a subscription keeps for its reader; then the oldest is dropped and counted"""


class Message(msgspec.Struct, frozen=True):
    """One broadcast. `seq` counts per endpoint and topic without gaps; `missed` is how many before it never came.

    `endpoint` is None for what went to everybody, `topic` None for what goes to all listeners of an endpoint.
    """

    endpoint: str | None
    topic: str | None
    seq: int | None
    data: Any
    missed: int = 0


class Inbox:
    """What a subscription has not read yet. Its owner calls everything on one thread."""

    __slots__ = ("_last", "_messages", "dropped")

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._last: int | None = None
        self.dropped = 0

    def put(self, heard: Heard) -> None:
        """Keep a broadcast; at the bound the oldest goes."""
        missed = 0
        if heard.seq is not None:
            if self._last is not None and heard.seq > self._last:
                missed = heard.seq - self._last - 1
            self._last = heard.seq
        if len(self._messages) >= QUEUE_MAX:
            self._messages.popleft()
            self.dropped += 1
        self._messages.append(Message(heard.endpoint, heard.topic, heard.seq, heard.data, missed))

    def begin_at(self, seq: int | None) -> None:
        """The last number there was when the subscription began."""
        if self._last is None:
            self._last = seq

    def begin_anew(self) -> None:
        """The numbers count from the beginning."""
        self._last = None

    @property
    def last(self) -> int | None:
        """The number of the last message that came."""
        return self._last

    def take(self) -> Message | None:
        """The oldest message; None if there is none."""
        return self._messages.popleft() if self._messages else None

    def __len__(self) -> int:
        return len(self._messages)
