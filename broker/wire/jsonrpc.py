"""The JSON-RPC 2.0 dialect: text to events, messages to text (https://www.jsonrpc.org/specification).

Only the envelope is looked into; params, result and error data pass as they came. The envelope is always encoded anew,
so what the broker judged is what the other side reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec

from broker.core.access import is_name
from broker.core.errors import (
    DUPLICATE_ID,
    ENDED_OK,
    INVALID_JSON,
    INVALID_PARAMS,
    INVALID_REQUEST,
    NO_METHOD,
    WORKER_ERROR,
    Kind,
    Outcome,
)
from broker.core.events import (
    Acked,
    Answered,
    Asked,
    BadReply,
    Cancel,
    CreditGranted,
    ErrorReply,
    PartSent,
    Progressed,
    Refused,
    Stray,
)
from broker.core.ids import AttemptId, SessionId, WireId
from broker.core.messages import (
    DEFAULT_OPTIONS,
    EMPTY,
    Ack,
    Body,
    Broadcast,
    Call,
    CancelAttempt,
    Credit,
    End,
    Message,
    Notify,
    Options,
    Part,
    Progress,
    ReplyMeta,
    SessionTold,
)
from broker.core.options import TOKEN_MAX, OptionError, read_options
from broker.core.sessions import Session
from broker.wire.attachments import AttachmentError, collect, expand, mentions_base64, pack
from broker.wire.native import Reader

if TYPE_CHECKING:
    from broker.wire.multipart_plain import PlainReader

Decoded: TypeAlias = (
    Asked | Answered | Cancel | PartSent | CreditGranted | Progressed | Acked | Stray | Refused | BadReply | None
)  # fmt: skip
Attachments: TypeAlias = tuple[bytes | memoryview, ...]
Pieces: TypeAlias = list[bytes | memoryview]

TEXT_FRAME, BINARY_FRAME = "jsonrpc text", "jsonrpc binary"
"""what the frames of a broadcast that all peers of this dialect share are called; without attachments, the first"""
ID_MAX = 128
"""bytes of a string id"""
ROUTES_REMEMBERED, OWN_REMEMBERED = 16_384, 256
"""methods that need not be looked at again: of all links that write `endpoint/method`, and of each that does not"""
_ROUTES: dict[str, tuple[str, str]] = {}
"""`endpoint/method` as written, found good once for all links: looking at names costs 3 µs"""
SMALL = 4096
"""bytes of a payload up to which copying it once more is cheaper than handling pieces"""
ENVELOPE_MAX = 65536
"""bytes of a message beside its params, result, error, meta and id"""
ABSENT = msgspec.Raw(b"")
OWN_CODES = range(-32019, -32000)
"""codes by which the broker tells its own outcomes; a worker's error with one of them is wrapped"""


class BadMessage(ValueError):
    """A message that is none of this dialect. `answer` is what to tell the peer, `strike` whether it is abuse."""

    def __init__(self, kind: Kind, detail: str, *, strike: bool = False, wire_id: bytes = b"null") -> None:
        super().__init__(detail)
        self.strike = strike
        self.answer = encode_error(wire_id, Outcome(kind=kind, detail=detail))


class Envelope(msgspec.Struct, gc=False):
    """The members JSON-RPC knows, and `meta`. Unknown ones are ignored."""

    jsonrpc: Literal["2.0"]
    id: msgspec.Raw = ABSENT
    method: str | None = None
    params: msgspec.Raw = ABSENT
    result: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT
    meta: msgspec.Raw = ABSENT


class ErrorObject(msgspec.Struct, gc=False):
    """The member `error` as the specification wants it (section 5.1)."""

    code: int
    message: str
    data: msgspec.Raw = ABSENT


class WorkerMeta(msgspec.Struct):
    """What a worker may say beside a reply."""

    retryable: bool = False


class CancelParams(msgspec.Struct):
    """`$/cancelRequest` (Language Server Protocol 3.17)."""

    id: msgspec.Raw


_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


class TokenParams(msgspec.Struct):
    """Params of a request that wants progress (Language Server Protocol 3.17, workDoneProgress)."""

    workDoneToken: int | str | None = None


