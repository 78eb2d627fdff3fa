"""What other brokers get wrong under load, as tests on this one."""

from __future__ import annotations

import pytest

from broker.core import errors
from broker.core.events import BadReply
from tests.core.harness import World


def test_after_a_timeout_at_capacity_1_the_endpoint_serves_again_at_once() -> None:
    world = World()
    worker, caller = world.worker(capacity=1), world.caller()
    world.ask(caller, "hangs", timeout=1.0)
    hanging = world.one_call(worker).attempt
    world.ask(caller, "waits", timeout=5.0)
    world.sleep(1.1)
    ended = world.one_end(caller)
    assert ended.wire_id == "hangs" and ended.outcome.kind is errors.DEADLINE and ended.outcome.phase == "executing"
    assert world.cancelled(worker) == [hanging.id]
    assert world.one_call(worker).attempt.request.wire_id == "waits", "though the worker has answered nothing"
    world.answer(worker, hanging)
    assert not world.ends(caller), "a late reply ends nobody's request"
    world.answer(worker, next(iter(worker.attempts.values())))
    assert world.outcome(caller).kind is errors.OK


def test_queued_calls_with_budgets_of_2_s_end_at_2_s() -> None:
    world = World()
    worker, caller = world.worker(capacity=1), world.caller()
    world.busy(worker, caller)
    asked_at = world.now
    for number in range(50):
        world.ask(caller, number, timeout=2.0)
    world.sleep(1.99)
    assert not world.ends(caller)
    world.sleep(0.01 + world.router.limits.slot_s)
    ends = world.ends(caller)
    assert len(ends) == 50 and world.now - asked_at == pytest.approx(2.05)
    assert all(end.outcome.kind is errors.DEADLINE and end.outcome.phase == "queued" for end in ends)
    assert all(end.outcome.retryable and 2000 <= end.outcome.elapsed_ms <= 2050 for end in ends)
    assert len(world.router.registry.by_name["e"].queue) == 0


def test_five_parallel_calls_run_in_parallel() -> None:
    world = World()
    worker, caller = world.worker(), world.caller()
    for number in range(5):
        world.ask(caller, number)
    attempts = [call.attempt for call in world.calls(worker)]
    assert len(attempts) == 5, "all are at the worker before it has answered one"
    for attempt in reversed(attempts):
        world.answer(worker, attempt)
    assert [end.wire_id for end in world.ends(caller)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("fault", ["error", "bad reply", "lost"])
def test_a_workers_exception_does_not_stall_what_is_queued_behind_it(fault: str) -> None:
    world = World()
    worker, caller = world.worker(capacity=1), world.caller()
    other = world.worker(capacity=1)
    for number in range(6):
        world.ask(caller, number, timeout=1000.0)
    world.take()
    for _ in range(6):
        able = worker if worker.attempts else other
        attempt = next(iter(able.attempts.values()))
        if fault == "error":
            world.fail(able, attempt)
        elif fault == "bad reply":
            world.feed(BadReply(able, attempt.id, "no md5"))
        else:
            world.detach(able)
            worker = world.worker(capacity=1)
    kind = {"error": errors.WORKER_ERROR, "bad reply": errors.BAD_REPLY, "lost": errors.WORKER_LOST}[fault]
    assert [end.outcome.kind for end in world.ends(caller)] == [kind] * 6
    assert world.router.pending.count == 0
