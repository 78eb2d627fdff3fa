"""Who may connect: ZeroMQ asks for each connection before it lets it in (ZAP, https://rfc.zeromq.org/spec/27/)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq
import zmq.utils.z85

from broker.links.zeromq_socket import Reader, bound, send
from broker.transports.zeromq.counters import ZmqCounters

if TYPE_CHECKING:
    import asyncio

ADDRESS = "inproc://zeromq.zap.01"


class Zap:
    """Answers for all sockets of one context. `known(key)` says whether a CURVE public key (Z85) may come in,
    `has_room` whether the socket of that name takes one more.

    With CURVE the key becomes the `User-Id` of every message of its connection.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, context: zmq.Context[zmq.Socket[bytes]], counters: ZmqCounters,
        known: Callable[[bytes], bool], has_room: Callable[[str], bool],
    ) -> None:  # fmt: skip
        self._counters = counters
        self._known = known
        self._has_room = has_room
        self._socket = context.socket(zmq.ROUTER)
        bound(self._socket, message_max_bytes=4096)
        self._socket.bind(ADDRESS)
        self._reader = Reader(loop, self._socket, self._take)

    def close(self) -> None:
        """Answer no more."""
        self._reader.close()
        self._socket.close(0)

    def _take(self, frames: list[zmq.Frame]) -> None:
        parts = [frame.bytes for frame in frames]
        at = parts.index(b"")
        version, request, domain, _address, _identity, mechanism, *credentials = parts[at + 1 :]
        status, text, user = self._judge(domain.decode("ascii", "replace"), mechanism, credentials)
        send(self._socket, [*parts[: at + 1], version, request, status, text, user, b""])

    def _judge(self, name: str, mechanism: bytes, credentials: list[bytes]) -> tuple[bytes, bytes, bytes]:
        handshakes = self._counters.handshakes
        if not self._has_room(name):
            handshakes["full"] += 1
            return b"400", b"too many connections", b""
        if mechanism == b"CURVE":
            key = zmq.utils.z85.encode(credentials[0])
            if not self._known(key):
                handshakes["unknown_key"] += 1
                return b"400", b"unknown key", b""
            handshakes["curve"] += 1
            return b"200", b"OK", key
        handshakes["null"] += 1
        return b"200", b"OK", b""
