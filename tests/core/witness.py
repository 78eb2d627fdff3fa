"""A second opinion on the router: a plain ledger that sees every event and every effect, and knows what may follow.

It keeps no queue and no deadline slots, only what a patient clerk would write down: who asked what, who was given it,
how it ended. State machine and simulator both let it look after every step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import cast

import msgspec

from broker.core import errors
from broker.core.access import Role
from broker.core.attaching import Attaching, outlives
from broker.core.classes import class_of
from broker.core.dispatch import rank
from broker.core.events import (
    Answered,
    Asked,
    Attached,
    BadReply,
    Cancel,
    CloseLink,
    Congested,
    CreditGranted,
    Deliver,
    Detached,
    Drain,
    Effect,
    Event,
    PartSent,
    PauseReading,
    Progressed,
    Refused,
    Resumed,
    ResumeReading,
    StartFanout,
    Stray,
    TakeOver,
)
from broker.core.ids import AttemptId, WireId
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import (
    EMPTY,
    Body,
    Broadcast,
    Call,
    CancelAttempt,
    Credit,
    End,
    Notify,
    Options,
    Part,
    Progress,
    SessionTold,
)
from broker.core.queue import PASSED_MAX
from broker.core.router import Router
from broker.core.sessions import Session
from broker.core.topics import PEERS_TOPIC
from broker.wire.pieces import join_reply
from tests.core.flows import Flows, Streams

AT_THE_DOOR = {"no_endpoint", "no_worker", "no_method", "overloaded", "denied", "shutting_down", "invalid"}
OF_LISTENERS = {"broker.subscribe", "broker.unsubscribe", "broker.endpoints", "broker.describe", "broker.ping"}
EPSILON = 1e-6


class Violation(AssertionError):
    """The router did what it promises not to do."""


def expect(truth: object, *what: object) -> None:
    """Raise Violation with these words unless it is true."""
    if not truth:
        raise Violation(" ".join(map(str, what)))


class Serving:
    """A session that serves an endpoint, since which step, and how much it has in its hands."""

    __slots__ = ("capacity", "load", "methods", "since")

    def __init__(self, methods: list[str] | None, capacity: int, since: int) -> None:
        self.methods = methods
        self.capacity = capacity
        self.since = since
        self.load = 0

    def does(self, method: str) -> bool:
        return self.methods is None or method in self.methods


class Asking:
    """One accepted request. `lost` is who lost it last, `lost_at` in which step."""

    __slots__ = (
        "accepted_at", "attempt", "attempts", "body", "deadline", "endpoint", "flowed", "flows", "lost", "lost_at",
        "method", "options", "order", "serving", "session", "since", "wire_id", "worker",
    )  # fmt: skip

    def __init__(
        self,
        session: Session,
        wire_id: WireId,
        endpoint: str,
        method: str,
        options: Options,
        deadline: float,
        order: int,
    ) -> None:
        self.session = session
        self.wire_id = wire_id
        self.endpoint = endpoint
        self.method = method
        self.options = options
        self.deadline = deadline
        self.order = order
        self.since = 0
        self.worker: Session | None = None
        self.attempt: AttemptId = 0
        self.serving: Serving | None = None
        self.attempts = 0
        self.lost: Session | None = None
        self.lost_at = 0
        self.accepted_at = 0.0
        self.body = EMPTY
        self.flows: Flows | None = None
        self.flowed = False
        """whether any part came that counted"""

    def due(self, limits: Limits) -> float:
        """When it ends if nothing comes."""
        if self.flows is None or not (self.flowed or self.options.idle is not None):
            return self.deadline
        return min(self.deadline, self.flows.touched_at + (self.options.idle or limits.idle_s))

    @property
    def lane(self) -> tuple[str, int]:
        """The endpoint and the priority."""
        return (self.endpoint, self.options.priority)

    @property
    def subject(self) -> tuple[object, ...]:
        """What it is about, where the newest wins."""
        group = self.options.group
        if group is None:
            return (self.endpoint, self.method, self.session)
        return (self.endpoint, self.method, self.session.principal, group)

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among those that wait: what was lost stands first, the latest loss before earlier ones."""
        return (-self.lost_at, self.attempt) if self.lost_at else (0, self.order)

    def __repr__(self) -> str:
        return f"<{self.wire_id!r} of session {self.session.id} for {self.endpoint}/{self.method}>"


class Tick(msgspec.Struct, frozen=True):
    """Time passed: the event the router is told through `tick`."""

    limit: int


class Reconfigured(msgspec.Struct, frozen=True):
    """The configuration changed: the event the router is told through `reconfigure`."""

    endpoints: Mapping[str, EndpointLimits]


class _OneByOne:
    """The part of the router that forgets sessions, one at a time, with a word after each: so it is clear what follows
    from which."""

    def __init__(self, attaching: Attaching, after_each: Callable[[], None]) -> None:
        self._attaching = attaching
        self._after_each = after_each

    def expire(self, now: float, limit: int) -> None:
        self._after_each()
        for _ in range(limit):
            if self._attaching.sessions.expiry.earliest > now:
                break
            self._attaching.expire(now, 1)
            self._after_each()

    def __getattr__(self, name: str) -> object:
        return getattr(self._attaching, name)


