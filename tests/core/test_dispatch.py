"""The policies against a slow and plain model, and the rules one by one."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core import dispatch
from broker.core.dispatch import POLICIES, LeastPending, Newest, Queue, RoundRobin
from broker.core.limits import EndpointLimits
from broker.core.pending import Attempt
from broker.core.registry import Registration
from broker.core.sessions import Session
from tests.core.harness import World


def registered(number: int, methods: frozenset[str] | None) -> Registration:
    """A registration of nobody anywhere."""
    registration = Registration(None, None)  # type: ignore[arg-type]
    registration.number, registration.methods, registration.capacity = number, methods, 3
    return registration


def world_with(policy: str) -> World:
    return World(endpoints={"e": EndpointLimits(policy=policy)})


def chosen(world: World, caller: Session, count: int) -> list[Session]:
    """Ask that many times; who was given each."""
    workers = []
    for _ in range(count):
        world.take()
        number = world.router.pending.requests_made
        world.ask(caller, f"q{number}", timeout=1000.0)
        workers.append(world.router.pending.attempts_made)
    by_attempt = {a.id: s for s in world.router.sessions.by_id.values() for a in s.attempts.values()}
    return [by_attempt[number] for number in workers]


def finish_one(world: World, worker: Session) -> None:
    attempt: Attempt = next(iter(worker.attempts.values()))
    world.answer(worker, attempt)


# ---------------------------------------------------------------- rules through the router


def test_least_pending_is_the_default() -> None:
    world = World()
    world.worker()
    assert isinstance(world.router.registry.by_name["e"].free, LeastPending)


def test_least_pending_is_exact() -> None:
    world = World()
    caller, a, b, c = world.caller(), world.worker(), world.worker(), world.worker()
    chosen(world, caller, 9)
    for _ in range(2):
        finish_one(world, b)
    finish_one(world, c)
    assert [len(s.attempts) for s in (a, b, c)] == [3, 1, 2]
    assert chosen(world, caller, 3) in ([b, b, c], [b, c, b]), "always one that has fewest"
    assert [len(s.attempts) for s in (a, b, c)] == [3, 3, 3]


def test_least_pending_is_fair_among_equals() -> None:
    world = World()
    caller = world.caller()
    workers = [world.worker() for _ in range(4)]
    assert chosen(world, caller, 4) == workers, "the one that has waited longest goes first"
    for index in (2, 0, 3, 1):
        finish_one(world, workers[index])
    assert chosen(world, caller, 4) == [workers[index] for index in (2, 0, 3, 1)]


def test_one_request_at_a_time_goes_round_under_least_pending() -> None:
    world = World()
    caller = world.caller()
    workers = [world.worker() for _ in range(3)]
    got: Counter[Session] = Counter()
    for _ in range(30):
        (worker,) = chosen(world, caller, 1)
        got[worker] += 1
        finish_one(world, worker)
    assert [got[worker] for worker in workers] == [10, 10, 10]


@pytest.mark.parametrize("policy", list(POLICIES))
def test_capacity_is_never_exceeded_and_all_of_it_is_used(policy: str) -> None:
    world = world_with(policy)
    caller = world.caller()
    workers = [world.worker(capacity=capacity) for capacity in (1, 3, 2)]
    for wire_id in range(10):
        world.ask(caller, wire_id)
    assert [len(worker.attempts) for worker in workers] == [1, 3, 2]
    assert len(world.router.registry.by_name["e"].queue) == 4


@pytest.mark.parametrize("policy", list(POLICIES))
def test_declared_methods_are_kept_to(policy: str) -> None:
    world = world_with(policy)
    caller, reader, anything = world.caller(), world.attach(), world.worker()
    world.serve(reader, "e", methods=["read", "list"])
    for wire_id, method in enumerate(("write", "write", "read", "write", "list", "write")):
        world.ask(caller, wire_id, f"e/{method}")
    assert {a.request.method for a in reader.attempts.values()} <= {"read", "list"}
    assert sum(a.request.method == "write" for a in anything.attempts.values()) == 4


@pytest.mark.parametrize("policy", list(POLICIES))
def test_congested_workers_are_passed_over(policy: str) -> None:
    world = world_with(policy)
    caller, first, second = world.caller(), world.worker(), world.worker()
    for slow, other in ((first, second), (second, first)):
        world.congested(slow, True)
        assert chosen(world, caller, 3) == [other] * 3
        world.congested(slow, False)
    assert set(chosen(world, caller, 8)) <= {first, second}


def test_round_robin_goes_round_whatever_the_load() -> None:
    world = world_with("round_robin")
    caller = world.caller()
    a, b, c = workers = [world.worker() for _ in range(3)]
    assert chosen(world, caller, 4) == [a, b, c, a]
    finish_one(world, c)
    assert chosen(world, caller, 3) == [b, c, a]
    world.detach(b)
    assert chosen(world, caller, 4) == [c, a, c, a]
    assert len(workers) == 3


def test_newest_takes_all_it_can_and_the_older_are_the_reserve() -> None:
    world = world_with("newest")
    caller = world.caller()
    old, middle, new = world.worker(capacity=1), world.worker(capacity=2), world.worker(capacity=2)
    assert chosen(world, caller, 5) == [new, new, middle, middle, old]
    finish_one(world, middle)
    finish_one(world, new)
    assert chosen(world, caller, 2) == [new, middle]
    world.detach(new)
    finish_one(world, old)
    finish_one(world, middle)
    assert chosen(world, caller, 2) == [middle, old]


def test_newest_goes_by_when_a_worker_came_not_by_what_it_said_last() -> None:
    world = world_with("newest")
    caller, old, new = world.caller(), world.worker(), world.worker()
    world.serve(old, "e", capacity=7)
    assert chosen(world, caller, 1) == [new]


def test_loads_beyond_the_levels_count_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LEVELS_MAX", 4)
    world = World()
    caller = world.caller()
    workers = [world.worker() for _ in range(2)]
    assert sorted(worker.id for worker in chosen(world, caller, 40)) == [w.id for w in workers for _ in range(20)]
    for _ in range(20):
        for worker in workers:
            finish_one(world, worker)
    assert chosen(world, caller, 2) == workers


# ---------------------------------------------------------------- against a model


class Plain:
    """All registrations that can take one more, in a list: slow and obvious."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.free: list[Registration] = []
        self.since: dict[Registration, int] = {}
        self.clock = 0

    def touch(self, registration: Registration) -> None:
        self.clock += 1
        self.since[registration] = self.clock

    def choose(self, method: str) -> Registration | None:
        able = [r for r in self.free if r.methods is None or method in r.methods]
        if not able:
            return None
        if self.policy == "newest":
            return max(able, key=lambda r: r.number)
        if self.policy == "round_robin":
            return min(able, key=lambda r: self.since[r])
        return min(able, key=lambda r: (r.load, self.since[r]))


