"""Every bound the core keeps. What reaching one is called stands in `errors`; defaults are the configuration's."""

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one broker. Times in seconds, sizes in bytes, counts plain."""

    deadline_s: float = 30.0
    deadline_max_s: float = 3600.0
    deadline_served_max_s: float = 604_800.0
    """the longest deadline and idle deadline that a worker may set for its endpoint; more is cut to this"""
    slot_s: float = 0.05
    queue_max: int = 1000
    """requests waiting per endpoint → overloaded, bound `queue`"""
    in_flight_max: int = 10_000
    """requests per session that have not ended → overloaded, bound `in_flight`"""
    requests_per_s: float = 0.0
    """requests and notifications per principal and second, as many at once; 0: any number → overloaded, bound `rate`"""
    capacity: int = 1024
    """attempts at once at a worker that named no capacity of its own"""
    message_max_bytes: int = 16 * 1024 * 1024
    """a message as its receiver gets it → too_large"""
    endpoints_known_max: int = 10_000
    """endpoints remembered; the longest unused is forgotten first → overloaded, bound `endpoints`"""
    names_per_session_max: int = 1000
    """endpoints served plus topics subscribed, per session → overloaded, bound `names`"""
    topics_per_endpoint_max: int = 1000
    """topics remembered per endpoint → overloaded, bound `topics`"""
    methods_declared_max: int = 1000
    """methods one `broker.serve` may name → invalid"""
    fanouts_max: int = 1000
    """broadcasts under way → overloaded, bound `fanouts`"""
    idle_s: float = 30.0
    """without a part in either direction, once parts flow, where the caller names no `idle` → deadline"""
    part_max_bytes: int = 256 * 1024
    """one part of a stream, JSON and attachments together → bad_reply, invalid"""
    parts_ahead_max: int = 64
    """parts a receiver may ask for beyond those it has got; more is cut to this"""
    grace_max_s: float = 300.0
    """how long a session may outlive its link; more is cut to this"""
    kept_max_bytes: int = 8 * 1024 * 1024
    """messages kept for a session with grace until it acknowledges them, their payloads"""
    kept_max: int = 10_000
    """the same, their number"""
    keys_kept_max: int = 10_000
    """finished replies kept for repeats of their idempotency keys; the oldest goes first"""
    keys_kept_max_bytes: int = 64 * 1024 * 1024
    """the same, their payloads"""
    keys_kept_s: float = 600.0
    sessions_max: int = 100_000
    """peers attached, or away and still within their grace"""
    principal_share: float = 0.25
    """what one principal may hold of `memory_soft_bytes` as messages kept for its sessions, of `sessions_max` as
    sessions without a link, and, where others need the room, of `keys_kept_max` and `keys_kept_max_bytes`"""
    memory_soft_bytes: int = 1024 * 1024 * 1024
    """payloads and outboxes held in all, above which new requests are refused → overloaded, bound `memory`"""
    memory_hard_bytes: int = 1536 * 1024 * 1024
    """the same, above which broadcasts are dropped"""
    pass_over_s: float = 60.0
    """how long a worker is passed over for a class it answered with an error, while another has it; 0: not at all"""
    strikes_max: int = 3
    """malformed messages within `strike_memory_s` before the link is closed with 4400"""
    strike_memory_s: float = 60.0
    start_grace_s: float = 10.0
    """how long after its start the broker calls `no_endpoint` retryable: workers may be on their way back"""


class EndpointLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says of one endpoint; None where the broker's own bound counts."""

    policy: str = "least_pending"
    queue_max: int | None = None
    deadline_s: float | None = None
    deadline_max_s: float | None = None
    idle_s: float | None = None
    newest_wins: bool = False
    """a request displaces the one of its group (else of its caller) and method that still waits → cancelled"""
    history: int = 0
    """broadcasts kept per topic for `since`, at most; 0: none"""
    history_s: float = 3600.0
    history_max_bytes: int = 8 * 1024 * 1024
    closed: str = ""
    """a reason: sockets that attach here are told it with close code 4404 and ended"""
