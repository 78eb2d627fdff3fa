"""rt-cloud's dialect: calls out to its daemons, and what they answer, checked and cut into what the core takes.

A daemon answers in text JSON whose `data` is base64; a large result comes in parts of up to 10 MiB, each perhaps
compressed, each with an MD5. The dialect knows neither credit nor cancelling: `Result` holds what came too early.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

import msgspec

from broker.core.events import Answered, BadReply, ErrorReply, PartSent, Stray
from broker.core.ids import AttemptId
from broker.core.messages import REFERENCE, Body, Call, Credit, Notify
from broker.core.sessions import Session
from broker.core.streams import FIRST_CREDIT
from broker.wire.attachments import pack

WINDOW_PARTS = 16
"""how far a part may be ahead of the one that is due"""
ERROR_MAX = 1000
"""characters of a daemon's error that are passed on"""
STATUS_MAX = 999
GIVEN_UP_MAX = 1000
"""calls remembered whose answer may still come"""
CALL_ID_BITS = 53
"""bits of a call's id: what every JSON parser keeps exact"""
INVALID_PARAMS, FAILED = -32602, -32000
_HEAD_MAX = 64
_INPUT_SLICE = 1 << 16
_WHOLE_BYTES = b'{"$buffer":0}'
_WHOLE_PICKLE = b'{"$pickle":{"$buffer":0}}'
_CALL_ID = re.compile(rb'"callId"\s*:\s*(\d{1,16})\b')
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")

# What Python's pickle writes for these three (protocols 0 to 5, `pickletools.dis`). Nothing else is ever looked into.
PICKLED: dict[bytes, bytes] = {b"N.": b"null", b"I01\n.": b"true", b"I00\n.": b"false"}
for _protocol in range(2, 6):
    PICKLED[b"\x80%cN." % _protocol] = b"null"
    PICKLED[b"\x80%c\x88." % _protocol] = b"true"
    PICKLED[b"\x80%c\x89." % _protocol] = b"false"


class Unfit(ValueError):
    """A call that cannot be told to an rt-cloud daemon; the text says why."""


class PartError(ValueError):
    """A part that is not what it says it is, or must not come now."""


class NoReply(ValueError):
    """A message that is no answer at all. `strike`: it is not even JSON."""

    def __init__(self, detail: str, *, strike: bool) -> None:
        super().__init__(detail)
        self.strike = strike


class Bounds(msgspec.Struct, frozen=True):
    """Sizes in bytes: of one message, which a part and a result in one piece must not exceed either; of one piece."""

    message_max_bytes: int = 16 << 20
    piece_max_bytes: int = 256 * 1024 - 64


class Reply(msgspec.Struct, gc=False, rename="camel"):
    """What a daemon sends: all of an answer, or one part. Only `status` must be there, and `data` with a good one."""

    status: int
    call_id: int | None = None
    data_serialization: str | None = None
    data: bytes | None = None
    data_size: int | None = None
    hash: str | None = None
    compressed: bool | None = None
    file_size: int | None = None
    file_hash: str | None = None
    num_parts: int | None = None
    part_id: int | None = None
    multipart: bool | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode_reply = msgspec.json.Decoder(Reply).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode

Decoded: TypeAlias = "Answered | BadReply | Stray | Result | None"


# ---------------------------------------------------------------- calls