class PartParams(msgspec.Struct, gc=False):
    """`$/part`: one part of the stream of the request `id`, which is that of this hop."""

    id: msgspec.Raw
    seq: _Number
    data: msgspec.Raw = ABSENT
    more: bool = False
    last: bool = False


class CreditParams(msgspec.Struct, gc=False):
    """`$/credit`: parts with `seq` below `upto` may be sent."""

    id: msgspec.Raw
    upto: _Number


class ProgressParams(msgspec.Struct, gc=False):
    """`$/progress`: as in the Language Server Protocol, with the id beside the token."""

    id: msgspec.Raw = ABSENT
    token: msgspec.Raw = ABSENT
    value: msgspec.Raw = ABSENT


class AckParams(msgspec.Struct, gc=False):
    """`$/ack`: every message up to number `n` has arrived."""

    n: _Number


_decode_envelope = msgspec.json.Decoder(Envelope).decode
_decode_error = msgspec.json.Decoder(ErrorObject).decode
_decode_worker_meta = msgspec.json.Decoder(WorkerMeta).decode
_decode_cancel = msgspec.json.Decoder(CancelParams).decode
_decode_token = msgspec.json.Decoder(TokenParams).decode
_decode_part = msgspec.json.Decoder(PartParams).decode
_decode_credit = msgspec.json.Decoder(CreditParams).decode
_decode_progress = msgspec.json.Decoder(ProgressParams).decode
_decode_ack = msgspec.json.Decoder(AckParams).decode
_encode = msgspec.json.Encoder().encode


@lru_cache(maxsize=4096)
def name_bytes(name: str) -> bytes | None:
    """A name as bytes; None if it is none."""
    return name.encode() if is_name(name) else None


# ---------------------------------------------------------------- reading