@pytest.mark.parametrize("policy", list(POLICIES))
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 80))
def test_policies_agree_with_the_plain_model(policy: str, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    subject, model = POLICIES[policy](), Plain(policy)
    made: list[Registration] = []
    for _ in range(steps):
        out = [r for r in made if r not in model.free]
        match rng.randrange(4):
            case 0 if len(made) < 6:
                methods = rng.choice((None, frozenset("a"), frozenset("ab")))
                registration = registered(len(made), methods)
                made.append(registration)
                subject.add(registration)
                model.free.append(registration)
                model.touch(registration)
            case 1 if out:
                registration = rng.choice(out)
                registration.load = rng.randrange(4)
                subject.add(registration)
                model.free.append(registration)
                model.touch(registration)
            case 2 if model.free:
                registration = rng.choice(model.free)
                subject.remove(registration)
                model.free.remove(registration)
            case _:
                method = rng.choice("abc")
                wanted = model.choose(method)
                if rng.random() < 0.5:
                    before = wanted.load if wanted else 0
                    assert subject.take(method) is wanted
                    if wanted is None:
                        continue
                    assert wanted.load == before + 1
                    if wanted.load >= wanted.capacity:
                        model.free.remove(wanted)
                    elif policy != "newest":
                        model.touch(wanted)
                    continue
                assert subject.choose(method) is wanted
                if wanted is not None:
                    before = wanted.load
                    wanted.load += rng.choice((-1, 1)) if before else 1
                    subject.changed(wanted, before)
                    if policy != "newest":
                        model.touch(wanted)
        assert len(subject) == len(model.free)


def test_policies_are_named_as_the_configuration_names_them() -> None:
    assert {"least_pending": LeastPending, "round_robin": RoundRobin, "newest": Newest} == POLICIES


# ---------------------------------------------------------------- the queue


def test_queue_takes_from_anywhere_and_keeps_its_order() -> None:
    world = World()
    caller = world.caller()
    for wire_id in range(4):
        world.ask(caller, wire_id, f"e/m{wire_id}", wait=True)
    requests = list(caller.requests.values())
    queue = Queue()
    for request in requests[1:]:
        queue.put(request)
    queue.put_first(requests[0])
    queue.discard(requests[2])
    queue.discard(requests[2])
    assert list(queue) == [requests[0], requests[1], requests[3]] and len(queue) == 3 and requests[2] not in queue
    only = registered(1, frozenset({"m1"}))
    assert queue.take(only) is requests[1] and queue.take(only) is None
    anything = registered(2, None)
    assert [queue.take(anything), queue.take(anything), queue.take(anything)] == [requests[0], requests[3], None]
