"""Plain requests in C against the Python they are taken over from: the same tables, effects and bounds."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.classes import ClassesOf
from broker.core.events import Answered, Asked, Congested, Drain, ErrorReply
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, Options
from broker.core.pending import Pending
from broker.core.requests import Requests
from broker.core.sessions import Session
from broker.links.compiled import core
from broker.wire import native
from tests.core.harness import World, calls_of_python
from tests.core.simulator import Simulator

if core() != "compiled core":
    pytest.skip("there is no compiled core here", allow_module_level=True)

SEEDS = int(os.environ.get("MATCHER_SEEDS", "60"))


@pytest.mark.parametrize("calm", [True, False])
def test_runs_go_the_same_way_word_for_word(monkeypatch: pytest.MonkeyPatch, calm: bool) -> None:
    """The witness judges every step of both, and all tables are checked."""
    seen = calls_of_python(monkeypatch)
    python = compiled = 0
    for seed in range(SEEDS):
        expected = Simulator(seed, calm=calm).run(1000)
        python, seen["answered"] = python + seen["answered"], 0
        assert Simulator(seed, calm=calm, compiled=True).run(1000) == expected, f"seed {seed}"
        compiled, seen["answered"] = compiled + seen["answered"], 0
    assert python > SEEDS * 20
    assert compiled < python * 0.9, "some were answered in C"


# ---------------------------------------------------------------- what is plain and what is not


class Matched(World):
    """A world whose plain requests go through C."""

    def __init__(self, limits: Limits | None = None, endpoints: dict[str, EndpointLimits] | None = None) -> None:
        super().__init__(limits, endpoints)
        native.match_for(self.router)


def warm(world: World, caller: Session, worker: Session) -> None:
    """One request, so that the caller's roles are known and the levels are there."""
    world.take()
    world.ask(caller, "first")
    world.answer(worker, world.calls(worker)[-1].attempt)
    world.take()


def asked(seen: Counter[str], world: World, event: Asked) -> bool:
    """Whether C took it in."""
    before = seen["asked"]
    world.feed(event)
    return seen["asked"] == before


@pytest.mark.parametrize(
    "options",
    [Options(), Options(timeout=5.0), Options(meta=True), Options(stream_in=True), Options(stream_out=True),
     Options(progress=b"1"), Options(group="g"), Options(idempotent=True, retries=1), Options(trace="t", meta=True),
     Options(timeout=3600.0), Options(timing=True), Options(priority=3), Options(wait=True), Options(meta=1)],  # type: ignore[arg-type]
)  # fmt: skip
def test_these_options_are_plain(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    seen = calls_of_python(monkeypatch)
    world = Matched()
    caller, worker = world.caller(), world.worker()
    warm(world, caller, worker)
    before = seen["answered"]
    assert asked(seen, world, Asked(caller, "a", "e", "m", Body(b"[]"), options))
    attempt = world.calls(worker)[-1].attempt
    assert attempt.request.attempts == 1 and attempt.request.deadline == world.now + (options.timeout or 30.0)
    world.answer(worker, attempt)
    assert (seen["answered"] == before) == (not options.timing and isinstance(options.meta, bool))
    assert world.one_end(caller).outcome.kind is errors.OK
    assert not caller.requests and not worker.attempts


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (lambda caller: Asked(caller, None, "e", "m", Body(b"[]")), None),
        (lambda caller: Asked(caller, 1.5, "e", "m", Body(b"[]")), errors.OK),
        (lambda caller: Asked(caller, "a", "e", "m", Body(b"[]"), Options(key="k")), errors.OK),
        (lambda caller: Asked(caller, "a", "e", "m", Body(b"[]"), Options(idle=1.0)), errors.OK),
        (lambda caller: Asked(caller, "a", "e", "m", Body(b"[]", (b"x",))), errors.OK),
        (lambda caller: Asked(caller, "a", "e", "m", Body(b"[]"), Options(timeout=3600.1)), errors.INVALID_PARAMS),
        (lambda caller: Asked(caller, "a", "e", "other", Body(b"[]")), errors.NO_METHOD),
        (lambda caller: Asked(caller, "a", "nobody", "m", Body(b"[]")), errors.NO_ENDPOINT),
        (lambda caller: Asked(caller, "a", "secret", "m", Body(b"[]")), errors.DENIED),
        (lambda caller: Asked(caller, "a", "round", "m", Body(b"[]")), errors.OK),
        (lambda caller: Asked(caller, "twice", "e", "m", Body(b"[]")), errors.DUPLICATE_ID),
    ],
)
def test_this_is_left_to_python(
    monkeypatch: pytest.MonkeyPatch, event: Callable[[Session], Asked], kind: object
) -> None:
    seen = calls_of_python(monkeypatch)
    world = Matched(endpoints={"round": EndpointLimits(policy="round_robin")})
    grants = tuple(Grant(Role.CALLER | Role.WORKER, (name,)) for name in ("e", "nobody", "round"))
    caller = world.caller(grants=grants)
    worker, _ = world.worker(methods=frozenset("m")), world.worker("secret")
    world.serve(worker, "round")
    warm(world, caller, worker)
    world.ask(caller, "twice")
    world.take()
    before = seen["asked"]
    world.feed(event(caller))
    assert seen["asked"] == before + 1
    if kind is errors.OK:
        world.answer(worker, world.calls(worker)[-1].attempt)
    ends = world.ends(caller)
    assert [end.outcome.kind for end in ends] == ([] if kind is None else [kind])


