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
from broker.core.dispatch import LeastPending, Policy, Sticky
from broker.core.events import Answered, Deliver, Detached
from broker.core.kept import Kept
from broker.core.messages import Broadcast, CancelAttempt, End, Part, Progress
from broker.core.pending import Pending
from broker.core.queue import Queue, Turns
from broker.core.registry import Registry
from broker.core.requests import Requests, outcome_of
from broker.core.router import Router
from broker.core.sessions import Sessions
from broker.core.streaming import Streaming
from broker.core.streams import Flow, Stream, tell_worker
from broker.core.topics import Topic
from tests.core.simulator import KEPT_LINES, Failure, Simulator, shorten


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_the_promise_holds_whatever_happens(first: int) -> None:
    for seed in range(first, first + 10):
        Simulator(seed).run(1000)


def test_the_runs_reach_every_outcome_of_the_core() -> None:
    reached: dict[str, int] = {}
    counted = dict.fromkeys(
        (
            "retries",
            "cancels",
            "late_replies",
            "foreign_replies",
            "nameless_replies",
            "strikes",
            "notifications",
            "suspended",
            "resumed",
            "acks_ignored",
            "parts_up",
            "parts_down",
            "parts_dropped",
            "streams_broken",
            "progress",
            "progress_dropped",
        ),
        0,
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
            request = queue.take(registration, -1.0)
            if request is None:
                return
            registration.endpoint.free.load(registration)
            self._assign(request, registration, now)

    patch.setattr(Requests, "feed", feed)


@mutant
def the_queue_is_turned_round(patch: pytest.MonkeyPatch) -> None:
    def take(self: Queue, registration: Any, now: float) -> Any:
        for request in reversed(list(self)):
            if registration.methods is None or request.method in registration.methods:
                self.discard(request)
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
    patch.setattr(Queue, "put_first", lambda self, request, line: request in self or put_first(self, request, line))


@mutant
def retries_wait_at_the_end(patch: pytest.MonkeyPatch) -> None:
    def put_last(self: Queue, request: Any, line: Any) -> None:
        self.discard(request)
        self.put(request, line)

    patch.setattr(Queue, "put_first", put_last)


@mutant
def callers_take_no_turns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Turns, "turn", lambda self, who: None)


@mutant
def lower_priorities_go_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "_lanes_in_turn", lambda self: self._order[::-1])


@mutant
def groups_are_bound_to_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sticky, "target", lambda self, method, group: None)


@mutant
def who_has_most_of_a_queue_keeps_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "displaced", lambda self, principal: None)


@mutant
def room_is_made_by_the_oldest(patch: pytest.MonkeyPatch) -> None:
    def displaced(self: Queue, principal: str) -> Any:
        newest = self._shares.newest_of_largest(principal)
        return newest and next(request for request in self if request.session.principal == newest.session.principal)

    patch.setattr(Queue, "displaced", displaced)


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


@mutant
def a_part_is_passed_on_twice(patch: pytest.MonkeyPatch) -> None:
    from_worker = Streaming._from_worker

    def twice(self: Streaming, *more: Any) -> None:
        from_worker(self, *more)
        if self.effects and isinstance(self.effects[-1], Deliver) and isinstance(self.effects[-1].message, Part):
            self.effects.append(self.effects[-1])

    patch.setattr(Streaming, "_from_worker", twice)


@mutant
def a_part_is_lost(patch: pytest.MonkeyPatch) -> None:
    part_sent = Streaming.part_sent

    def forgetful(self: Streaming, event: Any, now: float) -> None:
        part_sent(self, event, now)
        if event.seq == 2 and self.effects and isinstance(self.effects[-1].message, Part):  # type: ignore[union-attr]
            self.effects.pop()

    patch.setattr(Streaming, "part_sent", forgetful)


@mutant
def early_parts_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    def begin(request: Any, attempt: Any, effects: Any) -> None:
        request.stream.early.clear()
        tell_worker(request, effects)

    patch.setattr("broker.core.requests.begin", begin)


@mutant
def gaps_and_too_many_parts_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flow, "fault", lambda self, seq, size, size_max: "")


@mutant
def parts_beyond_the_credit_pass(patch: pytest.MonkeyPatch) -> None:
    fault = Flow.fault

    def lax(self: Flow, seq: int, size: int, size_max: int) -> str:
        told, self.told = self.told, 1000
        try:
            return fault(self, seq, size, size_max)
        finally:
            self.told = told

    patch.setattr(Flow, "fault", lax)


@mutant
def parts_of_any_size_pass(patch: pytest.MonkeyPatch) -> None:
    fault = Flow.fault
    patch.setattr(Flow, "fault", lambda self, seq, size, size_max: fault(self, seq, 0, size_max))


@mutant
def credit_in_millions_is_believed(patch: pytest.MonkeyPatch) -> None:
    grant = Flow.grant
    patch.setattr(Flow, "grant", lambda self, upto, ahead_max: grant(self, upto, 10**7))


@mutant
def credit_is_not_passed_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("broker.core.streaming.tell_worker", lambda request, effects: None)


