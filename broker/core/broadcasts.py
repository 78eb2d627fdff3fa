"""Broadcasts: to an endpoint's listeners, a topic, one peer or everybody, and what the broker itself tells of peers."""

from __future__ import annotations

import msgspec

from broker.core.access import Role, may_speak
from broker.core.events import StartFanout
from broker.core.messages import Body, Broadcast
from broker.core.registry import Endpoint
from broker.core.sessions import Session
from broker.core.state import State
from broker.core.topics import PEERS_TOPIC, Topic

_SPEAKER: int = (Role.CALLER | Role.WORKER).value

_encode = msgspec.json.Encoder().encode


class Broadcasts:
    """Decides who hears what. The copies are written in slices later, by whoever does `StartFanout`."""

    __slots__ = ("state",)

    def __init__(self, state: State) -> None:
        self.state = state

    def no_room(self) -> bool:
        """Whether too many are under way for one more; it counts as refused then."""
        if len(self.state.fanouts) < self.state.limits.fanouts_max:
            return False
        self.state.counters.broadcasts_refused += 1
        return True

    def to_topic(self, topic: Topic, body: Body) -> None:
        """To who hears the topic now, under its next number."""
        self._fan_out(topic.next(body), topic.snapshot())

    def to_one(self, target: Session, endpoint: str | None, topic: str | None, body: Body) -> None:
        """To one session, which is told the endpoint and topic as the publisher named them."""
        self._fan_out(Broadcast(endpoint, topic, None, body), (target,))

    def to_all(self, session: Session, body: Body) -> int:
        """Once to every session that listens and that the publisher's grants cover; how many these are."""
        sessions = self.state.sessions.by_id.values()
        within: dict[str | None, bool] = {None: False}  # one look per endpoint, not per session
        for name in {other.endpoint: None for other in sessions}:
            within[name] = name is not None and session.may(_SPEAKER, name)
        listeners = tuple(
            other for other in sessions if other.listen and (within[other.endpoint] or reaches(session, other))
        )
        self._fan_out(Broadcast(None, None, None, body), listeners)
        return len(listeners)

    def announce(self, endpoint: Endpoint, what: str, session: Session) -> None:
        """Tell those who listen to comings and goings at an endpoint."""
        topic = endpoint.topics.get(PEERS_TOPIC)
        if topic is None or not topic.subscribers:
            return
        view = {
            "event": what,
            "peer": self.state.peer_name(session),
            "role": "worker" if what in ("serving", "unserved") else (session.role.name or "").lower(),
            "workers": len(endpoint.registrations),
        }
        message = topic.next(Body(_encode(view)))
        if not self.no_room():  # else its number is taken: by the gap listeners see what they missed
            self._fan_out(message, topic.snapshot())

    def _fan_out(self, message: Broadcast, listeners: tuple[Session, ...]) -> None:
        self.state.counters.broadcasts += 1
        if listeners:
            self.state.fanouts.put(message, listeners)
            self.state.effects.append(StartFanout())


def reaches(session: Session, other: Session) -> bool:
    """Whether a publisher's grants cover something the other has to do with."""
    names = [other.endpoint] if other.endpoint else []
    names += [endpoint.name for endpoint in other.registrations]
    names += [topic.endpoint.name for topic in other.subscriptions]
    if names:
        return any(session.may(_SPEAKER, name) for name in names)
    return session is other or any("*" in grant.endpoints and may_speak((grant,)) for grant in session.grants)
