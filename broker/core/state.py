"""The state of one broker: the tables and books that all parts of the router work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from broker.core.allowances import Allowances
from broker.core.budget import SMALL_BYTES, Budget, size_of
from broker.core.counters import Counters
from broker.core.deadlines import Deadlines
from broker.core.events import Effect, PlaceChanged
from broker.core.history import Replays
from broker.core.keys import Keys
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body
from broker.core.pending import ENDED, Pending, Request
from broker.core.registry import Endpoint, Registration, Registry
from broker.core.sessions import Session, Sessions
from broker.core.topics import Fanouts, Topic

Join: TypeAlias = Callable[[Sequence[Body], Sequence[bool], Body], Body]
"""Makes one reply of its parts (with `more` of each) and its result; raises ValueError. `wire/pieces` has it."""


AGEING_SLOT_S = 1.0
"""how exactly what a topic keeps is let go when it is too old"""


class State:
    """What the router remembers. Only `limits` and `draining` are ever replaced; parts may keep hold of the rest.

    `effects` is what is to be done, in order. `tells_places` says whether somebody wants to know who comes to an
    endpoint and leaves it.
    """

    __slots__ = (
        "ageing", "allowances", "budget", "counters", "draining", "effects", "fanouts", "history_bytes", "join", "keys",
        "limits", "node", "pending", "registry", "replays", "sessions", "started_at", "tells_places", "topics_made",
    )  # fmt: skip

    def __init__(
        self, limits: Limits, endpoints: Mapping[str, EndpointLimits], *, node: str, now: float, join: Join
    ) -> None:
        self.limits = limits
        self.join = join
        self.draining = False
        self.tells_places = False
        self.node = node
        self.started_at = now
        self.sessions = Sessions(limits)
        self.registry = Registry(limits, endpoints)
        self.budget = Budget()
        self.pending = Pending(limits, self.budget)
        self.fanouts = Fanouts(self.budget)
        self.replays = Replays()
        self.ageing: Deadlines[Topic] = Deadlines(AGEING_SLOT_S)
        self.topics_made = 0
        self.history_bytes = 0
        self.counters = Counters()
        self.keys = Keys(self.budget, self.counters)
        self.allowances = Allowances(self.counters)
        self.effects: list[Effect] = []

    def peer_name(self, session: Session) -> str:
        """What a session is called towards others."""
        return f"{self.node}-{session.id}"

    def peer(self, name: str) -> Session | None:
        """The session others call by that name."""
        node, _, number = name.rpartition("-")
        if node != self.node or not (number.isascii() and number.isdigit()) or len(number) > 18:
            return None
        return self.sessions.by_id.get(int(number))

    def fits(self, session: Session, body: Body) -> bool:
        """Whether a body with attachments is within the bound for messages as this peer gets them."""
        link = session.link
        return link is None or link.takes_binary or body.expanded_size() <= self.limits.message_max_bytes

    @property
    def bound_text(self) -> str:
        """What the bound for messages is called in a detail."""
        return f"the bound of {self.limits.message_max_bytes} bytes for a message"

    @property
    def too_large_reply(self) -> str:
        """What is said of a reply that does not fit."""
        return f"the reply as base64, for a caller that takes no binary frames, is larger than {self.bound_text}"

    def moved(self, session: Session) -> None:
        """A session has come to an endpoint, or left one."""
        if self.tells_places:
            self.effects.append(PlaceChanged(session))

    def requests(self) -> Iterator[Request]:
        """Every request that has not ended, by session."""
        for session in self.sessions.by_id.values():
            yield from session.requests.values()

    # ------------------------------------------------------------ invariants

    def held(self) -> dict[str, int]:
        """What all tables but that of requests hold of the budget, added up anew: a walk over all sessions."""
        return {
            "sessions": sum(each.kept.size_bytes for each in self.sessions.by_id.values() if each.kept is not None),
            "broadcasts": self.fanouts.bytes,
            "history": self.history_bytes,
            "keys": self.keys.kept_bytes,
        }

    def _check_budget(self) -> None:
        topics = (topic for endpoint in self.registry.by_name.values() for topic in endpoint.topics.values())
        assert self.history_bytes == sum(topic.history.bytes for topic in topics)
        total = self.budget.outboxes + sum(self.held().values())
        for request in self.requests():
            kept = request.stream.kept_bytes() if request.stream else 0
            own = size_of(request.body)
            assert request.held == kept + (own if own > SMALL_BYTES else 0)
            total += request.held
        assert self.budget.used == total, "the budget does not balance"

    def check(self) -> None:
        """Assert that all views of the tables agree. For tests and simulators; costs a walk over everything."""
        counters, sessions = self.counters, self.sessions.by_id.values()
        assert counters.accepted == sum(counters.ended.values()) + self.pending.count, "the books do not balance"
        assert self.pending.count == sum(len(s.requests) for s in sessions) == len(self.pending.deadlines)
        assert self.sessions.suspended == sum(session.lost_link is not None for session in sessions)
        for session in sessions:
            assert session.link is not None and (session.kept is None or session.link is session.kept)
            if session.kept is not None:
                session.kept.check()
                assert (session.lost_link is None) or session.kept.link is None, "it is away and has a link"
            for wire_id, request in session.requests.items():
                assert request.session is session and request.wire_id == wire_id and request.state is not ENDED
                assert request.slot is not None and request in request.slot
                assert request.attempt is None or request not in request.endpoint.queue, "it waits and a worker has it"
            for number, attempt in session.attempts.items():
                assert attempt.id == number and attempt.session is session
                assert attempt.request.attempt is attempt and attempt.request.state is not ENDED
            for topic in session.subscriptions:
                assert session in topic.subscribers
        self.keys.check(self.limits)
        self.allowances.check(list(sessions))
        named = sum(request.work is not None for request in self.requests())
        assert named == sum(1 + len(work.joined) for work in self.keys.working.values())
        for endpoint in self.registry.by_name.values():
            _check_endpoint(endpoint)
        self._check_budget()


def _check_endpoint(endpoint: Endpoint) -> None:
    registrations = endpoint.registrations.values()
    assert len(endpoint.free) == sum(r.free for r in registrations)
    if endpoint.classes is not None:
        endpoint.classes.check(registrations)
    assert endpoint.listeners == sum(len(topic.subscribers) for topic in endpoint.topics.values())
    for registration in (*registrations, *endpoint.leaving.values()):
        attempts = [a for a in registration.session.attempts.values() if a.registration is registration]
        assert registration.load == len(attempts)
        assert registration.free == registration.willing
        assert registration.gone == (registration.session in endpoint.leaving)
        assert registration.load or not registration.gone, "it holds nothing and is remembered"
        assert not (registration.free and any(
            _can_do(registration, r) for r in endpoint.queue
        )), "a request waits though a worker is free for it"  # fmt: skip


def _can_do(registration: Registration, request: Request) -> bool:
    """Whether nothing but a place is wanting for this worker to be given the request."""
    if registration.methods is not None and request.method not in registration.methods:
        return False
    group, endpoint = request.options.group, registration.endpoint
    return group is None or not endpoint.free.binds or endpoint.free.target(request.method, group) is registration
