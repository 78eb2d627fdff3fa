"""The sockets between a worker and its kernel: signed messages out, verified messages in, and who notices its end."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.links.session import Session
from broker.wire.connection_file import ConnectionInfo
from broker.wire.kernel import KernelMessage
from broker.wire.session import Frame, MessageError, SignatureError, feed_identities

log = logging.getLogger("broker.worker")

MESSAGE_MAX_BYTES = 256 << 20
"""a larger message of the kernel's breaks the connection it came over, and it is said that output is missing"""
TURN_MAX = 200
"""messages that are read before the loop has its turn"""
TURN_MAX_BYTES = 4 << 20
RECEIVED_MAX = 10_000
"""messages that ZeroMQ keeps until they are read; the kernel keeps some more, then drops"""
SENT_MAX = 10_000
HEARTBEAT_MS = 20_000
"""between two signs of life that ZeroMQ exchanges with a kernel on another machine; it has as long to answer"""

GONE = zmq.EVENT_DISCONNECTED
BACK = zmq.EVENT_HANDSHAKE_SUCCEEDED


class Header(msgspec.Struct, frozen=True):
    """What matters of a header, a parent's too, which may be empty."""

    msg_id: str = ""
    msg_type: str = ""
    session: str = ""


class Received(msgspec.Struct, frozen=True):
    """A message of the kernel, as it came, with what matters of its two headers."""

    message: KernelMessage
    header: Header
    parent: Header

    @property
    def size(self) -> int:
        """Bytes of its content and buffers."""
        return len(self.message.content) + sum(map(len, self.message.buffers))


_HEADER = msgspec.json.Decoder(Header)
_RAW = msgspec.json.Decoder(msgspec.Raw)


def read(channel: str, signed: list[Frame]) -> Received:
    """The message in verified frames. Raises MessageError for what is no JSON object where one belongs."""
    try:
        texts = [_object(bytes(frame)) for frame in signed[1:5]]
        header, parent = _HEADER.decode(texts[0]), _HEADER.decode(texts[1])
    except (ValueError, RecursionError) as error:
        raise MessageError("malformed", f"malformed message on {channel}: {error}") from None
    message = KernelMessage(channel, texts[0], texts[1], texts[2], texts[3], tuple(signed[5:]))
    return Received(message, header, parent)


def _object(text: bytes) -> bytes:
    """One JSON object, which can be put into other JSON text as it is. NaN, which some kernels send, becomes null."""
    try:
        text.decode()
        _RAW.decode(text)
    except ValueError:
        import json

        value = json.loads(text.decode("utf-8", "replace"))
        text = msgspec.json.encode(value)
    if text.lstrip()[:1] != b"{":
        raise ValueError("where a JSON object belongs stands something else")
    return text


class Channel:
    """One socket to a kernel, read as it comes, on the running event loop.

    What cannot be verified is dropped and said, the first time with its reason; `received` gets the rest.
    """

    __slots__ = ("_fd", "_loop", "_name", "_received", "_scheduled", "_session", "_socket", "refused")

    def __init__(
        self, name: str, socket: zmq.Socket[bytes], session: Session, received: Callable[[Received], None]
    ) -> None:
        self._name = name
        self._socket = socket
        self._session = session
        self._received = received
        self._scheduled = False
        self.refused = 0
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._read)
        self._go_on()  # the descriptor tells of changes only

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, signed. Raises zmq.Again if the kernel takes nothing more, what the packer raises."""
        self._session.send(self._socket, message, flags=zmq.NOBLOCK)
        self._go_on()  # what came meanwhile is told by no descriptor any more

    def close(self) -> None:
        """Read no more; what was not sent is dropped."""
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)

    def _go_on(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._scheduled = False
        self._read()

    def _read(self) -> None:
        size = 0
        for _ in range(TURN_MAX):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            size += sum(map(len, frames))
            self._take(frames)
            if size > TURN_MAX_BYTES:
                break
        self._go_on()

    def _take(self, frames: list[bytes]) -> None:
        try:
            _, signed = feed_identities(frames)
            self._session.verify(signed)
            received = read(self._name, signed)
        except (MessageError, SignatureError) as error:
            self.refused += 1
            if self.refused == 1:
                log.warning("a message of the kernel on %s is dropped: %s", self._name, error)
            return
        self._received(received)


class Sockets:
    """The four channels to the kernel a connection file tells of, under one identity, and a look at two of them.

    The identity is the same on shell, control and stdin: a kernel asks for input where the request came from.
    `watched(channel, event)` is told when the connection of `shell` or `iopub` is lost (`GONE`) or there (`BACK`).
    """

    def __init__(
        self, info: ConnectionInfo, received: Callable[[Received], None], watched: Callable[[str, int], None]
    ) -> None:
        self.info = info
        self.session = Session(info.key.encode(), scheme=info.signature_scheme)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._loop = asyncio.get_running_loop()
        self._watched = watched
        self._monitors: dict[str, tuple[int, zmq.Socket[bytes], zmq.Socket[bytes]]] = {}
        identity = secrets.token_hex(8).encode()
        self._channels: dict[str, Channel] = {}
        for name in ("iopub", "shell", "control", "stdin"):
            socket = self._connect(name, identity)
            self._channels[name] = Channel(name, socket, self.session, received)

    @property
    def refused(self) -> int:
        """Messages that came and could not be verified."""
        return sum(channel.refused for channel in self._channels.values())

    def send(self, channel: str, message: Mapping[str, Any]) -> None:
        """Send a message, signed. Raises zmq.Again if the kernel takes nothing more, what the packer raises."""
        self._channels[channel].send(message)

    def close(self) -> None:
        """Leave nothing open."""
        for fd, monitor, _ in self._monitors.values():
            self._loop.remove_reader(fd)
            monitor.close(linger=0)
        for _, _, socket in self._monitors.values():
            socket.disable_monitor()
        self._monitors.clear()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _connect(self, name: str, identity: bytes) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.SUB if name == "iopub" else zmq.DEALER)
        socket.linger = 0
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES)
        socket.setsockopt(zmq.RCVHWM, RECEIVED_MAX)
        socket.setsockopt(zmq.SNDHWM, SENT_MAX)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_MS)
        info = self.info
        if ":" in info.ip and info.transport == "tcp":
            socket.setsockopt(zmq.IPV6, 1)
        if info.curve_publickey is not None and info.curve_secretkey is not None:
            # One pair for both ends, as jupyter_client 8.9 and later have it.
            socket.curve_serverkey = socket.curve_publickey = info.curve_publickey.encode()
            socket.curve_secretkey = info.curve_secretkey.encode()
        if name == "iopub":
            socket.subscribe(b"")
        else:
            socket.identity = identity
        if name in ("iopub", "shell"):
            self._watch(name, socket)
        socket.connect(info.url(name))
        return socket

    def _watch(self, name: str, socket: zmq.Socket[bytes]) -> None:
        monitor = socket.get_monitor_socket(GONE | BACK)
        fd = int(monitor.getsockopt(zmq.FD))
        self._monitors[name] = fd, monitor, socket
        self._loop.add_reader(fd, self._look, name, monitor)
        self._loop.call_soon(self._look, name, monitor)

    def _look(self, name: str, monitor: zmq.Socket[bytes]) -> None:
        while not monitor.closed:
            try:
                frames = monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._watched(name, parse_monitor_message(frames)["event"])
