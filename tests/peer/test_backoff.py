"""Waiting before connecting again: full jitter within a growing bound."""

import itertools
import random

from broker.peer.backoff import Backoff


def test_the_bound_doubles_up_to_the_most_and_starts_again() -> None:
    class Most(random.Random):
        def uniform(self, a: float, b: float) -> float:
            assert a == 0.0
            return b

    backoff = Backoff(Most(), first_s=0.5, most_s=3.0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    for _ in range(2000):
        assert backoff.next_s() == 3.0
    backoff.reset()
    assert backoff.next_s() == 0.5


def test_those_lost_together_come_back_apart() -> None:
    waits = sorted(Backoff(random.Random(seed), first_s=1.0).next_s() for seed in range(1000))
    assert waits[0] < 0.02
    assert waits[-1] > 0.98
    assert max(b - a for a, b in itertools.pairwise(waits)) < 0.05


def test_who_must_be_back_soon_waits_no_longer_than_that() -> None:
    backoff = Backoff(random.Random(7), first_s=0.25, most_s=15)
    waits = [backoff.next_s(within_s=2.0) for _ in range(100)]
    assert max(waits) <= 2.0
    assert max(backoff.next_s() for _ in range(100)) > 2.0, "once there is no hurry, the pauses have grown"
