"""Peers that come and go: attached and detached, serving and not, congested, expired, turned away."""

from __future__ import annotations

from typing import cast

from broker.core import errors
from broker.core.access import Role
from broker.core.allowances import away_max
from broker.core.broadcasts import Broadcasts
from broker.core.classes import Doubt
from broker.core.events import (
    Acked,
    Attached,
    CloseLink,
    Congested,
    Deliver,
    Detached,
    NumberedLink,
    PauseReading,
    Resumed,
    ResumeReading,
    TakeOver,
)
from broker.core.kept import Kept
from broker.core.messages import Body, SessionTold
from broker.core.registry import NO_TIMES, Endpoint, Times
from broker.core.requests import Requests
from broker.core.sessions import Session
from broker.core.state import State
from broker.core.streaming import Streaming
from broker.core.topics import unnamed_topic

_WORKER: int = Role.WORKER.value
_ANY: int = (Role.CALLER | Role.WORKER | Role.LISTENER).value

_FINAL = frozenset(
    [errors.NORMAL.code, errors.GOING_AWAY.code, errors.DRAINED.code]
    + [close.code for close in errors.CLOSES if not close.come_back]
)


def outlives(code: int) -> bool:
    """Whether a session with grace outlives a link that was closed with this code."""
    return code not in _FINAL


