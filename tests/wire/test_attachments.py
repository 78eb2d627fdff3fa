"""Binary messages and base64 in their place."""

from __future__ import annotations

import base64
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import Body
from broker.wire.attachments import ATTACHMENTS_MAX, AttachmentError, collect, expand, pack, unpack


def frame(*parts: bytes, offsets: list[int] | None = None, count: int | None = None) -> bytes:
    at, real = 4 * (len(parts) + 1), []
    for part in parts:
        real.append(at)
        at += len(part)
    offsets = real if offsets is None else offsets
    return struct.pack(f">{len(offsets) + 1}I", len(parts) if count is None else count, *offsets) + b"".join(parts)


@given(st.binary(max_size=40), st.lists(st.binary(max_size=40), min_size=1, max_size=5))
def test_what_is_packed_comes_back(text: bytes, attachments: list[bytes]) -> None:
    packed = b"".join(pack([text], attachments))
    again, parts = unpack(packed)
    assert again == text.rstrip(b" "), "without the spaces that only fill up"
    assert [bytes(part) for part in parts] == attachments
    first = struct.unpack_from(">I", packed, 8)[0]
    assert first % 8 == 0, "the first attachment can be used as an array of doubles where it stands"


def test_ipythons_own_layout_is_read() -> None:
    """As `jupyter_server.services.kernels.connection.base.serialize_binary_message` writes it."""
    parts = [b'{"a":1}', b"one", b"", b"three"]
    offsets = [4 * (len(parts) + 1)]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part))
    message = b"".join([struct.pack("!" + "I" * (len(parts) + 1), len(parts), *offsets), *parts])
    text, attachments = unpack(message)
    assert (text, [bytes(a) for a in attachments]) == (parts[0], parts[1:])


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (b"", "too short"),
        (b"\0\0\0\1\0\0", "too short"),
        (struct.pack(">II", 0, 8), "0 parts"),
        (struct.pack(">II", ATTACHMENTS_MAX + 2, 8), "1026 parts"),
        (struct.pack(">II", 2**32 - 1, 8), "4294967295 parts"),
        (struct.pack(">II", 2, 12), "longer than the frame"),
        (frame(b"{}", b"x", offsets=[11, 14]), "offset 0"),
        (frame(b"{}", b"x", offsets=[13, 14]), "offset 0"),
        (frame(b"{}", b"x", offsets=[0, 14]), "offset 0"),
        (frame(b"{}", b"x", offsets=[12, 16]), "part 0"),
        (frame(b"{}", b"x", offsets=[12, 2**32 - 1]), "part 0"),
        (frame(b"{}", b"x", offsets=[12, 11]), "part 0"),
        (frame(b"{}", b"x", b"y", offsets=[16, 19, 18]), "part 1"),
        (frame(b"{}", b"x", b"y", offsets=[16, 18, 21]), "part 1"),
    ],
)
def test_offsets_out_of_range_are_named(bad: bytes, named: str) -> None:
    with pytest.raises(AttachmentError, match=named):
        unpack(bad)


@given(st.binary(max_size=60))
def test_no_bytes_are_too_odd(junk: bytes) -> None:
    try:
        text, parts = unpack(junk)
    except AttachmentError:
        return
    assert 4 * (len(parts) + 2) + len(text) + sum(map(len, parts)) == len(junk), "every byte is in one part"


def test_references_become_base64_where_they_stand() -> None:
    raw = b'{"a":{"$buffer":1},"b":[{ "$buffer" : 0 }],"c":"{\\"$buffer\\":0}","d":{"$buffer":0,"x":1}}'
    expanded = json.loads(expand(raw, [b"zero", b"one"]))
    assert base64.b64decode(expanded["a"]["$base64"]) == b"one"
    assert base64.b64decode(expanded["b"][0]["$base64"]) == b"zero"
    assert expanded["c"] == '{"$buffer":0}', "within a string it is text"
    assert expanded["d"] == {"$buffer": 0, "x": 1}, "with more members it is something else"


@pytest.mark.parametrize("raw", [b'{"$buffer":2}', b'{"$buffer":-1}', b'{"$buffer":1234567}', b'{"$buffer":"0"}'])
def test_references_without_an_attachment_stay(raw: bytes) -> None:
    assert expand(raw, [b"a", b"b"]) == raw


def test_base64_becomes_attachments_behind_those_there_are() -> None:
    raw = b'[{"$base64":"b25l"},{"$buffer":0},{ "$base64" : "" },"{\\"$base64\\":\\"b25l\\"}",{"$base64":5}]'
    text, attachments = collect(raw, [b"zero"])
    assert json.loads(text) == [{"$buffer": 1}, {"$buffer": 0}, {"$buffer": 2}, '{"$base64":"b25l"}', {"$base64": 5}]
    assert [bytes(a) for a in attachments] == [b"zero", b"one", b""]


@pytest.mark.parametrize("text", ["b25", "b=5l", "====", "b25lb", "b2=l"])
def test_what_is_no_base64_is_named(text: str) -> None:
    with pytest.raises(AttachmentError, match="byte 1"):
        collect(b'[{"$base64":"%b"}]' % text.encode(), [])


def test_attachments_are_bounded() -> None:
    one = b'{"$base64":"AA=="}'
    collect(b"[" + b",".join([one] * ATTACHMENTS_MAX) + b"]", [])
    with pytest.raises(AttachmentError, match="more than 1024"):
        collect(b"[" + b",".join([one] * (ATTACHMENTS_MAX + 1)) + b"]", [])


@given(st.lists(st.binary(max_size=50), max_size=4), st.lists(st.integers(0, 5), max_size=12))
def test_the_size_foretold_is_the_size_that_comes(attachments: list[bytes], indices: list[int]) -> None:
    raw = json.dumps([{"$buffer": index} for index in indices], separators=(",", ":")).encode()
    foretold = Body(raw, tuple(attachments)).expanded_size()
    size = len(expand(raw, attachments))
    unused = sum(20 + 2 * len(attachments[index]) for index in set(range(len(attachments))) - set(indices))
    assert size <= foretold <= size + 16 * len(indices) + unused


def test_many_references_to_one_large_attachment_count_each() -> None:
    """A thousand references of 13 bytes each would otherwise become a gigabyte at a peer without binary frames."""
    raw = b"[" + b",".join([b'{"$buffer":0}'] * 1000) + b"]"
    assert Body(raw, (b"x" * 1_000_000,)).expanded_size() > 1_300_000_000


@given(st.lists(st.binary(max_size=30), max_size=4))
def test_there_and_back(attachments: list[bytes]) -> None:
    raw = json.dumps({"parts": [{"$buffer": n} for n in range(len(attachments))]}, separators=(",", ":")).encode()
    text, again = collect(expand(raw, attachments), [])
    assert text == raw
    assert [bytes(a) for a in again] == attachments
