"""What is kept for a session until its peer has it: what goes first, what there is room for, what a later link has."""

from __future__ import annotations

import time
from typing import cast

import pytest

from broker.core import errors
from broker.core.access import Role
from broker.core.budget import Budget
from broker.core.events import Attached, Detached, NumberedLink, PartSent, Resumed, TakeOver
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
    return Kept(cast(NumberedLink, Silent()), Limits(**limits), Budget())


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


def with_grace(world: World, role: Role = Role.CALLER, endpoint: str | None = None) -> Session:
    world.sessions_made += 1
    world.feed(
        Attached(
            session=world.sessions_made, link=Silent(), principal="somebody", grants=EVERYTHING, role=role,
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
