"""Topics: who hears which broadcasts, and their numbering."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from broker.core.messages import Body, Broadcast

if TYPE_CHECKING:
    from broker.core.registry import Endpoint
    from broker.core.sessions import Session

PEERS_TOPIC = "broker.peers"
"""On this topic of each endpoint the broker publishes who comes and goes."""


class Topic:
    """One topic of an endpoint; the one without a name is what every listener of the endpoint hears.

    `seq` is the number of the last broadcast. It counts whether or not somebody's bound drops a copy.
    """

    __slots__ = ("_snapshot", "endpoint", "name", "seq", "subscribers")

    def __init__(self, endpoint: Endpoint, name: str | None) -> None:
        self.endpoint = endpoint
        self.name = name
        self.seq = 0
        self.subscribers: dict[Session, None] = {}
        self._snapshot: tuple[Session, ...] | None = None

    def subscribe(self, session: Session) -> None:
        """Let a session hear it; twice is once."""
        if session not in self.subscribers:
            self.subscribers[session] = None
            session.subscriptions[self] = None
            self.endpoint.listeners += 1
            self._snapshot = None

    def unsubscribe(self, session: Session) -> bool:
        """Let it hear no more; False if it did not."""
        if session not in self.subscribers:
            return False
        del self.subscribers[session]
        del session.subscriptions[self]
        self.endpoint.listeners -= 1
        self._snapshot = None
        return True

    def snapshot(self) -> tuple[Session, ...]:
        """Who hears it now; shared until that changes."""
        if self._snapshot is None:
            self._snapshot = tuple(self.subscribers)
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


def topic_of(endpoint: Endpoint, name: str | None, topics_max: int) -> Topic | None:
    """The topic of that name, made if need be; None if the bound is reached and all are heard by somebody."""
    if name is None:
        return unnamed_topic(endpoint)
    topic = endpoint.topics.get(name)
    if topic is None:
        if len(endpoint.topics) - (None in endpoint.topics) >= topics_max:
            unheard = next((n for n, t in endpoint.topics.items() if n is not None and not t.subscribers), None)
            if unheard is None:
                return None
            del endpoint.topics[unheard]
        topic = endpoint.topics[name] = Topic(endpoint, name)
    return topic


class Fanouts:
    """Broadcasts under way, delivered in slices, one after the other: so they stay in order."""

    __slots__ = ("_at", "_under_way")

    def __init__(self) -> None:
        self._under_way: deque[tuple[Broadcast, tuple[Session, ...], dict[str, bytes]]] = deque()
        self._at = 0

    def put(self, message: Broadcast, listeners: tuple[Session, ...]) -> None:
        """Begin one. The frames built for it are shared by all its slices."""
        self._under_way.append((message, listeners, {}))

    def slice(self, limit: int) -> tuple[Broadcast, tuple[Session, ...], dict[str, bytes]] | None:
        """The next at most `limit` copies: what, to whom, and the frames built so far; None if all is done."""
        if not self._under_way:
            return None
        message, listeners, frames = self._under_way[0]
        part = listeners[self._at : self._at + limit]
        self._at += limit
        if self._at >= len(listeners):
            self._under_way.popleft()
            self._at = 0
        return message, part, frames

    def __len__(self) -> int:
        return len(self._under_way)