def encode_request(method: str, body: Body, call_id: int) -> list[bytes | memoryview]:
    """The text of a request, in pieces. Raises Unfit."""
    class_name, _, attribute = method.partition(".")
    if not class_name or not attribute:
        raise Unfit(f"{method}: a method of an rt-cloud daemon is Class.attribute, such as DataInterface.getFile")
    args, kwargs = _arguments(body)
    encoded: list[tuple[int, bytes]] = []
    for at, raw in enumerate(args):
        data = _attachment(raw, body)
        if data is not None:
            encoded.append((at, data))
            args[at] = b'"encodedBytes_%d"' % at
    names: list[str] = []
    for name, raw in kwargs.items():
        data = _attachment(raw, body)
        if data is not None:
            names.append(name)
            kwargs[name] = data
    pieces: list[bytes | memoryview] = [
        b'{"cmd":"rpc","class":%b,"attribute":%b,"args":[' % (_encode(class_name), _encode(attribute)),
        b",".join(args),
        b'],"kwargs":{',
        b",".join(b"%b:%b" % (_encode(name), raw) for name, raw in kwargs.items()),
        b'},"callId":%d' % call_id,
    ]
    for at, data in encoded:
        pieces += (b',"encodedBytes_%d":' % at, data)
    if encoded:
        pieces.append(b',"encodedByteArgs":%b' % _encode([at for at, _ in encoded]))
    if names:
        pieces.append(b',"encodedByteKwargs":%b' % _encode(names))
    pieces.append(b"}")
    return pieces


def _arguments(body: Body) -> tuple[list[bytes], dict[str, bytes]]:
    """What stands in the params: a list is args, `{"args", "kwargs"}` says both, any other object is kwargs."""
    raw = bytes(body.raw).strip()
    if body.attachments and REFERENCE.fullmatch(raw):
        raise Unfit("rt-cloud takes bytes as an argument, not in place of all of them")
    positional: bytes = raw
    named: bytes = b""
    if raw[:1] == b"{":
        positional, named = b"", raw
    empty = (b"", b"null")
    try:
        members = _decode_object(raw) if named else {}
        if members and members.keys() <= {"args", "kwargs"}:
            positional, named = bytes(members.get("args", b"")), bytes(members.get("kwargs", b""))
        args = [] if positional in empty else [bytes(each) for each in _decode_list(positional)]
        kwargs = {} if named in empty else {name: bytes(each) for name, each in _decode_object(named).items()}
    except msgspec.ValidationError:
        raise Unfit('the params are neither a list, nor {"args": […], "kwargs": {…}}, nor an object') from None
    except RecursionError:  # whoever took them in had more of the stack left
        raise Unfit("the params are nested too deeply") from None
    return args, kwargs


def _attachment(raw: bytes, body: Body) -> bytes | None:
    """The base64 text, with quotes, of the attachment an argument consists of; None for one that is plain JSON."""
    if not body.attachments or b'"$buffer"' not in raw:
        return None
    found = REFERENCE.fullmatch(raw.strip())
    if found is None:
        if REFERENCE.search(raw):
            raise Unfit("rt-cloud takes bytes only as a whole argument, not within one")
        return None
    index = int(found[1])
    if index >= len(body.attachments):
        raise Unfit(f"there is no attachment {index}")
    return b'"%b"' % binascii.b2a_base64(body.attachments[index], newline=False)


# ---------------------------------------------------------------- answers


class CallIds:
    """The ids of all calls that daemons of one broker have in hand. `draw` gives unforeseeable numbers above 0."""

    __slots__ = ("_draw", "_open")

    def __init__(self, draw: Callable[[], int]) -> None:
        self._draw = draw
        self._open: set[int] = set()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, call_id: int) -> bool:
        return call_id in self._open

    def open(self) -> int:
        """An id no other call has."""
        while (call_id := self._draw()) in self._open:
            pass
        self._open.add(call_id)
        return call_id

    def close(self, call_id: int) -> None:
        """Its call has ended."""
        self._open.discard(call_id)


