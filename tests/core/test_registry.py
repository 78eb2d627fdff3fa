"""Endpoints known, remembered and forgotten."""

from __future__ import annotations

import json

import pytest

from broker.core import errors
from broker.core.access import Role
from broker.core.events import CloseLink
from broker.core.limits import EndpointLimits, Limits
from broker.core.registry import FORGET_LOOKS
from tests.core.harness import World


def test_a_known_endpoint_is_remembered_until_there_is_no_room() -> None:
    world = World(Limits(endpoints_known_max=3))
    caller = world.caller()
    for name in ("a", "b", "c"):
        world.detach(world.worker(name))
    world.take()
    world.ask(caller, 1, "a/m")
    assert world.outcome(caller).kind is errors.NO_WORKER
    world.worker("d")
    world.ask(caller, 2, "a/m")
    assert world.outcome(caller).kind is errors.NO_ENDPOINT, "the longest unused was forgotten"
    world.ask(caller, 3, "b/m")
    assert world.outcome(caller).kind is errors.NO_WORKER
    assert len(world.router.registry.by_name) == 3


def test_being_served_again_makes_it_young() -> None:
    world = World(Limits(endpoints_known_max=2))
    world.detach(world.worker("a"))
    world.detach(world.worker("b"))
    world.detach(world.worker("a"))
    world.worker("c")
    assert sorted(world.router.registry.by_name) == ["a", "c"]


def test_what_is_in_use_is_never_forgotten() -> None:
    world = World(Limits(endpoints_known_max=4), {"configured": EndpointLimits()})
    caller = world.caller()
    world.worker("served")
    world.attach(Role.LISTENER, "heard", listen=True)
    world.ask(caller, 1, "waited/m", wait=True)
    for number in range(10):
        late = world.attach(Role.WORKER, f"more{number}")
        assert world.closed(late) == [4429]
        assert not late.registrations
        world.detach(late)
    assert sorted(world.router.registry.by_name) == ["configured", "heard", "served", "waited"]
    world.cancel(caller, 1)
    assert not world.closed(world.worker("more"))


def test_asking_for_endpoints_nobody_serves_is_not_remembered() -> None:
    world = World()
    caller = world.caller()
    for number in range(100):
        world.ask(caller, number, f"e{number}/m")
    assert not world.router.registry.by_name


def test_a_full_registry_costs_a_bounded_look() -> None:
    count = FORGET_LOOKS * 4
    world = World(Limits(endpoints_known_max=count))
    for number in range(count - 1):
        world.worker(f"e{number}")
    world.detach(world.worker("idle"))
    order = list(world.router.registry.by_name)
    caller = world.caller()
    tries = 0
    while True:
        tries += 1
        world.ask(caller, tries, "new/m", wait=True)
        if "new" in world.router.registry.by_name:
            break
        assert world.outcome(caller).bound == "endpoints"
    assert tries == 4, "each look goes on where the last one stopped"
    assert order[-1] == "idle" and "idle" not in world.router.registry.by_name


def test_attaching_elsewhere_makes_no_endpoint() -> None:
    world = World()
    world.attach(Role.CALLER, "e", listen=False)
    assert "e" not in world.router.registry.by_name


def test_names_that_are_special_elsewhere_are_plain_here() -> None:
    world = World()
    caller = world.caller()
    for name in ("__proto__", "constructor", "__class__", "__init__"):
        world.ask(caller, name, f"{name}/{name}")
        assert world.outcome(caller).kind is errors.NO_ENDPOINT
        worker = world.worker(name)
        world.ask(caller, name, f"{name}/{name}")
        assert world.one_call(worker).method == name


def test_what_an_endpoint_says_of_itself_wins_over_the_brokers_defaults() -> None:
    limits = Limits(queue_max=5, deadline_s=10.0, deadline_max_s=100.0)
    world = World(limits, {"own": EndpointLimits(queue_max=1, deadline_s=20.0, deadline_max_s=15.0)})
    own, other = world.router.registry.by_name["own"], world.router.registry.get_or_make("other")
    assert other is not None
    assert (own.queue_max, own.deadline_s, own.deadline_max_s) == (1, 15.0, 15.0), "never beyond its own bound"
    assert (other.queue_max, other.deadline_s, other.deadline_max_s) == (5, 10.0, 100.0)


# ---------------------------------------------------------------- bounds that change while it runs


def test_new_bounds_hold_for_what_comes_and_a_queue_above_them_drains() -> None:
    world = World(Limits(queue_max=3))
    caller, worker = world.caller(), world.worker(capacity=1)
    attempt = world.busy(worker, caller)
    for wire_id in (1, 2, 3):
        world.ask(caller, wire_id)
    world.reconfigure(Limits(queue_max=1, deadline_s=7.0, in_flight_max=5), {})
    assert not world.ends(caller), "what has been taken in stays"
    world.ask(caller, 4)
    assert world.outcome(caller).bound == "queue"
    for _ in range(3):
        world.answer(worker, attempt)
        assert world.outcome(caller).kind is errors.OK
        attempt = world.one_call(worker).attempt
    world.ask(caller, 5)
    assert not world.ends(caller)
    world.answer(worker, attempt)
    assert world.one_call(worker).left_s == 7.0


