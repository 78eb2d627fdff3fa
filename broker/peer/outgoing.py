"""Writes what is said to the broker."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.peer.calls import DEFAULT_OPTIONS, Frame, Pending, Pieces
from broker.peer.values import Attachments
from broker.wire.attachments import pack

UNKNOWN_MARK = b'{"$joined":{"bytes":0,"crc32":0}}'
"""stands for params that come in pieces; the true mark follows them"""

encode = msgspec.json.Encoder().encode


def frame_of(text: Pieces, attachments: Attachments = ()) -> Frame:
    """A message; with attachments a binary one."""
    if attachments:
        return Frame(pack(text, attachments), True)
    return Frame(text, False)


def write_call(frame: Frame, call: Pending, now: float, *, sends: bool, params_follow: bool) -> None:
    """Put a call into its frame, with what is left of its time now."""
    name = f"{call.endpoint}/{call.method}" if call.endpoint else call.method
    text: Pieces = [b'{"jsonrpc":"2.0","id":%d,"method":"%b"' % (call.id, name.encode())]
    params, attachments = (UNKNOWN_MARK, ()) if params_follow else (call.params, call.attachments)
    if params:
        text += (b',"params":', params)
    options = call.options
    if sends or options is not DEFAULT_OPTIONS:
        left_s = None if call.deadline is None else round(call.deadline - now, 4) or 0.0001
        if sends:
            text.append(b',"meta":' + encode(options.meta(left_s) | {"stream": "both"}))
        elif left_s is not None and options.is_plain:
            text.append(b',"meta":{"timeout":%b}' % repr(left_s).encode())
        else:
            text.append(b',"meta":' + encode(options.meta(left_s)))
    text.append(b"}")
    if attachments:
        frame.pieces, frame.binary = pack(text, attachments), True
    else:
        frame.pieces = text


def notification(name: bytes, params: bytes, attachments: Attachments) -> Frame:
    """A call nobody waits for."""
    said: Pieces = [b',"params":', params] if params else []
    return frame_of([b'{"jsonrpc":"2.0","method":"%b"' % name, *said, b"}"], attachments)


def result(hop: bytes, raw: bytes, attachments: Attachments) -> Frame:
    """The answer to the request with this id (JSON text)."""
    return frame_of([b'{"jsonrpc":"2.0","id":%b,"result":' % hop, raw, b"}"], attachments)


def failure(number: int | str, code: int, message: str, data: Any, *, retryable: bool) -> Frame:
    """The error that ends a request."""
    error: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    reply: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "error": error}
    if retryable:
        reply["meta"] = {"retryable": True}
    return Frame([encode(reply)], False)


def part(hop: bytes, seq: int, data: bytes, attachments: Attachments, flag: bytes = b"") -> Frame:
    """One part of a stream; `flag` is a member more, as JSON text with its comma."""
    head = b'{"jsonrpc":"2.0","method":"$/part","params":{"id":%b,"seq":%d%b,"data":' % (hop, seq, flag)
    return frame_of([head, data, b"}}"], attachments)


def credit(hop: bytes, upto: int) -> Frame:
    """Parts below this may come."""
    return Frame([b'{"jsonrpc":"2.0","method":"$/credit","params":{"id":%b,"upto":%d}}' % (hop, upto)], False)


def progress(number: int | str, done: float, total: float | None, text: str | None) -> Frame:
    """How far a request is."""
    value: dict[str, Any] = {"done": done}
    if total is not None:
        value["total"] = total
    if text is not None:
        value["text"] = text
    params = b'{"id":%b,"value":%b}' % (encode(number), encode(value))
    return Frame([b'{"jsonrpc":"2.0","method":"$/progress","params":', params, b"}"], False)


def cancel(number: int) -> bytes:
    """Nobody waits for this call any more."""
    return b'{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":%d}}' % number


def acknowledgement(n: int) -> Frame:
    """All messages up to this have come."""
    return Frame([b'{"jsonrpc":"2.0","method":"$/ack","params":{"n":%d}}' % n], False)
