"""The rules of a request's way: places, queues, deadlines, retries, replies, strikes, sessions."""

from __future__ import annotations

import pytest

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.events import Asked, CloseLink, Deliver, ErrorReply, PauseReading, ResumeReading, Stray
from broker.core.ids import WireId
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, CancelAttempt, End, Options
from tests.core.harness import World

# ---------------------------------------------------------------- queue and places


def test_the_queue_keeps_its_order() -> None:
    world = World()
    first, second, worker = world.caller(), world.caller(), world.worker(capacity=1)
    attempt = world.busy(worker, first)
    for index, caller in enumerate((first, second, first, second)):
        world.ask(caller, index, f"e/m{index}")
    order = []
    for _ in range(4):
        world.answer(worker, attempt)
        call = world.one_call(worker)
        attempt = call.attempt
        order.append(call.method)
    assert order == ["m0", "m1", "m2", "m3"]


def test_the_queue_skips_what_a_worker_cannot_do() -> None:
    world = World()
    caller, reader, lister = world.caller(), world.attach(), world.attach()
    world.serve(reader, "e", methods=["read"], capacity=1)
    world.serve(lister, "e", methods=["list"], capacity=1)
    world.take()
    world.ask(caller, 0, "e/read")
    world.ask(caller, 1, "e/list")
    reading, listing = world.one_call(reader), world.one_call(lister)
    for wire_id, method in ((2, "read"), (3, "list"), (4, "read")):
        world.ask(caller, wire_id, f"e/{method}")
    world.answer(lister, listing.attempt)
    assert world.one_call(lister).attempt.request.wire_id == 3
    world.answer(reader, reading.attempt)
    assert world.one_call(reader).attempt.request.wire_id == 2


def test_a_queue_feeds_a_worker_up_to_its_capacity() -> None:
    world = World()
    caller = world.caller()
    for wire_id in range(5):
        world.ask(caller, wire_id, wait=True)
    worker = world.worker(capacity=3)
    assert [call.attempt.request.wire_id for call in world.calls(worker)] == [0, 1, 2]


def test_queue_time_counts_and_the_worker_is_told_what_is_left() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    attempt = world.busy(worker, caller)
    world.ask(caller, 1, timeout=10.0)
    world.sleep(4.0)
    world.answer(worker, attempt)
    assert world.one_call(worker).left_s == pytest.approx(6.0)


@pytest.mark.parametrize("how", ["answer", "detach and attach", "cancel"])
def test_expired_work_is_never_given_out(how: str) -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    attempt = world.busy(worker, caller)
    world.ask(caller, 1, timeout=1.0, wait=True)
    world.ask(caller, 2, timeout=5.0, wait=True)
    world.now += 1.0  # the deadline has come, the tick not yet
    if how == "answer":
        world.answer(worker, attempt)
    elif how == "cancel":
        world.cancel(caller, "busy")
    else:
        world.detach(worker)
        worker = world.worker(capacity=1)
    assert [call.attempt.request.wire_id for call in world.calls(worker)] == [2]
    world.sleep(0.06)
    (late,) = [end for end in world.ends(caller) if end.wire_id == 1]
    assert late.outcome.kind is errors.DEADLINE and late.outcome.phase == "queued" and late.outcome.retryable


@pytest.mark.parametrize("how", ["deadline", "cancel", "caller gone", "admin", "bad id from the worker"])
def test_the_place_is_free_at_once(how: str) -> None:
    world = World()
    leaving, caller, worker = world.caller(), world.caller(), world.worker(capacity=1)
    admin = world.attach(grants=(Grant(Role.ADMIN),))
    world.ask(leaving, 1, timeout=1.0)
    attempt = world.one_call(worker).attempt
    world.ask(caller, 2, timeout=60.0)
    assert not world.calls(worker)
    match how:
        case "deadline":
            world.sleep(1.06)
        case "cancel":
            world.cancel(leaving, 1)
        case "caller gone":
            world.detach(leaving)
        case "admin":
            world.command(admin, "broker.admin.cancel", request=attempt.request.id)
        case _:
            world.fail(worker, attempt)
    if how == "admin":
        assert worker.attempts and all(a.request.wire_id == 2 for a in worker.attempts.values())
        return
    assert world.one_call(worker).attempt.request.wire_id == 2
    assert world.cancelled(worker) == ([] if how.startswith("bad") else [attempt.id])