@pytest.mark.parametrize(
    ("limits", "bound"),
    [
        (Limits(in_flight_max=2), "in_flight"),
        (Limits(memory_soft_bytes=10_000), "memory"),
        (Limits(requests_per_s=2.0), "rate"),
    ],
)
def test_bounds_hold_to_the_byte(limits: Limits, bound: str) -> None:
    ends = []
    for world in (World(limits), Matched(limits)):
        caller, worker = world.caller(), world.worker()
        warm(world, caller, worker)
        for number in range(5):
            world.ask(caller, number, raw=b"[" + b"1," * 3_000 + b"1]")
        ends.append([(end.wire_id, end.outcome.kind.name, end.outcome.bound) for end in world.ends(caller)])
        assert world.router.state.budget.used == sum(request.held for request in caller.requests.values()) > 0
    assert ends[0] == ends[1] and ends[0][-1] == (4, "overloaded", bound)


def test_bounds_that_are_replaced_hold_at_once() -> None:
    world = Matched()
    caller, worker = world.caller(), world.worker()
    warm(world, caller, worker)
    world.router.reconfigure(Limits(in_flight_max=1), {}, world.now)
    world.ask(caller, 1)
    world.ask(caller, 2)
    assert world.one_end(caller).outcome.bound == "in_flight"
    world.router.reconfigure(Limits(deadline_s=7.0), {}, world.now)
    world.ask(caller, 3)
    assert caller.requests[3].deadline == world.now + 7.0
    world.feed(Drain(False))
    world.ask(caller, 4)
    assert world.ends(caller)[-1].outcome.kind is errors.SHUTTING_DOWN


def test_a_worker_is_full_free_and_full_again_and_who_waits_has_its_place() -> None:
    for capacity in (1, 2):
        world = Matched()
        caller, worker = world.caller(), world.worker(capacity=capacity)
        warm(world, caller, worker)
        for number in range(capacity + 2):
            world.ask(caller, number)
        taken = world.calls(worker)
        assert len(taken) == capacity and len(world.router.registry.by_name["e"].queue) == 2
        done = []
        while taken:
            world.take()
            world.answer(worker, taken.pop(0).attempt)
            done += [end.wire_id for end in world.ends(caller)]
            taken += world.calls(worker)
        assert done == list(range(capacity + 2))
        assert world.router.registry.by_name["e"].free


def test_a_worker_that_is_crowded_or_leaves_gets_nothing_more() -> None:
    world = Matched()
    caller, worker, other = world.caller(), world.worker(capacity=1), world.worker(capacity=1)
    warm(world, caller, worker)
    world.ask(caller, 1)
    (call,) = world.calls(worker) or world.calls(other)
    mine = call.attempt.session
    world.take()
    world.feed(Congested(mine, True))
    world.answer(mine, call.attempt)
    registration = mine.registrations[world.router.registry.by_name["e"]]
    assert not registration.free and registration.load == 0
    world.ask(caller, 2)
    assert world.calls(mine) == []