class JsonRpc:
    """The codec of one link. `endpoint` is what the link is attached to, "" for nothing.

    `meta` says whether calls to this peer carry what is left of their deadline; `binary` whether it takes binary
    frames, which it also shows by sending one; `defaults` are the options its query set; with `lsp` a `workDoneToken`
    in the params asks for progress; with `callers` it is told who asks, which only the program around the broker is.
    `session` must be set before anything is decoded.
    """

    __slots__ = (
        "_foreign_prefix",
        "_n",
        "_node",
        "_own_prefix",
        "_reply_at",
        "_reply_prefix",
        "_routes",
        "binary",
        "callers",
        "defaults",
        "endpoint",
        "lsp",
        "meta",
        "session",
    )

    def __init__(
        self, *, node: str, session_id: SessionId, endpoint: str = "", meta: bool = False, binary: bool = False,
        defaults: Options = DEFAULT_OPTIONS, lsp: bool = False, callers: bool = False,
    ) -> None:  # fmt: skip
        self.session: Session
        self._routes = {} if endpoint or lsp else _ROUTES
        self.endpoint = endpoint
        self.meta = meta
        self.binary = binary
        self.defaults = defaults
        self.lsp = lsp
        self.callers = callers
        self._node = node
        self._n = 0
        self._foreign_prefix = b'"%b-' % node.encode()
        self._reply_prefix = b'"%b-%d-' % (node.encode(), session_id)
        self._reply_at = len(self._reply_prefix)
        self._own_prefix = b'{"jsonrpc":"2.0","id":%b' % self._reply_prefix

    def decode(self, text: bytes, attachments: Attachments = ()) -> Decoded:
        """One message; None for one that asks for nothing. Raises BadMessage."""
        try:
            envelope = _decode_envelope(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return self._unreadable(text, error)
        fault = ""
        if mentions_base64(text):
            attachments, fault = _collect(envelope, text, attachments)
        elif not _looks_plain(text, envelope):
            _check_duplicates(text, envelope)
        method = envelope.method
        if method is None:
            reply_id = bytes(envelope.id)
            # The common reply: a plain result to a call of ours.
            if reply_id.startswith(self._reply_prefix) and envelope.error is ABSENT and not fault:
                digits = reply_id[self._reply_at : -1]
                if digits.isdigit() and len(digits) < 19 and envelope.result is not ABSENT:
                    return Answered(self.session, int(digits), Body(envelope.result, attachments))
            return self._decode_reply(envelope, reply_id, attachments, fault)
        wire_id = None
        if envelope.id is not ABSENT:
            wire_id = bytes(envelope.id)
            if not wire_id.isdigit() or len(wire_id) > 18:
                wire_id = _checked_id(wire_id)
        route = self._routes.get(method)
        if route is None or envelope.meta is not ABSENT or fault:
            return self._decode_call(envelope, method, wire_id, attachments, fault)
        return Asked(self.session, wire_id, route[0], route[1], Body(envelope.params, attachments), self.defaults)

    def read_by(self, reader: Reader | PlainReader) -> None:
        """Have plain calls and replies read without this codec from now on; `decode` gets what is left."""
        if not self.lsp:
            reader.decode_for(self.session, self._reply_prefix, self._routes, self.defaults)

    @property
    def plain(self) -> tuple[bytes, str, bool]:
        """What the plain calls to this peer consist of, beside themselves: for who writes them in C."""
        return self._own_prefix, self.endpoint, self.meta

    def _unreadable(self, text: bytes, error: Exception) -> BadReply:
        """A reply that is no JSON (half a surrogate pair in a file's name, say) still says which attempt it ends."""
        if not isinstance(error, msgspec.ValidationError):
            reply = re.search(rb'"id"\s*:\s*%b(\d{1,18})"' % re.escape(self._reply_prefix), text)
            if reply is not None:
                return BadReply(self.session, int(reply[1]), f"the reply is no JSON: {error}")
        raise _explain(text, error, self.session.requests) from None

    def _decode_call(
        self, envelope: Envelope, method: str, wire_id: bytes | None, attachments: Attachments, fault: str
    ) -> Decoded:
        """A call by a method this link has not called before, or with options."""
        endpoint = self.endpoint
        if method[:7] == "broker.":
            endpoint, good = "", name_bytes(method) is not None
        elif method[:2] == "$/":
            return self._decode_protocol(envelope, method, wire_id, attachments, fault)
        else:
            if not endpoint:
                endpoint, _, method = method.partition("/")
            # `lab/broker.message` would reach a listening worker as what looks like the broker's own word.
            good = name_bytes(endpoint) is not None and name_bytes(method) is not None and method[:7] != "broker."
        if not good:
            fault = self._why_no_name(envelope.method or "")
        options = self.defaults
        if envelope.meta is not ABSENT:
            try:
                options = read_options(envelope.meta, options)
            except OptionError as error:
                return self._refuse(wire_id, INVALID_PARAMS, str(error), endpoint, method)
        if fault:
            return self._refuse(wire_id, INVALID_REQUEST, fault, endpoint, method)
        if self.lsp:  # each call is looked at: no route is remembered
            return Asked(
                self.session, wire_id, endpoint, method, Body(envelope.params, attachments),
                _with_token(envelope.params, options),
            )  # fmt: skip
        if len(self._routes) >= (ROUTES_REMEMBERED if self._routes is _ROUTES else OWN_REMEMBERED):
            self._routes.clear()
        self._routes[envelope.method or ""] = endpoint, method
        return Asked(self.session, wire_id, endpoint, method, Body(envelope.params, attachments), options)

    def _refuse(self, wire_id: bytes | None, kind: Kind, detail: str, endpoint: str, method: str) -> Decoded:
        if wire_id is None:
            raise BadMessage(kind, detail)
        return Refused(self.session, wire_id, kind, detail, endpoint[:ID_MAX], method[:ID_MAX])

    def _why_no_name(self, method: str) -> str:
        shown = method if len(method) <= ID_MAX else method[:ID_MAX] + "…"
        names = "names are 1 to 128 of A-Z a-z 0-9 _ . - and begin with none of . -"
        if self.endpoint:
            return f"method {shown!r} is no name ({names}); this link is attached to {self.endpoint}"
        return f"method {shown!r} is not of the form endpoint/method with one slash ({names}, methods not with broker.)"

    def _decode_protocol(
        self, envelope: Envelope, method: str, wire_id: bytes | None, attachments: Attachments, fault: str
    ) -> Decoded:
        """Methods that begin with `$/`: as in LSP, unknown notifications are ignored and unknown requests refused."""
        if wire_id is not None:
            return Refused(self.session, wire_id, NO_METHOD, f"{method[:ID_MAX]} is no request", "", method[:ID_MAX])
        try:
            if method == "$/part":
                part = _decode_part(envelope.params)
                caller, attempt = self._hop(part.id)
                if fault:
                    raise BadMessage(INVALID_PARAMS, f"$/part: {fault}")
                body = Body(b"null" if part.data is ABSENT else part.data, attachments)
                return PartSent(self.session, caller, attempt, part.seq, body, part.more, part.last)
            if method == "$/credit":
                credit = _decode_credit(envelope.params)
                return CreditGranted(self.session, *self._hop(credit.id), credit.upto)
            if method == "$/progress":
                return self._decode_progress(_decode_progress(envelope.params), attachments)
            if method == "$/ack":
                return Acked(self.session, _decode_ack(envelope.params).n)
            if method == "$/cancelRequest":
                return Cancel(self.session, _checked_id(bytes(_decode_cancel(envelope.params).id)))
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise BadMessage(INVALID_PARAMS, f"{method}: {error}") from None
        return None

    def _hop(self, raw: msgspec.Raw) -> tuple[bytes | None, int]:
        """Whose id it is: a caller's own, or that of an attempt given to this peer. Raises BadMessage."""
        wire_id = _checked_id(bytes(raw))
        if wire_id.startswith(self._reply_prefix):
            digits = wire_id[self._reply_at : -1]
            if digits.isdigit() and len(digits) < 19:
                return None, int(digits)
        return wire_id, 0

    def _decode_progress(self, progress: ProgressParams, attachments: Attachments) -> Decoded:
        """By the id, or as LSP libraries do by the token alone, which is the id unless the caller named one."""
        body = Body(b"null" if progress.value is ABSENT else progress.value, attachments)
        for name in (progress.id, progress.token):
            if name is not ABSENT:
                caller, attempt = self._hop(name)
                return Progressed(self.session, attempt, b"" if caller is None else caller, body)
        raise BadMessage(INVALID_PARAMS, "$/progress has neither id nor token")

    def _decode_reply(self, envelope: Envelope, wire_id: bytes, attachments: Attachments, fault: str) -> Decoded:
        """Replies as they really come: without result, with both, with errors of any shape."""
        if b"\\" in wire_id:
            wire_id = _checked_id(wire_id)  # some writer escapes more than it must
        error = None
        result = envelope.result
        body = Body(b"null" if result is ABSENT else result, attachments)
        if bytes(envelope.error) not in (b"", b"null"):  # null, as every good reply of JSON-RPC 1.0 has it, is none
            error, body = _read_error(envelope, attachments)
        if not wire_id and error is None and envelope.result is ABSENT:
            raise BadMessage(INVALID_REQUEST, "neither method nor id, result or error: neither a request nor a reply")
        if wire_id.startswith(self._reply_prefix):
            digits = wire_id[self._reply_at : -1]
            if digits.isdigit() and len(digits) < 19:
                if fault:
                    return BadReply(self.session, int(digits), fault)
                return Answered(self.session, int(digits), body, error)
        if not wire_id or wire_id == b"null":
            return Stray(self.session, nameless=True, body=body, error=error)
        return Stray(self.session, foreign=wire_id.startswith(self._foreign_prefix))

    # ---------------------------------------------------------------- writing

    def encode(self, message: Message) -> Pieces:
        """The text of a message in pieces, which the link joins; a binary frame's pieces if `takes_binary(message)`."""
        return self._encoders[type(message)](self, message)

    def encode_numbered(self, message: Message, n: int) -> Pieces:
        """The same, with its number in the session."""
        self._n = n
        try:
            return self._encoders[type(message)](self, message)
        finally:
            self._n = 0

    def _encode_call(self, call: Call) -> Pieces:
        body = call.body
        size = len(body.raw)
        if 0 < size <= SMALL and not (body.attachments or self.meta or self._n):  # the common call, in one formatting
            method = call.method.encode() if call.endpoint == self.endpoint else self._method(call)
            return [b'%b%d","method":"%b","params":%b}' % (self._own_prefix, call.attempt.id, method, body.raw)]
        pieces: Pieces = [self._own_prefix, b'%d","method":"%b"' % (call.attempt.id, self._method(call))]
        if size:
            pieces += (b',"params":', self._inline(body))
        return self._finish(pieces, body, self._call_meta(call) if self.meta else None)

    def _call_meta(self, call: Call) -> dict[str, object]:
        """What a worker that asked for it is told of a call."""
        options = call.attempt.request.options
        meta: dict[str, object] = {"timeout": round(call.left_s, 3)}
        if self.callers:
            meta["caller"] = self._caller(call.attempt.request.session)
        if options.trace is not None:
            meta["trace"] = options.trace
        if options.idempotent:
            meta["idempotent"] = True
        if options.stream_in or options.stream_out:
            meta["stream"] = (
                "both" if options.stream_in and options.stream_out else "in" if options.stream_in else "out"
            )
        if options.progress is not None:
            meta["progress"] = msgspec.Raw(options.progress) if options.progress else True
        if options.idle is not None:
            meta["idle"] = options.idle
        return meta

    def _caller(self, session: Session) -> list[str]:
        """Who asks: what others call it, and its principal."""
        return [f"{self._node}-{session.id}", session.principal]

    def _encode_notify(self, notify: Notify) -> Pieces:
        pieces: Pieces = [b'{"jsonrpc":"2.0","method":"%b"' % self._method(notify)]
        if len(notify.body.raw):
            pieces += (b',"params":', self._inline(notify.body))
        return self._finish(pieces, notify.body, {"caller": self._caller(notify.by)} if self.callers else None)

    def _encode_end(self, end: End) -> Pieces:
        wire_id, body = end.wire_id, end.body
        assert isinstance(wire_id, bytes)
        if body is None:
            duplicate = wire_id if end.outcome.kind is DUPLICATE_ID else None
            error = error_object(end.outcome, duplicate=duplicate)
            head = b'{"jsonrpc":"2.0","id":%b,"error":%b' % (b"null" if duplicate else wire_id, error)
            return self._finish([head], EMPTY, end.meta)
        if (
            end.outcome is ENDED_OK
            and end.meta is None
            and len(body.raw) <= SMALL
            and not (body.attachments or self._n)
        ):
            return [b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (wire_id, body.raw)]  # the common reply
        member = b"error" if end.outcome.kind is WORKER_ERROR else b"result"
        pieces: Pieces = [b'{"jsonrpc":"2.0","id":%b,"%b":' % (wire_id, member), self._inline(body)]
        return self._finish(pieces, body, end.meta)

    def _encode_cancel(self, cancel: CancelAttempt) -> Pieces:
        head = b'{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":%b}' % self._id(None, cancel.attempt_id)
        return self._finish([head], EMPTY)

    def _id(self, wire_id: WireId | None, attempt_id: AttemptId) -> bytes:
        """An id as this peer knows it."""
        if attempt_id:
            return b'%b%d"' % (self._reply_prefix, attempt_id)
        assert isinstance(wire_id, bytes)
        return wire_id

    def _encode_part(self, part: Part) -> Pieces:
        head = b'{"jsonrpc":"2.0","method":"$/part","params":{"id":%b,"seq":%d%b%b,"data":' % (
            self._id(part.wire_id, part.attempt_id), part.seq, b',"more":true' if part.more else b"",
            b',"last":true' if part.last else b"",
        )  # fmt: skip
        return self._finish([head, self._inline(part.body), b"}"], part.body)

    def _encode_credit(self, credit: Credit) -> Pieces:
        name = self._id(credit.wire_id, credit.attempt_id)
        return self._finish(
            [b'{"jsonrpc":"2.0","method":"$/credit","params":{"id":%b,"upto":%d}' % (name, credit.upto)], EMPTY
        )

    def _encode_progress(self, progress: Progress) -> Pieces:
        name = self._id(progress.wire_id, 0)
        head = b'{"jsonrpc":"2.0","method":"$/progress","params":{"id":%b,"token":%b,"value":' % (
            name, progress.token or name,
        )  # fmt: skip
        return self._finish([head, self._inline(progress.body), b"}"], progress.body)

    def _encode_session(self, told: SessionTold) -> Pieces:
        params = {
            "id": told.session_id,
            "secret": told.secret,
            "grace": told.grace_s,
            "resumed": told.resumed,
            "received": told.received,
            "cut": told.cut,
        }
        return [b'{"jsonrpc":"2.0","method":"broker.session","params":%b}' % _encode(params)]

    def _encode_ack(self, ack: Ack) -> Pieces:
        return [b'{"jsonrpc":"2.0","method":"$/ack","params":{"n":%d}}' % ack.n]

    def _encode_broadcast(self, broadcast: Broadcast) -> Pieces:
        pieces: Pieces = [b'{"jsonrpc":"2.0","method":"broker.message","params":{']
        if broadcast.endpoint is not None:
            pieces.append(b'"endpoint":"%b",' % broadcast.endpoint.encode())
        if broadcast.topic is not None:
            pieces.append(b'"topic":"%b",' % broadcast.topic.encode())
        if broadcast.seq is not None:
            pieces.append(b'"seq":%d,' % broadcast.seq)
        pieces += (b'"data":', self._inline(broadcast.body), b"}")
        return self._finish(pieces, broadcast.body)

    def _method(self, call: Call | Notify) -> bytes:
        """Bare where the link is attached, `endpoint/method` elsewhere."""
        if call.endpoint == self.endpoint:
            return call.method.encode()
        return b"%b/%b" % (call.endpoint.encode(), call.method.encode())

    def takes_binary(self, body: Body | None) -> bool:
        """Whether a message with this body goes to this peer as a binary frame."""
        return self.binary and body is not None and bool(body.attachments)

    def _inline(self, body: Body) -> bytes | memoryview:
        if body.attachments and not self.binary:
            return expand(bytes(body.raw), body.attachments)
        return body.raw

    def _finish(self, pieces: Pieces, body: Body, meta: ReplyMeta | dict[str, object] | None = None) -> Pieces:
        """The end of a message: `meta` with the number it has, and the attachments of a binary frame."""
        if self._n and meta is None:
            pieces.append(b',"meta":{"n":%d}' % self._n)
        elif meta is not None:
            pieces += (b',"meta":', _encode({"n": self._n, **_members(meta)} if self._n else meta))
        pieces.append(b"}")
        return pack(pieces, body.attachments) if body.attachments and self.binary else pieces

    _encoders: dict[type, Callable[[JsonRpc, Any], Pieces]] = {  # noqa: RUF012 - filled once, below
        Call: _encode_call,
        End: _encode_end,
        Notify: _encode_notify,
        CancelAttempt: _encode_cancel,
        Part: _encode_part,
        Credit: _encode_credit,
        Progress: _encode_progress,
        SessionTold: _encode_session,
        Ack: _encode_ack,
        Broadcast: _encode_broadcast,
    }


def _members(meta: ReplyMeta | dict[str, object]) -> dict[str, object]:
    """What is said in `meta`, as members of an object."""
    return meta if isinstance(meta, dict) else msgspec.to_builtins(meta)


class ErrorData(msgspec.Struct, omit_defaults=True):
    """`error.data` of the broker's own outcomes. Times in milliseconds."""

    outcome: str
    retryable: bool | None = None
    dispatched: bool | None = None
    endpoint: str | None = None
    method: str | None = None
    attempts: int | None = None
    elapsed_ms: float | None = None
    detail: str = ""
    phase: str = ""
    cause: str = ""
    bound: str = ""
    retry_after_ms: int | None = None
    id: msgspec.Raw = ABSENT


def encode_error(wire_id: bytes, outcome: Outcome) -> bytes:
    """The error by which the broker tells an outcome of its own."""
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}' % (wire_id, error_object(outcome))


