"""Takes a connection out of tornado's hands once its opening request has been found good."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, cast

from tornado.iostream import IOStream, SSLIOStream, StreamClosedError

from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.socket import SocketLink
from broker.links.stream import StreamLink

if TYPE_CHECKING:
    from broker.links.loop import LoopLinks


async def take(
    stream: IOStream,
    response: bytes,
    links: LoopLinks,
    *,
    subprotocol: str | None = None,
    limits: LinkLimits | None = None,
    keep_stream: bool = False,
) -> Link:
    """Return the link that owns the connection from now on; the first thing it writes is ``response`` (the 101).

    That is written in the next loop turn at the earliest: what the caller does before it awaits again has happened
    when the peer learns that it is connected. ``stream`` comes from ``RequestHandler.detach()``, called before any
    reply was written. The receiver given to `Link.start` hears all that the client sent after its request. The socket
    is taken out of the stream unless it is under TLS or ``keep_stream`` is set. ``subprotocol`` is noted on the link;
    ``limits`` replaces those of ``links``.

    Raises ConnectionError when the peer is gone, TimeoutError when it does not take an earlier reply within
    `close_timeout_s`, OSError when the process has no file descriptor left; the stream is closed then.
    """
    try:
        stream.set_nodelay(True)
        written = stream.write(b"")
        if not written.done():  # an earlier reply on this connection was not read yet
            await asyncio.wait_for(written, links.limits.close_timeout_s)
        early, reading = _read_out(stream)
        remote = _peer_of(stream.socket)
        if keep_stream or isinstance(stream, SSLIOStream):
            link: Link = StreamLink(links, stream, remote=remote, early=early, limits=limits)
            link.subprotocol = subprotocol
            link.open_with(response)
            if reading is not None:
                cast("StreamLink", link).adopt(reading)
            return link
        # From here to the close nothing may await: the stream would read what belongs to the link.
        taken = stream.socket.dup()
    except StreamClosedError as error:
        raise ConnectionResetError("the peer left before the handshake was done") from error
    except (OSError, TimeoutError):
        stream.close()
        raise
    stream.close()
    return await own(taken, response, links, remote=remote, early=early, subprotocol=subprotocol, limits=limits)


async def own(
    taken: socket.socket,
    response: bytes,
    links: LoopLinks,
    *,
    remote: str,
    early: bytes = b"",
    subprotocol: str | None = None,
    limits: LinkLimits | None = None,
) -> Link:
    """As `take`, of a plain socket that no stream has; ``early`` was read from it before.

    Raises OSError when the peer is gone; the socket is closed then.
    """
    link = SocketLink(links, remote=remote, early=early, limits=limits)
    link.subprotocol = subprotocol
    try:
        await links.loop.connect_accepted_socket(lambda: link, taken)
    except BaseException:
        taken.close()
        raise
    link.open_with(response)
    return link


def _read_out(stream: IOStream) -> tuple[bytes, asyncio.Future[bytes] | None]:
    """Return what the stream holds in its buffer, or the read that waits for more.

    ``max_buffer_size`` is more than the buffer can hold, so one read empties it (tornado 6.6: a partial read
    returns what is there; with an empty buffer it tries the socket once).
    """
    future = cast("asyncio.Future[bytes]", stream.read_bytes(stream.max_buffer_size, partial=True))
    if future.done():
        return future.result(), None
    return b"", future


def _peer_of(taken: socket.socket) -> str:
    try:
        return written(taken.getpeername())
    except OSError:
        return "gone"


def written(address: object) -> str:
    """A peer's address as people write it; a Unix socket has none."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "local"
