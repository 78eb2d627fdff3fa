"""Messages between a notebook front end and its kernels over a WebSocket, in both layouts that front ends speak.

The subprotocol `v1.kernel.websocket.jupyter.org` is always binary, of little-endian uint64:
`n | offset[0] … offset[n-1] | channel | header | parent_header | metadata | content | buffers…`; offset 0 is where the
channel begins, each further one where a part ends, the last the length of it all
(jupyter-server.readthedocs.io/en/latest/developers/websocket-protocols.html).
Without a subprotocol ("legacy") a message is a JSON text; with buffers it is a binary frame as in `wire/attachments`.

What a message says stays JSON text. It is checked to be one object each, because it is put into other JSON text.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import msgspec

from broker.wire.attachments import ATTACHMENTS_MAX, AttachmentError, pack, unpack
from broker.wire.session import PROTOCOL_VERSION

V1 = "v1.kernel.websocket.jupyter.org"
CHANNELS = ("shell", "control", "stdin", "iopub")
_TEXTS = 4
_LEAST = _TEXTS + 2  # offsets of a message without buffers
_EMPTY = msgspec.Raw(b"{}")

Buffer: TypeAlias = bytes | memoryview
Pieces: TypeAlias = list[Buffer]


class KernelMessageError(ValueError):
    """A frame that is no kernel message; the text says where it is wrong."""


class KernelMessage(msgspec.Struct, frozen=True):
    """A message on one channel; its four dicts as JSON text, each checked to be one object."""

    channel: str
    header: bytes
    parent_header: bytes
    metadata: bytes
    content: bytes
    buffers: tuple[Buffer, ...] = ()

    def json(self) -> bytes:
        """`{header, parent_header, metadata, content}` as JSON text, as the broker's own dialects carry it."""
        return b'{"header":%b,"parent_header":%b,"metadata":%b,"content":%b}' % (
            self.header, self.parent_header, self.metadata, self.content,
        )  # fmt: skip


class Header(msgspec.Struct, frozen=True):
    """The members of a message's header that matter on its way."""

    msg_id: str
    msg_type: str
    session: str = ""


class _Json(msgspec.Struct, frozen=True):
    """A message as JSON; other members are ignored."""

    header: msgspec.Raw
    parent_header: msgspec.Raw = _EMPTY
    metadata: msgspec.Raw = _EMPTY
    content: msgspec.Raw = _EMPTY
    channel: str | None = None


class Sign(NamedTuple):
    """What a message of the broker's own is marked with; drawn by whoever sends it."""

    msg_id: str
    session: str
    date: str


_JSON = msgspec.json.Decoder(_Json)
_HEADER = msgspec.json.Decoder(Header)
_encode = msgspec.json.Encoder().encode
_RAW = msgspec.json.Decoder(msgspec.Raw)


def read_header(header: bytes) -> Header:
    """What matters of a header. Raises KernelMessageError."""
    try:
        return _HEADER.decode(header)
    except (ValueError, RecursionError) as error:
        raise KernelMessageError(f"the header is none: {error}") from None


def read_json(text: bytes, channel: str, buffers: Sequence[Buffer] = ()) -> KernelMessage:
    """A message from its JSON text, on the channel it names or else on `channel`. Raises KernelMessageError."""
    try:
        text.decode()  # msgspec looks into no string of a Raw
        read = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise KernelMessageError(f"the message is no JSON object of a kernel message: {error}") from None
    channel = read.channel or channel
    if channel not in CHANNELS:
        raise KernelMessageError(f"there is no channel {channel[:40]!r}, only {', '.join(CHANNELS)}")
    return KernelMessage(
        channel, _object(read.header, "header"), _object(read.parent_header, "parent_header"),
        _object(read.metadata, "metadata"), _object(read.content, "content"), tuple(buffers),
    )  # fmt: skip


def _object(raw: msgspec.Raw | bytes, name: str) -> bytes:
    text = bytes(raw)
    if text[:1] != b"{" and text.strip()[:1] != b"{":
        raise KernelMessageError(f"{name} is no JSON object")
    return text


