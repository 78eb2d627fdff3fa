"""Opens the ZeroMQ door of a broker: its settings, its keys, and how its peers become sessions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from broker.auth.admission import check_room
from broker.auth.authenticate import Authenticator
from broker.auth.connection_files import read_key_file
from broker.auth.facts import Refused
from broker.auth.private_files import read_whole, replace_file
from broker.auth.token_file import TokenError, grants_of
from broker.auth.tokens import state_path
from broker.config.errors import ConfigError
from broker.config.model import Config, Limits, ZeroMQ
from broker.core.access import Principal
from broker.core.errors import DRAINED
from broker.core.events import Malformed
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links.loop import LoopLinks
from broker.links.session import new_key
from broker.links.zeromq import ZmqLink
from broker.transports.websocket.attach import attach, check_role
from broker.transports.websocket.query import read_attachment
from broker.transports.websocket.resume import PREFIX, find_session
from broker.transports.zeromq.door import DoorError, Settings, ZmqDoor
from broker.transports.zeromq.hub import Opening
from broker.wire.multipart import MultipartError


class _Metadata(msgspec.Struct):
    token: str | None = None


class _Resume(msgspec.Struct):
    id: str
    secret: str
    received: int = 0


_decode_metadata = msgspec.json.Decoder(_Metadata).decode
_decode_content = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Entrance:
    """Lets peers of the ZeroMQ door in: the credential, the place, the bounds, in the order of the other doors."""

    def __init__(
        self, engine: Engine, links: LoopLinks, authenticator: Authenticator, limits: Callable[[], Limits],
        door: ZeroMQ,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._links = links
        self._authenticator = authenticator
        self._limits = limits
        self._holder = Principal("zeromq", grants_of(door.roles, door.endpoints), None, "zeromq")
        self.counters_unknown: Callable[[str], None] = lambda _: None

    def authenticate(self, opening: Opening) -> Principal:
        """By the token in the first message's metadata, else the CURVE key, else the key of the connection file.

        Raises Refused.
        """
        try:
            token = _decode_metadata(opening.metadata).token
        except (msgspec.DecodeError, UnicodeError) as error:
            raise Refused(400, f"metadata: {error}") from None
        if token is not None:
            return self._authenticator.authenticate_bearer(token, opening.remote)
        if opening.user:
            principal = self._authenticator.authenticate_curve(opening.user.encode())
            if principal is None:
                raise Refused(401, "the key is no longer valid")
            return principal
        return self._holder

    def attach(self, link: ZmqLink, opening: Opening, principal: Principal) -> Session | None:
        """As for a WebSocket, whose path and query stand in the content of the `attach_request`. Raises Refused."""
        members = _members(opening.content)
        endpoint = members.pop("endpoint", "")
        resume = members.pop("resume", "")
        names = []
        if resume:
            told = msgspec.json.decode(resume, type=_Resume)
            names, members["received"] = [f"{PREFIX}{told.id}.{told.secret}"], str(told.received)
        attachment = msgspec.structs.replace(read_attachment(endpoint, members.items()), binary=True)
        check_role(principal, endpoint, attachment.role)
        resumed = find_session(
            self._engine.router, self._authenticator, names, principal, endpoint, attachment, opening.remote
        )
        if resumed is None:
            check_room(self._engine, self._limits())
        elif self._engine.router.draining:
            raise Refused(503, DRAINED.text)
        session = attach(
            self._engine, link, principal, endpoint, attachment, resumed, self._limits(), dialect="zeromq"
        )  # fmt: skip
        if session is not None:
            link.on_bad = lambda bad: self._malformed(session, bad)
        return session

    def _malformed(self, session: Session, bad: MultipartError) -> None:
        self.counters_unknown(bad.cause)
        if session.link is not None:
            self._engine.feed(Malformed(session, str(bad), strike=bad.cause == "malformed"))


def _members(content: bytes) -> dict[str, str]:
    """What an `attach_request` says, as the query of a WebSocket would: texts. Raises Refused 400."""
    if not content:
        return {}
    try:
        raw = _decode_content(content)
        members = {}
        for name, value in raw.items():
            text = bytes(value).decode()
            members[name] = msgspec.json.decode(value, type=str) if text.startswith('"') else text
        if "resume" in members:
            msgspec.json.decode(members["resume"], type=_Resume)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Refused(400, f"attach_request: {error}") from None
    return members


def open_door(config: Config, engine: Engine, links: LoopLinks, authenticator: Authenticator) -> ZmqDoor:
    """Open it as configured. Raises ConfigError saying what to change."""
    section, limits = config.zeromq, config.limits
    public, secret = b"", b""
    if section.curve:
        public, secret = server_keys(curve_key_path(section))
    try:
        key = read_key_file(Path(section.key_file)) if section.key_file else new_key()
        key.decode("ascii")
    except (OSError, ValueError) as error:
        raise ConfigError(f"zeromq.key_file: {error}") from None
    settings = Settings(
        transport=section.transport,
        host=section.host,
        ports=(section.shell_port, section.iopub_port, section.stdin_port, section.control_port, section.hb_port),
        key=key,
        signature_scheme=section.signature_scheme,
        curve_public=public,
        curve_secret=secret,
        message_max_bytes=limits.message_max_bytes,
        handshake_s=limits.header_timeout_s,
        heartbeat_s=limits.ping_interval_s,
        heartbeat_timeout_s=limits.ping_timeout_s,
        peers_max=section.peers_max,
        unauthenticated_max=limits.unauthenticated_max,
    )
    entrance = Entrance(engine, links, authenticator, lambda: config.limits, section)
    try:
        door = ZmqDoor(engine, links, settings, entrance, authenticator.holder_of_curve)
    except (DoorError, ValueError) as error:
        raise ConfigError(str(error)) from None
    except zmq.ZMQError as error:
        raise ConfigError(f"zeromq: cannot listen on {section.host}: {error}; choose other ports") from None

    def count(cause: str) -> None:
        door.counters.refused[cause] += 1

    entrance.counters_unknown = count
    return door


def curve_key_path(section: ZeroMQ) -> Path:
    """Where the broker's own CURVE key lies. Raises ConfigError if the user has no home folder."""
    try:
        return Path(section.curve_key_file or state_path("curve.key", "zeromq.curve_key_file"))
    except TokenError as error:
        raise ConfigError(str(error)) from None


def server_keys(path: Path) -> tuple[bytes, bytes]:
    """The broker's own CURVE pair (Z85): public, secret. Made, and kept 0600, if there is no such file.

    Raises ConfigError naming the file.
    """
    try:
        found = read_whole(path, 4096, secret=True)
        if found is None:
            public, secret = zmq.curve_keypair()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(replace_file(path, secret + b"\n"))
            return public, secret
        secret = found[1].strip()
        return zmq.curve_public(secret), secret
    except (OSError, ValueError, zmq.ZMQError) as error:
        raise ConfigError(f"zeromq.curve_key_file: {path}: {error}") from None
