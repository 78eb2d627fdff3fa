"""Turns, lanes, shares of a full queue and newest-wins, through the router and under a clock that stands still."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

import pytest

from broker.core import errors, rates
from broker.core.access import Grant, Role
from broker.core.events import Detached
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Call
from broker.core.sessions import Session
from tests.core.harness import World

SERVICE_S = 0.010
NO_TIME_S = 1e-9


class Served:
    """A world in which every call takes exactly SERVICE_S at its worker, and things happen at given times."""

    def __init__(self, world: World, workers: list[Session]) -> None:
        self.world = world
        self.workers = workers
        self.agenda: list[tuple[float, int, Any]] = []
        self.planned = 0
        self.asked_at: dict[Any, float] = {}
        self.latencies: dict[Session, list[float]] = {}
        self.then: dict[Session, Any] = {}

    def at(self, time: float, act: Any) -> None:
        self.planned += 1
        heapq.heappush(self.agenda, (time, self.planned, act))

    def ask(self, caller: Session, wire_id: str, **options: Any) -> None:
        self.asked_at[caller, wire_id] = self.world.now
        self.world.ask(caller, wire_id, timeout=1000.0, **options)
        self._look()

    def _look(self) -> None:
        for worker in self.workers:
            for call in self.world.calls(worker):
                self.at(self.world.now + SERVICE_S, lambda w=worker, c=call: self._done(w, c))
        for caller, then in self.then.items():
            for end in self.world.ends(caller):
                took = self.world.now - self.asked_at.pop((caller, end.wire_id))
                if end.outcome.kind is errors.OK:
                    self.latencies.setdefault(caller, []).append(took)
                self.at(self.world.now, then)
        self.world.take()

    def _done(self, worker: Session, call: Call) -> None:
        self.world.answer(worker, call.attempt)
        self._look()

    def run(self, until: float) -> None:
        while self.agenda and self.agenda[0][0] <= until:
            self.world.now, _, act = heapq.heappop(self.agenda)
            act()


def served_alone_and_beside_a_flood(places: int, floods: int, window: int, think_s: float) -> tuple[float, float]:
    """The longest one caller waits for an answer, alone and while others of another token keep `window` in flight."""
    longest = []
    for flooding in (False, True):
        world = World()
        served = Served(world, [world.worker(capacity=1) for _ in range(places)])
        quiet = world.caller(principal="quiet")
        made = Counter[str]()

        def one_more(caller: Session = quiet, name: str = "q", served: Served = served, made: Any = made) -> None:
            made[name] += 1
            served.ask(caller, f"{name}{made[name]}")

        served.then[quiet] = lambda served=served, more=one_more: served.at(served.world.now + think_s, more)
        for number in range(floods if flooding else 0):
            flood = world.caller(principal="flood")
            served.then[flood] = lambda flood=flood, number=number, more=one_more: more(flood, f"f{number}-")
            for _ in range(window):
                one_more(flood, f"f{number}-")
        served.at(world.now + 0.1234, one_more)
        served.run(world.now + 2.5)
        assert len(served.latencies[quiet]) > 70
        longest.append(max(served.latencies[quiet]))
    return longest[0], longest[1]


@pytest.mark.parametrize("think_s", [0.0, 0.0007, 0.013])
@pytest.mark.parametrize(("floods", "window"), [(1, 60), (10, 6), (1, 5)])
@pytest.mark.parametrize("places", [1, 4])
def test_beside_a_flood_a_caller_waits_one_service_more_than_alone(
    places: int, floods: int, window: int, think_s: float
) -> None:
    alone, beside = served_alone_and_beside_a_flood(places, floods, window, think_s)
    assert alone == pytest.approx(SERVICE_S)
    assert beside <= alone + SERVICE_S + NO_TIME_S


def order_served(world: World, worker: Session) -> list[str]:
    """Answer all that is asked, one after the other; who was given what, in order."""
    order = []
    while worker.attempts:
        (attempt,) = worker.attempts.values()
        order.append(f"{attempt.request.session.principal}{attempt.request.wire_id}")
        world.answer(worker, attempt)
    return order


def test_tokens_take_turns_whatever_the_number_of_requests_and_connections() -> None:
    world = World()
    worker = world.worker(capacity=1)
    many = [world.caller(principal="a") for _ in range(3)]
    few, other = world.caller(principal="b"), world.caller(principal="c")
    world.ask(other, "first")
    for number in range(4):
        for session in many:
            world.ask(session, number)
    for number in range(2):
        world.ask(few, number)
    assert order_served(world, worker)[:6] == ["cfirst", "a0", "b0", "a0", "b1", "a0"]


def test_priorities_are_minded_and_none_starves() -> None:
    world = World()
    worker, caller = world.worker(capacity=1), world.caller(principal="")
    world.ask(caller, "first")
    for number in range(20):
        world.ask(caller, f"low{number}", priority=-1)
    for number in range(20):
        world.ask(caller, f"high{number}", priority=9)
    order = order_served(world, worker)
    assert order[1:11] == [*(f"high{n}" for n in range(8)), "low0", "high8"]
    assert len(order) == 41


def test_an_idempotent_request_that_lost_its_worker_stands_first_of_its_caller() -> None:
    world = World()
    lost, kept = world.worker(capacity=2), world.worker(capacity=1)
    a, b = world.caller(principal="a"), world.caller(principal="b")
    world.ask(b, "busy")
    world.ask(a, "lost 1", idempotent=True, retries=1)
    world.ask(a, "lost 2", idempotent=True, retries=1)
    if not kept.attempts:
        pytest.fail("both workers should be busy")
    held = {attempt.request.wire_id for attempt in lost.attempts.values()}
    world.ask(a, "later")
    world.ask(b, "other")
    world.ask(a, "urgent", priority=1)
    world.feed(Detached(lost, 1006, "", 0))
    order = order_served(world, kept)[1:]
    again = [name for name in order if name[1:] in held]
    assert order[0] == "aurgent", "the lane comes first"
    assert again and [name for name in order if name[0] == "a"][1 : 1 + len(again)] == again == sorted(again)


# ---------------------------------------------------------------- shares of a full queue


def full_world(queue_max: int) -> tuple[World, Session]:
    """One worker that is busy, and a queue with so many places."""
    world = World(Limits(queue_max=queue_max))
    worker = world.worker(capacity=1)
    world.ask(world.caller(principal="first"), "first", timeout=1000.0)
    world.take()
    return world, worker


@pytest.mark.parametrize("queue_max", [0, 1, 2, 5])
def test_a_queue_limit_of_n_accepts_n(queue_max: int) -> None:
    world, _ = full_world(queue_max)
    caller = world.caller()
    for number in range(queue_max):
        world.ask(caller, number)
    assert not world.ends(caller)
    world.ask(caller, "one more")
    end = world.one_end(caller)
    outcome = end.outcome
    assert end.wire_id == "one more" and outcome.kind is errors.OVERLOADED and outcome.retryable
    assert (outcome.bound, outcome.retry_after_ms, outcome.dispatched) == ("queue", 100, False)
    assert len(world.router.registry.by_name["e"].queue) == queue_max


def test_who_has_less_of_a_full_queue_takes_the_place_of_the_newest_of_who_has_most() -> None:
    world, worker = full_world(4)
    flood, again, other = world.caller(principal="a"), world.caller(principal="a"), world.caller(principal="b")
    for number in range(2):
        world.ask(flood, number)
        world.ask(again, number)
    world.ask(other, "mine")
    end = world.one_end(again)
    outcome = end.outcome
    assert end.wire_id == 1 and not world.ends(other) and not world.ends(flood)
    assert outcome.kind is errors.OVERLOADED and outcome.retryable and not outcome.dispatched
    assert (outcome.bound, outcome.retry_after_ms, outcome.attempts) == ("queue", 100, 0)
    assert world.router.counters.overloaded["queue"] == 1
    world.ask(other, "mine too")
    assert world.one_end(flood).wire_id == 1
    world.ask(other, "too much")
    assert world.one_end(other).wire_id == "too much", "its share is no smaller than the largest"
    world.ask(flood, "refused")
    assert world.one_end(flood).wire_id == "refused"
    assert order_served(world, worker) == ["firstfirst", "a0", "bmine", "a0", "bmine too"]


def test_nobodys_only_request_makes_room() -> None:
    world, _ = full_world(2)
    a, b, c = (world.caller(principal=name) for name in "abc")
    world.ask(a, 1)
    world.ask(b, 1)
    world.ask(c, 1)
    assert world.one_end(c).outcome.bound == "queue" and not world.ends(a) and not world.ends(b)


def test_a_queue_above_its_bound_after_a_reload_takes_nobody_in() -> None:
    world, worker = full_world(4)
    a, b = world.caller(principal="a"), world.caller(principal="b")
    for number in range(4):
        world.ask(a, number)
    world.reconfigure(Limits(queue_max=2), {})
    world.ask(b, 1)
    assert world.one_end(b).outcome.bound == "queue" and not world.ends(a)
    assert len(order_served(world, worker)) == 5, "it drains by itself"


def test_row_22_a_flood_from_one_token_is_bounded_and_leaves_others_their_turn() -> None:
    world = World(Limits(queue_max=20, in_flight_max=30))
    worker = world.worker(capacity=1)
    flood, also, quiet = world.caller(principal="a"), world.caller(principal="a"), world.caller(principal="b")
    for number in range(100):
        world.ask(flood, number)
    ends = [end.outcome for end in world.ends(flood)]
    assert len(ends) == 79 and {end.bound for end in ends} == {"queue"}, "one executes, twenty wait"
    assert all(end.kind is errors.OVERLOADED and end.retryable and end.retry_after_ms == 100 for end in ends)
    world.take()
    world.ask(also, "another connection of the same token")
    assert world.one_end(also).outcome.bound == "queue"
    world.ask(quiet, "q")
    assert not world.ends(quiet), "it waits, and the newest of the flood does not"
    assert world.one_end(flood).outcome.bound == "queue"
    served = order_served(world, worker)
    assert served.index("bq") == 2, "one was executing, one came before; then it has its turn"
    assert world.router.pending.count == 0


def test_row_22_requests_in_flight_are_bounded_per_session() -> None:
    world = World(Limits(in_flight_max=3))
    world.worker()
    flood, quiet = world.caller(principal="a"), world.caller(principal="b")
    for number in range(5):
        world.ask(flood, number)
    outcomes = [end.outcome for end in world.ends(flood)]
    assert [(o.bound, o.retry_after_ms, o.retryable) for o in outcomes] == [("in_flight", 100, True)] * 2
    world.ask(quiet, 1)
    assert not world.ends(quiet)


# ---------------------------------------------------------------- newest wins


def fresh_world(**own: Any) -> tuple[World, Session]:
    """An endpoint where the newest wins, its worker busy."""
    world = World(endpoints={"e": EndpointLimits(newest_wins=True, **own)})
    worker = world.worker(capacity=1)
    world.ask(world.caller(principal="first"), "first", "e/m", timeout=1000.0, group="g")
    world.take()
    return world, worker


def test_a_newer_request_of_the_same_group_and_method_displaces_the_one_that_waits() -> None:
    world, worker = fresh_world()
    one, two = world.caller(), world.caller()
    world.ask(one, "old", group="g")
    world.ask(one, "other method", "e/n", group="g")
    world.ask(one, "other group", group="h")
    world.ask(two, "new", group="g")
    end = world.one_end(one)
    assert end.wire_id == "old" and end.outcome.kind is errors.CANCELLED and end.outcome.cause == "superseded"
    assert not end.outcome.dispatched and not end.outcome.retryable
    assert order_served(world, worker) == [
        "firstfirst", "somebodyother method", "somebodynew", "somebodyother group",
    ]  # fmt: skip


def test_without_a_group_a_session_displaces_its_own_only() -> None:
    world, _ = fresh_world()
    one, two = world.caller(), world.caller()
    world.ask(one, 1)
    world.ask(two, 1)
    assert not world.ends(one)
    world.ask(one, 2)
    assert world.one_end(one).outcome.cause == "superseded" and not world.ends(two)


def test_a_group_of_another_token_is_another_group() -> None:
    world, _ = fresh_world()
    one, two = world.caller(principal="a"), world.caller(principal="b")
    world.ask(one, 1, group="g")
    world.ask(two, 1, group="g")
    assert not world.ends(one), "or anybody could cancel anybody's requests"


def test_what_a_worker_has_is_not_displaced() -> None:
    world, worker = fresh_world()
    caller = world.caller()
    world.answer(worker, next(iter(worker.attempts.values())))
    world.ask(caller, 1, group="g")
    world.ask(caller, 2, group="g")
    assert not world.ends(caller) and not world.cancelled(worker)


def test_the_newest_takes_the_place_of_the_older_in_a_full_queue() -> None:
    world, _ = fresh_world(queue_max=1)
    caller = world.caller()
    world.ask(caller, 1, group="g")
    world.ask(caller, 2, group="g")
    assert world.one_end(caller).outcome.cause == "superseded"
    world.ask(caller, 3, group="h")
    assert world.one_end(caller).outcome.bound == "queue"


def test_the_newest_wins_over_what_waited_before_it_was_configured() -> None:
    world = World()
    world.worker(capacity=1)
    caller = world.caller()
    world.ask(caller, 0)
    for number in (1, 2, 3):
        world.ask(caller, number)
    world.reconfigure(Limits(), {"e": EndpointLimits(newest_wins=True)})
    world.ask(caller, 4)
    assert world.one_end(caller).wire_id == 3
    world.cancel(caller, 4)
    world.take()
    world.ask(caller, 5)
    assert not world.ends(caller), "of those that were there before, the newest is displaced, once"


def test_with_a_key_all_that_have_joined_are_superseded_together() -> None:
    world, _ = fresh_world()
    one, two = world.caller(), world.caller()
    world.ask(one, 1, group="g", key="k", idempotent=True, retries=1)
    world.ask(two, 1, group="g", key="k", idempotent=True, retries=1)
    world.ask(one, 2, group="g")
    causes = [end.outcome.cause for caller in (one, two) for end in world.ends(caller)]
    assert causes == ["superseded", "superseded"]


def test_grants_are_minded_before_anything_is_displaced() -> None:
    world, _ = full_world(2)
    flood = world.caller(principal="a")
    for number in range(2):
        world.ask(flood, number)
    stranger = world.caller(principal="b", grants=(Grant(Role.CALLER, ("other",)),))
    world.ask(stranger, 1)
    assert world.one_end(stranger).outcome.kind is errors.DENIED and not world.ends(flood)


# ---------------------------------------------------------------- rates


def test_row_22_requests_per_second_are_bounded_per_token_where_configured() -> None:
    world = World(Limits(requests_per_s=10.0))
    worker = world.worker()
    flood, also, quiet = world.caller(principal="a"), world.caller(principal="a"), world.caller(principal="b")
    for number in range(8):
        world.ask(flood, number)
    for number in range(4):
        world.ask(also, number)
    assert len(world.calls(worker)) == 10, "one second's worth at once, over all connections"
    outcomes = [end.outcome for end in world.ends(also)]
    assert [(o.kind, o.bound, o.retryable, o.dispatched) for o in outcomes] == [
        (errors.OVERLOADED, "rate", True, False)
    ] * 2
    assert [o.retry_after_ms for o in outcomes] == [100, 100] and world.router.counters.overloaded["rate"] == 2
    world.take()
    world.ask(quiet, 1)
    assert len(world.calls(worker)) == 1, "another token has its own"
    world.now += 0.099
    world.ask(also, "early")
    assert world.one_end(also).outcome.retry_after_ms == 1
    world.now += 0.001
    world.ask(also, "in time")
    assert not world.ends(also), "when it was told to come back, it may"


def test_slow_rates_let_one_through_and_say_when_the_next_may_come() -> None:
    world = World(Limits(requests_per_s=0.5))
    world.worker()
    caller = world.caller()
    for number in (1, 2):
        world.ask(caller, number)
    assert world.one_end(caller).outcome.retry_after_ms == 2000


def test_notifications_count_towards_the_rate_and_are_dropped_above_it() -> None:
    world = World(Limits(requests_per_s=3.0))
    worker, caller = world.worker(), world.caller()
    for _ in range(5):
        world.ask(caller, None)
    assert len(world.notified(worker)) == 3 and world.router.counters.notifications_dropped == 2
    world.ask(caller, 1)
    assert world.one_end(caller).outcome.bound == "rate"


def test_an_id_in_flight_is_refused_as_such_whatever_the_rate() -> None:
    world = World(Limits(requests_per_s=1.0))
    world.worker()
    caller = world.caller()
    world.ask(caller, 1)
    world.ask(caller, 1)
    assert world.one_end(caller).outcome.kind is errors.DUPLICATE_ID


def test_tokens_whose_bucket_is_full_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SWEEP_AT", 100)
    buckets = rates.Rates()
    for number in range(1000):
        assert buckets.take(f"p{number}", 2.0, number * 0.1) == 0.0
    assert len(buckets) <= 200
    assert buckets.take("p999", 2.0, 99.9) == 0.0 and buckets.take("p999", 2.0, 99.9) == pytest.approx(0.5)