def test_a_worker_is_told_to_drop_before_it_is_given_more() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    world.ask(caller, 1)
    world.ask(caller, 2)
    world.take()
    world.cancel(caller, 1)
    kinds = [type(message).__name__ for message in world.messages(worker)]
    assert kinds == ["CancelAttempt", "Call"]


def test_a_capacity_told_anew_counts_at_once() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    for wire_id in range(4):
        world.ask(caller, wire_id)
    world.ask(worker, "s", "broker.serve", b'{"endpoint":"e","capacity":3}')
    assert len(world.calls(worker)) == 3
    world.take()
    world.ask(worker, "s", "broker.serve", b'{"endpoint":"e","capacity":1}')
    for attempt in list(worker.attempts.values())[:2]:
        world.answer(worker, attempt)
    assert not world.calls(worker), "it has one left, and takes no more than one"
    world.answer(worker, next(iter(worker.attempts.values())))
    assert len(world.calls(worker)) == 1


def test_unserve_lets_what_was_given_finish_and_gives_no_more() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    world.ask(caller, 1)
    attempt = world.one_call(worker).attempt
    world.ask(caller, 2, wait=True)
    assert world.command(worker, "broker.unserve", endpoint="e").body == Body(b'{"endpoint":"e","served":true}')
    world.answer(worker, attempt)
    assert world.outcome(caller).kind is errors.OK
    assert not world.calls(worker)
    world.ask(caller, 3)
    assert world.outcome(caller).kind is errors.NO_WORKER
    second = world.worker()
    assert world.one_call(second).attempt.request.wire_id == 2
    world.ask(worker, 1, "e/m")  # it may still ask
    assert len(world.calls(second)) == 1


# ---------------------------------------------------------------- losing a worker


def test_fault_01_all_requests_of_a_lost_worker_end_at_once() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    for wire_id in range(100):
        world.ask(caller, wire_id)
    world.take()
    world.detach(worker)
    ends = world.ends(caller)
    assert [end.wire_id for end in ends] == list(range(100))
    assert {end.outcome.kind for end in ends} == {errors.WORKER_LOST}
    counters = world.router.counters
    assert counters.accepted == 100 == counters.ended["worker_lost"] and world.router.pending.count == 0


def test_fault_01_an_idempotent_request_goes_to_another_worker_with_what_is_left() -> None:
    world = World()
    caller, first, second = world.caller(), world.worker(), world.worker()
    world.ask(caller, 1, idempotent=True, retries=1, timeout=10.0, meta=True)
    before = world.one_call(first).attempt
    world.now += 4
    world.detach(first)
    assert not world.ends(caller)
    call = world.one_call(second)
    assert call.left_s == pytest.approx(6.0) and call.attempt.id != before.id
    world.answer(second, call.attempt)
    end = world.one_end(caller)
    assert end.outcome.kind is errors.OK and end.meta is not None and end.meta.attempts == 2
    assert world.router.counters.retries == 1


def test_a_retry_waits_at_the_front_if_nobody_is_free() -> None:
    world = World()
    caller, first, second = world.caller(), world.worker(capacity=1), world.worker(capacity=1)
    world.ask(caller, 1, idempotent=True, retries=1)
    world.one_call(first)
    world.ask(caller, 2)
    attempt = world.one_call(second).attempt
    world.ask(caller, 3)
    world.detach(first)
    assert not world.ends(caller)
    world.answer(second, attempt)
    assert world.one_call(second).attempt.request.wire_id == 1


def test_retries_of_one_worker_wait_at_the_front_in_their_order() -> None:
    world = World()
    caller, busy = world.caller(), world.worker(capacity=1)
    world.busy(busy, caller)
    lost = world.worker(capacity=3)
    for wire_id in range(3):
        world.ask(caller, wire_id, idempotent=True, retries=1)
    world.ask(caller, "later")
    assert len(lost.attempts) == 3
    world.take()
    world.detach(lost)
    assert not world.ends(caller)
    order = []
    while busy.attempts:
        (held,) = busy.attempts.values()
        order.append(held.request.wire_id)
        world.answer(busy, held)
    assert order == ["busy", 0, 1, 2, "later"]


