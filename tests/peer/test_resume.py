"""A session with grace without any I/O: what it waits for, what it sends again, and what becomes of what was lost."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from broker.peer.errors import ConnectionLost
from broker.peer.kept import ACK_EVERY, STALLS_MAX
from broker.peer.session import (
    GUARD_S,
    SENT_MAX,
    Asked,
    CancelAsked,
    Ended,
    Heard,
    Item,
    Options,
    Result,
    Session,
)
from broker.wire.attachments import pack
from tests.peer.machine import Wire, ask, asked_for, credit, linked, part, say


def greet(session: Session, *, resumed: bool = False, received: int = 0, name: str = "n-1") -> list[Result]:
    """The broker's first word on a link."""
    stands = {"id": name, "secret": "s3cret", "grace": 30, "resumed": resumed, "received": received, "cut": 0}
    return list(say(session, "broker.session", **stands))


def graced() -> tuple[Session, Wire]:
    session = Session(30.0)
    session.attached(0.0)
    assert greet(session) == []
    return session, Wire(session)


def lose(session: Session, wire: Wire, *, flushed: int | None = None, **how: Any) -> list[Result]:
    """The link breaks."""
    results = session.detached(wire.enqueued if flushed is None else flushed, "broke", **({"come_back": True} | how))
    wire.enqueued = 0
    return results


def come_back(session: Session, received: int, *, resumed: bool = True) -> list[Result]:
    session.attached(1.0)
    return greet(session, resumed=resumed, received=received, name="n-1" if resumed else "n-2")


def answer(session: Session, number: int, n: int, result: Any = 1) -> Sequence[Result]:
    """A reply, numbered."""
    message = {"jsonrpc": "2.0", "id": number, "result": result, "meta": {"n": n}}
    return session.receive(json.dumps(message).encode(), False, 1.0)


def what(messages: list[dict[str, Any]]) -> list[Any]:
    return [message.get("method") or message["id"] for message in messages]


# ---------------------------------------------------------------- the first word


def test_nothing_is_sent_before_the_broker_has_told_how_the_session_stands() -> None:
    session = Session(30.0)
    wire = Wire(session)
    session.stand(("serve", "data"), "broker.serve", b"{}")
    call = ask(session)
    session.attached(0.0)
    assert session.linked
    assert not session.ready
    assert session.resume is None
    assert wire.pump() == []
    greet(session)
    assert session.ready
    assert what(wire.pump()) == ["broker.serve", "data/read"]
    assert session.resume == ("n-1", "s3cret", 0)
    assert answer(session, call.id, 1) == (Ended(call, 1),)
    assert session.resume == ("n-1", "s3cret", 1)


def test_a_second_word_changes_nothing() -> None:
    session, wire = graced()
    asked_for(session)
    assert greet(session, name="n-7") == []
    assert session.resume == ("n-1", "s3cret", 0)
    assert session.attempts == 1
    assert wire.pump() == []


def test_without_grace_there_is_no_such_word() -> None:
    session, wire = linked()
    assert greet(session) == []
    assert session.resume is None
    call = ask(session)
    wire.pump()
    (ended,) = session.detached(wire.enqueued, "broke", come_back=True)
    assert isinstance(ended, Ended)
    assert ended.call is call


@pytest.mark.parametrize("params", [{}, {"id": 5, "secret": "s"}, {"id": "n-1"}])
def test_a_first_word_that_is_none_is_not_taken_for_one(params: dict[str, Any]) -> None:
    session = Session(30.0)
    session.attached(0.0)
    assert say(session, "broker.session", **params) == ()
    assert not session.ready


# ---------------------------------------------------------------- going on


def test_what_had_not_arrived_is_sent_again_in_order_and_then_the_rest() -> None:
    session, wire = graced()
    calls = [ask(session, params=b"[%d]" % number) for number in range(4)]
    sent = wire.pump()
    assert lose(session, wire) == []
    assert wire.pump() == [], "there is no link"
    calls.append(ask(session, params=b"[4]"))
    assert come_back(session, received=2) == []
    again = wire.pump()
    assert again[:2] == sent[2:], "as it was"
    assert [message["id"] for message in again] == [call.id for call in calls[2:]]
    for n, call in enumerate(calls, 1):
        assert answer(session, call.id, n) == (Ended(call, 1),)
    assert not session.pending


