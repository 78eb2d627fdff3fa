"""Streams of the session without any I/O: order, credit, pieces, and that both directions end with their request."""

import json
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.limits import Limits
from broker.peer.errors import BadReply, Cancelled, ConnectionLost, InvalidRequest, TooLarge
from broker.peer.kept import ACK_EVERY_BYTES
from broker.peer.session import (
    GUARD_S,
    VALUE_MAX_BYTES,
    Asked,
    CancelAsked,
    Ended,
    Item,
    ItemsEnded,
    Options,
    Pending,
    ProgressCame,
    Session,
)
from broker.peer.streams import FIRST_CREDIT, PART_MAX_BYTES
from broker.peer.streams import WINDOW as WINDOW_MIN
from broker.peer.streams import WINDOW_MAX as WINDOW
from broker.wire.attachments import pack
from broker.wire.pieces import PIECE_MAX_BYTES, Cutter, join
from tests.peer.machine import Wire, ask, asked_for, credit, linked, part, reply, say


class Reads:
    """A reader; the session only needs to know that there is one."""

    def item(self, value: Any) -> None: ...


def streamed(session: Session, *, sends: bool = False, reads: bool = True, **options: Any) -> Pending:
    reader = Reads() if reads else None
    return session.ask("data/read", b"[1]", (), Options(**options), None, 0.0, reader=reader, sends=sends)


def methods(messages: list[dict[str, Any]]) -> list[str]:
    return [message["method"] for message in messages]


def seqs(messages: list[dict[str, Any]]) -> list[int]:
    return [message["params"]["seq"] for message in messages if message.get("method") == "$/part"]


def cut(raw: bytes, *attachments: bytes) -> tuple[list[bytes], Any]:
    """The pieces of a value, and its mark."""
    cutter = Cutter(raw, attachments)
    pieces = list(cutter)
    return pieces, json.loads(cutter.mark)


# ---------------------------------------------------------------- items that come


def test_items_come_in_order_and_then_the_result() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    assert part(session, call, 0, "a") == [Item(call, "a")]
    assert part(session, call, 1, {"$buffer": 0}, b"xyz") == [Item(call, b"xyz")]
    assert reply(session, call, result=7) == Ended(call, 7)
    assert part(session, call, 2, "late") == (), "parts for what has ended are nothing"
    assert not session._streams


def test_without_a_reader_the_value_is_the_list_of_the_items() -> None:
    session, wire = linked()
    for result, value in ((None, [1, [2]]), (3, [1, [2], 3])):
        call = streamed(session, reads=False)
        wire.pump()
        assert part(session, call, 0, 1) == []
        assert part(session, call, 1, [2]) == []
        assert reply(session, call, result=result) == Ended(call, value)


def test_a_part_that_came_before_is_passed_over() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    part(session, call, 0, "a")
    assert part(session, call, 0, "b") == []
    assert part(session, call, -1, "b") == []
    assert part(session, call, 1, "c") == [Item(call, "c")]


@pytest.mark.parametrize("seq", [1, 100, 1 << 60])
def test_a_gap_ends_the_call_and_the_broker_is_told(seq: int) -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    (ended,) = part(session, call, seq, "b")
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, BadReply)
    assert f"part {seq} came where part 0 was due" in ended.error.detail
    assert wire.pump() == [{"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": call.id}}]
    assert reply(session, call, result=1) is None
    assert not session.pending
    assert not session._streams