class RtCloud:
    """The codec of one daemon's link. `session` must be set before anything is decoded.

    `results` are those of which some has come, and not all has been passed on.
    """

    __slots__ = ("_attempts", "_bounds", "_call_ids", "_given_up", "_granted", "_ids", "results", "session")

    def __init__(self, ids: CallIds, bounds: Bounds) -> None:
        self.session: Session
        self._ids = ids
        self._bounds = bounds
        self._attempts: dict[int, AttemptId] = {}
        self._call_ids: dict[AttemptId, int] = {}
        self._given_up: dict[int, None] = {}
        self._granted: dict[AttemptId, int] = {}
        self.results: dict[AttemptId, Result] = {}

    @property
    def open_count(self) -> int:
        """Calls without a complete answer."""
        return len(self._attempts)

    @property
    def held_bytes(self) -> int:
        """What is kept of results that have not been passed on."""
        return sum(result.held_bytes for result in self.results.values())

    def encode(self, call: Call) -> list[bytes | memoryview]:
        """The request for a call. Raises Unfit."""
        if call.attempt.request.options.stream_out:
            raise Unfit("an rt-cloud daemon takes no parts from its caller")
        call_id = self._ids.open()
        try:
            pieces = encode_request(call.method, call.body, call_id)
        except Unfit:
            self._ids.close(call_id)
            raise
        self._attempts[call_id] = call.attempt.id
        self._call_ids[call.attempt.id] = call_id
        return pieces

    def encode_notify(self, notify: Notify) -> list[bytes | memoryview]:
        """The request for a call nobody waits for; its answer is one that comes too late. Raises Unfit."""
        call_id = self._ids.open()
        self._ids.close(call_id)
        pieces = encode_request(notify.method, notify.body, call_id)
        self._expect_no_more(call_id)
        return pieces

    def decode(self, text: bytes) -> Decoded:
        """One message: an event, or the result that goes on with it; None for a part that came before.

        Raises NoReply.
        """
        try:
            reply = _decode_reply(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return self._unreadable(text, error)
        found = self._attempt_of(reply.call_id)
        if not isinstance(found, int):
            return found
        if reply.status != 200:
            return self._failed(found, reply)
        try:
            result = self.results.get(found)
            if result is None:
                result = Result(self.session, found, reply, self._bounds)
                result.upto = self._granted.get(found, FIRST_CREDIT)
            news = result.add(reply)
        except PartError as error:
            return self.broken(found, str(error))
        self.results[found] = result
        return result if news else None

    def grant(self, credit: Credit) -> None:
        """The caller takes pieces below this; before the first word of it, `FIRST_CREDIT` of them."""
        if credit.attempt_id in self._call_ids:
            self._granted[credit.attempt_id] = credit.upto
            if credit.attempt_id in self.results:
                self.results[credit.attempt_id].upto = credit.upto

    def _unreadable(self, text: bytes, error: Exception) -> BadReply | Stray:
        """What cannot be read may still say which call it means to answer."""
        named = _CALL_ID.search(text)
        if named is None:
            strike = not isinstance(error, msgspec.ValidationError)
            raise NoReply(f"no answer in rt-cloud's dialect: {error}", strike=strike) from None
        found = self._attempt_of(int(named[1]))
        return self.broken(found, f"the answer cannot be read: {error}") if isinstance(found, int) else found

    def _attempt_of(self, call_id: int | None) -> AttemptId | Stray:
        if call_id is None:
            return self._nameless()
        attempt = self._attempts.get(call_id)
        if attempt is not None:
            return attempt
        self._given_up.pop(call_id, None)
        return Stray(self.session, foreign=call_id in self._ids)

    def _nameless(self) -> AttemptId | Stray:
        """Pages may leave the id out. Then it is the one call that is open, if no other can be meant."""
        if len(self._attempts) == 1 and not self._given_up:
            return next(iter(self._attempts.values()))
        if not self._attempts and self._given_up:
            del self._given_up[next(iter(self._given_up))]  # some one of them has been answered now
        return Stray(self.session, nameless=True)

    def _failed(self, attempt: AttemptId, reply: Reply) -> Answered | BadReply:
        if not 400 <= reply.status <= STATUS_MAX:
            return self.broken(attempt, f"status {reply.status} is neither 200 nor an error")
        self.forget(attempt)
        text = clean(_text_of(reply.error)) or f"status {reply.status}"
        return error_reply(self.session, attempt, FAILED, text, reply.status)

    def broken(self, attempt: AttemptId, detail: str) -> BadReply:
        """An answer that broke the dialect: its call is over."""
        self.forget(attempt)
        return BadReply(self.session, attempt, detail)

    def give_up(self, attempt: AttemptId) -> None:
        """Nobody waits for this call any more; the daemon is not told, as its dialect has no words for that."""
        call_id = self.forget(attempt)
        if call_id is not None:
            self._expect_no_more(call_id)

    def _expect_no_more(self, call_id: int) -> None:
        """Its answer may still come, and is nobody's."""
        self._given_up[call_id] = None
        if len(self._given_up) > GIVEN_UP_MAX:
            del self._given_up[next(iter(self._given_up))]

    def forget(self, attempt: AttemptId) -> int | None:
        """A call has ended; its id, None if there is no such call."""
        self.results.pop(attempt, None)
        self._granted.pop(attempt, None)
        call_id = self._call_ids.pop(attempt, None)
        if call_id is not None:
            del self._attempts[call_id]
            self._ids.close(call_id)
        return call_id

    def close(self) -> None:
        """The daemon has gone: all its calls are over."""
        for attempt in list(self._call_ids):
            self.forget(attempt)


def _text_of(raw: msgspec.Raw) -> str:
    """A text, or of anything else its JSON."""
    try:
        text = bytes(raw)
        return str(msgspec.json.decode(text, type=str)) if text.startswith(b'"') else text.decode()
    except ValueError:
        return ""


def clean(text: str) -> str:
    """A daemon's error as one line of printable text, cut."""
    start = text[: 4 * ERROR_MAX]  # no more is looked at: 14 MB of control characters take 0.3 s
    line = _UNPRINTABLE.sub(" ", start).strip()
    return line[:ERROR_MAX] + "…" if len(line) > ERROR_MAX or len(text) > len(start) else line


def error_reply(session: Session, attempt: AttemptId, code: int, message: str, status: int | None = None) -> Answered:
    """The end of an attempt as its worker's error."""
    error: dict[str, object] = {"code": code, "message": message}
    if status is not None:
        error["data"] = {"dialect": "rtcloud", "status": status}
    return Answered(session, attempt, Body(_encode(error)), ErrorReply(code))


class Result:
    """One result on its way through: parts in, events out, a slice of work at a time.

    A result in one part is checked whole and becomes one `Answered`. One in several parts goes on in pieces of
    at most 256 KiB (see `pieces`) as far as its caller takes them, so that memory stays flat: its caller learns from
    the last word, `$joined` or an error, whether all of it was right. JSON in several parts is put together as long as
    it is no larger than one message, so that it can be checked before anybody is given it.
    """

    __slots__ = (
        "_bounds", "_chunk", "_crc", "_due", "_ended", "_first", "_gathered", "_head", "_missing", "_only", "_parts",
        "_run", "_seq", "_session", "_size", "_waiting", "attempt", "held_bytes", "upto",
    )  # fmt: skip

    def __init__(self, session: Session, attempt: AttemptId, first: Reply, bounds: Bounds) -> None:
        self._session = session
        self.attempt = attempt
        self._bounds = bounds
        self._first = first
        self._parts = 1 if first.num_parts is None else first.num_parts
        self._check_first(first)
        kind, size = first.data_serialization, first.file_size
        small = size is None or size <= bounds.message_max_bytes
        self._gathered = bytearray() if self._parts == 1 or (kind == "json" and small) else None
        self._only: bytes | None = None  # a result in one part that needs no putting together
        self._head = bytes((0, 0, 0, 1, 0, 0, 0, 8))  # the layout of a value in pieces: no attachments, or one
        if kind != "json":
            self._head = b"".join(pack([_WHOLE_BYTES if kind == "bytes" else _WHOLE_PICKLE], [b""]))
        self._waiting: dict[int, Reply] = {}
        self._due = self._missing = 1
        self._chunk: bytes | memoryview | None = None
        self._seq = self._size = self._crc = 0
        self._run = self._chunks()
        self._ended = False
        self.held_bytes = 0
        """bytes of parts that wait, and of what is put together"""
        self.upto = 0
        """pieces below this may be sent on"""

    # ------------------------------------------------------------ in

    def _check_first(self, first: Reply) -> None:
        if first.data_serialization not in ("json", "bytes", "pickle"):
            raise PartError(f"dataSerialization {str(first.data_serialization)[:40]!r} is none of json, bytes, pickle")
        if self._parts < 1:
            raise PartError(f"numParts is {self._parts}")
        if first.multipart and first.num_parts is None:
            raise PartError("it is multipart, and numParts is missing")
        if first.file_size is not None and first.file_size < 0:
            raise PartError(f"fileSize is {first.file_size}")

    def add(self, reply: Reply) -> bool:
        """One more part; False for one that has come before. Raises PartError."""
        first = self._first
        number = 1 if reply.part_id is None and self._parts == 1 else reply.part_id
        if number is None:
            raise PartError("partId is missing")
        if not 1 <= number <= self._parts:
            raise PartError(f"part {number} of {self._parts}")
        told = (reply.data_serialization, reply.num_parts, reply.file_size, reply.file_hash)
        if told != (first.data_serialization, first.num_parts, first.file_size, first.file_hash):
            raise PartError(f"part {number} says of the whole what an earlier one did not")
        if number < self._due or number in self._waiting:
            return False
        if number > self._missing + WINDOW_PARTS:
            missing = f"while part {self._missing} had not come"
            raise PartError(f"part {number} came {missing}, more than {WINDOW_PARTS} too early")
        self._check_size(reply, number)
        self._waiting[number] = reply
        while self._missing in self._waiting:
            self._missing += 1
        self.held_bytes += len(reply.data or b"")
        return True

    def _check_size(self, reply: Reply, number: int) -> None:
        if reply.data is None:
            raise PartError(f"part {number} has no data")
        size, size_max = reply.data_size, self._bounds.message_max_bytes
        if size is not None and not 0 <= size <= size_max:
            raise PartError(f"part {number} has {size} bytes by its dataSize, and the bound is {size_max}")
        if not reply.compressed and size is not None and len(reply.data) != size:
            raise PartError(f"part {number} has {len(reply.data)} bytes, and {size} by its dataSize")

    # ------------------------------------------------------------ out

    @property
    def is_ready(self) -> bool:
        """Whether a `step` would get on."""
        if self._chunk is not None:
            return self._seq < self.upto
        return not self._ended and (self._due > self._parts or self._due in self._waiting)

    @property
    def waits_for_caller(self) -> bool:
        """Whether it stands still because its caller takes no more for now."""
        return self._chunk is not None and self._seq >= self.upto

    def step(self) -> PartSent | Answered | BadReply | None:
        """A slice of the work: some 256 KiB. Anything but None and PartSent is the end of it."""
        try:
            if self._chunk is None:
                self._chunk = self._next()
        except StopIteration:
            self._ended = True
            return self._end()
        except PartError as error:
            self._ended = True
            return BadReply(self._session, self.attempt, str(error))
        if self._chunk is None or self._seq >= self.upto:
            return None
        chunk, self._chunk = self._chunk, None
        return self._piece(chunk)

    def _next(self) -> bytes | memoryview | None:
        chunk = next(self._run)
        if chunk is None or self._gathered is None:
            return chunk
        if self._only is None:
            if len(self._gathered) + len(chunk) > self._bounds.message_max_bytes:
                raise PartError(f"it is larger than the {self._bounds.message_max_bytes} bytes of a message")
            self._gathered += chunk
            self.held_bytes += len(chunk)
        return None

    def _piece(self, chunk: bytes | memoryview) -> PartSent:
        piece = bytes(chunk) if self._seq else self._head + chunk
        seq, self._seq = self._seq, self._seq + 1
        self._size += len(piece)
        self._crc = zlib.crc32(piece, self._crc)
        return PartSent(self._session, None, self.attempt, seq, Body(_WHOLE_BYTES, (piece,)), more=True)

    def _end(self) -> Answered | BadReply:
        if self._gathered is None and self._seq:
            mark = b'{"$joined":{"bytes":%d,"crc32":%d}}' % (self._size, self._crc)
            return Answered(self._session, self.attempt, Body(mark))
        data = bytes(self._gathered or b"") if self._only is None else self._only
        kind = self._first.data_serialization
        if kind == "json":
            return self._json(data)
        if kind == "pickle":
            constant = PICKLED.get(data)
            body = Body(_WHOLE_PICKLE, (data,)) if constant is None else Body(constant)
            return Answered(self._session, self.attempt, body)
        return Answered(self._session, self.attempt, Body(_WHOLE_BYTES, (data,)))

    def _json(self, data: bytes) -> Answered | BadReply:
        try:
            if not data.isascii():
                data.decode()
            msgspec.json.decode(data, type=msgspec.Raw)
        except (ValueError, RecursionError) as error:
            return BadReply(self._session, self.attempt, f"the result is no JSON (as NaN is none): {error}")
        return Answered(self._session, self.attempt, Body(data))

    # ------------------------------------------------------------ the work

    def _chunks(self) -> Iterator[bytes | memoryview | None]:
        """The data of all parts in order and checked; None while the part that is due is not here. Raises PartError."""
        first, alone = self._first, self._parts == 1
        whole, total = _md5(), 0
        while self._due <= self._parts:
            number = self._due
            while number not in self._waiting:
                yield None
            reply = self._waiting[number]
            if alone and not reply.compressed:
                self._only = reply.data
            part, size = _md5(), 0
            for chunk in self._data(reply, number):
                part.update(chunk)
                if not alone:
                    whole.update(chunk)
                size += len(chunk)
                yield chunk
            if reply.data_size is not None and size != reply.data_size:
                raise PartError(f"part {number} has {size} bytes, and {reply.data_size} by its dataSize")
            _check_hash(reply.hash, part.hexdigest(), f"part {number}")
            total += size
            if alone:
                whole = part
            else:
                self.held_bytes -= len(reply.data or b"")
            del self._waiting[number]
            self._due += 1
        if first.file_size is not None and total != first.file_size:
            raise PartError(f"the parts have {total} bytes, and {first.file_size} by the fileSize")
        _check_hash(first.file_hash, whole.hexdigest(), "the whole")

    def _data(self, reply: Reply, number: int) -> Iterator[bytes | memoryview]:
        """The bytes of one part, in chunks of at most one piece."""
        data, step = memoryview(reply.data or b""), self._bounds.piece_max_bytes - _HEAD_MAX
        if not reply.compressed:
            for at in range(0, len(data), step):
                yield data[at : at + step]
            return
        size_max = self._bounds.message_max_bytes if reply.data_size is None else reply.data_size
        try:
            yield from _inflate(data, size_max, step)
        except (zlib.error, PartError) as error:
            raise PartError(f"part {number}: {error}") from None


def _inflate(data: memoryview, size_max: int, step: int) -> Iterator[bytes]:
    """What zlib has packed, never more than a byte above `size_max`, in chunks. Raises zlib.error, PartError."""
    inflater, made, at = zlib.decompressobj(), 0, 0
    tail: bytes | memoryview = b""
    while not inflater.eof:
        if not tail:
            tail = data[at : at + _INPUT_SLICE]
            at += len(tail)
        given = len(tail)
        chunk = inflater.decompress(tail, min(step, size_max - made + 1))
        tail = inflater.unconsumed_tail
        made += len(chunk)
        if made > size_max:
            raise PartError(f"it unpacks to more than {size_max} bytes")
        if chunk:
            yield chunk
        elif not given and not inflater.eof:
            raise PartError("its compressed data ends too early")
    if inflater.unused_data or at < len(data):
        raise PartError("something follows its compressed data")


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def _check_hash(told: str | None, found: str, what: str) -> None:
    if told is not None and told.lower() != found:
        raise PartError(f"the MD5 of {what} is {found}, not {told[:64]!r}")