def test_of_several_retries_the_oldest_gets_the_free_place() -> None:
    world = World(endpoints={"e": EndpointLimits(policy="newest")})
    caller, other, lost = world.caller(), world.worker(capacity=1), world.worker(capacity=2)
    for wire_id in (1, 2):
        world.ask(caller, wire_id, idempotent=True, retries=1)
    world.take()
    world.detach(lost)
    call = world.one_call(other)
    assert call.attempt.request.wire_id == 1
    world.answer(other, call.attempt)
    assert world.one_call(other).attempt.request.wire_id == 2


def test_those_with_no_room_to_wait_are_the_latest() -> None:
    world = World(Limits(queue_max=2))
    caller, worker = world.caller(), world.worker(capacity=3)
    for wire_id in (1, 2, 3):
        world.ask(caller, wire_id, idempotent=True, retries=1)
    world.detach(worker)
    end = world.one_end(caller)
    assert end.wire_id == 3 and end.outcome.kind is errors.WORKER_LOST
    back = world.worker()
    assert [call.attempt.request.wire_id for call in world.calls(back)] == [1, 2]


@pytest.mark.parametrize("how", ["detach", "unserve"])
def test_when_the_last_worker_leaves_who_waited_for_it_is_told_at_once(how: str) -> None:
    world = World()
    caller, first, last = world.caller(), world.worker(capacity=1), world.worker(capacity=1)
    for busy in ("a", "b"):
        world.busy(first if not first.attempts else last, caller, busy)
    for wire_id in (1, 2):
        world.ask(caller, wire_id)
    world.ask(caller, "patient", wait=True)
    world.command(first, "broker.unserve", endpoint="e")
    assert not world.ends(caller), "there is another"
    if how == "detach":
        world.detach(last)
    else:
        world.command(last, "broker.unserve", endpoint="e")
    told = [end for end in world.ends(caller) if end.wire_id != "b"]
    assert [end.wire_id for end in told] == [1, 2]
    for end in told:
        said = end.outcome
        assert (said.kind, said.phase, said.retryable, said.dispatched) == (errors.NO_WORKER, "queued", True, False)
        assert said.detail == "all workers of e have gone while it waited"
    assert [call.attempt.request.wire_id for call in world.calls(world.worker())] == ["patient"]


def test_who_waits_for_a_second_try_goes_on_waiting_when_the_last_worker_leaves() -> None:
    world = World(Limits(queue_max=1))
    caller, lost, last = world.caller(), world.worker(capacity=1), world.worker(capacity=1)
    world.ask(caller, 1, idempotent=True, retries=2)
    world.ask(caller, 2)
    world.take()
    world.detach(lost)  # 1 waits for the last one
    world.command(last, "broker.unserve", endpoint="e")
    assert not world.ends(caller)
    assert [call.attempt.request.wire_id for call in world.calls(world.worker())] == [1]


def test_who_is_told_makes_room_for_what_is_tried_again() -> None:
    world = World(Limits(queue_max=1))
    caller, worker = world.caller(), world.worker(capacity=1)
    world.ask(caller, 1, idempotent=True, retries=1)
    world.ask(caller, 2)
    world.take()
    world.detach(worker)
    end = world.one_end(caller)
    assert end.wire_id == 2 and end.outcome.kind is errors.NO_WORKER
    assert [call.attempt.request.wire_id for call in world.calls(world.worker())] == [1]


def test_a_retry_waits_for_a_worker_to_come_back() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1, idempotent=True, retries=1)
    world.take()
    world.detach(worker)
    assert not world.ends(caller)
    back = world.worker()
    world.answer(back, world.one_call(back).attempt)
    assert world.outcome(caller).kind is errors.OK


