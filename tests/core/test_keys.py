"""Idempotency keys: who joins whom, who takes over, what a repeat gets, and that nothing is left behind."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest

from broker.core import errors
from broker.core.events import Asked, BadReply, Detached, PartSent
from broker.core.keys import ENTRY_BYTES, JOINED_MAX, digest_of
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, End, Options
from broker.core.options import OptionError, read_options
from broker.core.sessions import Session
from tests.core.harness import World

OK, ERROR = errors.OK, errors.WORKER_ERROR


def ask(world: World, session: Session, wire_id: int | str, target: str = "e/m", **more: Any) -> None:
    more.setdefault("key", "k")
    more.setdefault("timeout", 30.0)
    world.ask(session, wire_id, target, **more)


def ended(world: World, session: Session) -> list[tuple[object, str, bytes | None]]:
    """What a session was told since the last time: wire id, outcome, body."""
    ends = world.ends(session)
    taken = [end.wire_id for end in ends]
    world.effects = [e for e in world.effects if getattr(e, "message", None) not in ends]
    bodies = [None if end.body is None else bytes(end.body.raw) for end in ends]
    return list(zip(taken, (end.outcome.kind.name for end in ends), bodies, strict=True))


def three(**more: Any) -> tuple[World, Session, Session, Session]:
    """One worker, and two callers of one principal."""
    world = World(**more)
    worker = world.worker(capacity=1)
    return world, worker, world.caller(), world.caller()


def nothing_left(world: World) -> None:
    state = world.router.state
    for session in list(state.sessions.by_id.values()):
        world.detach(session)
    assert not state.keys.working and not state.pending.count
    assert state.budget.used == state.keys.kept_bytes


# ---------------------------------------------------------------- joining


def test_a_repeat_in_flight_joins_and_both_end_alike() -> None:
    world, worker, first, second = three()
    ask(world, first, 1, raw=b"[1]")
    call = world.one_call(worker)
    ask(world, second, "x", raw=b"[1]")
    ask(world, first, 2, raw=b"[1]")
    assert world.calls(worker) == [] and world.router.pending.count == 3
    world.answer(worker, call.attempt, b'"done"')
    assert ended(world, first) == [(1, "ok", b'"done"'), (2, "ok", b'"done"')]
    assert ended(world, second) == [("x", "ok", b'"done"')]
    counters = world.router.counters
    assert (counters.attempts, counters.keys_joined, counters.ended["ok"]) == (1, 2, 3)
    nothing_left(world)


def test_a_worker_has_one_place_less_however_many_have_joined() -> None:
    world, worker, first, second = three()
    ask(world, first, 1)
    for wire_id in range(5):
        ask(world, second, wire_id)
    (registration,) = worker.registrations.values()
    assert registration.load == 1
    world.answer(worker, world.one_call(worker).attempt)
    assert registration.load == 0 and registration.free


@pytest.mark.parametrize("other", ["principal", "endpoint", "key"])
def test_keys_belong_to_a_principal_at_an_endpoint(other: str) -> None:
    world, worker, first, _ = three()
    elsewhere = world.worker("f") if other == "endpoint" else world.worker()
    second = world.caller(principal="somebody else") if other == "principal" else first
    ask(world, first, 1)
    world.one_call(worker)
    ask(world, second, 2, "f/m" if other == "endpoint" else "e/m", raw=b"[2]", key="K" if other == "key" else "k")
    assert world.one_call(elsewhere).body.raw == b"[2]"


def test_no_key_is_no_key() -> None:
    world, worker, first, second = three()
    world.ask(first, 1)
    call = world.one_call(worker)
    world.ask(second, 1)
    world.answer(worker, call.attempt)
    assert world.one_call(worker).attempt is not call.attempt
    assert not world.router.state.keys.working and not world.router.state.keys.kept


def test_a_notification_takes_no_notice_of_a_key() -> None:
    world, worker, first, second = three()
    ask(world, first, 1)
    call = world.one_call(worker)
    world.worker()
    world.feed(Asked(second, None, "e", "m", Body(b"[]"), Options(key="k")))
    assert world.router.counters.notifications == 1 and world.router.counters.keys_joined == 0
    world.answer(worker, call.attempt)
    nothing_left(world)


# ---------------------------------------------------------------- how the work ends


@pytest.mark.parametrize("retryable", [False, True])
def test_an_error_of_the_worker_is_everybodys(retryable: bool) -> None:
    world, worker, first, second = three()
    ask(world, first, 1)
    ask(world, second, 2)
    world.fail(worker, world.one_call(worker).attempt, 7, retryable=retryable)
    for caller in (first, second):
        (end,) = world.ends(caller)
        assert end.outcome.kind is ERROR and end.outcome.retryable is retryable
        assert end.body is not None and end.body.raw == b'{"code":7}'
    world.take()
    ask(world, second, 3)
    if retryable:
        world.answer(worker, world.one_call(worker).attempt)
        assert ended(world, second) == [(3, "ok", b"1")]
    else:
        assert ended(world, second) == [(3, "worker_error", b'{"code":7}')]


def test_a_bad_reply_is_everybodys_and_a_repeat_runs_anew() -> None:
    world, worker, first, second = three()
    ask(world, first, 1)
    ask(world, second, 2)
    world.feed(BadReply(worker, world.one_call(worker).attempt.id, "no md5"))
    assert ended(world, first) == [(1, "bad_reply", None)] and ended(world, second) == [(2, "bad_reply", None)]
    ask(world, first, 3)
    world.one_call(worker)


def test_a_worker_that_is_lost_is_everybodys() -> None:
    world, worker, first, second = three()
    ask(world, first, 1, meta=True)
    ask(world, second, 2, meta=True)
    world.one_call(worker)
    world.detach(worker, flushed=1)
    for caller in (first, second):
        end = world.one_end(caller)
        assert end.outcome.kind is errors.WORKER_LOST and end.meta is not None and end.meta.attempts == 1
        assert end.outcome.attempts == 1 and end.outcome.dispatched
    nothing_left(world)


def test_what_is_idempotent_is_tried_elsewhere_for_all() -> None:
    world, worker, first, second = three()
    ask(world, first, 1, idempotent=True, retries=1)
    world.one_call(worker)
    ask(world, second, 2, meta=True)
    other = world.worker()
    world.detach(worker)
    world.answer(other, world.one_call(other).attempt, b"2")
    assert ended(world, first) == [(1, "ok", b"2")]
    end = world.one_end(second)
    assert end.outcome.kind is OK and end.meta is not None and (end.meta.attempts, end.meta.repeated) == (2, True)


def test_the_reply_says_who_was_not_executed() -> None:
    world, worker, first, second = three()
    ask(world, first, 1, meta=True)
    ask(world, second, 2, meta=True, trace="t")
    world.now += 1
    world.answer(worker, world.one_call(worker).attempt)
    metas = [end.meta for caller in (first, second) for end in world.ends(caller)]
    assert [meta is not None and (meta.repeated, meta.trace) for meta in metas] == [(False, None), (True, "t")]
    world.take()
    ask(world, second, 3, meta=True, trace="u")
    meta = world.one_end(second).meta
    assert meta is not None and (meta.repeated, meta.trace, meta.attempts, meta.worker) == (True, "u", 1, None)


def test_each_gets_as_much_as_fits_its_link() -> None:
    """Who takes no binary frames gets base64, which may be too large for a message; that harms nobody else."""
    world = World(Limits(message_max_bytes=200))
    worker = world.worker()
    text, binary = world.caller(takes_binary=False), world.caller()
    ask(world, text, 1)
    ask(world, binary, 2)
    from broker.core.events import Answered

    world.feed(Answered(worker, world.one_call(worker).attempt.id, Body(b'{"$buffer":0}', (b"x" * 180,))))
    assert ended(world, text) == [(1, "too_large", None)] and ended(world, binary) == [(2, "ok", b'{"$buffer":0}')]
    ask(world, text, 3)
    ask(world, binary, 4)
    assert ended(world, text) == [(3, "too_large", None)] and ended(world, binary) == [(4, "ok", b'{"$buffer":0}')]
    assert world.router.counters.attempts == 1


def test_what_no_worker_can_be_given_ends_for_all() -> None:
    world = World(Limits(message_max_bytes=100))
    worker = world.worker(takes_binary=False, capacity=1)
    first, second = world.caller(), world.caller()
    busy = world.busy(worker, first)
    large = Body(b'{"$buffer":0}', (b"x" * 90,))
    world.feed(Asked(first, 1, "e", "m", large, Options(key="k")))
    world.feed(Asked(second, 2, "e", "m", large, Options(key="k")))
    world.answer(worker, busy)
    assert ended(world, first)[1:] == [(1, "too_large", None)] and ended(world, second) == [(2, "too_large", None)]
    nothing_left(world)


def test_parts_are_gathered_for_all() -> None:
    """A request with a key is one message, whatever its link prefers."""
    options = read_options(b'{"key":"k"}', Options(stream_in=True, stream_out=True))
    assert not options.stream_in and not options.stream_out
    with pytest.raises(OptionError, match="stream out does not go with key"):
        read_options(b'{"key":"k","stream":"out"}')
    world, worker, first, second = three()
    ask(world, first, 1)
    ask(world, second, 2)
    number = world.one_call(worker).attempt.id
    for seq in range(3):
        world.feed(PartSent(worker, None, number, seq, Body(b"%d" % seq)))
    world.cancel(first, 1)
    assert ended(world, first) == [(1, "cancelled", None)]
    world.answer(worker, number, b"null")
    assert ended(world, second) == [(2, "ok", b"[0,1,2]")]
    nothing_left(world)


# ---------------------------------------------------------------- who leaves


def leave(world: World, session: Session, how: str) -> None:
    if how == "cancel":
        world.cancel(session, 1)
    elif how == "gone":
        world.detach(session)
    elif how == "admin":
        number = session.requests[1].id
        from broker.core.access import Grant, Role

        admin = world.attach(grants=(Grant(Role.ADMIN),))
        assert world.command(admin, "broker.admin.cancel", request=number).outcome.kind is OK
    else:
        world.sleep(2.0)


@pytest.mark.parametrize("how", ["cancel", "gone", "admin", "deadline"])
@pytest.mark.parametrize("queued", [False, True])
def test_the_work_goes_on_for_the_others(how: str, queued: bool) -> None:
    world, worker, first, second = three()
    busy = world.busy(worker, second, "busy") if queued else None
    ask(world, first, 1, timeout=1.0 if how == "deadline" else 30.0)
    ask(world, second, 2)
    world.ask(second, "behind", timeout=100.0)
    call = None if queued else world.one_call(worker)
    leave(world, first, how)
    if how != "gone":
        assert [end.outcome.kind.name for end in world.ends(first)] == [
            "deadline" if how == "deadline" else "cancelled"
        ]
    assert world.cancelled(worker) == []
    if busy is not None:
        world.answer(worker, busy)
        ended(world, second)
    call = call or world.one_call(worker)
    assert call.attempt.request.wire_id == 2, "it keeps its place before what came later"
    world.answer(worker, call.attempt, b"2")
    assert ended(world, second) == [(2, "ok", b"2")]
    assert world.one_call(worker).attempt.request.wire_id == "behind"
    nothing_left(world)


@pytest.mark.parametrize("how", ["cancel", "gone", "deadline"])
def test_one_that_has_joined_leaves_alone(how: str) -> None:
    world, worker, first, second = three()
    ask(world, second, 2)
    call = world.one_call(worker)
    ask(world, first, 1, timeout=1.0)
    leave(world, first, how)
    assert world.cancelled(worker) == [] and world.router.pending.count == 1
    world.answer(worker, call.attempt, b"2")
    assert ended(world, second) == [(2, "ok", b"2")]


def test_when_nobody_is_left_the_worker_is_told() -> None:
    world, worker, first, second = three()
    ask(world, first, 1)
    call = world.one_call(worker)
    ask(world, second, 2)
    ask(world, second, 3)
    world.cancel(first, 1)
    world.detach(second)
    assert world.cancelled(worker) == [call.attempt.id]
    assert world.router.counters.cancels == 1
    ask(world, first, 4)
    assert world.one_call(worker).attempt is not call.attempt, "a repeat runs anew"
    nothing_left(world)


def test_joined_ones_say_where_the_work_stands_when_they_expire() -> None:
    world, worker, first, second = three()
    ask(world, first, 1)
    ask(world, second, 2, timeout=1.0)
    world.one_call(worker)
    world.sleep(1.1)
    outcome = world.outcome(second)
    assert (outcome.phase, outcome.retryable, outcome.attempts, outcome.dispatched) == ("executing", False, 1, True)


def test_they_all_expire_in_one_tick() -> None:
    world, worker, first, second = three()
    for wire_id, caller in enumerate((first, second, first, second)):
        ask(world, caller, wire_id, timeout=1.0)
    call = world.one_call(worker)
    world.sleep(1.1)
    assert [kind for caller in (first, second) for _, kind, _ in ended(world, caller)] == ["deadline"] * 4
    assert world.cancelled(worker) == [call.attempt.id]
    nothing_left(world)


def test_who_has_time_left_takes_over_when_a_worker_is_free_before_the_tick() -> None:
    world, worker, first, second = three()
    busy = world.busy(worker, first)
    ask(world, first, 1, timeout=0.5)
    ask(world, second, 2)
    world.now += 0.5  # its time is over, and the loop has not come to it
    world.answer(worker, busy)
    call = world.one_call(worker)
    assert call.attempt.request.wire_id == 2 and call.left_s == 29.5
    world.sleep(0.1)
    assert ended(world, first)[1:] == [(1, "deadline", None)]
    world.answer(worker, call.attempt)
    assert ended(world, second) == [(2, "ok", b"1")]


def test_who_joins_what_was_passed_over_is_given_out_at_once() -> None:
    world, worker, first, second = three()
    busy = world.busy(worker, first)
    ask(world, first, 1, timeout=0.5)
    world.now += 0.5
    world.answer(worker, busy)
    assert world.calls(worker) == []
    ask(world, second, 2)
    assert world.one_call(worker).attempt.request.wire_id == 2
    world.sleep(0.1)
    assert ended(world, first)[1:] == [(1, "deadline", None)]


def test_who_has_time_left_is_tried_elsewhere() -> None:
    world, worker, first, second = three()
    ask(world, first, 1, timeout=0.5, idempotent=True, retries=1)
    ask(world, second, 2, idempotent=True, retries=1)
    world.one_call(worker)
    other = world.worker()
    world.now += 0.5
    world.detach(worker)
    call = world.one_call(other)
    assert call.attempt.request.wire_id == 2
    world.answer(other, call.attempt)
    assert [kind for _, kind, _ in ended(world, first)] == ["ok"], "its deadline has passed, and no tick has come"


@pytest.mark.parametrize("waits", ["both", "leader", "joined", "none"])
def test_when_the_last_worker_leaves_who_waits_for_one_goes_on_waiting(waits: str) -> None:
    world, worker, first, second = three()
    world.busy(worker, first)
    ask(world, first, 1, wait=waits in ("both", "leader"))
    ask(world, second, 2, wait=waits in ("both", "joined"))
    world.detach(worker)
    leader = [] if waits in ("both", "leader") else [(1, "no_worker", None)]
    assert ended(world, first)[: len(leader)] == leader
    assert ended(world, second) == ([] if waits in ("both", "joined") else [(2, "no_worker", None)])
    other = world.worker()
    assert len(world.calls(other)) == (waits != "none")
    nothing_left(world)


def test_a_place_in_the_queue_that_is_lost_is_lost_for_all() -> None:
    """The newest wins, or the queue is full and others hold less of it: who had joined would stand there again."""
    world = World(Limits(), {"e": EndpointLimits(newest_wins=True)})
    worker = world.worker(capacity=1)
    first, second = world.caller(), world.caller()
    world.busy(worker, second)
    ask(world, first, 1, group="g")
    ask(world, second, 2, group="g")
    world.ask(first, 3, group="g")
    assert ended(world, first) == [(1, "cancelled", None)] and ended(world, second) == [(2, "cancelled", None)]
    nothing_left(world)
    world, worker, first, second = three(limits=Limits(queue_max=2))
    world.busy(worker, second)
    world.ask(first, "other", timeout=30.0)
    ask(world, first, 1)
    ask(world, second, 2)
    world.ask(world.caller(principal="another"), 1, timeout=30.0)
    assert ended(world, first) == [(1, "overloaded", None)] and ended(world, second) == [(2, "overloaded", None)]
    nothing_left(world)


def test_a_closed_endpoint_ends_all_of_them() -> None:
    world, worker, first, second = three()
    world.busy(worker, second)
    ask(world, first, 1)
    ask(world, first, 2)
    world.reconfigure(Limits(), {"e": EndpointLimits(closed="moved")})
    assert ended(world, first) == [(2, "denied", None), (1, "denied", None)]
    nothing_left(world)


def test_a_shutdown_ends_all_of_them() -> None:
    world, worker, first, second = three()
    ask(world, first, 1)
    ask(world, second, 2)
    world.one_call(worker)
    world.drain(now=True)
    for caller in (first, second):
        outcome = world.outcome(caller)
        assert outcome.kind is errors.SHUTTING_DOWN and not outcome.retryable, "it may have run"
    ask(world, first, 3)
    assert ended(world, first) == [(3, "shutting_down", None)]


def test_who_joined_in_the_queue_knows_that_it_was_given_out() -> None:
    world, worker, first, second = three()
    busy = world.busy(worker, first)
    ask(world, first, 1)
    ask(world, second, 2)
    world.answer(worker, busy)
    world.one_call(worker)
    world.cancel(second, 2)
    outcome = world.outcome(second)
    assert (outcome.attempts, outcome.dispatched) == (1, True)


def test_what_ended_along_with_another_in_the_same_tick_ends_once() -> None:
    """A place becomes free in a tick, what is next cannot be given to the worker: who had joined it is due too."""
    world = World(Limits(message_max_bytes=100))
    worker = world.worker(takes_binary=False, capacity=1)
    first, second = world.caller(), world.caller()
    world.ask(first, "busy", timeout=1.0)
    large = Body(b'{"$buffer":0}', (b"x" * 90,))
    world.feed(Asked(first, 1, "e", "m", large, Options(key="k", timeout=30.0)))
    world.feed(Asked(second, 2, "e", "m", large, Options(key="k", timeout=1.0)))
    world.one_call(worker)
    world.sleep(2.0)
    assert ended(world, first) == [("busy", "deadline", None), (1, "too_large", None)]
    assert ended(world, second) == [(2, "too_large", None)]
    nothing_left(world)


# ---------------------------------------------------------------- repeats


def finished(limits: Limits | None = None) -> tuple[World, Session, Session]:
    """A request with a key that has ended well."""
    world = World(limits)
    worker, caller = world.worker(), world.caller()
    ask(world, caller, 1, raw=b"[1]")
    world.answer(worker, world.one_call(worker).attempt, b"11")
    world.take()
    return world, worker, caller


def test_a_repeat_is_answered_from_what_is_kept() -> None:
    world, worker, caller = finished()
    ask(world, caller, 1, raw=b"[1]")
    assert ended(world, caller) == [(1, "ok", b"11")] and world.calls(worker) == []
    world.detach(worker)
    ask(world, caller, 2, raw=b"[1]")
    assert ended(world, caller) == [(2, "ok", b"11")], "though no worker is there"
    assert world.router.counters.keys_repeated == 2 and world.router.counters.accepted == 3
    world.detach(caller)
    again = world.caller()
    ask(world, again, 3, raw=b"[1]")
    assert ended(world, again) == [(3, "ok", b"11")], "though it is another session"
    nothing_left(world)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("method", "raw", "attachments"),
    [("n", b"[1]", ()), ("m", b"[2]", ()), ("m", b"", ()), ("m", b"[1]", (b"",)), ("m", b"[1] ", ())],
)
def test_other_content_under_a_key_is_a_conflict(
    kept: bool, method: str, raw: bytes, attachments: tuple[bytes, ...]
) -> None:
    world, worker, caller = finished()
    if not kept:
        world = World()
        worker, caller = world.worker(), world.caller()
        ask(world, caller, 1, raw=b"[1]")
        world.one_call(worker)
    world.feed(Asked(caller, 2, "e", method, Body(raw, attachments), Options(key="k")))
    (end,) = world.ends(caller)
    assert end.outcome.kind is errors.KEY_CONFLICT and not end.outcome.retryable and end.wire_id == 2
    assert world.calls(worker) == []


def test_what_stands_where_belongs_to_the_content() -> None:
    session = World().caller()
    bodies = [
        Body(b"ab", (b"c",)),
        Body(b"a", (b"bc",)),
        Body(b"abc"),
        Body(b"ab", (b"", b"c")),
        Body(b"ab", (b"c", b"")),
    ]
    digests = {digest_of(Asked(session, 1, "e", "m", body, Options(key="k"))) for body in bodies}
    assert len(digests) == len(bodies)


@pytest.mark.parametrize("why", ["cancelled", "deadline", "worker_lost", "bad_reply"])
def test_what_ended_otherwise_runs_anew(why: str) -> None:
    world, worker, caller, _ = three()
    ask(world, caller, 1, timeout=1.0)
    number = world.one_call(worker).attempt.id
    if why == "cancelled":
        world.cancel(caller, 1)
    elif why == "deadline":
        world.sleep(2.0)
    elif why == "worker_lost":
        world.detach(worker)
        worker = world.worker()
    else:
        world.feed(BadReply(worker, number, "?"))
    assert ended(world, caller) == [(1, why, None)]
    ask(world, caller, 2, raw=b"[2]")
    assert world.one_call(worker).body.raw == b"[2]"


def test_refusals_come_before_the_key() -> None:
    world, _, caller = finished(Limits(in_flight_max=1))
    worker = next(iter(world.router.registry.by_name["e"].registrations))
    world.busy(worker, caller)
    ask(world, caller, 2, raw=b"[1]")
    assert world.outcome(caller).bound == "in_flight"
    world.cancel(caller, "busy")
    world.take()
    ask(world, caller, 2, raw=b"[1]", timeout=1e6)
    assert ended(world, caller) == [(2, "invalid", None)]
    world.reconfigure(Limits(), {"e": EndpointLimits(closed="moved")})
    ask(world, caller, 2, raw=b"[1]")
    assert ended(world, caller) == [(2, "denied", None)]


def test_in_flight_counts_those_that_have_joined() -> None:
    world, worker, first, second = three(limits=Limits(in_flight_max=2))
    ask(world, first, 1)
    ask(world, first, 2)
    ask(world, first, 3)
    assert world.outcome(first).bound == "in_flight"
    ask(world, second, 1)
    world.answer(worker, world.one_call(worker).attempt)
    assert len(world.ends(first)) == 2 and len(world.ends(second)) == 1


def test_a_full_queue_refuses_none_that_joins() -> None:
    world, worker, first, second = three(limits=Limits(queue_max=1))
    busy = world.busy(worker, first)
    ask(world, first, 1)
    ask(world, second, 2)
    ask(world, second, 3, key="other")
    assert ended(world, second) == [(3, "overloaded", None)]
    world.answer(worker, busy)
    world.answer(worker, world.one_call(worker).attempt)
    assert ended(world, second) == [(2, "ok", b"1")]


# ---------------------------------------------------------------- bounds of what is kept


def keep(world: World, caller: Session, key: str, size: int = 1) -> None:
    ask(world, caller, key, key=key)
    (worker,) = world.router.registry.by_name["e"].registrations
    calls = world.calls(worker)
    if calls:
        world.answer(worker, calls[-1].attempt, b"1" * size)
    world.take()


def kept(world: World) -> list[str]:
    return [name[2] for name in world.router.state.keys.kept]


@pytest.mark.parametrize("bound", ["number", "bytes"])
def test_the_oldest_goes_first(bound: str) -> None:
    limits = Limits(keys_kept_max=3) if bound == "number" else Limits(keys_kept_max_bytes=3 * (ENTRY_BYTES + 1))
    world = World(limits)
    world.worker()
    caller = world.caller()
    for key in "abcde":
        keep(world, caller, key)
    assert kept(world) == ["c", "d", "e"]
    keep(world, caller, "c")
    assert world.router.counters.keys_repeated == 1 and kept(world) == ["c", "d", "e"]
    keep(world, caller, "a")
    assert world.router.counters.attempts == 6 and kept(world) == ["d", "e", "a"]
    nothing_left(world)


@pytest.mark.parametrize("bound", ["number", "bytes"])
def test_who_has_more_than_a_share_pays_when_the_room_is_needed(bound: str) -> None:
    limits = Limits(keys_kept_max=8) if bound == "number" else Limits(keys_kept_max_bytes=8 * (ENTRY_BYTES + 1))
    world = World(limits)
    world.worker()
    modest, greedy = world.caller(principal="modest"), world.caller(principal="greedy")
    keep(world, modest, "a")
    keep(world, modest, "b")
    for key in "cdefgh":
        keep(world, greedy, key)
    assert kept(world) == list("abcdefgh"), "there was room"
    for key in "ijklmnop":
        keep(world, greedy, key)
    assert kept(world) == list("abklmnop")
    assert world.router.counters.over_share["replies"] == 8
    keep(world, modest, "a")
    assert world.router.counters.keys_repeated == 1
    world.router.check()
    world.now += 10_000
    world.tick()
    nothing_left(world)


def test_one_reply_larger_than_all_is_not_kept() -> None:
    world = World(Limits(keys_kept_max_bytes=2000))
    world.worker()
    caller = world.caller()
    keep(world, caller, "a")
    keep(world, caller, "b", 2000)
    assert kept(world) == ["a"]


@pytest.mark.parametrize("limits", [Limits(keys_kept_max=0), Limits(keys_kept_max_bytes=0), Limits(keys_kept_s=0)])
def test_a_bound_of_zero_keeps_nothing(limits: Limits) -> None:
    world = World(limits)
    world.worker()
    caller = world.caller()
    keep(world, caller, "a")
    keep(world, caller, "a")
    assert kept(world) == [] and world.router.counters.attempts == 2
    nothing_left(world)


def test_what_is_too_old_is_forgotten() -> None:
    world = World(Limits(keys_kept_s=10))
    world.worker()
    caller = world.caller()
    keep(world, caller, "a")
    world.now += 9.9
    keep(world, caller, "a")
    assert world.router.counters.keys_repeated == 1
    world.now += 0.2
    keep(world, caller, "a")
    assert world.router.counters.attempts == 2
    world.now += 20
    world.tick()
    assert kept(world) == [], "with no repeat to notice it"
    nothing_left(world)


# ---------------------------------------------------------------- everything at once


class Storm:
    """Callers with few keys, workers that answer, fail and die, callers that cancel and go: from one seed.

    The ledger: each request ends once; what ends `ok` has the reply of an execution of its own content, which was
    under way after it was asked, or is kept; no key is executed twice at a time; conflicts are conflicts.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        limits = Limits(
            queue_max=rng.choice((1, 3, 100)), keys_kept_max=rng.choice((0, 2, 100)),
            keys_kept_s=rng.choice((1.0, 50.0)), in_flight_max=rng.choice((3, 50)),
        )  # fmt: skip
        self.world = World(limits)
        self.callers = [self.world.caller(principal=rng.choice("pq")) for _ in range(3)]
        self.workers = [self.world.worker(capacity=rng.choice((1, 2))) for _ in range(2)]
        self.attempts: dict[int, tuple[Session, tuple[str, str, bytes]]] = {}
        self.open: dict[tuple[Session, int], tuple[str, str, bytes]] = {}
        self.ended: Counter[str] = Counter()
        self.asked = 0
        self.number = 0

    def run(self, steps: int) -> None:
        acts = [self.ask] * 8 + [self.answer] * 5 + [self.cancel] * 2 + [self.leave, self.die, self.pause, self.pause]
        for _ in range(steps):
            self.rng.choice(acts)()
            self.look()
        for worker in self.workers:
            self.world.detach(worker)
            self.look()
        self.world.sleep(10.0)
        self.look()
        assert not self.open and sum(self.ended.values()) == self.asked
        nothing_left(self.world)

    def ask(self) -> None:
        rng, self.number = self.rng, self.number + 1
        caller, key, raw = rng.choice(self.callers), rng.choice("abc"), rng.choice((b"[1]", b"[1]", b"[1]", b"[2]"))
        self.open[caller, self.number] = (caller.principal, key, raw)
        self.asked += 1
        retries = rng.choice((0, 0, 2))
        ask(
            self.world, caller, self.number, raw=raw, key=key, timeout=rng.choice((0.05, 0.5, 5.0)), retries=retries,
            idempotent=retries > 0, wait=rng.random() < 0.2,
        )  # fmt: skip

    def answer(self) -> None:
        held = [number for number, (worker, _) in self.attempts.items() if number in worker.attempts]
        if held:
            number = self.rng.choice(held)
            worker, (principal, key, raw) = self.attempts[number]
            if self.rng.random() < 0.2:
                self.world.fail(worker, worker.attempts[number], retryable=self.rng.random() < 0.5)
            else:
                self.world.answer(worker, number, f'"{principal}{key}'.encode() + raw + b'"')

    def cancel(self) -> None:
        if self.open:
            self.world.cancel(*self.rng.choice(list(self.open)))

    def leave(self) -> None:
        caller = self.rng.choice(self.callers)
        self.callers.remove(caller)
        self.world.detach(caller)
        for asked in [asked for asked in self.open if asked[0] is caller]:
            del self.open[asked]
            self.ended["gone"] += 1
        self.callers.append(self.world.caller(principal=self.rng.choice("pq")))

    def die(self) -> None:
        worker = self.rng.choice(self.workers)
        self.workers.remove(worker)
        self.world.detach(worker, flushed=self.rng.choice((0, 1)))
        self.look()
        self.workers.append(self.world.worker(capacity=self.rng.choice((1, 2))))

    def pause(self) -> None:
        if self.rng.random() < 0.3:
            self.world.now += self.rng.choice((0.04, 0.3))
        else:
            self.world.sleep(self.rng.choice((0.01, 0.1, 1.0)))

    def look(self) -> None:
        world = self.world
        for worker in self.workers:
            for call in world.calls(worker):
                request = call.attempt.request
                assert request.options.key is not None
                content = (request.session.principal, request.options.key, bytes(call.body.raw))
                self.attempts[call.attempt.id] = worker, content
        held = Counter(
            content[:2] for number, (worker, content) in self.attempts.items() if number in worker.attempts
        )  # fmt: skip
        assert not held or max(held.values()) == 1, "executed twice at a time"
        for caller in self.callers:
            for end in world.ends(caller):
                self.judge(caller, end)
        world.take()
        leaders = [work.leader for work in world.router.state.keys.working.values()]
        for leader in leaders:
            waits = leader.attempt is not None or leader in leader.endpoint.queue or leader.deadline <= world.now
            assert waits, "it neither waits nor is executed"
        for caller, number in self.open:
            assert number in caller.requests, "it has ended and nobody was told"

    def judge(self, caller: Session, end: End) -> None:
        assert isinstance(end.wire_id, int)
        principal, key, raw = self.open.pop((caller, end.wire_id))
        self.ended[end.outcome.kind.name] += 1
        if end.outcome.kind is OK:
            assert end.body is not None and end.body.raw == f'"{principal}{key}'.encode() + raw + b'"'


