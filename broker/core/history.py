"""What a topic keeps of its broadcasts, and whoever hears them again (`since`)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from broker.core.budget import size_of
from broker.core.messages import Broadcast

if TYPE_CHECKING:
    from broker.core.limits import EndpointLimits
    from broker.core.sessions import Session
    from broker.core.topics import Topic

REPLAY_BYTES = 64 * 1024
"""one slice of a replay, beyond the message that fills it: small beside what an outbox may hold"""
TURNS_MAX = 100
"""Slices in which a message was not taken though its reader does not count as slow: then it never will be."""


class History:
    """The last broadcasts of one topic, within a count, an age and a size; the oldest goes first.

    One that is larger than all may be stands alone. `room_bytes` is what other histories leave; without any, nothing is
    kept. What `keep` and `prune` return is for the budget.
    """

    __slots__ = ("_kept", "_oldest", "bytes")

    def __init__(self) -> None:
        self._kept: dict[int, tuple[float, int, Broadcast]] = {}  # by number: when it came, its size
        self._oldest = 1
        self.bytes = 0

    def keep(self, message: Broadcast, limits: EndpointLimits, room_bytes: int, now: float) -> int:
        """Keep one more, whose number is above all others; how many bytes more it holds now."""
        assert message.seq is not None
        if not self._kept:
            self._oldest = message.seq
        before, size = self.bytes, size_of(message.body)
        self._kept[message.seq] = now, size, message
        self.bytes += size
        self.prune(limits, room_bytes, now)
        return self.bytes - before

    def prune(self, limits: EndpointLimits, room_bytes: int, now: float) -> int:
        """Let go of what is too many, too old or too large; how many bytes more it holds now: none or fewer."""
        kept, before = self._kept, self.bytes
        bytes_max, kept_least = min(limits.history_max_bytes, room_bytes), 1 if room_bytes > 0 else 0
        while kept:
            at, size, _ = kept[self._oldest]
            too_large = self.bytes > bytes_max and len(kept) > kept_least
            if not too_large and len(kept) <= limits.history and now - at < limits.history_s:
                break
            del kept[self._oldest]
            self.bytes -= size
            while kept and self._oldest not in kept:
                self._oldest += 1
        return self.bytes - before

    @property
    def first(self) -> int | None:
        """The number of the oldest it keeps; None for none."""
        return self._oldest if self._kept else None

    @property
    def oldest_at(self) -> float | None:
        """When that came; None for none."""
        return self._kept[self._oldest][0] if self._kept else None

    def after(self, seq: int, upto: int) -> Broadcast | None:
        """The first it keeps with a number above `seq`, of those up to `upto`."""
        if not self._kept:
            return None
        for number in range(max(seq + 1, self._oldest), upto + 1):
            if number in self._kept:
                return self._kept[number][2]
        return None

    def __len__(self) -> int:
        return len(self._kept)


class Replay:
    """One session hears again what a topic keeps; `after` is the number it has come to.

    Until it has caught up it is no listener of the topic: what is published meanwhile reaches it from the history.
    So everything comes once and in order, however long it takes, and nobody else waits for it.
    """

    __slots__ = ("_refused", "after", "ended", "session", "topic")

    def __init__(self, session: Session, topic: Topic, after: int) -> None:
        self.session = session
        self.topic = topic
        self.after = after
        self.ended = False
        self._refused = 0

    def next(self) -> Broadcast | None:
        """What it hears next; None if it has caught up, and then it is a listener like the others."""
        if self.ended:
            return None
        message = self.topic.history.after(self.after, self.topic.seq)
        if message is None:
            self.ended = True
            self.topic.caught_up(self.session)
        return message

    def took(self, message: Broadcast) -> None:
        """Its link has this copy."""
        assert message.seq is not None
        self.after, self._refused = message.seq, 0

    def refused(self, message: Broadcast) -> bool:
        """Its link did not take this copy: it comes again in a later slice. True if it is given up."""
        self._refused += 1
        if self._refused < TURNS_MAX or self.session.congested:
            return False
        self.took(message)
        return True


class Replays:
    """The replays under way, in turn. One whose session does not read, or has no link just now, waits for it."""

    __slots__ = ("_ready", "_waiting")

    def __init__(self) -> None:
        self._ready: deque[Replay] = deque()
        self._waiting: dict[Session, list[Replay]] = {}

    @property
    def ready(self) -> bool:
        """Whether any may go on now."""
        return bool(self._ready)

    def put(self, replay: Replay) -> None:
        """Begin one, or go on with it in its turn."""
        if not replay.ended:
            self._ready.append(replay)

    def next(self) -> Replay | None:
        """The one whose turn it is; `put` it back."""
        while self._ready:
            replay = self._ready.popleft()
            if replay.ended:
                continue
            if not replay.session.congested:
                return replay
            self._waiting.setdefault(replay.session, []).append(replay)
        return None

    def wake(self, session: Session) -> None:
        """A session reads again."""
        self._ready.extend(self._waiting.pop(session, ()))

    def forget(self, session: Session) -> None:
        """A session is gone, and its subscriptions have ended."""
        self._waiting.pop(session, None)

    def __len__(self) -> int:
        return sum(not replay.ended for replay in self._ready) + sum(map(len, self._waiting.values()))
