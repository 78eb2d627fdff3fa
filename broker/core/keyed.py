"""Requests that are one and the same piece of work: they join it, lead it, hand it over and end with it.

What is known of a key stands in `keys`; here is what it does to the way of a request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from broker.core import errors
from broker.core.errors import ENDED_OK, Outcome
from broker.core.events import Asked
from broker.core.keys import JOINED_MAX, Kept, Work
from broker.core.messages import Body, ReplyMeta
from broker.core.outcomes import milliseconds
from broker.core.pending import Request
from broker.core.refusals import Refusals
from broker.core.registry import Endpoint, Registration
from broker.core.sessions import Session
from broker.core.state import State


class Keyed(ABC):
    """The part of `Requests` that is about keys; how a request is given out and how it ends stands there."""

    __slots__ = ("counters", "effects", "keys", "pending", "refusals", "registry", "state")

    def __init__(self, state: State, refusals: Refusals) -> None:
        self.state = state
        self.refusals = refusals
        self.registry, self.pending = state.registry, state.pending
        self.counters, self.effects, self.keys = state.counters, state.effects, state.keys

    @abstractmethod
    def _assign(self, request: Request, registration: Registration, now: float) -> None: ...

    @abstractmethod
    def _end(
        self, request: Request, outcome: Outcome, body: Body | None, now: float, worker: Session | None = None
    ) -> None: ...

    def _repeats(self, event: Asked, endpoint: Endpoint, digest: bytes, deadline: float, now: float) -> bool:
        """Whether its key is known: then it joins the work that is under way, gets the reply that is kept, or ends."""
        self.keys.forget(self.state.limits, now)
        found = self.keys.find(event)
        if found is None:
            return False
        if found.digest != digest:
            detail = "an earlier request with this key had another method, other params or other attachments"
            self.refusals.refuse(event, errors.KEY_CONFLICT, detail)
        elif isinstance(found, Work):
            if len(found.joined) >= JOINED_MAX:
                self.refusals.overloaded(event, "queue", f"{JOINED_MAX} requests wait for what this key names")
            else:
                self._join(event, endpoint, found, deadline, now)
        else:
            self._repeat(event, found)
        return True

    def _knows(self, event: Asked, now: float) -> bool:
        """Whether its key is known."""
        self.keys.forget(self.state.limits, now)
        return self.keys.find(event) is not None

    def _join(self, event: Asked, endpoint: Endpoint, work: Work, deadline: float, now: float) -> None:
        """Take in a request that waits for what another has asked."""
        self.counters.accepted += 1
        self.counters.keys_joined += 1
        body = work.leader.body  # the same, and here already
        assert event.wire_id is not None
        request = self.pending.open(
            event.session, event.wire_id, endpoint, event.method, body, event.options, now, deadline
        )
        self.keys.join(request, work)
        leader = work.leader
        if leader.deadline <= now and leader.attempt is None:  # it is due, and will not be given out any more
            self._hand_over(work, request)
            self._take_place(leader, request, now)

    def _repeat(self, event: Asked, kept: Kept) -> None:
        """Answer from what is kept."""
        assert event.wire_id is not None
        self.counters.keys_repeated += 1
        session, options, outcome, body = event.session, event.options, kept.outcome, kept.body
        if body.attachments and not self.state.fits(session, body):
            self.refusals.refuse(event, errors.TOO_LARGE, self.state.too_large_reply)
            return
        meta = None
        if options.meta:
            meta = ReplyMeta(
                attempts=kept.attempts, retryable=outcome.retryable, trace=options.trace, repeated=True
            )  # fmt: skip
        self.refusals.end(session, event.wire_id, outcome, body, meta)

    def _hand_over(self, work: Work, successor: Request) -> None:
        """Another of those that wait for some work leads from now on."""
        self.keys.hand_over(work, successor)
        if successor.stream is not None:
            self.pending.put_off(successor, successor.stream.due(successor))

    def _in_time(self, request: Request, now: float) -> Request:
        """The request, or, if its time is over, the oldest with time left that has joined it: that one leads then."""
        work = request.work
        if work is not None and request.deadline <= now:
            successor = work.in_time(now)
            if successor is not None:
                self._hand_over(work, successor)
                return successor
        return request

    def _take_place(self, request: Request, successor: Request, now: float) -> None:
        """One has handed over to another while no worker had the work: the place in the queue goes with it."""
        queue = request.endpoint.queue
        registration = request.endpoint.free.take(successor.method, successor.options.group)
        if registration is None:
            queue.replace(request, successor, request.endpoint.line_of(successor))
        else:  # it was passed over when its turn came, for its time was over
            queue.discard(request)
            self._assign(successor, registration, now)

    def _end_joined(
        self, request: Request, outcome: Outcome, body: Body | None, now: float, worker: Session | None
    ) -> None:
        """A request with a key has ended. If the work ended with it, all that have joined it end alike."""
        work = self.keys.leave(request)
        if work is None:
            return
        if body is not None:
            self.keys.keep(work, outcome, body, request.attempts, self.state.limits, now)
        for joined in work.joined:
            joined.work = None
            joined.attempts = request.attempts
            if outcome is not ENDED_OK:
                outcome = msgspec.structs.replace(outcome, elapsed_ms=milliseconds(now - joined.accepted_at))
            self._end(joined, outcome, body, now, worker)
        work.joined.clear()

    def _step_back(self, request: Request, work: Work, outcome: Outcome, now: float) -> None:
        """End one of several that wait for some work, which goes on for the others."""
        if work.leader is not request:
            self._end(request, outcome, None, now)
            return
        worker = request.attempt.session if request.attempt else None
        successor = work.in_time(now) or next(iter(work.joined))
        self._hand_over(work, successor)
        self._end(request, outcome, None, now, worker)
        if worker is None:
            self._take_place(request, successor, now)
