"""Reads what the broker says: the envelope, and what stands in it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from broker.peer import errors
from broker.peer.calls import Heard, Pending
from broker.peer.errors import BadReply, BrokerError
from broker.peer.values import Attachments, ValueUnfit, decode
from broker.wire.attachments import AttachmentError, unpack


class Message(msgspec.Struct, gc=False):
    """The envelope; what stands in it is looked at when it is known what it is."""

    jsonrpc: Literal["2.0"]
    id: int | str | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"")
    result: msgspec.Raw = msgspec.Raw(b"")
    error: msgspec.Raw = msgspec.Raw(b"")
    meta: msgspec.Raw = msgspec.Raw(b"")


class Part(msgspec.Struct, gc=False):
    """`$/part`."""

    id: int | str
    seq: int
    data: msgspec.Raw = msgspec.Raw(b"")
    more: bool = False
    last: bool = False


class Credit(msgspec.Struct, gc=False):
    """`$/credit`: parts with `seq` below `upto` may be sent."""

    id: int | str
    upto: int


class SessionTold(msgspec.Struct):
    """`broker.session`: how to come back, whether this link took a session over, how much of ours has arrived."""

    id: str
    secret: str
    resumed: bool = False
    received: int = 0


class CallMeta(msgspec.Struct, gc=False):
    """What is said beside a request."""

    timeout: float | None = None
    trace: str | None = None
    idempotent: bool = False
    stream: str = "none"
    progress: bool | int | str | None = None
    caller: tuple[str, str] | None = None


class _Number(msgspec.Struct, gc=False):
    n: int = 0


class _ReplyMeta(msgspec.Struct):
    worker: str | None = None
    attempts: int = 0
    retryable: bool = False


class _TimingMeta(msgspec.Struct):
    timing: dict[str, float | None] | None = None


class _Error(msgspec.Struct):
    code: int
    message: str
    data: msgspec.Raw = msgspec.Raw(b"")


class _Broadcast(msgspec.Struct):
    endpoint: str | None = None
    topic: str | None = None
    seq: int | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Named(msgspec.Struct):
    id: str | int


class _ProgressValue(msgspec.Struct):
    """Ours; or the Language Server Protocol's, which counts in percent."""

    done: int | float | None = None
    total: int | float | None = None
    text: str | None = None
    percentage: int | float | None = None
    message: str | None = None


class _Progress(msgspec.Struct):
    id: int | str
    value: _ProgressValue


_decode_message = msgspec.json.Decoder(Message).decode
_decode_number = msgspec.json.Decoder(_Number).decode
_decode_call_meta = msgspec.json.Decoder(CallMeta).decode
_decode_reply_meta = msgspec.json.Decoder(_ReplyMeta).decode
_decode_timing = msgspec.json.Decoder(_TimingMeta).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_broadcast = msgspec.json.Decoder(_Broadcast).decode
_decode_named = msgspec.json.Decoder(_Named).decode
_decode_progress = msgspec.json.Decoder(_Progress).decode
decode_part = msgspec.json.Decoder(Part).decode
decode_credit = msgspec.json.Decoder(Credit).decode
decode_session = msgspec.json.Decoder(SessionTold).decode

_NO_META = CallMeta()


def read(payload: bytes, binary: bool) -> tuple[Message, Attachments]:
    """One message. Raises ValueError for what is none."""
    attachments: Attachments = ()
    if binary:
        try:
            payload, attachments = unpack(payload)
        except AttachmentError as error:
            raise ValueError(f"the broker sent a binary message that is damaged: {error}") from None
    try:
        return _decode_message(payload), attachments
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"the broker sent what is no JSON-RPC 2.0: {error}") from None


def number_of(meta: msgspec.Raw) -> int:
    """The number of a message in its session; 0 for none."""
    try:
        return _decode_number(meta).n
    except msgspec.DecodeError:
        return 0


def call_meta(meta: msgspec.Raw) -> CallMeta:
    """It only tells; what cannot be read is as if it were not there."""
    if len(meta):
        try:
            return _decode_call_meta(meta)
        except msgspec.DecodeError:
            pass
    return _NO_META


def acknowledged(params: msgspec.Raw) -> int:
    """How many of this peer's messages have arrived, as `$/ack` tells; 0 for what is none."""
    return number_of(params)


def timing_of(meta: msgspec.Raw) -> dict[str, Any] | None:
    """What a reply tells of its times."""
    try:
        return _decode_timing(meta).timing if len(meta) else None
    except msgspec.DecodeError:
        return None


def cancelled_id(params: msgspec.Raw) -> int | str | None:
    """Which request is cancelled; None for what names none."""
    try:
        return _decode_named(params).id
    except msgspec.DecodeError:
        return None


def progress_of(params: msgspec.Raw) -> tuple[int | str, float, float | None, str | None] | None:
    """Whose progress, how much is done, of how much, in words; None for what cannot be read."""
    try:
        told = _decode_progress(params)
    except (msgspec.DecodeError, RecursionError):
        return None
    value = told.value
    if value.done is None and value.percentage is not None:
        return told.id, value.percentage, 100, value.message or value.text
    return told.id, value.done or 0, value.total, value.text or value.message


def heard(message: Message, attachments: Attachments) -> Heard | None:
    """A broadcast; None where somebody published what cannot be read: nobody waits for it."""
    try:
        told = _decode_broadcast(message.params)
        return Heard(told.endpoint, told.topic, told.seq, decode(told.data, attachments))
    except (msgspec.DecodeError, ValueUnfit):
        return None


def where(call: Pending, now: float | None = None) -> dict[str, Any]:
    """What an exception says of its call."""
    facts: dict[str, Any] = {"endpoint": call.endpoint, "method": call.method}
    if now is not None:
        facts["elapsed_s"] = now - call.asked_at
    return facts


def error_of(message: Message, call: Pending, attachments: Attachments, now: float) -> BrokerError:
    """The exception for an error as it came."""
    meta = _ReplyMeta()
    try:
        if len(message.meta):
            meta = _decode_reply_meta(message.meta)
        error = _decode_error(message.error)
        data = decode(error.data, attachments) if len(error.data) else None
    except (msgspec.DecodeError, RecursionError, ValueUnfit) as fault:
        return BadReply(f"the error cannot be read: {fault}", **where(call, now))
    return errors.from_reply(
        error.code,
        error.message,
        data,
        endpoint=call.endpoint,
        method=call.method,
        worker=meta.worker,
        attempts=meta.attempts,
        retryable=meta.retryable,
        elapsed_s=now - call.asked_at,
    )
