"""Wrong credentials are counted by address, in a table that does not grow."""

import pytest

from broker.auth.guesses import Guesses, group_of
from tests.auth.helpers import Clock


def test_a_minute_s_worth_at_once_then_one_by_one() -> None:
    clock = Clock()
    guesses = Guesses(clock, per_minute=6)
    assert [guesses.wrong("10.0.0.1") for _ in range(8)] == [0] * 6 + [10, 10]
    clock.now += 4
    assert guesses.wrong("10.0.0.1") == 6
    clock.now += 6
    assert [guesses.wrong("10.0.0.1") for _ in range(2)] == [0, 10]
    clock.now += 3600
    assert [guesses.wrong("10.0.0.1") for _ in range(7)] == [0] * 6 + [10], "no more than a minute's worth gathers"


def test_the_table_is_bounded_and_forgets_the_longest_unheard() -> None:
    guesses = Guesses(Clock(), per_minute=1, addresses_max=3)
    for number in range(3):
        guesses.wrong(f"10.0.0.{number}")
    assert guesses.wrong("10.0.0.0") > 0
    guesses.wrong("10.0.0.9")
    assert len(guesses) == 3
    assert guesses.wrong("10.0.0.0") > 0, "heard lately"
    assert guesses.wrong("10.0.0.1") == 0, "forgotten"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8:0:0:ffff::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "unix socket", True),
    ],
)
def test_ipv6_counts_by_64_bits(one: str, other: str, same: bool) -> None:
    assert (group_of(one) == group_of(other)) is same


def test_what_was_no_failure_is_taken_back() -> None:
    clock = Clock()
    guesses = Guesses(clock, per_minute=2, addresses_max=2)
    assert guesses.wait_s("10.0.0.1") == 0 and len(guesses) == 0, "looking notes nothing"
    assert [guesses.wrong("10.0.0.1") for _ in range(2)] == [0, 0] and guesses.wait_s("10.0.0.1") == 30
    guesses.right("10.0.0.1")
    assert guesses.wait_s("10.0.0.1") == 0 and guesses.wrong("10.0.0.1") == 0 and guesses.wrong("10.0.0.1") == 30
    clock.now += 60
    for _ in range(5):
        guesses.right("10.0.0.1")
    assert [guesses.wrong("10.0.0.1") for _ in range(3)] == [0, 0, 30], "never more than a minute's worth"
    guesses.right("10.0.0.7")
    assert len(guesses) == 1, "nothing was taken there"