@pytest.mark.parametrize("seed", range(60))
def test_a_storm(seed: int) -> None:
    Storm(seed).run(150)


def test_a_storm_has_seen_everything() -> None:
    ended: Counter[str] = Counter()
    joined = repeated = retries = 0
    for seed in range(100, 120):
        storm = Storm(seed)
        storm.run(150)
        ended += storm.ended
        counters = storm.world.router.counters
        joined, repeated = joined + counters.keys_joined, repeated + counters.keys_repeated
        retries += counters.retries
    assert {"ok", "worker_error", "deadline", "cancelled", "worker_lost", "key_conflict", "overloaded"} <= set(ended)
    assert joined > 50 and repeated > 50 and retries > 5


def test_detached_twice_is_once() -> None:
    """A session that is gone cannot leave again, whatever it had joined."""
    world, worker, first, second = three()
    ask(world, first, 1)
    ask(world, second, 2)
    world.one_call(worker)
    world.detach(first)
    world.feed(Detached(first, 1006, "", 0))
    assert world.router.pending.count == 1


# ---------------------------------------------------------------- many at once


def test_so_many_wait_for_one_piece_of_work_and_no_more() -> None:
    world, worker, first, second = three()
    unchecked(world)
    for wire_id in range(JOINED_MAX + 1):
        ask(world, first, wire_id)
    call = world.one_call(worker)
    ask(world, second, "x")
    outcome = world.outcome(second)
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "queue"
    world.answer(worker, call.attempt)
    assert Counter(name for _, name, _ in ended(world, first)) == {"ok": JOINED_MAX + 1}


