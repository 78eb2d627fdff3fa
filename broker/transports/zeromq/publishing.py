"""Broadcasts for plain SUB sockets: an XPUB that takes subscriptions one by one, and a session that hears them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import zmq

from broker.core.access import Grant, Role, is_name
from broker.core.errors import OK
from broker.core.events import Asked, Attached, Detached
from broker.core.messages import Body, Broadcast, End, Message
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links.zeromq import Seal
from broker.links.zeromq_socket import Monitor, Reader, send
from broker.transports.zeromq.counters import ZmqCounters
from broker.wire.jsonrpc import JsonRpc
from broker.wire.multipart import Multipart

if TYPE_CHECKING:
    from broker.links.loop import LoopLinks

TOPIC_MAX = 400
"""bytes of what a SUB socket may subscribe to"""
KEY_SIZE = 32
"""hex digits of the key in front of a topic, where a SUB socket cannot say who it is"""


class Publisher:
    """The XPUB socket, and what the core knows as its session's link: it listens to what somebody subscribed to.

    A topic is `endpoint/topic` and a zero byte (SUB sockets match beginnings), `endpoint/` and a zero byte for what is
    published to the whole endpoint. With CURVE `may_listen(key, endpoint)` decides on each subscription; without, a
    topic is only taken with the key in front of it that `topic_key` gives to who may listen there.
    """

    def __init__(
        self, engine: Engine, links: LoopLinks, socket: zmq.Socket[bytes], seal: Seal, counters: ZmqCounters,
        may_listen: Callable[[str, str], bool] | None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._limits = links.limits
        self._socket = socket
        self._seal = seal
        self._counters = counters
        self._may_listen = may_listen
        self._secret = secrets.token_bytes(32)
        self._held: list[tuple[object, int]] = []
        self._subscribers: dict[int, set[bytes]] = {}  # by descriptor: topics as they were subscribed to
        self._counts: dict[tuple[str, str], int] = {}
        self._ended: End | None = None
        self._asked = 0
        number = engine.next_session()
        self._texts = JsonRpc(node=engine.router.node, session_id=number, binary=True)
        self._codec = Multipart(f"iopub-{secrets.token_hex(4)}", "broker")
        attached = Attached(
            session=number, link=self, principal="zeromq", grants=(Grant(Role.LISTENER, ("*",)),), role=Role.LISTENER,
            listen=False, remote="iopub", dialect="zeromq",
        )  # fmt: skip
        engine.feed(attached)
        self._session: Session | None = engine.router.sessions.by_id[number]
        self._reader = Reader(engine.loop, socket, self._take)
        self.connections: dict[int, None] = {}
        self._monitor = Monitor(engine.loop, socket, self._happened, int(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED))

    @property
    def topics(self) -> int:
        """Topics somebody listens to."""
        return len(self._counts)

    def stop(self) -> None:
        """Publish no more; the session ends."""
        self.close(1000, "")
        self._monitor.close()
        self._reader.close()
        self._socket.close(0)

    def topic_key(self, endpoint: str, topic: str) -> str:
        """What a SUB socket subscribes to, as text, zero byte included; nobody else can make it up."""
        return self._prefix(endpoint, topic).decode()

    def _prefix(self, endpoint: str, topic: str) -> bytes:
        name = f"{endpoint}/{topic}".encode()
        if self._may_listen is not None:
            return name + b"\0"
        key = hmac.digest(self._secret, name, hashlib.sha256).hex()[:KEY_SIZE]
        return b"%b/%b\0" % (key.encode(), name)

    # ------------------------------------------------------------ subscriptions

    def _take(self, frames: list[zmq.Frame]) -> None:
        frame = frames[0]
        said = frame.bytes
        raw = said[1:]
        descriptor = int(frame.get(zmq.SRCFD))
        if said[:1] == b"\1":
            if self._subscribe(frame, descriptor, raw):
                self._socket.set(zmq.SUBSCRIBE, raw)
            else:
                self._counters.subscriptions_refused += 1
        elif said[:1] == b"\0" and raw in self._subscribers.get(descriptor, ()):
            self._socket.set(zmq.UNSUBSCRIBE, raw)
            self._subscribers[descriptor].discard(raw)
            self._leave(raw)

    def _subscribe(self, frame: zmq.Frame, descriptor: int, raw: bytes) -> bool:
        place = self._place(raw)
        if place is None:
            return False
        if self._may_listen is not None:
            try:
                user = str(frame.get("User-Id"))
            except zmq.ZMQError:
                return False
            if not self._may_listen(user, place[0]):
                return False
        elif not hmac.compare_digest(raw, self._prefix(*place)):
            return False
        mine = self._subscribers.setdefault(descriptor, set())
        if raw in mine:
            return True
        if place not in self._counts and not self._ask("broker.subscribe", place):
            return False
        mine.add(raw)
        self._counts[place] = self._counts.get(place, 0) + 1
        return True

    def _place(self, raw: bytes) -> tuple[str, str] | None:
        """Endpoint and topic that are meant; None for what is neither."""
        if raw[-1:] != b"\0" or len(raw) > TOPIC_MAX:
            return None
        name = raw[:-1] if self._may_listen is not None else raw[KEY_SIZE + 1 : -1]
        endpoint, slash, topic = name.decode("ascii", "replace").partition("/")
        good = slash and is_name(endpoint) and (not topic or is_name(topic))
        return (endpoint, topic) if good else None

    def _leave(self, raw: bytes) -> None:
        place = self._place(raw)
        assert place is not None
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place]
            self._ask("broker.unsubscribe", place)

    def _happened(self, event: int, descriptor: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self.connections[descriptor] = None
            return
        self.connections.pop(descriptor, None)
        for raw in self._subscribers.pop(descriptor, ()):
            self._leave(raw)

    def _ask(self, method: str, place: tuple[str, str]) -> bool:
        if self._session is None:
            return False
        self._asked += 1
        params = msgspec.json.encode({"endpoint": place[0], "topic": place[1] or None})
        self._engine.feed(Asked(self._session, b"%d" % self._asked, "", method, Body(params)))
        return self._ended is not None and self._ended.outcome.kind is OK

    # ------------------------------------------------------------ from the router, by the engine

    @property
    def takes_binary(self) -> bool:
        """Attachments go out as they are."""
        return True

    def deliver(self, message: Message) -> None:
        """How a subscription went; nothing else comes here."""
        if isinstance(message, End):
            self._ended = message

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Publish it once, however many listen. False if too much waits here already."""
        assert isinstance(message, Broadcast)
        self._held = [(tracker, size) for tracker, size in self._held if not tracker.done]  # type: ignore[attr-defined]
        if sum(size for _, size in self._held) > self._limits.outbox_soft_bytes:
            self._counters.published_dropped += 1
            return False
        body = message.body
        text = self._texts.encode(Broadcast(message.endpoint, message.topic, message.seq, Body(body.raw)))
        signed = self._seal.sign([*self._codec.write(b"".join(text)), *body.attachments])
        self._held += send(self._socket, [self._prefix(message.endpoint or "", message.topic or ""), *signed])
        self._counters.published += 1
        self._reader.look()
        return True

    def close(self, code: int, reason: str) -> None:
        """The session ends."""
        session, self._session = self._session, None
        if session is not None:
            self._engine.feed(Detached(session, code, reason, 0, self))

    def pause_reading(self) -> None:
        """There is nothing to pause."""

    def resume_reading(self) -> None:
        """There is nothing to resume."""
