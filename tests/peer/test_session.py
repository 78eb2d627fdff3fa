"""The SDK's session without any I/O: what it writes, what it understands, and that every call ends once."""

import json
from typing import Any

import pytest

from broker.peer.errors import (
    BadReply,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    InvalidRequest,
    RemoteError,
    TooLarge,
    WorkerLost,
)
from broker.peer.session import (
    GUARD_S,
    MESSAGE_MAX_BYTES,
    SLOT_S,
    Asked,
    CancelAsked,
    Ended,
    Heard,
    Options,
    Session,
    split_method,
)
from broker.wire.attachments import pack, unpack
from tests.peer.machine import Wire, ask, asked_for, linked, reply, told


def test_a_call_is_written_and_its_result_comes_back() -> None:
    session, wire = linked()
    call = ask(session, params=b'{"path":"a"}', timeout=5.0)
    assert wire.pump() == [
        {"jsonrpc": "2.0", "id": call.id, "method": "data/read", "params": {"path": "a"}, "meta": {"timeout": 5.0}}
    ]
    ended = reply(session, call, result=[1])
    assert ended == Ended(call, [1])
    assert not session.pending
    assert reply(session, call, result=[1]) is None, "a second answer is nothing"


def test_options_travel_and_time_spent_waiting_is_taken_off() -> None:
    session, wire = linked()
    ask(session, timeout=5.0, idempotent=True, retries=2, wait=True, trace="t")
    assert wire.pump(now=1.5)[0]["meta"] == {
        "timeout": 3.5, "idempotent": True, "retries": 2, "wait": True, "trace": "t",
    }  # fmt: skip
    ask(session)
    assert "meta" not in wire.pump()[0] or wire.sent[-1]["meta"] == {}


def test_ids_are_never_used_twice() -> None:
    session, wire = linked()
    seen: set[int] = set()
    for _ in range(3):
        for _ in range(3):
            ask(session)
        seen.update(message["id"] for message in wire.pump())
        session.detached(wire.enqueued, "broke", come_back=True)
        session.attached(0.0)
    assert len(seen) == 9


@pytest.mark.parametrize(
    "name", ["", "read", "a/b/c", "/read", "data/", "data/re ad", ".data/x", "data/read\n", "a" * 129 + "/x", "däta/x"]
)
def test_a_name_that_is_none_is_refused_here(name: str) -> None:
    session, wire = linked()
    with pytest.raises(InvalidRequest, match="endpoint/method"):
        ask(session, name)
    assert not wire.pump()
    assert not session.pending


def test_the_brokers_own_methods_need_no_endpoint() -> None:
    assert split_method("broker.ping") == ("", "broker.ping", b"broker.ping")
    assert split_method("data/read") == ("data", "read", b"data/read")


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0.0}, {"timeout": -1.0}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"retries": 1}],
)
def test_options_that_cannot_be_are_refused_here(options: dict[str, Any]) -> None:
    session, _ = linked()
    with pytest.raises(InvalidRequest):
        ask(session, **options)
    assert not session.pending


def test_a_message_above_the_bound_is_refused_here() -> None:
    session, _ = linked()
    with pytest.raises(TooLarge, match="above the bound"):
        session.notify("data/read", b" " * (MESSAGE_MAX_BYTES + 1), ())
    with pytest.raises(TooLarge, match="above the bound"):
        ask(session, "broker.publish", params=b" " * (MESSAGE_MAX_BYTES + 1))
    with pytest.raises(TooLarge, match="above the bound"):
        ask(session, params=b" " * (MESSAGE_MAX_BYTES + 1), key="k")
    assert not session.pending


def test_attachments_go_and_come_in_binary_frames() -> None:
    session, _ = linked()
    call = session.ask("data/read", b'[{"$buffer":0}]', [b"abc"], Options(), None, 0.0)
    frame = session.take(0.0)
    assert frame is not None
    assert frame.binary
    text, attachments = unpack(b"".join(frame.pieces))
    assert json.loads(text)["params"] == [{"$buffer": 0}]
    assert [bytes(attachment) for attachment in attachments] == [b"abc"]
    text = b'{"jsonrpc":"2.0","id":%d,"result":{"image":{"$buffer":0}}}' % call.id
    ended = told(session, b"".join(pack([text], [b"xyz"])), True)
    assert ended == Ended(call, {"image": b"xyz"})


def test_an_error_becomes_its_exception_with_what_is_known() -> None:
    session, wire = linked()
    call = ask(session)
    wire.pump()
    data = {"outcome": "worker_lost", "detail": "gone", "attempts": 2}
    ended = reply(
        session, call, now=0.5, error={"code": -32002, "message": "lost", "data": data}, meta={"worker": "n-7"}
    )
    assert isinstance(ended.error, WorkerLost)
    assert (ended.error.worker, ended.error.attempts, ended.error.elapsed_s) == ("n-7", 2, 0.5)


