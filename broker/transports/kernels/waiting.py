"""What waits for a front end that is away, or reads more slowly than its kernel prints: in order, and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from broker.core.messages import Body
from broker.wire.kernel import read_header

OVERHEAD_BYTES = 300
"""what one message costs here beside its bytes"""


class Output(msgspec.Struct, frozen=True, gc=False):
    """One message for a front end: its channel, and as the broker's own dialects carry it."""

    channel: str
    body: Body

    @property
    def size(self) -> int:
        """Bytes it counts for."""
        return OVERHEAD_BYTES + len(self.body.raw) + sum(map(len, self.body.attachments))


class Gap(msgspec.Struct):
    """Messages that were left out here: how many, how large, and what the first of them was about."""

    parent_header: bytes
    count: int = 0
    bytes: int = 0

    @property
    def size(self) -> int:
        """Bytes it counts for."""
        return OVERHEAD_BYTES + len(self.parent_header)


class _Kind(msgspec.Struct, gc=False):
    header: msgspec.Raw
    parent_header: msgspec.Raw = msgspec.Raw(b"{}")


_KIND = msgspec.json.Decoder(_Kind)


class Waiting:
    """Messages in order; where some were left out stands a `Gap`.

    Printed text (`stream`) is left out above half of `max_bytes`; all else of the kernel's above it; replies, which
    end what somebody waits for, only above a quarter more.
    """

    __slots__ = ("_items", "bytes", "left_out", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._items: deque[Output | Gap] = deque()
        self.bytes = 0
        self.left_out = 0
        """messages, of all that ever came"""

    def __len__(self) -> int:
        return len(self._items)

    def put(self, output: Output) -> bool:
        """Behind all others; False if there is no room for it. Where nothing waits, one of any size has room."""
        kind = _KIND.decode(output.body.raw)
        if self._items and self.bytes + output.size > self._room_bytes(output.channel, kind):
            self._leave_out(output, bytes(kind.parent_header))
            return False
        self._append(output)
        return True

    def _room_bytes(self, channel: str, kind: _Kind) -> int:
        if channel != "iopub":
            return self.max_bytes + self.max_bytes // 4
        return self.max_bytes // 2 if read_header(bytes(kind.header)).msg_type == "stream" else self.max_bytes

    def _append(self, item: Output | Gap) -> None:
        self._items.append(item)
        self.bytes += item.size

    def _leave_out(self, output: Output, parent_header: bytes) -> None:
        last = self._items[-1] if self._items else None
        if not isinstance(last, Gap):
            last = Gap(parent_header)
            self._append(last)
        last.count += 1
        last.bytes += output.size - OVERHEAD_BYTES
        self.left_out += 1

    def put_back(self, outputs: Iterable[Output]) -> None:
        """Before all others, in this order: what was sent and did not arrive. It fitted before, so it does now."""
        for output in reversed(list(outputs)):
            self._items.appendleft(output)
            self.bytes += output.size

    def pop(self) -> Output | Gap:
        """The first; there must be one."""
        item = self._items.popleft()
        self.bytes -= item.size
        return item

    def clear(self) -> None:
        """Let go of all."""
        self._items.clear()
        self.bytes = 0
