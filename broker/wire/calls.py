"""The plain HTTP dialect: a request's body and headers to a payload, an outcome to status, headers and body."""

from __future__ import annotations

import math
import re

import msgspec

from broker.core.errors import INVALID_JSON, INVALID_PARAMS, OK, WORKER_ERROR, Kind
from broker.core.messages import Body, Broadcast, End
from broker.wire.attachments import AttachmentError, collect, expand, mentions_base64
from broker.wire.jsonrpc import error_object

JSON = "application/json; charset=utf-8"
OCTETS = "application/octet-stream"
EVENTS = "text/event-stream"
NDJSON = "application/x-ndjson"
KEY_MAX = 255
"""characters of an Idempotency-Key"""

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_KEY = re.compile(rf"[\x21\x23-\x7e][\x21-\x7e]{{0,{KEY_MAX - 1}}}")
_QUOTED_KEY = re.compile(rf'"((?:[ !\x23-\x5b\x5d-\x7e]|\\["\\]){{1,{KEY_MAX}}})"')  # RFC 8941 section 3.3.3
_STATUS_OF_WORKERS = {-32601: 404, -32602: 400}
_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode


class BadCall(ValueError):
    """A request that cannot be made a call; the text says what is wrong, `kind` how it ends."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class _Code(msgspec.Struct):
    code: int


class Reply(msgspec.Struct, frozen=True):
    """What to answer: HTTP status, headers, body."""

    status: int
    content_type: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Accepts(msgspec.Struct, frozen=True):
    """What the caller takes (RFC 9110 section 12.5.1): the only attachment as the body, JSON, or either.

    `stream` is the type by which it takes parts in JSON as they come, empty if it takes none so.
    """

    octets: bool
    json: bool
    stream: str = ""


# ---------------------------------------------------------------- reading


def read_accept(value: str) -> Accepts:
    """The header Accept. Attachments come bare only to who names their type: `*/*` is what everybody sends."""
    types = {part.partition(";")[0].strip().lower() for part in value.split(",")}
    stream = next((each for each in (NDJSON, EVENTS) if each in types), "")
    json = OCTETS not in types or bool(stream or types & {"application/json", "application/*", "*/*"})
    return Accepts(OCTETS in types, json, stream)


def media_type(value: str | None) -> str:
    """The type a header Content-Type names, without its parameters."""
    return (value or "").partition(";")[0].strip().lower()


def read_json(text: bytes, what: str = "the body") -> bytes:
    """JSON text as it came, blanks around it taken off. Raises BadCall for what is none."""
    try:
        if not text.isascii():
            text.decode()
        return bytes(_decode_raw(text))
    except UnicodeDecodeError as error:
        raise BadCall(INVALID_JSON, f"{what} is no UTF-8: {error}") from None
    except RecursionError:
        raise BadCall(INVALID_JSON, f"{what} is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise BadCall(INVALID_JSON, f"{what} is no JSON: {error}") from None


def read_body(content: bytes, content_type: str, beside: str | None, name: str) -> Body:
    """The payload of a request: JSON under any content type, or one attachment as application/octet-stream.

    Beside an attachment, the JSON stands in the query parameter `name`, whose value is `beside`. Raises BadCall.
    """
    if media_type(content_type) == OCTETS:
        raw = b"" if beside is None else read_json(beside.encode(), f"{name}=")
        return Body(raw, (content,))
    if beside is not None:
        raise BadCall(INVALID_PARAMS, f"{name}= goes with a body of {OCTETS}; otherwise the body is the {name}")
    raw = read_json(content) if content.strip() else b""
    if not mentions_base64(raw):
        return Body(raw)
    try:
        return Body(*collect(raw, ()))
    except AttachmentError as error:
        raise BadCall(INVALID_PARAMS, str(error)) from None


def read_trace(value: str | None) -> str | None:
    """A traceparent to be continued (W3C Trace Context, section 3.2); None for one that is malformed."""
    return value if value is not None and _TRACEPARENT.fullmatch(value) else None


def read_key(value: str) -> str:
    """The key in a header Idempotency-Key: 1 to 255 characters, in quotes as its specification says, or bare.

    Raises BadCall.
    """
    quoted = _QUOTED_KEY.fullmatch(value)
    if quoted is not None:
        return re.sub(r'\\(["\\])', r"\1", quoted[1])
    if not _KEY.fullmatch(value):
        raise BadCall(INVALID_PARAMS, f"Idempotency-Key has 1 to {KEY_MAX} visible ASCII characters, or is quoted text")
    return value


# ---------------------------------------------------------------- writing


def outcome_headers(end: End) -> tuple[tuple[str, str], ...]:
    """How a request ended, for programs that look at headers. All comes from the outcome, nothing from payloads."""
    outcome = end.outcome
    elapsed_ms = outcome.elapsed_ms if end.meta is None else end.meta.elapsed_ms
    headers = [
        ("Broker-Outcome", outcome.kind.name),
        ("Broker-Retryable", "true" if outcome.retryable else "false"),
        ("Broker-Elapsed-Ms", f"{elapsed_ms:.3f}"),
    ]
    attempts = outcome.attempts if end.meta is None else end.meta.attempts
    if attempts > 1:
        headers.append(("Broker-Attempts", str(attempts)))
    if end.meta is not None and end.meta.repeated:
        headers.append(("Broker-Repeated", "true"))
    if outcome.kind.http in (429, 503):
        headers.append(("Retry-After", str(max(1, math.ceil((outcome.retry_after_ms or 0) / 1000)))))
    return tuple(headers)


def status_of(end: End) -> int:
    """The HTTP status of an outcome; a worker's own error is 500 unless its code says unknown method or bad params."""
    if end.outcome.kind is WORKER_ERROR and end.body is not None:
        return _STATUS_OF_WORKERS.get(msgspec.json.decode(end.body.raw, type=_Code).code, 500)
    return end.outcome.kind.http


