"""Makes a long failing story short: takes away whatever it fails without (Zeller's ddmin)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def shrink(items: Sequence[Item], fails: Callable[[list[Item]], bool], tries_max: int = 500) -> list[Item]:
    """The items left when no single run of them can be taken away any more, or `tries_max` tries are used up.

    `fails` says whether a story with only these items, in their order, still fails; with all of them it does.
    """
    left = list(items)
    size = max(1, len(left) // 2)
    tries = 0
    while left and tries < tries_max:
        at, smaller = 0, False
        while at < len(left) and tries < tries_max:
            tries += 1
            without = left[:at] + left[at + size :]
            if fails(without):
                left, smaller = without, True
            else:
                at += size
        if size == 1 and not smaller:
            break
        size = max(1, min(size // 2, len(left)) if not smaller or size > len(left) else size)
    return left