def error_object(outcome: Outcome, *, duplicate: bytes | None = None) -> bytes:
    """The member `error` alone (section 5.1)."""
    kind = outcome.kind
    data = ErrorData(
        outcome=kind.name,
        retryable=outcome.retryable,
        dispatched=outcome.dispatched,
        endpoint=outcome.endpoint or None,
        method=outcome.method or None,
        attempts=outcome.attempts,
        elapsed_ms=outcome.elapsed_ms,
        detail=outcome.detail,
        phase=outcome.phase,
        cause=outcome.cause,
        bound=outcome.bound,
        retry_after_ms=outcome.retry_after_ms,
    )
    if duplicate is not None:
        data.id = msgspec.Raw(duplicate)
    text = kind.text
    if kind.code in OWN_CODES and outcome.detail:  # -32700…-32600 keep the specification's words
        text = f"{text}: {outcome.detail}"
    return _encode({"code": kind.code, "message": text, "data": data})


# ---------------------------------------------------------------- the details of reading


def is_batch(text: bytes) -> bool:
    """Whether a text is a batch (section 6)."""
    return text[:1] == b"[" or text.lstrip()[:1] == b"["


@lru_cache(maxsize=8)
def _batch_decoder(batch_max: int) -> msgspec.json.Decoder[msgspec.Struct]:
    """Reads an array of at most so many members and stops at one more.

    A list would hold them all before it is found too long: 8 million, 700 MB, in a message of 16 MiB.
    """
    members = [(f"m{index}", msgspec.Raw, ABSENT) for index in range(batch_max)]
    return msgspec.json.Decoder(msgspec.defstruct("Batch", members, array_like=True, forbid_unknown_fields=True))


