"""Deadlines in slots: never early, at most one slot late, in order, in slices."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.core.deadlines import NEVER, Deadlines

SLOT_S = 0.05
moments = st.floats(0, 1e6, allow_nan=False)


@given(due=moments, slot_s=st.sampled_from([0.05, 0.03, 0.01, 0.25, 1.0, 0.007]), start=st.sampled_from([0.0, 3e9]))
def test_never_early_and_at_most_one_slot_late(due: float, slot_s: float, start: float) -> None:
    due += start
    deadlines: Deadlines[str] = Deadlines(slot_s)
    deadlines.add("x", due)
    assert due <= deadlines.earliest <= due + slot_s * 1.0001
    assert deadlines.take_due(due - 1e-3, 10) == [] or deadlines.earliest <= due - 1e-3
    assert deadlines.take_due(deadlines.earliest, 10) == ["x"]
    assert deadlines.earliest == NEVER


@given(dues=st.lists(st.integers(0, 400), max_size=60), limit=st.integers(1, 7), gone=st.sets(st.integers(0, 59)))
def test_taken_in_order_of_slots_and_within_a_slot_as_they_came(dues: list[int], limit: int, gone: set[int]) -> None:
    deadlines: Deadlines[int] = Deadlines(SLOT_S)
    slots = [deadlines.add(number, due * 0.01) for number, due in enumerate(dues)]
    for number in gone:
        if number < len(dues):
            del slots[number][number]
    left = [number for number in range(len(dues)) if number not in gone]
    got: list[int] = []
    while True:
        some = deadlines.take_due(10.0, limit)
        assert len(some) <= limit
        if not some:
            break
        got += some
    assert got == sorted(left, key=lambda number: (int(dues[number] * 0.01 * (1 / SLOT_S)), number))
    assert len(deadlines) == 0 and deadlines.earliest == NEVER


def test_what_is_not_due_stays() -> None:
    deadlines: Deadlines[str] = Deadlines(SLOT_S)
    deadlines.add("soon", 1.0)
    deadlines.add("later", 2.0)
    assert deadlines.take_due(1.5, 10) == ["soon"]
    assert "later" in deadlines and "soon" not in deadlines and len(deadlines) == 1
    assert 2.0 < deadlines.earliest <= 2.05


def test_entries_may_come_while_a_slot_is_being_taken() -> None:
    deadlines: Deadlines[int] = Deadlines(SLOT_S)
    for number in range(6):
        deadlines.add(number, 1.01)
    assert deadlines.take_due(1.06, 4) == [0, 1, 2, 3]
    deadlines.add(9, 1.08)
    assert deadlines.take_due(1.06, 4) == [4, 5]
    assert deadlines.take_due(1.2, 4) == [9]
    deadlines.add(10, 1.21)  # a slot that was the last one used and is gone is made anew
    assert deadlines.take_due(1.3, 4) == [10]


def test_an_emptied_slot_costs_one_idle_look() -> None:
    deadlines: Deadlines[int] = Deadlines(SLOT_S)
    slot = deadlines.add(1, 1.0)
    deadlines.add(2, 5.0)
    del slot[1]
    assert deadlines.earliest <= 1.05
    assert deadlines.take_due(1.05, 10) == []
    assert deadlines.earliest > 5.0