@pytest.mark.parametrize("queued", [False, True])
def test_many_that_have_joined_and_expire_together_cost_little_each(queued: bool, monkeypatch: Any) -> None:
    """Each that leads hands over to the next, which must not look at all others, nor at what else waits."""
    monkeypatch.setattr("broker.core.keyed.JOINED_MAX", 1_000_000)

    def spent_s(number: int) -> float:
        world, worker, first, second = three(limits=Limits(queue_max=100_000, in_flight_max=100_000))
        unchecked(world)
        if queued:
            world.busy(worker, second)
            for wire_id in range(number):
                world.ask(first, f"other {wire_id}", timeout=100.0)
        for wire_id in range(number):
            ask(world, first, wire_id, timeout=5.0)
        world.take()
        world.now += 6
        begun_at = time.process_time()
        while world.tick():
            pass
        spent = time.process_time() - begun_at
        assert Counter(name for _, name, _ in ended(world, first)) == {"deadline": number}
        return spent

    few = min(spent_s(250) for _ in range(3))
    many = min(spent_s(8000) for _ in range(3))
    assert many < 300 * few  # 32 times as many; a search through the others made it 1000 times as much


def unchecked(world: World) -> None:
    """Checking everything after each step would take longer than all else."""
    world.router.check = lambda: None  # type: ignore[method-assign]


def test_a_reply_that_is_too_old_counts_for_nobody_who_asks_where_nobody_serves() -> None:
    world = World(Limits(keys_kept_s=10.0))
    worker, first = world.worker(), world.caller()
    ask(world, first, 1)
    world.answer(worker, world.one_call(worker).attempt)
    world.detach(worker)
    world.take()
    world.now += 11
    ask(world, first, 2)
    assert world.outcome(first).kind is errors.NO_WORKER


def test_what_is_kept_never_takes_the_memory_from_what_is_asked() -> None:
    world = World(Limits(memory_soft_bytes=40_000, memory_hard_bytes=50_000))
    worker, first = world.worker(), world.caller()
    for wire_id in range(20):
        ask(world, first, wire_id, key=f"k{wire_id}")
        world.answer(worker, world.one_call(worker).attempt, b"1" * 4000)
        assert world.outcome(first).kind is OK
    assert 4000 < world.router.state.budget.used <= 10_000