def split_batch(text: bytes, batch_max: int) -> list[bytes]:
    """The members of a batch. Raises BadMessage if there are none, too many, or the text is no array."""
    try:
        batch = _batch_decoder(batch_max).decode(text)
    except msgspec.ValidationError:
        raise BadMessage(INVALID_REQUEST, f"a batch has at most {batch_max} members") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _explain(text, error, {}) from None
    members = [bytes(member) for member in msgspec.structs.astuple(batch) if member is not ABSENT]
    if not members:
        raise BadMessage(INVALID_REQUEST, "a batch must have members")
    return members


def _explain(text: bytes, error: Exception, in_flight: Container[object]) -> BadMessage:
    """Why a text could not be decoded: is it no JSON at all (a strike), or JSON of the wrong shape?

    The answer carries the id that was meant, unless that is in flight: it would end another request at its caller.
    """
    if isinstance(error, msgspec.ValidationError):
        try:
            members = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            wire_id = _checked_id(bytes(members["id"])) if "id" in members and "method" in members else b"null"
        except (ValueError, RecursionError):
            wire_id = b"null"
        if wire_id in in_flight:
            wire_id = b"null"
        return BadMessage(INVALID_REQUEST, str(error), wire_id=wire_id)
    if isinstance(error, RecursionError):
        return BadMessage(INVALID_JSON, "nested too deeply", strike=True)
    return BadMessage(INVALID_JSON, str(error), strike=True)


