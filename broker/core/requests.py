"""The way of a request: taken in or refused, given to a worker, ended once.

Every accepted request takes one way through here: `asked` takes it in or refuses it, `_assign` gives it to a worker or
the endpoint's queue lets it wait, and `_end` ends it: once, because a request that has ended stands in no table any
more.
"""

from __future__ import annotations

from broker.core import errors
from broker.core.access import Role
from broker.core.errors import ENDED_OK, Kind, Outcome
from broker.core.events import Answered, Asked, BadReply, Cancel, Deliver, Detached
from broker.core.messages import Body, Call, CancelAttempt, End, Notify, ReplyMeta
from broker.core.pending import QUEUED, Attempt, Request
from broker.core.refusals import DUPLICATE, Refusals
from broker.core.registry import Endpoint, Registration
from broker.core.sessions import Session
from broker.core.state import State

_CALLER: int = Role.CALLER.value


class Requests:
    """Everything that happens to requests."""

    __slots__ = ("counters", "effects", "pending", "refusals", "registry", "state")

    def __init__(self, state: State, refusals: Refusals) -> None:
        self.state = state
        self.refusals = refusals
        self.registry, self.pending = state.registry, state.pending
        self.counters, self.effects = state.counters, state.effects

    # ------------------------------------------------------------ in

    def asked(self, event: Asked, now: float) -> None:
        """Refuse a request, or take it in: then it is in the books until `_end`."""
        session, wire_id, name = event.session, event.wire_id, event.endpoint
        if session.link is None:  # said before it left, heard after: nothing may be opened for it any more
            return
        if wire_id is None:
            self.counters.notifications += 1
            self.notify(event)
            return
        if wire_id in session.requests:
            self.refusals.refuse(event, errors.DUPLICATE_ID, DUPLICATE)
            return
        if not (session.roles.get(name, 0) & _CALLER or session.may(_CALLER, name)):  # saves a call: 0.04 µs
            self.refusals.refuse(event, errors.DENIED, f"{session.who} may not call {name}")
            return
        state = self.state
        if state.draining:
            self.refusals.refuse(event, errors.SHUTTING_DOWN)
            return
        in_flight_max = state.limits.in_flight_max
        if len(session.requests) >= in_flight_max:
            self.refusals.overloaded(event, "in_flight", f"{in_flight_max} requests of this session are in flight")
            return
        endpoint = self.registry.by_name.get(name)
        if endpoint is None or not endpoint.registrations:
            endpoint = self._unserved(event, endpoint, now)
            if endpoint is None:
                return
        method, options = event.method, event.options
        timeout = options.timeout
        if timeout is None:
            timeout = endpoint.deadline_s
        elif timeout > endpoint.deadline_max_s:
            detail = f"timeout {timeout:g} s is above the bound of {endpoint.deadline_max_s:g} s at {name}"
            self.refusals.refuse(event, errors.INVALID_PARAMS, detail)
            return
        registration = endpoint.free.take(method)
        if registration is None and not self._may_wait(event, endpoint):
            return
        self.counters.accepted += 1
        request = self.pending.open(session, wire_id, endpoint, method, event.body, options, now, now + timeout)
        if registration is None:
            endpoint.queue.put(request)
        else:
            self._assign(request, registration, now)

    def _unserved(self, event: Asked, endpoint: Endpoint | None, now: float) -> Endpoint | None:
        """Nobody serves it: refuse, unless the caller waits for somebody to come."""
        name, limits, refusals = event.endpoint, self.state.limits, self.refusals
        if endpoint is not None and endpoint.limits.closed:
            refusals.refuse(event, errors.DENIED, endpoint.why_closed)
        elif event.options.wait:
            endpoint = endpoint or self.registry.get_or_make(name)
            if endpoint is not None:
                return endpoint
            refusals.overloaded(event, "endpoints", f"{limits.endpoints_known_max} endpoints are in use")
        elif endpoint is None or not endpoint.served:
            young = now - self.state.started_at < limits.start_grace_s
            detail = f"no worker has served {name} since the broker started"
            refusals.refuse(event, errors.NO_ENDPOINT, detail, retryable=young)
        else:
            refusals.refuse(event, errors.NO_WORKER, f"all workers of {name} have gone")
        return None

    def _may_wait(self, event: Asked, endpoint: Endpoint) -> bool:
        """No worker is free for it: whether it may wait. If not, it has been refused."""
        if endpoint.registrations and not endpoint.has_method(event.method):
            detail = f"no worker of {endpoint.name} has a method {event.method}"
            self.refusals.refuse(event, errors.NO_METHOD, detail)
        elif len(endpoint.queue) >= endpoint.queue_max:
            self.refusals.overloaded(event, "queue", f"{endpoint.queue_max} requests wait for {endpoint.name}")
        else:
            return True
        return False

    def _assign(self, request: Request, registration: Registration, now: float) -> None:
        """Give a request to a worker that has been taken for it."""
        if request.body.attachments and not self._fits(registration.session, request.body):
            detail = f"as base64, for a worker that takes no binary frames, it is larger than {self._bound_text}"
            self._end(request, outcome_of(errors.TOO_LARGE, request, now, detail=detail), None, now)
            self.registry.unload(registration)
            return
        attempt = self.pending.open_attempt(request, registration, now)
        self.counters.attempts += 1
        call = Call(attempt, request.endpoint.name, request.method, request.body, request.deadline - now)
        self.effects.append(Deliver(registration.session, call))

    def notify(self, event: Asked) -> None:
        """Give a call nobody waits for to one worker, if one is free. No slot, no queue, no answer."""
        endpoint = self.registry.by_name.get(event.endpoint)
        if endpoint is not None and event.session.may(_CALLER, event.endpoint) and not self.state.draining:
            registration = endpoint.free.choose(event.method)
            body = event.body
            if registration is not None and (not body.attachments or self._fits(registration.session, body)):
                notify = Notify(endpoint.name, event.method, body)
                self.effects.append(Deliver(registration.session, notify))
                # So that the next goes to the next of its equals.
                endpoint.free.changed(registration, registration.load)
                return
        self.counters.notifications_dropped += 1

    # ------------------------------------------------------------ answers

    def answered(self, event: Answered, now: float) -> None:
        """A worker's answer: if it counts, its request has ended and its place is free."""
        worker, body, error = event.session, event.body, event.error
        attempt = worker.attempts.get(event.attempt)
        if attempt is None:
            self.counters.late_replies += 1
            return
        request, registration = attempt.request, attempt.registration
        outcome = ENDED_OK if error is None else outcome_of(errors.WORKER_ERROR, request, now, error.retryable)
        if body.attachments and request.session.link is not None and not self._fits(request.session, body):
            detail = f"the reply as base64, for a caller that takes no binary frames, is larger than {self._bound_text}"
            self._end(request, outcome_of(errors.TOO_LARGE, request, now, detail=detail), None, now)
        else:
            self._end(request, outcome, body, now, worker)
        self._free(registration, now)

    def bad_reply(self, event: BadReply, now: float) -> None:
        """A worker's answer broke its dialect: that ends its request."""
        attempt = event.session.attempts.get(event.attempt)
        if attempt is None:
            self.counters.late_replies += 1
            return
        request = attempt.request
        outcome = outcome_of(errors.BAD_REPLY, request, now, request.options.idempotent, detail=event.detail)
        self._end(request, outcome, None, now, event.session)
        self._free(attempt.registration, now)

    def _fits(self, session: Session, body: Body) -> bool:
        """Whether a body with attachments is within the bound for messages as this peer gets them."""
        link = session.link
        return link is None or link.takes_binary or body.expanded_size() <= self.state.limits.message_max_bytes

    @property
    def _bound_text(self) -> str:
        return f"the bound of {self.state.limits.message_max_bytes} bytes for a message"

    # ------------------------------------------------------------ ends

    def _end(
        self, request: Request, outcome: Outcome, body: Body | None, now: float, worker: Session | None = None
    ) -> None:
        """End a request, once: it leaves all tables, is counted, and its caller is told. A place is freed elsewhere."""
        session = request.session
        self.pending.close(request)
        self.counters.end(outcome.kind.name, now - request.accepted_at)
        if session.link is not None:
            meta = self._reply_meta(request, outcome, now, worker) if request.options.meta else None
            self.effects.append(Deliver(session, End(request.wire_id, outcome, body, meta)))

    def _reply_meta(self, request: Request, outcome: Outcome, now: float, worker: Session | None) -> ReplyMeta:
        return ReplyMeta(
            worker=self.state.peer_name(worker) if worker else None,
            attempts=request.attempts,
            elapsed_ms=_milliseconds(now - request.accepted_at),
            retryable=outcome.retryable,
            trace=request.options.trace,
        )

    def _free(self, registration: Registration, now: float) -> None:
        """A place at a worker is free: whoever waits may have it."""
        self.registry.unload(registration)
        if registration.endpoint.queue:
            self.feed(registration, now)

    def feed(self, registration: Registration, now: float) -> None:
        """Give a worker what waits, as long as it can take it.

        What has expired meanwhile is passed over, never given out: it is due, and `expire` ends it in its turn.
        """
        queue = registration.endpoint.queue
        while registration.free and queue:
            request = queue.take(registration)
            if request is None:
                return
            if request.deadline > now:
                registration.endpoint.free.load(registration)
                self._assign(request, registration, now)

    # ------------------------------------------------------------ ends before the answer

    def stop(self, request: Request, outcome: Outcome, now: float) -> None:
        """End a request before its answer: the worker that has it is told, its place is free at once."""
        attempt = request.attempt
        if attempt is None:
            request.endpoint.queue.discard(request)
            self._end(request, outcome, None, now)
            return
        registration = attempt.registration
        worker = registration.session
        if worker.link is not None:
            self.effects.append(Deliver(worker, CancelAttempt(attempt.id)))
            self.counters.cancels += 1
        self._end(request, outcome, None, now, worker)
        self._free(registration, now)

    def stop_all(self, requests: list[Request], kind: Kind, now: float, cause: str = "") -> None:
        """End many. Those that wait go first, so that a place that becomes free starts nothing that ends next."""
        requests.sort(key=lambda request: request.attempt is not None)
        for request in requests:
            retryable = kind.retryable and (request.options.idempotent or not request.attempts)
            self.stop(request, outcome_of(kind, request, now, retryable, cause=cause), now)

    def cancelled(self, event: Cancel, now: float) -> None:
        """A caller takes its request back; one that has ended is no matter."""
        request = event.session.requests.get(event.wire_id)
        if request is not None:
            self.stop(request, outcome_of(errors.CANCELLED, request, now, cause="caller"), now)

    def expire(self, now: float, limit: int) -> None:
        """End at most `limit` requests whose deadline has passed, in their order."""
        for request in self.pending.take_due(now, limit):
            if request.attempt is None:
                outcome = outcome_of(errors.DEADLINE, request, now, True, phase="queued")
            else:
                outcome = outcome_of(errors.DEADLINE, request, now, request.options.idempotent, phase="executing")
            self.stop(request, outcome, now)

    # ------------------------------------------------------------ workers that go

    def worker_gone(self, event: Detached, now: float) -> None:
        """What a worker had in its hands when its link ended is tried elsewhere, waits, or ends."""
        attempts = list(event.session.attempts.values())
        for attempt in attempts:
            self._lost(attempt, event, now)
        for attempt in reversed(attempts):  # each was put before the others: the oldest shall stand first
            if attempt.request.state is QUEUED:
                attempt.request.endpoint.queue.put_first(attempt.request)

    def _lost(self, attempt: Attempt, event: Detached, now: float) -> None:
        """A worker went away with an attempt: the request is tried elsewhere if its caller allowed that, or ends."""
        request = attempt.request
        self.pending.close_attempt(attempt)
        self.registry.unload(attempt.registration)
        idempotent = request.options.idempotent
        if idempotent and request.attempts <= request.options.retries and self._retry(request, now):
            return
        written = attempt.mark <= event.flushed
        name = self.state.peer_name(event.session)
        detail = f"worker {name} closed with {event.code} {event.reason}".rstrip()
        outcome = outcome_of(errors.WORKER_LOST, request, now, idempotent or not written, detail=detail)
        self._end(request, outcome, None, now, event.session)

    def _retry(self, request: Request, now: float) -> bool:
        """Try a request again, or let it wait for a worker; False if there is no time or no room."""
        endpoint = request.endpoint
        if request.deadline <= now or self.state.draining or endpoint.limits.closed:
            return False
        registration = endpoint.free.take(request.method)
        if registration is not None:
            self.counters.retries += 1
            self._assign(request, registration, now)
            return True
        if len(endpoint.queue) >= endpoint.queue_max:
            return False
        self.counters.retries += 1
        request.state = QUEUED
        endpoint.queue.put_first(request)
        return True

    def abandon(self, endpoint: Endpoint, now: float) -> None:
        """The last worker has left: who waits for one to be free is told, who waits for one to come goes on waiting."""
        if endpoint.registrations:
            return
        for request in list(endpoint.queue):
            if not request.options.wait and not request.attempts:
                detail = f"all workers of {endpoint.name} have gone while it waited"
                self.stop(request, outcome_of(errors.NO_WORKER, request, now, detail=detail, phase="queued"), now)

    def close(self, endpoint: Endpoint, now: float) -> None:
        """The endpoint has been closed: what waits there ends."""
        for request in list(endpoint.queue):
            self.stop(request, outcome_of(errors.DENIED, request, now, detail=endpoint.why_closed, phase="queued"), now)


def outcome_of(
    kind: Kind,
    request: Request,
    now: float,
    retryable: bool | None = None,
    detail: str = "",
    phase: str = "",
    cause: str = "",
) -> Outcome:
    """An outcome that says where the request stood."""
    return Outcome(  # by position, which costs half of what names cost
        kind,
        detail,
        kind.retryable if retryable is None else retryable,
        request.attempts > 0,
        request.endpoint.name,
        request.method,
        request.attempts,
        _milliseconds(now - request.accepted_at),
        phase,
        cause,
    )


def _milliseconds(seconds: float) -> float:
    """To the microsecond; `round` costs three times as much."""
    return int(seconds * 1e6 + 0.5) / 1e3
