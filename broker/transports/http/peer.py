"""An HTTP request as a peer: a session for as long as the request lasts."""

from __future__ import annotations

from collections.abc import Callable

from broker.core.messages import Credit, End, Message, Part, Progress

Ended = Callable[[End], None]
Closed = Callable[[int, str], None]
Told = Callable[["Part | Credit | Progress"], None]


class HttpPeer:
    """What the core knows as the link of such a session. It asks; it serves nothing and hears no broadcasts.

    `told` gets what comes before the end, where anything can be done with it.
    """

    __slots__ = ("_closed", "_ended", "_told", "takes_binary")

    def __init__(self, ended: Ended, closed: Closed, told: Told | None = None, *, takes_binary: bool = False) -> None:
        self._ended = ended
        self._closed = closed
        self._told = told
        self.takes_binary = takes_binary

    def deliver(self, message: Message) -> None:
        """An answer has come, or part of one."""
        if type(message) is End:
            self._ended(message)
        elif self._told is not None and isinstance(message, Part | Credit | Progress):
            self._told(message)

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Nothing is listened to here."""
        return False

    def close(self, code: int, reason: str) -> None:
        """The session has to end: its credential was revoked, the broker leaves."""
        self._closed(code, reason)

    def pause_reading(self) -> None:
        """What is read is bounded by credit."""

    def resume_reading(self) -> None:
        """What is read is bounded by credit."""