def test_the_budget_of_retries_ends() -> None:
    world = World()
    caller = world.caller()
    workers = [world.worker() for _ in range(4)]
    world.ask(caller, 1, idempotent=True, retries=2)
    for expected in (1, 2, 3):
        assert not world.ends(caller)
        (attempt,) = (attempt for worker in workers for attempt in worker.attempts.values())
        assert attempt.request.attempts == expected
        workers.remove(attempt.session)
        world.detach(attempt.session)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.WORKER_LOST and outcome.attempts == 3 and outcome.retryable


def test_what_is_not_idempotent_runs_at_most_once() -> None:
    world = World()
    caller, first, second = world.caller(), world.worker(), world.worker()
    world.ask(caller, 1)
    world.detach(first)
    assert world.outcome(caller).kind is errors.WORKER_LOST
    assert not world.calls(second)


@pytest.mark.parametrize("why", ["expired", "queue full", "draining"])
def test_no_retry_without_time_or_room_or_while_draining(why: str) -> None:
    world = World(Limits(queue_max=1))
    caller, worker = world.caller(), world.worker(capacity=1)
    world.ask(caller, 1, idempotent=True, retries=1, timeout=1.0)
    world.one_call(worker)
    if why == "expired":
        world.now += 1.0
    elif why == "queue full":
        world.ask(caller, 2, wait=True)
    else:
        world.drain()
    world.detach(worker)
    assert world.outcome(caller).kind is errors.WORKER_LOST


def test_a_lost_caller_that_is_its_own_worker_ends_once() -> None:
    world = World()
    peer = world.worker(capacity=1)
    for wire_id in range(3):
        world.ask(peer, wire_id, idempotent=True, retries=1)
    world.detach(peer)
    assert world.router.pending.count == 0
    assert sum(world.router.counters.ended.values()) == 3


# ---------------------------------------------------------------- losing a caller


def test_fault_04_a_caller_that_leaves_takes_its_requests_along() -> None:
    world = World()
    caller, other, worker = world.caller(), world.caller(), world.worker(capacity=2)
    for wire_id in range(5):
        world.ask(caller, wire_id)
    world.ask(other, "x")
    attempts = [call.attempt.id for call in world.calls(worker)]
    world.take()
    world.detach(caller)
    assert world.cancelled(worker) == attempts
    calls = world.calls(worker)
    assert [call.attempt.request.wire_id for call in calls] == ["x"], "what left with it is not started"
    assert not world.ends(caller)
    assert world.router.counters.ended["cancelled"] == 5 and world.router.pending.count == 1


def test_fault_04_many_callers_come_and_go_and_nothing_stays() -> None:
    world = World()
    world.worker(capacity=3)
    before = len(world.router.pending.deadlines)
    for _ in range(300):
        caller = world.attach(Role.CALLER, "e", listen=True)
        for wire_id in range(5):
            world.ask(caller, wire_id)
        world.detach(caller)
        world.take()
    assert len(world.router.pending.deadlines) == before == 0
    assert len(world.router.sessions) == 1 and world.router.pending.count == 0
    assert not world.router.registry.by_name["e"].queue
    assert world.router.registry.by_name["e"].listeners == 0


def test_a_second_detach_does_nothing() -> None:
    world = World()
    worker = world.worker()
    world.detach(worker)
    world.take()
    world.detach(worker)
    assert world.take() == [] and world.router.counters.detached == 1


# ---------------------------------------------------------------- replies


def test_row_11_a_reply_from_another_worker_is_dropped_counted_and_a_strike() -> None:
    world = World()
    caller, first, second = world.caller(), world.worker(), world.worker()
    world.ask(caller, 1)
    attempt = world.one_call(first).attempt
    world.answer(second, attempt)
    assert not world.ends(caller) and world.router.counters.late_replies == 1
    world.feed(Stray(second, foreign=True))  # what a codec says that can tell whose attempt it is
    assert not world.ends(caller)
    assert world.router.counters.foreign_replies == 1 and len(second.strikes) == 1
    world.answer(first, attempt, b'"right"')
    assert world.one_end(caller).body == Body(b'"right"')


