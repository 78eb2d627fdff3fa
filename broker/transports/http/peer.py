"""An HTTP request as a peer: a session for as long as the request lasts."""

from __future__ import annotations

from collections.abc import Callable

from broker.core.messages import End, Message

Ended = Callable[[End], None]
Closed = Callable[[int, str], None]


class HttpPeer:
    """What the core knows as the link of such a session. It asks; it serves nothing and hears no broadcasts."""

    __slots__ = ("_closed", "_ended", "takes_binary")

    def __init__(self, ended: Ended, closed: Closed, *, takes_binary: bool = False) -> None:
        self._ended = ended
        self._closed = closed
        self.takes_binary = takes_binary

    def deliver(self, message: Message) -> None:
        """An answer has come."""
        if type(message) is End:
            self._ended(message)

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Nothing is listened to here."""
        return False

    def close(self, code: int, reason: str) -> None:
        """The session has to end: its credential was revoked, the broker leaves."""
        self._closed(code, reason)

    def pause_reading(self) -> None:
        """Nothing more is read anyway."""

    def resume_reading(self) -> None:
        """Nothing more is read anyway."""
