"""The policies against a slow and plain model, and the rules one by one."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core import dispatch, errors
from broker.core.dispatch import POLICIES, LeastPending, Newest, RoundRobin, Sticky, rank
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
    subject, model = POLICIES[policy](()), Plain(policy)
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
    assert {"least_pending": LeastPending, "round_robin": RoundRobin, "newest": Newest, "sticky": Sticky} == POLICIES


# ---------------------------------------------------------------- sticky

GROUPS = [f"run {number}" for number in range(60)]


def holders(world: World) -> dict[str, Session]:
    """Which session has what it was asked for a group, or will have it: by the group."""
    return {
        attempt.request.options.group or "": session
        for session in world.router.sessions.by_id.values()
        for attempt in session.attempts.values()
    }


def asked_for_groups(workers: int) -> tuple[World, Session, list[Session], dict[str, Session]]:
    """A sticky endpoint, where one request of every group has been asked; who has each."""
    world = world_with("sticky")
    made = [world.worker() for _ in range(workers)]
    caller = world.caller()
    for group in GROUPS:
        world.ask(caller, group, timeout=1000.0, group=group)
    return world, caller, made, holders(world)


def test_a_group_goes_to_the_same_worker_and_groups_are_spread() -> None:
    world, caller, workers, first = asked_for_groups(4)
    for worker in workers:
        for attempt in list(worker.attempts.values()):
            world.answer(worker, attempt)
    for group in reversed(GROUPS):
        world.ask(caller, group, timeout=1000.0, group=group)
    assert holders(world) == first
    shares = Counter(first.values())
    assert set(shares) == set(workers) and max(shares.values()) <= 30, "60 groups over 4 workers"


def test_a_group_waits_for_its_worker_though_others_are_free() -> None:
    world = world_with("sticky")
    caller, workers = world.caller(), [world.worker(capacity=1) for _ in range(3)]
    world.ask(caller, 1, group="g")
    bound = holders(world)["g"]
    world.ask(caller, 2, group="g")
    world.ask(caller, 3)
    assert [len(worker.attempts) for worker in workers].count(1) == 2, "the one without a group went to a free one"
    finish_one(world, bound)
    assert [attempt.request.wire_id for attempt in bound.attempts.values()] == [2]


def test_a_worker_that_comes_takes_its_own_groups_only() -> None:
    world, caller, workers, before = asked_for_groups(3)
    for worker in workers:
        for attempt in list(worker.attempts.values()):
            world.answer(worker, attempt)
    newcomer = world.worker()
    for group in GROUPS:
        world.ask(caller, group, timeout=1000.0, group=group)
    after = holders(world)
    moved = {group for group in GROUPS if after[group] is not before[group]}
    assert moved and all(after[group] is newcomer for group in moved), "nothing moved between those that were there"


def test_a_worker_that_goes_gives_its_groups_to_others_which_keep_theirs() -> None:
    world = world_with("sticky")
    caller, workers = world.caller(), [world.worker(capacity=1) for _ in range(3)]
    for number, group in enumerate((*GROUPS, *GROUPS)):
        world.ask(caller, number, timeout=1000.0, group=group)
    queue = world.router.registry.by_name["e"].queue
    targets = {group: world.router.registry.by_name["e"].free.target("m", group) for group in GROUPS}
    leaver = workers[1]
    world.serve(leaver, "other", capacity=1)
    world.command(leaver, "broker.unserve", endpoint="e")
    moved = [group for group, target in targets.items() if target is not None and target.session is leaver]
    assert moved
    for group, before in targets.items():
        now = world.router.registry.by_name["e"].free.target("m", group)
        assert now is not None and now.session is not leaver and (group in moved or now is before)
    while queue:
        for worker in (workers[0], workers[2]):
            if worker.attempts:
                finish_one(world, worker)
    assert len(leaver.attempts) == 1, "it may finish what it has"


def test_what_waited_for_a_worker_that_left_is_given_at_once_to_one_that_is_free() -> None:
    for leave in ("detach", "unserve", "other methods", "shut down policy"):
        world = world_with("sticky")
        caller, workers = world.caller(), [world.worker(capacity=1) for _ in range(2)]
        world.ask(caller, 1, timeout=1000.0, group="g")
        bound = holders(world)["g"]
        other = next(worker for worker in workers if worker is not bound)
        world.ask(caller, 2, timeout=1000.0, group="g")
        assert not other.attempts
        if leave == "detach":
            world.detach(bound)
        elif leave == "unserve":
            world.command(bound, "broker.unserve", endpoint="e")
        elif leave == "other methods":
            world.serve(bound, "e", capacity=1, methods=["x"])
        else:
            world.reconfigure(world.router.limits, {"e": EndpointLimits(policy="least_pending")})
        assert [attempt.request.wire_id for attempt in other.attempts.values()] == [2], leave


def test_sticky_keeps_to_declared_methods() -> None:
    world = world_with("sticky")
    caller, reader, writer = world.caller(), world.attach(), world.attach()
    world.serve(reader, "e", methods=["read"])
    world.serve(writer, "e", methods=["write"])
    for group in GROUPS[:10]:
        world.ask(caller, group, "e/read", group=group)
    assert len(reader.attempts) == 10
    world.ask(caller, "none", "e/sing", group="g")
    assert world.outcome(caller).kind is errors.NO_METHOD


def test_a_group_that_waits_for_anybody_to_come_is_bound_when_somebody_does() -> None:
    world = world_with("sticky")
    caller = world.caller()
    for number in range(3):
        world.ask(caller, number, timeout=1000.0, wait=True, group="g")
    worker = world.worker(capacity=2)
    assert len(worker.attempts) == 2
    later = world.worker(capacity=2)
    assert len(later.attempts) == (rank(later.id, "g") > rank(worker.id, "g"))


def test_a_policy_that_becomes_sticky_binds_what_waits() -> None:
    world = world_with("least_pending")
    caller, workers = world.caller(), [world.worker(capacity=1) for _ in range(2)]
    for number in range(4):
        world.ask(caller, number, timeout=1000.0, group="g")
    world.reconfigure(world.router.limits, {"e": EndpointLimits(policy="sticky")})
    bound = max(workers, key=lambda worker: rank(worker.id, "g"))
    for worker in workers:
        finish_one(world, worker)
    assert [bool(worker.attempts) for worker in workers] == [worker is bound for worker in workers]


def test_a_notification_of_a_group_goes_to_its_worker() -> None:
    world = world_with("sticky")
    caller, workers = world.caller(), [world.worker() for _ in range(4)]
    for _ in range(3):
        for group in ("a", "b", "c"):
            world.ask(caller, None, f"e/{group}", group=group)
    for group in ("a", "b", "c"):
        bound = max(workers, key=lambda worker: rank(worker.id, group))
        assert world.notified(bound).count(group) == 3


@pytest.mark.parametrize("policy", ["least_pending", "round_robin", "newest"])
def test_a_group_plays_no_part_under_other_policies(policy: str) -> None:
    plain, grouped = world_with(policy), world_with(policy)
    for world in (plain, grouped):
        caller = world.caller()
        for _ in range(3):
            world.worker(capacity=4)
        for number in range(9):
            world.ask(caller, number, timeout=1000.0, group="g" if world is grouped else None)
    loads = [[len(s.attempts) for s in world.router.sessions.by_id.values()] for world in (plain, grouped)]
    assert loads[0] == loads[1]


def test_ranks_are_the_same_in_every_process_and_remembered_groups_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert rank(7, "scan").hex() == "96255dc7fdc3f5f2"
    monkeypatch.setattr(dispatch, "GROUPS_REMEMBERED", 5)
    *_, first = asked_for_groups(3)
    monkeypatch.undo()
    assert asked_for_groups(3)[3].keys() == first.keys()
    assert [s.id for s in asked_for_groups(3)[3].values()] == [s.id for s in first.values()]
