"""Every way a request can end, reached through the router."""

from __future__ import annotations

import pytest

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.errors import Kind
from broker.core.events import Answered, Asked, BadReply, ErrorReply
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, ReplyMeta
from tests.core.harness import World

# ---------------------------------------------------------------- the table itself


def test_kinds_have_the_codes_of_the_protocol() -> None:
    codes = {
        "no_endpoint": -32601, "no_method": -32601, "no_worker": -32001, "worker_lost": -32002, "deadline": -32003,
        "overloaded": -32004, "cancelled": -32005, "denied": -32006, "shutting_down": -32007, "too_large": -32008,
        "slow_consumer": -32009, "duplicate_id": -32010, "bad_reply": -32011, "key_conflict": -32012,
        "worker_error": -32000,
    }  # fmt: skip
    assert {kind.name: kind.code for kind in errors.KINDS if kind.name in codes} == codes
    assert {kind.code for kind in errors.KINDS if kind.name == "invalid"} == {-32700, -32600, -32602}


def test_every_kind_has_words_and_advice() -> None:
    for kind in errors.KINDS:
        assert kind.text and kind.advice
        assert kind is errors.OK or 400 <= kind.http < 600


def test_close_codes_are_distinct_and_name_themselves() -> None:
    assert len({close.code for close in errors.CLOSES}) == len(errors.CLOSES)
    assert len({close.name for close in errors.CLOSES}) == len(errors.CLOSES)
    assert {close.code for close in errors.CLOSES if close.code > 4000} == {
        4400, 4401, 4403, 4404, 4408, 4409, 4412, 4429,
    }  # fmt: skip


# ---------------------------------------------------------------- ok and errors of workers


def test_ok_carries_the_result_untouched() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 7, "e/read", b'{"a": 1 }')
    call = world.one_call(worker)
    assert (call.endpoint, call.method, bytes(call.body.raw)) == ("e", "read", b'{"a": 1 }')
    world.feed(Answered(worker, call.attempt.id, Body(b' {"b":2}', (b"\x00",))))
    end = world.one_end(caller)
    assert end.wire_id == 7 and end.outcome.kind is errors.OK and end.outcome.dispatched
    assert end.body == Body(b' {"b":2}', (b"\x00",))
    assert world.router.counters.ended["ok"] == 1 and world.router.pending.count == 0


@pytest.mark.parametrize("wire_id", [0, "", "7", 7, -(2**63), "x" * 128])
def test_the_wire_id_comes_back_with_its_type(wire_id: int | str) -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, wire_id)
    world.answer(worker, world.one_call(worker).attempt)
    end = world.one_end(caller)
    assert end.wire_id == wire_id and type(end.wire_id) is type(wire_id)


def test_a_number_and_its_text_are_different_ids() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 7)
    world.ask(caller, "7")
    assert len(world.calls(worker)) == 2 and not world.ends(caller)


@pytest.mark.parametrize("retryable", [False, True])
def test_worker_error_is_retryable_as_the_worker_says(retryable: bool) -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1)
    attempt = world.one_call(worker).attempt
    world.feed(Answered(worker, attempt.id, Body(b'{"code":0}'), ErrorReply(0, retryable)))
    end = world.one_end(caller)
    assert end.outcome.kind is errors.WORKER_ERROR and end.outcome.retryable is retryable
    assert end.outcome.dispatched and end.body == Body(b'{"code":0}')


@pytest.mark.parametrize("idempotent", [False, True])
def test_bad_reply_is_retryable_if_idempotent(idempotent: bool) -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    world.ask(caller, 1, idempotent=idempotent)
    attempt = world.one_call(worker).attempt
    world.ask(caller, 2)
    world.feed(BadReply(worker, attempt.id, "offset 9 lies beyond the frame"))
    outcome = world.outcome(caller)
    assert outcome.kind is errors.BAD_REPLY and outcome.retryable is idempotent
    assert outcome.detail == "offset 9 lies beyond the frame"
    assert len(world.calls(worker)) == 1, "its place is free again"
    world.feed(BadReply(worker, attempt.id, "twice"))
    assert world.router.counters.late_replies == 1 and not world.ends(caller)