def test_row_13_the_first_reply_wins() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1)
    attempt = world.one_call(worker).attempt
    world.answer(worker, attempt, b'"first"')
    world.ask(caller, 1)  # the id is used again: the second reply must not reach this one
    world.answer(worker, attempt, b'"second"')
    assert world.one_end(caller).body == Body(b'"first"')
    assert world.router.counters.late_replies == 1 and not worker.strikes


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_row_13_a_reply_after_the_end_is_counted_and_dropped(how: str) -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1, timeout=1.0)
    attempt = world.one_call(worker).attempt
    if how == "deadline":
        world.sleep(1.06)
    else:
        world.cancel(caller, 1)
    world.take()
    world.answer(worker, attempt)
    world.fail(worker, attempt, -32800)
    assert world.take() == [] and world.router.counters.late_replies == 2 and not worker.strikes


def test_a_reply_to_an_attempt_that_was_lost_does_not_end_the_retry() -> None:
    world = World()
    caller, first, second = world.caller(), world.worker(), world.worker()
    world.ask(caller, 1, idempotent=True, retries=1)
    lost = world.one_call(first).attempt
    world.detach(first)
    call = world.one_call(second)
    world.answer(second, lost)
    world.answer(first, call.attempt)
    assert not world.ends(caller)
    world.answer(second, call.attempt)
    assert world.outcome(caller).kind is errors.OK


@pytest.mark.parametrize("code", [-32600, -32700])
def test_a_nameless_error_ends_the_only_request_in_flight(code: int) -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1)
    world.one_call(worker)
    world.feed(Stray(worker, nameless=True, body=Body(b'{"code":1}'), error=ErrorReply(code)))
    end = world.one_end(caller)
    assert end.outcome.kind is errors.WORKER_ERROR and end.body == Body(b'{"code":1}')
    assert world.router.counters.nameless_replies == 1 == worker.nameless_replies and not worker.strikes


@pytest.mark.parametrize(("in_flight", "error"), [(2, ErrorReply(-32600)), (1, ErrorReply(-32000)), (1, None)])
def test_other_nameless_replies_are_only_counted(in_flight: int, error: ErrorReply | None) -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    for wire_id in range(in_flight):
        world.ask(caller, wire_id)
    for _ in range(5):
        world.feed(Stray(worker, nameless=True, error=error))
    assert not world.ends(caller) and not worker.strikes and not world.closed(worker)
    assert world.router.counters.nameless_replies == 5


def test_a_late_stray_is_counted_and_no_strike() -> None:
    world = World()
    worker = world.worker()
    for _ in range(5):
        world.feed(Stray(worker))
    assert world.router.counters.late_replies == 5 and not worker.strikes and world.take() == []


# ---------------------------------------------------------------- strikes


def test_row_18_three_strikes_close_the_link() -> None:
    world = World()
    peer = world.caller()
    world.malformed(peer)
    world.malformed(peer)
    assert not world.closed(peer)
    world.malformed(peer)
    assert world.closed(peer) == [4400]
    assert world.router.counters.malformed == 3 == world.router.counters.strikes


def test_strikes_are_forgotten_after_a_minute() -> None:
    world = World()
    peer = world.caller()
    for _ in range(10):
        world.malformed(peer)
        world.malformed(peer)
        world.now += 60.0
    assert not world.closed(peer)


def test_mistakes_without_strike_never_close() -> None:
    world = World()
    peer = world.caller()
    for _ in range(20):
        world.malformed(peer, strike=False)
    assert not world.closed(peer) and world.router.counters.malformed == 20


def test_memory_of_strikes_is_bounded() -> None:
    world = World()
    peer = world.caller()
    for _ in range(1000):
        world.malformed(peer)
    assert len(peer.strikes) == 3


# ---------------------------------------------------------------- congestion


def test_a_congested_worker_is_given_nothing_until_it_reads() -> None:
    world = World()
    caller, slow, other = world.caller(), world.worker(), world.worker(capacity=1)
    world.congested(slow, True)
    assert not [e for e in world.effects if isinstance(e, PauseReading)], "it must stay free to answer"
    for wire_id in range(3):
        world.ask(caller, wire_id)
    assert not world.calls(slow) and len(world.calls(other)) == 1
    world.congested(slow, False)
    assert [call.attempt.request.wire_id for call in world.calls(slow)] == [1, 2]


