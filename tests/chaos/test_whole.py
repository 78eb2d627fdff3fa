"""The whole under a virtual clock, in short; and proof that it notices what is broken, at either end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from broker.core.attaching import Attaching
from broker.core.events import Deliver, Resumed
from broker.core.kept import Kept
from broker.core.keys import Keys
from broker.core.messages import Credit, Part
from broker.core.requests import Requests
from broker.core.streaming import Streaming
from broker.core.streams import Flow
from broker.links.compiled import PURE, core
from broker.peer import kept as peer_kept
from broker.peer.session import Session
from broker.peer.streams import Inflow
from tests.chaos.whole import Whole, plan, run, short, tell


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_every_request_ends_once_whatever_the_network_does(first: int) -> None:
    for seed in range(first, first + 10):
        whole = run(seed)
        assert not whole.faults, tell(whole, whole.items)


def test_the_runs_reach_what_they_are_for() -> None:
    outcomes: Counter[str] = Counter()
    kinds: set[str] = set()
    resumed = parts = joined = 0
    for seed in range(30, 45):
        whole = run(seed)
        assert not whole.faults, tell(whole, whole.items)
        outcomes.update(whole.outcomes)
        kinds.update(entry.kind for entry in whole.ledger.entries.values() if entry.outcome == "ok")
        for router in whole.routers:
            resumed += router.counters.resumed
            parts += router.counters.parts_up + router.counters.parts_down
            joined += router.counters.keys_joined
    assert {"ok", "worker_error", "worker_lost", "deadline", "no_worker", "unknown"} <= set(outcomes)
    assert {"echo", "slow", "retried", "keyed", "stream in", "stream out", "both"} <= kinds
    assert resumed > 5 and parts > 1000 and joined > 5


def test_same_seed_same_trace() -> None:
    assert run(5).digest == run(5).digest
    assert run(5).digest != run(6).digest


def test_the_trace_hangs_on_no_hash_of_the_process() -> None:
    command = [sys.executable, "-m", "tests.chaos.whole", "--seeds", "3", "--digest"]
    digests = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=50
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.skipif(core() != "compiled core", reason="there is no compiled core here")
def test_runs_go_the_same_way_with_the_compiled_core_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(45, 53):
        expected = run(seed).digest
        monkeypatch.setenv(PURE, "1")
        assert run(seed).digest == expected, f"seed {seed}"
        monkeypatch.delenv(PURE)


# ---------------------------------------------------------------- broken on purpose

Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutant] = {}


def mutant(function: Mutant) -> Mutant:
    MUTANTS[function.__name__] = function
    return function


def without(patch: pytest.MonkeyPatch, owner: type, name: str, unwanted: Callable[[Deliver], bool]) -> None:
    """What this method wants to be delivered, without some of it."""
    method = getattr(owner, name)

    def quiet(self: Any, *arguments: Any) -> Any:
        before = len(self.effects)
        result = method(self, *arguments)
        self.effects[before:] = [
            effect for effect in self.effects[before:] if not (isinstance(effect, Deliver) and unwanted(effect))
        ]
        return result

    patch.setattr(owner, name, quiet)


@mutant
def a_part_is_lost_on_its_way(patch: pytest.MonkeyPatch) -> None:
    without(patch, Streaming, "part_sent", lambda effect: isinstance(effect.message, Part) and effect.message.seq == 7)


@mutant
def credit_is_not_passed_on(patch: pytest.MonkeyPatch) -> None:
    without(patch, Streaming, "credit_granted", lambda effect: isinstance(effect.message, Credit))


@mutant
def what_was_kept_is_sent_in_another_order(patch: pytest.MonkeyPatch) -> None:
    since = Kept.since
    patch.setattr(Kept, "since", lambda self, n, now: since(self, n, now)[::-1])


@mutant
def what_was_kept_is_not_sent_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Kept, "since", lambda self, n, now: [])


@mutant
def the_last_that_was_kept_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    since = Kept.since
    patch.setattr(Kept, "since", lambda self, n, now: since(self, n, now)[:-1])


@mutant
def the_broker_counts_one_message_too_many(patch: pytest.MonkeyPatch) -> None:
    begin_again = peer_kept.Kept.begin_again
    patch.setattr(peer_kept.Kept, "begin_again", lambda self, received: begin_again(self, received)[1:])


@mutant
def the_peer_does_not_say_again_what_was_lost(patch: pytest.MonkeyPatch) -> None:
    begin_again = peer_kept.Kept.begin_again

    def silent(self: peer_kept.Kept, received: int) -> list[Any]:
        begin_again(self, received)
        return []

    patch.setattr(peer_kept.Kept, "begin_again", silent)


def everything_kept_is_sent_again(patch: pytest.MonkeyPatch) -> None:
    """Also what the peer says it has got. It should not, and does no harm."""
    resumed = Attaching.resumed

    def again(self: Attaching, event: Resumed, now: float) -> None:
        resumed(self, msgspec.structs.replace(event, received=0), now)

    patch.setattr(Attaching, "resumed", again)


@mutant
def the_peer_handles_a_message_twice(patch: pytest.MonkeyPatch) -> None:
    everything_kept_is_sent_again(patch)
    got = peer_kept.Kept.got
    patch.setattr(peer_kept.Kept, "got", lambda self, number, size: (True, got(self, number, size)[1]))
    accept = Inflow.accept
    patch.setattr(Inflow, "accept", lambda self, seq, *more: accept(self, self._next_seq, *more))


@mutant
def a_repeat_of_a_key_runs_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Keys, "find", lambda self, event: None)
    patch.setattr(Requests, "_repeats", lambda self, *more: False)


@mutant
def a_retry_goes_on_where_the_lost_worker_stood(patch: pytest.MonkeyPatch) -> None:
    from broker.core.streams import Stream

    patch.setattr(Stream, "is_fresh", lambda self, request: True)
    lost = Requests._lost

    def bold(self: Requests, attempt: Any, event: Any, now: float) -> Any:
        options = attempt.request.options
        attempt.request.options = msgspec.structs.replace(options, idempotent=True, retries=5)
        return lost(self, attempt, event, now)

    patch.setattr(Requests, "_lost", bold)


@mutant
def credit_is_not_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flow, "grant", lambda self, upto, ahead_max: False)


@mutant
def calls_that_may_have_run_are_asked_again(patch: pytest.MonkeyPatch) -> None:
    again = Session._ask_again

    def bold(self: Session, call: Any) -> bool:
        call.reached = False
        return again(self, call)

    patch.setattr(Session, "_ask_again", bold)


@mutant
def calls_end_with_their_link(patch: pytest.MonkeyPatch) -> None:
    detached = Session.detached

    def faint(self: Session, flushed: int, why: str, **more: Any) -> Any:
        return detached(self, flushed, why, **(more | {"resumable": False}))

    patch.setattr(Session, "detached", faint)


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_broken_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    assert any(run(seed).faults for seed in range(100)), "nobody noticed"


def test_fault_16_messages_that_come_twice_are_handled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    everything_kept_is_sent_again(monkeypatch)
    for seed in range(20):
        whole = run(seed)
        assert not whole.faults, tell(whole, whole.items)


def test_a_failing_seed_is_made_short_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    a_part_is_lost_on_its_way(monkeypatch)
    seed = next(seed for seed in range(100) if run(seed).faults)
    items, whole = short(seed, tries_max=60)
    assert len(items) <= 3 < len(plan(seed))
    assert any(item.kind in ("streamed", "left_early", "sent", "both") for item in items)
    text = tell(whole, items)
    assert text.startswith(f"seed {seed}, {len(items)} of its plan are left:")
    assert "FAULT" in text and "begins" in text
    assert isinstance(whole, Whole)