def test_it_counts_on_over_all_links() -> None:
    session, wire = graced()
    for number in range(3):
        ask(session, params=b"[%d]" % number)
    wire.pump()
    lose(session, wire)
    come_back(session, received=1)
    ask(session, params=b"[3]")
    wire.pump()
    lose(session, wire)
    come_back(session, received=3)
    assert [message["params"] for message in wire.pump()] == [[3]], "three of four have arrived"


def test_a_link_that_breaks_while_it_catches_up_loses_nothing() -> None:
    session, wire = graced()
    calls = [ask(session, params=b"[%d]" % number) for number in range(5)]
    wire.pump()
    lose(session, wire)
    come_back(session, received=1)
    for _ in range(2):
        frame = session.take(0.0)
        assert frame is not None
    lose(session, wire)
    calls.append(ask(session, params=b"[5]"))
    come_back(session, received=2)
    assert [message["params"] for message in wire.pump()] == [[2], [3], [4], [5]]


def test_attachments_are_sent_again_as_they_were_and_not_copied() -> None:
    session, wire = graced()
    data = b"x" * 100_000
    session.ask("data/read", b'[{"$buffer":0}]', [data], Options(), None, 0.0)
    frame = session.take(0.0)
    assert frame is not None
    lose(session, wire)
    come_back(session, received=0)
    again = session.take(0.0)
    assert again is frame
    assert any(piece is data for piece in again.pieces)


def test_what_the_broker_acknowledged_is_forgotten() -> None:
    session, wire = graced()
    for number in range(5):
        ask(session, params=b"[%d]" % number)
    wire.pump()
    kept = session._kept
    assert kept is not None
    assert say(session, "$/ack", n=3) == ()
    assert len(kept) == 2
    for n in (1, 3, -1, 6, 1 << 60):
        say(session, "$/ack", n=n)
        assert len(kept) == 2, "what is old or was never sent says nothing"
    assert say(session, "$/ack", n="x") == ()
    assert say(session, "$/ack") == ()
    lose(session, wire)
    come_back(session, received=3)
    assert [message["params"] for message in wire.pump()] == [[3], [4]]


def test_what_came_twice_counts_once() -> None:
    session, wire = graced()
    call = session.ask("data/read", b"", (), Options(), None, 0.0)
    wire.pump()
    asked = {"jsonrpc": "2.0", "id": "n-1-1", "method": "data/read", "meta": {"n": 1, "timeout": 3}}
    news = {"jsonrpc": "2.0", "method": "broker.message", "params": {"seq": 1, "data": 5}, "meta": {"n": 2}}
    for first in (True, False):
        for message, kind in ((asked, Asked), (news, Heard)):
            results = session.receive(json.dumps(message).encode(), False, 0.0)
            assert [type(result) for result in results] == ([kind] if first else [])
        lose(session, wire)
        assert session.resume == ("n-1", "s3cret", 2)
        come_back(session, received=1)
    assert answer(session, call.id, 9) == (Ended(call, 1),), "a gap is where broadcasts were dropped"
    assert session.resume == ("n-1", "s3cret", 9)


def test_what_came_is_acknowledged_now_and_then() -> None:
    session, wire = graced()
    for n in range(1, 2 * ACK_EVERY + 2):
        say(session, "broker.message", number=n, seq=n, data=1)
    assert wire.pump() == [
        {"jsonrpc": "2.0", "method": "$/ack", "params": {"n": n}} for n in (ACK_EVERY, 2 * ACK_EVERY)
    ]  # fmt: skip
    text = b'{"jsonrpc":"2.0","method":"broker.message","params":{"seq":1,"data":1},"meta":{"n":%d}}'
    session.receive(b"".join(pack([text % 100], [b"x" * (1 << 20)])), True, 0.0)
    assert wire.pump() == [{"jsonrpc": "2.0", "method": "$/ack", "params": {"n": 100}}], "large ones at once"


def test_what_stands_is_not_said_again_where_it_still_stands() -> None:
    session, wire = graced()
    session.stand(("serve", "data"), "broker.serve", b"{}")
    lose(session, wire)
    come_back(session, received=0)
    assert wire.pump() == []
    lose(session, wire)
    come_back(session, received=0, resumed=False)
    assert what(wire.pump()) == ["broker.serve"]


