"""The router: events in, effects out. It alone decides how a request goes and how it ends.

Every accepted request takes one way through here: `_asked` takes it in or refuses it, `_assign` gives it to a worker
or the endpoint's queue lets it wait, and `_end` ends it: once, because a request that has ended stands in no table any
more.

The router has no clock and does no I/O: `now` is an argument, on any clock that never goes back. It is owned by one
thread. Effects gather in `effects`; whoever feeds events performs them in order and clears the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec

from broker._version import VERSION
from broker.core import commands, errors
from broker.core.access import Role, role_name
from broker.core.commands import CommandError, read_params
from broker.core.counters import Counters
from broker.core.errors import ENDED_HERE, ENDED_OK, Kind, Outcome
from broker.core.events import (
    Answered,
    Asked,
    Attached,
    BadReply,
    Cancel,
    CloseLink,
    Congested,
    Deliver,
    Detached,
    Drain,
    Effect,
    Event,
    Malformed,
    PauseReading,
    Refused,
    ResumeReading,
    StartFanout,
    Stray,
)
from broker.core.ids import WireId
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, Broadcast, Call, CancelAttempt, End, Notify, ReplyMeta
from broker.core.options import OptionError, merge
from broker.core.pending import ENDED, QUEUED, Attempt, Pending, Request
from broker.core.registry import Endpoint, Registration, Registry
from broker.core.sessions import Session, Sessions
from broker.core.topics import PEERS_TOPIC, Fanouts, Topic, topic_of

_CALLER: int = Role.CALLER.value
_SPEAKER: int = (Role.CALLER | Role.WORKER).value

LIST_MAX = 10_000
"""rows of one listing; the oldest sessions come first"""
RETRY_AFTER_MS = 100
"""what `overloaded` suggests to wait where the broker knows no better"""

encode_json = msgspec.json.Encoder().encode


class Router:
    """The machine. `node` distinguishes this broker's peers and ids from those of others; it must be new each start."""

    def __init__(
        self,
        limits: Limits,
        endpoints: Mapping[str, EndpointLimits] | None = None,
        *,
        node: str = "n",
        now: float = 0.0,
    ) -> None:
        self.limits = limits
        self.node = node
        self.started_at = now
        self.draining = False
        self.sessions = Sessions(limits)
        self.registry = Registry(limits, endpoints or {})
        self.pending = Pending(limits)
        self.fanouts = Fanouts()
        self.counters = Counters()
        self.effects: list[Effect] = []
        self.handlers: dict[type, Callable[[Any, float], None]] = {
            Asked: self._asked,
            Answered: self._answered,
            BadReply: self._bad_reply,
            Cancel: self._cancelled,
            Attached: self._attached,
            Detached: self._detached,
            Stray: self._stray,
            Malformed: self._malformed,
            Refused: self._refused,
            Congested: self._congested,
            Drain: self._drain,
        }
        self._commands: dict[str, Callable[[Asked, float], object]] = {
            "broker.serve": self._serve,
            "broker.unserve": self._unserve,
            "broker.subscribe": self._subscribe,
            "broker.unsubscribe": self._unsubscribe,
            "broker.publish": self._publish,
            "broker.endpoints": self._list_endpoints,
            "broker.describe": self._describe,
            "broker.ping": self._ping,
            "broker.admin.peers": self._list_peers,
            "broker.admin.pending": self._list_pending,
            "broker.admin.cancel": self._admin_cancel,
            "broker.admin.close": self._admin_close,
        }

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; what it causes is appended to `effects`, which is returned.

        The engine calls `handlers[type(event)]` itself, which saves a call.
        """
        self.handlers[type(event)](event, now)
        return self.effects

    def next_deadline(self) -> float:
        """When `tick` wants to be called next; `NEVER` if nothing is due ever."""
        return min(self.pending.deadlines.earliest, self.sessions.expiry.earliest)

    def reconfigure(self, limits: Limits, endpoints: Mapping[str, EndpointLimits], now: float) -> None:
        """Take over new bounds; they hold for what comes from now on. A queue above its new bound drains by itself.

        Who is attached to an endpoint that is closed now, or serves it, is told so: effects, as of `handle`.
        """
        self.limits = limits
        self.registry.reconfigure(limits, endpoints)
        shut_out = [(session, why) for session in self.sessions.by_id.values() if (why := self._shut_out(session))]
        for endpoint in self.registry.by_name.values():
            if endpoint.limits.closed:
                self._shut(endpoint, now)
        # Last, so that an outcome still reaches whose link is closed.
        self.effects += [CloseLink(session, errors.ENDPOINT_CLOSED, why) for session, why in shut_out]

    def _shut_out(self, session: Session) -> str:
        """Why an endpoint this session is attached to, or serves, is closed; empty if all are open."""
        names = [session.endpoint, *(endpoint.name for endpoint in session.registrations)]
        return next((why for name in names if name is not None and (why := self.registry.closed(name))), "")

    def _shut(self, endpoint: Endpoint, now: float) -> None:
        """Give a closed endpoint's workers nothing more, though their links may be open for a while; end what waits."""
        for registration in list(endpoint.registrations.values()):
            self.registry.unregister(registration)
            self._announce(endpoint, "unserved", registration.session)
        for request in list(endpoint.queue):
            outcome = self._outcome(errors.DENIED, request, now, detail=_closed(endpoint), phase="queued")
            self._stop(request, outcome, now)

    def peer_name(self, session: Session) -> str:
        """What a session is called towards others."""
        return f"{self.node}-{session.id}"

    # ------------------------------------------------------------ the way of a request

    def _asked(self, event: Asked, now: float) -> None:
        """Refuse a request, or take it in: then it is in the books until `_end`."""
        session, wire_id, name = event.session, event.wire_id, event.endpoint
        if session.link is None:  # said before it left, heard after: nothing may be opened for it any more
            return
        if wire_id is None:
            self._notified(event, now)
            return
        if wire_id in session.requests:
            self._refuse(event, errors.DUPLICATE_ID, "the first request with this id goes on")
            return
        if not name:
            self._command(event, now)
            return
        if not (session.roles.get(name, 0) & _CALLER or session.may(_CALLER, name)):  # saves a call: 0.08 µs
            self._refuse(event, errors.DENIED, f"{session.principal} may not call {name}")
            return
        if self.draining:
            self._refuse(event, errors.SHUTTING_DOWN)
            return
        if len(session.requests) >= self.limits.in_flight_max:
            self._overloaded(event, "in_flight", f"{self.limits.in_flight_max} requests of this session are in flight")
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
            self._refuse(event, errors.INVALID_PARAMS, detail)
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
        name = event.endpoint
        if endpoint is not None and endpoint.limits.closed:
            self._refuse(event, errors.DENIED, _closed(endpoint))
        elif event.options.wait:
            endpoint = endpoint or self.registry.get_or_make(name)
            if endpoint is not None:
                return endpoint
            self._overloaded(event, "endpoints", f"{self.limits.endpoints_known_max} endpoints are in use")
        elif endpoint is None or not endpoint.served:
            young = now - self.started_at < self.limits.start_grace_s
            self._refuse(
                event, errors.NO_ENDPOINT, f"no worker has served {name} since the broker started", retryable=young
            )
        else:
            self._refuse(event, errors.NO_WORKER, f"all workers of {name} have gone")
        return None

    def _may_wait(self, event: Asked, endpoint: Endpoint) -> bool:
        """No worker is free for it: whether it may wait. If not, it has been refused."""
        if endpoint.registrations and not endpoint.has_method(event.method):
            self._refuse(event, errors.NO_METHOD, f"no worker of {endpoint.name} has a method {event.method}")
        elif len(endpoint.queue) >= endpoint.queue_max:
            self._overloaded(event, "queue", f"{endpoint.queue_max} requests wait for {endpoint.name}")
        else:
            return True
        return False

    def _assign(self, request: Request, registration: Registration, now: float) -> None:
        """Give a request to a worker that has been taken for it."""
        if request.body.attachments and not self._fits(registration.session, request.body):
            detail = f"as base64, for a worker that takes no binary frames, it is larger than {self._bound_text}"
            self._end(request, self._outcome(errors.TOO_LARGE, request, now, detail=detail), None, now)
            self.registry.unload(registration)
            return
        attempt = self.pending.open_attempt(request, registration, now)
        self.counters.attempts += 1
        call = Call(attempt, request.endpoint.name, request.method, request.body, request.deadline - now)
        self.effects.append(Deliver(registration.session, call))

    def _answered(self, event: Answered, now: float) -> None:
        """A worker's answer: if it counts, its request has ended and its place is free."""
        worker, body, error = event.session, event.body, event.error
        attempt = worker.attempts.get(event.attempt)
        if attempt is None:
            self.counters.late_replies += 1
            return
        request, registration = attempt.request, attempt.registration
        outcome = ENDED_OK if error is None else self._outcome(errors.WORKER_ERROR, request, now, error.retryable)
        if body.attachments and request.session.link is not None and not self._fits(request.session, body):
            detail = f"the reply as base64, for a caller that takes no binary frames, is larger than {self._bound_text}"
            self._end(request, self._outcome(errors.TOO_LARGE, request, now, detail=detail), None, now)
        else:
            self._end(request, outcome, body, now, worker)
        self._free(registration, now)

    def _bad_reply(self, event: BadReply, now: float) -> None:
        attempt = event.session.attempts.get(event.attempt)
        if attempt is None:
            self.counters.late_replies += 1
            return
        request = attempt.request
        outcome = self._outcome(errors.BAD_REPLY, request, now, request.options.idempotent, detail=event.detail)
        self._end(request, outcome, None, now, event.session)
        self._free(attempt.registration, now)

    def _fits(self, session: Session, body: Body) -> bool:
        """Whether a body with attachments is within the bound for messages as this peer gets them."""
        link = session.link
        return link is None or link.takes_binary or body.expanded_size() <= self.limits.message_max_bytes

    @property
    def _bound_text(self) -> str:
        return f"the bound of {self.limits.message_max_bytes} bytes for a message"

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

    def _free(self, registration: Registration, now: float) -> None:
        """A place at a worker is free: whoever waits may have it."""
        self.registry.unload(registration)
        if registration.endpoint.queue:
            self._feed(registration, now)

    def _feed(self, registration: Registration, now: float) -> None:
        """Give a worker what waits, as long as it can take it.

        What has expired meanwhile is passed over, never given out: it is due, and `tick` ends it in its turn.
        """
        queue = registration.endpoint.queue
        while registration.free and queue:
            request = queue.take(registration)
            if request is None:
                return
            if request.deadline > now:
                registration.endpoint.free.load(registration)
                self._assign(request, registration, now)

    def _stop(self, request: Request, outcome: Outcome, now: float) -> None:
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

    def _stop_all(self, requests: list[Request], kind: Kind, now: float, cause: str = "") -> None:
        """End many. Those that wait go first, so that a place that becomes free starts nothing that ends next."""
        requests.sort(key=lambda request: request.attempt is not None)
        for request in requests:
            retryable = kind.retryable and (request.options.idempotent or not request.attempts)
            self._stop(request, self._outcome(kind, request, now, retryable, cause=cause), now)

    def _reply_meta(self, request: Request, outcome: Outcome, now: float, worker: Session | None) -> ReplyMeta:
        return ReplyMeta(
            worker=self.peer_name(worker) if worker else None,
            attempts=request.attempts,
            elapsed_ms=_milliseconds(now - request.accepted_at),
            retryable=outcome.retryable,
            trace=request.options.trace,
        )

    def _outcome(
        self,
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

    # ------------------------------------------------------------ refusals and notifications

    def _refuse(self, event: Asked, kind: Kind, detail: str = "", **more: Any) -> None:
        """End a request that was never taken in: the refusal is its outcome."""
        more.setdefault("retryable", kind.retryable)
        outcome = Outcome(kind=kind, detail=detail, endpoint=event.endpoint, method=event.method, **more)
        if event.wire_id is not None:
            self._end_here(event.session, event.wire_id, outcome, None)

    def _overloaded(self, event: Asked, bound: str, detail: str) -> None:
        self._refuse(event, errors.OVERLOADED, detail, bound=bound, retry_after_ms=RETRY_AFTER_MS)

    def _end_here(self, session: Session, wire_id: WireId, outcome: Outcome, body: Body | None) -> None:
        """End a request that never stood in the tables; it counts as accepted too."""
        self.counters.accepted += 1
        self.counters.ended[outcome.kind.name] += 1
        if session.link is not None:
            self.effects.append(Deliver(session, End(wire_id, outcome, body)))

    def _refused(self, event: Refused, now: float) -> None:
        session = event.session
        if session.link is None:
            return
        kind, detail = event.kind, event.detail
        if event.wire_id in session.requests:
            kind, detail = errors.DUPLICATE_ID, "the first request with this id goes on"
        outcome = Outcome(
            kind=kind, detail=detail, retryable=kind.retryable, endpoint=event.endpoint, method=event.method
        )
        self._end_here(session, event.wire_id, outcome, None)

    def _notified(self, event: Asked, now: float) -> None:
        """A call nobody waits for."""
        self.counters.notifications += 1
        if event.endpoint:
            self._notify(event, now)
        else:
            self._command(event, now)

    def _notify(self, event: Asked, now: float) -> None:
        """Give it to one worker, if one is free. No slot, no queue, no answer."""
        endpoint = self.registry.by_name.get(event.endpoint)
        if endpoint is not None and event.session.may(_CALLER, event.endpoint) and not self.draining:
            registration = endpoint.free.choose(event.method)
            body = event.body
            if registration is not None and (not body.attachments or self._fits(registration.session, body)):
                notify = Notify(endpoint.name, event.method, body)
                self.effects.append(Deliver(registration.session, notify))
                endpoint.free.changed(
                    registration, registration.load
                )  # so that the next goes to the next of its equals
                return
        self.counters.notifications_dropped += 1

    # ------------------------------------------------------------ replies that match nothing, messages that are none

    def _stray(self, event: Stray, now: float) -> None:
        session = event.session
        if event.foreign:
            self.counters.foreign_replies += 1
            self._strike(session, now, "it answered what others were asked")
        elif event.nameless:
            self.counters.nameless_replies += 1
            session.nameless_replies += 1
            if event.error is not None and event.error.code in (-32600, -32700) and len(session.attempts) == 1:
                # A library that could not read the call says so without an id: with one call in flight it is that one.
                (attempt,) = session.attempts
                self._answered(Answered(session, attempt, event.body, event.error), now)
        else:
            self.counters.late_replies += 1

    def _malformed(self, event: Malformed, now: float) -> None:
        self.counters.malformed += 1
        if event.strike:
            self._strike(event.session, now, event.detail)

    def _strike(self, session: Session, now: float, what: str) -> None:
        if session.link is None:
            return
        self.counters.strikes += 1
        remembered = now - self.limits.strike_memory_s
        session.strikes = (*(at for at in session.strikes if at > remembered), now)[-self.limits.strikes_max :]
        if len(session.strikes) >= self.limits.strikes_max:
            self.effects.append(CloseLink(session, errors.BAD_MESSAGE, f"{len(session.strikes)} strikes, last: {what}"))

    # ------------------------------------------------------------ time

    def tick(self, now: float, limit: int) -> bool:
        """End at most `limit` requests whose deadline has passed, in their order; whether more is due already."""
        for request in self.pending.take_due(now, limit):
            if request.attempt is None:
                outcome = self._outcome(errors.DEADLINE, request, now, True, phase="queued")
            else:
                outcome = self._outcome(errors.DEADLINE, request, now, request.options.idempotent, phase="executing")
            self._stop(request, outcome, now)
        for session in self.sessions.expiry.take_due(now, limit):
            self.effects.append(CloseLink(session, errors.UNAUTHORISED, "the credential has expired"))
        return self.next_deadline() <= now

    def _cancelled(self, event: Cancel, now: float) -> None:
        request = event.session.requests.get(event.wire_id)
        if request is not None:
            self._stop(request, self._outcome(errors.CANCELLED, request, now, cause="caller"), now)

    def _drain(self, event: Drain, now: float) -> None:
        self.draining = True
        if event.now:
            self._stop_all(list(self.requests()), errors.SHUTTING_DOWN, now)

    # ------------------------------------------------------------ comings and goings

    def _attached(self, event: Attached, now: float) -> None:
        self.counters.attached += 1
        session = Session(event, now, self.limits.capacity)
        self.sessions.open(session)
        if event.endpoint is None:
            return
        wanted = event.role == Role.WORKER or event.listen
        registry = self.registry
        endpoint = registry.get_or_make(event.endpoint) if wanted else registry.by_name.get(event.endpoint)
        if endpoint is None:
            if wanted:
                detail = f"{self.limits.endpoints_known_max} endpoints are in use"
                self.effects.append(CloseLink(session, errors.TOO_MANY, detail))
            return
        if event.listen:
            self._topic(endpoint, None).subscribe(session)
        if event.role == Role.WORKER:
            self._register(session, endpoint, None, session.capacity, event.info, now)
        else:
            self._announce(endpoint, "attached", session)

    def _detached(self, event: Detached, now: float) -> None:
        session = event.session
        if session.link is None:
            return
        self.counters.detached += 1
        session.link = None
        self.sessions.close(session)
        for topic in list(session.subscriptions):
            topic.unsubscribe(session)
        endpoints = list(session.registrations)
        for registration in list(session.registrations.values()):
            self.registry.unregister(registration)
        self._stop_all(list(session.requests.values()), errors.CANCELLED, now, cause="caller")
        for endpoint in endpoints:
            self._abandon(endpoint, now)
        attempts = list(session.attempts.values())
        for attempt in attempts:
            self._lost(attempt, event, now)
        for attempt in reversed(attempts):  # each was put before the others: the oldest shall stand first
            if attempt.request.state is QUEUED:
                attempt.request.endpoint.queue.put_first(attempt.request)
        if session.endpoint is not None and not endpoints and session.endpoint in self.registry.by_name:
            self._announce(self.registry.by_name[session.endpoint], "detached", session)
        for endpoint in endpoints:
            self._announce(endpoint, "unserved", session)

    def _lost(self, attempt: Attempt, event: Detached, now: float) -> None:
        """A worker went away with an attempt: the request is tried elsewhere if its caller allowed that, or ends."""
        request = attempt.request
        self.pending.close_attempt(attempt)
        self.registry.unload(attempt.registration)
        idempotent = request.options.idempotent
        if idempotent and request.attempts <= request.options.retries and self._retry(request, now):
            return
        written = attempt.mark <= event.flushed
        outcome = self._outcome(
            errors.WORKER_LOST,
            request,
            now,
            retryable=idempotent or not written,
            detail=f"worker {self.peer_name(event.session)} closed with {event.code} {event.reason}".rstrip(),
        )
        self._end(request, outcome, None, now, event.session)

    def _retry(self, request: Request, now: float) -> bool:
        """Try a request again, or let it wait for a worker; False if there is no time or no room."""
        endpoint = request.endpoint
        if request.deadline <= now or self.draining or endpoint.limits.closed:
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

    def _abandon(self, endpoint: Endpoint, now: float) -> None:
        """The last worker has left: who waits for one to be free is told, who waits for one to come goes on waiting."""
        if endpoint.registrations:
            return
        for request in list(endpoint.queue):
            if not request.options.wait and not request.attempts:
                detail = f"all workers of {endpoint.name} have gone while it waited"
                self._stop(request, self._outcome(errors.NO_WORKER, request, now, detail=detail, phase="queued"), now)

    def _congested(self, event: Congested, now: float) -> None:
        session = event.session
        if session.link is None:
            return
        session.congested = event.congested
        for registration in session.registrations.values():
            self.registry.refresh(registration)
            self._feed(registration, now)
        if not event.congested:
            self.effects.append(ResumeReading(session))  # it may have become a worker since it was paused
        elif not session.registrations:  # a worker must stay free to answer, or both sides would wait for the other
            self.effects.append(PauseReading(session))

    def _register(
        self,
        session: Session,
        endpoint: Endpoint,
        methods: frozenset[str] | None,
        capacity: int,
        info: Body,
        now: float,
    ) -> None:
        registration = self.registry.register(session, endpoint, methods, capacity, info)
        self._feed(registration, now)
        self._announce(endpoint, "serving", session)

    def _announce(self, endpoint: Endpoint, what: str, session: Session) -> None:
        """Tell those who listen to comings and goings at an endpoint."""
        topic = endpoint.topics.get(PEERS_TOPIC)
        if topic is not None and topic.subscribers:
            role = "worker" if what in ("serving", "unserved") else (session.role.name or "").lower()
            view = {
                "event": what,
                "peer": self.peer_name(session),
                "role": role,
                "workers": len(endpoint.registrations),
            }
            message = topic.next(Body(encode_json(view)))
            if len(self.fanouts) >= self.limits.fanouts_max:
                self.counters.broadcasts_refused += 1  # its number is taken: by the gap listeners see what they missed
            else:
                self._fan_out(message, topic.snapshot())

    # ------------------------------------------------------------ the broker's own methods

    def _command(self, event: Asked, now: float) -> None:
        try:
            if event.method == "broker.call":
                self._call(event, now)
                return
            result = self._find_command(event)(event, now)
        except CommandError as error:
            self._refuse(event, errors.INVALID_PARAMS, f"{event.method}: {error}")
        except _Refusal as refusal:
            self._refuse(event, refusal.kind, str(refusal), **refusal.more)
        else:
            if event.wire_id is not None:
                self._end_here(event.session, event.wire_id, ENDED_HERE, Body(encode_json(result)))

    def _find_command(self, event: Asked) -> Callable[[Asked, float], object]:
        if event.method.startswith("broker.admin.") and not event.session.is_admin:
            raise _Refusal(errors.DENIED, f"{event.session.principal} is no administrator")
        command = self._commands.get(event.method)
        if command is None:
            raise _Refusal(errors.NO_METHOD, f"the broker's own methods are broker.call, {', '.join(self._commands)}")
        return command

    def _call(self, event: Asked, now: float) -> None:
        params = read_params(event.body.raw, commands.CallParams)
        name = params.endpoint or event.session.endpoint
        if name is None:
            raise CommandError("endpoint is missing, and this link is attached to none")
        if params.method.startswith("broker."):
            raise CommandError("methods that begin with broker. are called directly")
        try:
            options = merge(params, event.options)
        except OptionError as error:
            raise CommandError(str(error)) from None
        options = msgspec.structs.replace(options, meta=event.options.meta)
        body = Body(params.params, event.body.attachments)
        asked = Asked(event.session, event.wire_id, name, params.method, body, options)
        if event.wire_id is None:
            self._notify(asked, now)
        else:
            self._asked(asked, now)

    def _endpoint_for(self, event: Asked, name: str | None, role: Role) -> Endpoint:
        """The endpoint a command is about, made if need be, if the session has the role there."""
        session = event.session
        name = name or session.endpoint
        if name is None:
            raise CommandError("endpoint is missing, and this link is attached to none")
        if not session.may(role, name):
            raise _Refusal(errors.DENIED, f"{session.principal} may not be {role_name(role)} at {name}")
        endpoint = self.registry.get_or_make(name)
        if endpoint is None:
            raise _overloaded("endpoints", f"{self.limits.endpoints_known_max} endpoints are in use")
        if endpoint.limits.closed:
            raise _Refusal(errors.DENIED, _closed(endpoint))
        return endpoint

    def _one_more_name(self, session: Session) -> None:
        if len(session.registrations) + len(session.subscriptions) >= self.limits.names_per_session_max:
            raise _overloaded("names", f"{self.limits.names_per_session_max} endpoints and topics of this session")

    def _serve(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.ServeParams)
        if params.methods is not None and len(params.methods) > self.limits.methods_declared_max:
            raise CommandError(f"more than {self.limits.methods_declared_max} methods")
        endpoint = self._endpoint_for(event, params.endpoint, Role.WORKER)
        session = event.session
        if endpoint not in session.registrations:
            self._one_more_name(session)
        methods = None if params.methods is None else frozenset(params.methods)
        self._register(session, endpoint, methods, params.capacity or session.capacity, Body(params.info), now)
        return {"endpoint": endpoint.name, "peer": self.peer_name(session)}

    def _unserve(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.UnserveParams)
        endpoint = self._endpoint_for(event, params.endpoint, Role.WORKER)
        registration = endpoint.registrations.get(event.session)
        if registration is not None:
            self.registry.unregister(registration)
            self._abandon(endpoint, now)
            self._announce(endpoint, "unserved", event.session)
        return {"endpoint": endpoint.name, "served": registration is not None}

    def _topic(self, endpoint: Endpoint, name: str | None) -> Topic:
        topic = topic_of(endpoint, name, self.limits.topics_per_endpoint_max)
        if topic is None:
            raise _overloaded("topics", f"{self.limits.topics_per_endpoint_max} topics of {endpoint.name} are in use")
        return topic

    def _subscribe(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.SubscribeParams)
        if params.since is not None:
            raise CommandError("since is not supported by this broker yet: topics keep no history; leave it out")
        endpoint = self._endpoint_for(event, params.endpoint, Role.LISTENER)
        known = endpoint.topics.get(params.topic)
        if known is None or event.session not in known.subscribers:
            self._one_more_name(event.session)
        topic = self._topic(endpoint, params.topic)
        topic.subscribe(event.session)
        return {"endpoint": endpoint.name, "topic": topic.name, "seq": topic.seq}

    def _unsubscribe(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.SubscribeParams)
        endpoint = self._endpoint_for(event, params.endpoint, Role.LISTENER)
        topic = endpoint.topics.get(params.topic)
        subscribed = topic is not None and topic.unsubscribe(event.session)
        return {"endpoint": endpoint.name, "topic": params.topic, "subscribed": subscribed}

    def _publish(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.PublishParams)
        body = Body(params.data, event.body.attachments)
        if len(self.fanouts) >= self.limits.fanouts_max:
            self.counters.broadcasts_refused += 1
            raise _overloaded("fanouts", f"{self.limits.fanouts_max} broadcasts are under way")
        if params.topic is not None and params.topic.startswith("broker."):
            raise CommandError(f"topic {params.topic}: names that begin with broker. are the broker's own")
        if params.to is not None:
            return self._publish_to(event.session, params, body)
        if params.endpoint is None and params.topic is None:
            return self._publish_to_all(event.session, body)
        endpoint = self._endpoint_for(event, params.endpoint, Role.CALLER | Role.WORKER)
        topic = endpoint.topics.get(params.topic)
        if topic is None and params.topic is None:
            topic = self._topic(endpoint, None)
        if topic is None:
            return {"seq": None, "listeners": 0}
        self._fan_out(topic.next(body), topic.snapshot())
        return {"seq": topic.seq, "listeners": len(topic.subscribers)}

    def _publish_to(self, session: Session, params: commands.PublishParams, body: Body) -> object:
        target = self._peer(params.to or "")
        if target is None or not self._reaches(session, target):
            raise CommandError(f"no peer {params.to!r} within reach")
        self._fan_out(Broadcast(params.endpoint, params.topic, None, body), (target,))
        return {"seq": None, "listeners": 1}

    def _publish_to_all(self, session: Session, body: Body) -> object:
        if not any(grant.roles & (Role.CALLER | Role.WORKER | Role.ADMIN) for grant in session.grants):
            raise _Refusal(errors.DENIED, f"{session.principal} may only listen")
        within: dict[str | None, bool] = {None: False}  # one look per endpoint, not per session
        for name in {other.endpoint: None for other in self.sessions.by_id.values()}:
            within[name] = name is not None and session.may(_SPEAKER, name)
        listeners = tuple(
            other
            for other in self.sessions.by_id.values()
            if other.listen and (within[other.endpoint] or self._reaches(session, other))
        )
        self._fan_out(Broadcast(None, None, None, body), listeners)
        return {"seq": None, "listeners": len(listeners)}

    def _reaches(self, session: Session, other: Session) -> bool:
        """Whether a publisher's grants cover something the other has to do with."""
        names = [other.endpoint] if other.endpoint else []
        names += [endpoint.name for endpoint in other.registrations]
        names += [topic.endpoint.name for topic in other.subscriptions]
        if names:
            return any(session.may(_SPEAKER, name) for name in names)
        return session is other or any(
            "*" in grant.endpoints and grant.roles & ~Role.LISTENER for grant in session.grants
        )

    def _fan_out(self, message: Broadcast, listeners: tuple[Session, ...]) -> None:
        self.counters.broadcasts += 1
        if listeners:
            self.fanouts.put(message, listeners)
            self.effects.append(StartFanout())

    def _peer(self, name: str) -> Session | None:
        node, _, number = name.rpartition("-")
        if node != self.node or not (number.isascii() and number.isdigit()) or len(number) > 18:
            return None
        return self.sessions.by_id.get(int(number))

    def _visible(self, session: Session, name: str) -> bool:
        return session.may(Role.CALLER | Role.WORKER | Role.LISTENER, name)

    def _list_endpoints(self, event: Asked, now: float) -> object:
        read_params(event.body.raw, commands.NoParams)
        return [
            commands.view_endpoint(e) for e in self.registry.by_name.values() if self._visible(event.session, e.name)
        ]

    def _describe(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.EndpointParams)
        name = params.endpoint or event.session.endpoint
        if name is None:
            raise CommandError("endpoint is missing, and this link is attached to none")
        if not self._visible(event.session, name):
            raise _Refusal(errors.DENIED, f"{event.session.principal} has no role at {name}")
        endpoint = self.registry.by_name.get(name)
        if endpoint is None:
            raise _Refusal(errors.NO_ENDPOINT, f"no worker has served {name} since the broker started")
        view = msgspec.structs.asdict(commands.view_endpoint(endpoint))
        return view | {"workers": commands.view_workers(endpoint, self.peer_name)}

    def _ping(self, event: Asked, now: float) -> object:
        uptime_s = round(now - self.started_at, 3)
        return {"node": self.node, "peer": self.peer_name(event.session), "uptime_s": uptime_s, "version": VERSION}

    def _list_peers(self, event: Asked, now: float) -> object:
        read_params(event.body.raw, commands.NoParams)
        return commands.view_peers(islice(self.sessions.by_id.values(), LIST_MAX), self.peer_name, now)

    def requests(self) -> Iterator[Request]:
        """Every request that has not ended, by session."""
        for session in self.sessions.by_id.values():
            yield from session.requests.values()

    def _list_pending(self, event: Asked, now: float) -> object:
        read_params(event.body.raw, commands.NoParams)
        return commands.view_pending(islice(self.requests(), LIST_MAX), self.peer_name, now)

    def _admin_cancel(self, event: Asked, now: float) -> object:
        number = read_params(event.body.raw, commands.CancelParams).request
        request = next((r for r in self.requests() if r.id == number), None)
        if request is not None:
            self._stop(request, self._outcome(errors.CANCELLED, request, now, cause="admin"), now)
        return {"request": number, "cancelled": request is not None}

    def _admin_close(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.CloseParams)
        target = self._peer(params.peer)
        if target is not None:
            self.effects.append(CloseLink(target, errors.FORBIDDEN, params.reason))
        return {"peer": params.peer, "closed": target is not None}

    # ------------------------------------------------------------ invariants

    def check(self) -> None:
        """Assert that all views of the tables agree. For tests and simulators; costs a walk over everything."""
        counters, sessions = self.counters, self.sessions.by_id.values()
        assert counters.accepted == sum(counters.ended.values()) + self.pending.count, "the books do not balance"
        assert self.pending.count == sum(len(s.requests) for s in sessions) == len(self.pending.deadlines)
        for session in sessions:
            assert session.link is not None
            for wire_id, request in session.requests.items():
                assert request.session is session and request.wire_id == wire_id and request.state is not ENDED
                assert request.slot is not None and request in request.slot
                assert request.attempt is None or request not in request.endpoint.queue, "it waits and a worker has it"
            for number, attempt in session.attempts.items():
                assert attempt.id == number and attempt.session is session
                assert attempt.request.attempt is attempt and attempt.request.state is not ENDED
            for topic in session.subscriptions:
                assert session in topic.subscribers
        for endpoint in self.registry.by_name.values():
            self._check_endpoint(endpoint)

    def _check_endpoint(self, endpoint: Endpoint) -> None:
        registrations = endpoint.registrations.values()
        assert len(endpoint.free) == sum(r.free for r in registrations)
        assert endpoint.listeners == sum(len(topic.subscribers) for topic in endpoint.topics.values())
        for registration in (*registrations, *endpoint.leaving.values()):
            attempts = [a for a in registration.session.attempts.values() if a.registration is registration]
            assert registration.load == len(attempts)
            assert registration.free == registration.willing
            assert registration.gone == (registration.session in endpoint.leaving)
            assert registration.load or not registration.gone, "it holds nothing and is remembered"
            assert not (registration.free and any(
                registration.methods is None or r.method in registration.methods for r in endpoint.queue
            )), "a request waits though a worker is free for it"  # fmt: skip


def _closed(endpoint: Endpoint) -> str:
    return f"{endpoint.name} is closed: {endpoint.limits.closed}"


def _milliseconds(seconds: float) -> float:
    """To the microsecond; `round` costs three times as much."""
    return int(seconds * 1e6 + 0.5) / 1e3


class _Refusal(Exception):
    """Raised inside a command to end it with an outcome; the text is the detail."""

    def __init__(self, kind: Kind, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.kind = kind
        self.more = more


def _overloaded(bound: str, detail: str) -> _Refusal:
    return _Refusal(errors.OVERLOADED, detail, bound=bound, retry_after_ms=RETRY_AFTER_MS)
