"""Buckets of guesses: how many failures a key may have in a minute."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable

KEYS_MAX = 10_000


class Buckets:
    """A bucket per key: a minute's worth at once, refilled evenly.

    At most `keys_max` keys are remembered, the longest unheard is forgotten first, and its bucket with it.
    `clock` is monotonic time in seconds.
    """

    __slots__ = ("_buckets", "_clock", "_keys_max", "_per_minute")

    def __init__(self, clock: Callable[[], float], *, per_minute: int, keys_max: int = KEYS_MAX) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._keys_max = keys_max
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # left, as of when

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, key: Hashable) -> int:
        """0 while there are any left, else the whole seconds until there is one again."""
        return self._wait_s(self._left(key)) if key in self._buckets else 0

    def take(self, key: Hashable) -> int:
        """Take one: 0, or the seconds as `wait_s` and nothing is taken."""
        left = self._left(key)
        wait_s = self._wait_s(left)
        self._put(key, left if wait_s else left - 1)
        return wait_s

    def give_back(self, key: Hashable) -> None:
        """Undo a `take`: it was no failure."""
        if key not in self._buckets:  # it is full, being forgotten
            return
        left = self._left(key) + 1
        if left < self._per_minute:
            self._put(key, left)
        else:
            del self._buckets[key]  # so that what is no failure pushes nobody's out

    def _left(self, key: Hashable) -> float:
        now = self._clock()
        left, at = self._buckets.get(key, (float(self._per_minute), now))
        return min(float(self._per_minute), left + (now - at) * self._per_minute / 60)

    def _wait_s(self, left: float) -> int:
        return 0 if left >= 1 else max(1, math.ceil((1 - left) * 60 / self._per_minute))

    def _put(self, key: Hashable, left: float) -> None:
        self._buckets[key] = (left, self._clock())
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._keys_max:
            self._buckets.popitem(last=False)
