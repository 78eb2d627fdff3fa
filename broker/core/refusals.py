"""Requests that end where they came in: refused, or one of the broker's own methods. They stand in no table."""

from __future__ import annotations

from broker.core import errors
from broker.core.errors import Kind, Outcome
from broker.core.events import Asked, Deliver, Refused
from broker.core.ids import WireId
from broker.core.messages import Body, End, ReplyMeta
from broker.core.sessions import Session
from broker.core.state import State

RETRY_AFTER_MS = 100
"""what `overloaded` suggests to wait where the broker knows no better"""

DUPLICATE = "the first request with this id goes on"


class Refusal(Exception):
    """Raised by one of the broker's own methods to end with an outcome; the text is the detail."""

    def __init__(self, kind: Kind, detail: str, *, bound: str = "") -> None:
        super().__init__(detail)
        self.kind = kind
        self.bound = bound


class Refusals:
    """Ends requests that were never taken in. They count as accepted too: a refusal is an outcome."""

    __slots__ = ("counters", "effects")

    def __init__(self, state: State) -> None:
        self.counters = state.counters
        self.effects = state.effects

    def refuse(
        self,
        event: Asked,
        kind: Kind,
        detail: str = "",
        *,
        bound: str = "",
        retryable: bool | None = None,
        retry_after_ms: int = RETRY_AFTER_MS,
    ) -> None:
        """End what was asked; a notification just ends. `bound` names the one that was reached."""
        outcome = Outcome(
            kind=kind,
            detail=detail,
            retryable=kind.retryable if retryable is None else retryable,
            endpoint=event.endpoint,
            method=event.method,
            bound=bound,
            retry_after_ms=retry_after_ms if bound else None,
        )
        if bound:
            self.counters.overloaded[bound] += 1
        if event.wire_id is not None:
            self.end(event.session, event.wire_id, outcome, None)

    def overloaded(self, event: Asked, bound: str, detail: str, retry_after_ms: int = RETRY_AFTER_MS) -> None:
        """End what was asked because a bound was reached."""
        self.refuse(event, errors.OVERLOADED, detail, bound=bound, retry_after_ms=retry_after_ms)

    def refused(self, event: Refused, now: float) -> None:
        """Its codec has refused it already, not knowing whether the id is in flight."""
        session = event.session
        if session.link is None:
            return
        kind, detail = event.kind, event.detail
        if event.wire_id in session.requests:
            kind, detail = errors.DUPLICATE_ID, DUPLICATE
        outcome = Outcome(
            kind=kind, detail=detail, retryable=kind.retryable, endpoint=event.endpoint, method=event.method
        )
        self.end(session, event.wire_id, outcome, None)

    def end(
        self, session: Session, wire_id: WireId, outcome: Outcome, body: Body | None, meta: ReplyMeta | None = None
    ) -> None:
        """End a request that never stood in the tables."""
        self.counters.accepted += 1
        self.counters.ended[outcome.kind.name] += 1
        if session.link is not None:
            self.effects.append(Deliver(session, End(wire_id, outcome, body, meta)))
