"""The table of requests: its views agree, and what has ended is referred to by nobody."""

from __future__ import annotations

import sys

import pytest

from broker.core.pending import AttemptState, RequestState
from tests.core.harness import World


@pytest.mark.parametrize(
    "how", ["answer", "fail", "cancel", "deadline", "caller gone", "worker gone", "drain", "queued"]
)
def test_what_has_ended_is_referred_to_by_nobody(how: str) -> None:
    """Requests and attempts are hidden from the garbage collector, so no ring of references may be left."""
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    if how == "queued":
        world.busy(worker, caller)
    world.ask(caller, 1, timeout=1.0)
    request = caller.requests[1]
    attempt = request.attempt
    match how:
        case "answer":
            assert attempt is not None
            world.answer(worker, attempt.id)
        case "fail":
            assert attempt is not None
            world.fail(worker, attempt)
        case "cancel":
            world.cancel(caller, 1)
        case "deadline" | "queued":
            world.sleep(1.06)
        case "caller gone":
            world.detach(caller)
        case "worker gone":
            world.detach(worker)
        case _:
            world.drain(now=True)
    world.take()
    assert request.state is RequestState.ENDED and request.slot is None and request.attempt is None
    if attempt is not None:
        assert attempt.state is AttemptState.DONE
        assert sys.getrefcount(attempt) == 2, "this variable and the argument"
        del attempt
    assert sys.getrefcount(request) == 2


def test_numbers_are_never_used_twice() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    requests, attempts = [], []
    for _ in range(5):
        world.ask(caller, 1, idempotent=True, retries=1)
        call = world.one_call(worker)
        requests.append(call.attempt.request.id)
        attempts.append(call.attempt.id)
        world.detach(worker)
        worker = world.worker()
        call = world.one_call(worker)
        attempts.append(call.attempt.id)
        world.answer(worker, call.attempt)
    assert requests == [1, 2, 3, 4, 5] and attempts == list(range(1, 11))


def test_states_of_a_request() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    attempt = world.busy(worker, caller)
    world.ask(caller, 1, idempotent=True, retries=1)
    request = caller.requests[1]
    states = [request.state]
    world.answer(worker, attempt)
    states.append(request.state)
    world.detach(worker)
    states.append(request.state)
    second = world.worker()
    states.append(request.state)
    world.answer(second, world.one_call(second).attempt)
    states.append(request.state)
    assert [state.value for state in states] == ["queued", "assigned", "queued", "assigned", "ended"]
