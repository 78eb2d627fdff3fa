"""Short runs of the simulator, and proof that it would notice: routers broken on purpose are found out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from broker.core import errors
from broker.core.attaching import Attaching
from broker.core.broadcasts import Broadcasts
from broker.core.deadlines import Deadlines
from broker.core.dispatch import LeastPending, Policy, Queue
from broker.core.events import Answered, Deliver, Detached
from broker.core.messages import Broadcast, CancelAttempt, End
from broker.core.pending import Pending
from broker.core.registry import Registry
from broker.core.requests import Requests, outcome_of
from broker.core.router import Router
from broker.core.sessions import Sessions
from broker.core.topics import Topic
from tests.core.simulator import KEPT_LINES, Failure, Simulator


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_the_promise_holds_whatever_happens(first: int) -> None:
    for seed in range(first, first + 10):
        Simulator(seed).run(1000)


def test_the_runs_reach_every_outcome_of_the_core() -> None:
    reached: dict[str, int] = {}
    counted = dict.fromkeys(
        ("retries", "cancels", "late_replies", "foreign_replies", "nameless_replies", "strikes", "notifications"), 0
    )
    for seed in range(30):
        simulator = Simulator(seed)
        simulator.run(700)
        for name, count in simulator.witness.ended.items():
            reached[name] = reached.get(name, 0) + count
        for name in counted:
            counted[name] += getattr(simulator.witness.router.counters, name)
    of_codecs_and_later_parts = {"slow_consumer", "key_conflict"}
    assert set(reached) == {kind.name for kind in errors.KINDS} - of_codecs_and_later_parts
    assert all(counted.values()), counted


def test_same_seed_same_trace() -> None:
    assert Simulator(5).run(1500) == Simulator(5).run(1500)
    assert Simulator(5).run(800) != Simulator(6).run(800)


def test_the_trace_hangs_on_no_hash_of_the_process() -> None:
    command = [sys.executable, "-m", "tests.core.simulator", "--seeds", "6", "--steps", "600", "--digest"]
    digests = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True, capture_output=True, timeout=50
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1] and digests[0].strip()


def test_a_failure_names_its_seed_and_ends_with_the_trace() -> None:
    simulator = Simulator(3)
    simulator.run(300)
    broken = Simulator(3)
    broken.witness.router.counters.accepted += 1
    with pytest.raises(Failure, match=r"^seed 3, step \d+: .*books") as caught:
        broken.run(300)
    assert len(str(caught.value).splitlines()) <= KEPT_LINES + 2
    assert len(simulator.lines) <= KEPT_LINES


# ---------------------------------------------------------------- broken on purpose

Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutant] = {}


def mutant(function: Mutant) -> Mutant:
    MUTANTS[function.__name__] = function
    return function


@mutant
def expired_work_is_given_out(patch: pytest.MonkeyPatch) -> None:
    def feed(self: Requests, registration: Any, now: float) -> None:
        queue = registration.endpoint.queue
        while registration.free and queue:
            request = queue.take(registration)
            if request is None:
                return
            registration.endpoint.free.load(registration)
            self._assign(request, registration, now)

    patch.setattr(Requests, "feed", feed)


@mutant
def the_queue_is_turned_round(patch: pytest.MonkeyPatch) -> None:
    def take(self: Queue, registration: Any) -> Any:
        for request in reversed(list(self._waiting)):
            if registration.methods is None or request.method in registration.methods:
                del self._waiting[request]
                return request
        return None

    patch.setattr(Queue, "take", take)


@mutant
def workers_are_not_told_to_stop(patch: pytest.MonkeyPatch) -> None:
    handle = Router.handle

    def deaf(self: Router, event: Any, now: float) -> Any:
        effects = handle(self, event, now)
        effects[:] = [e for e in effects if not (isinstance(e, Deliver) and isinstance(e.message, CancelAttempt))]
        return effects

    patch.setattr(Router, "handle", deaf)


@mutant
def an_end_is_told_twice(patch: pytest.MonkeyPatch) -> None:
    handle = Router.handle

    def twice(self: Router, event: Any, now: float) -> Any:
        effects = handle(self, event, now)
        if isinstance(event, Answered) and effects and isinstance(effects[0], Deliver):
            effects.insert(0, effects[0])
        return effects

    patch.setattr(Router, "handle", twice)


@mutant
def an_end_goes_to_another_session(patch: pytest.MonkeyPatch) -> None:
    handle = Router.handle

    def astray(self: Router, event: Any, now: float) -> Any:
        effects = handle(self, event, now)
        for index, effect in enumerate(effects):
            if isinstance(event, Answered) and isinstance(effect, Deliver) and isinstance(effect.message, End):
                effects[index] = Deliver(event.session, effect.message)
        return effects

    patch.setattr(Router, "handle", astray)


@mutant
def anybody_may_answer(patch: pytest.MonkeyPatch) -> None:
    answered = Requests.answered

    def lax(self: Requests, event: Answered, now: float) -> None:
        for session in self.state.sessions.by_id.values():
            if event.attempt in session.attempts:
                event = Answered(session, event.attempt, event.body, event.error)
        answered(self, event, now)

    patch.setattr(Requests, "answered", lax)


@mutant
def a_place_is_never_free_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Registry, "unload", staticmethod(lambda registration: None))


@mutant
def a_free_place_is_not_used(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Requests, "_free", lambda self, registration, now: self.registry.unload(registration))


@mutant
def any_worker_is_least_pending(patch: pytest.MonkeyPatch) -> None:
    def choose(self: LeastPending, method: str) -> Any:
        for level in reversed(self._levels):
            for registration in level:
                if registration.methods is None or method in registration.methods:
                    return registration
        return None

    patch.setattr(LeastPending, "choose", choose)
    patch.setattr(LeastPending, "take", Policy.take)


@mutant
def methods_are_not_minded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeastPending, "choose", lambda self, method: next((r for level in self._levels for r in level), None))
    patch.setattr(LeastPending, "take", Policy.take)


@mutant
def a_tick_ends_all_at_once(patch: pytest.MonkeyPatch) -> None:
    take_due = Deadlines.take_due
    patch.setattr(Deadlines, "take_due", lambda self, now, limit: take_due(self, now, 10**6))


@mutant
def deadlines_come_early(patch: pytest.MonkeyPatch) -> None:
    add = Deadlines.add
    patch.setattr(Deadlines, "add", lambda self, entry, due_at: add(self, entry, due_at - 0.2))


@mutant
def deadlines_come_late(patch: pytest.MonkeyPatch) -> None:
    add = Deadlines.add
    patch.setattr(Deadlines, "add", lambda self, entry, due_at: add(self, entry, due_at + 0.3))


@mutant
def retries_know_no_end(patch: pytest.MonkeyPatch) -> None:
    def lost(self: Requests, attempt: Any, event: Detached, now: float) -> None:
        self.pending.close_attempt(attempt)
        self.registry.unload(attempt.registration)
        if not self._retry(attempt.request, now):
            outcome = outcome_of(errors.WORKER_LOST, attempt.request, now)
            self._end(attempt.request, outcome, None, now)

    patch.setattr(Requests, "_lost", lost)


@mutant
def the_callers_requests_outlive_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Requests, "stop_all", lambda self, requests, kind, now, **more: None)


@mutant
def numbers_of_broadcasts_have_gaps(patch: pytest.MonkeyPatch) -> None:
    def skip(self: Topic, body: Any) -> Broadcast:
        self.seq += 2
        return Broadcast(self.endpoint.name, self.name, self.seq, body)

    patch.setattr(Topic, "next", skip)


@mutant
def sessions_are_not_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sessions, "close", lambda self, session: None)


@mutant
def the_first_request_of_an_id_is_overwritten(patch: pytest.MonkeyPatch) -> None:
    taken = Requests.asked

    def asked(self: Requests, event: Any, now: float) -> None:
        hidden = event.session.requests.pop(event.wire_id, None)
        taken(self, event, now)
        if hidden is not None:
            event.session.requests.setdefault(event.wire_id, hidden)

    patch.setattr(Requests, "asked", asked)


@mutant
def a_request_stays_among_the_deadlines(patch: pytest.MonkeyPatch) -> None:
    close = Pending.close

    def forgetful(self: Pending, request: Any) -> None:
        request.slot = None
        close(self, request)

    patch.setattr(Pending, "close", forgetful)


@mutant
def nobody_tells_who_waits_for_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Requests, "abandon", lambda self, endpoint, now: None)


@mutant
def who_waits_for_somebody_to_come_is_sent_away_too(patch: pytest.MonkeyPatch) -> None:
    def abandon(self: Requests, endpoint: Any, now: float) -> None:
        for request in [] if endpoint.registrations else list(endpoint.queue):
            self.stop(request, outcome_of(errors.NO_WORKER, request, now, phase="queued"), now)

    patch.setattr(Requests, "abandon", abandon)


@mutant
def retries_stand_in_reverse(patch: pytest.MonkeyPatch) -> None:
    put_first = Queue.put_first
    patch.setattr(Queue, "put_first", lambda self, request: None if request in self else put_first(self, request))


@mutant
def retries_wait_at_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "put_first", Queue.put)


@mutant
def whatever_a_shutdown_ends_may_be_repeated(patch: pytest.MonkeyPatch) -> None:
    def bold(kind: Any, request: Any, now: float, retryable: Any = None, *more: Any, **named: Any) -> Any:
        return outcome_of(kind, request, now, kind is errors.SHUTTING_DOWN or retryable, *more, **named)

    patch.setattr("broker.core.requests.outcome_of", bold)


@mutant
def a_closed_endpoint_goes_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Attaching, "_shut", lambda self, endpoint, now: None)


@mutant
def nobody_is_told_of_a_closed_endpoint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Attaching, "_shut_out", lambda self, session: "")


@mutant
def what_a_worker_holds_is_forgotten_when_it_serves_again(patch: pytest.MonkeyPatch) -> None:
    register = Registry.register

    def afresh(self: Registry, session: Any, endpoint: Any, methods: Any, capacity: int, *more: Any) -> Any:
        held = endpoint.leaving.get(session)
        return register(self, session, endpoint, methods, capacity + (held.load if held else 0), *more)

    patch.setattr(Registry, "register", afresh)


@mutant
def comings_know_no_bound(patch: pytest.MonkeyPatch) -> None:
    announce = Broadcasts.announce

    def loud(self: Broadcasts, *more: Any) -> None:
        limits = self.state.limits
        self.state.limits = msgspec.structs.replace(limits, fanouts_max=10**6)
        announce(self, *more)
        self.state.limits = limits

    patch.setattr(Broadcasts, "announce", loud)


@mutant
def comings_that_are_dropped_are_not_numbered(patch: pytest.MonkeyPatch) -> None:
    announce = Broadcasts.announce

    def quiet(self: Broadcasts, endpoint: Any, *more: Any) -> None:
        refused, topic = self.state.counters.broadcasts_refused, endpoint.topics.get("broker.peers")
        announce(self, endpoint, *more)
        if self.state.counters.broadcasts_refused > refused:
            topic.seq -= 1

    patch.setattr(Broadcasts, "announce", quiet)


@mutant
def listeners_may_speak(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("broker.core.sessions.only_listening", lambda grants: grants)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_router_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    with pytest.raises(Failure):
        for seed in range(160):
            Simulator(seed).run(600)
