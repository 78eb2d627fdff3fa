"""Streams in the plain HTTP dialect: parts of a reply as lines, events or bare bytes; bodies of requests as parts."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec

from broker.core.errors import BAD_REPLY, INVALID_PARAMS, OK, TOO_LARGE, Kind
from broker.core.messages import Body, End
from broker.wire.attachments import AttachmentError, collect, expand, mentions_base64, pack
from broker.wire.calls import EVENTS, NDJSON, OCTETS, Accepts, BadCall, read_json
from broker.wire.jsonrpc import error_object
from broker.wire.pieces import PIECE_MAX_BYTES, Joiner, Mark, PiecesError

UNKNOWN_MARK = b'{"$joined":{"bytes":0,"crc32":0}}'
"""stands for params that come in pieces; the true mark follows them"""
_EMPTY = (b"", b"null")
_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")

Written: TypeAlias = Sequence[bytes | memoryview]

_decode_mark = msgspec.json.Decoder(Mark).decode


class Unfit(ValueError):
    """What cannot be told in the form the caller takes. `kind` None: another form would do (406)."""

    def __init__(self, kind: Kind | None, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


# ---------------------------------------------------------------- replies


class Form(ABC):
    """How the parts of one reply are written. All methods raise Unfit."""

    content_type: str

    @property
    def held_bytes(self) -> int:
        """Bytes of a value that is not whole yet."""
        return 0

    @abstractmethod
    def part(self, body: Body, *, more: bool, last: bool) -> Written:
        """What to write for one part; nothing for a piece that is only gathered."""

    def progress(self, body: Body) -> bytes:
        """What to write for a worker's progress; empty if there is no way to tell it."""
        return b""

    @abstractmethod
    def end(self, end: End) -> Written:
        """What to write last."""


