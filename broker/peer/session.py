"""The SDK's side of a session as a machine: what it asks, what it is asked, and what becomes of it. No I/O, no clock.

    ask() ──▸ outbox ──▸ written ──▸ Ended            every call ends once: by a reply, by `expire` a little after
                 ▲          │                         its deadline, by `cancel`, or when the session is over
                 └──────────┘ the session was lost and it may be sent again

Whoever runs it moves `outbox` to the link (`take`), feeds what the link brings (`receive`, `attached`, `detached`),
calls `expire` when `next_deadline()` has come, and performs what these return. `now` is in seconds, on any clock that
never goes back. Ids are numbers that are never used twice in the life of a session.

Without grace a session is over when its link breaks. With grace it waits for the next one: `resume` says what to offer
when it is opened, and nothing is sent on it until the broker has told whether it took the session over. If so, what
had not arrived is sent again, in order, and nothing else has happened; if not, the session is over, and a new one
begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from broker.core.deadlines import Deadlines
from broker.peer import errors, incoming, outgoing
from broker.peer.calls import (
    DEFAULT_OPTIONS,
    Asked,
    CancelAsked,
    Ended,
    Frame,
    Heard,
    Item,
    ItemsEnded,
    Options,
    Owner,
    Pending,
    ProgressCame,
    Reader,
    Result,
    Room,
    size_of,
    split_method,
)
from broker.peer.errors import BadReply, BrokerError, Cancelled, ConnectionLost, DeadlineExceeded, InvalidRequest
from broker.peer.incoming import Message, where
from broker.peer.kept import Kept
from broker.peer.streams import (
    JOINED_MAX_BYTES,
    Stream,
    StreamFault,
    Value,
    ValueTooLarge,
)
from broker.peer.values import Attachments, ValueUnfit, decode
from broker.wire.pieces import is_mark

__all__ = [
    "DEFAULT_OPTIONS", "GUARD_S", "JOINED_MAX_BYTES", "MESSAGE_MAX_BYTES", "SENT_MAX", "SLOT_S", "VALUE_MAX_BYTES",
    "Asked", "CancelAsked", "Ended", "Frame", "Heard", "Item", "ItemsEnded", "Options", "Owner", "Pending",
    "ProgressCame", "Reader", "Result", "Room", "Session", "split_method",
]  # fmt: skip

GUARD_S = 1.0
"""how long after its deadline a call waits for the broker's word before it is ended here; the broker promises 0.25"""
SLOT_S = 0.25
MESSAGE_MAX_BYTES = 16 << 20
"""a larger message is never sent: the broker would close the link for it, and with it everybody's calls"""
VALUE_MAX_BYTES = MESSAGE_MAX_BYTES - 4096
"""larger params and results travel in pieces; the rest is room for the envelope and the table of offsets"""
SENT_MAX = 2
"""in how many sessions a call is put on the wire, so that one that breaks them does not do so for ever"""

Told: TypeAlias = Callable[[Any], None]
_STREAMS_IN = ("in", "both")
_STREAMS_OUT = ("out", "both")


