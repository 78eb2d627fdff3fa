"""Accepts TCP connections within bounds and hands them to tornado's HTTP server."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tornado.iostream import IOStream, SSLIOStream

from broker.links.opening import OPENING_MAX_BYTES

log = logging.getLogger(__name__)

_OUT_OF_RESOURCES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_ACCEPTS_PER_TURN = 64

Opens = Callable[[socket.socket, tuple[object, ...], bytes], bool]
"""Takes a connection with its peer's address, whose first bytes are these, still unread; False: HTTP is to have it."""
_WINDOW_S = 0.1


class StreamHandler(Protocol):
    """What takes an accepted stream: tornado's `HTTPServer`."""

    def handle_stream(self, stream: IOStream, address: tuple[object, ...]) -> object:
        """Serve a stream."""
        ...


@dataclass(frozen=True, slots=True)
class AcceptLimits:
    """What an acceptor lets in; all can be configured.

    Raises ValueError for a value with which nothing could be accepted.
    """

    unauthenticated_max: int = 1000
    """Sockets that have not authenticated, over all addresses."""
    unauthenticated_per_address_max: int = 100
    unauthenticated_loopback_max: int = 1000
    """Instead of the one per address, for the machine itself."""
    accepts_per_s_max: int = 5000
    """More wait in the kernel's backlog."""
    first_request_s: float = 10.0
    """A socket with no complete HTTP request (TLS handshake included) is closed after this time."""
    pause_s: float = 0.5
    """No socket is accepted for this long when the process has no file descriptors left."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, more than 0 is needed")


@dataclass(slots=True)
class AcceptCounters:
    """Plain totals since the start."""

    accepted: int = 0
    refused_total: int = 0
    refused_address: int = 0
    silent_closed: int = 0
    pauses: int = 0
    tls_failed: int = 0


@dataclass(slots=True)
class _Waiting:
    """A connection that has not authenticated: first its socket alone, then the stream the HTTP server has of it."""

    connection: socket.socket
    host: str
    since: float
    stream: IOStream | None = None
    requested: bool = False

    @property
    def is_closed(self) -> bool:
        return self.connection.fileno() < 0 if self.stream is None else self.stream.closed()


class Acceptor:
    """Listens on sockets; refuses, by closing at once, what is beyond the bounds.

    What has authenticated must be told with `authenticated`, so that it counts no longer; that a first
    request is complete, with `requested`. A detached stream must be told before it is taken.

    The ``HTTPServer`` should be made with ``idle_connection_timeout=10`` (tornado: an hour; it also bounds
    a slow header), ``body_timeout=30``, ``max_header_size=65536``, ``max_body_size`` the message bound,
    ``max_buffer_size`` a little above it (tornado: 100 MB per connection), and ``no_keep_alive=False``.

    ``ssl_context`` may be replaced while running; it counts for connections accepted afterwards. ``opens`` is asked
    first, where there is no TLS, as soon as the peer has said something.
    """

    def __init__(
        self,
        server: StreamHandler,
        *,
        limits: AcceptLimits | None = None,
        ssl_context: ssl.SSLContext | None = None,
        max_buffer_size: int = 17 << 20,
        counters: AcceptCounters | None = None,
        opens: Opens | None = None,
    ) -> None:
        self._opens = opens
        self.ssl_context = ssl_context
        self.limits = limits or AcceptLimits()
        self.counters = counters or AcceptCounters()
        self._server = server
        self._max_buffer_size = max_buffer_size
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._waiting: dict[socket.socket | IOStream, _Waiting] = {}
        self._addresses: dict[str, int] = {}
        self._listening = False
        self._resume_timer: asyncio.TimerHandle | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._window_end = 0.0
        self._window_count = 0

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """The listening sockets."""
        return tuple(self._sockets)

    @property
    def unauthenticated(self) -> int:
        """Open sockets that have not authenticated."""
        self._purge()
        return len(self._waiting)

    def add_sockets(self, sockets: Sequence[socket.socket]) -> None:
        """Accept from bound, listening sockets, such as `tornado.netutil.bind_sockets` returns."""
        for listening in sockets:
            listening.setblocking(False)
            self._sockets.append(listening)
            if self._listening:
                self._loop.add_reader(listening, self._accept, listening)
        if not self._listening and self._resume_timer is None:
            self._listen()

    def close(self) -> None:
        """Close the listening sockets, and those that nobody has yet; the others stay and are no longer watched."""
        self._stop_listening()
        for timer in (self._resume_timer, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        self._resume_timer = self._sweep_timer = None
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()
        for waiting in list(self._waiting.values()):
            if waiting.stream is None:
                self._drop(waiting)
        self._waiting.clear()
        self._addresses.clear()

    def requested(self, stream: IOStream) -> None:
        """A first request is complete; the socket may now be idle as long as the HTTP server lets it."""
        waiting = self._waiting.get(stream)
        if waiting is not None:
            waiting.requested = True

    def authenticated(self, stream: IOStream) -> None:
        """The socket counts no longer."""
        self._forget(stream)

    # ── accepting ──

    def _listen(self) -> None:
        self._resume_timer = None
        self._listening = True
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _stop_listening(self) -> None:
        if self._listening:
            self._listening = False
            for listening in self._sockets:
                self._loop.remove_reader(listening)

    def _pause(self, pause_s: float) -> None:
        self._stop_listening()
        self._resume_timer = self._loop.call_later(pause_s, self._listen)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            if not self._listening or self._is_share_used():
                return
            try:
                connection, address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self.counters.pauses += 1
                    log.warning("accepting pauses for %g s: %s", self.limits.pause_s, error.strerror)
                    self._pause(self.limits.pause_s)
                    return
                continue  # the peer left while it was waiting, or the network failed for it alone
            self._admit(connection, address)

    def _is_share_used(self) -> bool:
        """Hold the accepts per second, in shares of a tenth of a second."""
        now = self._loop.time()
        if now >= self._window_end:
            self._window_end, self._window_count = now + _WINDOW_S, 0
        if self._window_count >= max(1, self.limits.accepts_per_s_max * _WINDOW_S):
            self._pause(self._window_end - now)
            return True
        self._window_count += 1
        return False

    def _admit(self, connection: socket.socket, address: tuple[object, ...]) -> None:
        host = str(address[0]) if address else "local"
        if not self._has_room(host):
            connection.close()
            return
        connection.setblocking(False)
        waiting = self._waiting[connection] = _Waiting(connection, host, self._loop.time())
        self._addresses[host] = self._addresses.get(host, 0) + 1
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(self.limits.first_request_s / 10, self._sweep)
        if self._opens is None or self.ssl_context is not None:
            self.counters.accepted += self._serve(waiting, address)
            return
        self.counters.accepted += 1
        if not self._look(waiting, address):
            self._loop.add_reader(connection.fileno(), self._heard, waiting, address)

    def _heard(self, waiting: _Waiting, address: tuple[object, ...]) -> None:
        self._loop.remove_reader(waiting.connection.fileno())
        if not self._look(waiting, address):
            self._loop.add_reader(waiting.connection.fileno(), self._heard, waiting, address)

    def _look(self, waiting: _Waiting, address: tuple[object, ...]) -> bool:
        """Have a connection opened by what its peer has said, or served over HTTP; False if it has said nothing yet."""
        connection = waiting.connection
        try:
            data = connection.recv(OPENING_MAX_BYTES, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:  # it left without a word
            self._drop(waiting)
        elif self._opens is not None and self._opens(connection, address, data):
            self._forget(connection)
        else:
            self._serve(waiting, address)
        return True

    def _serve(self, waiting: _Waiting, address: tuple[object, ...]) -> bool:
        """Let the HTTP server have a connection; False if TLS could not begin."""
        try:
            stream = self._stream(waiting.connection)
        except OSError as error:  # ssl.SSLError is one
            self.counters.tls_failed += 1
            log.debug("TLS with %s could not begin: %s", waiting.host, error)
            self._drop(waiting)
            return False
        del self._waiting[waiting.connection]
        self._waiting[stream] = waiting
        waiting.stream = stream
        self._server.handle_stream(stream, address)
        return True

    def _drop(self, waiting: _Waiting) -> None:
        """Close a connection that nobody has yet."""
        self._forget(waiting.connection)
        if waiting.connection.fileno() >= 0:  # else TLS had it, and closed it
            self._loop.remove_reader(waiting.connection.fileno())
            waiting.connection.close()

    def _stream(self, connection: socket.socket) -> IOStream:
        if self.ssl_context is None:
            return IOStream(connection, max_buffer_size=self._max_buffer_size)
        wrapped = self.ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return SSLIOStream(wrapped, max_buffer_size=self._max_buffer_size)

    # ── counting who has not authenticated ──

    def _has_room(self, host: str) -> bool:
        limits = self.limits
        per_address = limits.unauthenticated_per_address_max
        if _is_loopback(host):
            per_address = limits.unauthenticated_loopback_max
        full = len(self._waiting) >= limits.unauthenticated_max
        if full or self._addresses.get(host, 0) >= per_address:
            self._purge()  # tornado uses the streams' close callbacks, so we look only when it matters
        if len(self._waiting) >= limits.unauthenticated_max:
            self.counters.refused_total += 1
            return False
        if self._addresses.get(host, 0) >= per_address:
            self.counters.refused_address += 1
            return False
        return True

    def _purge(self) -> None:
        for one in [one for one, waiting in self._waiting.items() if waiting.is_closed]:
            self._forget(one)

    def _forget(self, one: socket.socket | IOStream) -> None:
        waiting = self._waiting.pop(one, None)
        if waiting is None:
            return
        left = self._addresses[waiting.host] - 1
        if left:
            self._addresses[waiting.host] = left
        else:
            del self._addresses[waiting.host]

    def _sweep(self) -> None:
        self._sweep_timer = None
        self._purge()
        overdue = self._loop.time() - self.limits.first_request_s
        for one, waiting in list(self._waiting.items()):
            if waiting.since > overdue or waiting.requested:
                continue
            self.counters.silent_closed += 1
            if waiting.stream is None:
                self._drop(waiting)
            else:
                waiting.stream.close()
                self._forget(one)
        if self._waiting:
            self._sweep_timer = self._loop.call_later(self.limits.first_request_s / 10, self._sweep)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in {"", "local"}  # a Unix socket has no address
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
