"""Frames by the rules of RFC 6455, and the parser against a slow one that is obviously right."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.wire import frames
from broker.wire.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, FrameParser, Violation

MASK = b"\x01\x02\x03\x04"


def raw_frame(
    opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True, reserved: int = 0
) -> bytes:
    """A frame written out by section 5.2, with nothing of the code under test."""
    first = (0x80 if final else 0) | reserved | opcode
    bit = 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        head = bytes([first, bit | size])
    elif size < 65_536:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if not masked:
        return head + payload
    return head + MASK + bytes(byte ^ MASK[index % 4] for index, byte in enumerate(payload))


def server(**options: object) -> FrameParser:
    return FrameParser(masked=True, **options)  # type: ignore[arg-type]


def code_of(data: bytes, **options: object) -> int | None:
    parser = server(**options)
    parser.feed(data)
    return parser.violation.code if parser.violation else None


def everything(parser: FrameParser, chunks: list[bytes]) -> list[tuple[int, bytes]]:
    events = []
    for chunk in chunks:
        events += parser.feed(chunk)
        while parser.more:
            events += parser.feed(b"")
    return events


# ── one test per rule ──


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("masked", [True, False])
def test_a_whole_frame_of_every_length_form(size: int, masked: bool) -> None:
    payload = bytes(index % 251 for index in range(size))
    parser = FrameParser(masked=masked)
    assert parser.feed(raw_frame(BINARY, payload, masked=masked)) == [(BINARY, payload)]
    assert parser.violation is None


def test_many_frames_in_one_chunk_come_in_order() -> None:
    data = raw_frame(TEXT, b"a") + raw_frame(PING, b"p") + raw_frame(BINARY, b"b") + raw_frame(PONG)
    assert server().feed(data) == [(TEXT, b"a"), (PING, b"p"), (BINARY, b"b"), (PONG, b"")]


def test_fragments_are_joined_and_control_frames_come_between() -> None:
    data = raw_frame(TEXT, b"ab", final=False) + raw_frame(PING, b"x") + raw_frame(CONTINUATION, b"", final=False)
    data += raw_frame(CONTINUATION, b"cd")
    assert server().feed(data) == [(PING, b"x"), (TEXT, b"abcd")]


def test_text_cut_inside_a_character_is_joined() -> None:
    raw = "κόσμε €".encode()
    data = raw_frame(TEXT, raw[:1], final=False) + raw_frame(CONTINUATION, raw[1:3], final=False)
    assert server().feed(data + raw_frame(CONTINUATION, raw[3:])) == [(TEXT, raw)]


@pytest.mark.parametrize("reserved", [0x10, 0x20, 0x40, 0x70])
@pytest.mark.parametrize("opcode", [TEXT, PING])
def test_reserved_bits_are_refused(reserved: int, opcode: int) -> None:
    assert code_of(raw_frame(opcode, b"x", reserved=reserved)) == 1002


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_reserved_opcodes_are_refused(opcode: int) -> None:
    assert code_of(raw_frame(opcode)) == 1002


def test_an_unmasked_frame_of_a_client_is_refused() -> None:
    parser = server()
    assert parser.feed(raw_frame(TEXT, b"x", masked=False)) == []
    assert parser.violation == Violation(1002, "a client must mask its frames")


def test_a_masked_frame_of_a_server_is_refused() -> None:
    parser = FrameParser(masked=False)
    assert parser.feed(raw_frame(TEXT, b"x", masked=True)) == []
    assert parser.violation == Violation(1002, "a server must not mask its frames")


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_a_fragmented_control_frame_is_refused(opcode: int) -> None:
    assert code_of(raw_frame(opcode, b"", final=False)) == 1002


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_a_control_frame_of_126_bytes_is_refused_at_its_header(opcode: int) -> None:
    assert code_of(raw_frame(opcode, b"\x03\xe8" + b"x" * 124)[:2]) == 1002
    assert code_of(raw_frame(opcode, b"\x03\xe8" + b"x" * 123)) is None


def test_a_continuation_of_nothing_is_refused() -> None:
    assert code_of(raw_frame(CONTINUATION, b"x")) == 1002
    assert code_of(raw_frame(TEXT, b"x") + raw_frame(CONTINUATION, b"x")) == 1002


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_a_message_inside_a_message_is_refused(opcode: int) -> None:
    assert code_of(raw_frame(TEXT, b"x", final=False) + raw_frame(opcode, b"y")) == 1002


@pytest.mark.parametrize(
    "head",
    [b"\x82\xfe\x00\x7d", b"\x82\xff" + (65_535).to_bytes(8, "big"), b"\x82\xff" + (5).to_bytes(8, "big")],
)
def test_a_length_not_written_in_the_shortest_form_is_refused(head: bytes) -> None:
    assert code_of(head) == 1002


def test_a_length_with_its_first_bit_set_is_refused() -> None:
    assert code_of(b"\x82\xff" + (1 << 63).to_bytes(8, "big")) == 1002


def test_a_length_of_one_tebibyte_is_refused_at_the_header_and_never_buffered() -> None:
    parser = server()
    assert parser.feed(b"\x82\xff" + (1 << 40).to_bytes(8, "big")) == []
    assert parser.violation is not None
    assert parser.violation.code == 1009
    assert parser.feed(b"x" * 1000) == []


def test_the_message_bound_counts_all_fragments() -> None:
    bound = {"message_max_bytes": 1000}
    assert code_of(raw_frame(BINARY, b"x" * 1000), **bound) is None
    assert code_of(raw_frame(BINARY, b"x" * 1001), **bound) == 1009
    begun = raw_frame(BINARY, b"x" * 600, final=False)
    assert code_of(begun + raw_frame(CONTINUATION, b"x" * 400), **bound) is None
    assert code_of(begun + raw_frame(CONTINUATION, b"x" * 401)[:8], **bound) == 1009


def test_the_bound_must_leave_room_for_control_frames() -> None:
    with pytest.raises(ValueError, match="message_max_bytes is 124"):
        server(message_max_bytes=124)


def test_endless_empty_continuations_are_refused() -> None:
    begun = raw_frame(TEXT, b"", final=False)
    more = raw_frame(CONTINUATION, b"", final=False)
    assert code_of(begun + more * 99, fragments_max=100) is None
    assert code_of(begun + more * 100, fragments_max=100) == 1009


def test_a_hundred_thousand_fragments_are_one_message() -> None:
    data = raw_frame(TEXT, b"x", final=False) + raw_frame(CONTINUATION, b"y", final=False) * 99_998
    assert server().feed(data + raw_frame(CONTINUATION, b"z")) == [(TEXT, b"x" + b"y" * 99_998 + b"z")]


@pytest.mark.parametrize("raw", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"ok\xce"])
def test_text_that_is_not_utf8_is_refused(raw: bytes) -> None:
    assert code_of(raw_frame(TEXT, raw)) == 1007
    assert code_of(raw_frame(TEXT, raw[:1], final=False) + raw_frame(CONTINUATION, raw[1:])) == 1007
    assert code_of(raw_frame(TEXT, raw + b"x" * 126)) == 1007
    assert code_of(raw_frame(BINARY, raw)) is None


def test_wrong_text_is_refused_before_its_frame_is_whole() -> None:
    frame = raw_frame(TEXT, b"good \xff" + b"x" * 100)
    assert code_of(frame[:11]) is None
    assert code_of(frame[:12]) == 1007


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 4999])
def test_close_codes_that_may_be_sent(code: int) -> None:
    payload = code.to_bytes(2, "big") + "adiós".encode()
    parser = server()
    assert parser.feed(raw_frame(CLOSE, payload)) == [(CLOSE, payload)]
    assert frames.parse_close(payload) == (code, "adiós")
    assert frames.close_payload(code, "adiós") == payload


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535])
def test_close_codes_that_must_not_be_sent(code: int) -> None:
    assert code_of(raw_frame(CLOSE, code.to_bytes(2, "big"))) == 1002
    if code != 1005:
        with pytest.raises(ValueError, match=f"close code {code} "):
            frames.close_payload(code)


def test_an_empty_close_frame_is_one_without_a_code() -> None:
    assert server().feed(raw_frame(CLOSE)) == [(CLOSE, b"")]
    assert frames.parse_close(b"") == (1005, "")
    assert frames.close_payload(1005) == b""


def test_a_close_frame_of_one_byte_is_refused() -> None:
    assert code_of(raw_frame(CLOSE, b"\x03")) == 1002


def test_a_close_reason_that_is_not_utf8_is_refused() -> None:
    assert code_of(raw_frame(CLOSE, b"\x03\xe8\xff")) == 1007


def test_nothing_is_looked_at_after_a_close_frame_or_a_violation() -> None:
    parser = server()
    assert parser.feed(raw_frame(CLOSE) + raw_frame(TEXT, b"x") + b"\xff\xff") == [(CLOSE, b"")]
    assert parser.feed(raw_frame(TEXT, b"x")) == []
    assert parser.violation is None
    assert parser.ended
    parser = server()
    assert parser.feed(raw_frame(TEXT, b"x") + raw_frame(3) + raw_frame(TEXT, b"y")) == [(TEXT, b"x")]
    assert parser.feed(raw_frame(TEXT, b"z")) == []


def test_a_flood_of_frames_comes_out_in_bounded_turns() -> None:
    parser = server(events_max=10)
    events = parser.feed(raw_frame(TEXT, b"x") * 25)
    assert (len(events), parser.more) == (10, True)
    assert (len(parser.feed(b"")), parser.more) == (10, True)
    assert (len(parser.feed(b"")), parser.more) == (5, False)
    exact = server(events_max=10)
    assert (len(exact.feed(raw_frame(PING) * 10)), exact.more) == (10, False)


def test_an_incomplete_large_frame_holds_only_what_came() -> None:
    parser = server()
    parser.feed(b"\x82\xff" + (16 << 20).to_bytes(8, "big") + MASK + b"x" * 1000)
    assert parser._message is not None
    assert parser._message.__sizeof__() < 10_000


def test_a_long_close_reason_is_cut_between_characters() -> None:
    payload = frames.close_payload(1000, "€" * 100)
    assert payload[2:].decode() == "€" * 41
    assert len(payload) <= 125


# ── builders ──


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536, 1 << 20])
def test_built_frames_are_those_of_the_specification(size: int) -> None:
    payload = b"x" * size
    assert frames.text_frame(payload) == raw_frame(TEXT, payload, masked=False)
    assert frames.binary_frame(payload) == raw_frame(BINARY, payload, masked=False)
    assert frames.masked_frame(TEXT, payload, MASK) == raw_frame(TEXT, payload)


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_masking_is_exclusive_or(data: bytes, mask: bytes) -> None:
    from tornado.speedups import websocket_mask

    expected = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
    assert frames.xor_mask(mask, data) == expected == websocket_mask(mask, data)


# ── the parser against a reference ──

MESSAGE_MAX = 200
FRAGMENTS_MAX = 5


class Refused(Exception):
    """Carries a close code."""


def reference(data: bytes, masked: bool) -> tuple[list[tuple[int, bytes]], int | None]:
    """Read all of ``data`` frame by frame; slow, and written from the RFC's text."""
    events: list[tuple[int, bytes]] = []
    pieces: list[bytes] = []
    kind = 0
    at = 0
    try:
        while True:
            if len(data) < at + 2:
                return events, None
            final, reserved, opcode = data[at] >> 7, data[at] >> 4 & 7, data[at] & 15
            has_mask, size = bool(data[at + 1] >> 7), data[at + 1] & 127
            control = opcode >= 8
            wrong_head = reserved or opcode not in {0, 1, 2, 8, 9, 10} or has_mask != masked
            wrong_control = control and (not final or size > 125)
            wrong_order = not control and (opcode == 0) != (kind != 0)
            if wrong_head or wrong_control or wrong_order:
                raise Refused(1002)
            at += 2
            if size >= 126:
                wide = 2 if size == 126 else 8
                if len(data) < at + wide:
                    return events, None
                size = int.from_bytes(data[at : at + wide], "big")
                if size < (126 if wide == 2 else 65_536) or size >= 1 << 63:
                    raise Refused(1002)
                at += wide
            if not control and sum(map(len, pieces)) + size > MESSAGE_MAX:
                raise Refused(1009)
            if opcode == 0 and len(pieces) >= FRAGMENTS_MAX:
                raise Refused(1009)
            mask = data[at : at + 4] if masked else bytes(4)
            if len(mask) < 4:
                return events, None
            at += 4 if masked else 0
            payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data[at : at + size]))
            whole = len(payload) == size
            at += size
            if control:
                if not whole:
                    return events, None
                if opcode == 8:
                    check_close(payload)
                events.append((opcode, payload))
                if opcode == 8:
                    return events, None
                continue
            kind = kind or opcode
            pieces.append(payload)
            message = b"".join(pieces)
            if kind == 1:
                check_text(message, whole=bool(final and whole))
            if not whole:
                return events, None
            if final:
                events.append((kind, message))
                pieces, kind = [], 0
    except Refused as refused:
        return events, refused.args[0]