def _checked_id(raw: bytes) -> bytes:
    """An id as JSON text: an integer of at most 64 bits or a string of at most 128 bytes. Raises BadMessage."""
    if raw[:1] == b'"':
        if b"\\" in raw:
            try:
                raw = _encode(msgspec.json.decode(raw))  # one spelling, so that equal ids are equal
            except (ValueError, RecursionError) as error:
                raise BadMessage(INVALID_JSON, f"id: {error}", strike=True) from None
        if len(raw) <= ID_MAX + 2:
            return raw
        raise BadMessage(INVALID_REQUEST, f"an id of {len(raw) - 2} bytes is longer than {ID_MAX}")
    digits = raw.removeprefix(b"-")
    if digits.isdigit() and len(digits) <= 20 and -(1 << 63) <= int(raw) < 1 << 64:
        return raw
    shown = raw[:40].decode("utf-8", "replace")
    raise BadMessage(INVALID_REQUEST, f"id {shown} is neither an integer of at most 64 bits nor a string")


# How much of a message is left beside its values, by which members it has: in JSON without spaces, and as Python's json
# writes it. A message that has just that has no member twice, and needs no closer look (0.15 µs instead of 6). One
# space for each colon and comma would leave room for `"id":1,` in a call: so there the first space must be seen.
_CALL, _CALL_SPACED = 45, 52
_CALL_META = 53
_RESULT_SIZES = (33, 38)
_NOTIFICATION_SIZES = (39, 44)


