"""What a peer asks and is asked, and what becomes of it: the values a session takes and gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec

from broker.core.access import NAME
from broker.core.options import KEY_MAX, PRIORITY_MAX, RETRIES_MAX
from broker.peer.errors import BrokerError, InvalidRequest
from broker.peer.values import Attachments

if TYPE_CHECKING:
    from broker.peer.streams import Stream

_METHOD = re.compile(rf"(?:(?P<endpoint>{NAME.pattern})/)?(?P<method>{NAME.pattern})")

Pieces: TypeAlias = list["bytes | memoryview"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a call asks of the broker. Times in seconds; `timeout` None leaves it to the broker and sets no guard here.

    `idle` is how long a stream may stand still. `key` makes repeats one request, `group` keeps requests together,
    `priority` goes from -9 to 9, higher first. `progress` and `timing` are told if they are wanted.
    """

    timeout: float | None = None
    idle: float | None = None
    idempotent: bool = False
    retries: int | None = None
    key: str | None = None
    group: str | None = None
    priority: int = 0
    progress: bool = False
    timing: bool = False
    wait: bool = False
    trace: str | None = None

    def check(self) -> None:
        """Raises InvalidRequest for what the broker would refuse."""
        for name, seconds in (("timeout", self.timeout), ("idle", self.idle)):
            if seconds is not None and not (isinstance(seconds, (int, float)) and 0 < seconds < float("inf")):
                raise InvalidRequest(f"{name} {seconds!r} is not a positive number of seconds")
        if self.retries:
            if not self.idempotent:
                raise InvalidRequest("retries needs idempotent=True; what is not idempotent runs at most once")
            if not (isinstance(self.retries, int) and 0 <= self.retries <= RETRIES_MAX):
                raise InvalidRequest(f"retries {self.retries!r} is no whole number from 0 to {RETRIES_MAX}")
        if self.priority and not (isinstance(self.priority, int) and -PRIORITY_MAX <= self.priority <= PRIORITY_MAX):
            bounds = f"-{PRIORITY_MAX} to {PRIORITY_MAX}"
            raise InvalidRequest(f"priority {self.priority!r} is no whole number from {bounds}")
        if self.key is not None or self.group is not None or self.trace is not None:
            self._check_texts()

    def _check_texts(self) -> None:
        for name, text in (("key", self.key), ("group", self.group), ("trace", self.trace)):
            if text is None:
                continue
            if not isinstance(text, str):
                raise InvalidRequest(f"{name} is of type {type(text).__name__}; give a str")
            if name != "trace" and not 1 <= len(text.encode()) <= KEY_MAX:
                raise InvalidRequest(f"{name} has {len(text.encode())} bytes, not 1 to {KEY_MAX}")

    def less(self, spent_s: float) -> Options:
        """The same with less time: what was spent before the request could be made."""
        if self.timeout is None:
            return self
        return msgspec.structs.replace(self, timeout=max(self.timeout - spent_s, 0.001))

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for but a deadline."""
        return not (
            self.idempotent or self.wait or self.trace or self.retries or self.key or self.idle or self.progress
            or self.priority or self.group or self.timing
        )  # fmt: skip

    def meta(self, left_s: float | None) -> dict[str, Any]:
        """The member `meta`, with what is left of the time."""
        meta: dict[str, Any] = {}
        if left_s is not None:
            meta["timeout"] = left_s
        for name in _WRITTEN_AS_THEY_ARE:
            value = getattr(self, name)
            if value is not None and value is not False:
                meta[name] = value
        if self.priority:
            meta["priority"] = self.priority
        return meta


_WRITTEN_AS_THEY_ARE = ("idle", "idempotent", "retries", "key", "group", "progress", "timing", "wait", "trace")

DEFAULT_OPTIONS = Options()


class Reader(Protocol):
    """Who takes the items of a call as they come."""

    def item(self, value: Any) -> None:
        """The next item of its stream. More come once `Session.consumed` says that this one was taken."""


Tell: TypeAlias = Callable[[float, "float | None", "str | None"], object]
"""told how much is done, of how much (None if nobody knows), and in words (None if the worker says none)"""


class Pending:
    """One call that has not ended.

    `waiter` is the owner's, to know whom to tell, as are `reader`, None where items are gathered, and `tell`, None
    where nobody wants to know of progress; `sends` whether it sends items. `mark` is the link's byte count behind it
    once a link has taken it: None before, -1 where it was taken by a link that is gone; `reached` whether the whole of
    it was written to a link that broke, so that it may have run. `standing` is the key of what is repeated in every new
    session. `timing` is what the broker told of its times, in milliseconds, once it has ended.
    """

    __slots__ = (
        "asked_at", "attachments", "deadline", "endpoint", "id", "mark", "method", "options", "params", "reached",
        "reader", "sends", "sent", "slot", "standing", "tell", "timing", "waiter",
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
        self.reader: Reader | None = None
        self.tell: Tell | None = None
        self.sends = False
        self.asked_at = now
        self.deadline = None if options.timeout is None else now + options.timeout
        self.slot: dict[Pending, None] | None = None
        self.mark: int | None = None
        self.sent = 0
        self.reached = False
        self.standing: tuple[str, ...] | None = None
        self.timing: dict[str, Any] | None = None


Owner: TypeAlias = Pending | int | str
"""Whose a stream is: a call of this peer's, or the number of a request it was given."""