class Session:
    """One peer's conversation with one broker, over one link after the other.

    `grace_s` is for how many seconds the broker shall keep the session when a link breaks, `value_max_bytes` how large
    a value may be that comes or goes in pieces.
    """

    __slots__ = (
        "_attempts", "_deadlines", "_kept", "_made", "_standing", "_streams", "_why", "grace_s", "linked", "outbox",
        "pending", "ready", "value_max_bytes",
    )  # fmt: skip

    def __init__(self, grace_s: float = 0.0, *, value_max_bytes: int = JOINED_MAX_BYTES) -> None:
        self.grace_s = grace_s
        self.value_max_bytes = value_max_bytes
        self.pending: dict[int, Pending] = {}
        self.outbox: deque[Frame] = deque()
        self.linked = False
        """whether there is a link"""
        self.ready = False
        """whether it may be used: with grace, whether the broker has told what became of the session"""
        self._attempts: dict[int | str, Asked] = {}
        self._streams: dict[Owner, Stream] = {}
        self._standing: dict[tuple[str, ...], tuple[str, bytes, Told | None]] = {}
        self._deadlines: Deadlines[Pending] = Deadlines(SLOT_S)
        self._kept: Kept | None = None
        self._why = ""
        self._made = 0

    @property
    def attempts(self) -> int:
        """Requests this peer has been given and not answered."""
        return len(self._attempts)

    @property
    def has_unsent(self) -> bool:
        """Whether anything waits for the link, or for its receiver to take more."""
        return bool(self.outbox) or any(not stream.outgoing.is_empty for stream in self._streams.values())

    @property
    def resume(self) -> tuple[str, str, int] | None:
        """What the next link offers to go on with: the session's id, its secret, the last message that came.

        None if there is nothing to go on with, or going on breaks every link.
        """
        kept = self._kept
        return None if kept is None or kept.is_given_up else (kept.id, kept.secret, kept.received)

    def forget(self) -> None:
        """Offer no more to go on: the next link begins a session anew."""
        if self._kept is not None:
            self._kept.give_up()

    # ------------------------------------------------------------ asking

    def ask(
        self, name: str, params: bytes, attachments: Attachments, options: Options, waiter: Any, now: float, *,
        reader: Reader | None = None, sends: bool = False,
    ) -> Pending:  # fmt: skip
        """Ask `endpoint/method`, or one of the broker's own methods; `params` is JSON text, empty for none.

        Items of a streamed reply go to `reader`; without one they are gathered, and their list is the value. With
        `sends` items follow (`send_item`). Params above 16 MiB travel in pieces by themselves. Without a link the
        call waits for one, until its deadline. Raises InvalidRequest and TooLarge; then nothing was asked.
        """
        endpoint, method, _ = split_method(name)
        if options is not DEFAULT_OPTIONS:
            options.check()
        is_large = size_of(params, attachments) > VALUE_MAX_BYTES
        if is_large or sends:
            self._check_sending(name, params, attachments, options)
        self._made += 1
        call = Pending(self._made, endpoint, method, params, attachments, options, waiter, now)
        self.pending[call.id] = call
        if call.deadline is not None:
            call.slot = self._deadlines.add(call, call.deadline + GUARD_S)
        self.outbox.append(Frame([], False, call))
        call.reader = reader
        if is_large or sends:
            call.sends = sends
            stream = self._stream(call)
            if is_large:
                stream.outgoing.give_params(params, attachments, last=not sends)
            self._list(stream)
        return call

    def _check_sending(self, name: str, params: bytes, attachments: Attachments, options: Options) -> None:
        endpoint, method, _ = split_method(name)
        if options.key is not None and size_of(params, attachments) <= VALUE_MAX_BYTES:
            detail = "a request with a key sends no items: a repeat of it could not be compared"
            raise InvalidRequest(detail, endpoint=endpoint, method=method)
        most = VALUE_MAX_BYTES if options.key is not None or not endpoint else self.value_max_bytes
        _check_size(name, params, attachments, most)

    def notify(self, name: str, params: bytes, attachments: Attachments) -> None:
        """Tell `endpoint/method` something, without an answer. Raises ConnectionLost if there is no link."""
        endpoint, method, written = split_method(name)
        _check_size(name, params, attachments, VALUE_MAX_BYTES)
        if not self.linked:
            raise ConnectionLost("there is no connection to the broker now", endpoint=endpoint, method=method)
        self.outbox.append(outgoing.notification(written, params, attachments))

    def cancel(self, call: Pending) -> Ended | None:
        """Take a call back: it has ended at once, and the broker is told. None if it had ended before."""
        if self._close(call) is None:
            return None
        self._tell_cancel(call)
        return Ended(call, error=Cancelled("taken back here", **where(call)))

    def stand(self, key: tuple[str, ...], name: str, params: bytes, told: Told | None = None) -> None:
        """Repeat this request in every later session: what this peer serves or listens to. `told` gets the result."""
        self._standing[key] = (name, params, told)

    def stood(self, key: tuple[str, ...], value: object) -> None:
        """What stands under this key has been repeated."""
        told = self._standing[key][2] if key in self._standing else None
        if told is not None:
            told(value)

    def unstand(self, key: tuple[str, ...]) -> bool:
        """Repeat it no more; whether it was."""
        return self._standing.pop(key, None) is not None

    # ------------------------------------------------------------ answering

    def answer(self, number: int | str, result: bytes, attachments: Attachments = ()) -> bool:
        """The result of a request, as JSON text; it goes after all its items, and above 16 MiB in pieces.

        False if nobody waits for it any more, or it is too large.
        """
        stream = self._streams.get(number)
        if number not in self._attempts or (stream is not None and stream.is_answered):
            return False
        size = size_of(result, attachments)
        if size <= VALUE_MAX_BYTES and (stream is None or stream.outgoing.is_empty):
            self._end_attempt(number)
            self.outbox.append(outgoing.result(outgoing.encode(number), result, attachments))
            return True
        if size > self.value_max_bytes:
            detail = f"the result of {size} bytes is above the bound of {self.value_max_bytes} bytes"
            self.fail(number, -32000, detail, {"type": "TooLarge", "message": detail})
            return False
        stream = self._stream(number)
        stream.is_answered = True
        stream.outgoing.give_reply(result, attachments, cut=size > VALUE_MAX_BYTES)
        self._list(stream)
        return True

    def fail(self, number: int | str, code: int, message: str, data: Any = None, *, retryable: bool = False) -> bool:
        """The error that ends a request, after its items. `data` must be JSON. False if nobody waits any more."""
        stream = self._streams.get(number)
        if number not in self._attempts or (stream is not None and stream.is_answered):
            return False
        frame = outgoing.failure(number, code, message, data, retryable=retryable)
        if stream is None or stream.outgoing.is_empty:
            self._end_attempt(number)
            self.outbox.append(frame)
        else:
            stream.is_answered = True
            stream.outgoing.give_frame(frame)
        return True

    def progress(self, number: int | str, done: float, total: float | None = None, text: str | None = None) -> bool:
        """How far a request is. False if nobody wants to know, or the link has no room for it now: then it is lost."""
        asked = self._attempts.get(number)
        if asked is None or not asked.progress or not self.ready or self.outbox:
            return False
        self.outbox.append(outgoing.progress(number, done, total, text))
        return True

    # ------------------------------------------------------------ streams

    def send_item(self, owner: Owner, raw: bytes, attachments: Attachments = (), *, last: bool = False) -> bool:
        """One more item, as JSON text; above 256 KiB it travels in pieces. It waits until its receiver takes it.

        With `last` there will be no more; then an empty or null one only says so. False if nobody waits any more, or
        the last was given before. Raises TooLarge.
        """
        if not self._takes_items(owner):
            return False
        if size_of(raw, attachments) > self.value_max_bytes:
            detail = f"an item of {size_of(raw, attachments)} bytes is above the bound of {self.value_max_bytes} bytes"
            raise errors.TooLarge(detail)
        stream = self._stream(owner)
        if stream.outgoing.ended:
            return False
        stream.outgoing.give_item(raw, attachments, last=last)
        self._list(stream)
        return True

    def has_room(self, owner: Owner) -> bool:
        """Whether all items given so far are on their way: nothing waits for credit, or for the link."""
        stream = self._streams.get(owner)
        return stream is None or stream.outgoing.is_empty

    def consumed(self, owner: Owner, items: int = 1) -> None:
        """So many of the items that came were read: more may come."""
        stream = self._streams.get(owner)
        if stream is not None:
            stream.incoming.take_up(items)
            self._grant(stream)

    def is_awaited(self, owner: Owner) -> bool:
        """Whether anybody still waits for this stream."""
        if isinstance(owner, Pending):
            return owner.id in self.pending
        return owner in self._attempts

    def _takes_items(self, owner: Owner) -> bool:
        return self.is_awaited(owner) and (not isinstance(owner, Pending) or owner.sends)

    def _stream(self, owner: Owner) -> Stream:
        stream = self._streams.get(owner)
        if stream is None:
            if isinstance(owner, Pending):
                stream = Stream(owner, b"%d" % owner.id, is_open=owner.mark is not None)
            else:
                stream = Stream(owner, outgoing.encode(owner), is_open=True)
            self._streams[owner] = stream
        return stream

    def _list(self, stream: Stream) -> None:
        """Give its next part a place in the outbox, if it may go."""
        if not stream.is_listed and stream.outgoing.may_send:
            stream.is_listed = True
            self.outbox.append(Frame([], False, None, stream))

    def _grant(self, stream: Stream) -> None:
        upto = stream.incoming.grant()
        if upto:
            self.outbox.append(outgoing.credit(stream.hop, upto))

    # ------------------------------------------------------------ the link

    def attached(self, now: float) -> None:
        """There is a link, new and empty. With grace the broker speaks first; without, what stands is asked at once."""
        self.linked = True
        if not self.grace_s:
            self._begin(now)

    def _begin(self, now: float) -> None:
        """A new session: what stands is asked first, then what waited."""
        self.ready = True
        standing = []
        for key, (name, params, _) in self._standing.items():
            self._made += 1
            call = Pending(self._made, "", name, params, (), DEFAULT_OPTIONS, None, now)
            call.standing = key
            self.pending[call.id] = call
            standing.append(Frame([], False, call))
        self.outbox.extendleft(reversed(standing))

    def take(self, now: float) -> Frame | None:
        """The next message for the link, None if there is none. Calls whose time is up are passed over."""
        if not self.ready:
            return None
        outbox, kept = self.outbox, self._kept
        while outbox:
            frame = outbox.popleft()
            call = frame.call
            if kept is not None and frame.number:
                return frame  # as it was
            if call is not None:
                if call.id not in self.pending or (call.deadline is not None and call.deadline <= now):
                    continue
                self._write_call(frame, call, now)
            elif frame.stream is not None:
                made = self._next_part(frame, frame.stream)
                if made is None:
                    continue
                frame = made
            if kept is not None:
                kept.add(frame)
            return frame
        return None

    def _write_call(self, frame: Frame, call: Pending, now: float) -> None:
        call.sent += 1
        stream = self._streams.get(call) if self._streams else None
        if stream is None:
            outgoing.write_call(frame, call, now, sends=False, params_follow=False)
        else:
            stream.is_open = True
            outgoing.write_call(frame, call, now, sends=True, params_follow=stream.outgoing.has_params)

    def _next_part(self, place: Frame, stream: Stream) -> Frame | None:
        """What a stream may send now; its place goes to the end, so that streams take turns."""
        stream.is_listed = False
        made = stream.outgoing.next_frame() if stream.is_open and not stream.is_closed else None
        if made is None:
            return None
        frame, is_reply = made
        if is_reply:
            assert not isinstance(stream.owner, Pending)
            self._end_attempt(stream.owner)
        elif stream.outgoing.may_send:
            stream.is_listed = True
            self.outbox.append(place)
        elif stream.outgoing.is_empty:
            frame.then = Room(stream.owner)
        return frame

    def detached(self, flushed: int, why: str, *, come_back: bool, resumable: bool = True) -> list[Result]:
        """The link is gone, of whose bytes `flushed` were written; `come_back` says whether there will be another.

        With grace, and if the link may be `resumable`, everything waits for the next. Else calls that were never
        written whole, and idempotent ones, wait for the next session; the others have ended, and so has whatever this
        peer was asked.
        """
        self.linked = self.ready = False
        self._why = why
        for call in self.pending.values():
            if call.mark is not None and 0 <= call.mark <= flushed:
                call.reached = True
        if not (come_back and resumable and self._kept is not None):
            return self._start_over(come_back=come_back)
        for call in self.pending.values():
            if call.mark is not None:
                call.mark = -1
        while self.outbox and self.outbox[0].number:
            self.outbox.popleft()  # it is kept
        return []

    def _start_over(self, *, come_back: bool) -> list[Result]:
        """The session is over."""
        results: list[Result] = [CancelAsked(number) for number in self._attempts if self._is_given(number)]
        for number in list(self._attempts):
            self._end_attempt(number)
        self.outbox.clear()
        self._kept = None
        for call in list(self.pending.values()):
            call.mark = None
            if come_back and self._ask_again(call):
                continue
            self._close(call)
            if not call.standing:
                error = ConnectionLost(self._why, may_have_executed=call.reached, **where(call))
                results.append(Ended(call, error=error))
        return results

    def _ask_again(self, call: Pending) -> bool:
        """Put a call into the outbox anew, if that may be: what may have run only if it may run twice."""
        if call.standing or call.sent >= SENT_MAX or (call.reached and not call.options.idempotent):
            return False
        stream = self._streams.pop(call, None)
        is_large = False
        if stream is not None:
            stream.is_closed = True
            is_large = size_of(call.params, call.attachments) > VALUE_MAX_BYTES
            params = (call.params, call.attachments) if is_large else (b"", ())
            if (call.reader is not None and stream.incoming.has_begun) or not stream.outgoing.begin_again(*params):
                return False  # some of it has been seen on the other side: that was the one time
        self.outbox.append(Frame([], False, call))
        if stream is not None and (call.sends or is_large):
            anew = self._streams[call] = Stream(call, stream.hop, is_open=False)
            anew.outgoing = stream.outgoing
            self._list(anew)
        return True

    def receive(self, payload: bytes, binary: bool, now: float) -> Sequence[Result]:
        """One message of the broker; what it means, nothing perhaps. Raises ValueError if it is none at all."""
        message, attachments = incoming.read(payload, binary)
        if self._kept is not None and len(message.meta) and not self._is_new(message.meta, len(payload)):
            return ()
        method = message.method
        if method is None:
            return self._replied(message, attachments, now)
        if method == "broker.message":
            told = incoming.heard(message, attachments)
            return () if told is None else (told,)
        if method[:2] == "$/" or method == "broker.session":
            return self._told(method, message, attachments, now)
        return self._asked(message, method, attachments)

    def _is_new(self, meta: msgspec.Raw, size: int) -> bool:
        number = incoming.number_of(meta)
        if not number:
            return True
        assert self._kept is not None
        is_new, acknowledge = self._kept.got(number, size)
        if acknowledge:
            self.outbox.append(outgoing.acknowledgement(acknowledge))
        return is_new

    def _told(self, method: str, message: Message, attachments: Attachments, now: float) -> Sequence[Result]:
        """What the broker says of the session and of its requests, beside replies. Unknown words are passed over."""
        try:
            if method == "$/part":
                return self._part_came(incoming.decode_part(message.params), attachments, now)
            if method == "$/credit":
                self._credit_came(incoming.decode_credit(message.params))
            elif method == "$/progress":
                return self._progress_came(message.params)
            elif method == "$/cancelRequest":
                return self._cancel_asked(message.params)
            elif method == "$/ack" and self._kept is not None:
                self._kept.acknowledge(incoming.acknowledged(message.params))
            elif method == "broker.session":
                return self._session_told(incoming.decode_session(message.params), now)
        except (msgspec.DecodeError, RecursionError):
            pass
        return ()

    def _session_told(self, told: incoming.SessionTold, now: float) -> Sequence[Result]:
        """The first word on a link of a session with grace: whether it goes on. Raises ValueError."""
        if not self.grace_s or not self.linked or self.ready:
            return ()
        kept = self._kept
        if kept is not None and told.resumed and told.id == kept.id:
            if told.received > kept.sent:
                kept.give_up()
                raise ValueError(f"the broker claims {told.received} messages of a session that sent {kept.sent}")
            again = kept.begin_again(told.received)
            self.outbox.extendleft(reversed(again))
            for frame in again:
                if frame.call is not None and frame.call.sent == 1:  # else it may have reached an earlier session
                    frame.call.reached = False  # the broker knows better than the kernel
            self.ready = True
            return ()
        results = self._start_over(come_back=True) if kept is not None else []
        self._kept = Kept(told.id, told.secret)
        self._begin(now)
        return results

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
            self._tell_cancel(call)
        return results

    def _too_late(self, call: Pending, now: float) -> BrokerError:
        facts = where(call, now)
        if self.ready:
            return DeadlineExceeded("the broker has not answered in time", **facts)
        reason = "there was no connection to the broker when the deadline passed"
        return ConnectionLost(reason, may_have_executed=call.reached, **facts)

    # ------------------------------------------------------------ details

    def _close(self, call: Pending) -> Pending | None:
        if self.pending.pop(call.id, None) is None:
            return None
        if call.slot is not None:
            call.slot.pop(call, None)
            call.slot = None
        if self._streams:
            self._close_stream(call)
        return call

    def _close_stream(self, owner: Owner) -> None:
        stream = self._streams.pop(owner, None)
        if stream is not None:
            stream.is_closed = True

    def _end_attempt(self, number: int | str) -> None:
        del self._attempts[number]
        if self._streams:
            self._close_stream(number)

    def _is_given(self, number: int | str) -> bool:
        """Whether whoever answers has this request now: its params have come, its answer has not been given."""
        stream = self._streams.get(number)
        return stream is None or (stream.awaited is None and not stream.is_answered)

    def _tell_cancel(self, call: Pending) -> None:
        if call.mark is None or not (self.linked or self._kept is not None):
            return
        text = outgoing.cancel(call.id)
        if self._kept is not None and call.mark == -1 and not call.reached and self._kept.replace(call, text):
            return  # who was told that it never reached the broker must not find that it did so later
        self.outbox.append(Frame([text], False))

    def _replied(self, message: Message, attachments: Attachments, now: float) -> Sequence[Result]:
        number = message.id
        call = self.pending.get(number) if type(number) is int else None
        if call is None:
            return ()  # an answer to what has ended here, or to a notification
        stream = self._streams.get(call) if self._streams else None
        self._close(call)
        if call.options.timing:
            call.timing = incoming.timing_of(message.meta)
        if len(message.error):
            return (Ended(call, error=incoming.error_of(message, call, attachments, now)),)
        try:
            if stream is not None:
                return (Ended(call, _gathered(stream, message.result, attachments)),)
            return (Ended(call, decode(message.result, attachments)),)
        except (ValueUnfit, StreamFault) as error:
            return (Ended(call, error=BadReply(f"the result cannot be read: {error}", **where(call, now))),)

    def _asked(self, message: Message, name: str, attachments: Attachments) -> Sequence[Result]:
        endpoint, _, method = name.partition("/")
        meta = incoming.call_meta(message.meta)
        asked = Asked(
            message.id, endpoint, method, message.params, attachments, meta.timeout, meta.trace, meta.idempotent,
            meta.stream in _STREAMS_IN, meta.stream in _STREAMS_OUT, bool(meta.progress), meta.caller,
        )  # fmt: skip
        if asked.id is None:
            return (asked,)
        self._attempts[asked.id] = asked
        if asked.stream_out and is_mark(asked.params):
            self._stream(asked.id).awaited = asked
            return ()
        return (asked,)

    def _cancel_asked(self, params: msgspec.Raw) -> Sequence[Result]:
        number = incoming.cancelled_id(params)
        if number is None or number not in self._attempts:
            return ()
        is_given = self._is_given(number)
        self._end_attempt(number)
        return (CancelAsked(number),) if is_given else ()

    def _progress_came(self, params: msgspec.Raw) -> Sequence[Result]:
        told = incoming.progress_of(params)
        call = self.pending.get(told[0]) if told is not None and type(told[0]) is int else None
        if told is None or call is None or call.standing:
            return ()
        return (ProgressCame(call, *told[1:]),)

    # ------------------------------------------------------------ parts that come

    def _owner(self, number: int | str) -> Owner | None:
        """Whose id it is: a call's of this peer, else that of a request it was given."""
        if type(number) is int and number in self.pending:
            return self.pending[number]
        return number if number in self._attempts else None

    def _credit_came(self, credit: incoming.Credit) -> None:
        owner = self._owner(credit.id)
        if owner is not None:
            stream = self._stream(owner)
            stream.outgoing.grant(credit.upto)
            self._list(stream)

    def _part_came(self, part: incoming.Part, attachments: Attachments, now: float) -> Sequence[Result]:
        owner = self._owner(part.id)
        if owner is None:
            return ()
        stream = self._stream(owner)
        if stream.is_answered:
            return ()
        try:
            value = stream.incoming.accept(part.seq, part.data, attachments, part.more, part.last, self.value_max_bytes)
            results = self._item_came(stream, value, part.last)
        except (StreamFault, ValueUnfit) as fault:
            return self._spoil(stream, fault, now)
        self._grant(stream)
        return results

    def _item_came(self, stream: Stream, value: Value | None, last: bool) -> list[Result]:
        """Raises ValueUnfit, StreamFault."""
        owner = stream.owner
        results: list[Result] = []
        if isinstance(owner, Pending):
            if value is not None and owner.reader is None:
                stream.incoming.gather(*value, self.value_max_bytes)
            elif value is not None:
                results.append(Item(owner, decode(*value)))
            return results
        if stream.awaited is not None:
            if value is not None:
                stream.incoming.take_up(1)
                asked, stream.awaited = stream.awaited, None
                asked = msgspec.structs.replace(asked, params=value[0], attachments=value[1], stream_out=not last)
                self._attempts[owner] = asked
                results.append(asked)
            return results
        if value is not None:
            results.append(Item(owner, decode(*value)))
        if last and stream.incoming.ended:
            results.append(ItemsEnded(owner))
        return results

    def _spoil(self, stream: Stream, fault: ValueError, now: float) -> list[Result]:
        """Parts came that break the rules, or too much of them: this request ends, and the broker is told."""
        owner = stream.owner
        if isinstance(owner, Pending):
            self._close(owner)
            self._tell_cancel(owner)
            kind = errors.TooLarge if isinstance(fault, ValueTooLarge) else BadReply
            return [Ended(owner, error=kind(str(fault), **where(owner, now)))]
        results: list[Result] = [CancelAsked(owner)] if self._is_given(owner) else []
        name = "TooLarge" if isinstance(fault, ValueTooLarge) else "BadStream"
        self._close_stream(owner)  # its items are worth nothing now
        self.fail(owner, -32000, str(fault), {"type": name, "message": str(fault)})
        return results


def _gathered(stream: Stream, raw: msgspec.Raw, attachments: Attachments) -> Any:
    """The value of a reply of which parts came. Raises StreamFault, ValueUnfit."""
    came = stream.incoming
    value = decode(*came.join(raw, attachments))
    if came.items is None:
        return value
    if value is not None:
        came.items.append(value)
    return came.items


def _check_size(name: str, params: bytes, attachments: Attachments, most: int) -> None:
    size = size_of(params, attachments)
    if size > most:
        endpoint, method, _ = split_method(name)
        detail = f"a message of {size} bytes is above the bound of {most} bytes"
        raise errors.TooLarge(detail, endpoint=endpoint, method=method)
