"""`Ranges`: a file that comes range after range, each where the last one ended."""

from typing import Any

import pytest

from broker.cli.ranges import Ranges
from broker.peer.errors import BadReply


@pytest.mark.parametrize(
    ("replies", "says"),
    [
        ([None], "did not send a range of a file"),
        ([{"data": "text", "size": 5}], "did not send a range"),
        ([{"data": b"x"}], "did not send a range"),
        ([{"data": b"123456", "size": 5}], "do not belong at 0"),
        ([{"data": b"x", "size": 5, "offset": 2}], "do not belong at 0"),
        ([{"data": b"x", "size": 5}, {"data": b"x", "size": 5, "offset": 0}], "1 bytes from 0 do not belong at 1"),
        ([{"data": b"x", "size": 5}, {"data": b"", "size": 1, "offset": 1}], "ended after 1 of 5 bytes"),
    ],
)
def test_replies_that_do_not_continue_are_refused(replies: list[Any], says: str) -> None:
    ranges = Ranges({"path": "a"}, "data/a")
    with pytest.raises(BadReply, match=says):
        for reply in replies:
            assert ranges.params()["path"] == "a"
            ranges.take(reply)


def test_a_worker_of_somebody_elses_needs_no_version() -> None:
    ranges = Ranges({"path": "a", "offset": 1, "length": 3})
    assert ranges.params() == {"path": "a", "offset": 1, "length": 3}
    assert ranges.take({"data": b"b", "size": 5}) == b"b"
    assert ranges.params() == {"path": "a", "offset": 2, "length": 2}
    ranges.take({"data": b"cd", "size": 5})
    assert ranges.is_done
    assert (ranges.received, ranges.total) == (3, 3)
