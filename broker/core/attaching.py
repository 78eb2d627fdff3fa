"""Peers that come and go: attached and detached, serving and not, congested, expired, turned away."""

from __future__ import annotations

from broker.core import errors
from broker.core.access import Role
from broker.core.broadcasts import Broadcasts
from broker.core.events import Attached, CloseLink, Congested, Detached, PauseReading, ResumeReading
from broker.core.messages import Body
from broker.core.registry import Endpoint
from broker.core.requests import Requests
from broker.core.sessions import Session
from broker.core.state import State
from broker.core.topics import unnamed_topic


class Attaching:
    """What follows when a peer comes, goes, or begins or ends to serve an endpoint."""

    __slots__ = ("broadcasts", "effects", "registry", "requests", "sessions", "state")

    def __init__(self, state: State, requests: Requests, broadcasts: Broadcasts) -> None:
        self.state = state
        self.requests, self.broadcasts = requests, broadcasts
        self.registry, self.sessions, self.effects = state.registry, state.sessions, state.effects

    # ------------------------------------------------------------ links

    def attached(self, event: Attached, now: float) -> None:
        """A session for a new link; on an endpoint's own URL it listens or serves there at once."""
        limits = self.state.limits
        self.state.counters.attached += 1
        session = Session(event, now, limits.capacity)
        self.sessions.open(session)
        if event.endpoint is None:
            return
        wanted = event.role == Role.WORKER or event.listen
        registry = self.registry
        endpoint = registry.get_or_make(event.endpoint) if wanted else registry.by_name.get(event.endpoint)
        if endpoint is None:
            if wanted:
                detail = f"{limits.endpoints_known_max} endpoints are in use"
                self.effects.append(CloseLink(session, errors.TOO_MANY, detail))
            return
        if event.listen:
            unnamed_topic(endpoint).subscribe(session)
        if event.role == Role.WORKER:
            self.serve(session, endpoint, None, session.capacity, event.info, now)
        else:
            self.broadcasts.announce(endpoint, "attached", session)

    def detached(self, event: Detached, now: float) -> None:
        """A link ended: nothing of its session is left, as caller, worker or listener."""
        session = event.session
        if session.link is None:
            return
        self.state.counters.detached += 1
        session.link = None
        self.sessions.close(session)
        for topic in list(session.subscriptions):
            topic.unsubscribe(session)
        endpoints = list(session.registrations)
        for registration in list(session.registrations.values()):
            self.registry.unregister(registration)
        requests = self.requests
        requests.stop_all(list(session.requests.values()), errors.CANCELLED, now, cause="caller")
        for endpoint in endpoints:
            requests.abandon(endpoint, now)
        requests.worker_gone(event, now)
        if session.endpoint is not None and not endpoints and session.endpoint in self.registry.by_name:
            self.broadcasts.announce(self.registry.by_name[session.endpoint], "detached", session)
        for endpoint in endpoints:
            self.broadcasts.announce(endpoint, "unserved", session)

    def congested(self, event: Congested, now: float) -> None:
        """A peer does not read what it is sent, or does so again."""
        session = event.session
        if session.link is None:
            return
        session.congested = event.congested
        for registration in session.registrations.values():
            self.registry.refresh(registration)
            self.requests.feed(registration, now)
        if not event.congested:
            self.effects.append(ResumeReading(session))  # it may have become a worker since it was paused
        elif not session.registrations:  # a worker must stay free to answer, or both sides would wait for the other
            self.effects.append(PauseReading(session))

    def expire(self, now: float, limit: int) -> None:
        """Turn away at most `limit` sessions whose credential has expired."""
        for session in self.sessions.expiry.take_due(now, limit):
            self.effects.append(CloseLink(session, errors.UNAUTHORISED, "the credential has expired"))

    # ------------------------------------------------------------ serving

    def serve(
        self,
        session: Session,
        endpoint: Endpoint,
        methods: frozenset[str] | None,
        capacity: int,
        info: Body,
        now: float,
    ) -> None:
        """It is a worker of the endpoint from now on, and is given what waits."""
        registration = self.registry.register(session, endpoint, methods, capacity, info)
        self.requests.feed(registration, now)
        self.broadcasts.announce(endpoint, "serving", session)

    def unserve(self, session: Session, endpoint: Endpoint, now: float) -> bool:
        """It is no worker of the endpoint any more, and may finish what it has; False if it was none."""
        registration = endpoint.registrations.get(session)
        if registration is None:
            return False
        self.registry.unregister(registration)
        self.requests.abandon(endpoint, now)
        self.broadcasts.announce(endpoint, "unserved", session)
        return True

    # ------------------------------------------------------------ closed endpoints

    def turn_away(self, now: float) -> None:
        """The configuration has changed: tell who is attached to, or serves, an endpoint that is closed now."""
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
            self.broadcasts.announce(endpoint, "unserved", registration.session)
        self.requests.close(endpoint, now)