def test_methods_of_a_class_are_judged_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of_python(monkeypatch)
    world = Matched()
    caller, worker = world.caller(), world.worker(methods=ClassesOf({"Data.*"}))
    for number in range(3):
        world.ask(caller, number, "e/Data.read")
        world.answer(worker, world.calls(worker)[-1].attempt)
    assert seen["asked"] == 3
    assert [end.outcome.kind for end in world.ends(caller)] == [errors.OK] * 3


def test_answers_that_are_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of_python(monkeypatch)
    world = Matched()
    caller, worker, other = world.caller(), world.worker(), world.worker()
    answers: list[Callable[[int], Answered]] = [
        lambda number: Answered(mine, number, Body(b'{"code":1}'), ErrorReply(-32000)),
        lambda number: Answered(mine, number, Body(b'{"$buffer":0}', (b"x",))),
        lambda number: Answered(mine, number + 1000, Body(b"1")),
        lambda number: Answered(other if mine is worker else worker, number, Body(b"1")),
        lambda number: Answered(mine, True, Body(b"1")),
    ]
    for answer in answers:
        world.ask(caller, "a")
        call = (world.calls(worker) or world.calls(other))[-1]
        mine = call.attempt.session
        before = seen["answered"]
        world.feed(answer(call.attempt.id))
        assert seen["answered"] == before + 1
        if "a" in caller.requests:
            world.answer(mine, call.attempt)
        world.take()
    assert world.router.counters.late_replies == 3
    assert not caller.requests


def test_a_late_answer_and_a_second_one_end_nothing() -> None:
    world = Matched()
    caller, worker = world.caller(), world.worker()
    warm(world, caller, worker)
    world.ask(caller, 1, timeout=1.0)
    call = world.calls(worker)[-1]
    world.answer(worker, call.attempt)
    world.answer(worker, call.attempt)
    world.ask(caller, 2, timeout=1.0)
    late = world.calls(worker)[-1]
    world.now += 2
    world.tick()
    world.answer(worker, late.attempt)
    assert [end.outcome.kind.name for end in world.ends(caller)] == ["ok", "deadline"]
    assert world.router.counters.late_replies == 2


def test_who_has_left_is_told_nothing_and_may_ask_nothing() -> None:
    world = Matched()
    caller, worker = world.caller(), world.worker()
    warm(world, caller, worker)
    world.ask(caller, 1)
    world.detach(caller)
    world.feed(Asked(caller, 2, "e", "m", Body(b"[]")))
    assert world.router.pending.count == 0 and not world.calls(worker)[1:]


def test_levels_beyond_their_bound_and_a_million_of_capacity() -> None:
    ends = []
    for world in (World(Limits(in_flight_max=20_000)), Matched(Limits(in_flight_max=20_000))):
        caller, workers = world.caller(), [world.worker(capacity=1_000_000) for _ in range(2)]
        router, order = world.router, []
        for number in range(8_400):
            router.handle(Asked(caller, number, "e", "m", Body(b"[]")), world.now)
        calls = [effect.message.attempt for effect in router.effects]  # type: ignore[union-attr]
        router.effects.clear()
        order = [workers.index(attempt.session) for attempt in calls]
        for attempt in calls[::3] + calls[1::3] + calls[2::3]:
            router.handle(Answered(attempt.session, attempt.id, Body(b"1")), world.now)
        router.effects.clear()
        router.check()
        ends.append((order, router.registry.by_name["e"].free._lowest, router.counters.ended["ok"]))  # type: ignore[attr-defined]
    assert ends[0] == ends[1]


# ---------------------------------------------------------------- what it holds, and how it fails


def test_nothing_is_left_behind() -> None:
    world = Matched()
    caller, worker = world.caller(), world.worker(capacity=4)
    warm(world, caller, worker)
    body, options = Body(bytes(bytearray(b"[1]"))), Options(timeout=12.5, meta=True)
    router, watched = world.router, (caller, worker, body, options, body.raw, options.timeout)

    def go() -> None:
        for number in range(64):
            router.handle(Asked(caller, number, "e", "m", body, options), world.now)
            attempts = list(worker.attempts)
            router.handle(Answered(worker, attempts[0], body), world.now)
            router.effects.clear()

    go()
    gc.collect()
    before, blocks = list(map(sys.getrefcount, watched)), sys.getallocatedblocks()
    for _ in range(20):
        go()
    assert list(map(sys.getrefcount, watched)) == before
    gc.collect()
    assert sys.getallocatedblocks() - blocks < 50


