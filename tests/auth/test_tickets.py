"""Tickets: once, for a while, in bounded number."""

import re

import pytest

from broker.auth.facts import Refused
from broker.auth.tickets import Tickets
from broker.core.access import Principal
from tests.auth.helpers import Clock

ALICE = Principal("alice", (), 2_000_000.0, "token", "0123abcd")
BOB = Principal("bob", ())


def test_a_ticket_is_base64url_without_padding_and_good_once() -> None:
    tickets = Tickets(Clock())
    ticket = tickets.issue(ALICE)
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", ticket)
    principal = tickets.redeem(ticket)
    assert principal == Principal("alice", (), 2_000_000.0, "ticket", "0123abcd")
    assert tickets.redeem(ticket) is None
    assert len(tickets) == 0


def test_a_ticket_lives_for_its_time() -> None:
    clock = Clock()
    tickets = Tickets(clock, live_s=30)
    early, late = tickets.issue(ALICE), tickets.issue(BOB)
    clock.now += 29.9
    assert tickets.redeem(early) is not None
    clock.now += 0.1
    assert tickets.redeem(late) is None
    assert len(tickets) == 0


@pytest.mark.parametrize("guess", ["", "x", "=", "é", "\ud800", "A" * 10_000])
def test_what_is_no_ticket_redeems_nothing(guess: str) -> None:
    tickets = Tickets(Clock())
    tickets.issue(ALICE)
    assert tickets.redeem(guess) is None
    assert len(tickets) == 1


def test_the_number_per_principal_is_bounded_and_frees_itself() -> None:
    clock = Clock()
    tickets = Tickets(clock, per_principal_max=2)
    first = tickets.issue(ALICE)
    tickets.issue(ALICE)
    with pytest.raises(Refused) as caught:
        tickets.issue(ALICE)
    assert (caught.value.status, caught.value.headers) == (429, (("Retry-After", "30"),))
    tickets.issue(BOB)
    tickets.redeem(first)
    tickets.issue(ALICE)
    clock.now += 30
    for _ in range(2):
        tickets.issue(ALICE)


def test_the_number_overall_is_bounded() -> None:
    tickets = Tickets(Clock(), tickets_max=3)
    for number in range(3):
        tickets.issue(Principal(f"p{number}", ()))
    with pytest.raises(Refused, match="429"):
        tickets.issue(BOB)


def test_nothing_is_left_of_tickets_that_died() -> None:
    clock = Clock()
    tickets = Tickets(clock)
    for number in range(1000):
        tickets.issue(Principal(f"p{number}", ()))
    clock.now += 31
    assert len(tickets) == 0
    assert not tickets._held


def test_a_ticket_buys_no_ticket() -> None:
    tickets = Tickets(Clock())
    principal = tickets.redeem(tickets.issue(ALICE))
    assert principal is not None
    with pytest.raises(Refused, match="403"):
        tickets.issue(principal)