def test_more_is_granted_when_half_was_read_and_not_before() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    part(session, call, 0)
    credit_told = {"jsonrpc": "2.0", "method": "$/credit", "params": {"id": call.id, "upto": WINDOW}}
    assert wire.pump() == [credit_told], "with the first part the whole window is opened"
    for seq in range(1, WINDOW):
        part(session, call, seq)
    assert wire.pump() == [], "nobody has read anything"
    session.consumed(call, WINDOW // 2 - 1)
    assert wire.pump() == []
    session.consumed(call)
    credit_told["params"]["upto"] = WINDOW + WINDOW // 2  # type: ignore[index]
    assert wire.pump() == [credit_told]
    session.consumed(call, 1000)
    credit_told["params"]["upto"] = 2 * WINDOW  # type: ignore[index]
    assert wire.pump() == [credit_told], "more than came cannot have been read"


def test_large_parts_are_granted_fewer_at_a_time() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    part(session, call, 0, "x" * 250_000)
    assert [m["params"]["upto"] for m in wire.pump()] == [WINDOW_MIN]


def test_a_part_beyond_the_credit_ends_the_call() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    for seq in range(WINDOW):
        assert part(session, call, seq, seq) == [Item(call, seq)]
    (ended,) = part(session, call, WINDOW)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, BadReply)
    assert "beyond the credit" in ended.error.detail


def test_what_nobody_reads_one_by_one_never_stalls() -> None:
    session, wire = linked()
    call = streamed(session, reads=False)
    wire.pump()
    upto = FIRST_CREDIT
    for seq in range(100):
        assert seq < upto
        part(session, call, seq, seq)
        for message in wire.pump():
            upto = message["params"]["upto"]
    assert reply(session, call, result=None) == Ended(call, list(range(100)))


@pytest.mark.parametrize(
    "params",
    [{}, {"id": 1}, {"id": 1, "seq": "x"}, {"id": None, "seq": 0}, {"id": [], "seq": 0}, {"id": 99, "seq": 0}],
)
def test_parts_that_are_none_are_nothing(params: dict[str, Any]) -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    assert say(session, "$/part", **params) == ()
    assert say(session, "$/credit", **params) == ()
    assert reply(session, call, result=1) == Ended(call, 1)


def test_an_item_that_refers_to_nothing_ends_the_call() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    (ended,) = part(session, call, 0, {"$buffer": 3}, b"x")
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, BadReply)


# ---------------------------------------------------------------- values in pieces that come


def test_a_large_item_is_put_together() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    data = bytes(range(256)) * 4096
    pieces, mark = cut(b'{"image":{"$buffer":0}}', data)
    assert len(pieces) > FIRST_CREDIT
    for seq, piece in enumerate(pieces):
        assert part(session, call, seq, {"$buffer": 0}, piece, more=True) == []
    assert part(session, call, len(pieces), mark) == [Item(call, {"image": data})]
    assert part(session, call, len(pieces) + 1, "next") == [Item(call, "next")]
    assert reply(session, call, result=None) == Ended(call, None)


@pytest.mark.parametrize("reads", [True, False])
def test_a_large_result_is_put_together(reads: bool) -> None:
    session, wire = linked()
    call = streamed(session, reads=reads)
    wire.pump()
    pieces, mark = cut(b'{"$buffer":0}', b"x" * 1_000_000)
    for seq, piece in enumerate(pieces):
        part(session, call, seq, {"$buffer": 0}, piece, more=True)
    assert reply(session, call, result=mark) == Ended(call, b"x" * 1_000_000)


def test_pieces_are_read_at_once_unless_something_before_them_is_not() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    part(session, call, 0, "small")
    for seq in range(1, WINDOW):
        part(session, call, seq, {"$buffer": 0}, b"x" * 10, more=True)
    assert [m["params"]["upto"] for m in wire.pump()] == [WINDOW], "one item waits: the next is not gathered on and on"
    session.consumed(call)
    assert [m["params"]["upto"] for m in wire.pump()] == [2 * WINDOW]


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        ({"bytes": 5}, "of 5 bytes came as"),
        ({"crc32": 1}, "is damaged"),
        (None, "not closed with"),
    ],
    ids=["length", "checksum", "no mark"],
)
@pytest.mark.parametrize("where", ["item", "result"])
def test_a_value_that_is_not_whole_ends_the_call(damage: dict[str, int] | None, detail: str, where: str) -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    pieces, mark = cut(b"[1,2,3]")
    part(session, call, 0, {"$buffer": 0}, *pieces, more=True)
    wrong = "done" if damage is None else {"$joined": mark["$joined"] | damage}
    ended = reply(session, call, result=wrong) if where == "result" else part(session, call, 1, wrong)[0]
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, BadReply)
    assert detail in ended.error.detail
    assert not session.pending


