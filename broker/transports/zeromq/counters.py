"""What the ZeroMQ door has seen."""

from __future__ import annotations

from collections import Counter

CAUSES = (
    "no_delimiter", "malformed", "unsigned", "invalid_signature", "duplicate_signature", "unknown_type", "identity",
    "unauthorised", "busy", "late",
)  # fmt: skip
"""why a message is refused: the first five before anybody is known, and never answered; `identity`: it came under the
routing id of somebody else; `busy`: too many peers; `late`: its connection has ended meanwhile"""
HANDSHAKES = ("null", "curve", "unknown_key", "full", "failed", "timeout_or_garbage")
"""what becomes of a connection: let in as one or the other; refused for its key, or because there are too many; or it
never spoke ZeroMQ as it should"""


class ZmqCounters:
    """Plain totals since the start; only ever counted up."""

    __slots__ = (
        "evicted", "handshakes", "heartbeats", "published", "published_dropped", "refused", "subscriptions_refused",
    )  # fmt: skip

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter(dict.fromkeys(CAUSES, 0))
        """messages, by cause"""
        self.handshakes: Counter[str] = Counter(dict.fromkeys(HANDSHAKES, 0))
        self.evicted = 0
        """connections ended by the broker: without a valid message, for those that came after; or after a close"""
        self.heartbeats = 0
        self.published = 0
        """broadcasts given to the XPUB socket, once each however many listen"""
        self.published_dropped = 0
        """broadcasts not given to it because too much waits there"""
        self.subscriptions_refused = 0
