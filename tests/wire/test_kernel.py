"""Kernel messages over WebSockets: golden bytes of both layouts, round trips, and frames that lie."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.wire.attachments import ATTACHMENTS_MAX
from broker.wire.kernel import (
    CHANNELS,
    KernelMessage,
    KernelMessageError,
    read_header,
    read_json,
    read_legacy,
    read_v1,
    write_legacy,
    write_v1,
)
from tests.wire.jupyter import GOLDEN, of_format

V1_FORMAT, LEGACY_FORMAT = "v1.kernel.websocket.jupyter.org", "serialize_binary_message"
OBJECTS = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3).map(
    lambda value: json.dumps(value).encode()
)
HEADERS = st.builds(
    lambda *given: json.dumps(dict(zip(("msg_id", "msg_type"), given, strict=True))).encode(),
    st.text(max_size=5).filter(str.isprintable),
    st.text(max_size=5).filter(str.isprintable),
)
MESSAGES = st.builds(
    KernelMessage, st.sampled_from(CHANNELS), HEADERS, OBJECTS, OBJECTS, OBJECTS,
    st.lists(st.binary(max_size=20), max_size=4).map(tuple),
)  # fmt: skip
TEXTS = ("header", "parent_header", "metadata", "content")


def decoded(message: KernelMessage) -> dict[str, Any]:
    return {
        **{name: json.loads(getattr(message, name)) for name in TEXTS},
        "channel": message.channel,
        "buffers": [bytes(buffer).hex() for buffer in message.buffers],
    }


def v1(*parts: bytes, count: int | None = None, offsets: list[int] | None = None) -> bytes:
    real = [8 * (len(parts) + 2)]
    for part in parts:
        real.append(real[-1] + len(part))
    offsets = real if offsets is None else offsets
    return struct.pack(f"<{len(offsets) + 1}Q", len(real) if count is None else count, *offsets) + b"".join(parts)


GOOD = (b"shell", b'{"msg_id":"m1"}', b"{}", b"{}", b"{}")
GOLDEN_V1 = [
    vector
    for where in ("vectors", "vectors_from_jupyterlab")
    for vector in of_format(V1_FORMAT, where)
    if "via_pack" not in vector["name"]
]


@pytest.mark.parametrize("vector", GOLDEN_V1, ids=lambda v: f"{v['name']}-{'lab' if 'produced_by' in v else 'server'}")
def test_golden_frames_of_v1(vector: dict[str, Any]) -> None:
    frame = bytes.fromhex(vector["hex"])
    message = read_v1(frame)
    original = next(v for v in of_format(V1_FORMAT) if v["name"] == vector["name"])
    assert decoded(message) == original["msg"]
    assert b"".join(write_v1(message)) == frame, "byte for byte"


@pytest.mark.parametrize("vector", of_format(LEGACY_FORMAT), ids=lambda vector: str(vector["name"]))
def test_golden_frames_of_the_server_without_a_subprotocol(vector: dict[str, Any]) -> None:
    assert decoded(read_legacy(bytes.fromhex(vector["hex"]))) == vector["msg"]


@pytest.mark.parametrize("vector", of_format(LEGACY_FORMAT, "vectors_from_jupyterlab"), ids=lambda v: str(v["name"]))
def test_golden_frames_of_jupyterlab_without_a_subprotocol(vector: dict[str, Any]) -> None:
    message = read_legacy(vector["text"] if vector["frame"] == "text" else bytes.fromhex(vector["hex"]))
    original = next(v for v in of_format(LEGACY_FORMAT) if v["name"] == vector["name"])
    assert decoded(message) == original["msg"]
    pieces, binary = write_legacy(message)
    assert binary == (vector["frame"] == "binary")
    header = original["msg"]["header"]
    assert b'"msg_id":"%b","msg_type":"%b"' % (header["msg_id"].encode(), header["msg_type"].encode()) in b"".join(
        pieces
    )


@given(MESSAGES)
def test_v1_comes_back(message: KernelMessage) -> None:
    assert read_v1(b"".join(write_v1(message))) == message


@given(MESSAGES)
def test_legacy_comes_back(message: KernelMessage) -> None:
    pieces, binary = write_legacy(message)
    frame = b"".join(pieces)
    assert binary == bool(message.buffers), "JupyterLab refuses binary frames without buffers"
    assert decoded(read_legacy(frame if binary else frame.decode())) == decoded(message)


@given(MESSAGES)
def test_a_message_goes_through_the_brokers_json_and_back(message: KernelMessage) -> None:
    assert read_json(message.json(), message.channel, message.buffers) == message


@given(
    st.binary(max_size=120) | st.builds(lambda n, rest: struct.pack("<Q", n) + rest, st.integers(6, 12), st.binary())
)
def test_random_bytes_are_refused(frame: bytes) -> None:
    for read in (read_v1, read_legacy):
        with pytest.raises(KernelMessageError):
            read(frame)


@given(MESSAGES, st.data())
def test_a_truncated_frame_is_refused(message: KernelMessage, data: st.DataObject) -> None:
    frame = b"".join(write_v1(message))
    with pytest.raises(KernelMessageError):
        read_v1(frame[: data.draw(st.integers(0, len(frame) - 1))])
    with pytest.raises(KernelMessageError, match="last offset"):
        read_v1(frame + b"x")


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        (b"", "too short"),
        (bytes(7), "too short"),
        (struct.pack("<Q", 1_000_000), "1000000 offsets"),
        (struct.pack("<Q", 2**64 - 1) * 3, "18446744073709551615 offsets"),
        (struct.pack("<Q", 6), "table of 6 offsets is longer"),
        (v1(*GOOD, count=0), "0 offsets"),
        (v1(*GOOD, count=5), "5 offsets"),
        (v1(*GOOD, count=7 + ATTACHMENTS_MAX), "offsets are not between"),
        (v1(*GOOD, offsets=[55, 61, 76, 78, 80, 82]), "offset 0 is 55"),
        (v1(*GOOD, offsets=[0, 61, 76, 78, 80, 82]), "offset 0 is 0"),
        (v1(*GOOD, offsets=[56, 61, 76, 78, 80, 83]), "last offset is 83"),
        (v1(*GOOD, offsets=[56, 61, 76, 78, 80, 2**63]), "last offset"),
        (v1(*GOOD, offsets=[56, 61, 99, 78, 80, 82]), "part 2 begins at 99"),
        (v1(b"nowhere", *GOOD[1:]), "no channel 'nowhere'"),
        (v1(b"", *GOOD[1:]), "no channel ''"),
        (v1(b"\xff" * 99, *GOOD[1:]), "no channel"),
        (v1(b"shell", b"", *GOOD[2:]), "header is no JSON"),
        (v1(b"shell", b"[]", *GOOD[2:]), "header is no JSON object"),
        (v1(b"shell", b'{}, "x": {}', *GOOD[2:]), "header is no JSON"),
        (v1(b"shell", b"{}", b"\xff", b"{}", b"{}"), "parent_header is no JSON"),
        (v1(b"shell", b"{}", b"{}", b'{"a":"\xff"}', b"{}"), "metadata is no JSON"),
        (v1(b"shell", b"{}", b"{}", b"{}", b'{"a":' * 200_000), "content is no JSON"),
    ],
)
def test_a_frame_of_v1_that_is_none(frame: bytes, named: str) -> None:
    with pytest.raises(KernelMessageError, match=named):
        read_v1(frame)


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ("{}", "header"),
        ('{"header":{}}{', "no JSON object"),
        ('{"header":[]}', "header is no JSON object"),
        ('{"header":{},"content":"x"}', "content is no JSON object"),
        ('{"header":{},"channel":"nowhere"}', "no channel"),
        ('{"header":{},"channel":7}', "no JSON object"),
        ('{"header":{"a":"\udc80"}}', "no JSON object"),
        ('{"a":' * 200_000, "no JSON object"),
        (b"", "too short"),
        (struct.pack(">I", 1_000_000), "too short"),
        (struct.pack(">II", 1_000_000, 8), "1000000 parts"),
        (struct.pack(">II", 2, 12), "longer than the frame"),
        (struct.pack(">II", 1, 9) + b" {}", "offset 0"),
        (struct.pack(">II", 1, 8) + b'{"header":{"a":"\xff"}}', "no JSON object"),
    ],
)
def test_a_frame_without_a_subprotocol_that_is_none(frame: str | bytes, named: str) -> None:
    with pytest.raises(KernelMessageError, match=named):
        read_legacy(frame)


def test_what_upstream_cannot_read_is_refused_too() -> None:
    rows = GOLDEN["malformed_input_upstream_behaviour"]
    assert len(rows) == 11
    for layout, _name, frame, _what in rows:
        with pytest.raises(KernelMessageError):
            (read_v1 if layout == "v1" else read_legacy)(bytes.fromhex(frame))


def test_no_channel_means_the_shell() -> None:
    assert read_legacy('{"header":{"msg_id":"1"},"parent_header":{},"content":{}}').channel == "shell"


def test_what_matters_of_a_header() -> None:
    header = read_header(b'{"msg_id":"m","msg_type":"status","session":"s","date":"x"}')
    assert (header.msg_id, header.msg_type, header.session) == ("m", "status", "s")
    for bad in (b"{}", b'{"msg_id":1,"msg_type":"x"}', b"["):
        with pytest.raises(KernelMessageError, match="header is none"):
            read_header(bad)


def test_buffers_stay_views_of_the_frame() -> None:
    frame = b"".join(write_v1(KernelMessage("iopub", *GOOD[1:], buffers=(b"x" * 1000,))))
    buffer = read_v1(frame).buffers[0]
    assert isinstance(buffer, memoryview)
    assert buffer.obj is frame