def _looks_plain(text: bytes, e: Envelope) -> bool:
    method, beside = e.method, len(text) - len(e.id)
    if method is None:
        if e.id is ABSENT or e.result is ABSENT or e.error is not ABSENT or e.meta is not ABSENT:
            return False
        beside -= len(e.result)
        return beside in _RESULT_SIZES
    if e.params is ABSENT:
        return False
    beside -= len(method) + len(e.params)
    if e.meta is not ABSENT:
        return beside - len(e.meta) == _CALL_META and e.id is not ABSENT
    if e.id is ABSENT:
        return beside in _NOTIFICATION_SIZES
    return beside == _CALL or (beside == _CALL_SPACED and text.startswith(b'{"jsonrpc": "2.0", "'))


def _check_duplicates(text: bytes, envelope: Envelope) -> None:
    """Refuse an envelope that has a member twice, since parsers differ in which one they take. Raises BadMessage."""
    for value in (envelope.params, envelope.result, envelope.error):
        if len(value) > 256:  # values need no look; cutting them out keeps this cheap for large messages
            text = text.replace(bytes(value), b"0", 1)
    if len(text) > ENVELOPE_MAX:
        raise BadMessage(INVALID_REQUEST, f"an envelope of more than {ENVELOPE_MAX} bytes", strike=True)
    seen: list[tuple[str, object]] = []

    def remember(pairs: list[tuple[str, object]]) -> None:
        seen[:] = pairs  # called for inner objects first, for the envelope last

    try:
        json.loads(text, object_pairs_hook=remember, parse_int=len)  # int() refuses what is longer than 4300 digits
    except (ValueError, RecursionError) as error:
        raise BadMessage(INVALID_JSON, str(error), strike=True) from None
    if ("method", None) in seen:
        raise BadMessage(INVALID_REQUEST, "method is null, not a string")
    names = Counter(name for name, _ in seen)
    if names.total() > len(names):
        twice = next(name for name, times in names.items() if times > 1)
        raise BadMessage(INVALID_REQUEST, f"member {twice[:ID_MAX]!r} stands twice", strike=True)


