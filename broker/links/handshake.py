"""The opening handshake of RFC 6455 at both ends, as functions on what was read and what is to be written.

Origin and Host allow-lists and credentials are not judged here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_LINE = re.compile(r"[\x20-\xff]*")
_NEVER_ECHOED = ("bearer.", "resume.")


class HeaderLines(Protocol):
    """Request or reply headers, such as tornado's `HTTPHeaders`."""

    def get_list(self, name: str) -> list[str]:
        """All values given for a header, in order; names are case-insensitive."""
        ...


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A request that may become a WebSocket: its key and the subprotocols it offers."""

    key: str
    subprotocols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request cannot become a WebSocket, as an HTTP answer."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...] = ()


class HandshakeError(ConnectionError):
    """The server did not open a WebSocket.

    ``status`` is its HTTP status (0: it did not speak HTTP), ``body`` what it said, at most 64 KiB, and
    ``headers`` its headers as (name, value).
    """

    def __init__(
        self, message: str, status: int = 0, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.headers = tuple(headers)


def _tokens(headers: HeaderLines, name: str) -> list[str]:
    values = ",".join(headers.get_list(name)).split(",")
    return [value.strip() for value in values if value.strip()]


# ── the server's end ──


def check_upgrade(method: str, headers: HeaderLines, http_version: str = "HTTP/1.1") -> Upgrade | Refusal:
    """Judge an opening request by RFC 6455, 4.2.1, and more strictly a repeated Host."""
    if method != "GET":
        return Refusal(405, f"a WebSocket is opened with GET, not {method[:16]!r}", (("Allow", "GET"),))
    if http_version == "HTTP/1.0":
        return Refusal(400, "a WebSocket is opened with HTTP/1.1")
    if len(headers.get_list("Host")) != 1 or "," in headers.get_list("Host")[0]:
        return Refusal(400, "exactly one Host header is needed")
    if "websocket" not in map(str.lower, _tokens(headers, "Upgrade")):
        wanted = (("Upgrade", "websocket"), ("Connection", "Upgrade"))
        return Refusal(426, 'this path is a WebSocket: "Upgrade: websocket" is needed', wanted)
    if "upgrade" not in map(str.lower, _tokens(headers, "Connection")):
        return Refusal(400, '"Connection: Upgrade" is needed')
    if headers.get_list("Sec-WebSocket-Version") != ["13"]:
        return Refusal(426, "WebSocket version 13 is spoken here", (("Sec-WebSocket-Version", "13"),))
    keys = headers.get_list("Sec-WebSocket-Key")
    if len(keys) != 1 or not _is_key(keys[0]):
        return Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64, once")
    offered = _tokens(headers, "Sec-WebSocket-Protocol")
    for name in offered:
        if not _TOKEN.fullmatch(name):
            return Refusal(400, "Sec-WebSocket-Protocol holds a name that is no token")
    return Upgrade(keys[0].strip(), tuple(offered))


def _is_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key.strip(), validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def choose_subprotocol(offered: Iterable[str], spoken: Sequence[str] = ("jsonrpc",)) -> str | None:
    """Return the first of ``spoken`` that was offered; credentials offered as subprotocols never are."""
    offers = set(offered)
    for name in spoken:
        if name in offers and not name.startswith(_NEVER_ECHOED):
            return name
    return None


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455, 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _MAGIC, usedforsecurity=False).digest()).decode()


def switching_protocols(key: str, subprotocol: str | None = None, headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """Return the whole 101 reply. Raises ValueError for a header value with a line break."""
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_key(key)}",
    ]
    if subprotocol is not None:
        lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
    lines += [f"{name}: {value}" for name, value in headers]
    return _head(lines)


def _head(lines: Sequence[str]) -> bytes:
    for line in lines:
        if not _LINE.fullmatch(line):
            raise ValueError(f"{line.partition(':')[0][:64]!r} holds a character that no header may hold")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# ── the client's end ──


def upgrade_request(
    host: str,
    target: str,
    key: str,
    subprotocols: Sequence[str] = (),
    headers: Sequence[tuple[str, str]] = (),
) -> bytes:
    """Return the opening request. ``host`` is the Host header, ``target`` path and query, ``key`` 16 random
    bytes in base64. Raises ValueError for what no header line may hold.
    """
    for name in subprotocols:
        if not _TOKEN.fullmatch(name):
            raise ValueError("a subprotocol holds a character that is not allowed in a token")
    if " " in target or not target.startswith("/"):
        raise ValueError(f"target {target!r} must begin with a slash and hold no space")
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    if subprotocols:
        lines.append(f"Sec-WebSocket-Protocol: {', '.join(subprotocols)}")
    lines += [f"{name}: {value}" for name, value in headers]
    return _head(lines)


def check_reply(key: str, subprotocols: Sequence[str], headers: HeaderLines) -> str | None:
    """Judge the headers of a 101 reply by RFC 6455, 4.1; return the subprotocol the server chose.

    Raises HandshakeError, naming what is wrong.
    """
    if [value.lower() for value in _tokens(headers, "Upgrade")] != ["websocket"]:
        raise HandshakeError('the server\'s reply lacks "Upgrade: websocket"', 101)
    if "upgrade" not in map(str.lower, _tokens(headers, "Connection")):
        raise HandshakeError('the server\'s reply lacks "Connection: Upgrade"', 101)
    if headers.get_list("Sec-WebSocket-Accept") != [accept_key(key)]:
        raise HandshakeError("the server's Sec-WebSocket-Accept does not belong to our key", 101)
    if _tokens(headers, "Sec-WebSocket-Extensions"):
        raise HandshakeError("the server chose an extension that was not offered", 101)
    chosen = headers.get_list("Sec-WebSocket-Protocol")
    if not chosen:
        return None
    if len(chosen) > 1 or chosen[0] not in subprotocols:
        raise HandshakeError("the server chose a subprotocol that was not offered", 101)
    return chosen[0]