def test_a_piece_without_its_bytes_ends_the_call() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    (ended,) = part(session, call, 0, {"$buffer": 0}, more=True)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, BadReply)


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_put_together_is_bounded(reads: bool) -> None:
    session, wire = linked()
    session.value_max_bytes = 25
    call = streamed(session, reads=reads)
    wire.pump()
    part(session, call, 0, {"$buffer": 0}, b"x" * 20, more=True)
    (ended,) = part(session, call, 1, {"$buffer": 0}, b"x" * 20, more=True)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, TooLarge)
    assert methods(wire.pump()) == ["$/credit", "$/cancelRequest"]
    assert not session._streams


def test_the_list_of_the_items_is_bounded() -> None:
    session, wire = linked()
    session.value_max_bytes = 25
    call = streamed(session, reads=False)
    wire.pump()
    assert part(session, call, 0, "x" * 15) == []
    (ended,) = part(session, call, 1, "x" * 15)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, TooLarge)
    assert methods(wire.pump())[-1] == "$/cancelRequest"


# ---------------------------------------------------------------- items that go


def test_a_caller_sends_items_as_they_are_taken() -> None:
    session, wire = linked()
    call = streamed(session, sends=True, timeout=5.0)
    for number in range(6):
        assert session.send_item(call, b"%d" % number)
    assert not session.has_room(call)
    head, *parts = wire.pump()
    assert head["meta"] == {"timeout": 5.0, "stream": "both"}
    assert seqs(parts) == [0, 1, 2, 3]
    assert not session.has_room(call)
    assert wire.rooms == []
    credit(session, call, 5)
    assert seqs(wire.pump()) == [4]
    credit(session, call, 8)
    assert session.send_item(call, b"null", last=True)
    assert [message["params"] for message in wire.pump()] == [
        {"id": call.id, "seq": 5, "data": 5},
        {"id": call.id, "seq": 6, "data": None, "last": True},
    ]
    assert wire.rooms == [call]
    assert session.has_room(call)
    assert not session.send_item(call, b"1"), "it has said that there will be no more"
    assert reply(session, call, result=15) == Ended(call, 15)
    assert not session.send_item(call, b"1")


def test_credit_that_goes_back_or_is_absurd_harms_nothing() -> None:
    session, wire = linked()
    call = streamed(session, sends=True)
    for number in range(20):
        session.send_item(call, b"%d" % number)
    wire.pump()
    for upto in (0, 3, -5):
        credit(session, call, upto)
        assert wire.pump() == []
    credit(session, call, 1 << 60)
    assert seqs(wire.pump()) == list(range(4, 20))


def test_only_who_said_so_sends_items() -> None:
    session, wire = linked()
    call = streamed(session)
    assert not session.send_item(call, b"1")
    assert methods(wire.pump()) == ["data/read"]


def test_items_wait_for_their_request_which_may_never_go() -> None:
    session = Session()
    call = streamed(session, sends=True, timeout=1.0)
    session.send_item(call, b"1")
    session.attached(2.0)
    assert Wire(session).pump(now=2.0) == []
    session.expire(9.0)
    assert not session._streams
    assert not session.outbox


def test_streams_take_turns() -> None:
    session, wire = linked()
    first, second = streamed(session, sends=True), streamed(session, sends=True)
    for call in (first, second):
        for _ in range(3):
            session.send_item(call, b"0")
    order = [m["params"]["id"] for m in wire.pump() if m["method"] == "$/part"]
    assert order == [first.id, second.id] * 3


def test_nothing_is_encoded_before_it_may_go() -> None:
    session, wire = linked()
    call = streamed(session, sends=True)
    data = b"x" * 2_000_000
    for _ in range(100):
        session.send_item(call, b'{"$buffer":0}', [data])
    wire.pump()
    assert len(session.outbox) == 0
    queue = session._streams[call].outgoing._queue
    assert len(queue) == 100, "the first is not whole yet"
    assert all(waiting.attachments[0] is data for waiting in queue)


