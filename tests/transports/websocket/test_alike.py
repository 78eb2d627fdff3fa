"""Random days of a broker with the compiled core, and of one in Python: the same step by step.

`ALIKE_SEEDS=1000` goes through many more days. What a failure says is enough to repeat it.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from broker.links.compiled import core
from broker.links.socket import SocketLink
from tests.transports.websocket.alike import ORDER, Failure, Way, World, python_link, run

SEEDS = int(os.environ.get("ALIKE_SEEDS", "32"))
"""days of each kind"""
pytestmark = [
    pytest.mark.skipif(core() != "compiled core", reason="there is no compiled core here"),
    pytest.mark.timeout(60 + SEEDS),
]
STEPS = 150
AROUND = 200
"""characters that are shown on either side of where two texts part"""
COMPILED = Way("compiled", SocketLink, compiled=True, pure="")
FRAMES_COMPILED = Way("Python over compiled frames", python_link(), compiled=False, pure="")
PYTHON = Way("Python", python_link(), compiled=False, pure="1")


def parting(first: World, second: World) -> str:
    """Where the steps of two runs part; empty if they do not."""
    for number, (one, other) in enumerate(zip(first.steps, second.steps, strict=True)):
        for name in one:
            if one[name] != other[name] and not (name == ORDER and second.way is PYTHON):
                said = excerpts(one[name], other[name])
                return f"step {number}, {name}:\n{first.way.name}: {said[0]}\n{second.way.name}: {said[1]}"
    return ""


def excerpts(one: str, other: str) -> tuple[str, str]:
    """Both texts around the first character in which they differ."""
    alike = (number for number, (mine, yours) in enumerate(zip(one, other, strict=False)) if mine != yours)
    at = next(alike, min(len(one), len(other)))
    begin = max(0, at - AROUND)
    return one[begin : at + AROUND], other[begin : at + AROUND]


def told_alike(ways: tuple[Way, Way], seed: int, *, calm: bool, one_by_one: bool = False) -> tuple[World, World]:
    """Run it both ways, and compare. Raises Failure."""
    first, second = (run(way, seed, STEPS, calm=calm, one_by_one=one_by_one) for way in ways)
    parted = parting(first, second)
    if parted:
        raise Failure(f"seed {seed}, {calm=}, {one_by_one=}, {parted}")
    return first, second


def test_troubled_days() -> None:
    accepted = 0
    for seed in range(SEEDS):
        accepted += told_alike((COMPILED, FRAMES_COMPILED), seed, calm=False)[0].router.counters.accepted
    assert accepted > 50 * SEEDS


def test_calm_days_most_of_which_go_through_c() -> None:
    compiled: Counter[str] = Counter()
    python: Counter[str] = Counter()
    for seed in range(SEEDS):
        first, second = told_alike((COMPILED, FRAMES_COMPILED), seed, calm=True)
        compiled += first.in_python
        python += second.in_python
    assert python["asked"] > 50 * SEEDS and python["answered"] > 25 * SEEDS
    assert compiled["asked"] < 0.6 * python["asked"]
    assert compiled["answered"] < 0.4 * python["answered"]


@pytest.mark.parametrize("calm", [False, True])
def test_days_on_which_messages_come_one_by_one(calm: bool) -> None:
    """Without a reader in C the effects of each message are performed before the next is taken in.

    What is written to several links in one turn goes in another order, as a broadcast in C reaches plain ones first.
    """
    for seed in range(SEEDS // 2):
        told_alike((COMPILED, PYTHON), seed, calm=calm, one_by_one=True)