def check_text(message: bytes, whole: bool) -> None:
    try:
        message.decode()
    except UnicodeDecodeError as error:
        # A cut character at the end may still be completed, unless the message is whole.
        if whole or error.reason != "unexpected end of data":
            raise Refused(1007) from None


def check_close(payload: bytes) -> None:
    if not payload:
        return
    code = int.from_bytes(payload[:2], "big")
    allowed = {1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, *range(3000, 5000)}
    if len(payload) == 1 or code not in allowed:
        raise Refused(1002)
    check_text(payload[2:], whole=True)


PAYLOADS = st.one_of(
    st.binary(max_size=20),
    st.text(max_size=20).map(str.encode),
    st.text(alphabet="aé€😀", min_size=1, max_size=20).map(str.encode),
    st.integers(0, 210).map(lambda size: b"x" * size),
    st.integers(900, 5100).map(lambda code: code.to_bytes(2, "big")),
)
GOOD_FRAMES = st.builds(
    raw_frame, st.sampled_from([TEXT, BINARY, CLOSE, PING, PONG, PING, PONG]), PAYLOADS, masked=st.just(True)
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A fragmented message, mostly right, with control frames between."""
    pieces = draw(st.lists(PAYLOADS, min_size=1, max_size=6))
    data = b""
    for index, piece in enumerate(pieces):
        opcode = draw(st.sampled_from([TEXT, BINARY])) if index == 0 else CONTINUATION
        data += raw_frame(opcode, piece, final=index == len(pieces) - 1)
        if draw(st.integers(0, 4)) == 0:
            data += raw_frame(PING, b"p")
    return data


WILD_FRAMES = st.builds(
    raw_frame,
    st.integers(0, 15),
    PAYLOADS,
    final=st.booleans(),
    masked=st.sampled_from([True, True, True, False]),
    reserved=st.sampled_from([0, 0, 0, 0, 0x40]),
)
LONG_HEADS = st.sampled_from(
    [b"\x82\xfe\x00\x05", b"\x82\xff" + bytes(8), b"\x81\xff" + b"\xff" * 8, b"\x81\xff" + (1 << 40).to_bytes(8, "big")]
)
STREAMS = st.lists(st.one_of(GOOD_FRAMES, messages(), WILD_FRAMES, LONG_HEADS, st.binary(max_size=8)), max_size=12).map(
    b"".join
)


@settings(max_examples=600, deadline=None)
@given(
    data=STREAMS, cuts=st.lists(st.integers(1, 40), max_size=80), events_max=st.integers(1, 20), masked=st.booleans()
)
def test_the_parser_agrees_with_the_reference_however_the_bytes_are_cut(
    data: bytes, cuts: list[int], events_max: int, masked: bool
) -> None:
    chunks = []
    at = 0
    for cut in cuts:
        chunks.append(data[at : at + cut])
        at += cut
    chunks.append(data[at:])
    parser = FrameParser(
        masked=masked, message_max_bytes=MESSAGE_MAX, fragments_max=FRAGMENTS_MAX, events_max=events_max
    )
    events = everything(parser, chunks)
    code = parser.violation.code if parser.violation else None
    assert (events, code) == reference(data, masked)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([TEXT, BINARY]), st.text(max_size=150).map(str.encode)), max_size=20))
def test_what_a_client_end_sends_is_what_a_server_end_hears(sent: list[tuple[int, bytes]]) -> None:
    data = b"".join(frames.masked_frame(opcode, payload, MASK) for opcode, payload in sent)
    assert everything(server(events_max=3), [data]) == sent
    plain = b"".join(frames.frame_header(opcode, len(payload)) + payload for opcode, payload in sent)
    assert everything(FrameParser(masked=False, events_max=3), [plain]) == sent
