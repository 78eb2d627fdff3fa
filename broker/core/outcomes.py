"""How one request ended, said of it: the outcome, and when what happened to it."""

from __future__ import annotations

from broker.core.errors import Kind, Outcome
from broker.core.messages import Timing
from broker.core.pending import JOINED, Request
from broker.core.refusals import RETRY_AFTER_MS


def outcome_of(
    kind: Kind,
    request: Request,
    now: float,
    retryable: bool | None = None,
    detail: str = "",
    phase: str = "",
    cause: str = "",
    bound: str = "",
) -> Outcome:
    """An outcome that says where the request stood; `bound` names the one that was reached."""
    return Outcome(  # by position, which costs half of what names cost
        kind,
        detail,
        kind.retryable if retryable is None else retryable,
        request.attempts > 0,
        request.endpoint.name,
        request.method,
        request.attempts,
        milliseconds(now - request.accepted_at),
        phase,
        cause,
        bound,
        RETRY_AFTER_MS if bound else None,
    )


def timing_of(request: Request, now: float) -> Timing:
    """When what happened to a request that ends now. One that has joined another waited for no worker."""
    accepted_at, attempt, stream = request.accepted_at, request.attempt, request.stream
    sent_at = request.sent_at if attempt is None else attempt.sent_at
    waited_until = now if attempt is None else attempt.sent_at
    queued_s = 0.0 if request.state is JOINED else max(0.0, waited_until - accepted_at - request.spent_s)
    first_part_at = stream.first_part_at if stream else None
    return Timing(
        queued_ms=milliseconds(queued_s),
        dispatched_ms=None if sent_at is None else milliseconds(max(0.0, sent_at - accepted_at)),
        first_part_ms=None if first_part_at is None else milliseconds(max(0.0, first_part_at - accepted_at)),
        ended_ms=milliseconds(now - accepted_at),
    )


def milliseconds(seconds: float) -> float:
    """To the microsecond; `round` costs three times as much."""
    return int(seconds * 1e6 + 0.5) / 1e3
