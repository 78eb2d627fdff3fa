"""The state of one broker: the tables and books that all parts of the router work on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from broker.core.counters import Counters
from broker.core.events import Effect
from broker.core.limits import EndpointLimits, Limits
from broker.core.pending import ENDED, Pending, Request
from broker.core.registry import Endpoint, Registry
from broker.core.sessions import Session, Sessions
from broker.core.topics import Fanouts


class State:
    """What the router remembers. Only `limits` and `draining` are ever replaced; parts may keep hold of the rest.

    `effects` is what is to be done, in order.
    """

    __slots__ = (
        "counters", "draining", "effects", "fanouts", "limits", "node", "pending", "registry", "sessions", "started_at",
    )  # fmt: skip

    def __init__(self, limits: Limits, endpoints: Mapping[str, EndpointLimits], *, node: str, now: float) -> None:
        self.limits = limits
        self.draining = False
        self.node = node
        self.started_at = now
        self.sessions = Sessions(limits)
        self.registry = Registry(limits, endpoints)
        self.pending = Pending(limits)
        self.fanouts = Fanouts()
        self.counters = Counters()
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

    def requests(self) -> Iterator[Request]:
        """Every request that has not ended, by session."""
        for session in self.sessions.by_id.values():
            yield from session.requests.values()

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
            _check_endpoint(endpoint)


def _check_endpoint(endpoint: Endpoint) -> None:
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
