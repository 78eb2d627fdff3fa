"""Calls that a worker's link has no room for, and what follows them: held until there is room again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from broker.core.ids import AttemptId
from broker.core.kept import NEVER_WRITTEN
from broker.core.messages import Call, Message


class HeldCalls(dict[AttemptId, Call]):
    """By attempt, in their order.

    However much falls to a worker within one turn of the loop, before it can be called congested, none of it makes it a
    slow consumer.
    """

    __slots__ = ("_behind",)

    def __init__(self) -> None:
        super().__init__()
        self._behind: dict[AttemptId, list[Message]] = {}

    def hold(self, call: Call) -> None:
        """Hold a call, which counts as never written."""
        call.attempt.mark = NEVER_WRITTEN
        self[call.attempt.id] = call

    def follow(self, attempt_id: AttemptId, message: Message) -> None:
        """Hold what follows a call that is held."""
        self._behind.setdefault(attempt_id, []).append(message)

    def drop(self, attempt_id: AttemptId) -> bool:
        """Nobody waits for it any more; whether it was held."""
        self._behind.pop(attempt_id, None)
        return self.pop(attempt_id, None) is not None

    def drop_all(self) -> None:
        """The link is no more."""
        self.clear()
        self._behind.clear()

    def take(self, now: float) -> tuple[Call, Sequence[Message]] | None:
        """Take out the first that has time left, with what follows it; None for none.

        What has expired meanwhile is dropped: it ends in its turn.
        """
        while self:
            call = self.pop(next(iter(self)))
            behind = self._behind.pop(call.attempt.id, ())
            left_s = call.attempt.request.deadline - now
            if left_s > 0:
                return msgspec.structs.replace(call, left_s=left_s), behind
        return None
