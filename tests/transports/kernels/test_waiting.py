"""What waits for a front end: order, bounds, and that what is left out is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import Body
from broker.transports.kernels.waiting import OVERHEAD_BYTES, Gap, Output, Waiting


def output(kind: str = "status", size: int = 0, channel: str = "iopub", about: str = "p1", **more: bytes) -> Output:
    message = {"header": {"msg_id": "m", "msg_type": kind}, "parent_header": {"msg_id": about}, "content": {}}
    text = json.dumps(message).encode()
    return Output(channel, Body(text + b" " * max(0, size - OVERHEAD_BYTES - len(text)), tuple(more.values())))


def drained(waiting: Waiting) -> list[Output | Gap]:
    return [waiting.pop() for _ in range(len(waiting))]


def test_all_comes_in_order() -> None:
    waiting = Waiting(100_000)
    sent = [output("status"), output("stream"), output("execute_reply", channel="shell"), output("comm_msg", b=b"x")]
    assert all(waiting.put(each) for each in sent)
    assert waiting.bytes == sum(each.size for each in sent)
    assert drained(waiting) == sent
    assert waiting.bytes == 0


def test_printed_text_is_left_out_first_and_replies_last() -> None:
    waiting = Waiting(100_000)
    assert waiting.put(output("display_data", 49_500))
    assert not waiting.put(output("stream", 1000))
    assert waiting.put(output("comm_msg", 49_500)), "comms and displays have all the room"
    assert not waiting.put(output("comm_msg", 1000))
    assert waiting.put(output("execute_reply", 1000, "shell")), "somebody waits for it"
    assert not waiting.put(output("execute_reply", 30_000, "shell"))
    assert waiting.left_out == 3


def test_a_gap_stands_where_something_was_left_out_and_says_how_much() -> None:
    waiting = Waiting(10_000)
    waiting.put(output("stream", 4000))
    for _ in range(3):
        waiting.put(output("stream", 4000, about="cell"))
    waiting.put(output("status"))
    kept, gap, last = drained(waiting)
    assert isinstance(kept, Output)
    assert isinstance(gap, Gap)
    assert (gap.count, gap.bytes) == (3, 3 * (4000 - OVERHEAD_BYTES))
    assert json.loads(gap.parent_header) == {"msg_id": "cell"}, "it is told where it was printed"
    assert isinstance(last, Output)


def test_what_was_sent_and_did_not_arrive_comes_first_again() -> None:
    waiting = Waiting(10_000)
    one, two, three = output(about="1"), output(about="2"), output(about="3")
    waiting.put(three)
    waiting.put_back([one, two])
    assert drained(waiting) == [one, two, three]


@given(st.lists(st.tuples(st.sampled_from(["stream", "status", "execute_reply"]), st.integers(0, 6000)), max_size=60))
def test_it_is_bounded_and_nothing_vanishes_untold(sent: list[tuple[str, int]]) -> None:
    waiting = Waiting(20_000)
    kept = sum(waiting.put(output(k, size, "shell" if k.endswith("reply") else "iopub")) for k, size in sent)
    assert waiting.bytes <= 20_000 * 1.25 + 6000 + len(waiting) * 400
    items = drained(waiting)
    assert waiting.bytes == 0
    assert sum(isinstance(item, Output) for item in items) == kept
    assert sum(item.count for item in items if isinstance(item, Gap)) == len(sent) - kept == waiting.left_out


def test_one_of_any_size_has_room_where_nothing_waits() -> None:
    waiting = Waiting(1000)
    assert waiting.put(output("display_data", 50_000))
    assert not waiting.put(output("status"))


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(ValueError, match="header"):
        Waiting(1000).put(Output("iopub", Body(b"{}")))