def test_a_cancel_while_there_is_no_link_is_told_on_the_next() -> None:
    session, wire = graced()
    call = ask(session)
    wire.pump()
    lose(session, wire)
    never = ask(session)
    assert session.cancel(call) is not None
    assert session.cancel(never) is not None
    come_back(session, received=0)
    assert what(wire.pump()) == ["data/read", "$/cancelRequest"], "what counts is sent, wanted or not"
    assert wire.sent[-1]["params"] == {"id": call.id}


def test_what_never_arrived_and_has_ended_does_not_arrive_later() -> None:
    session, wire = graced()
    arrived, lost = ask(session, timeout=2.0), ask(session, params=b"[2]", timeout=2.0)
    frame = session.take(0.0)
    assert frame is not None
    arrived.mark = 50
    assert session.take(0.0) is not None
    lost.mark = 100
    session.detached(60, "broke", come_back=True)
    errors = {e.call: e.error for e in session.expire(9.0)}  # type: ignore[union-attr]
    assert [errors[call].may_have_executed for call in (arrived, lost)] == [True, False]  # type: ignore[union-attr]
    session.attached(10.0)
    greet(session, resumed=True, received=0)
    assert [(m["method"], m.get("id") or m["params"]["id"]) for m in wire.pump(now=10.0)] == [
        ("data/read", arrived.id), ("$/cancelRequest", lost.id), ("$/cancelRequest", arrived.id),
    ], "in its place there is something that does nothing, so that all that follows counts as before"  # fmt: skip


def test_deadlines_end_calls_without_a_link() -> None:
    session, _ = graced()
    written, unwritten = ask(session, timeout=2.0), ask(session, timeout=2.0)
    frame = session.take(0.0)
    assert frame is not None
    assert frame.call is written
    written.mark = 100
    session.detached(100, "broke", come_back=True)
    ended = session.expire(2.0 + GUARD_S + 1)
    assert [(e.call, type(e.error), e.error.may_have_executed) for e in ended] == [  # type: ignore[union-attr]
        (written, ConnectionLost, True), (unwritten, ConnectionLost, False),
    ]  # fmt: skip


def test_a_worker_keeps_what_it_was_asked_and_answers_later() -> None:
    session, wire = graced()
    asked_for(session, meta={"n": 1, "stream": "both"})
    for number in range(6):
        session.send_item("n-1-1", b"%d" % number)
    wire.pump()
    assert lose(session, wire) == []
    assert session.attempts == 1
    assert session.answer("n-1-1", b'"done"')
    come_back(session, received=3)
    assert [m["params"]["seq"] for m in wire.pump()] == [3]
    credit(session, "n-1-1", 10)
    *parts, end = wire.pump()
    assert [m["params"]["seq"] for m in parts] == [4, 5]
    assert end["result"] == "done"


def test_a_stream_goes_on_where_it_stood() -> None:
    session, wire = graced()

    class Reads:
        def item(self, value: Any) -> None: ...

    call = session.ask("data/read", b"", (), Options(), None, 0.0, reader=Reads())
    wire.pump()
    assert say(session, "$/part", number=1, id=call.id, seq=0, data="a") == [Item(call, "a")]
    lose(session, wire)
    session.consumed(call)
    come_back(session, received=1)
    assert say(session, "$/part", number=1, id=call.id, seq=0, data="a") == ()
    assert say(session, "$/part", number=2, id=call.id, seq=1, data="b") == [Item(call, "b")]
    assert what(wire.pump()) == ["$/credit"]
    assert answer(session, call.id, 3, None) == (Ended(call, None),)


# ---------------------------------------------------------------- the session is gone


