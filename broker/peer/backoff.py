"""How long to wait before connecting again: full jitter, so that those lost together return apart."""

from __future__ import annotations

import random


class Backoff:
    """Waits of 0 to `first_s`, then 0 to twice that, and so on, never above `most_s`; drawn by `source`."""

    __slots__ = ("_failures", "_first_s", "_most_s", "_source")

    def __init__(self, source: random.Random | None = None, *, first_s: float = 0.25, most_s: float = 15.0) -> None:
        self._source = source or random.Random()  # noqa: S311 - it spreads load, it guards nothing
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0

    def next_s(self, within_s: float | None = None) -> float:
        """Seconds to wait before the next attempt; never above `within_s`, for who must be back soon."""
        most_s = self._most_s if within_s is None else min(self._most_s, within_s)
        bound = min(most_s, self._first_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, 30)
        return self._source.uniform(0.0, bound)

    def reset(self) -> None:
        """A connection has held: begin anew."""
        self._failures = 0
