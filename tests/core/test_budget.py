"""The bytes a broker holds in all: counted where they are held, taken off where they go, refused above a bound."""

from __future__ import annotations

import json

import pytest

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.budget import SMALL_BYTES
from broker.core.events import Asked, PartSent
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, Options
from tests.core.harness import World

LARGE = b'"' + b"x" * 9_998 + b'"'
"""10,000 bytes of JSON"""
ADMIN = (Grant(Role.ADMIN),)


def used(world: World) -> int:
    return world.router.state.budget.used


def test_large_requests_count_until_they_end_however_they_end() -> None:
    world = World()
    worker, caller = world.worker(capacity=2), world.caller()
    for number in range(4):
        world.ask(caller, number, raw=LARGE, timeout=10.0)
    first, second = world.calls(worker)
    assert used(world) == 40_000
    world.answer(worker, first.attempt)
    world.cancel(caller, 3)
    assert used(world) == 20_000
    world.detach(worker)
    assert used(world) == 0, "the last had no worker left to wait for"
    world.ask(caller, 4, raw=LARGE, wait=True, timeout=5.0)
    assert used(world) == 10_000
    world.sleep(10)
    assert used(world) == 0
    assert second.body.raw == LARGE


def test_small_requests_do_not_count_and_attachments_do() -> None:
    world = World()
    caller = world.caller()
    world.ask(caller, 1, raw=b'"' + b"x" * (SMALL_BYTES - 2) + b'"', wait=True)
    assert used(world) == 0
    body = Body(b"[]", (b"x" * SMALL_BYTES, b"yz"))
    world.feed(Asked(caller, 2, "e", "m", body, Options(wait=True)))
    assert used(world) == SMALL_BYTES + 4
    world.feed(Asked(caller, 3, "e", "m", Body(b"[]", (b"small",)), Options(wait=True)))
    assert used(world) == SMALL_BYTES + 4
    world.detach(caller)
    assert used(world) == 0


def test_above_the_soft_bound_new_requests_are_refused_and_below_it_taken_again() -> None:
    world = World(Limits(memory_soft_bytes=25_000))
    worker, caller, admin = world.worker(), world.caller(), world.attach(grants=ADMIN)
    for number in range(3):
        world.ask(caller, number, raw=LARGE)
    attempts = [call.attempt for call in world.calls(worker)]
    assert len(attempts) == 3, "the one that goes beyond it is taken still"
    world.ask(caller, "small")
    outcome = world.outcome(caller)
    assert (outcome.kind, outcome.bound, outcome.retryable) == (errors.OVERLOADED, "memory", True)
    assert outcome.retry_after_ms is not None and "25000" in outcome.detail
    assert world.router.counters.overloaded["memory"] == 1
    assert world.command(caller, "broker.ping").outcome.kind is errors.OK, "one can still look"
    end = world.command(admin, "broker.admin.memory")
    assert end.body is not None
    told = json.loads(bytes(end.body.raw))
    assert told == {
        "used": 30_000, "requests": 30_000, "sessions": 0, "broadcasts": 0, "history": 0, "keys": 0, "outboxes": 0,
        "soft": 25_000, "hard": Limits().memory_hard_bytes,
    }  # fmt: skip
    assert told["used"] == sum(
        told[name] for name in ("requests", "sessions", "broadcasts", "history", "keys", "outboxes")
    )
    world.answer(worker, attempts[0])
    world.take()
    world.ask(caller, "again")
    assert len(world.calls(worker)) == 1


def test_what_memory_is_used_for_is_for_administrators() -> None:
    world = World()
    assert world.command(world.caller(), "broker.admin.memory").outcome.kind is errors.DENIED


def test_above_the_hard_bound_broadcasts_are_dropped_and_counted() -> None:
    world = World(Limits(memory_soft_bytes=20_000, memory_hard_bytes=25_000), {"e": EndpointLimits(history=10)})
    caller, watcher = world.caller(), world.attach()
    world.command(watcher, "broker.subscribe", endpoint="e", topic="broker.peers")
    for number in range(3):
        world.ask(caller, number, raw=LARGE, wait=True)
    outcome = world.command(caller, "broker.publish", endpoint="e", data=1).outcome
    assert (outcome.kind, outcome.bound) == (errors.OVERLOADED, "memory")
    world.attach(Role.CALLER, "e")
    assert len(world.router.fanouts) == 0
    assert world.router.counters.broadcasts_refused == 2 and world.router.counters.broadcasts == 0
    world.cancel(caller, 0)
    assert world.command(caller, "broker.publish", endpoint="e", data=1).outcome.kind is errors.OK
    assert world.router.counters.broadcasts == 1


def test_broadcasts_under_way_count_until_the_last_copy() -> None:
    world = World()
    one, two = (world.attach(Role.CALLER, "e", listen=True) for _ in range(2))
    world.ask(one, 1, "broker.publish", b'{"endpoint":"e","data":%b}' % LARGE)
    assert used(world) == 10_000
    world.router.fanouts.slice(1)
    assert used(world) == 10_000
    world.router.fanouts.slice(1)
    assert used(world) == 0 and two.link is not None


@pytest.mark.parametrize("end", ["answered", "lost", "cancelled"])
def test_parts_that_are_gathered_count(end: str) -> None:
    world = World()
    worker, caller = world.worker(), world.caller()
    world.ask(caller, 1, raw=LARGE, idempotent=True, retries=1)
    attempt = world.one_call(worker).attempt
    for seq in range(2):
        world.feed(PartSent(worker, None, attempt.id, seq, Body(LARGE)))
    assert used(world) == 30_000
    if end == "answered":
        world.answer(worker, attempt, b"null")
    elif end == "lost":
        second = world.worker()
        world.detach(worker)
        assert used(world) == 10_000, "another worker begins anew"
        world.answer(second, world.one_call(second).attempt)
    else:
        world.cancel(caller, 1)
    assert used(world) == 0


def test_parts_that_wait_for_a_worker_count_until_one_comes() -> None:
    world = World()
    caller = world.caller()
    world.ask(caller, 1, wait=True, stream_out=True)
    for seq in range(3):
        world.feed(PartSent(caller, 1, 0, seq, Body(LARGE)))
    assert used(world) == 30_000
    world.worker()
    assert used(world) == 0
