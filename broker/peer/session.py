"""The SDK's side of a session as a machine: what it asks, what it is asked, and what becomes of it. No I/O, no clock.

    ask() ──▸ outbox ──▸ written ──▸ Ended            every call ends once: by a reply, by `expire` a little after
                 ▲          │                         its deadline, by `cancel`, or when the link breaks
                 └──────────┘ the link broke and it may be sent again

Whoever runs it moves `outbox` to the link (`take`, `took`), feeds what the link brings (`receive`, `attached`,
`detached`), calls `expire` when `next_deadline()` has come, and performs what these return. `now` is in seconds, on
any clock that never goes back. Ids are numbers that are never used twice in the life of a session.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import msgspec

from broker.core.access import NAME
from broker.core.deadlines import Deadlines
from broker.peer import errors
from broker.peer.errors import BadReply, BrokerError, Cancelled, ConnectionLost, DeadlineExceeded, InvalidRequest
from broker.peer.values import Attachments, ValueUnfit, decode
from broker.wire.attachments import AttachmentError, pack, unpack

GUARD_S = 1.0
"""how long after its deadline a call waits for the broker's word before it is ended here; the broker promises 0.25"""
SLOT_S = 0.25
MESSAGE_MAX_BYTES = 16 << 20
"""a larger message is refused here: the broker would close the link for it, and with it everybody's calls"""
SENT_MAX = 2
"""how often a call is put on the wire over all links, so that one that breaks them does not do so for ever"""

_METHOD = re.compile(rf"(?:(?P<endpoint>{NAME.pattern})/)?(?P<method>{NAME.pattern})")

Pieces: TypeAlias = list["bytes | memoryview"]


class _Message(msgspec.Struct, gc=False):
    jsonrpc: Literal["2.0"]
    id: int | str | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"")
    result: msgspec.Raw = msgspec.Raw(b"")
    error: msgspec.Raw = msgspec.Raw(b"")
    meta: msgspec.Raw = msgspec.Raw(b"")


class _Error(msgspec.Struct):
    code: int
    message: str
    data: msgspec.Raw = msgspec.Raw(b"")


class _ReplyMeta(msgspec.Struct):
    worker: str | None = None
    attempts: int = 0
    retryable: bool = False


class _CallMeta(msgspec.Struct):
    timeout: float | None = None
    trace: str | None = None
    idempotent: bool = False


class _Broadcast(msgspec.Struct):
    endpoint: str | None = None
    topic: str | None = None
    seq: int | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Cancel(msgspec.Struct):
    id: str | int


_decode_message = msgspec.json.Decoder(_Message).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_reply_meta = msgspec.json.Decoder(_ReplyMeta).decode
_decode_call_meta = msgspec.json.Decoder(_CallMeta).decode
_decode_broadcast = msgspec.json.Decoder(_Broadcast).decode
_decode_cancel = msgspec.json.Decoder(_Cancel).decode
_encode = msgspec.json.Encoder().encode