@mutant
def credit_goes_to_who_does_not_read(patch: pytest.MonkeyPatch) -> None:
    """The worker is told though its caller is crowded: nothing wrong but that it fills an outbox. Told late, it is."""
    patch.setattr(Streaming, "reads_again", lambda self, session: None)


@mutant
def parts_after_the_end_pass(patch: pytest.MonkeyPatch) -> None:
    take = Flow.take
    patch.setattr(Flow, "take", lambda self, size, last: take(self, size, False))


@mutant
def a_stream_may_stand_still(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "due", lambda self, request: request.deadline)


@mutant
def a_stream_that_moves_is_called_idle(patch: pytest.MonkeyPatch) -> None:
    def took(self: Streaming, request: Any, stream: Any, now: float) -> None:
        if stream.first_part_at is None:
            stream.first_part_at = now
            self.requests.let_flow(request, stream)

    patch.setattr(Streaming, "_took", took)


@mutant
def what_has_flowed_is_tried_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "is_fresh", lambda self, request: True)


@mutant
def what_a_lost_worker_sent_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "begin_anew", lambda self: None)


@mutant
def parts_make_no_reply(patch: pytest.MonkeyPatch) -> None:
    answered = Requests.answered

    def plain(self: Requests, event: Answered, now: float) -> None:
        join, self.state.join = self.state.join, lambda parts, more, result: result
        answered(self, event, now)
        self.state.join = join

    patch.setattr(Requests, "answered", plain)


@mutant
def parts_of_any_worker_count(patch: pytest.MonkeyPatch) -> None:
    part_sent = Streaming.part_sent

    def lax(self: Streaming, event: Any, now: float) -> None:
        for session in self.state.sessions.by_id.values():
            if event.wire_id is None and event.attempt in session.attempts:
                event = msgspec.structs.replace(event, session=session)
        part_sent(self, event, now)

    patch.setattr(Streaming, "part_sent", lax)


@mutant
def progress_is_told_to_who_did_not_ask(patch: pytest.MonkeyPatch) -> None:
    progressed = Streaming.progressed

    def chatty(self: Streaming, event: Any, now: float) -> None:
        attempt = event.session.attempts.get(event.attempt)
        if attempt is not None and attempt.request.options.progress is None:
            self.effects.append(Deliver(attempt.request.session, Progress(attempt.request.wire_id, b"", event.body)))
        else:
            progressed(self, event, now)

    patch.setattr(Streaming, "progressed", chatty)


@mutant
def an_old_link_ends_the_session_of_a_new_one(patch: pytest.MonkeyPatch) -> None:
    detached = Attaching.detached

    def any_link(self: Attaching, event: Detached, now: float) -> None:
        kept = event.session.kept
        detached(self, event if kept is None else msgspec.structs.replace(event, link=kept.link), now)

    patch.setattr(Attaching, "detached", any_link)


@mutant
def what_is_kept_is_sent_in_another_order(patch: pytest.MonkeyPatch) -> None:
    since = Kept.since
    patch.setattr(Kept, "since", lambda self, n, now: since(self, n, now)[::-1])


@mutant
def what_was_heard_is_sent_again(patch: pytest.MonkeyPatch) -> None:
    resumed = Attaching.resumed

    def again(self: Attaching, event: Any, now: float) -> None:
        resumed(self, msgspec.structs.replace(event, received=0), now)

    patch.setattr(Attaching, "resumed", again)


@mutant
def acknowledgements_of_what_was_never_sent_are_believed(patch: pytest.MonkeyPatch) -> None:
    def acked(self: Kept, n: int) -> bool:
        while self._messages and next(iter(self._messages)) <= n + 1:
            self._bytes -= self._messages.pop(next(iter(self._messages)))[1]
        return True

    patch.setattr(Kept, "acked", acked)


@mutant
def a_session_outlives_its_grace(patch: pytest.MonkeyPatch) -> None:
    suspend = Sessions.suspend
    patch.setattr(Sessions, "suspend", lambda self, session, how, until: suspend(self, session, how, until + 1.0))


@mutant
def who_is_away_is_given_work(patch: pytest.MonkeyPatch) -> None:
    suspend = Attaching._suspend

    def eager(self: Attaching, event: Detached, now: float) -> None:
        suspend(self, event, now)
        event.session.congested = False
        for registration in event.session.registrations.values():
            self.registry.refresh(registration)

    patch.setattr(Attaching, "_suspend", eager)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_router_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    with pytest.raises(Failure):
        for seed in range(160):
            Simulator(seed).run(600)


@pytest.mark.parametrize("calm", [False, True])
def test_a_failing_seed_is_made_short(monkeypatch: pytest.MonkeyPatch, calm: bool) -> None:
    a_part_is_passed_on_twice(monkeypatch)
    seed = next(seed for seed in range(160) if fails(seed, calm))
    ideas, failure = shorten(seed, 600, tries_max=200, calm=calm)
    assert len(ideas) <= 12
    assert "got part" in str(failure)
    with pytest.raises(Failure, match=str(failure).splitlines()[0][:20]):
        Simulator(seed, only=ideas, calm=calm).run(600)


def fails(seed: int, calm: bool) -> bool:
    try:
        Simulator(seed, calm=calm).run(600)
    except Failure:
        return True
    return False