@pytest.mark.parametrize("takes_binary", [False, True])
@pytest.mark.parametrize("way", ["in", "back"])
def test_too_large_counts_as_the_receiver_would_get_it(way: str, takes_binary: bool) -> None:
    world = World(Limits(message_max_bytes=100))
    small, large = Body(b"{}", (b"x" * 50,)), Body(b"{}", (b"x" * 80,))  # in base64 86 and 126 bytes
    caller = world.attach(takes_binary=takes_binary or way == "in")
    worker = world.worker(capacity=1, takes_binary=takes_binary or way == "back")
    for wire_id, body in enumerate((small, large)):
        world.feed(Asked(caller, wire_id, "e", "m", body if way == "in" else Body(b"")))
        if way == "in" and body is large and not takes_binary:
            assert not world.calls(worker)
        else:
            attempt = world.one_call(worker).attempt
            world.feed(Answered(worker, attempt.id, body if way == "back" else Body(b"1")))
        end = world.one_end(caller)
        if body is small or takes_binary:
            assert end.outcome.kind is errors.OK
        else:
            assert end.outcome.kind is errors.TOO_LARGE and not end.outcome.retryable and end.body is None
            assert "100 bytes" in end.outcome.detail and end.outcome.dispatched == (way == "back")
    world.ask(caller, "next")
    assert world.calls(worker), "its place is free"


def test_meta_only_for_who_asked() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1)
    world.answer(worker, world.one_call(worker).attempt)
    assert world.one_end(caller).meta is None
    world.ask(caller, 2, meta=True, trace="00-1-2-3")
    world.now += 0.25
    world.answer(worker, world.one_call(worker).attempt)
    assert world.one_end(caller).meta == ReplyMeta(
        worker=f"n-{worker.id}", attempts=1, elapsed_ms=250.0, retryable=False, trace="00-1-2-3"
    )


# ---------------------------------------------------------------- nobody there


@pytest.mark.parametrize(("age_s", "retryable"), [(9.9, True), (10.0, False), (1000.0, False)])
def test_no_endpoint_is_retryable_for_ten_seconds_after_the_start(age_s: float, retryable: bool) -> None:
    world = World(started_at=500.0, now=500.0 + age_s)
    caller = world.caller()
    world.ask(caller, 1, "nobody/m")
    outcome = world.outcome(caller)
    assert outcome.kind is errors.NO_ENDPOINT and outcome.retryable is retryable and not outcome.dispatched
    assert "nobody" in outcome.detail


def test_an_endpoint_only_listened_to_is_no_endpoint() -> None:
    world = World()
    caller = world.caller(endpoint="e", listen=True)
    world.ask(caller, 1)
    assert world.outcome(caller).kind is errors.NO_ENDPOINT


def test_no_worker_after_the_last_one_left() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.detach(worker)
    world.ask(caller, 1)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.NO_WORKER and outcome.retryable


def test_no_worker_at_a_configured_endpoint_never_served() -> None:
    world = World(endpoints={"e": EndpointLimits()})
    caller = world.caller()
    world.ask(caller, 1)
    assert world.outcome(caller).kind is errors.NO_WORKER


@pytest.mark.parametrize("known", [False, True])
def test_wait_queues_until_a_worker_comes(known: bool) -> None:
    world = World(endpoints={"e": EndpointLimits()} if known else {})
    caller = world.caller()
    world.ask(caller, 1, wait=True)
    assert not world.ends(caller)
    world.now += 5
    worker = world.worker()
    call = world.one_call(worker)
    assert call.left_s == pytest.approx(25.0)
    world.answer(worker, call.attempt)
    assert world.outcome(caller).kind is errors.OK


def test_wait_ends_at_the_deadline_if_nobody_comes() -> None:
    world = World()
    caller = world.caller()
    world.ask(caller, 1, wait=True, timeout=2.0)
    world.sleep(2.06)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.DEADLINE and outcome.phase == "queued" and outcome.retryable


