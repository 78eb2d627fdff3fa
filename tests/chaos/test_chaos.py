"""A minute of chaos, and proof that the books would show what went wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from broker.peer.errors import ConnectionLost, DeadlineExceeded, NoWorker
from tests.chaos.ledger import UNKNOWN, Ledger, executions, fingerprint
from tests.chaos.run import Chaos, default_seed

SECONDS = 60.0


@pytest.mark.timeout(240)
def test_a_minute_of_chaos(tmp_path: Path) -> None:
    """The troubles and the questions are another draw each time; the seed is printed with what went wrong."""
    said: list[str] = []
    chaos = Chaos(default_seed(), SECONDS, tmp_path, said.append)
    assert chaos.run(), "\n".join(said)
    assert len(chaos.ledger.entries) > 500, "\n".join(said)
    assert {"ok", "worker_error", "worker_lost", "deadline", "cancelled", UNKNOWN} <= set(chaos.outcomes)
    assert len(chaos.troubles) >= 6


# ---------------------------------------------------------------- the books would show it


def journal(folder: Path, *tags: str) -> None:
    (folder / "w.1.journal").write_text("".join(f"{tag}\n" for tag in tags))


def test_good_books_have_no_fault(tmp_path: Path) -> None:
    ledger = Ledger()
    entry = ledger.open("a", "c", "echo", 5.0)
    assert ledger.matches(entry, {"print": fingerprint("a", b"x")}, b"x")
    ledger.end(entry, "ok")
    again = ledger.open("b", "c", "echo", 5.0, idempotent=True)
    ledger.end(again, "ok")
    journal(tmp_path, "a", "b", "b")
    assert ledger.judge(executions(tmp_path), 1.0) == {"ok": 2}
    assert not ledger.faults


def test_an_end_that_comes_twice_is_found() -> None:
    ledger = Ledger()
    entry = ledger.open("a", "c", "echo", 5.0)
    ledger.end(entry, "deadline")
    ledger.end(entry, "ok")
    assert "ended twice: deadline, then ok" in ledger.faults[0]


def test_an_end_that_never_comes_is_found(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.open("a", "c", "echo", 5.0)
    assert ledger.judge(executions(tmp_path), 1.0) == {"open": 1}
    assert "has not ended" in ledger.faults[0]


def test_an_end_that_comes_too_late_is_found(tmp_path: Path) -> None:
    ledger = Ledger()
    entry = ledger.open("a", "c", "echo", -10.0)
    ledger.end(entry, "deadline")
    ledger.judge(executions(tmp_path), 1.0)
    assert "after its deadline" in ledger.faults[0]


def test_the_answer_of_another_is_found_and_the_events_around_it_are_told() -> None:
    ledger = Ledger()
    entry = ledger.open("a", "c", "echo", 5.0)
    ledger.happened("worker1: SIGKILL")
    entry.say("sent again")
    assert not ledger.matches(entry, {"print": fingerprint("b", b"x")}, b"x")
    assert all(text in ledger.faults[0] for text in ("another", "worker1: SIGKILL", "sent again", "asked by c"))


@pytest.mark.parametrize(
    ("outcome", "idempotent", "ran", "fault"),
    [
        ("ok", False, 2, "was executed 2 times"),
        ("ok", True, 2, ""),
        ("ok", False, 0, "no worker did it"),
        ("worker_lost", False, 1, ""),
        ("worker_lost", False, 0, ""),
    ],
)
def test_what_workers_did_too_often_or_not_at_all_is_found(
    tmp_path: Path, outcome: str, idempotent: bool, ran: int, fault: str
) -> None:
    ledger = Ledger()
    entry = ledger.open("a", "c", "echo", 5.0, idempotent=idempotent)
    ledger.end(entry, outcome)
    journal(tmp_path, *["a"] * ran)
    ledger.judge(executions(tmp_path), 1.0)
    assert bool(ledger.faults) == bool(fault)
    assert not fault or fault in ledger.faults[0]


@pytest.mark.parametrize(
    ("error", "outcome", "found"),
    [
        (ConnectionLost("it broke", may_have_executed=False), UNKNOWN, True),
        (ConnectionLost("it broke", may_have_executed=True), UNKNOWN, False),
        (NoWorker("gone", code=-32001, dispatched=False), "no_worker", True),
        (DeadlineExceeded("late", code=-32003, dispatched=True), "deadline", False),
        (DeadlineExceeded("the broker said nothing"), UNKNOWN, False),
    ],
)
def test_what_is_said_never_to_have_run_must_not_have_run(
    tmp_path: Path, error: ConnectionLost, outcome: str, found: bool
) -> None:
    ledger = Ledger()
    entry = ledger.open("a", "c", "echo", 5.0)
    ledger.raised(entry, error)
    journal(tmp_path, "a")
    assert ledger.judge(executions(tmp_path), 1.0) == {outcome: 1}
    assert bool(ledger.faults) == found
    assert entry.ended_at <= time.monotonic()
