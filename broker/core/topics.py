"""Topics: who hears which broadcasts, and their numbering."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from broker.core.budget import Budget, size_of
from broker.core.history import History, Replay
from broker.core.messages import Body, Broadcast

if TYPE_CHECKING:
    from broker.core.registry import Endpoint
    from broker.core.sessions import Session

PEERS_TOPIC = "broker.peers"
"""On this topic of each endpoint the broker publishes who comes and goes."""


class Topic:
    """One topic of an endpoint; the one without a name is what every listener of the endpoint hears.

    `seq` is the number of the last broadcast. It counts whether or not somebody's bound drops a copy. `number` is new
    for each topic that is made, so that one that was forgotten and made anew is not taken for the same. `subscribers`
    holds with each session its replay, as long as it has not caught up. `ageing` says whether a deadline stands for
    its history.
    """

    __slots__ = ("_snapshot", "ageing", "endpoint", "history", "name", "number", "seq", "subscribers")

    def __init__(self, endpoint: Endpoint, name: str | None, number: int = 0) -> None:
        self.endpoint = endpoint
        self.name = name
        self.number = number
        self.seq = 0
        self.subscribers: dict[Session, Replay | None] = {}
        self.history = History()
        self.ageing = False
        self._snapshot: tuple[Session, ...] | None = None

    def subscribe(self, session: Session) -> None:
        """Let a session hear it from now on; twice is once."""
        if session not in self.subscribers:
            self._add(session, None)

    def replay(self, session: Session, after: int) -> Replay | None:
        """Let a session that is no subscriber hear it from a number on; None if nothing above it is kept."""
        if self.history.after(after, self.seq) is None:
            self._add(session, None)
            return None
        replay = Replay(session, self, after)
        self._add(session, replay)
        return replay

    def _add(self, session: Session, replay: Replay | None) -> None:
        self.subscribers[session] = replay
        session.subscriptions[self] = None
        self.endpoint.listeners += 1
        self._snapshot = None

    def caught_up(self, session: Session) -> None:
        """Its replay is over."""
        self.subscribers[session] = None
        self._snapshot = None

    def unsubscribe(self, session: Session) -> bool:
        """Let it hear no more; False if it did not."""
        if session not in self.subscribers:
            return False
        replay = self.subscribers.pop(session)
        if replay is not None:
            replay.ended = True
        del session.subscriptions[self]
        self.endpoint.listeners -= 1
        self._snapshot = None
        return True

    def snapshot(self) -> tuple[Session, ...]:
        """Who hears it now, all but those who are still catching up; shared until that changes."""
        if self._snapshot is None:
            self._snapshot = tuple(session for session, replay in self.subscribers.items() if replay is None)
        return self._snapshot

    def next(self, body: Body) -> Broadcast:
        """The next numbered broadcast."""
        self.seq += 1
        return Broadcast(self.endpoint.name, self.name, self.seq, body)


def unnamed_topic(endpoint: Endpoint) -> Topic:
    """The one every listener of the endpoint hears. It counts towards no bound: it can always be given."""
    topic = endpoint.topics.get(None)
    if topic is None:
        topic = endpoint.topics[None] = Topic(endpoint, None)
    return topic


def topic_of(endpoint: Endpoint, name: str | None, topics_max: int, number: int = 0) -> Topic | None:
    """The topic of that name, made with this number if need be.

    None if the bound is reached and each is heard by somebody or keeps something.
    """
    if name is None:
        return unnamed_topic(endpoint)
    topic = endpoint.topics.get(name)
    if topic is None:
        if len(endpoint.topics) - (None in endpoint.topics) >= topics_max:
            idle = (n for n, t in endpoint.topics.items() if n is not None and not t.subscribers and not t.history)
            forgotten = next(idle, None)
            if forgotten is None:
                return None
            del endpoint.topics[forgotten]
        topic = endpoint.topics[name] = Topic(endpoint, name, number)
    return topic


class Fanouts:
    """Broadcasts under way, delivered in slices, one after the other: so they stay in order."""

    __slots__ = ("_at", "_budget", "_left", "_under_way", "bytes")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._under_way: deque[tuple[Broadcast, tuple[Session, ...], dict[str, bytes]]] = deque()
        self._at = 0
        self._left: dict[tuple[str | None, str | None], dict[Session, int]] = {}
        self.bytes = 0

    def put(self, message: Broadcast, listeners: tuple[Session, ...]) -> None:
        """Begin one. The frames built for it are shared by all its slices."""
        self._under_way.append((message, listeners, {}))
        self._count(size_of(message.body))

    def leave(self, session: Session, topic: Topic) -> None:
        """A session does not want what is under way of this topic any more."""
        if self._under_way:
            self._left.setdefault((topic.endpoint.name, topic.name), {})[session] = topic.seq

    def slice(self, limit: int) -> tuple[Broadcast, tuple[Session, ...], dict[str, bytes]] | None:
        """The next at most `limit` copies: what, to whom, and the frames built so far; None if all is done."""
        if not self._under_way:
            return None
        message, listeners, frames = self._under_way[0]
        part = listeners[self._at : self._at + limit]
        self._at += limit
        if self._left:
            part = self._without_who_left(message, part)
        if self._at >= len(listeners):
            self._under_way.popleft()
            self._count(-size_of(message.body))
            self._at = 0
            if self._left:
                self._forget_who_left(message)
        return message, part, frames

    def _without_who_left(self, message: Broadcast, part: tuple[Session, ...]) -> tuple[Session, ...]:
        left = self._left.get((message.endpoint, message.topic))
        seq = message.seq
        if not left or seq is None:
            return part
        return tuple(session for session in part if left.get(session, 0) < seq)

    def _forget_who_left(self, message: Broadcast) -> None:
        """What they left is past."""
        if not self._under_way:
            self._left.clear()
            return
        key = message.endpoint, message.topic
        left = self._left.get(key)
        if left and message.seq is not None:
            behind = {session: seq for session, seq in left.items() if seq > message.seq}
            if behind:
                self._left[key] = behind
            else:
                del self._left[key]

    def _count(self, size: int) -> None:
        self.bytes += size
        self._budget.used += size

    def __len__(self) -> int:
        return len(self._under_way)
