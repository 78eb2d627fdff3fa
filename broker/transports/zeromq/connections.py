"""The connections of one socket: how many there are, who says nothing, and who sends what never becomes a message.

libzmq takes frames as long as a message has more of them, however many, and keeps what comes under a routing id that
somebody else has; it tells of neither, and bounds only single frames (MAXMSGSIZE) and the number of whole messages
(RCVHWM). So the kernel is asked what a connection has received. Where it cannot be asked (ipc, and other systems than
Linux) that bound does not hold; who may write to a Unix socket is the file system's matter.
"""

from __future__ import annotations

import os
import socket as sockets
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

import zmq

from broker.transports.zeromq.counters import ZmqCounters

if TYPE_CHECKING:
    import asyncio

LOOK_S = 0.25
SOON_S = 0.05
"""between two looks while somebody has said nothing yet: 50 MB over loopback"""
LOOK_MAX = 200
"""connections the kernel is asked about at each look, in turn, 5 µs each; and as many of those who said nothing yet"""
UNREAD_MAX_BYTES = 8 << 20
"""what the kernel may hold of a connection beside a message: the largest receive buffer has 6 MiB (tcp(7), tcp_rmem)"""
_TCP_INFO = getattr(sockets, "TCP_INFO", None) if sys.platform == "linux" else None
_ACKED_AT, _RECEIVED_AT, _WAITING_AT, _INFO_SIZE = 120, 128, 144, 148
"""where `tcpi_bytes_acked` and `tcpi_bytes_received` (8 bytes each, since Linux 4.1) and `tcpi_notsent_bytes` (4 bytes,
since 4.6) stand in the kernel's `struct tcp_info` (linux/tcp.h)"""
STUCK_S = 1.0
"""after how long somebody who takes nothing is put out where others wait for him"""


def endpoint_of(socket: zmq.Socket[bytes]) -> str:
    """What a socket is bound to, with the port that the system chose."""
    return bytes(socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()


class Connections:
    """By their descriptors, as ZeroMQ's monitor tells of them.

    Put out are: whoever has sent more than the largest message since the last one that came of it; with `silent_s`,
    whoever says nothing valid for so long, and beyond `silent_max` of those the oldest. `read` reads what has come.
    """

    __slots__ = (
        "_counters", "_loop", "_marks", "_read", "_silent", "_silent_max", "_silent_s", "_socket", "_stuck", "_timer",
        "_unfinished_max", "heard",
    )  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], counters: ZmqCounters,
        read: Callable[[], object], *, message_max_bytes: int, silent_s: float = 0.0, silent_max: int = 0,
    ) -> None:  # fmt: skip
        self._loop, self._socket, self._counters, self._read = loop, socket, counters, read
        self._unfinished_max = message_max_bytes + UNREAD_MAX_BYTES
        self._silent_s, self._silent_max = silent_s, silent_max
        self._marks: OrderedDict[int, int] = OrderedDict()  # bytes received when it was last heard, as far as is known
        self._silent: dict[int, float] = {}  # since when, oldest first
        self._stuck: dict[int, tuple[int, float]] = {}  # bytes it had taken, and since when no more
        self._timer: asyncio.TimerHandle | None = None
        self.heard: set[int] = set()
        """of whom a message has come since the last look; whoever reads them adds to it"""

    def __len__(self) -> int:
        return len(self._marks)

    def __contains__(self, descriptor: object) -> bool:
        return descriptor in self._marks

    def opened(self, descriptor: int) -> None:
        """Somebody has connected."""
        self.closed(descriptor)
        self._marks[descriptor] = 0
        self.fell_silent(descriptor)
        if self._timer is None:
            self._look_in(LOOK_S)

    def closed(self, descriptor: int) -> None:
        """It is no more."""
        self._marks.pop(descriptor, None)
        self._silent.pop(descriptor, None)
        self._stuck.pop(descriptor, None)
        self.heard.discard(descriptor)

    def fell_silent(self, descriptor: int) -> None:
        """From now on somebody there has to say something valid."""
        if self._silent_s and descriptor in self._marks:
            self._silent[descriptor] = self._loop.time()
            self._look_in(SOON_S)
            if len(self._silent) > self._silent_max:
                self.evict(next(iter(self._silent)), "silent")

    def spoke(self, descriptor: int) -> None:
        """Something valid came."""
        self._silent.pop(descriptor, None)

    def is_silent(self, descriptor: int) -> bool:
        """Whether nothing valid has come of it."""
        return descriptor in self._silent

    def evict(self, descriptor: int, cause: str) -> None:
        """End one connection, for which libzmq has no function: from below, where it sees an end of the stream.

        `cause` is one of `counters.EVICTIONS`.
        """
        self._silent.pop(descriptor, None)
        self._counters.evictions[cause] += 1
        with suppress(OSError):
            connection = sockets.socket(fileno=os.dup(descriptor))
            with connection:
                # Were the descriptor somebody else's by now, its address would not be this socket's.
                if self._is_ours(connection):
                    connection.shutdown(sockets.SHUT_RDWR)

    def evict_stuck(self) -> None:
        """End those for whom something waits in the kernel and who have taken nothing for `STUCK_S`.

        Call it again and again while something waits: what a first call sees is what later ones compare with.
        """
        now = self._loop.time()
        for descriptor in list(self._marks):
            told = _tcp_info(descriptor)
            waiting = int.from_bytes(told[_WAITING_AT:_INFO_SIZE], sys.byteorder)
            acked = int.from_bytes(told[_ACKED_AT : _ACKED_AT + 8], sys.byteorder)
            before, since = self._stuck.get(descriptor, (-1, now))
            if not waiting:
                self._stuck.pop(descriptor, None)
            elif acked != before:
                self._stuck[descriptor] = acked, now
            elif now - since >= STUCK_S:
                self.evict(descriptor, "stuck")

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_ours(self, connection: sockets.socket) -> bool:
        address, bound_to = connection.getsockname(), endpoint_of(self._socket)
        if isinstance(address, tuple):
            return bound_to.endswith(f":{address[1]}")
        return bound_to == f"ipc://{address}"

    def _look_in(self, seconds: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= self._loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._marks:
            self._look_in(SOON_S if self._silent else LOOK_S)
        self._read()
        now = self._loop.time()
        while self._silent:
            descriptor = next(iter(self._silent))
            if now - self._silent[descriptor] < self._silent_s:
                break
            self.evict(descriptor, "silent")
        for descriptor in [*islice(reversed(self._silent), LOOK_MAX), *islice(self._marks, LOOK_MAX)]:
            self._measure(descriptor)

    def _measure(self, descriptor: int) -> None:
        self._marks.move_to_end(descriptor)
        received = _received(descriptor)
        if descriptor in self.heard:
            self.heard.discard(descriptor)
            self._marks[descriptor] = received
        elif received - self._marks[descriptor] > self._unfinished_max:
            self._marks[descriptor] = received
            self.evict(descriptor, "unfinished")


def _received(descriptor: int) -> int:
    """Bytes that came over a TCP connection until now; 0 where that cannot be known."""
    return int.from_bytes(_tcp_info(descriptor)[_RECEIVED_AT : _RECEIVED_AT + 8], sys.byteorder)


def _tcp_info(descriptor: int) -> bytes:
    """What the kernel knows of a TCP connection; nothing where there is none, or another system."""
    if _TCP_INFO is None:
        return b""
    connection = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM, 0, fileno=descriptor)
    try:
        return connection.getsockopt(sockets.IPPROTO_TCP, _TCP_INFO, _INFO_SIZE)
    except OSError:
        return b""
    finally:
        connection.detach()