# ---------------------------------------------------------------- what is asked, what comes of it


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a call asks of the broker. `timeout` in seconds; None leaves it to the broker and sets no guard here."""

    timeout: float | None = None
    idempotent: bool = False
    retries: int | None = None
    wait: bool = False
    trace: str | None = None

    def check(self) -> None:
        """Raises InvalidRequest for what the broker would refuse."""
        timeout = self.timeout
        if timeout is not None and not 0 < timeout < float("inf"):
            raise InvalidRequest(f"timeout {timeout!r} is not a positive number of seconds")
        if self.retries and not self.idempotent:
            raise InvalidRequest("retries needs idempotent=True; what is not idempotent runs at most once")

    def less(self, spent_s: float) -> Options:
        """The same with less time: what was spent before the request could be made."""
        if self.timeout is None:
            return self
        return msgspec.structs.replace(self, timeout=max(self.timeout - spent_s, 0.001))

    def meta(self, left_s: float | None) -> dict[str, Any]:
        """The member `meta`, with what is left of the time."""
        meta: dict[str, Any] = {}
        if left_s is not None:
            meta["timeout"] = left_s
        if self.idempotent:
            meta["idempotent"] = True
        if self.retries is not None:
            meta["retries"] = self.retries
        if self.wait:
            meta["wait"] = True
        if self.trace is not None:
            meta["trace"] = self.trace
        return meta


DEFAULT_OPTIONS = Options()


class Pending:
    """One call that has not ended.

    `waiter` is the owner's, to know whom to tell; `mark` is the link's byte count behind it once it was taken, None
    before; `reached` whether the whole of it was written to a link that broke, so that it may have run; `standing` is
    the key of what is repeated on every link.
    """

    __slots__ = (
        "asked_at", "attachments", "deadline", "endpoint", "id", "mark", "method", "options", "params", "reached",
        "sent", "slot", "standing", "waiter",
    )  # fmt: skip

    def __init__(
        self, number: int, endpoint: str, method: str, params: bytes, attachments: Attachments, options: Options,
        waiter: Any, now: float,
    ) -> None:  # fmt: skip
        self.id = number
        self.endpoint = endpoint
        self.method = method
        self.params = params
        self.attachments = attachments
        self.options = options
        self.waiter = waiter
        self.asked_at = now
        self.deadline = None if options.timeout is None else now + options.timeout
        self.slot: dict[Pending, None] | None = None
        self.mark: int | None = None
        self.sent = 0
        self.reached = False
        self.standing: tuple[str, ...] | None = None


class Ended(msgspec.Struct, frozen=True, gc=False):
    """A call has ended: with a value, or with an error."""

    call: Pending
    value: Any = None
    error: BrokerError | None = None


class Asked(msgspec.Struct, frozen=True, gc=False):
    """The broker gives this peer a request; `id` None is a notification, which nobody waits for.

    `timeout` is what is left of its deadline, in seconds.
    """

    id: int | str | None
    endpoint: str
    method: str
    params: msgspec.Raw
    attachments: Attachments
    timeout: float | None = None
    trace: str | None = None
    idempotent: bool = False


class CancelAsked(msgspec.Struct, frozen=True, gc=False):
    """Nobody waits any more for the answer to this request."""

    id: int | str


class Heard(msgspec.Struct, frozen=True, gc=False):
    """A broadcast. `seq` counts per endpoint and topic; None where nothing is counted."""

    endpoint: str | None
    topic: str | None
    seq: int | None
    data: Any


Result: TypeAlias = Ended | Asked | CancelAsked | Heard


class Frame:
    """One message for the link; `call` is whose it is, if a call's, which is encoded when it is taken."""

    __slots__ = ("binary", "call", "pieces")

    def __init__(self, pieces: Pieces, binary: bool, call: Pending | None = None) -> None:
        self.pieces = pieces
        self.binary = binary
        self.call = call


@lru_cache(maxsize=4096)
def split_method(text: str) -> tuple[str, str, bytes]:
    """Endpoint ("" for the broker's own methods), method, and the whole as it is written. Raises InvalidRequest."""
    match = _METHOD.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match["endpoint"] is None and not text.startswith("broker.")):
        shown = f"{text!r:.140}"
        raise InvalidRequest(
            f"{shown} is not of the form endpoint/method; names are 1 to 128 of A-Z a-z 0-9 _ . - "
            "and begin with none of . -"
        )
    return match["endpoint"] or "", match["method"], text.encode()


# ---------------------------------------------------------------- the machine