def test_no_method_if_all_workers_said_theirs_and_none_has_it() -> None:
    world = World()
    caller, first, second = world.caller(), world.attach(), world.attach()
    world.serve(first, "e", methods=["read"])
    world.serve(second, "e", methods=["list"])
    world.take()
    world.ask(caller, 1, "e/write")
    outcome = world.outcome(caller)
    assert outcome.kind is errors.NO_METHOD and not outcome.retryable and "write" in outcome.detail
    world.ask(caller, 2, "e/list")
    assert world.calls(second) and not world.calls(first)


def test_no_method_never_if_one_worker_takes_all() -> None:
    world = World()
    caller, first, second = world.caller(), world.attach(), world.worker()
    world.serve(first, "e", methods=["read"])
    world.take()
    world.ask(caller, 1, "e/write")
    assert world.calls(second) and not world.ends(caller)


# ---------------------------------------------------------------- invalid


def test_refused_by_its_codec() -> None:
    world = World()
    caller = world.caller()
    world.refused(caller, 1)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.INVALID_PARAMS and outcome.detail == "an option nobody knows"
    assert world.router.counters.accepted == 1 == world.router.counters.ended["invalid"]


def test_a_timeout_above_the_bound_is_invalid_and_named() -> None:
    world = World(endpoints={"slow": EndpointLimits(deadline_max_s=7200.0)})
    caller = world.caller()
    world.worker("e")
    world.worker("slow")
    world.ask(caller, 1, "e/m", timeout=3600.5)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.INVALID_PARAMS and "3600" in outcome.detail and "timeout" in outcome.detail
    world.ask(caller, 2, "e/m", timeout=3600.0)
    world.ask(caller, 3, "slow/m", timeout=7200.0)
    assert not world.ends(caller)


# ---------------------------------------------------------------- worker lost


@pytest.mark.parametrize(
    ("mark", "flushed", "idempotent", "retryable"),
    [
        (100, 100, False, False),  # written: it may have run
        (100, 99, False, True),  # never written
        (100, 100, True, True),
        (100, 99, True, True),
    ],
)
def test_worker_lost_is_retryable_if_idempotent_or_never_written(
    mark: int, flushed: int, idempotent: bool, retryable: bool
) -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1, idempotent=idempotent, retries=0)
    world.one_call(worker).attempt.mark = mark
    world.detach(worker, flushed=flushed, code=1006, reason="broken")
    outcome = world.outcome(caller)
    assert outcome.kind is errors.WORKER_LOST and outcome.retryable is retryable and outcome.dispatched
    assert f"n-{worker.id}" in outcome.detail and "1006 broken" in outcome.detail


# ---------------------------------------------------------------- deadline


def test_deadline_while_executing_tells_the_worker() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1, timeout=1.0)
    attempt = world.one_call(worker).attempt
    world.sleep(0.99)
    assert not world.ends(caller), "never early"
    world.sleep(0.07)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.DEADLINE and outcome.phase == "executing" and not outcome.retryable
    assert 1000.0 <= outcome.elapsed_ms <= 1060.0
    assert world.cancelled(worker) == [attempt.id]


def test_deadline_while_executing_is_retryable_if_idempotent() -> None:
    world = World()
    caller = world.caller()
    world.worker()
    world.ask(caller, 1, timeout=1.0, idempotent=True)
    world.sleep(1.06)
    assert world.outcome(caller).retryable


def test_deadline_while_queued_is_retryable() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    world.busy(worker, caller)
    world.ask(caller, 1, timeout=1.0)
    world.sleep(1.06)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.DEADLINE and outcome.phase == "queued" and outcome.retryable
    assert not outcome.dispatched and not world.calls(worker) and not world.cancelled(worker)


def test_the_default_deadline_is_the_endpoints_else_the_brokers() -> None:
    world = World(Limits(deadline_s=5.0), {"slow": EndpointLimits(deadline_s=50.0)})
    caller, fast, slow = world.caller(), world.worker("fast"), world.worker("slow")
    world.ask(caller, 1, "fast/m")
    world.ask(caller, 2, "slow/m")
    assert world.one_call(fast).left_s == 5.0 and world.one_call(slow).left_s == 50.0


