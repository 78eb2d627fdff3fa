"""How many requests a second each principal may make, over all its connections."""

from __future__ import annotations

SWEEP_AT = 10_000
"""principals remembered before those that could make all of theirs at once are forgotten"""


class Rates:
    """A bucket per principal that holds one second's worth, at least one, and fills evenly.

    Kept is, for each, the moment at which its bucket will be full again (the generic cell rate algorithm, ITU-T I.371):
    one number and no timer. Who could take all is as good as unknown, and is forgotten.
    """

    __slots__ = ("_full_at", "_sweep_at")

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}
        self._sweep_at = SWEEP_AT

    def take(self, principal: str, per_s: float, now: float) -> float:
        """Take one: 0.0, or the seconds until there is one, and then nothing is taken."""
        interval_s = 1 / per_s
        full_at = max(self._full_at.get(principal, now), now) + interval_s
        over_s = full_at - now - max(1.0, interval_s)
        if over_s > 1e-9:  # sums of intervals round
            return over_s
        if len(self._full_at) >= self._sweep_at:
            self._sweep(now)
        self._full_at[principal] = full_at
        return 0.0

    def _sweep(self, now: float) -> None:
        self._full_at = {principal: full_at for principal, full_at in self._full_at.items() if full_at > now}
        self._sweep_at = max(SWEEP_AT, 2 * len(self._full_at))

    def __len__(self) -> int:
        return len(self._full_at)
