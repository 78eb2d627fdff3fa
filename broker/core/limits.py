"""Every bound the core keeps. What reaching one is called stands in `errors`; defaults are the configuration's."""

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one broker. Times in seconds, sizes in bytes, counts plain."""

    deadline_s: float = 30.0
    deadline_max_s: float = 3600.0
    slot_s: float = 0.05
    queue_max: int = 1000
    """requests waiting per endpoint → overloaded, bound `queue`"""
    in_flight_max: int = 10_000
    """requests per session that have not ended → overloaded, bound `in_flight`"""
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
    closed: str = ""
    """a reason: sockets that attach here are told it with close code 4404 and ended"""