def _with_token(params: msgspec.Raw, options: Options) -> Options:
    """The options with the progress token that stands in the params, as in the Language Server Protocol (3.17)."""
    try:
        token = _decode_token(params).workDoneToken if len(params) else None
    except (msgspec.DecodeError, RecursionError):
        return options  # params without one, or none at all
    if token is None or len(written := _encode(token)) > TOKEN_MAX:
        return options
    return msgspec.structs.replace(options, progress=written)


def _collect(envelope: Envelope, text: bytes, attachments: Attachments) -> tuple[Attachments, str]:
    """Take base64 out of the payload into attachments; what is wrong with it, if anything."""
    if not _looks_plain(text, envelope):
        _check_duplicates(text, envelope)
    try:
        for member in ("params", "result"):
            raw = bytes(getattr(envelope, member))
            if mentions_base64(raw):
                raw, attachments = collect(raw, attachments)
                setattr(envelope, member, msgspec.Raw(raw))
    except AttachmentError as error:
        return attachments, str(error)
    return attachments, ""


def _read_error(envelope: Envelope, attachments: Attachments) -> tuple[ErrorReply, Body]:
    """A worker's error, made whole: one that is none becomes -32603, one that looks like the broker's is wrapped."""
    raw = envelope.error
    retryable = False
    if envelope.meta is not ABSENT:
        try:
            retryable = _decode_worker_meta(envelope.meta).retryable
        except (msgspec.DecodeError, RecursionError):
            retryable = False
    try:
        error = _decode_error(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        text = b'{"code":-32603,"message":"Internal error","data":%b}' % raw
        return ErrorReply(-32603, retryable), Body(text, attachments)
    if error.code in OWN_CODES:
        message = _encode(error.message)
        text = b'{"code":-32000,"message":%b,"data":{"cause":%b}}' % (message, raw)
        return ErrorReply(-32000, retryable), Body(text, attachments)
    data = b"" if error.data is ABSENT else b',"data":' + bytes(error.data)
    text = b'{"code":%d,"message":%b%b}' % (error.code, _encode(error.message), data)
    return ErrorReply(error.code, retryable), Body(text, attachments)