# ---------------------------------------------------------------- overloaded, by each bound


def test_overloaded_in_flight_per_session() -> None:
    world = World(Limits(in_flight_max=2))
    caller, other, worker = world.caller(), world.caller(), world.worker()
    for wire_id in (1, 2):
        world.ask(caller, wire_id)
    first, _ = world.calls(worker)
    assert not world.ends(caller), "a bound of 2 accepts 2"
    world.ask(caller, 3)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "in_flight" and outcome.retryable
    assert outcome.retry_after_ms
    world.ask(other, 3)
    assert not world.ends(other), "others do not notice"
    world.answer(worker, first.attempt)
    world.take()
    world.ask(caller, 4)
    assert not world.ends(caller)


def test_overloaded_queue_per_endpoint() -> None:
    world = World(Limits(queue_max=2))
    caller, worker = world.caller(), world.worker(capacity=1)
    attempt = world.busy(worker, caller)
    for wire_id in (1, 2):
        world.ask(caller, wire_id)
    assert not world.ends(caller), "a bound of 2 accepts 2"
    world.ask(caller, 3)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "queue" and outcome.retry_after_ms
    world.answer(worker, attempt)
    world.take()
    world.ask(caller, 4)
    assert not world.ends(caller), "a place in the queue is free again"


def test_overloaded_queue_of_one_endpoint_only() -> None:
    world = World(endpoints={"e": EndpointLimits(queue_max=0)})
    caller, worker = world.caller(), world.worker(capacity=1)
    world.worker("f", capacity=1)
    world.busy(worker, caller)
    world.ask(caller, 1)
    assert world.outcome(caller).bound == "queue"
    for wire_id in (2, 3):
        world.ask(caller, wire_id, "f/m")
    assert not world.ends(caller)


def test_overloaded_endpoints() -> None:
    world = World(Limits(endpoints_known_max=2))
    caller = world.caller()
    world.worker("a")
    world.worker("b")
    world.ask(caller, 1, "c/m", wait=True)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "endpoints"
    assert world.command(caller, "broker.serve", endpoint="c").outcome.bound == "endpoints"


def test_overloaded_names() -> None:
    world = World(Limits(names_per_session_max=2))
    peer = world.attach()
    world.serve(peer, "a")
    assert world.command(peer, "broker.subscribe", endpoint="a").outcome.kind is errors.OK
    for method in ("broker.serve", "broker.subscribe"):
        outcome = world.command(peer, method, endpoint="b").outcome
        assert outcome.kind is errors.OVERLOADED and outcome.bound == "names", method
    world.serve(peer, "a", capacity=5)  # what it has already, it may say again
    assert world.command(peer, "broker.subscribe", endpoint="a").outcome.kind is errors.OK


def test_overloaded_topics() -> None:
    world = World(Limits(topics_per_endpoint_max=2))
    peer = world.attach()
    for topic in ("t1", "t2"):
        assert world.command(peer, "broker.subscribe", endpoint="e", topic=topic).outcome.kind is errors.OK
    outcome = world.command(peer, "broker.subscribe", endpoint="e", topic="t3").outcome
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "topics"
    assert world.command(peer, "broker.unsubscribe", endpoint="e", topic="t1").outcome.kind is errors.OK
    assert world.command(peer, "broker.subscribe", endpoint="e", topic="t3").outcome.kind is errors.OK


def test_a_full_set_of_topics_keeps_nobody_from_attaching() -> None:
    world = World(Limits(topics_per_endpoint_max=1))
    peer = world.attach()
    world.command(peer, "broker.subscribe", endpoint="e", topic="t1")
    world.command(peer, "broker.subscribe", endpoint="e", topic="t2")
    listener = world.attach(Role.LISTENER, "e", listen=True)
    world.command(peer, "broker.publish", endpoint="e", data=1)
    assert [to for to, _ in world.broadcasts()] == [listener]


