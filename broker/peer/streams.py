"""Both directions of one request's stream, as this peer has them: what may still be sent, what may still come.

A direction is parts, numbered from 0 without gaps. Whoever receives them says how many it takes (`$/credit`), 4 until
it has said so. An item is one part, or where it is larger than one: pieces, and a part that stands for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from broker.peer import outgoing
from broker.peer.calls import Asked, Frame, Owner, size_of
from broker.peer.values import Attachments, decode
from broker.wire.pieces import PIECE_DATA, Cutter, Joiner, PiecesError

FIRST_CREDIT = 4
"""parts that may be sent before the receiver has said anything"""
PART_MAX_BYTES = 256 * 1024
"""one part: its JSON text and its attachments"""
WINDOW, WINDOW_MAX = 8, 24
"""Parts that may be on their way to this peer, or wait here for whoever reads them: the more the smaller they are, as
long as they are no more than WINDOW_BYTES together. A small item costs 25 µs so, 36 µs with 8 always (21 µs with up to
64), all three processes together. What has been granted cannot be taken back when large ones follow small ones: 24 of
256 KiB still fit into what the broker keeps of a session (`kept_max_bytes`, 8 MiB), beyond which it ends the stream."""
WINDOW_BYTES = 2 << 20
JOINED_MAX_BYTES = 2 << 30
"""a value is put together here as long as it is no larger"""

Value = tuple["bytes | msgspec.Raw", Attachments]
"""JSON text and attachments, as they came"""


class StreamFault(ValueError):
    """Parts that break the rules of streams; the text says which."""


class ValueTooLarge(StreamFault):
    """A value that comes in pieces, or a list of items, is above the bound here."""


class Inflow:
    """Parts that come. Who reads them says so by `take_up`; where nobody does, `gather` keeps what they make.

    Pieces of a value that is put together count as taken as soon as everything before it has been, so that a value of
    any size comes, and no more than one ahead of its reader.
    """

    __slots__ = (
        "_bytes",
        "_gathered_bytes",
        "_held",
        "_joiner",
        "_next_seq",
        "_taken",
        "_unread",
        "_upto",
        "ended",
        "items",
    )

    def __init__(self) -> None:
        self.items: list[Any] | None = None
        """what came so far, where it is gathered and anything has come"""
        self.ended = False
        self._bytes = 0
        self._gathered_bytes = 0
        self._next_seq = 0
        self._upto = FIRST_CREDIT
        self._taken = 0
        self._unread = 0
        self._held = 0
        self._joiner: Joiner | None = None

    @property
    def has_begun(self) -> bool:
        """Whether any part has come."""
        return self._next_seq > 0

    def accept(
        self, seq: int, data: bytes | msgspec.Raw, attachments: Attachments, more: bool, last: bool, max_bytes: int
    ) -> Value | None:
        """One part; the value that is whole with it, None if there is none.

        A part that came before, or after the end, is passed over. Raises StreamFault.
        """
        if seq < self._next_seq or self.ended:
            return None
        if seq > self._next_seq:
            raise StreamFault(f"part {seq} came where part {self._next_seq} was due")
        if seq >= self._upto:
            raise StreamFault(f"part {seq} is beyond the credit: parts below {self._upto} may be sent")
        self._next_seq += 1
        self._bytes += len(data) + sum(map(len, attachments))
        if more:
            self._add_piece(attachments, max_bytes)
            return None
        self.ended = last
        is_empty = last and self._joiner is None and bytes(data).strip() in (b"", b"null")
        self._unread += 1
        if is_empty:  # it only ends the direction
            self.take_up(1)
            return None
        return self.join(data, attachments)

    def _add_piece(self, attachments: Attachments, max_bytes: int) -> None:
        if len(attachments) != 1:
            raise StreamFault(f"a piece of a value has {len(attachments)} attachments, not one")
        if self._joiner is None:
            self._joiner = Joiner()
        if self._joiner.size + len(attachments[0]) > max_bytes:
            raise ValueTooLarge(f"a value that comes in pieces is above the bound of {max_bytes} bytes here")
        self._joiner.add(attachments[0])
        self._held += 1
        self.take_up(0)

    def join(self, data: bytes | msgspec.Raw, attachments: Attachments) -> Value:
        """The value this closes: itself, or what came in pieces. Raises StreamFault if that is not whole."""
        joiner, self._joiner = self._joiner, None
        if joiner is None:
            return data, attachments
        try:
            return joiner.finish(data)
        except PiecesError as error:
            raise StreamFault(str(error)) from None

    def gather(self, data: bytes | msgspec.Raw, attachments: Attachments, max_bytes: int) -> None:
        """Keep one more item. Raises ValueTooLarge if they are too much together, ValueUnfit."""
        self._gathered_bytes += len(data) + sum(map(len, attachments))
        if self._gathered_bytes > max_bytes:
            raise ValueTooLarge(f"the items together are above the bound of {max_bytes} bytes here; read a stream")
        item = decode(data, attachments)
        if self.items is None:
            self.items = []
        self.items.append(item)
        self.take_up(1)

    def take_up(self, items: int) -> None:
        """So many items have been read."""
        items = min(items, self._unread)
        self._unread -= items
        self._taken += items
        if not self._unread:
            self._taken += self._held
            self._held = 0

    def grant(self) -> int:
        """Up to where more may come, if that is to be said now; else 0."""
        window = self._window()
        if self.ended or self._upto - self._taken > window // 2:
            return 0
        self._upto = self._taken + window
        return self._upto

    def _window(self) -> int:
        """How many parts of the size they had so far may be under way."""
        if not self._bytes:
            return WINDOW
        return max(WINDOW, min(WINDOW_MAX, WINDOW_BYTES * self._next_seq // self._bytes))


class Outgoing:
    """One thing to send: an item, params that are no message any more, or the reply that ends it all.

    Once all of a value's pieces have been sent, its mark stands here in its stead.
    """

    __slots__ = ("attachments", "cut", "is_params", "last", "raw", "reply")

    def __init__(
        self, raw: bytes, attachments: Attachments, *, cut: bool, last: bool = False, reply: Frame | bool = False,
        is_params: bool = False,
    ) -> None:  # fmt: skip
        self.raw = raw
        self.attachments = attachments
        self.cut = cut
        self.last = last
        self.reply = reply
        self.is_params = is_params


class Outflow:
    """Parts that go, as far as there is credit. Nothing is encoded or cut before it may be sent.

    `hop` is the request's id as JSON text.
    """

    __slots__ = ("_cutter", "_hop", "_pieces", "_queue", "_seq", "_upto", "ended", "is_untouched")

    def __init__(self, hop: bytes) -> None:
        self.ended = False
        """whether all that will be sent has been given"""
        self.is_untouched = True
        """whether no item has been sent"""
        self._hop = hop
        self._queue: deque[Outgoing] = deque()
        self._seq = 0
        self._upto = FIRST_CREDIT
        self._cutter: Cutter | None = None
        self._pieces: Iterator[bytes] = iter(())

    @property
    def is_empty(self) -> bool:
        """Whether everything it was given has been taken."""
        return not self._queue

    @property
    def has_params(self) -> bool:
        """Whether params go first."""
        return bool(self._queue) and self._queue[0].is_params

    @property
    def may_send(self) -> bool:
        """Whether the next part, or the reply, may go now."""
        if not self._queue:
            return False
        first = self._queue[0]
        return self._seq < self._upto or bool(first.reply and not first.cut)

    def grant(self, upto: int) -> None:
        """The receiver takes parts below `upto`. Less than it said before says nothing."""
        self._upto = max(self._upto, upto)

    def give_params(self, raw: bytes, attachments: Attachments, *, last: bool) -> None:
        """Params go in pieces, before any item; with `last` no items follow."""
        self._queue.appendleft(Outgoing(raw, attachments, cut=True, last=last, is_params=True))
        self.ended = self.ended or last

    def give_item(self, raw: bytes, attachments: Attachments, *, last: bool) -> None:
        """One more item. With `last` the direction ends; if it is empty or null, it does so without an item."""
        cut = size_of(raw, attachments) > PART_MAX_BYTES
        self._queue.append(Outgoing(raw or b"null", attachments, cut=cut, last=last))
        self.ended = last

    def give_reply(self, raw: bytes, attachments: Attachments, *, cut: bool) -> None:
        """The result: it goes after all items; with `cut` in pieces."""
        self._queue.append(Outgoing(raw, attachments, cut=cut, reply=True))
        self.ended = True

    def give_frame(self, frame: Frame) -> None:
        """The reply as it is: it goes after all items."""
        self._queue.append(Outgoing(b"", (), cut=False, reply=frame))
        self.ended = True

    def begin_again(self, raw: bytes, attachments: Attachments) -> bool:
        """Another session begins: as if nothing had been sent. False if that cannot be: items are gone.

        `raw` and `attachments` are the params, if they went in pieces.
        """
        if not self.is_untouched:
            return False
        self._seq, self._upto, self._cutter = 0, FIRST_CREDIT, None
        if self._queue and self._queue[0].is_params:
            del self._queue[0]
        if raw:
            self.give_params(raw, attachments, last=self.ended and not self._queue)
        return True

    def next_frame(self) -> tuple[Frame, bool] | None:
        """The next part, or the reply (True); None while there is no credit."""
        if not self.may_send:
            return None
        first = self._queue[0]
        if not first.is_params:
            self.is_untouched = False
        if first.cut:
            return self._next_piece(first), False
        del self._queue[0]
        return self._finish(first), bool(first.reply)

    def _next_piece(self, value: Outgoing) -> Frame:
        if self._cutter is None:
            self._cutter = Cutter(value.raw, value.attachments)
            self._pieces = iter(self._cutter)
        piece = next(self._pieces)
        if not self._cutter.left_bytes:
            value.raw, value.attachments, value.cut = self._cutter.mark, (), False
            self._cutter, self._pieces = None, iter(())
        return self._part(PIECE_DATA, [piece], b',"more":true')

    def _finish(self, what: Outgoing) -> Frame:
        if isinstance(what.reply, Frame):
            return what.reply
        if what.reply:
            return outgoing.result(self._hop, what.raw, what.attachments)
        return self._part(what.raw, what.attachments, b',"last":true' if what.last else b"")

    def _part(self, data: bytes, attachments: Attachments, flag: bytes) -> Frame:
        self._seq += 1
        return outgoing.part(self._hop, self._seq - 1, data, attachments, flag)


class Stream:
    """One request's stream. `owner` is whose it is; `hop` the request's id as JSON text.

    `is_listed` tells that the outbox has a place for its next part, `is_open` that the request itself went before,
    `is_closed` that it has ended. Of a request given to this peer, `awaited` is what it waits for its params with, and
    `is_answered` tells that its reply waits behind the items.
    """

    __slots__ = ("awaited", "hop", "incoming", "is_answered", "is_closed", "is_listed", "is_open", "outgoing", "owner")

    def __init__(self, owner: Owner, hop: bytes, *, is_open: bool) -> None:
        self.owner = owner
        self.hop = hop
        self.incoming = Inflow()
        self.outgoing = Outflow(hop)
        self.awaited: Asked | None = None
        self.is_answered = False
        self.is_closed = False
        self.is_listed = False
        self.is_open = is_open