def test_a_large_item_travels_in_pieces() -> None:
    session, wire = linked()
    call = streamed(session, sends=True)
    data = bytes(range(256)) * 4096
    session.send_item(call, b'[{"$buffer":0}]', [data])
    session.send_item(call, b'"small"', last=True)
    credit(session, call, 64)
    _, *parts = wire.pump()
    *pieces, mark, small = parts
    assert all(piece["params"]["more"] and piece["params"]["data"] == {"$buffer": 0} for piece in pieces)
    assert all(len(piece["attachments"][0]) <= PIECE_MAX_BYTES for piece in pieces)
    text, attachments = join([p["attachments"][0] for p in pieces], json.dumps(mark["params"]["data"]).encode())
    assert text.strip() == b'[{"$buffer":0}]'
    assert [bytes(attachment) for attachment in attachments] == [data]
    assert small["params"]["data"] == "small"
    assert small["params"]["last"] is True
    assert seqs(parts) == list(range(len(parts)))


def test_what_is_as_large_as_a_part_is_one() -> None:
    session, wire = linked()
    call = streamed(session, sends=True)
    session.send_item(call, b'{"$buffer":0}', [b"x" * (PART_MAX_BYTES - 13)])
    assert len(wire.pump()) == 2
    session.send_item(call, b'{"$buffer":0}', [b"x" * (PART_MAX_BYTES - 12)])
    assert len(wire.pump()) == 3, "two pieces, and what stands for them"


def test_what_is_granted_for_small_parts_does_not_break_the_session_with_large_ones() -> None:
    """The broker ends a stream when it would have to keep more for a session than this."""
    assert Limits().kept_max_bytes >= WINDOW * PART_MAX_BYTES + ACK_EVERY_BYTES


def test_an_item_above_the_bound_is_refused() -> None:
    session, wire = linked()
    session.value_max_bytes = 10
    call = streamed(session, sends=True)
    wire.pump()
    with pytest.raises(TooLarge, match="an item of 11 bytes"):
        session.send_item(call, b" " * 11)
    assert wire.pump() == []


def test_cancelling_stops_the_items() -> None:
    session, wire = linked()
    call = streamed(session, sends=True)
    for _ in range(9):
        session.send_item(call, b"1")
    wire.pump()
    credit(session, call, 64)
    ended = session.cancel(call)
    assert ended is not None
    assert isinstance(ended.error, Cancelled)
    assert methods(wire.pump()) == ["$/cancelRequest"]
    assert session.has_room(call), "who waits to send looks again"
    assert not session.is_awaited(call)


def test_a_keyed_request_sends_nothing_in_parts() -> None:
    session, wire = linked()
    with pytest.raises(InvalidRequest, match="with a key"):
        streamed(session, sends=True, key="k")
    with pytest.raises(TooLarge):
        session.ask("data/read", b" " * (VALUE_MAX_BYTES + 1), (), Options(key="k"), None, 0.0)
    assert wire.pump() == []
    assert not session.pending


# ---------------------------------------------------------------- large params


def large() -> tuple[bytes, list[bytes]]:
    return b'{"volume":{"$buffer":0}}', [b"v" * (VALUE_MAX_BYTES + 1)]


def test_large_params_travel_in_pieces_by_themselves() -> None:
    session, wire = linked()
    raw, attachments = large()
    call = session.ask("data/read", raw, attachments, Options(timeout=9.0), None, 0.0)
    head, *parts = wire.pump()
    assert head["params"] == {"$joined": {"bytes": 0, "crc32": 0}}
    assert head["meta"] == {"timeout": 9.0, "stream": "both"}
    assert seqs(parts) == [0, 1, 2, 3]
    upto = FIRST_CREDIT
    while not parts[-1]["params"].get("last"):
        upto += 3
        credit(session, call, upto)
        more = wire.pump()
        assert len(more) <= 3
        parts += more
    *pieces, mark = parts
    assert "more" not in mark["params"]
    joined = join([p["attachments"][0] for p in pieces], json.dumps(mark["params"]["data"]).encode())
    assert [len(attachment) for attachment in joined[1]] == [VALUE_MAX_BYTES + 1]
    assert reply(session, call, result=1) == Ended(call, 1)
    assert not session._streams