def test_overloaded_fanouts() -> None:
    world = World(Limits(fanouts_max=1))
    peer = world.attach(endpoint="e", listen=True)
    assert world.command(peer, "broker.publish", data=1).outcome.kind is errors.OK
    outcome = world.command(peer, "broker.publish", data=2).outcome
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "fanouts"
    assert world.router.counters.broadcasts_refused == 1
    world.broadcasts()
    assert world.command(peer, "broker.publish", data=3).outcome.kind is errors.OK


# ---------------------------------------------------------------- cancelled


@pytest.mark.parametrize("queued", [False, True])
def test_cancelled_by_the_caller_at_once(queued: bool) -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    if queued:
        world.busy(worker, caller)
    world.ask(caller, 1)
    world.cancel(caller, 1)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.CANCELLED and outcome.cause == "caller" and not outcome.retryable
    assert len(world.cancelled(worker)) == (0 if queued else 1)


def test_cancelled_by_an_administrator() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    admin = world.attach(grants=(Grant(Role.ADMIN),))
    world.ask(caller, 1)
    attempt = world.one_call(worker).attempt
    world.ask(admin, 1, "broker.admin.cancel", b'{"request":%d}' % attempt.request.id)
    assert world.cancelled(worker) == [attempt.id]
    outcome = world.outcome(caller)
    assert outcome.kind is errors.CANCELLED and outcome.cause == "admin"
    assert world.outcome(admin).kind is errors.OK


def test_a_cancel_of_nothing_does_nothing() -> None:
    world = World()
    caller, other, worker = world.caller(), world.caller(), world.worker()
    world.ask(caller, 1)
    world.take()
    world.cancel(other, 1)
    world.cancel(caller, 2)
    assert world.take() == []
    world.cancel(caller, 1)
    world.cancel(caller, 1)
    assert len(world.ends(caller)) == 1 and len(world.cancelled(worker)) == 1


# ---------------------------------------------------------------- denied, shutting down, duplicate id


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("grants", [(), (Grant(Role.LISTENER),), (Grant(Role.WORKER),), (Grant(Role.CALLER, ("f*",)),)])
def test_denied_is_said_whether_or_not_the_endpoint_exists(served: bool, grants: tuple[Grant, ...]) -> None:
    world = World()
    caller = world.caller(grants=grants)
    worker = world.worker("e" if served else "f")
    world.ask(caller, 1)
    end = world.one_end(caller)
    assert end.outcome.kind is errors.DENIED and not end.outcome.retryable
    assert end.outcome.detail == "somebody may not call e", "nothing tells the two cases apart"
    assert not world.calls(worker)


def test_denied_at_a_closed_endpoint_with_its_reason() -> None:
    world = World(endpoints={"e": EndpointLimits(closed="moved to f")})
    caller = world.caller()
    world.ask(caller, 1)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.DENIED and "moved to f" in outcome.detail
    assert world.command(caller, "broker.serve", endpoint="e").outcome.kind is errors.DENIED


def test_shutting_down_refuses_new_work_and_finishes_the_old() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    world.ask(caller, 1)
    world.ask(caller, 2)
    call = world.one_call(worker)
    world.drain()
    assert not world.ends(caller)
    world.ask(caller, 3)
    outcome = world.outcome(caller)
    assert outcome.kind is errors.SHUTTING_DOWN and outcome.retryable
    world.answer(worker, call.attempt)
    assert world.outcome(caller).kind is errors.OK
    world.answer(worker, world.one_call(worker).attempt)
    assert world.outcome(caller).kind is errors.OK
    assert world.router.pending.count == 0


def test_drain_now_ends_all_and_gives_out_nothing_more() -> None:
    world = World()
    caller, other, worker = world.caller(), world.caller(), world.worker(capacity=1)
    world.ask(caller, 1)
    world.ask(caller, 2)
    world.ask(other, 1)
    attempt = world.one_call(worker).attempt
    world.drain(now=True)
    assert [end.outcome.kind for end in (*world.ends(caller), *world.ends(other))] == [errors.SHUTTING_DOWN] * 3
    assert not world.calls(worker), "what waited is not started only to be stopped"
    assert world.cancelled(worker) == [attempt.id]
    assert world.router.pending.count == 0


