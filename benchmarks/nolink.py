"""A link for sessions of the router alone, with no socket behind it."""

from __future__ import annotations

from broker.core.messages import Message


class NoLink:
    """Takes everything and does nothing."""

    flushed = 0
    takes_binary = True

    def deliver(self, message: Message) -> None: ...
    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        return True

    def close(self, code: int, reason: str) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