def test_items_follow_large_params() -> None:
    session, wire = linked()
    raw, attachments = large()
    call = session.ask("data/read", raw, attachments, Options(), None, 0.0, sends=True)
    session.send_item(call, b'"item"', last=True)
    credit(session, call, 1000)
    *_, mark, item = wire.pump()
    assert "$joined" in mark["params"]["data"]
    assert "last" not in mark["params"]
    assert item["params"]["data"] == "item"
    assert item["params"]["last"] is True


def params_in_pieces(session: Session, *, last: bool, stream: str = "out") -> list[Any]:
    unknown = {"$joined": {"bytes": 0, "crc32": 0}}
    assert asked_for(session, params=unknown, meta={"stream": stream, "timeout": 3}) is None, "they have not come yet"
    pieces, mark = cut(b'{"volume":{"$buffer":0}}', b"v" * 300_000)
    for seq, piece in enumerate(pieces):
        assert part(session, "n-1-1", seq, {"$buffer": 0}, piece, more=True) == []
    return list(part(session, "n-1-1", len(pieces), mark, last=last))


def test_a_request_is_given_once_its_params_have_come() -> None:
    session, wire = linked()
    (asked,) = params_in_pieces(session, last=True)
    assert isinstance(asked, Asked)
    assert asked.params.strip() == b'{"volume":{"$buffer":0}}'  # type: ignore[union-attr]
    assert [bytes(attachment) for attachment in asked.attachments] == [b"v" * 300_000]
    assert asked.timeout == 3
    assert not asked.stream_out, "nothing follows"
    assert session.answer("n-1-1", b"1")
    assert wire.pump()[-1]["result"] == 1
    assert session.attempts == 0
    assert not session._streams


def test_items_come_after_params_in_pieces() -> None:
    session, _ = linked()
    (asked,) = params_in_pieces(session, last=False)
    assert isinstance(asked, Asked)
    assert asked.stream_out
    assert part(session, "n-1-1", 3, "item") == [Item("n-1-1", "item")]
    assert part(session, "n-1-1", 4, None, last=True) == [ItemsEnded("n-1-1")]


def test_a_request_that_is_cancelled_before_its_params_have_come_was_never_given() -> None:
    session, _ = linked()
    asked_for(session, params={"$joined": {"bytes": 0, "crc32": 0}}, meta={"stream": "out"})
    assert session.attempts == 1
    assert say(session, "$/cancelRequest", id="n-1-1") == ()
    assert session.attempts == 0
    assert not session._streams


def test_params_that_are_too_large_here_are_answered_so() -> None:
    session, wire = linked()
    session.value_max_bytes = 100
    asked_for(session, params={"$joined": {"bytes": 0, "crc32": 0}}, meta={"stream": "out"})
    assert part(session, "n-1-1", 0, {"$buffer": 0}, b"x" * 101, more=True) == []
    (message,) = wire.pump()
    assert message["error"]["data"]["type"] == "TooLarge"
    assert session.attempts == 0


# ---------------------------------------------------------------- a worker's stream


def test_a_worker_takes_items_and_is_told_of_their_end() -> None:
    session, wire = linked()
    asked = asked_for(session, meta={"stream": "both", "progress": True})
    assert asked.stream_in
    assert asked.stream_out
    assert asked.progress
    assert part(session, "n-1-1", 0, "a") == [Item("n-1-1", "a")]
    assert wire.pump()[0]["params"] == {"id": "n-1-1", "upto": WINDOW}
    assert part(session, "n-1-1", 1, "b", last=True) == [Item("n-1-1", "b"), ItemsEnded("n-1-1")]
    assert part(session, "n-1-1", 2, "c") == [], "it has ended"
    session.consumed("n-1-1", 2)
    assert wire.pump() == [], "no more comes"


