"""What is kept for a session until its peer has it: what goes first, what there is room for, what a later link has."""

from __future__ import annotations

import time
from typing import cast

import pytest

from broker.core import errors
from broker.core.access import Role
from broker.core.allowances import Allowance
from broker.core.budget import Budget
from broker.core.counters import Counters
from broker.core.events import Attached, CloseLink, Detached, NumberedLink, PartSent, Resumed, TakeOver
from broker.core.kept import NEVER_WRITTEN, OWN_BYTES, Kept
from broker.core.limits import Limits
from broker.core.messages import Body, Broadcast, CancelAttempt, End, Part
from broker.core.sessions import Session
from tests.core.harness import EVERYTHING, NoLink, World


class Silent(NoLink):
    """A link that takes everything."""

    def deliver_numbered(self, message: object, n: int) -> None:
        pass

    def broadcast_numbered(self, message: object, frames: object, n: int) -> bool:
        return True


def kept(**limits: int) -> Kept:
    return Kept(cast(NumberedLink, Silent()), Limits(**limits), Budget(), Allowance(Counters()))


def broadcast(size: int) -> Broadcast:
    return Broadcast("e", None, 1, Body(b"x" * size))


def test_what_can_be_missed_takes_no_room_from_what_cannot() -> None:
    books = kept(kept_max_bytes=10_000)
    for _ in range(9):
        books.broadcast(broadcast(1000 - OWN_BYTES), {})
    assert books.has_room(5000) and not books.has_room(10_000)
    books.deliver(Part(b"1", 0, 0, Body(b"x" * 5000)))
    books.check()
    assert books.cut and not books.lost
    assert not books.has_room(5000)
    books.acked(books.n)
    assert books.has_room(9000)
    books.broadcast(broadcast(1), {})
    books.forget()
    books.check()


def test_an_acknowledgement_of_very_many_costs_no_more_for_each() -> None:
    def acked_s(number: int) -> float:
        best = 60.0
        for _ in range(3):
            books = kept(kept_max=number)
            for each in range(number):
                books.deliver(CancelAttempt(each))
            begun_at = time.process_time()
            assert books.acked(number) and not len(books)
            best = min(best, time.process_time() - begun_at)
        return best

    assert acked_s(32_000) < 80 * acked_s(1000)  # a search for the oldest made it 600 times as much


def with_grace(
    world: World, role: Role = Role.CALLER, endpoint: str | None = None, principal: str = "somebody"
) -> Session:
    world.sessions_made += 1
    world.feed(
        Attached(
            session=world.sessions_made, link=Silent(), principal=principal, grants=EVERYTHING, role=role,
            endpoint=endpoint, listen=False, grace_s=30.0, secret="s",
        )
    )  # fmt: skip
    session = world.router.sessions.by_id[world.sessions_made]
    perform(world)
    return session


def perform(world: World) -> None:
    """What an engine does, as far as it matters here."""
    for effect in world.take():
        if isinstance(effect, TakeOver):
            assert effect.session.kept is not None
            effect.session.kept.link = effect.link


@pytest.mark.parametrize("flushed", [10, 5_000_000])
def test_a_call_that_reached_its_worker_over_an_earlier_link_counts_as_given_out(flushed: int) -> None:
    """Marks are positions in one link's outbox; on the next they would say that it was never written."""
    world = World()
    caller, worker = world.caller(), with_grace(world, Role.WORKER, "e")
    world.ask(caller, 1)
    attempt = world.one_call(worker).attempt
    attempt.mark = 1_000_000  # much had gone over its first link
    assert worker.kept is not None
    world.feed(Detached(worker, 1006, "", 1_000_000, worker.kept.link))
    link = cast(NumberedLink, Silent())
    world.feed(Resumed(session=worker, link=link, received=worker.kept.n, grants=EVERYTHING))
    perform(world)
    world.feed(Detached(worker, 1000, "", flushed, link))
    outcome = world.outcome(caller)
    assert outcome.kind is errors.WORKER_LOST and not outcome.retryable


def test_a_call_no_link_ever_took_may_be_asked_again() -> None:
    world = World()
    caller, worker = world.caller(), with_grace(world, Role.WORKER, "e")
    world.ask(caller, 1, timeout=100.0)
    world.one_call(worker).attempt.mark = NEVER_WRITTEN
    assert worker.kept is not None
    world.feed(Detached(worker, 1006, "", NEVER_WRITTEN - 1, worker.kept.link))
    world.sleep(31)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.WORKER_LOST and outcome.retryable