class _TextForm(Form):
    """JSON texts on one line each. A value in pieces is put together, up to `size_max` bytes."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._joiner: Joiner | None = None

    @property
    def held_bytes(self) -> int:
        return 0 if self._joiner is None else self._joiner.size

    @abstractmethod
    def frame(self, name: str, text: bytes) -> bytes:
        """One thing told: an item, progress, or the end."""

    def part(self, body: Body, *, more: bool, last: bool) -> Written:
        """An item on one line."""
        if more:
            self._add_piece(body)
            return ()
        if last and self._joiner is None and not body.attachments and bytes(body.raw).strip() in _EMPTY:
            return ()  # it only says that there are no more
        return (self.frame("item", self._text(self._whole(body))),)

    def progress(self, body: Body) -> bytes:
        """What the worker said."""
        return self.frame("progress", self._text(body))

    def end(self, end: End) -> Written:
        """How it ended, with the result or the error."""
        if end.outcome.kind is OK and end.body is not None:
            told = b'"result":%b' % (self._text(self._whole(end.body)) or b"null")
        else:
            told = b'"error":%b' % (error_object(end.outcome) if end.body is None else self._text(end.body))
        return (self.frame("end", b"{%b,%b}" % (_how(end), told)),)

    def _add_piece(self, body: Body) -> None:
        if len(body.attachments) != 1:
            raise Unfit(BAD_REPLY, f"a piece has {len(body.attachments)} attachments, not one")
        if self._joiner is None:
            self._joiner = Joiner()
        if self._joiner.size + len(body.attachments[0]) > self._size_max:
            raise Unfit(TOO_LARGE, f"an item or result in JSON is larger than {self._size_max} bytes")
        self._joiner.add(body.attachments[0])

    def _whole(self, body: Body) -> Body:
        joiner, self._joiner = self._joiner, None
        if joiner is None:
            return body
        try:
            text, attachments = joiner.finish(body.raw)
            return Body(read_json(text, "the worker's value"), attachments)
        except (PiecesError, BadCall) as error:
            raise Unfit(BAD_REPLY, str(error)) from None

    def _text(self, body: Body) -> bytes:
        """The JSON text on one line: in JSON, line ends stand only between values."""
        if body.attachments and body.expanded_size() > self._size_max:
            raise Unfit(TOO_LARGE, f"an item or result as base64 is larger than {self._size_max} bytes")
        return expand(bytes(body.raw), body.attachments).translate(_LINE_ENDS)


class Lines(_TextForm):
    """Newline-delimited JSON: `{"item": …}`, `{"progress": …}`, and in the end `{"end": {…}}`."""

    content_type = NDJSON

    def frame(self, name: str, text: bytes) -> bytes:
        """One line."""
        return b'{"%b":%b}\n' % (name.encode(), text)


class Events(_TextForm):
    """Server-sent events (HTML standard, section 9.2.6) of these types: `item`, `progress`, and in the end `end`."""

    content_type = EVENTS

    def frame(self, name: str, text: bytes) -> bytes:
        """One event."""
        return b"event: %b\ndata: %b\n\n" % (name.encode(), text)


class Octets(Form):
    """The attachments of the items, and of the result, one after the other, and nothing else.

    An end that is not `ok` cannot be told so: the connection is to be cut.
    """

    content_type = OCTETS

    def __init__(self) -> None:
        self._value: _Unpacked | None = None

    def part(self, body: Body, *, more: bool, last: bool) -> Written:
        """Its attachments, or what a piece holds of them."""
        if more:
            if len(body.attachments) != 1:
                raise Unfit(BAD_REPLY, f"a piece has {len(body.attachments)} attachments, not one")
            if self._value is None:
                self._value = _Unpacked()
            return (self._value.add(memoryview(body.attachments[0])),)
        if self._value is not None:
            self._close(body)
            return ()
        if not body.attachments and not (last and bytes(body.raw).strip() in _EMPTY):
            raise Unfit(None, "an item has no attachments; send Accept: application/x-ndjson")
        return body.attachments

    def end(self, end: End) -> Written:
        """The attachments of the result."""
        if end.outcome.kind is not OK or end.body is None:
            raise Unfit(end.outcome.kind, end.outcome.detail)
        if self._value is not None:
            self._close(end.body)
            return ()
        return end.body.attachments

    def _close(self, mark: Body) -> None:
        value, self._value = self._value, None
        assert value is not None
        value.check(mark)


class _Unpacked:
    """Takes the attachments out of a value in pieces as they come: what stands behind its text (see `attachments`)."""

    def __init__(self) -> None:
        self._head = b""
        self._start: int | None = None
        self._size = self._crc = 0

    def add(self, piece: memoryview) -> bytes | memoryview:
        """The bytes of attachments that this piece holds."""
        before = self._size
        self._size += len(piece)
        self._crc = zlib.crc32(piece, self._crc)
        if self._start is None:
            self._head += bytes(piece[: 12 - len(self._head)])
            if len(self._head) < 12:
                return b""
            count, self._start = int.from_bytes(self._head[:4]), int.from_bytes(self._head[8:])
            if count < 2:
                raise Unfit(None, "a value has no attachments; send Accept: application/x-ndjson")
            if self._start < 4 * (count + 1):
                raise Unfit(BAD_REPLY, "the layout of a value in pieces is wrong")
        return piece[max(0, self._start - before) :]

    def check(self, mark: Body) -> None:
        """Whether all of it has come, and as it was."""
        try:
            told = _decode_mark(mark.raw).joined
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unfit(BAD_REPLY, f"a value in pieces is not closed with $joined: {error}") from None
        if (told.bytes, told.crc32) != (self._size, self._crc):
            raise Unfit(BAD_REPLY, f"a value of {told.bytes} bytes came as {self._size}, or damaged")
        if self._start is None or self._size < self._start:
            raise Unfit(BAD_REPLY, "a value in pieces is shorter than its layout says")


def form_for(accepts: Accepts, size_max: int) -> Form | None:
    """How parts go to this caller; None for one who takes one answer only."""
    if accepts.stream == NDJSON:
        return Lines(size_max)
    if accepts.stream == EVENTS:
        return Events(size_max)
    return Octets() if accepts.octets and not accepts.json else None


def _how(end: End) -> bytes:
    """How it ended: what headers say of an answer that is not a stream."""
    outcome = end.outcome
    elapsed_ms = outcome.elapsed_ms if end.meta is None else end.meta.elapsed_ms
    return b'"outcome":"%b","retryable":%b,"elapsed_ms":%.3f%b' % (
        outcome.kind.name.encode(),
        b"true" if outcome.retryable else b"false",
        elapsed_ms,
        b',"repeated":true' if end.meta is not None and end.meta.repeated else b"",
    )


# ---------------------------------------------------------------- requests


class BodyLines:
    """Cuts a body of newline-delimited JSON into its lines as it comes. Blank ones are passed over."""

    __slots__ = ("_count", "_rest", "_size_max", "_sought")

    def __init__(self, size_max: int) -> None:
        self._rest = bytearray()
        self._sought = 0
        self._size_max = size_max
        self._count = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the line that has begun."""
        return len(self._rest)

    def add(self, chunk: bytes) -> Iterator[Body]:
        """The lines that are whole with this chunk. Raises BadCall for one that is no JSON, or too long."""
        self._rest += chunk
        while (end := self._rest.find(b"\n", self._sought)) >= 0:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            self._sought = 0
            yield from self._read(line)
        self._sought = len(self._rest)
        if self._sought > self._size_max:
            raise BadCall(TOO_LARGE, f"line {self._count + 1} is longer than {self._size_max} bytes")

    def close(self) -> Iterator[Body]:
        """The last line, if no line end was behind it."""
        line, self._rest = bytes(self._rest), bytearray()
        yield from self._read(line)

    def _read(self, line: bytes) -> Iterator[Body]:
        self._count += 1
        if not line.strip():
            return
        raw = read_json(line, f"line {self._count}")
        if not mentions_base64(raw):
            yield Body(raw)
            return
        try:
            yield Body(*collect(raw, ()))
        except AttachmentError as error:
            raise BadCall(INVALID_PARAMS, f"line {self._count}: {error}") from None


class BodyPieces:
    """Cuts a body of any length into the pieces of a value whose JSON text is known, and whose attachment 0 it is."""

    __slots__ = ("_crc", "_gathered", "_size")

    def __init__(self, text: bytes) -> None:
        self._gathered = bytearray(b"".join(pack([text], [b""])))
        self._size = self._crc = 0

    def add(self, chunk: bytes) -> Iterator[bytes]:
        """The pieces that are whole with this chunk."""
        self._gathered += chunk
        while len(self._gathered) >= PIECE_MAX_BYTES:
            piece = bytes(self._gathered[:PIECE_MAX_BYTES])
            del self._gathered[:PIECE_MAX_BYTES]
            yield self._count(piece)

    def close(self) -> Iterator[bytes]:
        """The last piece; then `mark` stands for the value."""
        if self._gathered:
            yield self._count(bytes(self._gathered))
            self._gathered.clear()

    def _count(self, piece: bytes) -> bytes:
        self._size += len(piece)
        self._crc = zlib.crc32(piece, self._crc)
        return piece

    @property
    def mark(self) -> bytes:
        """What stands for the value once all pieces have been taken."""
        return b'{"$joined":{"bytes":%d,"crc32":%d}}' % (self._size, self._crc)