def test_a_policy_may_change_while_workers_are_busy() -> None:
    world = World()
    caller, old, new = world.caller(), world.worker(capacity=1), world.worker(capacity=1)
    attempt = world.busy(old, caller)
    world.reconfigure(Limits(), {"e": EndpointLimits(policy="newest")})
    world.answer(old, attempt)
    for wire_id, worker in enumerate((new, old)):
        world.ask(caller, wire_id)
        assert world.one_call(worker).method == "m"
    world.reconfigure(Limits(), {})
    world.ask(caller, 9)
    world.detach(new)
    world.detach(old)
    world.router.check()


def test_an_endpoint_no_more_configured_may_be_forgotten_and_a_new_one_is_known() -> None:
    world = World(Limits(endpoints_known_max=1), {"a": EndpointLimits()})
    caller = world.caller()
    world.reconfigure(Limits(endpoints_known_max=2), {"b": EndpointLimits()})
    world.ask(caller, 1, "b/m")
    assert world.outcome(caller).kind is errors.NO_WORKER
    world.worker("c")
    world.ask(caller, 1, "a/m")
    assert world.outcome(caller).kind is errors.NO_ENDPOINT


# ---------------------------------------------------------------- closed while it runs

CLOSED = {"e": EndpointLimits(closed="moved to f")}


def test_who_is_attached_to_or_serves_an_endpoint_that_is_closed_is_told_so() -> None:
    world = World()
    attached, listening = world.caller(endpoint="e"), world.attach(Role.LISTENER, "e", listen=True)
    worker, serving = world.worker("e"), world.attach(endpoint="f")
    world.serve(serving, "e")
    others = [world.caller(), world.caller(endpoint="f"), world.worker("f")]
    world.take()
    world.reconfigure(Limits(), CLOSED)
    closes = [effect for effect in world.take() if isinstance(effect, CloseLink)]
    told = (attached, listening, worker, serving)
    assert closes == [CloseLink(session, errors.ENDPOINT_CLOSED, "moved to f") for session in told]
    assert not any(other in told for other in others)


def test_a_closed_endpoint_is_closed_before_its_workers_links_are() -> None:
    world = World()
    caller, worker = world.caller(), world.worker("e", capacity=2)
    world.ask(caller, 1)
    attempt = world.one_call(worker).attempt
    world.reconfigure(Limits(), CLOSED)
    assert world.closed(worker) == [4404] and worker.link is not None
    world.ask(caller, 2)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.DENIED and outcome.detail == "e is closed: moved to f"
    world.ask(caller, 3, wait=True)
    assert world.outcome(caller).kind is errors.DENIED
    world.ask(caller, None)
    assert world.router.counters.notifications_dropped == 1
    assert world.command(worker, "broker.serve", endpoint="e").outcome.kind is errors.DENIED
    assert not world.calls(worker)
    world.answer(worker, attempt)
    assert world.outcome(caller).kind is errors.OK, "what it has may finish"


@pytest.mark.parametrize("wait", [False, True])
def test_what_waits_at_an_endpoint_that_is_closed_is_denied(wait: bool) -> None:
    world = World()
    caller, worker = world.caller(endpoint="e"), world.worker("e", capacity=1)
    world.busy(worker, caller)
    world.ask(caller, 1, wait=wait)
    world.reconfigure(Limits(), CLOSED)
    kinds = [type(e).__name__ for e in world.effects if getattr(e, "session", None) is caller]
    assert kinds == ["Deliver", "CloseLink"], "told before its own link is closed"
    outcome = world.outcome(caller)
    assert (outcome.kind, outcome.retryable, outcome.phase) == (errors.DENIED, False, "queued")
    assert "moved to f" in outcome.detail


def test_nothing_is_tried_again_at_an_endpoint_that_is_closed() -> None:
    world = World()
    caller, worker = world.caller(), world.worker("e")
    world.ask(caller, 1, idempotent=True, retries=1)
    world.reconfigure(Limits(), CLOSED)
    world.take()
    world.detach(worker)
    assert world.outcome(caller).kind is errors.WORKER_LOST


def test_an_endpoint_that_is_opened_again_may_be_served_again() -> None:
    world = World(endpoints=CLOSED)
    caller, worker = world.caller(), world.attach()
    world.reconfigure(Limits(), {})
    assert not any(isinstance(effect, CloseLink) for effect in world.take())
    world.serve(worker, "e")
    world.ask(caller, 1)
    assert world.one_call(worker).method == "m"