def test_parts_that_are_gathered_need_no_room_at_their_caller() -> None:
    world = World(Limits(kept_max_bytes=3000))
    worker, caller = world.worker(), with_grace(world)
    assert caller.kept is not None
    caller.kept.deliver(End(b"0", errors.ENDED_OK, Body(b"x" * 2700)))
    world.ask(caller, 1)
    attempt = world.one_call(worker).attempt
    world.feed(PartSent(worker, None, attempt.id, 0, Body(b"1" * 500)))
    world.answer(worker, attempt, b"null")
    assert world.outcome(caller).kind is errors.OK


# ---------------------------------------------------------------- one principal's share


def away(world: World, principal: str) -> Session:
    """A session with grace whose link has broken."""
    session = with_grace(world, principal=principal)
    assert session.kept is not None
    world.feed(Detached(session, 1006, "", 0, session.kept.link))
    perform(world)
    return session


def keep(session: Session, size: int) -> None:
    assert session.kept is not None
    session.kept.deliver(End(b"0", errors.ENDED_OK, Body(b"x" * (size - OWN_BYTES))))


def test_what_is_kept_for_one_principal_is_a_share_and_who_is_longest_away_pays_first() -> None:
    limits = Limits(memory_soft_bytes=100_000, principal_share=0.25, kept_max_bytes=8000)
    world = World(limits)
    first, second, here, other = away(world, "greedy"), away(world, "greedy"), with_grace(world), away(world, "other")
    here_too = with_grace(world, principal="greedy")
    for session in (first, second, here, other, here_too):
        for _ in range(8):
            keep(session, 1000)
    assert [len(session.kept or ()) for session in (first, second, here_too)] == [8, 8, 8]
    more = with_grace(world, principal="greedy")
    for _ in range(3):
        keep(more, 1000)
    assert [len(session.kept or ()) for session in (first, second, here_too, more)] == [6, 8, 8, 3]
    assert first.kept is not None and not first.kept.can_resume(0)
    assert len(other.kept or ()) == len(here.kept or ()) == 8
    assert world.router.counters.over_share["messages"] == 2
    last = with_grace(world, principal="greedy")
    for session in (more, last):
        for _ in range(8):
            keep(session, 1000)
    assert [len(session.kept or ()) for session in (first, second, here_too, more, last)] == [0, 1, 8, 8, 8]
    world.router.check()


def test_without_anybody_away_the_share_is_a_bound_of_who_asks() -> None:
    world = World(Limits(memory_soft_bytes=40_000, principal_share=0.25, kept_max_bytes=8000))
    full, asking = with_grace(world), with_grace(world)
    for _ in range(8):
        keep(full, 1000)
    for _ in range(4):
        keep(asking, 1000)
    assert asking.kept is not None and len(full.kept or ()) == 8 and len(asking.kept) == 2
    assert not asking.kept.has_room(1000) and asking.kept.lost
    world.router.check()


def test_a_bound_that_was_lowered_does_not_break_who_comes_later() -> None:
    world = World(Limits(memory_soft_bytes=40_000, principal_share=0.5, kept_max_bytes=8000))
    before = with_grace(world)
    for _ in range(8):
        keep(before, 1000)
    lower = Limits(memory_soft_bytes=40_000, principal_share=0.1, kept_max_bytes=8000)
    world.router.reconfigure(lower, {}, world.now)
    later = with_grace(world)
    keep(later, 1000)
    assert len(before.kept or ()) == 8 and later.kept is not None and len(later.kept) == 0 and later.kept.lost == 1
    world.router.check()


def test_a_principal_with_too_many_sessions_away_loses_the_longest_away() -> None:
    world = World(Limits(sessions_max=12, principal_share=0.25))
    many = [away(world, "greedy") for _ in range(5)]
    other = away(world, "other")
    assert [session.link is not None for session in many] == [False, False, True, True, True]
    assert other.link is not None and world.router.sessions.suspended == 4
    assert world.router.counters.over_share["sessions"] == 2
    world.router.check()
    world.sleep(31)
    assert not len(world.router.sessions) and not len(world.router.state.allowances)
    world.router.check()


def test_who_is_expelled_leaves_nothing_to_come_back_to() -> None:
    world = World()
    gone, here = away(world, "somebody"), with_grace(world)
    keep(gone, 1000)
    world.router.attaching.expel(gone, "revoked", world.now)
    world.router.attaching.expel(here, "revoked", world.now)
    assert gone.link is None and not world.router.state.budget.used
    (close,) = [effect for effect in world.router.effects if isinstance(effect, CloseLink)]
    assert close.session is here and close.close is errors.UNAUTHORISED
    assert here.kept is not None
    world.feed(Detached(here, 4401, "", 0, here.kept.link))
    assert not len(world.router.sessions)
    world.router.check()
