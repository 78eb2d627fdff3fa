"""The bounds of a link and what is counted about all links of a loop."""

from __future__ import annotations

from dataclasses import dataclass

UNSPLIT_BYTES = 16_384
"""Payloads up to this size are joined with others; larger ones may be written in pieces."""


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """What a link holds at most; every value can be configured. Sizes in bytes, times in seconds.

    Raises ValueError for a value with which a link could not work.
    """

    message_max_bytes: int = 16 << 20
    """A larger message is refused at its header with close code 1009."""
    fragments_max: int = 131_072
    """Frames of one message. They are joined as they come, so this bounds endless empty continuations; the
    conformance suite itself sends 65,536 (Autobahn 9.3.1)."""
    outbox_soft_bytes: int = 1 << 20
    """Above this a receiver is told `congested`, and broadcasts and pongs are dropped."""
    outbox_hard_bytes: int = 8 << 20
    """Above this the link is closed as a slow consumer; one larger message may stand in an empty outbox."""
    outbox_reading_bytes: int = 64 << 20
    """Above this it is closed even if it has taken something within the last second; below, large replies that
    coincide do not cost a reading peer its link."""
    stall_s: float = 10.0
    """An outbox that waits this long with no byte taken is a slow consumer too."""
    close_timeout_s: float = 2.0
    """How long a closing link may still take; then the socket is dropped."""
    ping_interval_s: float = 20.0
    """A link silent for this long has been pinged; 0 turns pings off."""
    ping_timeout_s: float = 20.0
    """A pinged link with no byte for this long is dropped."""
    pings_per_s_max: int = 1000
    """Pings taken from one peer in a second; more close the link with 4429."""
    write_turn_bytes: int = 256 << 10
    """What one link may write in one turn of the loop."""

    def __post_init__(self) -> None:
        at_least = {
            "message_max_bytes": 125,
            "fragments_max": 1,
            "outbox_soft_bytes": 1,
            "outbox_hard_bytes": self.outbox_soft_bytes,
            "outbox_reading_bytes": 1,
            "stall_s": 0.01,
            "close_timeout_s": 0.01,
            "ping_interval_s": 0.0,
            "ping_timeout_s": 0.01,
            "pings_per_s_max": 1,
            "write_turn_bytes": 65_536,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} is {value}, at least {least} is needed")


@dataclass(slots=True)
class LinkCounters:
    """Plain totals over all links of one loop, since the start; only ever counted up."""

    opened: int = 0
    closed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    frames_in: int = 0
    writes: int = 0
    broadcasts_dropped: int = 0
    pongs_dropped: int = 0
    slow_closes: int = 0
    inboxes_full: int = 0
    ping_timeouts: int = 0
    ping_floods: int = 0
    protocol_errors: int = 0
    receiver_errors: int = 0
