"""ZeroMQ sockets on an event loop: read as they become readable, written without waiting, watched for who leaves.

Facts of libzmq 4.3.5 that this rests on, each of which has a test: the file descriptor of a socket tells only that
something may have changed, once (edge-triggered), so it is read until nothing is left; a frame says by which connection
it came (`SRCFD`), and a DISCONNECTED event names the same; with `ROUTER_MANDATORY` sending fails where there is no such
peer, or no room for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import zmq
from zmq.utils.monitor import parse_monitor_message

if TYPE_CHECKING:
    from broker.wire.multipart import Frame

log = logging.getLogger("broker.links")

SEND_QUEUE_MAX = 64
"""messages per peer within libzmq; what waits beyond them waits in a bounded outbox. With frames below `TRACKED_BYTES`
this is at most 4 MiB that nobody counts"""
TRACKED_BYTES = 65_536
"""frames from this size on are handed over without a copy, and libzmq says when it has let go of them"""
DRAIN_MAX = 100
"""messages taken from one socket before the loop has its turn"""

# The methods of pyzmq's C part: Python's wrappers around them add 0.2 µs to each frame, some 3 µs to a request.
_receive = zmq.backend.Socket.recv
_send = zmq.backend.Socket.send
_get = zmq.backend.Socket.get
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

Take = Callable[[list[zmq.Frame]], None]


def receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """One message. Raises `zmq.Again` if there is none.

    Frame objects say themselves whether more follow: 3.9 µs for seven, where `recv_multipart` asks the socket after
    each, 7.6 µs.
    """
    frame: Any = _receive(socket, _NOBLOCK, False)
    frames = [frame]
    while frame.more:
        frame = _receive(socket, _NOBLOCK, False)
        frames.append(frame)
    return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> list[tuple[object, int]]:
    """Give the socket one message, without waiting; what it still holds of large frames, as trackers with sizes.

    Raises `zmq.Again` where there is no room, another ZMQError where there is no such peer; then nothing was sent. 1.0
    µs for six frames, where `send_multipart` takes 7.2.
    """
    held: list[tuple[object, int]] = []
    for frame in frames[:-1]:
        if len(frame) < TRACKED_BYTES:
            _send(socket, frame, _MORE)
        else:
            held.append((_send(socket, frame, _MORE, False, True), len(frame)))
    frame = frames[-1]
    if len(frame) < TRACKED_BYTES:
        _send(socket, frame, _NOBLOCK)
    else:
        held.append((_send(socket, frame, _NOBLOCK, False, True), len(frame)))
    return held


class Reader:
    """Reads a socket to its end whenever something has changed, `DRAIN_MAX` messages in a turn of the loop.

    `turned` is called after each drain. Call `look` after sending outside of `take`: a send may use up the one sign
    that something can be read.
    """

    __slots__ = ("_descriptor", "_draining", "_loop", "_scheduled", "_take", "_turned", "socket")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], take: Take,
        turned: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._take = take
        self._turned = turned
        self._draining = self._scheduled = False
        self.socket: zmq.Socket[bytes] | None = socket
        self._descriptor: int = socket.fd  # type: ignore[assignment]
        loop.add_reader(self._descriptor, self.drain)
        self.look()

    def look(self) -> None:
        """Read in the next turn of the loop, whatever the descriptor says."""
        if not self._scheduled and not self._draining and self.socket is not None:
            self._scheduled = True
            self._loop.call_soon(self.drain)

    def close(self) -> None:
        """Read no more."""
        if self.socket is not None:
            self._loop.remove_reader(self._descriptor)
            self.socket = None

    def drain(self, messages_max: int = DRAIN_MAX) -> None:
        """Read what there is, but at most so many messages."""
        if self._draining:
            return
        self._scheduled = False
        self._draining = True
        try:
            for _ in range(messages_max):
                if self.socket is None:
                    return
                frames = receive(self.socket)
                try:
                    self._take(frames)
                except Exception:
                    log.exception("a message could not be dealt with")
        except zmq.Again:
            pass
        else:
            self._scheduled = True
            self._loop.call_soon(self.drain)
        finally:
            self._draining = False
        if self._turned is not None:
            self._turned()


class Monitor:
    """Tells what happens to the connections of a socket: `told(event, value)`; the value is mostly a descriptor.

    With `ready` that is called when there is something to tell, and has to call `catch_up`.
    """

    __slots__ = ("_descriptor", "_loop", "_socket", "_told", "_watched")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, watched: zmq.Socket[bytes], told: Callable[[int, int], None],
        events: int, ready: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._watched = watched
        self._told = told
        self._socket: zmq.Socket[bytes] | None = watched.get_monitor_socket(events)
        self._descriptor = int(self._socket.fd)
        loop.add_reader(self._descriptor, ready or self.catch_up)
        # Whoever has never found it empty is not woken when something comes.
        loop.call_soon(ready or self.catch_up)

    def catch_up(self) -> None:
        """Tell now what has happened until now, in order."""
        with suppress(zmq.Again):
            while self._socket is not None:
                event = parse_monitor_message([frame.bytes for frame in receive(self._socket)])
                try:
                    self._told(int(event["event"]), int(event["value"]))
                except Exception:
                    log.exception("an event of a connection could not be dealt with")

    def close(self) -> None:
        """Watch no more. Call it before the socket is closed."""
        socket, self._socket = self._socket, None
        if socket is not None:
            self._loop.remove_reader(self._descriptor)
            with suppress(zmq.ZMQError):
                self._watched.disable_monitor()
            socket.close(0)


def bound(socket: zmq.Socket[bytes], *, message_max_bytes: int) -> None:
    """The bounds every socket has here: sizes, queues, how long who says nothing may stay, no lingering."""
    socket.linger = 0
    socket.set(zmq.MAXMSGSIZE, message_max_bytes)
    socket.set(zmq.SNDHWM, SEND_QUEUE_MAX)
    socket.set(zmq.RCVHWM, 1000)


def heartbeat(socket: zmq.Socket[bytes], interval_s: float, timeout_s: float) -> None:
    """Have ZeroMQ ping a connection that is silent, and drop one that does not answer; 0: do not."""
    if interval_s:
        socket.set(zmq.HEARTBEAT_IVL, int(interval_s * 1000))
        socket.set(zmq.HEARTBEAT_TIMEOUT, int(timeout_s * 1000))
        # The longest that can be said is 6553 s (16 bits of tenths, ZMTP 3.1).
        socket.set(zmq.HEARTBEAT_TTL, min(int((interval_s + timeout_s) * 1000), 6_553_500))