@pytest.mark.parametrize(
    "error",
    [5, {}, {"code": "x", "message": "m"}, {"code": 1}, None],
    ids=["number", "empty", "code", "message", "null"],
)
def test_an_error_that_is_none_is_a_bad_reply(error: object) -> None:
    session, wire = linked()
    call = ask(session)
    wire.pump()
    assert isinstance(reply(session, call, error=error).error, BadReply)


def test_a_result_that_refers_to_nothing_is_a_bad_reply() -> None:
    session, wire = linked()
    call = ask(session)
    wire.pump()
    text = b'{"jsonrpc":"2.0","id":%d,"result":{"$buffer":3}}' % call.id
    ended = told(session, b"".join(pack([text], [b"x"])), True)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, BadReply)
    assert not session.pending


@pytest.mark.parametrize("payload", [b"", b"{", b"5", b"[]", b'{"jsonrpc":"1.0"}', b"{" * 100_000])
def test_what_is_no_message_is_told(payload: bytes) -> None:
    session, _ = linked()
    with pytest.raises(ValueError, match="JSON-RPC"):
        told(session, payload)
    with pytest.raises(ValueError, match="damaged"):
        told(session, b"\0\0\0", True)


@pytest.mark.parametrize("message", [{"id": 999, "result": 1}, {"id": "x", "result": 1}, {"id": None, "error": {}}])
def test_an_answer_to_nothing_is_nothing(message: dict[str, Any]) -> None:
    session, _ = linked()
    assert told(session, json.dumps({"jsonrpc": "2.0"} | message).encode()) is None


# ---------------------------------------------------------------- time


def test_a_call_ends_here_a_little_after_its_deadline_if_nothing_is_heard() -> None:
    session, wire = linked()
    call = ask(session, timeout=2.0)
    wire.pump()
    assert session.next_deadline() >= 2.0 + GUARD_S
    assert session.expire(2.0 + GUARD_S - 0.001) == []
    (ended,) = session.expire(2.0 + GUARD_S + SLOT_S)
    assert isinstance(ended, Ended)
    assert ended.call is call
    assert isinstance(ended.error, DeadlineExceeded)
    assert wire.pump()[0]["method"] == "$/cancelRequest", "the broker is told, should it still have it"
    assert session.expire(100.0) == []


def test_without_a_link_a_call_waits_for_one_until_its_deadline() -> None:
    session = Session()
    wire = Wire(session)
    late, early = ask(session, timeout=9.0), ask(session, timeout=2.0)
    (ended,) = session.expire(2.0 + GUARD_S + SLOT_S)
    assert isinstance(ended, Ended)
    assert ended.call is early
    assert isinstance(ended.error, ConnectionLost)
    assert not ended.error.may_have_executed
    session.attached(4.0)
    assert [message["id"] for message in wire.pump(now=4.0)] == [late.id]
    assert wire.sent[0]["meta"] == {"timeout": 5.0}


def test_a_call_whose_time_is_up_is_not_sent_any_more() -> None:
    session = Session()
    ask(session, timeout=2.0)
    session.attached(2.5)
    assert not Wire(session).pump(now=2.5)
    (ended,) = session.expire(9.0)
    assert isinstance(ended, Ended)


# ---------------------------------------------------------------- cancelling


def test_cancelling_ends_at_once_and_tells_the_broker() -> None:
    session, wire = linked()
    call = ask(session, timeout=5.0)
    wire.pump()
    ended = session.cancel(call)
    assert ended is not None
    assert isinstance(ended.error, Cancelled)
    assert wire.pump() == [{"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": call.id}}]
    assert session.cancel(call) is None
    assert reply(session, call, result=1) is None
    assert session.expire(100.0) == []


def test_what_was_never_sent_is_cancelled_without_a_word() -> None:
    session = Session()
    call = ask(session)
    assert session.cancel(call) is not None
    session.attached(0.0)
    assert Wire(session).pump() == []


# ---------------------------------------------------------------- links that break


def test_a_broken_link_ends_what_was_written_and_keeps_what_was_not() -> None:
    session, wire = linked()
    written = ask(session)
    wire.pump()
    flushed = wire.enqueued
    unwritten = ask(session)
    wire.pump()
    waiting = ask(session)
    results = session.detached(flushed, "broke", come_back=True)
    assert [(r.call, type(r.error), r.error.may_have_executed) for r in results] == [  # type: ignore[union-attr]
        (written, ConnectionLost, True)
    ]
    session.attached(1.0)
    assert [message["id"] for message in wire.pump()] == [unwritten.id, waiting.id]


def test_an_idempotent_call_is_sent_again_once() -> None:
    session, wire = linked()
    call = ask(session, idempotent=True)
    wire.pump()
    assert session.detached(wire.enqueued, "broke", come_back=True) == []
    session.attached(1.0)
    assert [message["id"] for message in wire.pump()] == [call.id]
    (ended,) = session.detached(wire.enqueued, "broke", come_back=True)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, ConnectionLost)
    assert ended.error.may_have_executed
    assert not session.pending