def test_a_gap_ends_a_request_at_both_sides() -> None:
    session, wire = linked()
    asked_for(session, meta={"stream": "out"})
    assert part(session, "n-1-1", 1, "a") == [CancelAsked("n-1-1")]
    (message,) = wire.pump()
    assert "part 1 came where part 0 was due" in message["error"]["message"]
    assert not session.answer("n-1-1", b"1")


def test_the_reply_follows_the_items() -> None:
    session, wire = linked()
    asked_for(session)
    for number in range(6):
        assert session.send_item("n-1-1", b"%d" % number)
    assert session.answer("n-1-1", b'"end"')
    assert not session.answer("n-1-1", b"2")
    assert not session.fail("n-1-1", 1, "no")
    assert not session.send_item("n-1-1", b"7")
    assert seqs(wire.pump()) == [0, 1, 2, 3]
    assert session.has_unsent
    assert session.attempts == 1
    credit(session, "n-1-1", 6)
    *parts, end = wire.pump()
    assert seqs(parts) == [4, 5]
    assert end == {"jsonrpc": "2.0", "id": "n-1-1", "result": "end"}
    assert session.attempts == 0
    assert not session.has_unsent
    assert not session._streams


def test_an_error_follows_the_items() -> None:
    session, wire = linked()
    asked_for(session)
    for number in range(5):
        session.send_item("n-1-1", b"%d" % number)
    assert session.fail("n-1-1", -32000, "bad")
    assert "error" not in wire.pump()[-1]
    credit(session, "n-1-1", 5)
    assert wire.pump()[-1]["error"]["message"] == "bad"
    assert not session._streams


def test_a_large_result_goes_in_pieces_and_needs_no_credit_for_its_end() -> None:
    session, wire = linked()
    asked_for(session)
    assert session.answer("n-1-1", b'{"$buffer":0}', [b"r" * (VALUE_MAX_BYTES + 1)])
    pieces = wire.pump()
    assert len(pieces) == FIRST_CREDIT
    count = -(-(VALUE_MAX_BYTES + 1 + 13) // PIECE_MAX_BYTES)
    credit(session, "n-1-1", count)
    *more, end = wire.pump()
    pieces += more
    assert len(pieces) == count
    assert all(piece["params"]["more"] for piece in pieces)
    text, attachments = join([p["attachments"][0] for p in pieces], json.dumps(end["result"]).encode())
    assert text.strip() == b'{"$buffer":0}'
    assert zlib.crc32(attachments[0]) == zlib.crc32(b"r" * (VALUE_MAX_BYTES + 1))
    assert session.attempts == 0


def test_a_cancelled_request_sends_nothing_more() -> None:
    session, wire = linked()
    asked_for(session)
    for number in range(9):
        session.send_item("n-1-1", b"%d" % number)
    wire.pump()
    credit(session, "n-1-1", 64)
    assert say(session, "$/cancelRequest", id="n-1-1") == (CancelAsked("n-1-1"),)
    assert wire.pump() == []
    assert not session.send_item("n-1-1", b"1")
    assert not session.has_unsent


def test_a_cancel_after_the_answer_stops_it_without_a_word_to_its_owner() -> None:
    session, wire = linked()
    asked_for(session)
    session.answer("n-1-1", b'{"$buffer":0}', [b"r" * (VALUE_MAX_BYTES + 1)])
    wire.pump()
    assert say(session, "$/cancelRequest", id="n-1-1") == ()
    credit(session, "n-1-1", 64)
    assert wire.pump() == []
    assert session.attempts == 0


# ---------------------------------------------------------------- progress


def test_progress_is_told_to_who_asked_as_long_as_there_is_room() -> None:
    session, wire = linked()
    asked_for(session, "n-1-1", meta={"progress": True})
    asked_for(session, "n-1-2")
    assert session.progress("n-1-1", 1, 3, "one")
    assert not session.progress("n-1-1", 2, 3), "the first has not gone yet: the link is crowded"
    assert wire.pump() == [
        {
            "jsonrpc": "2.0", "method": "$/progress",
            "params": {"id": "n-1-1", "value": {"done": 1, "total": 3, "text": "one"}},
        }
    ]  # fmt: skip
    assert session.progress("n-1-1", 0.5)
    assert wire.pump()[0]["params"]["value"] == {"done": 0.5}
    assert not session.progress("n-1-2", 1), "nobody asked"
    assert not session.progress("n-9-9", 1)
    session.answer("n-1-1", b"1")
    assert not session.progress("n-1-1", 3)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"done": 1, "total": 3, "text": "one"}, (1, 3, "one")),
        ({"done": 0.5}, (0.5, None, None)),
        ({"kind": "report", "percentage": 40, "message": "half"}, (40, 100, "half")),
        ({"kind": "begin", "title": "x"}, (0, None, None)),
    ],
)
def test_progress_comes_in_our_words_or_an_editors(value: dict[str, Any], told: tuple[Any, ...]) -> None:
    session, wire = linked()
    call = ask(session, progress=True)
    assert wire.pump()[0]["meta"] == {"progress": True}
    assert say(session, "$/progress", id=call.id, token=call.id, value=value) == (ProgressCame(call, *told),)
    reply(session, call, result=1)
    assert say(session, "$/progress", id=call.id, token=call.id, value=value) == ()