def test_the_workers_of_a_closed_endpoint_are_announced_to_be_gone() -> None:
    world = World()
    watcher, worker = world.attach(), world.worker("e")
    assert world.command(watcher, "broker.subscribe", endpoint="e", topic="broker.peers").outcome.kind is errors.OK
    world.reconfigure(Limits(), CLOSED)
    ((to, message),) = world.broadcasts()
    assert to is watcher
    assert json.loads(bytes(message.body.raw)) == {
        "event": "unserved", "peer": f"n-{worker.id}", "role": "worker", "workers": 0,
    }  # fmt: skip


# ---------------------------------------------------------------- unserved and served again


def test_what_a_worker_still_holds_counts_when_it_serves_again() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=2)
    for wire_id in (1, 2):
        world.ask(caller, wire_id)
    first, second = (call.attempt for call in world.calls(worker))
    for _ in range(2):
        world.command(worker, "broker.unserve", endpoint="e")
        world.serve(worker, "e", capacity=2, methods=["m"])
    world.take()
    world.ask(caller, 3)
    world.ask(caller, 4)
    assert not world.calls(worker), "it has two in its hands"
    world.answer(worker, first)
    assert [call.attempt.request.wire_id for call in world.calls(worker)] == [3]
    world.take()
    world.answer(worker, second)
    assert [call.attempt.request.wire_id for call in world.calls(worker)] == [4]


def test_a_worker_that_served_before_is_the_newest_when_it_serves_again() -> None:
    world = World(endpoints={"e": EndpointLimits(policy="newest")})
    caller, old = world.caller(), world.worker(capacity=2)
    world.ask(caller, 1)
    world.one_call(old)
    world.worker()
    world.command(old, "broker.unserve", endpoint="e")
    world.serve(old, "e", capacity=2)
    world.ask(caller, 2)
    assert world.one_call(old).attempt.request.wire_id == 2


@pytest.mark.parametrize("how", ["answer", "cancel", "deadline", "leave"])
def test_nothing_is_kept_of_a_worker_once_it_holds_nothing(how: str) -> None:
    world = World(Limits(endpoints_known_max=1))
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1, timeout=1.0)
    attempt = world.one_call(worker).attempt
    world.command(worker, "broker.unserve", endpoint="e")
    endpoint = world.router.registry.by_name["e"]
    assert list(endpoint.leaving) == [worker] and endpoint.in_use, "its endpoint must not be forgotten meanwhile"
    match how:
        case "answer":
            world.answer(worker, attempt)
        case "cancel":
            world.cancel(caller, 1)
        case "deadline":
            world.sleep(1.06)
        case _:
            world.detach(worker)
    assert not endpoint.leaving and not endpoint.in_use


# ---------------------------------------------------------------- deadlines that workers set


def test_a_worker_sets_the_deadlines_of_its_endpoint_while_it_serves() -> None:
    world = World(Limits(deadline_s=10.0, deadline_max_s=100.0, idle_s=5.0, deadline_served_max_s=1000.0))
    worker, other, caller = world.worker("e"), world.worker("e"), world.caller()
    endpoint = world.router.registry.by_name["e"]

    def times() -> tuple[float, float, float]:
        return endpoint.deadline_s, endpoint.deadline_max_s, endpoint.idle_s

    world.serve(worker, "e", deadline=700.0)
    assert times() == (700.0, 700.0, 5.0)
    world.serve(other, "e", deadline=800.5, idle=600)
    assert times() == (800.5, 800.5, 600.0), "the longest counts"
    world.ask(caller, 1, "e/m")
    world.ask(caller, 2, "e/m", timeout=3.0)
    world.sleep(4.0)
    assert world.one_end(caller).wire_id == 2, "what a caller names holds"
    world.sleep(790.0)
    assert not world.ends(caller)
    world.sleep(10.0)
    assert world.outcome(caller).kind is errors.DEADLINE
    world.detach(other)
    assert times() == (700.0, 700.0, 5.0)
    world.serve(worker, "e")
    assert times() == (10.0, 100.0, 5.0), "the last word counts"
    world.serve(worker, "e", deadline=1e6, idle=1e6)
    assert times() == (1000.0, 1000.0, 1000.0), "and is cut to the bound"
    world.reconfigure(Limits(deadline_s=10.0, deadline_max_s=2000.0, deadline_served_max_s=500.0), {})
    assert times() == (500.0, 2000.0, 500.0)
    world.detach(worker)
    assert times() == (10.0, 2000.0, 30.0)


def test_what_is_configured_of_an_endpoint_goes_before_what_its_workers_set() -> None:
    own = {"a": EndpointLimits(deadline_s=20.0, idle_s=3.0), "b": EndpointLimits(deadline_max_s=60.0)}
    world = World(Limits(deadline_s=10.0, deadline_max_s=100.0), own)
    worker = world.attach(Role.WORKER)
    for name in own:
        world.serve(worker, name, deadline=700.0, idle=700.0)
    a, b = world.router.registry.by_name["a"], world.router.registry.by_name["b"]
    assert (a.deadline_s, a.deadline_max_s, a.idle_s) == (20.0, 700.0, 3.0)
    assert (b.deadline_s, b.deadline_max_s, b.idle_s) == (60.0, 60.0, 700.0)