def test_a_congested_caller_is_read_no_more_until_it_reads() -> None:
    world = World()
    caller, other = world.caller(), world.caller()
    world.congested(caller, True)
    assert world.take() == [PauseReading(caller)]
    world.congested(caller, False)
    assert world.take() == [ResumeReading(caller)]
    assert not other.congested


def test_a_paused_caller_that_became_a_worker_is_read_again() -> None:
    world = World()
    peer = world.caller()
    world.congested(peer, True)
    world.ask(peer, 1, "broker.serve", b'{"endpoint":"e"}')
    world.take()
    world.congested(peer, False)
    assert ResumeReading(peer) in world.take()


def test_all_workers_congested_means_waiting_not_losing() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 0)
    attempt = world.one_call(worker).attempt
    world.congested(worker, True)
    world.ask(caller, 1)
    world.answer(worker, attempt)
    assert world.outcome(caller).kind is errors.OK
    assert not world.calls(worker) and not world.ends(caller)
    world.congested(worker, False)
    assert world.calls(worker)


# ---------------------------------------------------------------- credentials


def test_row_09_a_link_is_closed_when_its_credential_expires() -> None:
    world = World()
    mortal, other = world.caller(expires_at=world.now + 60), world.caller()
    assert world.router.next_deadline() <= world.now + 60.05
    world.sleep(59.99)
    assert not world.closed(mortal), "never early"
    world.sleep(0.07)
    assert world.closed(mortal) == [4401] and not world.closed(other)
    world.sleep(60)
    assert world.closed(mortal) == [4401], "once"


def test_row_09_a_session_that_left_expires_no_more() -> None:
    world = World()
    mortal = world.caller(expires_at=world.now + 60)
    world.detach(mortal)
    world.take()
    world.sleep(61)
    assert world.take() == [] and world.router.next_deadline() == float("inf")


def test_many_credentials_expire_in_slices() -> None:
    world = World()
    for _ in range(25):
        world.caller(expires_at=world.now + 1)
    world.now += 1.05
    closed = []
    while True:
        more = world.tick(10)
        closed.append(sum(isinstance(effect, CloseLink) for effect in world.take()))
        if not more:
            break
    assert closed == [10, 10, 5]


# ---------------------------------------------------------------- rows 9 and 10 of the faults


@pytest.mark.parametrize("queue", [False, True])
def test_fault_09_requests_that_expire_together_end_in_slices_and_in_order(queue: bool) -> None:
    count, limit, callers_n = 100_000, 500, 20
    world = World(Limits(queue_max=count))
    callers = [world.caller() for _ in range(callers_n)]
    world.worker(capacity=1 if queue else count)
    router = world.router
    handle, effects = router.handle, router.effects

    # Deadlines come in 40 slots, in no order, and all have passed before the first tick.
    wanted = []
    for number in range(count):
        slot = number * 7 % 40
        options = Options(timeout=1.0 + slot * 0.05 + 0.001)
        handle(Asked(callers[number % callers_n], number, "e", "m", Body(b""), options), world.now)
        wanted.append((slot, number))
        effects.clear()
    wanted.sort()
    world.now += 10.0
    ended: list[WireId] = []
    more = True
    while more:
        before = len(ended)
        more = router.tick(world.now, limit)
        ended += [e.message.wire_id for e in effects if isinstance(e, Deliver) and isinstance(e.message, End)]
        assert len(ended) - before <= limit, "tick(limit) ends no more than limit"
        told = sum(isinstance(e, Deliver) and isinstance(e.message, CancelAttempt) for e in effects)
        assert told <= limit
        assert len(effects) <= 2 * limit, "an end and a cancel each, nothing expired is given out"
        assert more == (len(ended) < count)
        effects.clear()
    assert ended == [number for _, number in wanted]
    assert router.pending.count == 0 and router.counters.ended["deadline"] == count
    router.check()