def tell(
    channel: str, msg_type: str, content: dict[str, Any], sign: Sign, parent_header: bytes = b"{}"
) -> KernelMessage:
    """A message of the broker's own to a front end or a kernel."""
    header = {
        "msg_id": sign.msg_id, "msg_type": msg_type, "username": "broker", "session": sign.session, "date": sign.date,
        "version": PROTOCOL_VERSION,
    }  # fmt: skip
    return KernelMessage(channel, msgspec.json.encode(header), parent_header, b"{}", msgspec.json.encode(content))


# --- without a subprotocol -------------------------------------------------------------------------------------------


def read_legacy(frame: str | bytes | bytearray) -> KernelMessage:
    """A message from a text frame, or with its buffers from a binary one. Raises KernelMessageError.

    One that names no channel is meant for the shell, as before there were channels.
    """
    if isinstance(frame, str):
        return read_json(frame.encode("utf-8", "surrogatepass"), "shell")
    try:
        text, buffers = unpack(frame)
    except AttachmentError as error:
        raise KernelMessageError(str(error)) from None
    return read_json(text, "shell", buffers)


def write_legacy(message: KernelMessage) -> tuple[Pieces, bool]:
    """The pieces of a frame, and whether it is a binary one: text where there are no buffers, for JupyterLab refuses
    binary frames without any. The header's id and type stand beside it too, where jupyter-kernel-client looks for them.
    """
    header = read_header(message.header)
    text = b'%b,"msg_id":%b,"msg_type":%b,"channel":"%b","buffers":[]}' % (
        message.json()[:-1], _encode(header.msg_id), _encode(header.msg_type), message.channel.encode(),
    )  # fmt: skip
    return (pack([text], message.buffers), True) if message.buffers else ([text], False)


# --- v1.kernel.websocket.jupyter.org ---------------------------------------------------------------------------------


def read_v1(frame: bytes | bytearray) -> KernelMessage:
    """A message from a frame of `V1`; its buffers stay views of the frame.

    Raises KernelMessageError for a count or an offset that does not fit the frame, before anything is made of it.
    """
    offsets = _offsets(frame)
    view = memoryview(frame)
    channel = bytes(view[offsets[0] : offsets[1]])
    name = channel.decode("ascii", "replace")
    if name not in CHANNELS:
        raise KernelMessageError(f"there is no channel {name[:40]!r}, only {', '.join(CHANNELS)}")
    parts = [view[a:b] for a, b in pairwise(offsets[1:])]
    return KernelMessage(
        name, _checked(parts[0], "header"), _checked(parts[1], "parent_header"), _checked(parts[2], "metadata"),
        _checked(parts[3], "content"), tuple(parts[_TEXTS:]),
    )  # fmt: skip


def _offsets(frame: bytes | bytearray) -> tuple[int, ...]:
    if len(frame) < 8:
        raise KernelMessageError(f"a frame of {len(frame)} bytes is too short for its count of offsets")
    count = int.from_bytes(frame[:8], "little")
    if not _LEAST <= count <= _LEAST + ATTACHMENTS_MAX:
        raise KernelMessageError(f"{count} offsets are not between {_LEAST} and {_LEAST + ATTACHMENTS_MAX}")
    first = 8 * (count + 1)
    if first > len(frame):
        raise KernelMessageError(f"the table of {count} offsets is longer than the frame of {len(frame)} bytes")
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    if offsets[0] != first:
        raise KernelMessageError(f"offset 0 is {offsets[0]}; right behind the table would be {first}")
    if offsets[-1] != len(frame):
        raise KernelMessageError(f"the last offset is {offsets[-1]}; the frame has {len(frame)} bytes")
    for index, (start, end) in enumerate(pairwise(offsets)):
        if start > end:
            raise KernelMessageError(f"part {index} begins at {start} and ends before it, at {end}")
    return offsets


def _checked(part: memoryview, name: str) -> bytes:
    text = bytes(part)
    try:
        text.decode()
        _RAW.decode(text)
    except (ValueError, RecursionError) as error:
        raise KernelMessageError(f"{name} is no JSON: {error}") from None
    return _object(text, name)


def write_v1(message: KernelMessage) -> Pieces:
    """The pieces of a frame of `V1`."""
    parts: Pieces = [
        message.channel.encode(), message.header, message.parent_header, message.metadata, message.content,
        *message.buffers,
    ]  # fmt: skip
    count = len(parts) + 1
    offsets = [8 * (count + 1)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return [struct.pack(f"<{count + 1}Q", count, *offsets), *parts]