def test_the_last_link_ends_everything() -> None:
    session, wire = linked()
    calls = [ask(session, idempotent=True), ask(session)]
    wire.pump()
    calls.append(ask(session))
    results = session.detached(wire.enqueued, "broke", come_back=False)
    assert [r.call for r in results] == calls  # type: ignore[union-attr]
    assert [r.error.may_have_executed for r in results] == [True, True, False]  # type: ignore[union-attr]
    assert not session.pending
    assert not session.outbox


def test_what_stands_is_said_first_on_every_new_link() -> None:
    session, wire = linked()
    session.stand(("serve", "data"), "broker.serve", b'{"endpoint":"data"}')
    session.detached(0, "broke", come_back=True)
    call = ask(session)
    session.attached(1.0)
    standing, asked = wire.pump()
    assert standing["method"] == "broker.serve"
    assert asked["id"] == call.id
    denied = {"jsonrpc": "2.0", "id": standing["id"], "error": {"code": -32006, "message": "denied"}}
    ended = told(session, json.dumps(denied).encode())
    assert isinstance(ended, Ended)
    assert ended.call.standing
    assert ended.error is not None
    assert session.unstand(("serve", "data"))
    assert not session.unstand(("serve", "data"))
    session.detached(0, "broke", come_back=True)
    session.attached(2.0)
    assert [message["method"] for message in wire.pump()] == ["data/read"]


def test_notify_without_a_link_says_so() -> None:
    session = Session()
    with pytest.raises(ConnectionLost):
        session.notify("data/read", b"", ())
    session.attached(0.0)
    session.notify("data/read", b"[1]", ())
    assert Wire(session).pump() == [{"jsonrpc": "2.0", "method": "data/read", "params": [1]}]


# ---------------------------------------------------------------- being asked


def test_a_request_is_answered_once() -> None:
    session, wire = linked()
    asked = asked_for(session, params=[1], meta={"timeout": 3, "trace": "t", "news": 1})
    assert isinstance(asked, Asked)
    assert (asked.endpoint, asked.method, asked.timeout, asked.trace) == ("data", "read", 3, "t")
    assert session.answer("n-1-1", b"[2]")
    assert not session.answer("n-1-1", b"[2]")
    assert not session.fail("n-1-1", 1, "no")
    assert wire.pump() == [{"jsonrpc": "2.0", "id": "n-1-1", "result": [2]}]


def test_a_failure_is_written_whole() -> None:
    session, wire = linked()
    asked_for(session)
    assert session.fail("n-1-1", -32000, "bad", {"type": "ValueError"}, retryable=True)
    assert wire.pump() == [
        {
            "jsonrpc": "2.0", "id": "n-1-1",
            "error": {"code": -32000, "message": "bad", "data": {"type": "ValueError"}},
            "meta": {"retryable": True},
        }
    ]  # fmt: skip


def test_a_result_above_the_bound_becomes_an_error() -> None:
    session, wire = linked()
    session.value_max_bytes = MESSAGE_MAX_BYTES - 1
    asked_for(session)
    assert not session.answer("n-1-1", b"[]", [b" " * MESSAGE_MAX_BYTES])
    (message,) = wire.pump()
    assert "above the bound" in message["error"]["message"]
    assert session.attempts == 0


def test_a_cancelled_request_needs_no_answer() -> None:
    session, wire = linked()
    asked_for(session)
    cancel = b'{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":"n-1-1"}}'
    assert told(session, cancel) == CancelAsked("n-1-1")
    assert told(session, cancel) is None
    assert not session.answer("n-1-1", b"1")
    assert not wire.pump()


def test_requests_end_with_the_link_they_came_by() -> None:
    session, wire = linked()
    asked_for(session)
    assert session.detached(0, "broke", come_back=True) == [CancelAsked("n-1-1")]
    session.attached(1.0)
    assert not session.answer("n-1-1", b"1")
    assert not wire.pump()


def test_a_broadcast_is_heard() -> None:
    session, _ = linked()
    message = {"jsonrpc": "2.0", "method": "broker.message", "params": {"endpoint": "data", "seq": 4, "data": [1]}}
    assert told(session, json.dumps(message).encode()) == Heard("data", None, 4, [1])
    nothing = b'{"jsonrpc":"2.0","method":"broker.message","params":5}'
    assert told(session, nothing) is None


def test_what_a_worker_says_of_its_own_failure_stays_its_own() -> None:
    session, wire = linked()
    call = ask(session)
    wire.pump()
    error = {"code": -32602, "message": "Invalid params", "data": {"outcome": "denied"}}
    assert isinstance(reply(session, call, error=error, meta={"worker": "n-1"}).error, RemoteError)
