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

HISTORY_SHARE = 4
"""All histories together hold at most this part of `memory_soft_bytes`, so that they do not stop the requests."""

_SPEAKER: int = (Role.CALLER | Role.WORKER).value

_encode = msgspec.json.Encoder().encode


class Broadcasts:
    """Decides who hears what. The copies are written in slices later, by whoever does `StartFanout`."""

    __slots__ = ("state",)

    def __init__(self, state: State) -> None:
        self.state = state

    def bound_reached(self) -> str:
        """The bound for which one more is refused; empty if there is room. It counts as refused then."""
        state = self.state
        if state.budget.used > state.limits.memory_hard_bytes:
            bound = "memory"
        elif len(state.fanouts) >= state.limits.fanouts_max:
            bound = "fanouts"
        else:
            return ""
        state.counters.broadcasts_refused += 1
        return bound

    def to_topic(self, topic: Topic, body: Body, now: float) -> None:
        """To who hears the topic now, under its next number; kept for who comes later, if the endpoint keeps any."""
        self._publish(topic, topic.next(body), now)

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

    def announce(self, endpoint: Endpoint, what: str, session: Session, now: float) -> None:
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
        if not self.bound_reached():  # else its number is taken: by the gap listeners see what they missed
            self._publish(topic, message, now)

    # ------------------------------------------------------------ history

    def hear_again(self, session: Session, topic: Topic, since: int) -> None:
        """Let a session hear what a topic keeps with numbers above `since`, and then whatever comes.

        It begins when `go_on` is called.
        """
        self.leave(session, topic)
        replay = topic.replay(session, since)
        if replay is not None:
            self.state.counters.replays += 1
            self.state.replays.put(replay)

    def go_on(self) -> None:
        """Whoever has something to hear again hears it from now on."""
        if self.state.replays.ready:
            self.state.effects.append(StartFanout())

    def leave(self, session: Session, topic: Topic) -> bool:
        """Let a session hear a topic no more, not even what is under way; False if it did not."""
        if not topic.unsubscribe(session):
            return False
        self.state.fanouts.leave(session, topic)
        return True

    def reads_again(self, session: Session) -> None:
        """A session reads again: what it was hearing goes on."""
        self.state.replays.wake(session)
        self.go_on()

    def age(self, now: float, limit: int) -> None:
        """Let go of what has become too old, of at most `limit` topics."""
        state = self.state
        for topic in state.ageing.take_due(now, limit):
            topic.ageing = False
            self.prune(topic, now)

    def reconfigured(self, now: float) -> None:
        """The bounds of histories may be others now."""
        for endpoint in self.state.registry.by_name.values():
            for topic in endpoint.topics.values():
                self.prune(topic, now)

    def prune(self, topic: Topic, now: float) -> None:
        """Let go of what is beyond the bounds of its history."""
        self._count(topic.history.prune(topic.endpoint.limits, self._room_bytes(topic), now))
        self._await_age(topic)

    def _room_bytes(self, topic: Topic) -> int:
        """What the histories of other topics leave for this one of their share of the memory."""
        state = self.state
        return state.limits.memory_soft_bytes // HISTORY_SHARE - (state.history_bytes - topic.history.bytes)

    def _count(self, size: int) -> None:
        self.state.budget.used += size
        self.state.history_bytes += size

    def _await_age(self, topic: Topic) -> None:
        oldest_at = topic.history.oldest_at
        if oldest_at is not None and not topic.ageing:
            topic.ageing = True
            self.state.ageing.add(topic, oldest_at + topic.endpoint.limits.history_s)

    # ------------------------------------------------------------ out

    def _publish(self, topic: Topic, message: Broadcast, now: float) -> None:
        limits = topic.endpoint.limits
        if limits.history:
            self._count(topic.history.keep(message, limits, self._room_bytes(topic), now))
            if not topic.ageing:
                self._await_age(topic)
                self.state.effects.append(StartFanout())  # whoever does it looks at the deadlines again
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
