"""What a session with grace is sent: numbered, and kept until its peer acknowledges it, over all its links."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from itertools import islice

import msgspec

from broker.core.allowances import Allowance
from broker.core.budget import Budget, size_of
from broker.core.events import NumberedLink
from broker.core.limits import Limits
from broker.core.messages import Broadcast, Call, Message, Progress, SessionTold

NEVER_WRITTEN = sys.maxsize
"""mark of an attempt whose call no link has taken"""

OWN_BYTES = 200
"""what a message counts for beside its payload"""

_CAN_BE_MISSED = (Broadcast, Progress)


class Kept:
    """Stands where the link of a session stands: numbers each message, hands it to the link there is, and keeps it.

    `n` is the number of the last message, `received` counts the peer's own messages over all links. Beyond the bounds
    the oldest message goes, broadcasts and progress before others; `cut` is the number of the last that went, `lost`
    of the last that was neither, without which a peer cannot go on. `allowance` is that of the session's principal.
    """

    __slots__ = (
        "_allowance", "_budget", "_bytes", "_bytes_can_be_missed", "_can_be_missed", "_limits", "_messages", "cut",
        "link", "lost", "n", "received",
    )  # fmt: skip

    def __init__(self, link: NumberedLink, limits: Limits, budget: Budget, allowance: Allowance) -> None:
        self.link: NumberedLink | None = link
        self.n = 0
        self.received = 0
        self.cut = 0
        self.lost = 0
        self._limits = limits
        self._budget = budget
        self._allowance = allowance
        self._bytes = self._bytes_can_be_missed = 0
        # The oldest goes first; a dict would look for it among all that went before: 70 ms for 10,000 at once.
        self._messages: OrderedDict[int, tuple[Message, int]] = OrderedDict()
        self._can_be_missed: deque[int] = deque()

    @property
    def size_bytes(self) -> int:
        """Payloads it holds."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._messages)

    # ------------------------------------------------------------ as a link

    @property
    def takes_binary(self) -> bool:
        """What is kept goes out on a later link, whatever that takes: attachments are counted as they are."""
        return self.link is None or self.link.takes_binary

    def deliver(self, message: Message) -> None:
        """Number it, keep it, and send it if there is a link."""
        if type(message) is SessionTold:
            if self.link is not None:
                self.link.deliver(message)
            return
        self.n += 1
        self._keep(message)
        if self.link is not None:
            self.link.deliver_numbered(message, self.n)
        elif type(message) is Call:
            message.attempt.mark = NEVER_WRITTEN

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """The same; what a link's bound drops is not kept, and takes no number."""
        if self.link is not None and not self.link.broadcast_numbered(message, frames, self.n + 1):
            return False
        self.n += 1
        self._keep(message)
        return True

    def close(self, code: int, reason: str) -> None:
        """Close the link there is."""
        if self.link is not None:
            self.link.close(code, reason)

    def pause_reading(self) -> None:
        """Read no more from the link there is."""
        if self.link is not None:
            self.link.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if self.link is not None:
            self.link.resume_reading()

    # ------------------------------------------------------------ what is kept

    @property
    def is_half_full(self) -> bool:
        """Whether so much is not acknowledged that no more should be asked for."""
        return 2 * self._bytes > self._limits.kept_max_bytes

    def has_room(self, size: int) -> bool:
        """Whether that many bytes more can be kept without anything being cut that cannot be missed."""
        held = self._bytes - self._bytes_can_be_missed
        fits = held + size + OWN_BYTES <= self._limits.kept_max_bytes
        return fits and self._allowance.has_room(size + OWN_BYTES, self._limits)

    def _keep(self, message: Message) -> None:
        size = _size(message)
        self._messages[self.n] = message, size
        self._hold(size)
        if type(message) in _CAN_BE_MISSED:
            self._can_be_missed.append(self.n)
            self._bytes_can_be_missed += size
        limits = self._limits
        while self._messages and (self._bytes > limits.kept_max_bytes or len(self._messages) > limits.kept_max):
            self.cut_one()
        self._allowance.make_room(self, limits)

    def cut_one(self) -> None:
        """Give up the oldest message, one that can be missed before others; there must be one."""
        if self._can_be_missed:
            number = self._can_be_missed.popleft()
        else:
            number = self.lost = next(iter(self._messages))
        self.cut = max(self.cut, number)
        self._let_go(number)

    def _let_go(self, number: int) -> None:
        message, size = self._messages.pop(number)
        self._hold(-size)
        if type(message) in _CAN_BE_MISSED:
            self._bytes_can_be_missed -= size

    def _hold(self, size: int) -> None:
        self._bytes += size
        self._budget.used += size
        self._allowance.used += size

    def forget(self) -> None:
        """The session is gone, and nobody will ask for any of it."""
        self._hold(-self._bytes)
        self._messages.clear()
        self._can_be_missed.clear()
        self._bytes_can_be_missed = 0

    def acked(self, n: int) -> bool:
        """The peer has got all up to `n`; False for what it was never sent."""
        if n > self.n:
            return False
        messages, missed = self._messages, self._can_be_missed
        while messages and (first := next(iter(messages))) <= n:
            self._let_go(first)
        while missed and missed[0] <= n:
            missed.popleft()
        return True

    def check(self) -> None:
        """Assert that its views agree. For tests and simulators."""
        assert self._bytes == sum(size for _, size in self._messages.values())
        assert self._bytes_can_be_missed == sum(self._messages[number][1] for number in self._can_be_missed)
        assert len(self._messages) <= self._limits.kept_max and self._bytes <= self._limits.kept_max_bytes
        assert all(0 < n <= self.n for n in self._messages) and self.lost <= self.cut <= self.n

    # ------------------------------------------------------------ another link

    def can_resume(self, received: int) -> bool:
        """Whether a peer that has got all up to `received` can be given the rest."""
        return self.lost <= received <= self.n

    def resume(self, link: NumberedLink, told: SessionTold, now: float) -> None:
        """Go on over this link: say where the session stands, then everything that is kept, in order."""
        self.link = link
        link.deliver(told)
        for n, message in self.since(0, now):
            link.deliver_numbered(message, n)

    def since(self, n: int, now: float, limit: int | None = None) -> list[tuple[int, Message]]:
        """What is kept from number `n` on, in order, at most so many, with the time that is left now."""
        found = ((number, message) for number, (message, _) in self._messages.items() if number >= n)
        return [(number, _as_of(message, now)) for number, message in islice(found, limit)]


def _as_of(message: Message, now: float) -> Message:
    if type(message) is not Call:
        return message
    return msgspec.structs.replace(message, left_s=max(message.attempt.request.deadline - now, 0.001))


def _size(message: Message) -> int:
    """Bytes of what a message carries, and a little for itself."""
    body = getattr(message, "body", None)
    return OWN_BYTES if body is None else OWN_BYTES + size_of(body)
