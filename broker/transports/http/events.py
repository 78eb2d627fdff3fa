"""`GET /events/{endpoint}`: broadcasts as server-sent events (HTML standard, section 9.2)."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec
from tornado.iostream import StreamClosedError

from broker.auth.facts import Refused
from broker.core.access import Role, is_name, roles_at
from broker.core.errors import DRAINED, GOING_AWAY, OK, SLOW_READER
from broker.core.events import Asked
from broker.core.messages import Body, Broadcast, End, Message
from broker.links.loop import LoopLinks
from broker.transports.http.query import check_names
from broker.transports.http.session import SessionDoor
from broker.wire.calls import EVENTS, Accepts, encode_event, read_event_id, render

HEARTBEAT_S = 15.0
WRITE_BYTES = 64 << 10
"""at once to the socket, so that a reader that takes anything at all is seen to do so"""
COME_BACK = b"retry: 2000\n\n"


class EventsHandler(SessionDoor):
    """A listener whose link is the answer to one GET. `?topic=` hears that topic alone.

    `Last-Event-ID` brings what the topic has kept since, before what comes then.
    """

    links: LoopLinks
    heartbeat_s = HEARTBEAT_S

    def get(self, endpoint: str) -> asyncio.Future[None] | None:
        """Listen. 401, 403, 503 come as they are, and a browser's EventSource stays away then; the end of a stream
        that began makes it come back.
        """  # fmt: skip
        principal = self.authenticate()
        given = check_names(self.facts, ("topic",))
        topic = given.get("topic")
        if not is_name(endpoint) or (topic is not None and not is_name(topic)):
            raise Refused(400, "endpoint and topic are names: 1 to 128 of A-Z a-z 0-9 _ . -, not beginning with . -")
        if not roles_at(principal.grants, endpoint) & Role.LISTENER:
            raise Refused(403, f"{principal.name} may not listen at {endpoint}")
        router = self.engine.router
        known = router.registry.by_name.get(endpoint)
        if known is not None and known.limits.closed:
            raise Refused(403, f"{endpoint} is closed: {known.limits.closed}")
        self.set_header("Content-Type", EVENTS)
        self.set_header("X-Accel-Buffering", "no")
        if self.request.method == "HEAD":
            self.finish()
            return None
        if router.draining:  # 503 would stop an EventSource for good
            self.finish(COME_BACK)
            return None
        self._events = EventStream(self)
        session = self.attach(
            self._events, principal, dialect="sse", role=Role.LISTENER, endpoint=endpoint, listen=topic is None
        )
        params: dict[str, object] = {"endpoint": endpoint, "topic": topic}
        last = read_event_id(self.request.headers.get("Last-Event-ID", ""))
        if last is not None:
            params["since"], params["epoch"] = last
        self.engine.feed(Asked(session, b"1", "", "broker.subscribe", Body(msgspec.json.encode(params))))
        return self.ended

    def leave(self) -> None:
        """The listener is gone."""
        if self.session is not None:
            self._events.stop()
        super().leave()


class _Subscribed(msgspec.Struct):
    epoch: str


class EventStream:
    """The link of such a session: one write at a time, what comes meanwhile gathers within the outbox's bound.

    Above the soft bound broadcasts are dropped; a reader that takes nothing for `stall_s` is closed.
    """

    __slots__ = (
        "_begun", "_epoch", "_handler", "_heartbeat", "_queue", "_scheduled", "_stall", "_stopped", "pending_bytes",
    )  # fmt: skip

    takes_binary = False

    def __init__(self, handler: EventsHandler) -> None:
        self._handler = handler
        self._queue: deque[bytes] = deque()
        self._begun = False
        self._epoch = ""
        self._stopped = False
        self._scheduled = False
        self._heartbeat: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self.pending_bytes = 0

    def begin(self) -> None:
        """Send the header, so that the reader knows that it listens."""
        if not self._stopped:
            self._begun = True
            self._put(b": listening\n\n")
            self._beat()

    def stop(self) -> None:
        """Let go of timers; nothing is written any more."""
        self._stopped = True
        for timer in (self._heartbeat, self._stall):
            if timer is not None:
                timer.cancel()
        self._heartbeat = self._stall = None
        self._queue.clear()
        self._count(-self.pending_bytes)

    # ------------------------------------------------------------ from the router, by the engine

    def deliver(self, message: Message) -> None:
        """What became of subscribing."""
        if type(message) is not End or self._stopped:
            return
        if message.outcome.kind is OK and message.body is not None:
            self._epoch = msgspec.json.decode(message.body.raw, type=_Subscribed).epoch
            self.begin()
        else:
            size_max = self._handler.limits().message_max_bytes
            self._handler.reply(render(message, Accepts(octets=False, json=True), size_max))

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Write one of many copies; False if a bound dropped it."""
        limits, counters = self._handler.links.limits, self._handler.links.counters
        if self._stopped or type(message) is not Broadcast:
            return False
        frame = frames.get("sse")
        if frame is None:
            fits = message.body.expanded_size() <= limits.message_max_bytes
            frame = frames["sse"] = encode_event(message, self._epoch) if fits else b""
        if not frame:
            return False
        if self.pending_bytes and self.pending_bytes + len(frame) > limits.outbox_soft_bytes:
            counters.broadcasts_dropped += 1
            return False
        self._put(frame)
        return True

    def close(self, code: int, reason: str) -> None:
        """End the stream and say why, or when to come back."""
        if self._stopped:
            return
        if not self._begun:
            self._handler.closed(code, reason)
            return
        blocked = self._stall is not None
        self.stop()
        if blocked:  # a write is under way; what came behind it would wait as long
            self._handler.stream.close()
            self._handler.leave()
            return
        last = COME_BACK
        if code not in (DRAINED.code, GOING_AWAY.code):
            last = b"event: close\ndata: %b\n\n" % msgspec.json.encode({"code": code, "reason": reason})
        self._handler.finish(last)

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""

    # ------------------------------------------------------------ writing

    def _count(self, size: int) -> None:
        self.pending_bytes += size
        self._handler.links.count(size)

    def _put(self, frame: bytes) -> None:
        """Gather; what comes within one turn of the loop is one write."""
        self._queue.append(frame)
        self._count(len(frame))
        if not self._scheduled:
            self._scheduled = True
            self._handler.engine.loop.call_soon(self._write)

    def _write(self) -> None:
        """Write what has gathered, and go on when the socket has taken it."""
        if self._stopped or not self._queue:
            self._scheduled = False
            return
        size = 0
        while self._queue and (size == 0 or size + len(self._queue[0]) <= WRITE_BYTES):
            frame = self._queue.popleft()
            size += len(frame)
            self._handler.write(frame)
        written = self._handler.flush()
        if not written.done():
            stall_s = self._handler.links.limits.stall_s
            self._stall = self._handler.engine.loop.call_later(stall_s, self._stalled)
        written.add_done_callback(lambda done: self._written(done, size))

    def _written(self, done: asyncio.Future[None], size: int) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if not self._stopped:
            self._count(-size)
        if isinstance(done.exception(), StreamClosedError):
            self._handler.leave()
        else:
            self._write()

    def _stalled(self) -> None:
        self._handler.links.counters.slow_closes += 1
        self.close(SLOW_READER.code, "the reader took nothing")

    def _beat(self) -> None:
        """A comment now and then, so that proxies do not cut the connection and a dead one is noticed."""
        if not self._stopped:
            if not self._scheduled:
                self._put(b":\n\n")
            self._heartbeat = self._handler.engine.loop.call_later(self._handler.heartbeat_s, self._beat)
