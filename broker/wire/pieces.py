"""Values larger than a message, cut into pieces: how they travel as parts of a stream, and how they are made whole.

A value that is too large for one message is laid out as a binary frame would be (JSON text and attachments, see
`attachments`), and the bytes of that layout are cut. Each piece is attachment 0 of a part marked `more`, whose data is
`{"$buffer": 0}`; where the value itself would stand (in a part, in the result, in the params) stands
`{"$joined": {"bytes": N, "crc32": C}}`, by which the receiver checks that it has all of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import msgspec

from broker.core.messages import REFERENCE, Body
from broker.wire.attachments import ATTACHMENTS_MAX, AttachmentError, pack, unpack

PIECE_MAX_BYTES = 256 * 1024 - 64
"""one piece; with its JSON text a part of at most 256 KiB"""
PIECE_DATA = b'{"$buffer":0}'
"""the data of a part that is a piece"""

Buffers = Sequence[bytes | memoryview]


class PiecesError(ValueError):
    """Pieces that do not make the value they should; the text says what is wrong."""


class Told(msgspec.Struct):
    """What is said of a value that came in pieces."""

    bytes: int
    crc32: int


class Mark(msgspec.Struct, forbid_unknown_fields=True):
    """What stands where the value would stand."""

    joined: Told = msgspec.field(name="$joined")


_decode_mark = msgspec.json.Decoder(Mark).decode


class Cutter:
    """Cuts one value. Iterate over it for the pieces; then `mark` is the JSON text that stands for the value."""

    __slots__ = ("_buffers", "_crc", "_size", "left_bytes")

    def __init__(self, text: bytes, attachments: Buffers) -> None:
        self._buffers = pack([text], attachments) if attachments else [bytes((0, 0, 0, 1, 0, 0, 0, 8)), text]
        self._size = self._crc = 0
        self.left_bytes = sum(map(len, self._buffers))
        """what has not been cut off yet"""

    def __iter__(self) -> Iterator[bytes]:
        gathered: list[memoryview] = []
        room = PIECE_MAX_BYTES
        for buffer in self._buffers:
            view = memoryview(buffer).cast("B")
            while len(view):
                taken, view = view[:room], view[room:]
                gathered.append(taken)
                room -= len(taken)
                if not room:
                    yield self._piece(gathered)
                    gathered, room = [], PIECE_MAX_BYTES
        if gathered:
            yield self._piece(gathered)

    def _piece(self, gathered: list[memoryview]) -> bytes:
        piece = b"".join(gathered)
        self._size += len(piece)
        self.left_bytes -= len(piece)
        self._crc = zlib.crc32(piece, self._crc)
        return piece

    @property
    def mark(self) -> bytes:
        """What stands for the value once all pieces have been taken."""
        return b'{"$joined":{"bytes":%d,"crc32":%d}}' % (self._size, self._crc)


def is_mark(raw: bytes | msgspec.Raw) -> bool:
    """Whether a JSON text stands for a value in pieces."""
    return len(raw) < 100 and bytes(raw).lstrip().startswith(b'{"$joined"')


class Joiner:
    """Makes a value of its pieces as they come, so that the end of a large one is no longer than any other piece."""

    __slots__ = ("_count", "_crc", "_gathered")

    def __init__(self) -> None:
        self._gathered = bytearray()
        self._count = self._crc = 0

    @property
    def size(self) -> int:
        """Bytes so far."""
        return len(self._gathered)

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece."""
        self._gathered += piece
        self._count += 1
        self._crc = zlib.crc32(piece, self._crc)

    def finish(self, mark: bytes | msgspec.Raw) -> tuple[bytes, tuple[memoryview, ...]]:
        """The JSON text and the attachments, which cannot be written to. Raises PiecesError if anything is wrong."""
        try:
            told = _decode_mark(mark).joined
        except (msgspec.DecodeError, RecursionError) as error:
            detail = f"a value came in {self._count} pieces and is not closed with $joined: {error}"
            raise PiecesError(detail) from None
        if self.size != told.bytes:
            raise PiecesError(f"a value of {told.bytes} bytes came as {self.size} bytes in {self._count} pieces")
        if self._crc != told.crc32:
            damage = f"its CRC-32 is {self._crc:#010x}, not {told.crc32:#010x}"
            raise PiecesError(f"a value of {self.size} bytes is damaged: {damage}")
        try:
            text, attachments = unpack(self._gathered)
        except AttachmentError as error:
            raise PiecesError(f"a value in pieces: {error}") from None
        return bytes(text), tuple(attachment.toreadonly() for attachment in attachments)


def join(pieces: Buffers, mark: bytes | msgspec.Raw) -> tuple[bytes, tuple[memoryview, ...]]:
    """The JSON text and the attachments of a value in pieces. Raises PiecesError if any of it is missing or changed."""
    joiner = Joiner()
    for piece in pieces:
        joiner.add(piece)
    return joiner.finish(mark)


def join_reply(parts: Sequence[Body], more: Sequence[bool], result: Body) -> Body:
    """A reply for a caller who takes no parts: the list of them, or the result itself if that alone came in pieces.

    A result other than null counts as one more part. Raises PiecesError.
    """
    values: list[Body] = []
    pieces: list[bytes | memoryview] = []
    for body, goes_on in zip((*parts, result), (*more, False), strict=True):
        if goes_on:
            if len(body.attachments) != 1:
                raise PiecesError(f"a piece has {len(body.attachments)} attachments, not one")
            pieces.append(body.attachments[0])
        elif pieces:
            values.append(Body(*join(pieces, body.raw)))
            pieces = []
        else:
            values.append(body)
    if not any(not goes_on for goes_on in more):
        return values[-1]
    if bytes(values[-1].raw).strip() in (b"", b"null"):
        del values[-1]
    return _as_list(values)


def _as_list(values: Sequence[Body]) -> Body:
    attachments: list[bytes | memoryview] = []
    texts = []
    for value in values:
        first = len(attachments)
        raw = bytes(value.raw)
        if value.attachments and first:
            raw = _renumber(raw, first)
        texts.append(raw)
        attachments += value.attachments
    if len(attachments) > ATTACHMENTS_MAX:
        raise PiecesError(f"the parts together have {len(attachments)} attachments, more than {ATTACHMENTS_MAX}")
    return Body(b"[" + b",".join(texts) + b"]", tuple(attachments))


def _renumber(raw: bytes, first: int) -> bytes:
    """The same text, its references counted from `first`."""
    return REFERENCE.sub(lambda found: b'{"$buffer":%d}' % (int(found[1]) + first), raw)
