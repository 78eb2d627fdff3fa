"""One ROUTER socket: who is behind which routing id, whose messages are believed, and how somebody is put out."""

from __future__ import annotations

import os
import socket as sockets
from collections.abc import Callable, MutableSequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from broker.auth.facts import Refused
from broker.core.errors import ABNORMAL, FORBIDDEN, INTERNAL_ERROR, NORMAL, REPLACED, TOO_MANY, UNAUTHORISED
from broker.links.end import log
from broker.links.zeromq import FULL, SENT, UNREACHABLE, Seal, ZmqLink
from broker.links.zeromq_socket import DRAIN_MAX, TRACKED_BYTES, Monitor, Reader, send
from broker.transports.zeromq.counters import ZmqCounters
from broker.wire.session import DELIMITER
from broker.wire.signature import SignatureError

if TYPE_CHECKING:
    import asyncio

    from broker.core.access import Principal
    from broker.core.sessions import Session
    from broker.links.loop import LoopLinks
    from broker.wire.multipart import Frame

RETRY_S = 0.02
"""how often peers whose queue is full are looked at, beside every time the socket says that something has changed"""
STALL_LOOKS_S = 0.25
MANY_DRAINED = 10 * DRAIN_MAX
"""messages read before the end of a connection is told: what came over it comes first"""
LINGER_MS = 100
"""how long a socket that is closed may still write what it was given: the last replies, and why this ends"""
ROUTE_MAX = 8
"""identities in front of a message: one for each ROUTER on its way"""
WATCHED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class _Header(msgspec.Struct, gc=False):
    msg_type: str
    msg_id: msgspec.Raw = msgspec.Raw(b"")


class _Code(msgspec.Struct, gc=False):
    code: int = NORMAL.code
    reason: str = ""


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_detach = msgspec.json.Decoder(_Code).decode