def test_a_session_that_is_gone_ends_as_a_link_without_grace_does() -> None:
    session, wire = graced()
    written, idempotent = ask(session), ask(session, idempotent=True)
    asked_for(session, meta={"n": 1})
    wire.pump()
    flushed = wire.enqueued
    unwritten = ask(session)
    wire.pump()
    lose(session, wire, flushed=flushed)
    waiting = ask(session)
    session.answer("n-1-1", b"1")
    asked_for(session, "n-1-2", meta={"n": 2})
    results = come_back(session, received=0, resumed=False)
    assert [type(result) for result in results] == [CancelAsked, Ended]
    assert results[0] == CancelAsked("n-1-2")
    ended = results[1]
    assert isinstance(ended, Ended)
    assert ended.call is written
    assert isinstance(ended.error, ConnectionLost)
    assert ended.error.may_have_executed
    again = wire.pump()
    assert [message["id"] for message in again] == [idempotent.id, unwritten.id, waiting.id]
    assert session.resume == ("n-2", "s3cret", 0)
    assert answer(session, idempotent.id, 1) == (Ended(idempotent, 1),), "numbers begin anew"


def test_what_is_known_not_to_have_arrived_may_be_asked_again() -> None:
    session, wire = graced()
    call = ask(session)
    wire.pump()
    lose(session, wire)
    come_back(session, received=0)
    lose(session, wire, flushed=0)
    assert come_back(session, received=0, resumed=False) == [], "all was flushed to a link, and never arrived"
    assert [message["id"] for message in wire.pump()] == [call.id]


def test_a_call_is_put_into_two_sessions_at_most() -> None:
    session, wire = graced()
    call = ask(session, idempotent=True)
    for _ in range(SENT_MAX - 1):
        wire.pump()
        lose(session, wire)
        assert come_back(session, received=0, resumed=False) == []
    wire.pump()
    lose(session, wire)
    (ended,) = come_back(session, received=0, resumed=False)
    assert isinstance(ended, Ended)
    assert ended.call is call


def test_another_session_under_the_name_of_resumed_is_none() -> None:
    session, wire = graced()
    call = ask(session)
    wire.pump()
    lose(session, wire)
    session.attached(1.0)
    (ended,) = greet(session, resumed=True, received=1, name="n-9")
    assert isinstance(ended, Ended)
    assert ended.call is call


def test_a_link_that_may_not_be_resumed_ends_the_session() -> None:
    session, wire = graced()
    call = ask(session)
    wire.pump()
    (ended,) = lose(session, wire, resumable=False)
    assert isinstance(ended, Ended)
    assert ended.call is call
    assert session.resume is None


def test_no_link_any_more_ends_everything() -> None:
    session, wire = graced()
    call = ask(session)
    asked_for(session, meta={"n": 1})
    wire.pump()
    lose(session, wire)
    results = session.detached(0, "given up", come_back=False)
    assert [type(result) for result in results] == [CancelAsked, Ended]
    assert results[1].call is call  # type: ignore[union-attr]
    assert results[1].error.may_have_executed  # type: ignore[union-attr]
    assert not session.pending
    assert not session.outbox


def test_what_breaks_every_link_is_given_up() -> None:
    session, wire = graced()
    ask(session)
    wire.pump()
    lose(session, wire)
    for _ in range(STALLS_MAX):
        assert session.resume is not None
        come_back(session, received=0)
        assert what(wire.pump()) == ["data/read"]
        lose(session, wire)
    assert session.resume is None
    (ended,) = come_back(session, received=0, resumed=False)
    assert isinstance(ended, Ended)


def test_links_that_carry_something_are_not_given_up() -> None:
    session, wire = graced()
    for _ in range(3 * STALLS_MAX):
        ask(session)
    wire.pump()
    for received in range(3 * STALLS_MAX):
        lose(session, wire)
        assert session.resume is not None
        come_back(session, received=received)
        wire.pump()


def test_a_broker_that_claims_more_than_was_sent_is_not_gone_on_with() -> None:
    session, wire = graced()
    call = ask(session)
    wire.pump()
    lose(session, wire)
    session.attached(1.0)
    with pytest.raises(ValueError, match="claims 2 messages of a session that sent 1"):
        greet(session, resumed=True, received=2)
    assert not session.ready
    assert lose(session, wire) == []
    assert session.resume is None
    (ended,) = come_back(session, received=0, resumed=False)
    assert isinstance(ended, Ended)
    assert ended.call is call


def test_forgetting_begins_anew() -> None:
    session, wire = graced()
    call = ask(session)
    wire.pump()
    lose(session, wire)
    session.forget()
    assert session.resume is None
    (ended,) = come_back(session, received=0, resumed=False)
    assert isinstance(ended, Ended)
    assert ended.call is call
    assert part(session, call, 0, "late") == ()
