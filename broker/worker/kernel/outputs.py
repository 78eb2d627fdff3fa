"""What a kernel says, on its way to one reader: in order, and bounded whatever the kernel prints."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from broker.links.kernel_channel import Received
from broker.peer.values import Encoded
from broker.wire.kernel import KernelMessage

TEXT_MAX_BYTES = 4 << 20
"""text of streams that waits for one reader; beyond it text is dropped, and it is said where and how much"""
WAITING_MAX_BYTES = 64 << 20
"""everything that waits for one reader; beyond it the rest is dropped too, and it is said what"""
PIECE_MAX_BYTES = 256 << 10
"""text of one stream message: longer ones are cut, shorter ones that wait behind one another are joined"""
MESSAGE_MAX_BYTES = (16 << 20) - 65_536
"""a message that is larger cannot go through the broker"""


class _StreamContent(msgspec.Struct):
    name: str
    text: str


_STREAM = msgspec.json.Decoder(_StreamContent)
Form = Callable[[KernelMessage, int], Encoded]


def as_message(message: KernelMessage, number: int) -> Encoded:
    """`{header, parent_header, metadata, content, n, buffers?}`: a message as the broker's own dialects carry it.

    `n` counts the kernel's messages on IOPub, for who hears some of them twice; it is left out where it is 0.
    """
    text = message.json()[:-1]
    if number:
        text += b',"n":%d' % number
    return Encoded(b"%b%b}" % (text, _buffers(message)), message.buffers)


def as_part(message: KernelMessage, number: int) -> Encoded:
    """The same with `channel`, as whoever sent a message gets what the kernel says meanwhile."""
    whole = as_message(message, number)
    return Encoded(b'{"channel":"%b",%b' % (message.channel.encode(), whole.text[1:]), whole.attachments)


def as_item(message: KernelMessage, number: int) -> Encoded:
    """`{type, …content, buffers?}`: an output as plain callers of `execute` get it."""
    kind = msgspec.json.decode(message.header, type=_Typed).msg_type
    content = message.content.strip()
    members = b"," + content[1:-1] if content[1:-1].strip() else b""
    return Encoded(b'{"type":%b%b%b}' % (msgspec.json.encode(kind), members, _buffers(message)), message.buffers)


class _Typed(msgspec.Struct):
    msg_type: str


def _buffers(message: KernelMessage) -> bytes:
    """The member that refers to the attachments."""
    if not message.buffers:
        return b""
    return b',"buffers":[%b]' % b",".join(b'{"$buffer":%d}' % index for index in range(len(message.buffers)))


class _Waiting(msgspec.Struct):
    """One message; of a stream also its name and text, which those behind it may join."""

    message: KernelMessage
    number: int
    size: int
    name: str | None = None
    texts: list[str] = []


class Outputs:
    """A bounded queue of a kernel's messages for one reader. Belongs to the running event loop.

    Text of streams is joined while it waits, and dropped first; what is dropped is told in the stream itself, as text
    on `stderr`. Messages of other kinds are dropped only above `WAITING_MAX_BYTES`, or if they are larger than the
    broker takes, and that is told in the same way. `form` makes of a message what its reader gets.
    """

    __slots__ = ("_dropped", "_ended", "_form", "_notice", "_size", "_text_size", "_waiting", "_woken", "dropped_bytes")

    def __init__(self, form: Form = as_message) -> None:
        self._form = form
        self._waiting: deque[_Waiting] = deque()
        self._size = self._text_size = 0
        self._dropped: dict[str, int] = {}
        self._notice: Received | None = None
        self._ended = False
        self._woken: asyncio.Future[None] | None = None
        self.dropped_bytes = 0

    def put(self, received: Received, number: int = 0) -> None:
        """One more, the newest."""
        size = received.size
        if received.header.msg_type == "stream" and (self._waiting or size > PIECE_MAX_BYTES or self._dropped):
            self._put_text(received, number)
        elif size > MESSAGE_MAX_BYTES:
            self._drop(received, f"a {_kind(received)} message of {size} bytes, more than a message may have", size)
        elif self._size + size > WAITING_MAX_BYTES:
            self._drop(received, f"{_kind(received)} messages", size)
        else:
            self._tell_dropped()
            self._append(_Waiting(received.message, number, size))
        self._wake()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._wake()

    def take(self) -> Encoded | None:
        """The oldest, as its reader gets it; None if none waits."""
        if not self._waiting:
            self._tell_dropped()
            if not self._waiting:
                return None
        waiting = self._waiting.popleft()
        self._size -= waiting.size
        message = waiting.message
        if waiting.name is not None:
            self._text_size -= waiting.size
            content = msgspec.json.encode(_StreamContent(waiting.name, "".join(waiting.texts)))
            message = msgspec.structs.replace(message, content=content)
        return self._form(message, waiting.number)

    async def get(self) -> Encoded | None:
        """The oldest, as soon as there is one; None after the last."""
        while (taken := self.take()) is None:
            if self._ended:
                return None
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken
        return taken

    # ------------------------------------------------------------ details

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def _append(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._size += waiting.size
        if waiting.name is not None:
            self._text_size += waiting.size

    def _put_text(self, received: Received, number: int) -> None:
        """Text of a stream: joined to what waits, cut where it is long, dropped where too much waits."""
        message = received.message
        try:
            stream = _STREAM.decode(message.content)
        except ValueError:
            self._drop(received, "stream messages without a text", received.size)
            return
        text = stream.text
        for at in range(0, len(text), PIECE_MAX_BYTES):
            piece = text[at : at + PIECE_MAX_BYTES]
            size = len(piece) if piece.isascii() else len(piece.encode("utf-8", "replace"))
            if self._text_size + size > TEXT_MAX_BYTES:
                self._drop(received, "text", len(text) - at)
                return
            self._tell_dropped()
            last = self._waiting[-1] if self._waiting else None
            if (
                last is not None and last.name == stream.name and last.size + size <= PIECE_MAX_BYTES
                and last.message.parent_header == message.parent_header
            ):  # fmt: skip
                last.texts.append(piece)
                last.size += size
                last.number = number
                self._size += size
                self._text_size += size
            else:
                self._append(
                    _Waiting(
                        _numbered(message, at // PIECE_MAX_BYTES) if at else message, number, size, stream.name, [piece]
                    )
                )

    def _drop(self, received: Received, what: str, size: int) -> None:
        if not self._dropped:
            self._notice = received
        elif self._notice is not None and self._notice.message.parent_header != received.message.parent_header:
            self._tell_dropped()
            self._notice = received
        self._dropped[what] = self._dropped.get(what, 0) + size
        self.dropped_bytes += size

    def _tell_dropped(self) -> None:
        """Say what was dropped, where it would have stood."""
        dropped, at, self._dropped, self._notice = self._dropped, self._notice, {}, None
        if not dropped or at is None:
            return
        told = ", ".join(
            what if what[:2] == "a " else f"{size} {'characters' if what == 'text' else 'bytes'} of {what}"
            for what, size in dropped.items()
        )
        text = f"\n[{told} dropped: more than was taken on the way]\n"
        header = msgspec.json.decode(at.message.header)
        header |= {"msg_type": "stream", "msg_id": f"{at.header.msg_id}.dropped"}
        message = KernelMessage(
            "iopub", msgspec.json.encode(header), at.message.parent_header, b"{}",
            msgspec.json.encode(_StreamContent("stderr", text)),
        )  # fmt: skip
        self._append(_Waiting(message, 0, len(text)))


def _kind(received: Received) -> str:
    return received.header.msg_type[:40]


def _numbered(message: KernelMessage, number: int) -> KernelMessage:
    """A piece of a message that was cut: it has an id of its own."""
    header = msgspec.json.decode(message.header)
    header["msg_id"] = f"{header['msg_id']}.{number}"
    return msgspec.structs.replace(message, header=msgspec.json.encode(header))