class Witness:
    """Feeds a router and judges what it does. `feed`, `tick`, `reconfigure` and `fan_out` raise Violation."""

    def __init__(self, limits: Limits, endpoints: Mapping[str, EndpointLimits], now: float) -> None:
        self.limits = limits
        self.endpoints = endpoints
        self.router = Router(limits, endpoints, join=join_reply, now=now)
        self.now = now
        self.sessions: dict[Session, None] = {}
        self.open: dict[Session, dict[WireId, Asking]] = {}
        self.assigned: dict[Session, dict[AttemptId, Asking]] = {}
        self.serving: dict[str, dict[Session, Serving]] = {}
        self.leaving: dict[tuple[str, Session], Serving] = {}
        self.watching: dict[str, dict[Session, None]] = {}
        self.comings: Counter[str] = Counter()
        self.missed: dict[tuple[str, int], None] = {}
        self.under_way: deque[int] = deque()
        self.broadcasts_refused = 0
        self.congested: dict[Session, None] = {}
        self.accepted = 0
        self.ended: Counter[str] = Counter()
        self.attempts_seen: AttemptId = 0
        self.draining = False
        self.heard: dict[tuple[Session, str | None, str | None], int] = {}
        self.left_topic: dict[tuple[Session, str | None, str | None], None] = {}
        self.turns_made = 0
        self.turns: dict[tuple[object, ...], int] = {}
        self.passed: Counter[str] = Counter()
        self.streams = Streams(limits)
        self.away: dict[Session, float] = {}
        """those who have no link and may come back, and until when"""
        self._gone: list[Session] = []
        self._slices: list[tuple[int, list[Session]]] = []
        self.router.attaching = cast(Attaching, _OneByOne(self.router.attaching, self._session_expired))
        self._step = 0
        self._event: Event | Tick | Reconfigured = Tick(0)
        self._announced: list[str] = []
        self._fanouts = 0
        self._fresh: Asking | None = None
        self._due: Asking | None = None
        self._duplicates = 0
        self._latest_slot = -1.0
        self._latest_left: dict[str, int] = {}

    # ------------------------------------------------------------ steps

    def feed(self, event: Event) -> list[Effect]:
        """One event; what the router wants done."""
        self._begin(event)
        departing = self._before(event)
        effects = list(self.router.handle(event, self.now))
        self.router.effects.clear()
        if isinstance(event, Attached):
            self._attached(event)
        elif isinstance(event, Asked):
            self._command_before_effects(event, effects)
        self._absorb(effects)
        expect(self._duplicates == 0, "a duplicate id was not answered")
        expect(self._due is None, "an answer did not end", self._due)
        fresh = self._fresh
        if fresh is not None and not fresh.endpoint:
            expect(self.open.get(fresh.session, {}).get(fresh.wire_id) is not fresh, "a command did not end", event)
        for asking in departing:
            expect(asking.worker is None, "the worker was not told that the caller has gone", asking)
        self._announcements(effects)
        self.check()
        return effects

    def _begin(self, event: Event | Tick | Reconfigured) -> None:
        self._step += 1
        self._event, self._fresh, self._due, self._duplicates, self._latest_slot = event, None, None, 0, -1.0
        self._announced, self._fanouts, self._latest_left = [], 0, {}
        self._gone, self._slices = [], []
        self.streams.begin(event)

    def reconfigure(self, endpoints: Mapping[str, EndpointLimits]) -> list[Effect]:
        """The configuration changed; what the router wants done."""
        self._begin(Reconfigured(endpoints))
        self.endpoints = endpoints
        told = [session for session in self.sessions if any(map(self.closed, self._names(session)))]
        self.router.reconfigure(self.limits, endpoints, self.now)
        for name in filter(self.closed, self.router.registry.by_name):
            for session in list(self.serving.get(name, {})):
                self._serves_no_more(name, session)
        effects = list(self.router.effects)
        self.router.effects.clear()
        self._absorb(effects)
        closes = [effect for effect in effects if isinstance(effect, CloseLink)]
        expect([close.session for close in closes] == told, "told of a closed endpoint:", closes, "instead of", told)
        expect(all(close.close is errors.ENDPOINT_CLOSED for close in closes), "closed for another reason:", closes)
        self._announcements(effects)
        self.check()
        return effects

    def closed(self, name: str) -> bool:
        """Whether the configuration says so."""
        return name in self.endpoints and self.endpoints[name].closed != ""

    def _names(self, session: Session) -> list[str]:
        """The endpoints a session is attached to or serves."""
        served = [name for name, workers in self.serving.items() if session in workers]
        return served if session.endpoint is None else [session.endpoint, *served]

    def tick(self, limit: int) -> tuple[bool, list[Effect]]:
        """Time passed; whether more is due, and what the router wants done."""
        self._begin(Tick(limit))
        more = self.router.tick(self.now, limit)
        effects = list(self.router.effects)
        self.router.effects.clear()
        (at, _), *slices = self._slices
        before = effects[:at]
        messages = [effect.message for effect in before if isinstance(effect, Deliver)]
        expired = sum(isinstance(message, End) and message.outcome.kind is errors.DEADLINE for message in messages)
        expect(expired <= limit, "a tick of at most", limit, "ended", expired)
        self._absorb(before)
        for end, gone in slices:
            self._gone = gone
            departing = [asking for session in gone for asking in self._leave(session)]
            self._absorb(effects[at:end])
            self._announcements(effects[at:end])
            at = end
            for asking in departing:
                expect(asking.worker is None, "the worker was not told that the caller has gone", asking)
        self._absorb(effects[at:])
        self._announcements(effects[at:])
        if not more:
            self.nothing_is_overdue(self.now)
        self.check()
        return more, effects

    def _session_expired(self) -> None:
        by_id = self.router.sessions.by_id
        known = [session for _, gone in self._slices for session in gone]
        gone = [session for session in self.away if session.id not in by_id and session not in known]
        self._slices.append((len(self.router.effects), gone))

    def nothing_is_overdue(self, ticked_at: float) -> None:
        """What was to end a slot before the last complete tick has ended."""
        for mine in self.open.values():
            for asking in mine.values():
                late = ticked_at - asking.due(self.limits)
                expect(late < self.limits.slot_s + EPSILON, asking, "is overdue by", late, "s")

        for session, until in self.away.items():
            late = ticked_at - until
            expect(late < self.limits.slot_s + EPSILON, session, "is kept", late, "s longer than its grace")

    def fan_out(self, limit: int) -> list[tuple[Session, Broadcast]]:
        """Deliver a slice of what is to be broadcast."""
        part = self.router.fanouts.slice(limit)
        if part is None:
            expect(not self.under_way, "broadcasts were forgotten:", self.under_way)
            return []
        message, listeners, _ = part
        expect(self.under_way, "a broadcast nobody began", message)
        walked, place = min(limit, self.under_way[0]), (message.endpoint, message.topic)
        left = sum((endpoint, topic) == place for _, endpoint, topic in self.left_topic)  # they are passed over
        expect(walked - left <= len(listeners) <= walked, "a slice of", len(listeners), "of", self.under_way[0])
        self.under_way[0] -= walked
        if not self.under_way[0]:
            self.under_way.popleft()
        got = [(listener, message) for listener in listeners if listener in self.sessions]
        for listener, _ in got:
            self._hear(listener, message)
        return got

    def _hear(self, listener: Session, message: Broadcast) -> None:
        if message.seq is None:
            return
        key = (listener, message.endpoint, message.topic)
        last = self.heard.get(key)
        if last is not None:
            if key in self.left_topic:
                expect(message.seq > last, "broadcasts out of order", key, last, message.seq)
            else:
                wanted = last + 1
                while message.topic == PEERS_TOPIC and (message.endpoint, wanted) in self.missed:
                    wanted += 1
                expect(message.seq == wanted, "a gap in the numbers", key, last, message.seq)
        self.heard[key] = message.seq
        if message.topic == PEERS_TOPIC:
            expect((message.endpoint, message.seq) not in self.missed, "was to be dropped:", message)

    def _announcements(self, effects: list[Effect]) -> None:
        """Who came and went is told to those who watch, as long as there is room for one broadcast more."""
        for name in self._announced:
            if not self.watching.get(name):
                continue
            self.comings[name] += 1
            if len(self.under_way) >= self.limits.fanouts_max:
                self.broadcasts_refused += 1
                self.missed[name, self.comings[name]] = None
            else:
                self._fans_out(len(self.watching[name]))
        started = sum(isinstance(effect, StartFanout) for effect in effects)
        expect(started == self._fanouts, started, "broadcasts were begun instead of", self._fanouts)
        self._announced, self._fanouts = [], 0

    def _fans_out(self, listeners: int) -> None:
        if listeners:
            expect(len(self.under_way) < self.limits.fanouts_max, "more broadcasts under way than the bound")
            self.under_way.append(listeners)
            self._fanouts += 1

    # ------------------------------------------------------------ what an event means, before the router has its say

    def _before(self, event: Event) -> list[Asking]:
        """Write the event down. Returns the requests that leave with their caller."""
        session = getattr(event, "session", None)
        if isinstance(event, Detached):
            return self._detached(event)
        if isinstance(session, Session) and session not in self.sessions:
            return []  # nothing may come of it: any effect to it is a violation
        if isinstance(event, Asked) and event.wire_id is not None and not self._is_said_again(event):
            self._ask(event.session, event.wire_id, event.endpoint, event.method, event.options, event.body)
        elif isinstance(event, Refused):
            self._ask(event.session, event.wire_id, "", event.method, Options())
        elif isinstance(event, Answered | BadReply):
            self._due = self._take_back(event.session, event.attempt)
        elif isinstance(event, Stray) and event.nameless and event.error and event.error.code in (-32600, -32700):
            if len(self.assigned[event.session]) == 1:
                self._due = self._take_back(event.session, next(iter(self.assigned[event.session])))
        elif isinstance(event, Resumed):
            self.away.pop(event.session, None)
            self.congested.pop(event.session, None)
        elif isinstance(event, PartSent):
            self.streams.part_came(event, self._meant(event), self.now)
        elif isinstance(event, CreditGranted):
            self.streams.credit_came(event, self._meant(event), self.now)
        elif isinstance(event, Progressed):
            self.streams.progress_came(event, self._reported(event), self.now)
        elif isinstance(event, Drain):
            self.draining = True
        elif isinstance(event, Congested):
            if event.congested:
                self.congested[event.session] = None
            else:
                self.congested.pop(event.session, None)
        return []

    def _meant(self, event: PartSent | CreditGranted) -> Asking | None:
        """Whose stream somebody speaks of, who has it or asked it."""
        if event.wire_id is None:
            return self.assigned[event.session].get(event.attempt)
        return self.open[event.session].get(event.wire_id)

    def _reported(self, event: Progressed) -> Asking | None:
        """Of which attempt the progress is."""
        held = self.assigned[event.session]
        if event.attempt or not event.token:
            return held.get(event.attempt)
        named = [asking for asking in held.values() if asking.options.progress == event.token]
        return named[0] if len(named) == 1 else None

    def _is_said_again(self, event: Asked) -> bool:
        """Whether a session that outlives its links says once more what is in flight: nothing may come of that."""
        earlier = self.open[event.session].get(event.wire_id) if event.wire_id is not None else None
        if earlier is None or event.session.kept is None or not event.endpoint:
            return False
        return (earlier.endpoint, earlier.method, earlier.body) == (event.endpoint, event.method, event.body)

    def _ask(
        self, session: Session, wire_id: WireId, endpoint: str, method: str, options: Options, body: Body = EMPTY
    ) -> None:
        self.accepted += 1
        if wire_id in self.open[session]:
            self._duplicates = 1
            return
        timeout = self.limits.deadline_s if options.timeout is None else options.timeout
        asking = Asking(session, wire_id, endpoint, method, options, self.now + timeout, self.accepted)
        asking.since, asking.accepted_at, asking.body = self.turns_made, self.now, body
        if endpoint and options.idle is not None:
            asking.flows = Flows(not options.stream_in, self.now)
        self._fresh = self.open[session][wire_id] = asking

    def _take_back(self, worker: Session, attempt: AttemptId) -> Asking | None:
        """The worker has it no more."""
        asking = self.assigned.get(worker, {}).pop(attempt, None)
        if asking is not None:
            asking.worker = None
            if asking.serving is not None:
                asking.serving.load -= 1
        return asking

    def _detached(self, event: Detached) -> list[Asking]:
        session, kept = event.session, event.session.kept
        if kept is not None and session in self.sessions:
            if event.link is not kept.link:
                return []  # a newer link has taken over
            if outlives(event.code) and not self.draining:
                self.away[session] = self.now + min(session.grace_s, self.limits.grace_max_s)
                self.congested[session] = None
                return []
        return self._leave(session)

    def _leave(self, session: Session) -> list[Asking]:
        if session not in self.sessions:
            return []
        del self.sessions[session]
        self.away.pop(session, None)
        self.congested.pop(session, None)
        for watching in self.watching.values():
            watching.pop(session, None)
        served = sorted(
            (name for name, workers in self.serving.items() if session in workers),
            key=lambda name: self.serving[name][session].since,
        )
        for name in served:
            self._serves_no_more(name, session)
        if not served and session.endpoint is not None:
            self._announced.append(session.endpoint)
        departing = list(self.open.pop(session).values())
        for asking in departing:
            self.ended["cancelled"] += 1
            if asking.worker is session:
                asking.worker = None
        for asking in self.assigned.pop(session).values():
            asking.worker, asking.lost, asking.lost_at, asking.since = None, session, self._step, self.turns_made
        return departing

    def _serves_no_more(self, name: str, session: Session) -> bool:
        """What it has in its hands still counts, should it come back."""
        serving = self.serving.get(name, {}).pop(session, None)
        if serving is not None:
            self._announced.append(name)
            if serving.load:
                self.leaving[name, session] = serving
        return serving is not None

    def _serves(self, name: str, session: Session, methods: list[str] | None, capacity: int) -> None:
        self._announced.append(name)
        workers = self.serving.setdefault(name, {})
        serving = workers.get(session)
        if serving is None:
            fresh = Serving(methods, capacity, 0)
            serving = workers[session] = self.leaving.pop((name, session), fresh)
            serving.since = self._step
        serving.methods, serving.capacity = methods, capacity

    def _attached(self, event: Attached) -> None:
        session = self.router.sessions.by_id[event.session]
        self.sessions[session] = None
        self.open[session], self.assigned[session] = {}, {}
        if event.role == Role.WORKER and event.endpoint is not None and session.registrations:
            self._serves(event.endpoint, session, None, event.capacity or self.limits.capacity)
        elif event.endpoint is not None:
            self._announced.append(event.endpoint)

    def _command_before_effects(self, event: Asked, effects: list[Effect]) -> None:
        """`broker.serve` and its like count before the calls they cause, which stand before their own end."""
        if event.endpoint or event.wire_id is None or event.session not in self.sessions:
            return
        end = next(
            (
                effect.message
                for effect in reversed(effects)
                if isinstance(effect, Deliver)
                and effect.session is event.session
                and isinstance(effect.message, End)
                and effect.message.wire_id == event.wire_id
            ),
            None,
        )
        if end is None or end.outcome.kind is not errors.OK:
            return
        assert end.body is not None
        if event.session.role is Role.LISTENER:
            expect(event.method in OF_LISTENERS, "a listener spoke:", event.method)
        params, result = msgspec.json.decode(bytes(event.body.raw) or b"{}"), msgspec.json.decode(end.body.raw)
        session, name, topic = event.session, params.get("endpoint", event.session.endpoint), params.get("topic")
        match event.method:
            case "broker.serve":
                expect(not self.closed(name), "somebody serves", name, "though it is closed")
                self._serves(name, session, params.get("methods"), params.get("capacity") or session.capacity)
            case "broker.unserve":
                expect(self._serves_no_more(name, session) == result["served"], "served or not:", result)
            case "broker.subscribe" if topic == PEERS_TOPIC:
                self.watching.setdefault(name, {})[session] = None
                expect(result["seq"] == self.comings[name], "comings and goings", self.comings[name], "but", result)
            case "broker.unsubscribe":
                self.left_topic[session, name, topic] = None
                if topic == PEERS_TOPIC:
                    self.watching.get(name, {}).pop(session, None)
            case "broker.publish":
                self._fans_out(result["listeners"])

    # ------------------------------------------------------------ effects, one after the other

    def _absorb(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, StartFanout):
                continue
            session = effect.session
            expect(session in self.sessions, "an effect for a session that has gone:", effect)
            if isinstance(effect, Deliver):
                self._delivered(session, effect.message)
            else:
                known = CloseLink | PauseReading | ResumeReading | TakeOver
                expect(isinstance(effect, known), "an unknown effect", effect)

    def _delivered(self, session: Session, message: object) -> None:
        if isinstance(message, End):
            self._end(session, message)
        elif isinstance(message, Call):
            self._call(session, message)
        elif isinstance(message, CancelAttempt):
            asking = self._take_back(session, message.attempt_id)
            expect(asking is not None, "a cancel of what that worker does not have:", message)
        elif isinstance(message, Notify):
            serving = self.serving.get(message.endpoint, {}).get(session)
            expect(serving is not None and serving.does(message.method), "a notification for another", message)
            expect(
                isinstance(self._event, Asked) and self._event.wire_id is None, "a notification nobody sent", message
            )
        elif isinstance(message, SessionTold):
            expect(isinstance(self._event, Attached) and session.kept is not None, "told of no session", message)
        elif isinstance(message, Part | Credit | Progress):
            if message.wire_id is not None:
                asking = self.open[session].get(message.wire_id)
            else:
                asking = self.assigned[session].get(message.attempt_id)
            self.streams.delivered(session, message, asking)
        else:
            raise Violation(f"a message of another kind: {message}")

    def _call(self, worker: Session, call: Call) -> None:
        request, number = call.attempt.request, call.attempt.id
        asking = self.open.get(request.session, {}).get(request.wire_id)
        expect(asking is not None, "work was given out for a request that is not open:", call.attempt.id)
        assert asking is not None
        expect(asking.worker is None, asking, "was given to two workers")
        expect(asking.session.role is not Role.LISTENER, asking, "was asked by a listener")
        expect(asking.deadline > self.now, asking, "was given out after its deadline")
        expect(
            abs(call.left_s - (asking.deadline - self.now)) < EPSILON, asking, "was told a wrong time left", call.left_s
        )
        expect(not self.closed(call.endpoint), asking, "was given out though its endpoint is closed")
        expect((call.endpoint, call.method) == (asking.endpoint, asking.method), asking, "changed on its way")
        expect(number > self.attempts_seen, "an attempt's number was used before:", number)
        self.attempts_seen = number
        retries = asking.options.retries if asking.options.idempotent else 0
        expect(asking.attempts <= retries, asking, "was tried more often than allowed")
        self.streams.given_out(asking)
        if asking.attempts:
            expect(asking.lost is not None, asking, "was given out again though its worker is there")
        self._is_the_right_worker(asking, worker)
        if asking is not self._fresh:
            self._is_its_turn(asking, worker)
        asking.attempts += 1
        asking.worker, asking.attempt, asking.serving = worker, number, self.serving[asking.endpoint][worker]
        asking.serving.load += 1
        self.assigned[worker][number] = asking

    def _is_the_right_worker(self, asking: Asking, worker: Session) -> None:
        able = self._able(asking)
        mine = self.serving.get(asking.endpoint, {}).get(worker)
        expect(mine is not None, asking, "went to one who does not serve it")
        assert mine is not None
        expect(worker in able, asking, "went to one who cannot take it: load", mine.load, "of", mine.capacity)
        policy = self._policy(asking.endpoint)
        if policy == "least_pending" or (policy == "sticky" and asking.options.group is None):
            doubted = self._doubted(asking)
            least = min(serving.load for who, serving in able.items() if who is worker or who not in doubted)
            expect(mine.load == least, asking, "went to a load of", mine.load, "though one has", least)
        elif policy == "newest" and asking is self._fresh:
            expect(worker is list(able)[-1], asking, "did not go to the newest")

    def _doubted(self, asking: Asking) -> set[Session]:
        """Who is passed over for this class as long as somebody better is free: what was learned is not judged here."""
        endpoint = self.router.registry.by_name.get(asking.endpoint)
        classes = None if endpoint is None else endpoint.classes
        name = class_of(asking.method)
        if classes is None or name not in classes.had:
            return set()
        return {registration.session for registration in classes.doubts.get(name, ())}

    def _able(self, asking: Asking) -> dict[Session, Serving]:
        """Who can take it now, oldest first."""
        group, serves = asking.options.group, self.serving.get(asking.endpoint, {})
        doing = {session: serving for session, serving in serves.items() if serving.does(asking.method)}
        if doing and group is not None and self._policy(asking.endpoint) == "sticky":
            bound = max(doing, key=lambda session: rank(session.id, group))
            doing = {bound: doing[bound]}
        return {
            session: serving
            for session, serving in doing.items()
            if serving.load < serving.capacity and session not in self.congested
        }

    def _policy(self, name: str) -> str:
        return self.endpoints[name].policy if name in self.endpoints else "least_pending"

    def _is_its_turn(self, asking: Asking, worker: Session) -> None:
        """Of those that wait and that this worker could serve, it is the one whose turn it is."""
        waiting = [other for other in self._waiting(asking.endpoint) if other is not asking]
        others = [other for other in waiting if other.deadline > self.now and worker in self._able(other)]
        for other in others:
            if other.lost_at == self._step != asking.lost_at or other.session is not asking.session:
                continue  # its turn to be tried again comes within this very step, or it is another caller's
            expect(other.lane != asking.lane or other.place > asking.place, asking, "was given out before", other)
        if asking.lost_at == self._step:
            return  # it never waited
        for other in others:
            if other.lane == asking.lane and other.lost_at != self._step:
                for mine, theirs in zip(self._turn_keys(asking), self._turn_keys(other), strict=True):
                    last = self.turns.get(mine, 0)
                    fair = mine == theirs or other.since >= last or self.turns.get(theirs, 0) > last
                    expect(fair, asking, "has a second turn while there waits", other)
                    if mine != theirs:
                        break  # sessions take turns within one principal
        if any(other.options.priority > asking.options.priority for other in others if other.lost_at != self._step):
            passed = self.passed.pop(asking.endpoint, 0)
            expect(passed >= PASSED_MAX, asking, "was given out before a higher priority, after", passed)
        self._had_turn(asking)

    def _had_turn(self, asking: Asking) -> None:
        self.turns_made += 1
        self.passed[asking.endpoint] += 1
        for key in self._turn_keys(asking):
            self.turns[key] = self.turns_made

    @staticmethod
    def _turn_keys(asking: Asking) -> tuple[tuple[object, ...], tuple[object, ...]]:
        return (*asking.lane, asking.session.principal), (*asking.lane, asking.session)

    def _waiting(self, endpoint: str) -> list[Asking]:
        return [
            asking
            for mine in self.open.values()
            for asking in mine.values()
            if asking.worker is None and asking.endpoint == endpoint
        ]

    # ------------------------------------------------------------ ends

    def _end(self, session: Session, end: End) -> None:
        kind = end.outcome.kind.name
        self.ended[kind] += 1
        if kind == "duplicate_id":
            mine = isinstance(self._event, Asked | Refused) and self._event.session is session
            expect(mine and self._duplicates == 1, "a duplicate id nobody sent", end)
            self._duplicates = 0
            return
        asking = self.open[session].pop(end.wire_id, None)
        expect(asking is not None, "an end without a beginning, or a second one:", end)
        assert asking is not None
        expect(asking.worker is None, asking, "ended, and its worker was not told:", kind)
        broken = self.streams.broken
        if broken is not None and broken[0] is asking:
            expect(kind == broken[1], asking, "had to end as", broken[1], "and ended as", kind)
            self.streams.broken = None
        elif kind in AT_THE_DOOR and asking is self._fresh:
            self._refused(asking, kind, end)
        else:
            judge = getattr(self, f"_ended_{kind}", None)
            expect(judge is not None, asking, "was refused after it had been taken in:", kind)
            judge(asking, end)  # type: ignore[misc]
        if asking is self._due:
            self._due = None

    def _refused(self, asking: Asking, kind: str, end: End) -> None:
        if end.outcome.bound == "fanouts":
            expect(len(self.under_way) >= self.limits.fanouts_max, "a broadcast was refused though there was room")
            self.broadcasts_refused += 1
        if not asking.endpoint:
            return
        if self.closed(asking.endpoint):
            why = "in_flight" if end.outcome.bound == "in_flight" else kind
            expect(why in ("denied", "shutting_down", "in_flight"), asking, "its endpoint is closed, but", kind)
        serving, waits = self.serving.get(asking.endpoint, {}), asking.options.wait
        match kind:
            case "no_endpoint" | "no_worker":
                expect(not serving and not waits, asking, "was refused though it is served or waits")
            case "no_method":
                expect(serving and not any(s.does(asking.method) for s in serving.values()), asking, "has a worker")
            case "shutting_down":
                expect(self.draining, asking, "was told of a shutdown")
            case "overloaded":
                self._overloaded(asking, end)

    def _queue_max(self, name: str) -> int:
        own = self.endpoints.get(name)
        return self.limits.queue_max if own is None or own.queue_max is None else own.queue_max

    def _overloaded(self, asking: Asking, end: End) -> None:
        if end.outcome.bound == "queue":
            queue_max, waiting = self._queue_max(asking.endpoint), len(self._waiting(asking.endpoint))
            expect(waiting >= queue_max, "a queue of", queue_max, "was called full at", waiting)
            shares = self._shares(asking.endpoint)
            mine, largest = shares.get(asking.session.principal, []), max(map(len, shares.values()), default=0)
            if waiting == queue_max and len(mine) < largest > 1 and self._all_in_time(asking.endpoint):
                holders = [share for share in shares.values() if len(share) == largest]
                tried = any(all(other.attempts for other in share) for share in holders)
                expect(tried, asking, "was refused though others have more of the queue")
        elif end.outcome.bound == "in_flight":
            expect(len(self.open[asking.session]) >= self.limits.in_flight_max, "a caller was called full")

    def _shares(self, name: str) -> dict[str, list[Asking]]:
        """What waits at an endpoint, by principal, but what came just now."""
        shares: dict[str, list[Asking]] = {}
        for asking in self._waiting(name):
            if asking is not self._fresh:
                shares.setdefault(asking.session.principal, []).append(asking)
        return shares

    def _all_in_time(self, name: str) -> bool:
        """Whether nothing waits that the router may have passed over already."""
        return all(asking.deadline > self.now for asking in self._waiting(name))

    def _ended_overloaded(self, asking: Asking, end: End) -> None:
        """It waited, and made room for somebody who has less."""
        fresh, said = self._fresh, end.outcome
        expect(fresh is not None and fresh.endpoint == asking.endpoint, asking, "made room for nobody")
        assert fresh is not None
        right = said.bound == "queue" and said.retryable and not said.dispatched and not asking.attempts
        expect(right, asking, "was told wrong things:", said)
        shares = self._shares(asking.endpoint)
        theirs = shares.setdefault(asking.session.principal, [])
        theirs.append(asking)
        expect(sum(map(len, shares.values())) >= self._queue_max(asking.endpoint), asking, "had room")
        if self._all_in_time(asking.endpoint):
            mine, largest = len(shares.get(fresh.session.principal, [])), max(map(len, shares.values()))
            expect(mine < len(theirs) == largest > 1, asking, "was not of who has most")
        newer = [other for other in theirs if not other.attempts and other.order > asking.order]
        expect(not newer, asking, "had to go before", newer)

    def _ended_ok(self, asking: Asking, end: End) -> None:
        if asking.endpoint:
            expect(asking is self._due, asking, "ended ok, and nobody has answered it")
            expect(isinstance(self._event, Answered), asking, "ended ok without an answer")
            assert isinstance(self._event, Answered)
            flows, body = asking.flows, self._event.body
            if flows is not None and flows.gathers and flows.down.came:
                expect(end.body == flows.joined(body), asking, "has not all its parts:", end.body)
            else:
                expect(end.body is body, asking, "has another's reply")
        else:
            expect(asking is self._fresh, asking, "is a command and ended late")

    def _ended_worker_error(self, asking: Asking, end: End) -> None:
        expect(asking is self._due, asking, "ended with an error nobody gave")
        expect(
            isinstance(self._event, Answered | Stray) and end.body is self._event.body, asking, "has another's error"
        )

    def _ended_bad_reply(self, asking: Asking, end: End) -> None:
        expect(asking is self._due, asking, "had no bad reply")
        if isinstance(self._event, Answered):
            gathered = asking.flows is not None and asking.flows.joined(self._event.body) is None
            expect(gathered, asking, "had a good reply, and good parts")

    def _ended_deadline(self, asking: Asking, end: End) -> None:
        expect(isinstance(self._event, Tick), asking, "met its deadline while no time passed")
        due_at = asking.due(self.limits)
        expect(due_at <= self.now, asking, "ended early by", due_at - self.now)
        if asking.flows is None:  # what was put off stands where it was put
            slot = due_at // self.limits.slot_s
            expect(slot >= self._latest_slot - 1, asking, "expired out of order")
            self._latest_slot = max(self._latest_slot, slot)
        if end.outcome.phase == "queued":
            expect(end.outcome.retryable, asking, "waited in vain and may not be repeated")
        expect(end.outcome.dispatched == (asking.attempts > 0), asking, "does not know whether it was given out")

    def _ended_too_large(self, asking: Asking, end: End) -> None:
        """On its way in, instead of being given out, or on its way back."""
        expect(end.body is None, asking, "was too large and has a body")
        expect(asking is self._due or self._able(asking), asking, "was too large for nobody")
        if asking is not self._due and asking is not self._fresh and asking.lost_at != self._step:
            self._had_turn(asking)

    def _ended_cancelled(self, asking: Asking, end: End) -> None:
        event, fresh = self._event, self._fresh
        if end.outcome.cause == "superseded":
            wins = asking.endpoint in self.endpoints and self.endpoints[asking.endpoint].newest_wins
            expect(wins and fresh is not None and fresh.subject == asking.subject, asking, "was superseded by nothing")
            return
        mine = isinstance(event, Cancel) and event.session is asking.session and event.wire_id == asking.wire_id
        admin = isinstance(event, Asked) and event.method == "broker.admin.cancel"
        expect(mine or admin, asking, "was cancelled by nobody")
        expect(end.outcome.cause == ("caller" if mine else "admin"), asking, "was cancelled by another")

    def _ended_worker_lost(self, asking: Asking, end: End) -> None:
        lost = self._gone if isinstance(self._event, Tick) else [getattr(self._event, "session", None)]
        expect(asking.lost in lost, asking, "lost no worker")
        expect(end.outcome.attempts == asking.attempts, asking, "was counted wrongly")
        in_time = asking.deadline > self.now and not self.draining and not self.closed(asking.endpoint)
        fresh = asking.flows is None or not asking.flows.has_flowed
        if in_time and fresh and asking.options.idempotent and asking.attempts <= asking.options.retries:
            expect(not self._able(asking), asking, "was lost though another worker is free")
            first = [other for other in self._waiting(asking.endpoint) if not self._comes_later(other, asking)]
            expect(len(first) >= self._queue_max(asking.endpoint), asking, "was lost though there was room to wait")

    def _comes_later(self, other: Asking, asking: Asking) -> bool:
        """Whether both were lost just now, and the other has its turn after this one."""
        return other.lost_at == self._step == asking.lost_at and other.attempt > asking.attempt

    def _ended_no_worker(self, asking: Asking, end: End) -> None:
        """It waited for a worker to be free, and the last one has left."""
        event, name = self._event, asking.endpoint
        left = (
            isinstance(event, Detached) or self._gone or (isinstance(event, Asked) and event.method == "broker.unserve")
        )
        expect(left and not self.serving.get(name), asking, "was given up though it is served")
        expect(not asking.options.wait and not asking.attempts, asking, "was given up though it waits or was tried")
        said = end.outcome
        right = said.retryable and said.phase == "queued" and not said.dispatched
        expect(right, asking, "was told wrong things:", said)
        expect(asking.order > self._latest_left.get(name, 0), asking, "was given up out of order")
        self._latest_left[name] = asking.order

    def _ended_denied(self, asking: Asking, end: End) -> None:
        """It waited at an endpoint that was closed."""
        expect(isinstance(self._event, Reconfigured), asking, "was denied late, and nothing was configured")
        said, name = end.outcome, asking.endpoint
        expect(self.closed(name) and self.endpoints[name].closed in said.detail, asking, "was denied what is open")
        right = not said.retryable and said.phase == "queued" and said.dispatched == (asking.attempts > 0)
        expect(right, asking, "was told wrong things:", said)

    def _ended_shutting_down(self, asking: Asking, end: End) -> None:
        expect(isinstance(self._event, Drain) and self._event.now, asking, "was ended by a shutdown too early")
        safe = asking.options.idempotent or not asking.attempts
        expect(end.outcome.retryable == safe, asking, "is called safe to repeat:", end.outcome.retryable)

    # ------------------------------------------------------------ after every step

    def check(self) -> None:
        """What always holds."""
        router = self.router
        router.check()
        pending = sum(map(len, self.open.values()))
        expect(
            router.pending.count == pending,
            "pending:",
            router.pending.count,
            "in the router,",
            pending,
            "in the ledger",
        )
        expect(router.counters.accepted == self.accepted, "accepted:", router.counters.accepted, self.accepted)
        ended = {name: count for name, count in router.counters.ended.items() if count}
        expect(ended == dict(self.ended), "ended:", ended, dict(self.ended))
        expect(list(router.sessions.by_id.values()) == list(self.sessions), "sessions differ")
        for session, mine in self.assigned.items():
            expect(list(session.attempts) == list(mine), "attempts of session", session.id, "differ")
        for endpoint in router.registry.by_name.values():
            expect(len(endpoint.queue) <= endpoint.queue_max, "a queue above its bound:", endpoint)
        for asking in (asking for mine in self.open.values() for asking in mine.values() if asking.worker is None):
            if asking.deadline <= self.now:
                continue  # the next tick ends it
            able = self._able(asking)
            expect(not able, asking, "waits though", [session.id for session in able], "could take it")
            for_one = self.serving.get(asking.endpoint) or asking.options.wait or asking.attempts
            expect(for_one, asking, "waits for a worker to be free, and there is none")
            expect(not self.closed(asking.endpoint), asking, "waits at a closed endpoint")
        self.streams.check((asking for mine in self.open.values() for asking in mine.values()), self.congested)
        expect(len(router.fanouts) == len(self.under_way), "broadcasts:", len(router.fanouts), len(self.under_way))
        refused = router.counters.broadcasts_refused
        expect(refused == self.broadcasts_refused, "refused:", refused, "broadcasts, expected", self.broadcasts_refused)

    def leave_all(self) -> None:
        """Let everybody go, and see that nothing is left."""
        for session in list(self.sessions):
            link = session.kept.link if session.kept is not None else None
            self.feed(Detached(session, 1001, "", 0, link))
        while self.router.fanouts.slice(1000):
            pass
        router = self.router
        expect(
            not router.sessions.by_id and not router.pending.count and not len(router.pending.deadlines), "leftovers"
        )
        expect(not len(router.sessions.expiry), "credentials still wait to expire")
        for endpoint in router.registry.by_name.values():
            empty = not endpoint.registrations and not len(endpoint.queue) and not len(endpoint.free)
            expect(empty and not endpoint.listeners, "leftovers at", endpoint)
            expect(not any(topic.subscribers for topic in endpoint.topics.values()), "listeners left at", endpoint)
        expect(sum(router.counters.ended.values()) == router.counters.accepted, "the books do not balance")
