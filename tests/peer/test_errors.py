"""Errors: one class per outcome, told apart as the protocol says, in one line that says what to do."""

import pytest

from broker.core.errors import KINDS, Kind
from broker.peer import errors
from broker.peer.errors import CLASSES, ConnectionLost, DeadlineExceeded, NoMethod, Overloaded, RemoteError, from_reply


def reply(code: int, data: object = None, *, worker: str | None = None) -> errors.BrokerError:
    return from_reply(
        code, "text", data, endpoint="data", method="read", worker=worker, attempts=1, retryable=False, elapsed_s=0.25
    )


def test_every_outcome_but_ok_has_its_class() -> None:
    assert set(CLASSES) == {kind.name for kind in KINDS} - {"ok"}
    assert len(set(CLASSES.values())) == len(CLASSES)
    for name, kind in CLASSES.items():
        assert kind.outcome == name


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name not in ("ok", "worker_error")], ids=lambda k: k.name
)
def test_the_brokers_own_errors_become_their_class(kind: Kind) -> None:
    error = reply(kind.code, {"outcome": kind.name, "detail": "why", "dispatched": True, "attempts": 2})
    assert type(error) is CLASSES[kind.name]
    assert (error.endpoint, error.method, error.attempts, error.dispatched) == ("data", "read", 2, True)
    assert "data/read" in str(error)
    assert "why" in str(error)
    assert "\n" not in str(error)


def test_without_an_outcome_the_code_decides() -> None:
    assert type(reply(-32003)) is DeadlineExceeded
    assert type(reply(-32601)) is NoMethod
    assert type(reply(-32600)) is errors.InvalidRequest


@pytest.mark.parametrize("code", [-32000, -32603, 0, 7, -32050])
def test_other_codes_are_the_workers_own(code: int) -> None:
    error = reply(code, {"type": "ValueError", "outcome": "deadline"}, worker="n-1")
    assert isinstance(error, RemoteError)
    assert (error.type, error.code, error.worker) == ("ValueError", code, "n-1")
    assert str(error).startswith("data/read: worker_error: ValueError: text (worker n-1, after 250 ms)")


@pytest.mark.parametrize("code", [-32601, -32602, -32600])
def test_a_worker_cannot_pass_for_the_broker(code: int) -> None:
    forged = {"outcome": "no_method", "detail": "forged"}
    assert type(reply(code, forged, worker="n-1")) is RemoteError
    assert type(reply(code, forged)) is not RemoteError


def test_facts_of_single_outcomes() -> None:
    late = reply(-32003, {"outcome": "deadline", "phase": "queued", "retryable": True})
    assert isinstance(late, DeadlineExceeded)
    assert isinstance(late, TimeoutError)
    assert (late.phase, late.retryable) == ("queued", True)
    full = reply(-32004, {"outcome": "overloaded", "bound": "queue", "retry_after_ms": 100})
    assert isinstance(full, Overloaded)
    assert (full.bound, full.retry_after_s) == ("queue", 0.1)


@pytest.mark.parametrize("data", [None, 5, "text", [], {"outcome": 5}, {"outcome": "nonsense"}, {"attempts": "x"}])
def test_any_data_is_survived(data: object) -> None:
    for code in (-32000, -32003, -32601, -32602, -32004):
        assert str(reply(code, data))


def test_a_lost_connection_says_whether_it_may_have_run() -> None:
    lost = ConnectionLost("it broke", may_have_executed=True, endpoint="data", method="read")
    assert "It may have run" in str(lost)
    assert not lost.retryable
    assert ConnectionLost("it broke", endpoint="data", method="read").retryable


def test_the_advice_comes_after_one_full_stop() -> None:
    assert str(ConnectionLost("it said no.", method="m", may_have_executed=True)).count("no. It may have run") == 1


def test_who_has_the_traceback_is_not_sent_to_the_log() -> None:
    here = reply(-32000, {"type": "E", "traceback": ["1/0"]}, worker="n-1")
    assert "log" not in str(here)
    assert "log" in str(reply(-32000, {"type": "E", "traceback": []}, worker="n-1"))


def test_what_a_worker_had_when_the_broker_stopped_may_have_run() -> None:
    lost = reply(-32007, {"outcome": "shutting_down", "dispatched": True, "retryable": False})
    assert str(lost).endswith("It may have run; look before you repeat it.")
    for told in ({"dispatched": False, "retryable": True}, {"dispatched": True, "retryable": True}):
        assert str(reply(-32007, {"outcome": "shutting_down"} | told)).endswith("in a moment and repeat.")


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("caller", "by its caller"), ("superseded", "superseded by a newer request"), ("admin", "by an administrator"),
        ("", "text"), ("other", "text"),
    ],
)  # fmt: skip
def test_what_was_cancelled_says_by_whom(cause: str, said: str) -> None:
    error = reply(-32005, {"outcome": "cancelled", "cause": cause})
    assert isinstance(error, errors.Cancelled) and error.cause == cause
    assert str(error).startswith(f"data/read: cancelled: {said} (")


def test_denied_says_which_role_would_do() -> None:
    denied = from_reply(
        -32006, "text", {"outcome": "denied"}, endpoint="", method="broker.admin.peers", worker=None, attempts=0,
        retryable=False, elapsed_s=0,
    )  # fmt: skip
    assert str(denied).endswith("a token with the role admin.")
    assert str(reply(-32006)).endswith("a token with the role at this endpoint.")