def test_a_table_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Matched()
    caller, worker = world.caller(), world.worker()
    warm(world, caller, worker)
    world.ask(caller, 1)
    attempt = world.calls(worker)[-1].attempt
    del caller.requests[1]
    with pytest.raises(KeyError):
        world.router.handle(Answered(worker, attempt.id, Body(b"1")), world.now)


@pytest.mark.parametrize(
    "limits",
    [
        {"memory_soft_bytes": 1e9},
        {"memory_soft_bytes": 1 << 63},
        {"in_flight_max": float("inf")},
        {"in_flight_max": 10**20},
    ],
)
def test_bounds_that_fit_no_number_of_c_are_left_to_python(monkeypatch: pytest.MonkeyPatch, limits: Any) -> None:
    seen = calls_of_python(monkeypatch)
    world = Matched(Limits(**limits))
    caller, worker = world.caller(), world.worker()
    warm(world, caller, worker)
    world.ask(caller, 1)
    world.answer(worker, world.calls(worker)[-1].attempt)
    assert world.one_end(caller).outcome.kind is errors.OK and seen["asked"] == 2


def test_what_is_fed_while_a_reply_is_told_of_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may run in between, and feed the same answer again: it finds no attempt any more."""
    world = Matched()
    caller, worker = world.caller(), world.worker()
    warm(world, caller, worker)
    world.ask(caller, 1, meta=True)
    attempt = world.calls(worker)[-1].attempt.id
    world.take()
    fed = 0

    def again(*_: object) -> None:
        nonlocal fed
        fed += 1
        if fed == 1:
            world.router.handle(Answered(worker, attempt, Body(b"2")), world.now)

    monkeypatch.setattr(Requests, "_reply_meta", again)
    world.answer(worker, attempt)
    assert world.one_end(caller).body == Body(b"1")
    assert fed == 1 and world.router.counters.late_replies == 1


def test_books_that_are_not_as_they_were_made_are_left_to_python() -> None:
    def spoil_ended(counters: Any) -> None:
        del counters.ended["ok"]

    def spoil_latency(counters: Any) -> None:
        counters.latency = []

    def spoil_sum(counters: Any) -> None:
        counters.latency_sum_s = None

    for spoil, error in ((spoil_ended, KeyError), (spoil_latency, IndexError), (spoil_sum, TypeError)):
        world = Matched()
        caller, worker = world.caller(), world.worker()
        warm(world, caller, worker)
        world.ask(caller, 1)
        attempt = world.calls(worker)[-1].attempt.id
        spoil(world.router.counters)
        with pytest.raises(error):
            world.router.handle(Answered(worker, attempt, Body(b"1")), world.now)


def test_misuse_is_told_and_ends_no_process() -> None:
    program = """
from broker.wire import native
for call in (
    lambda: native.get_buffer(1, 2), lambda: native.buffer_updated.__func__(),
    lambda: next(iter(native.buffer_updated.__func__, 0)), lambda: native.flush_all(1),
):
    try:
        call()
    except RuntimeError as error:
        assert "first" in str(error)
    else:
        raise AssertionError(call)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


def test_what_it_is_made_of_must_be_right() -> None:
    world = Matched()
    with pytest.raises(AttributeError):
        native.Matcher(object(), print, print, 1, 2, 3, 1, "ok")
    with pytest.raises(TypeError):
        native.Matcher(world.router.requests, print, print)  # type: ignore[call-arg]

    class Other:
        state = Pending

    with pytest.raises(TypeError):
        native.Matcher(Other, print, print, 1, 2, 3, 1, "ok")
    matcher = native.Matcher(world.router.requests, lambda *_: None, lambda *_: None, 1, 2, 3, 1, "ok")
    for wrong in ((), (1,), (1, 2, 3)):
        with pytest.raises(TypeError):
            matcher.asked(*wrong)
        with pytest.raises(TypeError):
            matcher.answered(*wrong)
    matcher.asked("no event", "no time")  # type: ignore[arg-type]
    matcher.answered(None, 1.0)
    with pytest.raises(TypeError):
        native.Feeder(1, 2, 3, 4, 5)  # type: ignore[arg-type]
