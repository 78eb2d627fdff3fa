"""The ZeroMQ dialect: one signed multipart message for each JSON-RPC message, and back. Nothing is drawn here.

A message is four JSON objects (header, parent header, metadata, content) and buffers, as in Jupyter's wire protocol
(messaging 5.4). What stands in JSON-RPC's envelope stands here in the header (`msg_id`, `msg_type`), in the parent
header (which request is answered, or meant) and in the content; attachments are the buffers. `docs/protocol.md` has the
table. Values (params, results, data) are not looked into: they pass as they came.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from broker.wire.jsonrpc import ABSENT, Envelope

Frame: TypeAlias = bytes | memoryview
Pieces: TypeAlias = list[bytes | memoryview]

SHORT_MAX = 1000
"""requests by a short form (`serve_request`, …) whose answers are given their name; beyond, `call_reply`"""
TYPE_MAX = 128
CHECKED_MAX = 65_536
"""bytes of a content beside its values"""


class MultipartError(ValueError):
    """A message that is none of this dialect. `cause` is short, for counters; `msg_id` and `kind` if known."""

    def __init__(self, cause: str, detail: str, msg_id: bytes = b"", kind: str = "") -> None:
        super().__init__(detail)
        self.cause = cause
        self.msg_id = msg_id
        self.kind = kind


class _Header(msgspec.Struct, gc=False):
    msg_id: msgspec.Raw
    msg_type: str


class _Parent(msgspec.Struct, gc=False):
    msg_id: msgspec.Raw = ABSENT


class _CallContent(msgspec.Struct, gc=False):
    method: msgspec.Raw
    endpoint: msgspec.Raw = ABSENT
    params: msgspec.Raw = ABSENT
    meta: msgspec.Raw = ABSENT


class _ReplyContent(msgspec.Struct, gc=False):
    status: str
    result: msgspec.Raw = ABSENT
    meta: msgspec.Raw = ABSENT
    code: int | None = None
    message: str | None = None
    data: msgspec.Raw = ABSENT
    ename: str = ""
    evalue: str = ""
    traceback: msgspec.Raw = ABSENT


class _Meta(msgspec.Struct, gc=False):
    meta: msgspec.Raw = ABSENT


class _Error(msgspec.Struct, gc=False):
    code: int
    message: str
    data: msgspec.Raw = ABSENT


class _ErrorData(msgspec.Struct, gc=False):
    type: str = ""
    outcome: str = ""


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_parent = msgspec.json.Decoder(_Parent).decode
_decode_call = msgspec.json.Decoder(_CallContent).decode
_decode_reply = msgspec.json.Decoder(_ReplyContent).decode
_decode_meta = msgspec.json.Decoder(_Meta).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_error_data = msgspec.json.Decoder(_ErrorData).decode
_decode_envelope = msgspec.json.Decoder(Envelope).decode
_encode = msgspec.json.Encoder().encode

MEANS = {
    "part": b"$/part", "credit": b"$/credit", "progress": b"$/progress", "cancel_request": b"$/cancelRequest",
}  # fmt: skip
"""types about a request, which their parent header names"""
TELLS = {"ack": b"$/ack", "session": b"broker.session", "broadcast": b"broker.message"}
"""types that answer nothing"""
_MEANT = {method.decode(): name.encode() for name, method in MEANS.items()}
_TOLD = {method.decode(): name.encode() for name, method in TELLS.items()}
DOOR = ("attach_request", "attach_reply", "detach")
"""types by which a session begins and ends; the link looks at them before this dialect does"""


class Multipart:
    """The dialect at one end of one link.

    `session` and `username` are what its headers say; `numbers` whether the ids given at this end are numbers, as the
    SDK's are: an id stands in `msg_id`, which is always text. `date` goes into the headers, in ISO 8601; set it now and
    then.
    """

    __slots__ = ("_count", "_head", "_short", "_tail", "numbers")

    def __init__(self, session: str, username: str = "", *, numbers: bool = False, date: str = "") -> None:
        self.numbers = numbers
        self._count = 0
        self._head = b'{"msg_id":"%b_' % session.encode()
        self._tail = b""
        self._short: dict[bytes, bytes] = {}  # ids of requests by a short form: the name of the answer
        self.set_date(session, username, date)

    def set_date(self, session: str, username: str, date: str) -> None:
        """What all headers have in common, from now on."""
        self._tail = b'","username":%b,"session":%b,"date":"%b","version":"5.4"}' % (
            _encode(username), _encode(session), date.encode(),
        )  # fmt: skip

    # ---------------------------------------------------------------- reading

    def read(self, frames: Sequence[Frame]) -> bytes:
        """The JSON-RPC text of the four frames, verified before. Raises MultipartError."""
        try:
            header = _decode_header(frames[0])
            kind, msg_id = header.msg_type, bytes(header.msg_id)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise MultipartError("malformed", f"header: {error}") from None
        if msg_id[:1] != b'"':
            raise MultipartError("malformed", "header: msg_id is no text")
        try:
            if kind == "call_request":
                return self._read_call(self._inward(msg_id), frames[3])
            if kind[-6:] == "_reply":
                return self._read_reply(self._parent(frames[1]), frames[3])
            return self._read_other(kind, msg_id, frames)
        except MultipartError as bad:
            bad.msg_id, bad.kind = msg_id, kind
            raise
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise MultipartError("malformed", f"{kind[:TYPE_MAX]}: {error}", msg_id, kind) from None

    def _inward(self, msg_id: bytes) -> bytes:
        """An id of the other end as it is known at this one."""
        if self.numbers and msg_id[1:-1].isdigit() and len(msg_id) < 20:
            return msg_id[1:-1]
        return msg_id

    def _parent(self, frame: Frame) -> bytes:
        msg_id = bytes(_decode_parent(frame).msg_id)
        return self._inward(msg_id) if msg_id else b"null"

    def _read_call(self, wire_id: bytes | None, content: Frame) -> bytes:
        call = _decode_call(content)
        method = bytes(call.method)
        size = len(content) - len(call.params) - len(call.meta) - len(method) - len(call.endpoint)
        if size not in _PLAIN_CALLS[(call.endpoint is not ABSENT) + 2 * (call.meta is not ABSENT)]:
            _check_once(content)
        if method[:1] != b'"':
            raise MultipartError("malformed", "call_request: method is no text")
        if call.endpoint is not ABSENT and call.endpoint != b"null":
            endpoint = bytes(call.endpoint)
            if endpoint[:1] != b'"':
                raise MultipartError("malformed", "call_request: endpoint is no text")
            method = b"%b/%b" % (endpoint[:-1], method[1:])
        head = b'{"jsonrpc":"2.0"' if wire_id is None else b'{"jsonrpc":"2.0","id":%b' % wire_id
        params = b',"params":%b' % call.params if call.params is not ABSENT else b""
        meta = b',"meta":%b' % call.meta if call.meta is not ABSENT else b""
        return b'%b,"method":%b%b%b}' % (head, method, params, meta)

    def _read_reply(self, wire_id: bytes, content: Frame) -> bytes:
        reply = _decode_reply(content)
        meta = b',"meta":%b' % reply.meta if reply.meta is not ABSENT else b""
        if reply.status == "ok":
            if len(content) - len(reply.result) - len(reply.meta) not in _PLAIN_REPLIES[reply.meta is not ABSENT]:
                _check_once(content)
            result = b"null" if reply.result is ABSENT else reply.result
            return b'{"jsonrpc":"2.0","id":%b,"result":%b%b}' % (wire_id, result, meta)
        data = reply.data
        if reply.code is None and data is ABSENT:  # as Jupyter's own errors are
            members: dict[str, object] = {"type": reply.ename, "message": reply.evalue}
            if reply.traceback is not ABSENT:
                members["traceback"] = reply.traceback
            data = msgspec.Raw(_encode(members))
        error: dict[str, object] = {
            "code": -32000 if reply.code is None else reply.code,
            "message": reply.evalue if reply.message is None else reply.message,
        }
        if data is not ABSENT:
            error["data"] = data
        return b'{"jsonrpc":"2.0","id":%b,"error":%b%b}' % (wire_id, _encode(error), meta)

    def _read_other(self, kind: str, msg_id: bytes, frames: Sequence[Frame]) -> bytes:
        content = bytes(frames[3]).strip()
        if kind == "call_notify":
            return self._read_call(None, content)
        method = MEANS.get(kind)
        if method is not None or kind in TELLS:
            if content[:1] != b"{":
                raise MultipartError("malformed", f"{kind}: the content is no object")
            meta = _meta_of(content)
            if method is None:
                return b'{"jsonrpc":"2.0","method":"%b","params":%b%b}' % (TELLS[kind], content, meta)
            rest = content[1:].lstrip()
            params = b'{"id":%b%b%b' % (self._parent(frames[1]), b"," if rest != b"}" else b"", rest)
            return b'{"jsonrpc":"2.0","method":"%b","params":%b%b}' % (method, params, meta)
        if kind[-8:] != "_request" or len(kind) > TYPE_MAX or not kind.isascii() or not kind.isprintable():
            raise MultipartError("unknown_type", f"there is no message type {kind[:TYPE_MAX]!r}")
        return self._read_short(kind[:-8], self._inward(msg_id), content)

    def _read_short(self, name: str, wire_id: bytes, content: bytes) -> bytes:
        """`X_request` is a call of `broker.X`, its content the params."""
        members = _decode_members(content)
        meta = members.pop("meta", None)
        params = content if meta is None else _encode(members)
        if len(self._short) < SHORT_MAX:
            self._short[wire_id] = b"%b_reply" % name.encode()
        method = _encode(f"broker.{name}")
        said = b',"params":%b' % params if members else b""
        told = b',"meta":%b' % meta if meta is not None else b""
        return b'{"jsonrpc":"2.0","id":%b,"method":%b%b%b}' % (wire_id, method, said, told)

    # ---------------------------------------------------------------- writing

    def write(self, text: bytes) -> list[Frame]:
        """The four frames of a JSON-RPC message of ours."""
        message = _decode_envelope(text)
        meta = b',"meta":%b' % message.meta if message.meta is not ABSENT else b""
        method = message.method
        if method is None:
            return self._write_reply(message, meta)
        if message.id is ABSENT:
            return self._write_told(message, method, meta)
        msg_id = _outward(bytes(message.id))
        if method[:7] == "broker." and method != "broker.call":
            return self._write_short(message, method, msg_id, meta)
        return [self._header(b"call_request", msg_id), b"{}", b"{}", _call_content(message, method, meta)]

    def refusal(self, msg_id: bytes, kind: str, detail: str) -> list[Frame]:
        """The answer to a message that is none; without `msg_id` (JSON text) it names none."""
        name = kind.removesuffix("_request") + "_reply" if kind.isascii() and kind.isidentifier() else "call_reply"
        name = name if len(name) <= TYPE_MAX else "call_reply"
        content = {
            "status": "error", "code": -32600, "message": "Invalid Request",
            "data": {"outcome": "invalid", "retryable": False, "detail": detail},
            "ename": "invalid", "evalue": detail, "traceback": [],
        }  # fmt: skip
        return [self._header(name.encode()), _parent_header(msg_id), b"{}", _encode(content)]

    def plain(self, kind: bytes, content: object, parent: bytes = b"", metadata: object = None) -> list[Frame]:
        """Any other message; `parent` is the id it answers (JSON text)."""
        return [self._header(kind), _parent_header(parent), _encode(metadata or {}), _encode(content)]

    def _header(self, kind: bytes, msg_id: bytes = b"") -> bytes:
        if msg_id:
            return b'{"msg_id":%b,"msg_type":"%b%b' % (msg_id, kind, self._tail)
        self._count += 1
        return b'%b%d","msg_type":"%b%b' % (self._head, self._count, kind, self._tail)

    def _write_reply(self, message: Envelope, meta: bytes) -> list[Frame]:
        msg_id = bytes(message.id)
        kind = b"call_reply"
        if self._short:
            kind = self._short.pop(msg_id, kind)
        if message.error is ABSENT:
            content = b'{"status":"ok","result":%b%b}' % (message.result, meta)
        else:
            content = _error_content(message.error, meta)
        return [self._header(kind), _parent_header(_outward(msg_id)), b"{}", content]

    def _write_told(self, message: Envelope, method: str, meta: bytes) -> list[Frame]:
        kind = _MEANT.get(method)
        if kind is not None:
            members = _decode_members(message.params)
            msg_id = _outward(bytes(members.pop("id", b"")))
            return [self._header(kind), _parent_header(msg_id), b"{}", _with_meta(_encode(members), meta)]
        kind = _TOLD.get(method)
        if kind is not None:
            return [self._header(kind), b"{}", b"{}", _with_meta(bytes(message.params), meta)]
        return [self._header(b"call_notify"), b"{}", b"{}", _call_content(message, method, meta)]

    def _write_short(self, message: Envelope, method: str, msg_id: bytes, meta: bytes) -> list[Frame]:
        content = bytes(message.params) if message.params is not ABSENT else b"{}"
        if content[:1] != b"{":  # params by position have no short form
            return [self._header(b"call_request", msg_id), b"{}", b"{}", _call_content(message, method, meta)]
        return [self._header(b"%b_request" % method[7:].encode(), msg_id), b"{}", b"{}", _with_meta(content, meta)]


def parent_of(header: Frame) -> bytes:
    """The parent header of an answer to the message with this header; empty where it is none."""
    try:
        return _parent_header(bytes(_decode_header(header).msg_id))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return b""


def _outward(wire_id: bytes) -> bytes:
    """An id of this end as `msg_id`, which is text; empty for none."""
    if wire_id[:1] == b'"':
        return wire_id
    return b"" if wire_id in (b"null", b"") else b'"%b"' % wire_id


def _parent_header(msg_id: bytes) -> bytes:
    return b'{"msg_id":%b}' % msg_id if msg_id else b"{}"


def _call_content(message: Envelope, method: str, meta: bytes) -> bytes:
    params = b',"params":%b' % message.params if message.params is not ABSENT else b""
    endpoint, slash, name = method.partition("/")
    if slash and endpoint != "$":
        return b'{"endpoint":%b,"method":%b%b%b}' % (_encode(endpoint), _encode(name), params, meta)
    return b'{"method":%b%b%b}' % (_encode(method), params, meta)


def _with_meta(content: bytes, meta: bytes) -> bytes:
    if not meta:
        return content
    return b"{%b}" % meta[1:] if content == b"{}" else b"%b%b}" % (content[:-1], meta)


def _meta_of(content: bytes) -> bytes:
    if b'"meta"' not in content:
        return b""
    meta = _decode_meta(content).meta
    return b',"meta":%b' % meta if meta is not ABSENT else b""


def _error_content(raw: msgspec.Raw, meta: bytes) -> bytes:
    """An error as its members, and once more in the words of Jupyter, whose readers look for those."""
    error = _decode_error(raw)
    data, name = b"", ""
    if error.data is not ABSENT:
        data = b',"data":%b' % error.data
        try:
            told = _decode_error_data(error.data)
            name = told.type or told.outcome
        except (msgspec.DecodeError, RecursionError):
            name = ""
    text = _encode(error.message)
    return b'{"status":"error","code":%d,"message":%b%b,"ename":%b,"evalue":%b,"traceback":[]%b}' % (
        error.code, text, data, _encode(name or str(error.code)), text, meta,
    )  # fmt: skip


# What is left of a content beside its values when each member stands there once: in JSON without spaces, and as
# Python's json writes it. Then nothing need be looked at more closely (0.2 µs instead of 6). A second member of the
# same name does not fit into the spaces: `"params":1,` has 11 bytes, the most there is room for is 7.
def _sizes(*names: str) -> tuple[int, int]:
    compact = 2 + sum(len(name) + 3 for name in names) + len(names) - 1
    return compact, compact + 2 * len(names) - 1


_PLAIN_CALLS = (
    _sizes("method", "params"), _sizes("endpoint", "method", "params"), _sizes("method", "params", "meta"),
    _sizes("endpoint", "method", "params", "meta"),
)  # fmt: skip
_PLAIN_REPLIES = (
    tuple(size + len('"ok"') for size in _sizes("status", "result")),
    tuple(size + len('"ok"') for size in _sizes("status", "result", "meta")),
)


def _check_once(content: Frame) -> None:
    """Refuse a content that has a member twice, since parsers differ in which one they take. Raises MultipartError."""
    text = bytes(content)
    for value in _decode_members(text).values():
        if len(value) > 256:
            text = text.replace(bytes(value), b"0", 1)
    if len(text) > CHECKED_MAX:
        raise MultipartError("malformed", f"a content of more than {CHECKED_MAX} bytes beside its values")
    seen: list[tuple[str, object]] = []

    def remember(pairs: list[tuple[str, object]]) -> None:
        seen[:] = pairs  # called for inner objects first, for the content last

    try:
        json.loads(text, object_pairs_hook=remember, parse_int=len)
    except (ValueError, RecursionError) as error:
        raise MultipartError("malformed", str(error)) from None
    names = Counter(name for name, _ in seen)
    if names.total() > len(names):
        twice = next(name for name, times in names.items() if times > 1)
        raise MultipartError("malformed", f"member {twice[:TYPE_MAX]!r} stands twice")