def test_fault_10_only_the_clock_handed_in_counts() -> None:
    world = World(now=5.0)
    caller = world.caller()
    world.ask(caller, 1, wait=True, timeout=1.0)
    assert world.router.next_deadline() == pytest.approx(6.05)
    world.tick()
    assert not world.ends(caller)


def test_next_deadline_is_never_later_than_due_and_may_be_asked_any_time() -> None:
    world = World()
    assert world.router.next_deadline() == float("inf")
    caller = world.caller()
    world.ask(caller, 1, wait=True, timeout=5.0)
    world.ask(caller, 2, wait=True, timeout=1.0)
    assert 1001.0 <= world.router.next_deadline() <= 1001.05
    world.cancel(caller, 2)
    world.sleep(1.05)
    assert 1005.0 <= world.router.next_deadline() <= 1005.05, "an emptied slot costs one idle look"


# ---------------------------------------------------------------- notifications


def test_notifications_take_no_place_and_are_counted_apart() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    for _ in range(3):
        world.ask(caller, None, "e/hello")
    assert world.notified(worker) == ["hello"] * 3
    counters = world.router.counters
    assert (counters.notifications, counters.notifications_dropped, counters.accepted) == (3, 0, 0)
    assert not worker.attempts and world.router.pending.count == 0


@pytest.mark.parametrize("why", ["nobody", "busy", "denied", "draining", "no method"])
def test_notifications_nobody_can_take_are_dropped_and_counted(why: str) -> None:
    world = World()
    caller = world.caller(grants=(Grant(Role.LISTENER),) if why == "denied" else (Grant(Role.CALLER),))
    if why != "nobody":
        worker = world.attach()
        world.serve(worker, "e", capacity=1, **({"methods": ["other"]} if why == "no method" else {}))
        world.take()
    if why == "busy":
        world.busy(worker, caller)
    if why == "draining":
        world.drain()
    world.ask(caller, None)
    assert world.take() == []
    assert world.router.counters.notifications_dropped == 1 == world.router.counters.notifications
    assert why == "nobody" or not world.router.registry.by_name["e"].queue


def test_notifications_are_spread_over_equals() -> None:
    world = World()
    caller = world.caller()
    workers = [world.worker() for _ in range(3)]
    for _ in range(6):
        world.ask(caller, None)
    assert [len(world.notified(worker)) for worker in workers] == [2, 2, 2]


def test_a_notification_of_the_brokers_own_method_is_done_without_answer() -> None:
    world = World()
    peer, listener = world.attach(), world.attach(Role.LISTENER, "e", listen=True)
    world.ask(peer, None, "broker.publish", b'{"endpoint":"e","data":5}')
    world.ask(peer, None, "broker.nonsense")
    world.ask(peer, None, "broker.publish", b'{"endpoint":5}')
    assert not world.messages(peer)
    assert [(to, bytes(m.body.raw)) for to, m in world.broadcasts()] == [(listener, b"5")]
    assert world.router.counters.accepted == 0


# ---------------------------------------------------------------- the books


def test_latency_is_counted_in_powers_of_two() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1)
    world.now += 0.003
    world.answer(worker, world.one_call(worker).attempt)
    counters = world.router.counters
    assert counters.latency_sum_s == pytest.approx(0.003)
    assert counters.latency[12] == 1 == sum(counters.latency), "2048 µs <= 3000 µs < 4096 µs"


def test_check_notices_when_views_disagree() -> None:
    for spoil in ("books", "slot", "queue", "attempt", "listeners"):
        world = World()
        caller, worker = world.caller(), world.worker(capacity=1)
        world.ask(caller, 1)
        world.ask(caller, 2)
        if spoil == "books":
            world.router.counters.accepted += 1
        elif spoil == "slot":
            slot = caller.requests[1].slot
            assert slot is not None
            slot.clear()
        elif spoil == "queue":
            endpoint = world.router.registry.by_name["e"]
            endpoint.queue.put(caller.requests[1], endpoint.line_of(caller.requests[1]))
        elif spoil == "attempt":
            worker.attempts.clear()
        else:
            world.router.registry.by_name["e"].listeners += 1
        with pytest.raises(AssertionError):
            world.router.check()
