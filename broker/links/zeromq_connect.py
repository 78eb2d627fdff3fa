"""Opens a link to a broker over ZeroMQ, from the client's end: a DEALER of its own, in a context of its own."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from broker.links.handshake import HandshakeError
from broker.links.zeromq import FULL, SENT, UNREACHABLE, Seal, ZmqLink
from broker.links.zeromq_socket import TRACKED_BYTES, Monitor, Reader, bound, heartbeat, send
from broker.wire.frames import BROKEN
from broker.wire.session import DELIMITER
from broker.wire.signature import DEFAULT_SCHEME, SignatureError

if TYPE_CHECKING:
    from broker.links.loop import LoopLinks
    from broker.wire.multipart import Frame

UNKNOWN_KEY = b'{"error":"unknown key: whoever runs it has to allow this CURVE key, with broker curve allow"}'
RETRY_S = 0.02
LINGER_MS = 100
WATCHED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


class Place(msgspec.Struct, frozen=True):
    """Where a broker's ZeroMQ door is, and what it takes to be believed there. Its text holds no key."""

    url: str
    key: bytes = b""
    scheme: str = DEFAULT_SCHEME
    server_key: bytes = b""
    public_key: bytes = b""
    secret_key: bytes = b""

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"<Place {self.url}>"


class _Said(msgspec.Struct):
    status: str = ""
    code: int = 0
    message: str = ""
    reason: str = ""


class _Header(msgspec.Struct):
    msg_type: str


async def connect(
    place: Place, links: LoopLinks, *, attachment: dict[str, Any], token: str = "", open_timeout_s: float = 10.0
) -> ZmqLink:
    """Open a link and attach; it takes what comes from `ZmqLink.start` on.

    `attachment` is what a WebSocket says in its path and query. Raises `HandshakeError` with the status when the broker
    refuses, OSError when it is not reached or ends the connection, TimeoutError after `open_timeout_s`, ValueError for
    a key or scheme that is none.
    """
    dealer = _Dealer(links, place)
    try:
        async with asyncio.timeout(open_timeout_s):
            await dealer.shaken
            dealer.link.send_plain(b"attach_request", attachment, b"", {"token": token} if token else {})
            await dealer.attached
    except BaseException:
        dealer.link.abort()
        raise
    return dealer.link


class _Dealer:
    """The socket of one link, and its carrier."""

    def __init__(self, links: LoopLinks, place: Place) -> None:
        self._loop = links.loop
        self._seal = Seal(place.key, place.scheme)
        self.shaken: asyncio.Future[None] = links.loop.create_future()
        self.attached: asyncio.Future[None] = links.loop.create_future()
        self._limits = links.limits
        self._timer: asyncio.TimerHandle | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
            self._set(place)
            self._monitor = Monitor(self._loop, self._socket, self._happened, int(WATCHED), self._settle)
            try:
                self._socket.connect(place.url)
            except zmq.ZMQError:
                self._monitor.close()
                raise
        except (zmq.ZMQError, ValueError) as error:
            self._context.destroy(linger=0)
            raise ValueError(f"{place.url}: {error}") from None
        self._reader = Reader(self._loop, self._socket, self._take, self._turned)
        self.link = ZmqLink(links, self, self._seal, session=secrets.token_hex(8), remote=place.url, numbers=True)

    def _set(self, place: Place) -> None:
        socket = self._socket
        bound(socket, message_max_bytes=self._limits.message_max_bytes)
        heartbeat(socket, self._limits.ping_interval_s, self._limits.ping_timeout_s)
        socket.set(zmq.RECONNECT_IVL, -1)  # a new connection is a new link
        socket.set(zmq.IPV6, int("[" in place.url))
        if place.server_key:
            socket.curve_serverkey = place.server_key
            socket.curve_publickey = place.public_key
            socket.curve_secretkey = place.secret_key

    # ------------------------------------------------------------ what comes in

    def _take(self, frames: list[zmq.Frame]) -> None:
        if len(frames) < 6 or frames[0].bytes != DELIMITER:
            raise ValueError("the broker sent what is no signed message")
        body: list[Frame] = [frame.bytes if len(frame) < TRACKED_BYTES else frame.buffer for frame in frames[2:]]
        try:
            self._seal.check(frames[1].bytes, body[:4])
        except SignatureError as error:
            if not self.attached.done():
                self._fail(HandshakeError(f"its messages are signed with another key: {error}", 0))
            raise
        if (b'"detach"' in body[0] or not self.attached.done()) and self._is_for_door(body):
            return
        self.link.take(body)

    def _is_for_door(self, body: list[Frame]) -> bool:
        kind = msgspec.json.decode(body[0], type=_Header).msg_type
        if kind not in ("detach", "attach_reply"):
            return False
        said = msgspec.json.decode(body[3], type=_Said)
        if kind == "detach":
            self._fail(HandshakeError(said.reason or "the broker ended the connection", 503))
            self.link.detached(said.code, said.reason)
        elif said.status == "ok":
            if not self.attached.done():
                self.attached.set_result(None)
        else:
            self._fail(HandshakeError(said.message, said.code, msgspec.json.encode({"error": said.message})))
        return True

    def _fail(self, error: Exception) -> None:
        for future in (self.shaken, self.attached):
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits gets it; one that was given up has nobody

    def _settle(self) -> None:
        """What came over the connection comes before its end."""
        self._reader.drain(1000)
        self._monitor.catch_up()

    def _happened(self, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            if not self.shaken.done():
                self.shaken.set_result(None)
            return
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._fail(HandshakeError("unknown key", 401, UNKNOWN_KEY))
        elif event not in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            self._fail(HandshakeError("no ZeroMQ handshake with it; is it another port, or CURVE on one side only?", 0))
        else:
            self._fail(ConnectionRefusedError(111, "Connection refused or lost"))
        self.link.end(BROKEN, "the connection is lost", broken=False)

    # ------------------------------------------------------------ writing, for the link

    def send(self, link: ZmqLink, frames: list[Frame]) -> int:
        """Give the socket one message."""
        try:
            link.tracked += send(self._socket, frames)
        except zmq.Again:
            return FULL
        except zmq.ZMQError:
            return UNREACHABLE
        self._reader.look()
        return SENT

    def blocked(self, link: ZmqLink) -> None:
        """Flush it again when there may be room."""
        if self._timer is None:
            self._timer = self._loop.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._timer = None
        self.link.flush()

    def _turned(self) -> None:
        if self._timer is not None:
            self.link.flush()

    def ended(self, link: ZmqLink, broken: bool) -> None:
        """Let go of the socket and the context."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail(ConnectionResetError(104, "the link was closed"))
        self._monitor.close()
        self._reader.close()
        # What was written last, `detach` say, may go out; whoever aborts does not wait for it.
        self._socket.close(0 if broken else LINGER_MS)
        self._context.term()
