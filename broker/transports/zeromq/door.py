"""The ZeroMQ door: five sockets, as in a connection file, one key for their messages, one rule who may connect."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from broker.core.access import Principal, Role, is_name, roles_at
from broker.engine.engine import Engine
from broker.links.zeromq import Seal
from broker.links.zeromq_socket import Monitor, Reader, bound, heartbeat, send
from broker.transports.zeromq.counters import ZmqCounters
from broker.transports.zeromq.hub import WATCHED, Entrance, Hub, Peer, endpoint_of
from broker.transports.zeromq.publishing import Publisher
from broker.transports.zeromq.zap import Zap
from broker.wire.connection_file import ConnectionInfo
from broker.wire.multipart import Multipart
from broker.wire.session import DELIMITER

if TYPE_CHECKING:
    from broker.links.loop import LoopLinks

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
HEARTBEAT_MAX_BYTES = 1024
BACKLOG = 1024


class DoorError(ValueError):
    """Why the door does not open; the text says what to do."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the door is opened. `ports` are those of `CHANNELS`, 0 for any; over ipc `host` is a path."""

    transport: str
    host: str
    ports: tuple[int, int, int, int, int]
    key: bytes
    signature_scheme: str
    curve_public: bytes = b""
    curve_secret: bytes = b""
    """Z85; empty: no CURVE"""
    message_max_bytes: int
    handshake_s: float
    heartbeat_s: float
    heartbeat_timeout_s: float
    peers_max: int
    unauthenticated_max: int


class _TopicKey(msgspec.Struct):
    endpoint: str
    topic: str = ""