class Ended(msgspec.Struct, frozen=True, gc=False):
    """A call has ended: with a value, or with an error."""

    call: Pending
    value: Any = None
    error: BrokerError | None = None


class Asked(msgspec.Struct, frozen=True, gc=False):
    """The broker gives this peer a request; `id` None is a notification, which nobody waits for.

    `timeout` is what is left of its deadline, in seconds. `stream_in`: its caller takes items one by one;
    `stream_out`: its caller sends items; `progress`: it wants to know how far this is. `caller` is told in the process
    of the broker only: what it calls who asks, and their principal.
    """

    id: int | str | None
    endpoint: str
    method: str
    params: msgspec.Raw | bytes
    attachments: Attachments
    timeout: float | None = None
    trace: str | None = None
    idempotent: bool = False
    stream_in: bool = False
    stream_out: bool = False
    progress: bool = False
    caller: tuple[str, str] | None = None


class CancelAsked(msgspec.Struct, frozen=True, gc=False):
    """Nobody waits any more for the answer to this request."""

    id: int | str


class Heard(msgspec.Struct, frozen=True, gc=False):
    """A broadcast. `seq` counts per endpoint and topic; None where nothing is counted."""

    endpoint: str | None
    topic: str | None
    seq: int | None
    data: Any


class Item(msgspec.Struct, frozen=True, gc=False):
    """The next item of a stream that comes in."""

    owner: Owner
    value: Any


class ItemsEnded(msgspec.Struct, frozen=True, gc=False):
    """The caller of this request sends no more items."""

    owner: int | str


class Room(msgspec.Struct, frozen=True, gc=False):
    """All items of a stream that goes out are on their way: there is room for more."""

    owner: Owner


class ProgressCame(msgspec.Struct, frozen=True, gc=False):
    """The worker is so far with this call: `done` of `total` (None: unknown), in whatever unit."""

    call: Pending
    done: float
    total: float | None
    text: str | None


Result: TypeAlias = Ended | Asked | CancelAsked | Heard | Item | ItemsEnded | Room | ProgressCame


class Frame:
    """One message for the link.

    `call` is whose it is, if a call's, which is encoded when it is taken. `stream` marks the place in the outbox where
    a stream may send its next part. `number` is its place among all messages of the session, if that is kept; `then`
    is to be performed once the link has it.
    """

    __slots__ = ("binary", "call", "number", "pieces", "stream", "then")

    def __init__(self, pieces: Pieces, binary: bool, call: Pending | None = None, stream: Stream | None = None) -> None:
        self.pieces = pieces
        self.binary = binary
        self.call = call
        self.stream = stream
        self.number = 0
        self.then: Room | None = None


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


def size_of(raw: bytes, attachments: Sequence[bytes | memoryview]) -> int:
    """Bytes of a value as it travels."""
    return len(raw) + sum(map(len, attachments)) if attachments else len(raw)