def endpoint_of(socket: zmq.Socket[bytes]) -> str:
    """What a socket is bound to, with the port that the system chose."""
    return bytes(socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()


class Entrance(Protocol):
    """Lets peers in."""

    def authenticate(self, opening: Opening) -> Principal:
        """Who it is. Raises Refused."""
        ...

    def attach(self, link: ZmqLink, opening: Opening, principal: Principal) -> Session | None:
        """Make a session of the link's peer; None if it was turned away: the link is told so. Raises Refused."""
        ...


class Opening(msgspec.Struct):
    """The first message of a peer: who it is as far as the socket knows, and what it says."""

    user: str
    """the CURVE key, Z85; empty without"""
    remote: str
    content: bytes
    """of an `attach_request`; empty for a peer that begins with anything else"""
    metadata: bytes
    routing_id: bytes


class Peer:
    """One route to somebody who has sent a valid message, over the connection with this descriptor."""

    __slots__ = ("beside", "descriptor", "link", "route", "session", "user")

    def __init__(
        self, route: tuple[bytes, ...], descriptor: int, user: str, link: ZmqLink, *, beside: bool = False
    ) -> None:  # fmt: skip
        self.beside = beside
        """whether the link is that of another socket, for whose peer this one speaks"""
        self.session: Session | None = None
        self.route = route
        self.descriptor = descriptor
        self.user = user
        self.link = link


class Hub:
    """The `shell` or the `control` socket. Everything is called on the event loop."""

    def __init__(
        self, links: LoopLinks, socket: zmq.Socket[bytes], seal: Seal, counters: ZmqCounters, entrance: Entrance,
        *, name: str, peers_max: int, unauthenticated_max: int, curve: bool,
    ) -> None:  # fmt: skip
        self.links = links
        self.peers: dict[tuple[bytes, ...], Peer] = {}
        self.connections: dict[int, None] = {}
        """descriptors of all connections, oldest first"""
        self._loop: asyncio.AbstractEventLoop = links.loop
        self._socket = socket
        self._seal = seal
        self._counters = counters
        self._entrance = entrance
        self._name = name
        self._peers_max, self._unauthenticated_max = peers_max, unauthenticated_max
        self._curve = curve
        self._silent: dict[int, None] = {}  # connections without a valid message yet
        self._by_descriptor: dict[int, dict[tuple[bytes, ...], Peer]] = {}
        self._arrivals: list[list[zmq.Frame]] = []  # first messages, until what happened before them has been told
        self._settling = False
        self._blocked: dict[ZmqLink, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._sessions_made = 0
        self.own: Callable[[Peer, str, bytes, bytes], bool] = lambda *_: False
        """asked for each message of an attached peer that is no call: type, `msg_id`, content; whether it was for it"""
        self.beside: Callable[[tuple[bytes, ...], str, Principal], Peer | None] = lambda *_: None
        """the peer of another socket for whom one with this route, key and principal speaks too"""
        self._reader = Reader(self._loop, socket, self._take, self._turned)
        self._monitor = Monitor(self._loop, socket, self._happened, WATCHED, self._settle)

    def close(self) -> None:
        """End every link at once and close the socket."""
        for peer in list(self.peers.values()):
            if not peer.beside:
                peer.link.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._monitor.close()
        self._reader.close()
        self._socket.close(LINGER_MS)

    # ------------------------------------------------------------ what comes in

    def _take(self, frames: list[zmq.Frame], *, arrived: bool = False) -> None:
        """One message. Over a route that is new it waits until `_settle`, as a reused descriptor may be in it."""
        first = frames[0]
        at = 1
        if len(frames) < 2 or frames[1].bytes != DELIMITER:
            while at < len(frames) and frames[at].bytes != DELIMITER:
                at += 1
            if at == len(frames):
                self._counters.refused["no_delimiter"] += 1
                return
        if len(frames) < at + 6 or at > ROUTE_MAX:
            self._counters.refused["malformed"] += 1
            return
        route = (first.bytes,) if at == 1 else tuple(frame.bytes for frame in frames[:at])
        descriptor: int = first.get(zmq.SRCFD)
        user = self._user(first) if self._curve else ""
        peer = self.peers.get(route)
        if peer is not None and (not peer.link.is_open and peer.beside):
            self._forget(peer)
            peer = None
        known = peer is not None and peer.descriptor == descriptor and peer.user == user
        if not known and not arrived:
            self._arrivals.append(frames)
            return
        body: list[Frame] = [
            frame.bytes if len(frame) < TRACKED_BYTES else frame.buffer for frame in frames[at + 2 :]
        ]  # fmt: skip
        try:
            self._seal.check(frames[at + 1].bytes, body[:4])
        except SignatureError as error:
            self._counters.refused[error.cause] += 1
            return
        if not known:
            peer = self._arrived(route, descriptor, user, peer, body, str(first.get("Peer-Address")))
        if peer is None or (b"call_re" not in body[0][:160] and not self._is_message(peer, body)):
            return
        if peer.beside:
            peer.link.answer_by(body, lambda frames: self._send(route, frames, []))
        peer.link.take(body)

    def _settle(self) -> None:
        """Something happened to a connection, or somebody new has spoken. In order: what came over connections that
        have ended, their ends and the new connections, what came over those.
        """
        if self._settling:
            return
        self._settling = True
        try:
            self._reader.drain(MANY_DRAINED)
            self._monitor.catch_up()
            arrivals, self._arrivals = self._arrivals, []
            for frames in arrivals:
                self._take(frames, arrived=True)
        finally:
            self._settling = False

    @staticmethod
    def _user(frame: zmq.Frame) -> str:
        try:
            return str(frame.get("User-Id"))
        except zmq.ZMQError:
            return ""

    def _is_message(self, peer: Peer, body: list[Frame]) -> bool:
        """Deal with what is said to the door itself; whether it is a message for the link."""
        try:
            header = _decode_header(body[0])
        except (msgspec.DecodeError, UnicodeError):
            return True  # the link says what is wrong
        kind = header.msg_type
        if kind == "detach":
            try:
                said = _decode_detach(body[3])
            except (msgspec.DecodeError, UnicodeError):
                said = _Code()
            code = said.code if 1000 <= said.code < 5000 else NORMAL.code
            if not peer.beside:
                peer.link.detached(code, said.reason[:123])
            self._forget(peer)
            return False
        if kind == "attach_request":  # of an attached peer: it begins anew
            if not peer.beside:
                peer.link.end(REPLACED.code, "it has attached anew", broken=False)
            self._forget(peer)
            self._arrived(peer.route, peer.descriptor, peer.user, None, body, peer.link.remote)
            return False
        return not self.own(peer, kind, bytes(header.msg_id), bytes(body[3]))

    def _arrived(
        self, route: tuple[bytes, ...], descriptor: int, user: str, known: Peer | None, body: list[Frame],
        remote: str,
    ) -> Peer | None:  # fmt: skip
        """A valid message over a route that is new, or is another connection's now. None if it is not to be taken."""
        if descriptor not in self.connections:
            self._counters.refused["late"] += 1
            return None
        if known is not None:
            if known.descriptor == descriptor:  # one connection has one key
                self._counters.refused["identity"] += 1
                return None
            # libzmq gives a routing id away only when the connection that had it is gone.
            if not known.beside:
                known.link.end(ABNORMAL.code, "another connection has its routing id", broken=False)
            self._forget(known)
        self._silent.pop(descriptor, None)
        return self._open(route, descriptor, user, body, remote)

    def _open(
        self, route: tuple[bytes, ...], descriptor: int, user: str, body: list[Frame], remote: str
    ) -> Peer | None:  # fmt: skip
        try:
            header = _decode_header(body[0])
        except (msgspec.DecodeError, UnicodeError):
            self._counters.refused["malformed"] += 1
            return None
        if header.msg_type == "detach":
            return None
        asks = header.msg_type == "attach_request"
        opening = Opening(user, remote, bytes(body[3]) if asks else b"", bytes(body[2]), route[0])
        self._sessions_made += 1
        link = ZmqLink(
            self.links, self, self._seal, session=f"{self._name}-{self._sessions_made}", username="broker",
            remote=remote, route=route,
        )  # fmt: skip
        peer = self._enter(Peer(route, descriptor, user, link))
        try:
            principal = self._entrance.authenticate(opening)
            other = None if asks else self.beside(route, user, principal)
            if other is not None:
                link.end(NORMAL.code, "", broken=False)
                peer = self._enter(Peer(route, descriptor, user, other.link, beside=True))
                peer.session = other.session
                return peer
            if len(self.peers) > self._peers_max:
                self._counters.refused["busy"] += 1
                raise Refused(503, f"{self._peers_max} peers are connected")
            peer.session = self._entrance.attach(link, opening, principal)
        except Refused as refused:
            self._counters.refused["unauthorised"] += refused.status in (401, 403, 429)
            self._refuse(link, bytes(header.msg_id), refused)
            return None
        except Exception:
            log.exception("attaching %s failed", remote)
            link.close(INTERNAL_ERROR.code, "internal error")
            return None
        if peer.session is None:
            return None
        if asks:
            link.send_plain(b"attach_reply", {"status": "ok"}, bytes(header.msg_id))
            return None
        return peer

    def _enter(self, peer: Peer) -> Peer:
        self.peers[peer.route] = peer
        self._by_descriptor.setdefault(peer.descriptor, {})[peer.route] = peer
        return peer

    @staticmethod
    def _refuse(link: ZmqLink, msg_id: bytes, refused: Refused) -> None:
        """Say why, as the answer to what it sent, and end."""
        content = {
            "status": "error", "code": refused.status, "message": refused.reason, "ename": "Refused",
            "evalue": refused.reason, "traceback": [],
        }  # fmt: skip
        link.send_plain(b"attach_reply", content, msg_id)
        code = {503: TOO_MANY, 429: TOO_MANY, 401: UNAUTHORISED}.get(refused.status, FORBIDDEN)
        link.close(code.code, refused.reason)

    # ------------------------------------------------------------ what happens to connections

    def _happened(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self.connections[value] = None
            self._silent[value] = None
            if len(self._silent) > self._unauthenticated_max:
                self._evict(next(iter(self._silent)))
        elif event == zmq.EVENT_DISCONNECTED:
            self._lost(value)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            pass  # counted where it was decided
        else:
            name = "failed" if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL else "timeout_or_garbage"
            self._counters.handshakes[name] += 1

    def _lost(self, descriptor: int) -> None:
        self.connections.pop(descriptor, None)
        self._silent.pop(descriptor, None)
        for peer in self._by_descriptor.pop(descriptor, {}).values():
            if self.peers.get(peer.route) is peer:
                del self.peers[peer.route]
            if not peer.beside:
                peer.link.end(ABNORMAL.code, "the connection broke", broken=False)

    def _evict(self, descriptor: int) -> None:
        """End one connection, for which libzmq has no function: from below, where it sees an end of the stream."""
        self._silent.pop(descriptor, None)
        self._counters.evicted += 1
        with suppress(OSError):
            connection = sockets.socket(fileno=os.dup(descriptor))
            with connection:
                # Were the descriptor somebody else's by now, its address would not be this socket's.
                if self._is_ours(connection):
                    connection.shutdown(sockets.SHUT_RDWR)

    def _is_ours(self, connection: sockets.socket) -> bool:
        address, bound_to = connection.getsockname(), endpoint_of(self._socket)
        if isinstance(address, tuple):
            return bound_to.endswith(f":{address[1]}")
        return bound_to == f"ipc://{address}"

    def _forget(self, peer: Peer) -> None:
        if self.peers.get(peer.route) is peer:
            del self.peers[peer.route]
        routes = self._by_descriptor.get(peer.descriptor)
        if routes is not None:
            routes.pop(peer.route, None)
            if not routes:
                del self._by_descriptor[peer.descriptor]

    # ------------------------------------------------------------ writing, for the links

    def send(self, link: ZmqLink, frames: list[Frame]) -> int:
        """Give the socket one message for this peer."""
        return self._send(link.route, frames, link.tracked)

    def _send(self, route: tuple[bytes, ...], frames: list[Frame], tracked: MutableSequence[tuple[object, int]]) -> int:
        try:
            tracked.extend(send(self._socket, [*route, *frames]))
        except zmq.Again:
            return FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return UNREACHABLE
            raise
        self._reader.look()
        return SENT

    def blocked(self, link: ZmqLink) -> None:
        """Flush this link again when there may be room."""
        self._blocked[link] = None
        if self._timer is None:
            self._timer = self._loop.call_later(RETRY_S, self._retry)

    def _turned(self) -> None:
        """The socket has been read: it may have learned that somebody has room again."""
        if self._arrivals:
            self._settle()
        if self._blocked:
            self._flush_blocked()

    def _retry(self) -> None:
        self._timer = None
        self._flush_blocked()

    def _flush_blocked(self) -> None:
        blocked, self._blocked = self._blocked, {}
        now = self._loop.time()
        stall_s = self.links.limits.stall_s
        for link in blocked:
            link.flush()
            if not link.waits:
                continue
            self._blocked[link] = None
            if not link.since:
                link.since = now
            elif now - link.since >= stall_s:
                link.slow(f"nothing read for {stall_s:g} s")
        if self._blocked and self._timer is None:
            self._timer = self._loop.call_later(RETRY_S, self._retry)

    def ended(self, link: ZmqLink, broken: bool) -> None:
        """The link is no more. Whoever was not told, or does not go by himself, is put out."""
        self._blocked.pop(link, None)
        peer = self.peers.get(link.route)
        if peer is not None and peer.link is link:
            self._forget(peer)
            if broken and peer.descriptor in self.connections:
                self._evict(peer.descriptor)