class ZmqDoor:
    """Made and closed on the event loop. `entrance` makes sessions of peers; `holder` says who holds a CURVE key.

    Raises DoorError for an address where NULL is too little, zmq.ZMQError for one that cannot be had.
    """

    def __init__(
        self, engine: Engine, links: LoopLinks, settings: Settings, entrance: Entrance,
        holder: Callable[[bytes], Principal | None],
    ) -> None:  # fmt: skip
        check_address(settings)
        self.counters = ZmqCounters()
        self._engine = engine
        self._settings = settings
        self._holder = holder
        self._entrance = entrance
        self._curve = bool(settings.curve_secret)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 64)
        self._bound: dict[str, str] = {}
        self._connections: dict[str, dict[int, None]] = {}
        self._small: list[Monitor | Reader] = []
        self._plain: list[zmq.Socket[bytes]] = []
        self._hubs: list[Hub] = []
        self._publisher: Publisher | None = None
        self._zap = Zap(engine.loop, self._context, self.counters, self._knows, self._has_room)
        self._seal = Seal(settings.key, settings.signature_scheme)
        try:
            self._open(links)
        except BaseException:
            self.close()
            raise

    def _open(self, links: LoopLinks) -> None:
        settings = self._settings
        # Control first: its messages overtake those on shell.
        self.control = self._hub("control", links)
        self.shell = self._hub("shell", links)
        self.control.beside = self._speaks_for
        socket = self._socket("iopub", zmq.XPUB)
        socket.set(zmq.XPUB_MANUAL, 1)
        socket.set(zmq.XPUB_VERBOSE, 1)
        self._bind("iopub", socket)
        may_listen = self._may_listen if self._curve else None
        self._publisher = Publisher(self._engine, links, socket, self._seal, self.counters, may_listen)
        self._connections["iopub"] = self._publisher.connections
        self._answers = Multipart("stdin", "broker")
        for name, take, most in (
            ("stdin", self._stdin, settings.message_max_bytes), ("hb", self._heartbeat, HEARTBEAT_MAX_BYTES),
        ):  # fmt: skip
            socket = self._socket(name, zmq.ROUTER)
            socket.set(zmq.MAXMSGSIZE, most)
            self._bind(name, socket)
            self._plain.append(socket)
            self._small.append(Reader(self._engine.loop, socket, take))
            self._watch(name, socket)

    def _socket(self, name: str, kind: int) -> zmq.Socket[bytes]:
        settings = self._settings
        socket = self._context.socket(kind)
        bound(socket, message_max_bytes=settings.message_max_bytes)
        heartbeat(socket, settings.heartbeat_s, settings.heartbeat_timeout_s)
        socket.set(zmq.HANDSHAKE_IVL, int(settings.handshake_s * 1000))
        socket.set(zmq.BACKLOG, BACKLOG)
        socket.set(zmq.IPV6, int(":" in settings.host))
        socket.zap_domain = name.encode()
        if self._curve:
            socket.curve_server = True
            socket.curve_secretkey = settings.curve_secret
        return socket

    def _hub(self, name: str, links: LoopLinks) -> Hub:
        settings = self._settings
        socket = self._socket(name, zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        hub = Hub(
            links, socket, self._seal, self.counters, self._entrance,
            name=name, peers_max=settings.peers_max, unauthenticated_max=settings.unauthenticated_max,
            curve=self._curve,
        )  # fmt: skip
        hub.own = self._own
        self._hubs.append(hub)
        self._connections[name] = hub.connections
        self._bind(name, socket)
        return hub

    def _speaks_for(self, route: tuple[bytes, ...], user: str, principal: Principal) -> Peer | None:
        """The peer on `shell` with the same routing id, if that is the same party."""
        peer = self.shell.peers.get(route)
        if peer is None or peer.session is None or peer.user != user or not peer.link.is_open:
            return None
        return peer if peer.session.principal == principal.name else None

    def _bind(self, name: str, socket: zmq.Socket[bytes]) -> None:
        settings = self._settings
        port = settings.ports[CHANNELS.index(name)]
        if settings.transport == "ipc":
            number = port or CHANNELS.index(name) + 1
            socket.bind(f"ipc://{settings.host}-{number}")
        else:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            socket.bind(f"tcp://{host}:{port or '*'}")
        self._bound[name] = endpoint_of(socket)

    def _watch(self, name: str, socket: zmq.Socket[bytes]) -> None:
        """Count the connections of a socket that is no hub."""
        connections = self._connections.setdefault(name, {})

        def told(event: int, descriptor: int) -> None:
            if event == zmq.EVENT_ACCEPTED:
                connections[descriptor] = None
            elif event == zmq.EVENT_DISCONNECTED:
                connections.pop(descriptor, None)

        self._small.append(Monitor(self._engine.loop, socket, told, WATCHED))

    @property
    def info(self) -> ConnectionInfo:
        """What the connection file says. With CURVE it holds the server's public key; a client needs a pair beside."""
        settings = self._settings
        ports: dict[str, Any] = {
            f"{name}_port": int(url.replace("-", ":").rpartition(":")[2]) for name, url in self._bound.items()
        }
        return ConnectionInfo(
            transport="ipc" if settings.transport == "ipc" else "tcp",
            ip=settings.host,
            key=settings.key.decode(),
            signature_scheme=settings.signature_scheme,
            curve_publickey=settings.curve_public.decode() or None,
            **ports,
        )

    @property
    def peers(self) -> int:
        """Routes to somebody who has sent a valid message."""
        return sum(len(hub.peers) for hub in self._hubs)

    @property
    def connections(self) -> int:
        """Connections of all sockets."""
        return sum(map(len, self._connections.values()))

    @property
    def topics(self) -> int:
        """Topics that plain SUB sockets listen to."""
        return self._publisher.topics if self._publisher is not None else 0

    def close(self) -> None:
        """Let go of everything: sockets, their descriptors, the context's threads. Links still open break."""
        for hub in self._hubs:
            hub.close()
        if self._publisher is not None:
            self._publisher.stop()
        for each in reversed(self._small):
            each.close()
        for socket in self._plain:
            socket.close(0)
        self._zap.close()
        self._context.term()  # every socket is closed; those of the hubs still have `LINGER_MS`
        if self._settings.transport == "ipc":
            for url in self._bound.values():
                with suppress(OSError):
                    Path(url.removeprefix("ipc://")).unlink()

    # ------------------------------------------------------------ who may come in

    def _knows(self, key: bytes) -> bool:
        return self._holder(key) is not None

    def _has_room(self, name: str) -> bool:
        # A hub is told of a connection some time after it was accepted, never before: this may let in a few more.
        return len(self._connections.get(name, ())) <= self._settings.peers_max

    def _may_listen(self, key: str, endpoint: str) -> bool:
        principal = self._holder(key.encode())
        return principal is not None and bool(roles_at(principal.grants, endpoint) & Role.LISTENER)

    # ------------------------------------------------------------ the small channels

    def _own(self, peer: Peer, kind: str, msg_id: bytes, content: bytes) -> bool:
        """`topic_key_request`: what a plain SUB socket has to subscribe to."""
        if kind != "topic_key_request":
            return False
        assert self._publisher is not None
        link, grants = peer.link, peer.session.grants if peer.session is not None else ()
        try:
            asked = msgspec.json.decode(content, type=_TopicKey)
        except (msgspec.DecodeError, RecursionError) as error:
            link.send_plain(b"topic_key_reply", _error(-32602, str(error), "invalid"), msg_id)
            return True
        if not is_name(asked.endpoint) or (asked.topic and not is_name(asked.topic)):
            answer: dict[str, object] = _error(-32602, "endpoint and topic have to be names", "invalid")
        elif not roles_at(grants, asked.endpoint) & Role.LISTENER:
            answer = _error(-32006, f"denied: no role at {asked.endpoint}", "denied")
        else:
            answer = {"status": "ok", "result": {"topic": self._publisher.topic_key(asked.endpoint, asked.topic)}}
        link.send_plain(b"topic_key_reply", answer, msg_id)
        return True

    def _heartbeat(self, frames: list[zmq.Frame]) -> None:
        """Echo it, whatever it is."""
        self.counters.heartbeats += 1
        with suppress(zmq.ZMQError):
            send(self._plain[1], [frame.bytes for frame in frames])

    def _stdin(self, frames: list[zmq.Frame]) -> None:
        """Nothing asks for input here: whoever answers is told so."""
        parts = [frame.bytes for frame in frames]
        if DELIMITER not in parts[1:]:
            self.counters.refused["no_delimiter"] += 1
            return
        at = parts.index(DELIMITER, 1)
        body = parts[at + 2 :]
        if len(body) < 4:
            self.counters.refused["malformed"] += 1
            return
        try:
            self._seal.check(parts[at + 1], list(body[:4]))
        except ValueError as error:
            self.counters.refused[getattr(error, "cause", "malformed")] += 1
            return
        self.counters.refused["unknown_type"] += 1
        answer = self._answers.refusal(b"", "stdin", "nothing asks for input at a broker")
        with suppress(zmq.ZMQError):
            send(self._plain[0], [*parts[:at], *self._seal.sign(answer)])


def _error(code: int, message: str, name: str) -> dict[str, object]:
    return {
        "status": "error", "code": code, "message": message, "data": {"outcome": name}, "ename": name,
        "evalue": message, "traceback": [],
    }  # fmt: skip


def check_address(settings: Settings) -> None:
    """Raises DoorError where whoever reaches the port is let in by the key alone, and that is not this machine."""
    if settings.transport == "ipc" or settings.curve_secret:
        return
    try:
        local = settings.host == "localhost" or ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise DoorError(
            f"zeromq.host is {settings.host}, which other machines reach: what is said there could be read. "
            "Set zeromq.curve = true, or zeromq.host to 127.0.0.1"
        )
