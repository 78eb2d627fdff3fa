"""The way of a request: taken in or refused, given to a worker, ended once.

Every accepted request takes one way through here: `asked` takes it in or refuses it, `_assign` gives it to a worker or
the endpoint's queue lets it wait, and `_end` ends it: once, because a request that has ended stands in no table any
more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from broker.core import errors
from broker.core.access import Role
from broker.core.errors import ENDED_OK, Kind, Outcome
from broker.core.events import Answered, Asked, BadReply, Cancel, Deliver, Detached
from broker.core.keyed import Keyed
from broker.core.keys import digest_of
from broker.core.messages import Body, Call, CancelAttempt, End, Notify, ReplyMeta, Timing
from broker.core.outcomes import milliseconds, outcome_of, timing_of
from broker.core.pending import ENDED, QUEUED, Attempt, Request
from broker.core.rates import Rates
from broker.core.refusals import DUPLICATE, Refusals
from broker.core.registry import Endpoint, Registration
from broker.core.sessions import Session
from broker.core.state import State
from broker.core.streams import Stream, begin, new_stream

_CALLER: int = Role.CALLER.value


class Requests(Keyed):
    """Everything that happens to requests."""

    __slots__ = ("rates",)

    def __init__(self, state: State, refusals: Refusals) -> None:
        super().__init__(state, refusals)
        self.rates = Rates()

    # ------------------------------------------------------------ in

    def asked(self, event: Asked, now: float) -> None:
        """Refuse a request, or take it in: then it is in the books until `_end`."""
        session, wire_id, name = event.session, event.wire_id, event.endpoint
        if session.link is None:  # said before it left, heard after: nothing may be opened for it any more
            return
        if wire_id is None:
            self.counters.notifications += 1
            self.notify(event, now)
            return
        if wire_id in session.requests:
            if not _is_said_again(event):
                self.refusals.refuse(event, errors.DUPLICATE_ID, DUPLICATE)
            return
        if not (session.roles.get(name, 0) & _CALLER or session.may(_CALLER, name)):  # saves a call: 0.04 µs
            self.refusals.refuse(event, errors.DENIED, f"{session.who} may not call {name}")
            return
        state = self.state
        if state.draining:
            self.refusals.refuse(event, errors.SHUTTING_DOWN)
            return
        limits = state.limits
        if limits.requests_per_s and not self._within_rate(event, now):
            return
        in_flight_max = limits.in_flight_max
        if len(session.requests) >= in_flight_max:
            self.refusals.overloaded(event, "in_flight", f"{in_flight_max} requests of this session are in flight")
            return
        if state.budget.used > limits.memory_soft_bytes:
            detail = f"{state.budget.used} bytes wait here, more than {limits.memory_soft_bytes}"
            self.refusals.overloaded(event, "memory", detail)
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
        digest = None
        if options.key is not None:
            digest = digest_of(event)
            if self._repeats(event, endpoint, digest, now + timeout, now):
                return
        registration = endpoint.free.take(method, options.group)
        if registration is None and not self._may_wait(event, endpoint, now):
            return
        self.counters.accepted += 1
        request = self.pending.open(session, wire_id, endpoint, method, event.body, options, now, now + timeout)
        if options.idle is not None:
            stream = self.stream_of(request, now)
            self.pending.put_off(request, stream.due(request))
        if digest is not None:
            self.keys.begin(request, event, digest)
        if registration is None:
            endpoint.queue.put(request, endpoint.line_of(request))
        else:
            self._assign(request, registration, now)

    def _within_rate(self, event: Asked, now: float) -> bool:
        """Whether its principal may ask one more now. If not, it has been refused."""
        principal, per_s = event.session.principal, self.state.limits.requests_per_s
        wait_s = self.rates.take(principal, per_s, now)
        if wait_s:
            detail = f"{principal} asks more than {per_s:g} a second"
            self.refusals.overloaded(event, "rate", detail, math.ceil(wait_s * 1000 - 1e-6))
        return not wait_s

    def _unserved(self, event: Asked, endpoint: Endpoint | None, now: float) -> Endpoint | None:
        """Nobody serves it: refuse, unless the caller waits for somebody to come."""
        name, limits, refusals = event.endpoint, self.state.limits, self.refusals
        if endpoint is not None and endpoint.limits.closed:
            refusals.refuse(event, errors.DENIED, endpoint.why_closed)
        elif endpoint is not None and event.options.key is not None and self._knows(event, now):
            return endpoint
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

    def _may_wait(self, event: Asked, endpoint: Endpoint, now: float) -> bool:
        """No worker is free for it: whether it may wait. If not, it has been refused; else another may have ended."""
        if endpoint.registrations and not endpoint.has_method(event.method):
            detail = f"no worker of {endpoint.name} has a method {event.method}"
            self.refusals.refuse(event, errors.NO_METHOD, detail)
        elif endpoint.limits.newest_wins and self._supersede(event, endpoint, now):
            return True
        elif len(endpoint.queue) >= endpoint.queue_max and not self._displace(event, endpoint, now):
            self.refusals.overloaded(event, "queue", f"{endpoint.queue_max} requests wait for {endpoint.name}")
        else:
            return True
        return False

    def _supersede(self, event: Asked, endpoint: Endpoint, now: float) -> bool:
        """End the older request of which this is the newer one, if one waits."""
        older = endpoint.queue.superseded(event.session, event.method, event.options.group)
        if older is None:
            return False
        endpoint.queue.discard(older)
        self.counters.superseded += 1
        self._end(older, outcome_of(errors.CANCELLED, older, now, cause="superseded"), None, now)
        return True

    def _displace(self, event: Asked, endpoint: Endpoint, now: float) -> bool:
        """The queue is full: end the newest request of who holds more of it than this caller, if there is one."""
        displaced = endpoint.queue.displaced(event.session.principal)
        if displaced is None or len(endpoint.queue) > endpoint.queue_max:
            return False
        endpoint.queue.discard(displaced)
        detail = f"{endpoint.queue_max} requests wait for {endpoint.name}, and another caller had fewer than this one"
        self.counters.displaced += 1
        self._end(displaced, self.overloaded(displaced, "queue", detail, now), None, now)
        return True

    def overloaded(
        self, request: Request, bound: str, detail: str, now: float, retryable: bool | None = None
    ) -> Outcome:
        """The outcome of a request that must go because this bound was reached; it is counted."""
        self.counters.overloaded[bound] += 1
        return outcome_of(errors.OVERLOADED, request, now, retryable, detail, bound=bound)

    def _assign(self, request: Request, registration: Registration, now: float) -> None:
        """Give a request to a worker that has been taken for it."""
        if request.body.attachments and not self.state.fits(registration.session, request.body):
            detail = f"as base64, for a worker that takes no binary frames, it is larger than {self.state.bound_text}"
            self._end(request, outcome_of(errors.TOO_LARGE, request, now, detail=detail), None, now)
            self.registry.unload(registration)
            return
        attempt = self.pending.open_attempt(request, registration, now)
        self.counters.attempts += 1
        if request.work is not None:
            for joined in request.work.joined:
                joined.attempts = request.attempts
        call = Call(attempt, request.endpoint.name, request.method, request.body, request.deadline - now)
        self.effects.append(Deliver(registration.session, call))
        if request.stream is not None:
            self.state.budget.hold(request, -request.stream.kept_bytes())  # they go on now
            begin(request, attempt, self.effects)

    def notify(self, event: Asked, now: float) -> None:
        """Give a call nobody waits for to one worker, if one is free. No slot, no queue, no answer."""
        endpoint = self.registry.by_name.get(event.endpoint)
        allowed = event.session.may(_CALLER, event.endpoint) and not self.state.draining
        if allowed and self.state.limits.requests_per_s:
            allowed = self._within_rate(event, now)
        if endpoint is not None and allowed:
            registration = endpoint.free.choose(event.method, event.options.group)
            body = event.body
            if registration is not None and (not body.attachments or self.state.fits(registration.session, body)):
                notify = Notify(endpoint.name, event.method, body, event.session)
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
        if request.stream is not None and request.stream.gathered and error is None:
            try:
                body = self.state.join(request.stream.gathered, request.stream.more, body)
            except ValueError as fault:
                self.bad_reply(BadReply(worker, event.attempt, str(fault)), now)
                return
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

    # ------------------------------------------------------------ streams

    def stream_of(self, request: Request, now: float) -> Stream:
        """The stream of a request, begun if it had none."""
        stream = request.stream
        if stream is None:
            stream = request.stream = new_stream(request, now)
        return stream

    def let_flow(self, request: Request, stream: Stream) -> None:
        """Parts flow: if its caller named no timeout, it may go on as long as it does not stand still."""
        if request.options.timeout is None:
            request.deadline = request.accepted_at + request.endpoint.deadline_max_s
        self.pending.put_off(request, stream.due(request))

    # ------------------------------------------------------------ ends

    def _end(
        self, request: Request, outcome: Outcome, body: Body | None, now: float, worker: Session | None = None
    ) -> None:
        """End a request, once: it leaves all tables, is counted, and its caller is told. A place is freed elsewhere."""
        session, options = request.session, request.options
        timing = timing_of(request, now) if options.timing else None
        self.pending.close(request)
        told, reply = outcome, body
        if body is not None and body.attachments and not self.state.fits(session, body):
            told, reply = outcome_of(errors.TOO_LARGE, request, now, detail=self.state.too_large_reply), None
        self.counters.end(told.kind.name, now - request.accepted_at)
        if session.link is not None:
            meta = self._reply_meta(request, told, now, worker, timing) if options.meta else None
            self.effects.append(Deliver(session, End(request.wire_id, told, reply, meta)))
        if request.work is not None:
            self._end_joined(request, outcome, body, now, worker)

    def _reply_meta(
        self, request: Request, outcome: Outcome, now: float, worker: Session | None, timing: Timing | None
    ) -> ReplyMeta:
        return ReplyMeta(
            worker=self.state.peer_name(worker) if worker else None,
            attempts=request.attempts,
            elapsed_ms=milliseconds(now - request.accepted_at),
            retryable=outcome.retryable,
            trace=request.options.trace,
            timing=timing,
            repeated=request.repeated,
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
            request = queue.take(registration, now)
            if request is None:
                return
            request = self._in_time(request, now)
            if request.deadline > now:
                registration.endpoint.free.load(registration)
                self._assign(request, registration, now)

    def feed_all(self, endpoint: Endpoint, now: float) -> None:
        """Who may do what has changed: give every worker that is free what waits for it."""
        if endpoint.queue and len(endpoint.free):
            for registration in list(endpoint.registrations.values()):
                self.feed(registration, now)

    # ------------------------------------------------------------ ends before the answer

    def stop(self, request: Request, outcome: Outcome, now: float) -> None:
        """End a request before its answer: the worker that has it is told, its place is free at once."""
        if request.state is ENDED:  # it had joined another, with which it has ended meanwhile
            return
        attempt, work = request.attempt, request.work
        if work is not None and work.joined:
            self._step_back(request, work, outcome, now)
            return
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
        self.keys.forget(self.state.limits, now)
        for request in self.pending.take_due(now, limit):
            stream, detail = request.stream, ""
            if stream is not None:
                if (due_at := stream.due(request)) > now:
                    self.pending.put_off(request, due_at)
                    continue
                if request.deadline > now:
                    detail = f"nothing came for {stream.idle_s:g} s"
            leader = request if request.work is None else request.work.leader
            if leader.attempt is None:
                outcome = outcome_of(errors.DEADLINE, request, now, True, detail, "queued")
            else:
                outcome = outcome_of(errors.DEADLINE, request, now, request.options.idempotent, detail, "executing")
            self.stop(request, outcome, now)

    # ------------------------------------------------------------ workers that go

    def worker_gone(self, event: Detached, now: float) -> None:
        """What a worker had in its hands when its link ended is tried elsewhere, waits, or ends."""
        attempts = list(event.session.attempts.values())
        for attempt in attempts:
            self._lost(attempt, event, now)
        for attempt in reversed(attempts):  # each was put before the others: the oldest shall stand first
            if attempt.request.state is QUEUED:
                endpoint = attempt.request.endpoint
                endpoint.queue.put_first(attempt.request, endpoint.line_of(attempt.request))

    def _lost(self, attempt: Attempt, event: Detached, now: float) -> None:
        """A worker went away with an attempt: the request is tried elsewhere if its caller allowed that, or ends."""
        request = self._in_time(attempt.request, now)
        request.sent_at = attempt.sent_at
        request.spent_s += now - max(attempt.sent_at, request.accepted_at)
        self.pending.close_attempt(attempt)
        self.registry.unload(attempt.registration)
        idempotent, stream = request.options.idempotent, request.stream
        fresh = stream is None or stream.is_fresh(request)
        if idempotent and fresh and request.attempts <= request.options.retries and self._retry(request, now):
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
        if request.stream is not None:
            self.state.budget.hold(request, -request.stream.kept_bytes())
            request.stream.begin_anew()
        registration = endpoint.free.take(request.method, request.options.group)
        if registration is not None:
            self.counters.retries += 1
            self._assign(request, registration, now)
            return True
        if len(endpoint.queue) >= endpoint.queue_max:
            return False
        self.counters.retries += 1
        request.state = QUEUED
        endpoint.queue.put_first(request, endpoint.line_of(request))
        return True

    def abandon(self, endpoint: Endpoint, now: float) -> None:
        """A worker has left. If it was the last, who waits for one to be free is told.

        Who waits for one to come goes on waiting. What was bound to the one that left is bound to another now.
        """
        if endpoint.registrations:
            self.feed_all(endpoint, now)
            return
        for request in _with_joined(endpoint.queue):
            if not request.options.wait and not request.attempts:
                detail = f"all workers of {endpoint.name} have gone while it waited"
                self.stop(request, outcome_of(errors.NO_WORKER, request, now, detail=detail, phase="queued"), now)

    def close(self, endpoint: Endpoint, now: float) -> None:
        """The endpoint has been closed: what waits there ends."""
        for request in _with_joined(endpoint.queue):
            self.stop(request, outcome_of(errors.DENIED, request, now, detail=endpoint.why_closed, phase="queued"), now)


def _with_joined(queue: Iterable[Request]) -> list[Request]:
    """All that wait there, those that have joined one of them before it."""
    return [
        each for request in queue for each in (*(() if request.work is None else request.work.joined), request)
    ]  # fmt: skip


def _is_said_again(event: Asked) -> bool:
    """Whether a session that outlives its links says a request again that is in flight: then it is that one."""
    earlier = event.session.requests[event.wire_id]
    asked = event.endpoint, event.method, bytes(event.body.raw), event.body.attachments
    before = earlier.endpoint.name, earlier.method, bytes(earlier.body.raw), earlier.body.attachments
    return event.session.kept is not None and asked == before
