"""Opens a WebSocket from the client's end, with the same links and parser as the server's."""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from broker.links.handshake import HandshakeError, check_reply, upgrade_request
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.socket import SocketLink

if TYPE_CHECKING:
    from broker.links.loop import LoopLinks

_HEAD_MAX_BYTES = 65_536
_BODY_MAX_BYTES = 65_536


async def connect(
    url: str,
    links: LoopLinks,
    *,
    headers: Sequence[tuple[str, str]] = (),
    subprotocols: Sequence[str] = (),
    ssl_context: ssl.SSLContext | None = None,
    open_timeout_s: float = 10.0,
    limits: LinkLimits | None = None,
) -> Link:
    """Open a WebSocket; return its link, which reads from `Link.start` on. It knows its `subprotocol`.

    ``url`` begins with ``ws://`` or ``wss://``; for the latter ``ssl_context`` is the system's default unless
    given. Works on asyncio and uvloop loops.

    Raises ValueError for a wrong URL or header, `HandshakeError` with status and body when the server
    refuses, OSError when it is not reached (`ssl.SSLError` is one), TimeoutError after ``open_timeout_s``.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"ws", "wss"} or not parts.hostname:
        raise ValueError(f"{url.partition('?')[0]!r} is no URL of a WebSocket, such as ws://127.0.0.1:8787/ws")
    if parts.fragment or parts.username is not None:
        raise ValueError("the URL of a WebSocket holds neither a fragment nor a user name")
    tls: ssl.SSLContext | None = None
    if parts.scheme == "wss":
        tls = ssl_context or ssl.create_default_context()
    port = parts.port or (443 if tls else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    key = base64.b64encode(os.urandom(16)).decode()
    request = upgrade_request(_host(parts.hostname, parts.port), target, key, subprotocols, headers)
    async with asyncio.timeout(open_timeout_s):
        _, opening = await links.loop.create_connection(
            lambda: _Opening(links.loop, request),
            parts.hostname,
            port,
            ssl=tls,
            server_hostname=parts.hostname if tls else None,
        )
        try:
            status, lines, rest = await opening.reply
            chosen = _judge(status, lines, rest, key, subprotocols)
        except BaseException:
            opening.transport.abort()
            raise
    remote = _host(parts.hostname, port)
    link = SocketLink(links, client=True, remote=remote, early=rest, limits=limits)
    link.subprotocol = chosen
    # The transport is paused since the head was complete, so nothing comes between.
    opening.transport.set_protocol(link)
    link.connection_made(opening.transport)
    if opening.lost:
        link.connection_lost(None)
    return link


def _host(hostname: str, port: int | None) -> str:
    name = f"[{hostname}]" if ":" in hostname else hostname
    return f"{name}:{port}" if port else name


def _judge(status: int, lines: list[tuple[str, str]], body: bytes, key: str, subprotocols: Sequence[str]) -> str | None:
    if status == 101:
        return check_reply(key, subprotocols, _Lines(lines))
    raise HandshakeError(f"the server refused the WebSocket with HTTP {status}", status, body, lines)


class _Lines:
    """Header lines as `check_reply` wants them."""

    def __init__(self, lines: list[tuple[str, str]]) -> None:
        self._lines = lines

    def get_list(self, name: str) -> list[str]:
        return [value for given, value in self._lines if given.lower() == name.lower()]


class _Opening(asyncio.BufferedProtocol):
    """Writes the request and collects the reply: its head, and the body of a refusal."""

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop, request: bytes) -> None:
        self._request = request
        self._buffer = memoryview(bytearray(16_384))
        self._received = bytearray()
        self._status = 0
        self._lines: list[tuple[str, str]] = []
        self._body_at = 0
        self._body_size = 0
        self.lost = False
        self.reply: asyncio.Future[tuple[int, list[tuple[str, str]], bytes]] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._received += self._buffer[:nbytes]
        if self.reply.done():
            del self._received[:]  # more than the reply of a refusal said; it is not wanted
            return
        try:
            if not self._body_at:
                self._read_head()
            if self._body_at:
                self._read_body()
        except (HandshakeError, ValueError) as error:
            failure = HandshakeError(f"the server's reply is no HTTP: {error}")
            self._fail(failure)

    def _read_head(self) -> None:
        at = self._received.find(b"\r\n\r\n")
        if at < 0:
            if len(self._received) > _HEAD_MAX_BYTES:
                raise ValueError(f"its head is longer than {_HEAD_MAX_BYTES} bytes")
            return
        # tornado's parser, imported late: programs that only serve or only look at errors start without it.
        from tornado.httputil import HTTPHeaders, HTTPInputError, parse_response_start_line

        start, _, rest = self._received[:at].decode("latin-1").partition("\r\n")
        try:
            self._status = parse_response_start_line(start).code
            self._lines = list(HTTPHeaders.parse(rest + "\r\n").get_all())
        except HTTPInputError as error:
            raise ValueError(str(error)) from None
        self._body_at = at + 4
        length = _Lines(self._lines).get_list("Content-Length")
        self._body_size = int(length[0]) if length and length[0].isdecimal() else _BODY_MAX_BYTES
        self._body_size = min(self._body_size, _BODY_MAX_BYTES)

    def _read_body(self) -> None:
        body = bytes(self._received[self._body_at :])
        if self._status == 101:
            self.transport.pause_reading()
            self._finish(body)
        elif len(body) >= self._body_size:
            self._finish(body[: self._body_size])

    def _finish(self, body: bytes) -> None:
        if not self.reply.done():
            self.reply.set_result((self._status, self._lines, body))

    def eof_received(self) -> None:
        if self._body_at:
            self._finish(bytes(self._received[self._body_at :]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._body_at:
            self._finish(bytes(self._received[self._body_at :]))
        elif not self.reply.done():
            self._fail(exc or ConnectionResetError("the server closed before it answered"))

    def _fail(self, error: Exception) -> None:
        """Whoever waits gets it; an opening that was given up while it connected has nobody."""
        self.reply.set_exception(error)
        self.reply.exception()