@pytest.mark.parametrize("params", [{}, {"id": 1}, {"id": 1, "value": 5}, {"id": 1, "value": {"done": "x"}}])
def test_progress_that_is_none_is_nothing(params: dict[str, Any]) -> None:
    session, wire = linked()
    ask(session)
    wire.pump()
    assert say(session, "$/progress", **params) == ()


# ---------------------------------------------------------------- options, and links that break


def test_every_option_travels() -> None:
    session, wire = linked()
    options = {
        "timeout": 5.0, "idle": 2.0, "idempotent": True, "retries": 0, "key": "k", "group": "g", "priority": -3,
        "progress": True, "timing": True, "wait": True, "trace": "t",
    }  # fmt: skip
    call = ask(session, **options)
    assert wire.pump()[0]["meta"] == options
    meta = {"timing": {"queued_ms": 1.5, "ended_ms": 9.0}}
    reply(session, call, result=1, meta=meta)
    assert call.timing == meta["timing"]


@pytest.mark.parametrize(
    "options",
    [
        {"idle": 0.0}, {"idle": float("inf")}, {"key": ""}, {"key": "k" * 257}, {"group": "ä" * 129}, {"priority": 10},
        {"priority": -10}, {"priority": 0.5}, {"retries": 11, "idempotent": True}, {"retries": "x", "idempotent": True},
        {"idle": "x"},
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_here(options: dict[str, Any]) -> None:
    session, _ = linked()
    with pytest.raises(InvalidRequest):
        ask(session, **options)
    assert not session.pending


@pytest.mark.parametrize(
    ("name", "value", "kind"), [("key", 5, "int"), ("key", b"x", "bytes"), ("group", 5, "int"), ("trace", 5, "int")]
)
def test_texts_that_are_none_are_named(name: str, value: object, kind: str) -> None:
    session, _ = linked()
    with pytest.raises(InvalidRequest, match=f"^{name} is of type {kind}; give a str$"):
        ask(session, **{name: value})
    assert not session.pending


def test_a_stream_that_has_begun_is_not_begun_again() -> None:
    session, wire = linked()
    sending, reading, gathering = (
        streamed(session, sends=True, idempotent=True), streamed(session, idempotent=True),
        streamed(session, reads=False, idempotent=True),
    )  # fmt: skip
    fresh = streamed(session, sends=True, idempotent=True)
    session.send_item(sending, b"1")
    wire.pump()
    session.send_item(fresh, b'"later"')
    part(session, reading, 0, "a")
    part(session, gathering, 0, "a")
    results = session.detached(wire.enqueued, "broke", come_back=True)
    assert [(r.call, type(r.error)) for r in results] == [  # type: ignore[union-attr]
        (sending, ConnectionLost), (reading, ConnectionLost),
    ]  # fmt: skip
    session.attached(1.0)
    again = wire.pump()
    assert [message.get("id") or message["params"]["id"] for message in again] == [gathering.id, fresh.id, fresh.id]
    assert again[0]["meta"] == {"idempotent": True}, "it sends nothing"
    assert again[-1]["params"]["data"] == "later"
    assert part(session, gathering, 0, "b") == []
    assert reply(session, gathering, result=None) == Ended(gathering, ["b"]), "what came before is forgotten"


def test_large_params_that_were_under_way_go_again_from_their_first_piece() -> None:
    session, wire = linked()
    raw, attachments = large()
    call = session.ask("data/read", raw, attachments, Options(idempotent=True), None, 0.0)
    credit(session, call, 10)
    before = wire.pump()
    session.detached(wire.enqueued, "broke", come_back=True)
    session.attached(1.0)
    again = wire.pump()
    assert again == before[: 1 + FIRST_CREDIT]
    credit(session, call, 1000)
    rest = wire.pump()
    assert rest[-1]["params"]["last"] is True
    pieces = [message["attachments"][0] for message in [*again, *rest] if "attachments" in message]
    join(pieces, json.dumps(rest[-1]["params"]["data"]).encode())


def test_a_workers_stream_ends_with_its_link() -> None:
    session, wire = linked()
    asked_for(session)
    for _ in range(9):
        session.send_item("n-1-1", b"1")
    wire.pump()
    assert session.detached(0, "broke", come_back=True) == [CancelAsked("n-1-1")]
    assert not session.has_unsent
    assert not session.send_item("n-1-1", b"1")


def test_a_stream_that_falls_silent_ends_with_its_deadline() -> None:
    session, wire = linked()
    call = streamed(session, sends=True, timeout=2.0)
    session.send_item(call, b"1")
    wire.pump()
    part(session, call, 0, "a")
    (ended,) = session.expire(2.0 + GUARD_S + 1)
    assert isinstance(ended, Ended)
    assert not session._streams
    assert methods(wire.pump()) == ["$/credit", "$/cancelRequest"]


def test_a_value_that_looks_like_a_mark_is_one_only_behind_pieces() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    odd = {"$joined": {"bytes": 1, "crc32": 1}}
    assert part(session, call, 0, odd) == [Item(call, odd)]
    assert reply(session, call, result=odd) == Ended(call, odd)


def test_pieces_reach_a_binary_frame_as_they_are() -> None:
    session, wire = linked()
    call = streamed(session)
    wire.pump()
    text = b'{"jsonrpc":"2.0","method":"$/part","params":{"id":%d,"seq":0,"data":{"$buffer":0}}}' % call.id
    frame = b"".join(pack([text], [memoryview(b"abc")]))
    assert session.receive(frame, True, 0.0) == [Item(call, b"abc")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
MEMBERS = st.dictionaries(
    st.sampled_from(["id", "seq", "data", "more", "last", "upto", "value", "token", "n", "secret", "resumed"]),
    JSON | st.sampled_from([1, 0, "n-1-1", True, {"$buffer": 0}]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["$/part", "$/credit", "$/progress", "$/ack", "$/cancelRequest", "broker.session", "$/x"]),
            MEMBERS, JSON, st.booleans(),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_whatever_a_broker_says_of_streams_other_calls_go_on(said: list[tuple[str, Any, Any, bool]]) -> None:
    session, wire = linked()
    streamed(session, sends=True)
    asked_for(session, meta={"stream": "both", "progress": True})
    session.send_item("n-1-1", b"1")
    session._made = 1 << 50  # an id nobody guesses
    other = ask(session)
    wire.pump()
    for method, params, meta, binary in said:
        text = json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "meta": meta}).encode()
        try:
            session.receive(b"".join(pack([text], [b"abc"])) if binary else text, binary, 0.0)
        except ValueError as error:
            assert "the broker sent" in str(error)
        wire.pump()
    assert reply(session, other, result=1) == Ended(other, 1)
    results = session.detached(wire.enqueued, "the end", come_back=False)
    assert len(results) <= 2
    assert not session.pending
    assert not session._streams
    assert not session.attempts