class Session:
    """One peer's conversation with one broker, over one link after the other."""

    __slots__ = ("_attempts", "_deadlines", "_made", "_standing", "linked", "outbox", "pending")

    def __init__(self) -> None:
        self.pending: dict[int, Pending] = {}
        self.outbox: deque[Frame] = deque()
        self.linked = False
        self._attempts: dict[int | str, Asked] = {}
        self._standing: dict[tuple[str, ...], tuple[str, bytes]] = {}
        self._deadlines: Deadlines[Pending] = Deadlines(SLOT_S)
        self._made = 0

    @property
    def attempts(self) -> int:
        """Requests this peer has been given and not answered."""
        return len(self._attempts)

    # ------------------------------------------------------------ asking

    def ask(
        self, name: str, params: bytes, attachments: Attachments, options: Options, waiter: Any, now: float
    ) -> Pending:
        """Ask `endpoint/method`, or one of the broker's own methods; `params` is JSON text, empty for none.

        Without a link the call waits for one, until its deadline. Raises InvalidRequest and TooLarge; then nothing
        was asked.
        """
        endpoint, method, _ = split_method(name)
        if options is not DEFAULT_OPTIONS:
            options.check()
        _check_size(name, params, attachments)
        self._made += 1
        call = Pending(self._made, endpoint, method, params, attachments, options, waiter, now)
        self.pending[call.id] = call
        if call.deadline is not None:
            call.slot = self._deadlines.add(call, call.deadline + GUARD_S)
        self.outbox.append(Frame([], False, call))
        return call

    def notify(self, name: str, params: bytes, attachments: Attachments) -> None:
        """Tell `endpoint/method` something, without an answer. Raises ConnectionLost if there is no link."""
        endpoint, method, written = split_method(name)
        _check_size(name, params, attachments)
        if not self.linked:
            raise ConnectionLost("there is no connection to the broker now", endpoint=endpoint, method=method)
        self.outbox.append(_frame([b'{"jsonrpc":"2.0","method":"%b"' % written, *_params(params), b"}"], attachments))

    def cancel(self, call: Pending) -> Ended | None:
        """Take a call back: it has ended at once, and the broker is told. None if it had ended before."""
        if self._close(call) is None:
            return None
        self._tell_cancel(call)
        return Ended(call, error=Cancelled("taken back here", **_where(call)))

    def stand(self, key: tuple[str, ...], name: str, params: bytes) -> None:
        """Repeat this request on every later link: what a session serves or listens to."""
        self._standing[key] = (name, params)

    def unstand(self, key: tuple[str, ...]) -> bool:
        """Repeat it no more; whether it was."""
        return self._standing.pop(key, None) is not None

    # ------------------------------------------------------------ answering

    def answer(self, number: int | str, result: bytes, attachments: Attachments = ()) -> bool:
        """The result of a request, as JSON text. False if nobody waits for it any more, or it is too large."""
        asked = self._attempts.get(number)
        if asked is None:
            return False
        if len(result) + sum(map(len, attachments)) > MESSAGE_MAX_BYTES - 4096:
            size = len(result) + sum(map(len, attachments))
            detail = f"the result of {size} bytes is above the bound of {MESSAGE_MAX_BYTES} bytes for a message"
            self.fail(number, -32000, detail, {"type": "TooLarge", "message": detail})
            return False
        del self._attempts[number]
        head = b'{"jsonrpc":"2.0","id":%b,"result":' % _encode(number)
        self.outbox.append(_frame([head, result, b"}"], attachments))
        return True

    def fail(self, number: int | str, code: int, message: str, data: Any = None, *, retryable: bool = False) -> bool:
        """The error that ends a request. `data` must be JSON. False if nobody waits for it any more."""
        if self._attempts.pop(number, None) is None:
            return False
        error: dict[str, Any] = {"code": code, "message": message}
        if data is not None:
            error["data"] = data
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "error": error}
        if retryable:
            reply["meta"] = {"retryable": True}
        self.outbox.append(Frame([_encode(reply)], False))
        return True

    # ------------------------------------------------------------ the link

    def attached(self, now: float) -> None:
        """There is a link, new and empty: what stands is asked on it first, then what waited."""
        self.linked = True
        standing = []
        for key, (name, params) in self._standing.items():
            self._made += 1
            call = Pending(self._made, "", name, params, (), DEFAULT_OPTIONS, None, now)
            call.standing = key
            self.pending[call.id] = call
            standing.append(Frame([], False, call))
        self.outbox.extendleft(reversed(standing))

    def take(self, now: float) -> Frame | None:
        """The next message for the link, None if there is none. Calls whose time is up are passed over."""
        outbox = self.outbox
        while outbox:
            frame = outbox.popleft()
            call = frame.call
            if call is None:
                return frame
            if call.id in self.pending and (call.deadline is None or call.deadline > now):
                _write(frame, call, now)
                call.sent += 1
                return frame
        return None

    def detached(self, flushed: int, why: str, *, come_back: bool) -> list[Result]:
        """The link is gone, of whose bytes `flushed` were written; `come_back` says whether there will be another.

        Calls that were never written whole, and idempotent ones, wait for the next link; the others have ended, and
        so has whatever this peer was asked.
        """
        self.linked = False
        results: list[Result] = [CancelAsked(number) for number in self._attempts]
        self._attempts.clear()
        self.outbox.clear()
        for call in list(self.pending.values()):
            written = call.mark is not None and call.mark <= flushed
            call.mark = None
            call.reached = call.reached or written
            again = call.options.idempotent or not written
            if come_back and again and not call.standing and call.sent < SENT_MAX:
                self.outbox.append(Frame([], False, call))
                continue
            self._close(call)
            if not call.standing:
                error = ConnectionLost(why, may_have_executed=call.reached, **_where(call))
                results.append(Ended(call, error=error))
        return results

    def receive(self, payload: bytes, binary: bool, now: float) -> Result | None:
        """One message of the broker; what it means, None for nothing. Raises ValueError if it is none at all."""
        attachments: Attachments = ()
        if binary:
            try:
                payload, attachments = unpack(payload)
            except AttachmentError as error:
                raise ValueError(f"the broker sent a binary message that is damaged: {error}") from None
        try:
            message = _decode_message(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"the broker sent what is no JSON-RPC 2.0: {error}") from None
        if message.method is None:
            return self._replied(message, attachments, now)
        if message.method == "broker.message":
            return _heard(message, attachments)
        if message.method == "$/cancelRequest":
            return self._cancel_asked(message)
        return self._asked(message, message.method, attachments)

    # ------------------------------------------------------------ time

    def next_deadline(self) -> float:
        """When `expire` wants to be called next; infinity if nothing is due ever."""
        return self._deadlines.earliest

    def expire(self, now: float) -> list[Result]:
        """End the calls whose deadline passed without a word of the broker."""
        results: list[Result] = []
        for call in self._deadlines.take_due(now, 1 << 30):
            call.slot = None
            self._close(call)
            results.append(Ended(call, error=self._too_late(call, now)))
            if self.linked:
                self._tell_cancel(call)
        return results

    def _too_late(self, call: Pending, now: float) -> BrokerError:
        where = _where(call, now)
        if self.linked:
            return DeadlineExceeded("the broker has not answered in time", **where)
        reason = "there was no connection to the broker when the deadline passed"
        return ConnectionLost(reason, may_have_executed=call.reached, **where)

    # ------------------------------------------------------------ details

    def _close(self, call: Pending) -> Pending | None:
        if self.pending.pop(call.id, None) is None:
            return None
        if call.slot is not None:
            call.slot.pop(call, None)
            call.slot = None
        return call

    def _tell_cancel(self, call: Pending) -> None:
        if self.linked and call.mark is not None:
            text = b'{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":%d}}' % call.id
            self.outbox.append(Frame([text], False))

    def _replied(self, message: _Message, attachments: Attachments, now: float) -> Result | None:
        number = message.id
        call = self.pending.get(number) if type(number) is int else None
        if call is None:
            return None  # an answer to what has ended here, or to a notification
        self._close(call)
        if len(message.error):
            return Ended(call, error=_error(message, call, attachments, now))
        if call.standing:
            return Ended(call)
        try:
            return Ended(call, decode(message.result, attachments))
        except ValueUnfit as error:
            return Ended(call, error=BadReply(f"the result cannot be read: {error}", **_where(call, now)))

    def _asked(self, message: _Message, name: str, attachments: Attachments) -> Result | None:
        endpoint, _, method = name.partition("/")
        meta = _CallMeta()
        if len(message.meta):
            try:
                meta = _decode_call_meta(message.meta)
            except msgspec.DecodeError:
                pass  # it only tells; what cannot be read is as if it were not there
        asked = Asked(
            message.id, endpoint, method, message.params, attachments, meta.timeout, meta.trace, meta.idempotent
        )
        if message.id is not None:
            self._attempts[message.id] = asked
        return asked

    def _cancel_asked(self, message: _Message) -> Result | None:
        try:
            number = _decode_cancel(message.params).id
        except msgspec.DecodeError:
            return None
        return CancelAsked(number) if self._attempts.pop(number, None) is not None else None


