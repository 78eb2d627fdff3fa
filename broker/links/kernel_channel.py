"""One ZeroMQ socket that speaks Jupyter's signed messages, on an event loop: to a kernel, or in a kernel's place."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
from collections.abc import Callable, Sequence

import msgspec
import zmq

from broker.links.session import Session
from broker.links.zeromq_socket import Reader, send
from broker.wire.kernel import KernelMessage
from broker.wire.session import DELIMITER, MessageError, SignatureError, feed_identities, pack_json

log = logging.getLogger("broker.links")

CHECKED_BYTES = 1 << 20


class Header(msgspec.Struct, frozen=True):
    """What matters of a header on its way; a parent's may be empty."""

    msg_id: str = ""
    msg_type: str = ""
    session: str = ""


class Received(msgspec.Struct, frozen=True):
    """A message as it came, with what matters of its two headers, and who sent it where the socket is a ROUTER."""

    message: KernelMessage
    header: Header
    parent: Header
    identities: tuple[bytes, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of its content and buffers."""
        return len(self.message.content) + sum(map(len, self.message.buffers))


_HEADER = msgspec.json.Decoder(Header)
_RAW = msgspec.json.Decoder(msgspec.Raw)


def read(message: KernelMessage, identities: Sequence[bytes] = ()) -> Received:
    """See what a message is. Raises MessageError for headers that are none."""
    try:
        header, parent = _HEADER.decode(message.header), _HEADER.decode(message.parent_header)
    except (ValueError, RecursionError) as error:
        raise MessageError("malformed", f"malformed message on {message.channel}: {error}") from None
    return Received(message, header, parent, tuple(identities))


def _object(text: bytes) -> bytes:
    """One JSON object, which can be put into other JSON text as it is. NaN, which some kernels send, becomes null.

    Raises ValueError for anything else.
    """
    try:
        _check_utf8(text)
        _RAW.decode(text)
    except ValueError:
        text = pack_json(json.loads(text.decode("utf-8", "replace")))
    if text.lstrip()[:1] != b"{":
        raise ValueError("where a JSON object belongs stands something else")
    return text


def _check_utf8(text: bytes) -> None:
    """Raises UnicodeDecodeError. In pieces: a text of 100 MB would be there twice."""
    if len(text) < CHECKED_BYTES:
        text.decode()
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(text)
    for at in range(0, len(view), CHECKED_BYTES):
        decoder.decode(view[at : at + CHECKED_BYTES])
    decoder.decode(b"", final=True)


class Channel:
    """A socket and the session that signs what it sends and verifies what comes. It closes the socket with itself.

    What cannot be verified is dropped, counted in `refused`, and the first is said; `received` gets the rest.
    """

    __slots__ = ("_name", "_reader", "_received", "_session", "_socket", "refused")

    def __init__(
        self, name: str, socket: zmq.Socket[bytes], session: Session, received: Callable[[Received], None]
    ) -> None:
        self._name = name
        self._socket = socket
        self._session = session
        self._received = received
        self.refused = 0
        self._reader = Reader(asyncio.get_running_loop(), socket, self._take)

    def send(self, message: KernelMessage, identities: Sequence[bytes] = ()) -> None:
        """Sign and send a message, without waiting. Raises `zmq.Again` where there is no room, ZMQError for nobody."""
        texts = [message.header, message.parent_header, message.metadata, message.content]
        send(self._socket, [*identities, DELIMITER, self._session.sign(texts), *texts, *message.buffers])
        self._reader.look()

    def close(self) -> None:
        """Read no more; what was not sent is dropped."""
        self._reader.close()
        self._socket.close(linger=0)

    def _take(self, frames: list[zmq.Frame]) -> None:
        try:
            copied = [frame.bytes for frame in frames]
            frames.clear()  # ZeroMQ's own copies
            identities, signed = feed_identities(copied)
            self._session.verify(signed)
            texts = [_object(bytes(text)) for text in signed[1:5]]  # they are bytes: nothing is copied
            message = KernelMessage(self._name, texts[0], texts[1], texts[2], texts[3], tuple(signed[5:]))
            received = read(message, [bytes(identity) for identity in identities])
        except (MessageError, SignatureError, ValueError, RecursionError) as error:
            self.refused += 1
            if self.refused == 1:
                log.warning("a message on %s is dropped: %s", self._name, error)
            return
        self._received(received)