@pytest.mark.parametrize("idempotent", [False, True])
def test_what_a_shutdown_ends_may_be_repeated_if_it_never_ran_or_is_idempotent(idempotent: bool) -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    for wire_id in ("given out", "waiting"):
        world.ask(caller, wire_id, idempotent=idempotent)
    assert world.one_call(worker).attempt.request.wire_id == "given out"
    world.drain(now=True)
    ends = {end.wire_id: end.outcome for end in world.ends(caller)}
    assert ends["given out"].retryable is idempotent and ends["given out"].dispatched
    assert ends["waiting"].retryable and not ends["waiting"].dispatched
    assert {outcome.kind for outcome in ends.values()} == {errors.SHUTTING_DOWN}


@pytest.mark.parametrize("queued", [False, True])
def test_row_12_a_reused_id_leaves_the_first_request_untouched(queued: bool) -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    if queued:
        busy = world.busy(worker, caller)
    world.ask(caller, 1, "e/first")
    first = caller.requests[1]
    world.ask(caller, 1, "e/second")
    outcome = world.outcome(caller)
    assert outcome.kind is errors.DUPLICATE_ID
    assert caller.requests[1] is first
    if queued:
        world.answer(worker, busy)
        world.take()
        assert first.attempt is not None
    assert first.attempt is not None and first.method == "first"
    world.answer(worker, first.attempt)
    assert world.ends(caller)[-1].outcome.kind is errors.OK
    world.take()
    world.ask(caller, 1, "e/third")
    assert not world.ends(caller), "an id that has ended is free"


def test_row_12_a_refused_request_with_an_id_in_flight_does_not_end_the_first() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1)
    world.refused(caller, 1)
    assert world.outcome(caller).kind is errors.DUPLICATE_ID
    world.answer(worker, world.one_call(worker).attempt)
    assert world.outcome(caller).kind is errors.OK


@pytest.mark.parametrize("method", ["broker.ping", "broker.call"])
def test_row_12_the_brokers_own_methods_mind_ids_too(method: str) -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1)
    world.one_call(worker)
    world.ask(caller, 1, method, b'{"endpoint":"e","method":"m"}')
    assert world.outcome(caller).kind is errors.DUPLICATE_ID
    assert not world.calls(worker)


def test_row_12_ids_are_per_session() -> None:
    world = World()
    first, second, worker = world.caller(), world.caller(), world.worker()
    world.ask(first, 1)
    world.ask(second, 1)
    one, two = world.calls(worker)
    world.answer(worker, two.attempt, b'"two"')
    assert not world.ends(first)
    assert world.one_end(second).body == Body(b'"two"')
    world.answer(worker, one.attempt, b'"one"')
    assert world.one_end(first).body == Body(b'"one"')


def test_nothing_of_a_session_that_left_is_taken_in() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.detach(caller)
    world.take()
    accepted = world.router.counters.accepted
    world.ask(caller, 1)
    world.ask(caller, None)
    world.feed(Asked(caller, 2, "", "broker.serve", Body(b'{"endpoint":"e"}')))
    world.refused(caller, 3)
    world.malformed(caller)
    world.congested(caller, True)
    world.cancel(caller, 1)
    assert world.take() == [] and not world.calls(worker)
    assert world.router.counters.accepted == accepted
    assert list(world.router.registry.by_name["e"].registrations) == [worker]


def reached() -> set[Kind]:
    """The kinds the tests above reach; the others belong to codecs and later parts."""
    return {
        errors.OK, errors.WORKER_ERROR, errors.NO_ENDPOINT, errors.NO_METHOD, errors.INVALID_PARAMS, errors.NO_WORKER,
        errors.WORKER_LOST, errors.DEADLINE, errors.OVERLOADED, errors.CANCELLED, errors.DENIED, errors.SHUTTING_DOWN,
        errors.DUPLICATE_ID, errors.BAD_REPLY, errors.TOO_LARGE,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in errors.KINDS if kind not in reached()], ids=lambda kind: kind.code)
def test_kinds_of_codecs_pass_through_as_refusals(kind: Kind) -> None:
    world = World()
    caller = world.caller()
    world.refused(caller, "x", kind)
    assert world.outcome(caller).kind is kind
