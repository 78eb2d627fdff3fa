"""Shrinking keeps what matters and loses the rest."""

import pytest

from tests.core.shrink import shrink


@pytest.mark.parametrize("needed", [[0], [99], [3, 50, 97], [10, 11, 12, 13], list(range(0, 100, 9))])
def test_what_is_needed_is_left_and_nothing_else(needed: list[int]) -> None:
    assert shrink(range(100), lambda items: set(needed) <= set(items)) == needed


def test_what_fails_with_nothing_at_all_is_left_with_nothing() -> None:
    assert shrink(range(64), lambda items: True) == []


def test_the_order_is_kept() -> None:
    def fails(items: list[str]) -> bool:
        return "".join(items).find("ac") >= 0

    assert shrink("abcac", fails) == ["a", "c"]


def test_tries_are_bounded() -> None:
    tried: list[int] = []

    def fails(items: list[int]) -> bool:
        tried.append(len(items))
        return 77 in items

    left = shrink(range(100), fails, tries_max=5)
    assert 77 in left and len(tried) == 5


def test_one_that_cannot_be_made_smaller_is_left_as_it_is() -> None:
    items = list(range(10))
    assert shrink(items, lambda some: len(some) == 10) == items
