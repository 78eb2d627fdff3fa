"""What the router counts: plain integers, read by whoever shows them."""

from broker.core.errors import KINDS

BOUNDS = ("in_flight", "rate", "queue", "endpoints", "names", "topics", "fanouts", "memory")
"""what `overloaded` may name"""
SHARED = ("messages", "sessions", "replies")
"""of what a principal may hold a share: messages kept for sessions, sessions without a link, replies kept for keys"""
LATENCY_BUCKETS = 32
"""Bucket k counts requests that took less than 2**k microseconds, and no less than half of that."""


class Counters:
    """The books. At every moment `accepted` equals the sum of `ended` plus what is pending."""

    __slots__ = (
        "accepted", "acks_ignored", "attached", "attempts", "broadcasts", "broadcasts_refused", "cancels", "copies",
        "copies_dropped", "detached", "displaced", "doubts", "ended", "foreign_replies", "keys_joined", "keys_repeated",
        "late_replies", "latency", "latency_sum_s", "malformed", "nameless_replies", "notifications",
        "notifications_dropped", "over_share", "overloaded", "part_bytes_down", "part_bytes_up", "parts_down",
        "parts_dropped", "parts_up", "progress", "progress_dropped", "replays", "resumed", "retries", "streams_broken",
        "strikes", "superseded", "suspended",
    )  # fmt: skip

    def __init__(self) -> None:
        self.accepted = 0
        self.ended = {kind.name: 0 for kind in KINDS}
        self.overloaded = dict.fromkeys(BOUNDS, 0)
        self.over_share = dict.fromkeys(SHARED, 0)
        self.latency = [0] * LATENCY_BUCKETS
        self.latency_sum_s = 0.0
        self.displaced = 0
        self.superseded = 0
        self.doubts = 0
        self.attempts = 0
        self.retries = 0
        self.cancels = 0
        self.keys_joined = 0
        self.keys_repeated = 0
        self.late_replies = 0
        self.foreign_replies = 0
        self.nameless_replies = 0
        self.malformed = 0
        self.strikes = 0
        self.notifications = 0
        self.notifications_dropped = 0
        self.broadcasts = 0
        self.broadcasts_refused = 0
        self.parts_down = 0
        self.parts_up = 0
        self.parts_dropped = 0
        self.part_bytes_down = 0
        self.part_bytes_up = 0
        self.streams_broken = 0
        self.progress = 0
        self.progress_dropped = 0
        self.suspended = 0
        self.acks_ignored = 0
        self.resumed = 0
        self.replays = 0
        self.copies = 0
        self.copies_dropped = 0
        self.attached = 0
        self.detached = 0

    def end(self, outcome: str, elapsed_s: float) -> None:
        """One request that stood in the tables ended after this long."""
        self.ended[outcome] += 1
        self.latency_sum_s += elapsed_s
        bucket = int(elapsed_s * 1e6).bit_length()
        self.latency[bucket if bucket < LATENCY_BUCKETS else LATENCY_BUCKETS - 1] += 1
