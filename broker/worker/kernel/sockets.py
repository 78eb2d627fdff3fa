"""The sockets between a worker and its kernel: requests out, replies and IOPub in, and who notices its end."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import zmq

from broker.links.kernel_channel import Channel, Received
from broker.links.session import Session
from broker.links.zeromq_socket import Monitor, heartbeat
from broker.wire.connection_file import ConnectionInfo
from broker.wire.kernel import KernelMessage

MESSAGE_MAX_BYTES = 256 << 20
"""a larger message of the kernel's breaks the connection it came over, and it is said that output is missing"""
QUEUE_MAX = 10_000
"""messages that ZeroMQ keeps in each direction; beyond them a kernel keeps some more, then drops, and requests fail"""
HEARTBEAT_S = 20.0
"""between two signs of life that ZeroMQ exchanges with a kernel, which may be on another machine"""

GONE = int(zmq.EVENT_DISCONNECTED)
BACK = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)

Watched = Callable[[str, int], None]


class Sockets:
    """The four channels to the kernel a connection file tells of, under one identity.

    The identity is the same on shell, control and stdin: a kernel asks for input where the request came from.
    `watched(channel, event)` is told when the connection of one is there (`BACK`) or lost (`GONE`).
    """

    def __init__(self, info: ConnectionInfo, received: Callable[[Received], None], watched: Watched) -> None:
        self.info = info
        self.session = Session(info.key.encode(), scheme=info.signature_scheme)
        self._watched = watched
        self._received = received
        self._monitors: dict[str, Monitor] = {}
        self._channels: dict[str, Channel] = {}
        self._identity = secrets.token_hex(8).encode()
        try:
            for name in ("iopub", "shell", "control", "stdin"):
                self._channels[name] = Channel(name, self._connect(name), self.session, received)
        except BaseException:
            self.close()
            raise

    @property
    def refused(self) -> int:
        """Messages that came and could not be verified."""
        return sum(channel.refused for channel in self._channels.values())

    def send(self, message: KernelMessage) -> None:
        """Send a message over its channel. Raises `zmq.Again` if the kernel takes nothing more."""
        self._channels[message.channel].send(message)

    def reopen(self, name: str) -> None:
        """Connect a channel anew: after a message above the bound ZeroMQ does not by itself."""
        self._monitors.pop(name).close()
        refused = self._channels[name].refused
        self._channels[name].close()
        channel = self._channels[name] = Channel(name, self._connect(name), self.session, self._received)
        channel.refused = refused

    def close(self) -> None:
        """Leave nothing open."""
        for monitor in self._monitors.values():
            monitor.close()
        self._monitors.clear()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _connect(self, name: str) -> zmq.Socket[bytes]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        socket: zmq.Socket[bytes] = context.socket(zmq.SUB if name == "iopub" else zmq.DEALER)
        socket.linger = 0
        socket.set(zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES)
        socket.set(zmq.RCVHWM, QUEUE_MAX)
        socket.set(zmq.SNDHWM, QUEUE_MAX)
        heartbeat(socket, HEARTBEAT_S, HEARTBEAT_S)
        info = self.info
        if info.transport == "tcp" and ":" in info.ip:
            socket.set(zmq.IPV6, 1)
        if info.curve_publickey is not None and info.curve_secretkey is not None:
            # One pair for both ends, as jupyter_client 8.9 and later have it.
            socket.curve_serverkey = socket.curve_publickey = info.curve_publickey.encode()
            socket.curve_secretkey = info.curve_secretkey.encode()
        if name == "iopub":
            socket.subscribe(b"")
        else:
            socket.identity = self._identity
        self._watch(name, socket)
        socket.connect(info.url(name))
        return socket

    def _watch(self, name: str, socket: zmq.Socket[bytes]) -> None:
        def told(event: int, _value: int) -> None:
            self._watched(name, event)

        self._monitors[name] = Monitor(asyncio.get_running_loop(), socket, told, GONE | BACK)