class Attaching:
    """What follows when a peer comes, goes, or begins or ends to serve an endpoint."""

    __slots__ = ("broadcasts", "effects", "registry", "requests", "sessions", "state", "streaming")

    def __init__(self, state: State, requests: Requests, broadcasts: Broadcasts, streaming: Streaming) -> None:
        self.state = state
        self.requests, self.broadcasts, self.streaming = requests, broadcasts, streaming
        self.registry, self.sessions, self.effects = state.registry, state.sessions, state.effects

    # ------------------------------------------------------------ links

    def attached(self, event: Attached, now: float) -> None:
        """A session for a new link; on an endpoint's own URL it listens or serves there at once."""
        limits = self.state.limits
        self.state.counters.attached += 1
        session = Session(event, now, limits.capacity)
        self.sessions.open(session)
        if event.grace_s > 0:
            session.grace_s = min(event.grace_s, limits.grace_max_s)
            allowance = self.state.allowances.open(session.principal)
            session.link = session.kept = Kept(cast(NumberedLink, event.link), limits, self.state.budget, allowance)
            self.effects.append(Deliver(session, self._told(session, session.kept, resumed=False)))
        if event.endpoint is None:
            return
        self.state.moved(session)
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
            self.serve(session, endpoint, event.methods, session.capacity, event.info, now)
        else:
            self.broadcasts.announce(endpoint, "attached", session, now)

    def detached(self, event: Detached, now: float) -> None:
        """A link ended. A session without grace ends with it; another may go on over a new link for so long."""
        session, kept = event.session, event.session.kept
        if session.link is None:
            return
        if kept is not None:
            if event.link is not kept.link:
                return  # another link has taken over
            kept.link = None
            if outlives(event.code) and session.grace_s > 0 and not self.state.draining:
                self._suspend(event, now)
                return
        self._gone(event, now)

    def _suspend(self, event: Detached, now: float) -> None:
        """It is given nothing new, and what is for it is kept. The longest away goes if its principal has too many."""
        session = event.session
        self.state.counters.suspended += 1
        self.sessions.suspend(session, event, now + session.grace_s)
        session.congested = True
        for registration in session.registrations.values():
            self.registry.refresh(registration)
        allowance = self.state.allowances.of(session)
        allowance.leave(session)
        while len(allowance.away) > away_max(self.state.limits):
            self.state.counters.over_share["sessions"] += 1
            self.forget(next(iter(allowance.away)), now)

    def resumed(self, event: Resumed, now: float) -> None:
        """A session's peer is there again: it goes on where it stood, as far as its credential still allows."""
        session, kept = event.session, event.session.kept
        if session.link is None or kept is None:
            return
        self.state.counters.resumed += 1
        old, kept.link = kept.link, None
        self.state.allowances.of(session).come_back(session)
        session.expires_at, session.token_id, session.login_id = event.expires_at, event.token_id, event.login_id
        session.remote = event.remote
        session.grant(event.grants)
        self.sessions.resume(session)
        for attempt in session.attempts.values():
            attempt.mark = 0  # its peer has the call, or is sent it again now; marks of another link mean nothing here
        kept.acked(event.received)
        told = self._told(session, kept, resumed=True)
        self.effects.append(TakeOver(session, event.link, old, told))
        for endpoint in list(session.registrations):
            if not session.may(_WORKER, endpoint.name):
                self.unserve(session, endpoint, now)
        for topic in list(session.subscriptions):
            if not session.may(_ANY, topic.endpoint.name):
                topic.unsubscribe(session)
        self.state.moved(session)
        self.congested(Congested(session, False), now)

    def acked(self, event: Acked, now: float) -> None:
        """A peer has got what it was sent, up to a number."""
        kept = event.session.kept
        if kept is None or not kept.acked(event.n):
            self.state.counters.acks_ignored += 1
        elif event.session.withheld and not event.session.is_behind:
            self.streaming.reads_again(event.session)

    def _told(self, session: Session, kept: Kept, *, resumed: bool) -> SessionTold:
        name = self.state.peer_name(session)
        return SessionTold(name, session.secret, session.grace_s, resumed, kept.received, kept.cut)

    def _gone(self, event: Detached, now: float) -> None:
        """Nothing of the session is left, as caller, worker or listener."""
        session = event.session
        self.state.counters.detached += 1
        if session.kept is not None:
            session.kept.forget()
            self.state.allowances.close(session)
        session.link = session.kept = None
        session.withheld = {}
        self.sessions.close(session)
        for topic in list(session.subscriptions):
            topic.unsubscribe(session)
        self.state.replays.forget(session)
        endpoints = list(session.registrations)
        for registration in list(session.registrations.values()):
            self.registry.unregister(registration)
        requests = self.requests
        requests.stop_all(list(session.requests.values()), errors.CANCELLED, now, cause="caller")
        for endpoint in endpoints:
            requests.abandon(endpoint, now)
        requests.worker_gone(event, now)
        if session.endpoint is not None and not endpoints and session.endpoint in self.registry.by_name:
            self.broadcasts.announce(self.registry.by_name[session.endpoint], "detached", session, now)
        for endpoint in endpoints:
            self.broadcasts.announce(endpoint, "unserved", session, now)
        self.state.moved(session)

    def congested(self, event: Congested, now: float) -> None:
        """A peer does not read what it is sent, or does so again."""
        session = event.session
        if session.link is None:
            return
        session.congested = event.congested
        for registration in session.registrations.values():
            self.registry.refresh(registration)
            self.requests.feed(registration, now)
        if session.withheld and not event.congested:
            self.streaming.reads_again(session)
        if not event.congested:
            self.broadcasts.reads_again(session)
        if not event.congested:
            self.effects.append(ResumeReading(session))  # it may have become a worker since it was paused
        elif not session.registrations:  # a worker must stay free to answer, or both sides would wait for the other
            self.effects.append(PauseReading(session))

    def expire(self, now: float, limit: int) -> None:
        """Turn away at most `limit` sessions whose credential has expired; forget those whose grace is over, and what
        was held against a worker.
        """
        for session in self.sessions.expiry.take_due(now, limit):
            if isinstance(session, Doubt):
                session.end()
                continue
            if session.lost_link is not None:
                self._gone(session.lost_link, now)
                continue
            self.effects.append(CloseLink(session, errors.UNAUTHORISED, "the credential has expired"))

    def forget(self, session: Session, now: float) -> bool:
        """End a session that has no link, before its grace is over; False if it has one."""
        if session.lost_link is None:
            return False
        self._gone(session.lost_link, now)
        return True

    def expel(self, session: Session, reason: str, now: float) -> None:
        """End a session whose credential has ended, whatever grace it has; without a link at once."""
        session.grace_s = 0.0
        if not self.forget(session, now):
            self.effects.append(CloseLink(session, errors.UNAUTHORISED, reason))

    def forget_suspended(self, now: float) -> None:
        """End all sessions that have no link: the broker leaves, and they cannot come back."""
        for session in list(self.sessions.by_id.values()):
            self.forget(session, now)

    # ------------------------------------------------------------ serving

    def serve(
        self,
        session: Session,
        endpoint: Endpoint,
        methods: frozenset[str] | None,
        capacity: int,
        info: Body,
        now: float,
        times: Times = NO_TIMES,
    ) -> None:
        """It is a worker of the endpoint from now on, and is given what waits."""
        registration = self.registry.register(session, endpoint, methods, capacity, info, times)
        self.requests.feed(registration, now)
        self.requests.feed_all(endpoint, now)
        self.broadcasts.announce(endpoint, "serving", session, now)
        self.state.moved(session)

    def unserve(self, session: Session, endpoint: Endpoint, now: float) -> bool:
        """It is no worker of the endpoint any more, and may finish what it has; False if it was none."""
        registration = endpoint.registrations.get(session)
        if registration is None:
            return False
        self.registry.unregister(registration)
        self.requests.abandon(endpoint, now)
        self.broadcasts.announce(endpoint, "unserved", session, now)
        self.state.moved(session)
        return True

    # ------------------------------------------------------------ closed endpoints

    def turn_away(self, now: float) -> None:
        """The configuration has changed: tell who is attached to, or serves, an endpoint that is closed now."""
        shut_out = [(session, why) for session in self.sessions.by_id.values() if (why := self._shut_out(session))]
        for endpoint in self.registry.by_name.values():
            if endpoint.limits.closed:
                self._shut(endpoint, now)
            else:
                self.requests.feed_all(endpoint, now)
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
            self.broadcasts.announce(endpoint, "unserved", registration.session, now)
            self.state.moved(registration.session)
        self.requests.close(endpoint, now)
