"""Values in pieces: whatever is cut is made whole again, and whatever is missing or changed is noticed."""

import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.messages import Body
from broker.wire.pieces import PIECE_MAX_BYTES, Cutter, Joiner, PiecesError, is_mark, join, join_reply


def cut(raw: bytes, *attachments: bytes) -> tuple[list[bytes], bytes]:
    cutter = Cutter(raw, attachments)
    return list(cutter), cutter.mark


@settings(max_examples=50, deadline=None)
@given(
    st.binary(min_size=1, max_size=100),
    st.lists(st.integers(0, 3 * PIECE_MAX_BYTES), max_size=4),
)
def test_what_is_cut_is_made_whole(raw: bytes, sizes: list[int]) -> None:
    attachments = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    cutter = Cutter(raw, attachments)
    before = cutter.left_bytes
    pieces = []
    for piece in cutter:
        pieces.append(piece)
        assert 0 < len(piece) <= PIECE_MAX_BYTES
        assert cutter.left_bytes == before - sum(map(len, pieces))
    assert cutter.left_bytes == 0
    assert all(len(piece) == PIECE_MAX_BYTES for piece in pieces[:-1])
    text, joined = join(pieces, cutter.mark)
    assert text.rstrip(b" ") == raw.rstrip(b" ")
    assert [bytes(attachment) for attachment in joined] == attachments


def test_what_was_joined_cannot_be_written_to() -> None:
    pieces, mark = cut(b'{"$buffer":0}', b"abc")
    _, (attachment,) = join(pieces, mark)
    assert attachment.readonly


@pytest.mark.parametrize(
    "damage",
    [
        lambda pieces: pieces[:-1],
        lambda pieces: pieces[::-1],
        lambda pieces: [*pieces, b"x"],
        lambda pieces: [pieces[0][:-1] + b"\xff", *pieces[1:]],
        lambda pieces: [],
    ],
    ids=["short", "out of order", "long", "changed", "nothing"],
)
def test_what_is_not_whole_is_noticed(damage: object) -> None:
    pieces, mark = cut(b'{"$buffer":0}', b"abc" * PIECE_MAX_BYTES)
    with pytest.raises(PiecesError):
        join(damage(pieces), mark)  # type: ignore[operator]


@pytest.mark.parametrize(
    "mark", [b"", b"null", b"{", b'{"$joined":{}}', b'{"$joined":{"bytes":1}}', b'{"$joined":{"bytes":"1","crc32":1}}']
)
def test_a_mark_that_is_none(mark: bytes) -> None:
    with pytest.raises(PiecesError, match="is not closed with"):
        join([b"x"], mark)


def test_a_whole_that_is_no_frame() -> None:
    joiner = Joiner()
    joiner.add(b"no table of offsets")
    assert joiner.size == 19
    mark = json.dumps({"$joined": {"bytes": 19, "crc32": zlib.crc32(b"no table of offsets")}}).encode()
    with pytest.raises(PiecesError, match="a value in pieces"):
        joiner.finish(mark)


def test_a_mark_is_known_by_its_name() -> None:
    assert is_mark(cut(b"[1]")[1])
    assert is_mark(b' {"$joined":{"bytes":0,"crc32":0}}')
    assert not is_mark(b'{"joined":1}')
    assert not is_mark(b'{"$joined":"' + b"x" * 200 + b'"}')


def test_a_reply_of_pieces_alone_is_the_value() -> None:
    pieces, mark = cut(b'{"a":{"$buffer":0}}', b"abc")
    parts = [Body(b'{"$buffer":0}', (piece,)) for piece in pieces]
    reply = join_reply(parts, [True] * len(parts), Body(mark))
    assert bytes(reply.raw).strip() == b'{"a":{"$buffer":0}}'
    assert [bytes(attachment) for attachment in reply.attachments] == [b"abc"]


def test_a_reply_of_items_is_their_list() -> None:
    pieces, mark = cut(b'{"$buffer":0}', b"large")
    parts = [Body(b'{"$buffer":0}', (b"first",)), *(Body(b'{"$buffer":0}', (p,)) for p in pieces), Body(mark)]
    more = [False, *[True] * len(pieces), False]
    reply = join_reply(parts, more, Body(b"null"))
    assert json.loads(bytes(reply.raw)) == [{"$buffer": 0}, {"$buffer": 1}]
    assert [bytes(attachment) for attachment in reply.attachments] == [b"first", b"large"]
    reply = join_reply(parts, more, Body(b"7"))
    assert json.loads(bytes(reply.raw)) == [{"$buffer": 0}, {"$buffer": 1}, 7]
