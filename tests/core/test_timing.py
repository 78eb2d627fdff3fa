"""`meta.timing`: when what happened to a request, on the clock of the tests."""

from __future__ import annotations

from broker.core import errors
from broker.core.events import PartSent
from broker.core.messages import Body, End, Timing
from tests.core.harness import World


def timing_of(end: End) -> Timing:
    assert end.meta is not None and end.meta.timing is not None
    return end.meta.timing


def test_what_is_dispatched_at_once_has_not_waited() -> None:
    world = World()
    worker, caller = world.worker(), world.caller()
    world.ask(caller, 1, meta=True, timing=True)
    world.sleep(0.25)
    world.answer(worker, world.one_call(worker).attempt)
    assert timing_of(world.one_end(caller)) == Timing(0.0, 0.0, None, 250.0)


def test_time_in_the_queue_is_told() -> None:
    world = World()
    worker, caller = world.worker(capacity=1), world.caller()
    busy = world.busy(worker, caller)
    world.ask(caller, 1, meta=True, timing=True)
    world.sleep(2)
    world.answer(worker, busy)
    world.take()
    attempt = next(iter(worker.attempts.values()))
    world.sleep(1)
    world.answer(worker, attempt)
    assert timing_of(world.one_end(caller)) == Timing(2000.0, 2000.0, None, 3000.0)


def test_what_no_worker_had_was_never_dispatched() -> None:
    world = World()
    caller = world.caller()
    world.ask(caller, 1, meta=True, timing=True, wait=True, timeout=1.0)
    world.sleep(2)
    end = world.one_end(caller)
    timing = timing_of(end)
    assert end.outcome.kind is errors.DEADLINE
    assert timing.dispatched_ms is timing.first_part_ms is None
    assert timing.queued_ms == timing.ended_ms >= 1000.0


def test_after_a_retry_both_waits_count_and_the_lost_attempt_does_not() -> None:
    world = World()
    first, caller = world.worker(), world.caller()
    world.ask(caller, 1, meta=True, timing=True, idempotent=True, retries=1)
    world.sleep(3)
    world.detach(first)
    world.sleep(2)
    second = world.worker()
    world.sleep(1)
    world.answer(second, world.one_call(second).attempt)
    assert timing_of(world.one_end(caller)) == Timing(2000.0, 5000.0, None, 6000.0)


def test_a_worker_that_was_lost_still_had_it() -> None:
    world = World()
    worker, caller = world.worker(), world.caller()
    world.ask(caller, 1, meta=True, timing=True)
    world.sleep(3)
    world.detach(worker)
    end = world.one_end(caller)
    assert end.outcome.kind is errors.WORKER_LOST
    assert timing_of(end) == Timing(0.0, 0.0, None, 3000.0)


def test_the_first_part_is_told() -> None:
    world = World()
    worker, caller = world.worker(), world.caller()
    world.ask(caller, 1, meta=True, timing=True, stream_in=True)
    attempt = world.one_call(worker).attempt
    world.sleep(1)
    world.feed(PartSent(worker, None, attempt.id, 0, Body(b"1")))
    world.sleep(1)
    world.feed(PartSent(worker, None, attempt.id, 1, Body(b"2")))
    world.answer(worker, attempt)
    assert timing_of(world.one_end(caller)) == Timing(0.0, 0.0, 1000.0, 2000.0)


def test_who_did_not_ask_is_not_told() -> None:
    world = World()
    worker, caller = world.worker(), world.caller()
    world.ask(caller, 1, meta=True)
    world.answer(worker, world.one_call(worker).attempt)
    end = world.one_end(caller)
    assert end.meta is not None and end.meta.timing is None
    world.ask(caller, 2)
    world.answer(worker, world.one_call(worker).attempt)
    assert world.one_end(caller).meta is None


def test_asking_by_broker_call_is_enough() -> None:
    world = World()
    worker, caller = world.worker(), world.caller()
    world.ask(caller, 1, "broker.call", b'{"endpoint":"e","method":"m","timing":true}')
    world.answer(worker, world.one_call(worker).attempt)
    assert timing_of(world.one_end(caller)) == Timing(0.0, 0.0, None, 0.0)