def _check_size(name: str, params: bytes, attachments: Attachments) -> None:
    size = len(params) + sum(map(len, attachments))
    if size > MESSAGE_MAX_BYTES - 4096:  # room for the envelope and the table of offsets
        endpoint, method, _ = split_method(name)
        detail = f"a message of {size} bytes is above the bound of {MESSAGE_MAX_BYTES} bytes"
        raise errors.TooLarge(detail, endpoint=endpoint, method=method)


def _params(params: bytes) -> Sequence[bytes]:
    return (b',"params":', params) if params else ()


def _frame(text: Pieces, attachments: Attachments) -> Frame:
    if attachments:
        return Frame(pack(text, attachments), True)
    return Frame(text, False)


def _write(frame: Frame, call: Pending, now: float) -> None:
    """Encode a call with what is left of its time now."""
    name = f"{call.endpoint}/{call.method}" if call.endpoint else call.method
    text: Pieces = [b'{"jsonrpc":"2.0","id":%d,"method":"%b"' % (call.id, name.encode())]
    if call.params:
        text += (b',"params":', call.params)
    options = call.options
    if options is not DEFAULT_OPTIONS:
        left_s = None if call.deadline is None else round(call.deadline - now, 4) or 0.0001
        if left_s is not None and not (options.idempotent or options.wait or options.trace or options.retries):
            text.append(b',"meta":{"timeout":%b}' % repr(left_s).encode())
        else:
            text.append(b',"meta":' + _encode(options.meta(left_s)))
    text.append(b"}")
    if call.attachments:
        frame.pieces, frame.binary = pack(text, call.attachments), True
    else:
        frame.pieces = text


def _where(call: Pending, now: float | None = None) -> dict[str, Any]:
    where: dict[str, Any] = {"endpoint": call.endpoint, "method": call.method}
    if now is not None:
        where["elapsed_s"] = now - call.asked_at
    return where


def _error(message: _Message, call: Pending, attachments: Attachments, now: float) -> BrokerError:
    """The exception for an error as it came."""
    meta = _ReplyMeta()
    try:
        if len(message.meta):
            meta = _decode_reply_meta(message.meta)
        error = _decode_error(message.error)
        data = decode(error.data, attachments) if len(error.data) else None
    except (msgspec.DecodeError, RecursionError, ValueUnfit) as fault:
        return BadReply(f"the error cannot be read: {fault}", **_where(call, now))
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


def _heard(message: _Message, attachments: Attachments) -> Heard | None:
    try:
        told = _decode_broadcast(message.params)
        return Heard(told.endpoint, told.topic, told.seq, decode(told.data, attachments))
    except (msgspec.DecodeError, ValueUnfit):
        return None  # somebody published what cannot be read; nobody waits for it