def render(end: End, accepts: Accepts, size_max: int) -> Reply:
    """The answer to a call, of at most `size_max` bytes where attachments become base64.

    406 if the caller takes attachments only and the result is not just one.
    """
    headers, body = outcome_headers(end), end.body
    if body is None:
        return Reply(status_of(end), JSON, headers, b'{"error":%b}' % error_object(end.outcome))
    count = len(body.attachments)
    if end.outcome.kind is OK and accepts.octets and count == 1:
        return Reply(200, OCTETS, headers, bytes(body.attachments[0]))
    if count and body.expanded_size() > size_max:  # who takes attachments as they are takes more than fits as base64
        error = {"error": f"as base64 the answer is larger than {size_max} bytes", "status": 406}
        return Reply(406, JSON, headers, msgspec.json.encode(error))
    if end.outcome.kind is not OK:
        return Reply(status_of(end), JSON, headers, b'{"error":%b}' % expand(bytes(body.raw), body.attachments))
    if accepts.json:
        return Reply(200, JSON, headers, expand(bytes(body.raw), body.attachments) or b"null")
    error = {"error": f"the result has {count} attachments, not one; send Accept: application/json", "status": 406}
    return Reply(406, JSON, headers, msgspec.json.encode(error))


def encode_event(broadcast: Broadcast, epoch: str) -> bytes:
    """A broadcast as a server-sent event (HTML standard, section 9.2.6), its data in one line.

    Its number is the id, with the epoch within which it counts: `7.epoch`. `read_event_id` understands that.
    """
    data = expand(bytes(broadcast.body.raw), broadcast.body.attachments)
    # In JSON, line ends stand only between values; in an event, they would end the field.
    data = data.replace(b"\r", b" ").replace(b"\n", b" ")
    members = []
    if broadcast.endpoint is not None:
        members.append(b'"endpoint":"%b"' % broadcast.endpoint.encode())
    if broadcast.topic is not None:
        members.append(b'"topic":"%b"' % broadcast.topic.encode())
    if broadcast.seq is not None:
        members.append(b'"seq":%d' % broadcast.seq)
    members.append(b'"data":%b' % data)
    number = b"" if broadcast.seq is None else b"id: %d.%b\n" % (broadcast.seq, epoch.encode())
    return b"%bevent: message\ndata: {%b}\n\n" % (number, b",".join(members))


def read_event_id(text: str) -> tuple[int, str | None] | None:
    """The number and the epoch in a `Last-Event-ID`; the epoch may be missing. None for what was never an id here."""
    number, dot, epoch = text.strip().partition(".")
    if not (number.isascii() and number.isdigit()) or len(number) > 18:
        return None
    return int(number), epoch if dot else None
