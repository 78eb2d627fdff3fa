"""What is read and written in C against the Python that it takes over from: the same comes out, byte for byte."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.errors import ENDED_OK, WORKER_ERROR, Outcome
from broker.core.events import Answered, Asked
from broker.core.messages import DEFAULT_OPTIONS, Body, Call, CancelAttempt, End, Message, Options, ReplyMeta, Timing
from broker.core.pending import Attempt, Request
from broker.core.sessions import Session
from broker.links.compiled import core
from broker.links.loop import LoopLinks
from broker.links.socket import SocketLink
from broker.wire import jsonrpc, native
from broker.wire.frames import TEXT, FrameParser, frame_header
from broker.wire.jsonrpc import BadMessage, JsonRpc
from tests.wire.test_frames import STREAMS, raw_frame
from tests.wire.test_jsonrpc_fuzz import NoSession
from tests.wire.test_jsonrpc_fuzz import messages as envelopes

if core() != "compiled core":
    pytest.skip("there is no compiled core here", allow_module_level=True)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "800"))
MESSAGE_MAX = 70_000
SESSION = cast("Session", NoSession())


def new_reader(*, masked: bool = True, events_max: int = 512, message_max: int = MESSAGE_MAX) -> native.Reader:
    return native.Reader(masked, message_max, events_max)


# ---------------------------------------------------------------- frames


def heard(parser: FrameParser, chunks: list[bytes], shared: memoryview | None = None) -> list[tuple[object, ...]]:
    """Everything a parser says: the events of each chunk as a whole, and how it stands in the end."""
    events: list[object] = []
    for chunk in chunks:
        if shared is None:
            events += parser.feed(chunk)
        else:  # as SocketLink does it
            rest = parser.rest
            shared[: len(rest)] = rest
            shared[len(rest) : len(rest) + len(chunk)] = chunk
            events += parser.feed_buffer(shared, len(rest) + len(chunk))
        while parser.more:
            events += parser.feed(b"")
    return [("events", *events), ("violation", parser.violation), ("ended", parser.ended)]


def check_frames(data: bytes, cuts: list[int], events_max: int, masked: bool) -> None:
    chunks, at = [], 0
    for cut in cuts:
        chunks.append(data[at : at + cut])
        at += cut
    chunks.append(data[at:])
    expected = heard(FrameParser(masked=masked, message_max_bytes=MESSAGE_MAX, events_max=events_max), chunks)
    for shared in (None, memoryview(bytearray(len(data) + 10))):
        parser = FrameParser(
            masked=masked,
            message_max_bytes=MESSAGE_MAX,
            events_max=events_max,
            reader=new_reader(masked=masked, events_max=events_max),
        )
        assert heard(parser, chunks, shared) == expected


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    data=STREAMS, cuts=st.lists(st.integers(1, 40), max_size=80), events_max=st.integers(1, 20), masked=st.booleans()
)
def test_frames_cut_anywhere_come_out_alike(data: bytes, cuts: list[int], events_max: int, masked: bool) -> None:
    check_frames(data, cuts, events_max, masked)


SIZES = [0, 1, 7, 8, 15, 16, 17, 125, 126, 127, 4_000, 16_384, 65_535, 65_536, MESSAGE_MAX, MESSAGE_MAX + 1]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cut", [5_000, 65_536, 1 << 20])
@pytest.mark.parametrize("fill", [b"a", "é".encode(), b"\xff", "\U0001f600".encode(), b"\xed\xa0\x80"])
def test_frames_of_every_size_come_out_alike(masked: bool, cut: int, fill: bytes) -> None:
    for size in SIZES:
        payload = (fill * (size // len(fill) + 1))[:size]
        data = raw_frame(TEXT, b"before", masked=masked) + raw_frame(TEXT, payload, masked=masked)
        data += raw_frame(2, payload, masked=masked) + raw_frame(TEXT, b"behind", masked=masked)
        check_frames(data, [cut] * (len(data) // cut), 512, masked)


def test_lengths_that_lie_are_left_to_the_rules() -> None:
    heads = [
        b"\x81\xfe\x00\x7d",
        b"\x81\xff" + (65_535).to_bytes(8, "big"),
        b"\x81\xff" + (1 << 63).to_bytes(8, "big"),
        b"\x81\xff" + ((1 << 63) - 1).to_bytes(8, "big"),
        b"\x81\xff" + (1 << 62).to_bytes(8, "big"),
        b"\x81\xff" + b"\xff" * 8,
    ]
    for head in heads:
        events: list[Any] = []
        data = head + b"mask" + b"x" * 200
        assert new_reader(message_max=(1 << 63) - 1).read(data, 0, len(data), events) == 0
        assert events == []
        check_frames(raw_frame(TEXT, b"a") + data, [1], 9, True)


def test_a_frame_cut_off_waits_whole_for_its_rest_if_it_is_right_so_far() -> None:
    buffer = memoryview(bytearray(200_000))

    def fed(frame: bytes, size: int) -> FrameParser:
        parser = FrameParser(masked=True, reader=new_reader())
        buffer[:size] = frame[:size]
        assert parser.feed_buffer(buffer, size) == []
        return parser

    frame = raw_frame(TEXT, b"x" * 16_384)
    assert fed(frame, 5_000).rest == frame[:5_000]
    assert fed(frame, 4_000).rest == b""  # so little came at once: it is collected by the rules
    assert fed(raw_frame(TEXT, b"x" * 65_530), 5_000).rest == b""  # larger than what is put in front
    assert fed(raw_frame(TEXT, "é".encode() * 9_000), 5_000).rest == b""
    wrong = fed(raw_frame(TEXT, b"\xff" * 16_384), 5_000)
    assert wrong.violation is not None and wrong.violation.code == 1007  # before it is whole (section 8.1)


def test_data_that_may_be_written_to_is_left_masked_where_python_goes_on() -> None:
    good, wrong = raw_frame(TEXT, b"good"), raw_frame(TEXT, b"\xff\xfe" * 40)
    buffer = bytearray(good + wrong)
    events: list[Any] = []
    assert new_reader().read(buffer, 0, len(buffer), events) == len(good)
    assert events == [(TEXT, b"good")]
    assert buffer[len(good) :] == wrong


# ---------------------------------------------------------------- messages

METHODS = ["m", "lab/m", "broker.ping", "A1", "a.b-c_d"]


class Both:
    """One codec that reads by itself, and one before which the compiled reader stands; both know all methods."""

    def __init__(self, endpoint: str, defaults: Options = DEFAULT_OPTIONS) -> None:
        self.codecs = [
            JsonRpc(node="node", session_id=7, endpoint=endpoint, defaults=defaults) for _ in ("pure", "native")
        ]
        for codec in self.codecs:
            codec.session = SESSION
            for method in METHODS:
                try:
                    codec.decode(b'{"jsonrpc":"2.0","id":1,"method":"%b","params":[]}' % method.encode())
                except BadMessage:
                    continue
        self.reader = new_reader()
        self.codecs[1].read_by(self.reader)

    def read(self, text: bytes) -> tuple[object, object, bool]:
        """What each makes of it, and whether it went through C."""
        events: list[Any] = []
        frame = raw_frame(TEXT, text)
        assert self.reader.read(frame, 0, len(frame), events) == len(frame)
        (event,) = events
        through = type(event) is not tuple
        if not through:
            assert event == (TEXT, text)
        return comes(self.codecs[0], text), plain(event) if through else comes(self.codecs[1], text), through

    def agree(self, text: bytes) -> bool:
        pure, other, through = self.read(text)
        assert other == pure
        return through


def comes(codec: JsonRpc, text: bytes) -> object:
    try:
        return plain(codec.decode(text))
    except BadMessage as bad:
        return "bad", str(bad), bad.strike, bad.answer


def plain(event: object) -> object:
    """An event as values that can be compared: text that is passed on as bytes, and the types of all."""
    if not isinstance(event, msgspec.Struct):
        return event
    fields = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, Body):
            value = bytes(value.raw), value.attachments
        fields[name] = type(value), value
    return type(event), fields


@settings(max_examples=EXAMPLES, deadline=None)
@given(envelopes(), st.sampled_from(["", "lab"]))
def test_messages_of_any_shape_mean_the_same(text: bytes, endpoint: str) -> None:
    Both(endpoint).agree(text)


@settings(max_examples=EXAMPLES, deadline=None)
@given(envelopes(), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.binary(max_size=3)), max_size=3))
def test_messages_with_bytes_gone_wrong_mean_the_same(text: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    for at, gone, put in changes:
        text = text[:at] + put + text[at + gone :]
    try:
        text.decode()
    except UnicodeDecodeError:
        return  # frames are checked for UTF-8 before
    Both("lab").agree(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
AGREED = Both("lab")


@settings(max_examples=EXAMPLES, deadline=None)
@given(JSON, st.sampled_from([None, 1, 3]), st.booleans(), st.sampled_from(['"id":1,"method":"m","params"', "result"]))
def test_json_of_any_shape_is_passed_on_alike(value: object, indent: int | None, ascii: bool, member: str) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    head = member if member != "result" else '"id":"node-7-12","result"'
    AGREED.agree(f'{{"jsonrpc":"2.0",{head}:{text}}}'.encode(errors="replace"))


PIECES = [
    b'"', b"\\", b"\\u", b"\\ud83d", b"\\ude00", b"\\u0000", b"\\u00e9", b"\\n", b"\\/", b"\\x", b"\x00", b"\x1f",
    b"\x7f", "é".encode(), "\U0001f600".encode(), b"{", b"}", b"[", b"]", b",", b":", b" ", b"\t", b"\r", b"\n",
    b"\x0b",
    b"0", b"-", b"1", b"00", b".", b"e", b"E+", b"1e999", b"-0", b"0.5e-3", b"9" * 40, b"true", b"false", b"null",
    b"nul", b"NaN", b"Infinity", b'"a"', b'"a":1', b'"$base64"', b'{"$base64":"QQ=="}', b'{"$buffer":0}', b"x" * 20,
    b"a" * 15 + b'"', b"[" * 63 + b"]" * 63, b"[" * 65 + b"]" * 65, b"//", b"/*", b"'",
]  # fmt: skip


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7), st.booleans(), st.booleans())
def test_hostile_values_are_judged_alike(pieces: list[bytes], quoted: bool, reply: bool) -> None:
    value = b"".join(pieces)
    value = b'"%b"' % value if quoted else value
    if reply:
        AGREED.agree(b'{"jsonrpc":"2.0","id":"node-7-12","result":%b}' % value)
    else:
        AGREED.agree(b'{"jsonrpc":"2.0","id":1,"method":"m","params":%b}' % value)


CORPUS = [
    b'{"jsonrpc":"2.0","id":%b,"method":"m","params":[]}' % wire_id
    for wire_id in (
        b"0", b"00", b"-1", b"-0", b"1.0", b"1e1", b"9" * 18, b"9" * 19, b"9" * 20, b"9" * 21, b"18446744073709551615",
        b'""', b'"a"', b'"%b"' % (b"x" * 128), b'"%b"' % (b"x" * 129), b'"%b"' % ("é".encode() * 64), b'"\\u0061"',
        b'"a\\"b"', b'"node-7-1"', b"null", b"true", b"[]", b"{}", b'"\x01"', b'"$base64"', b'"a" ', b"1 2",
    )
] + [
    b'{"jsonrpc":"2.0","id":%b,"result":1}' % wire_id
    for wire_id in (
        b'"node-7-1"', b'"node-7-"', b'"node-7-01"', b'"node-7--1"', b'"node-7-1x"', b'"node-7-%b"' % (b"9" * 18),
        b'"node-7-%b"' % (b"9" * 19), b'"node-8-1"', b'"node-77-1"', b'"node-7"', b'"node\\u002d7-1"', b"7", b"null",
        '"node-7-١"'.encode(),
    )
] + [
    b'{"jsonrpc":"2.0","id":1,"method":%b,"params":[]}' % method
    for method in (
        b'"m"', b'"\\u006d"', b'"m\\u0000"', b'"lab/m"', b'"unknown"', b'"broker.ping"', b'"$/x"', b'""', b'"M"',
        "\"m\u0301\"".encode(), b'"m ', b"1", b"null", b'"%b"' % (b"m" * 200),
    )
] + [
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":{},"meta":%b}' % meta
    for meta in (
        b"{}", b"null", b"1", b'{"timeout":5}', b'{ "timeout" : 5 }', b'{"timeout":5.0}', b'{"timeout":0.0005}',
        b'{"timeout":0}', b'{"timeout":-1}', b'{"timeout":1e3}', b'{"timeout":1e999}', b'{"timeout":1e-9}',
        b'{"timeout":"5"}', b'{"timeout":true}', b'{"timeout":null}', b'{"timeout":5,"timeout":6}',
        b'{"timeout":5,"wait":true}', b'{"timeout":12345678901234567890}', b'{"timeout":29.9998}', b'{"timeout":05}',
        b'{"timeout":1000000001}', b'{"timeout":5,}', b'{"timeout"}', b'{"x":1}', b'{"timeout":5}}', b'{"timeout":5',
    )
] + [
    b"", b"{", b"{}", b"[]", b"1", b'{"jsonrpc"', b'{"jsonrpc":"2.0"}', b'{"jsonrpc":"2.0","id":1}',
    b'{"jsonrpc":"2.0","id":1,"method":"m"}', b'{"jsonrpc":"2.0","method":"m","params":[]}',
    b'{"jsonrpc":"2.0","jsonrpc":"2.0","id":1,"method":"m","params":[]}',
    b'{"jsonrpc":"2.0","id":1,"id":1,"method":"m","params":[]}',
    b'{"jsonrpc":"2.0","id":1,"method":"m","method":"m","params":[]}',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":[],"params":[]}',
    b'{"jsonrpc":"2.0","id":"node-7-1","result":1,"result":1}',
    b'{"jsonrpc":"2.0","id":"node-7-1","result":1,"error":null}',
    b'{"jsonrpc":"2.0","id":"node-7-1","result":1,"error":{"code":1,"message":"x"}}',
    b'{"jsonrpc":"2.0","id":"node-7-1","result":1,"params":[]}',
    b'{"jsonrpc":"2.0","id":"node-7-1","result":1,"meta":{"timeout":5}}',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":[],"result":1}',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":[],"extra":1}',
    b'{"jsonrpc":"2.1","id":1,"method":"m","params":[]}', b'{"jsonrpc":2.0,"id":1,"method":"m","params":[]}',
    b'{"jsonrpc":"2.0","\\u0069d":1,"method":"m","params":[]}', b'{"jsonrpc":"2.0","id":1,"method":"m","params":[]} x',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":[]}\x00', b'\xef\xbb\xbf{"jsonrpc":"2.0","id":1,"method":"m"}',
    b' \r\n\t{ "params" : [ ] , "method" : "m" , "id" : 1 , "jsonrpc" : "2.0" } ',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":{"$base64":"QQ=="}}',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":{"a\\"$base64":"QQ=="}}',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":["\\"$base64\\""]}',
    b'{"jsonrpc":"2.0","id":1,"method":"m","params":{"\\u0024base64":"QQ=="}}',
    b'{"jsonrpc":"2.0","id":"node-7-1","result":"$base64"}',
]  # fmt: skip


@pytest.mark.parametrize(
    "defaults",
    [
        DEFAULT_OPTIONS,
        Options(stream_in=True),
        Options(timeout=3.0, key="k", wait=True),
        Options(idempotent=True, retries=1, meta=True),
    ],
)
def test_the_corpus_is_judged_alike(defaults: Options) -> None:
    both = Both("lab", defaults)
    through = sum(both.agree(text) for text in CORPUS)
    assert through > 15  # that few of them are plain is their purpose


def test_the_examples_reach_both_ways() -> None:
    both = Both("lab")
    for text in (
        b'{"jsonrpc":"2.0","id":1,"method":"m","params":[]}',
        b'{"jsonrpc": "2.0", "id": "a", "method": "A1", "params": {"a": [1.5e3, null, "\\u00e9"]}}',
        b'{"jsonrpc":"2.0","id":1,"method":"m","params":{},"meta":{"timeout":29.9998}}',
        b'{"jsonrpc":"2.0","id":"node-7-12","result":"x"}',
        b'{"jsonrpc":"2.0","result":{},"id":"node-7-012"}',
    ):
        assert both.agree(text), text
    assert Options() == DEFAULT_OPTIONS  # the options of a call are a copy
    assert not both.agree(b'{"jsonrpc":"2.0","id":1,"method":"new","params":[]}')


def test_methods_are_known_as_long_as_the_codec_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonrpc, "ROUTES_REMEMBERED", 200)
    monkeypatch.setattr(jsonrpc, "_ROUTES", {})
    both = Both("")
    assert not both.agree(b'{"jsonrpc":"2.0","id":1,"method":"lab/x","params":[]}')
    assert both.agree(b'{"jsonrpc":"2.0","id":1,"method":"lab/x","params":[]}')
    for number in range(300):
        both.agree(b'{"jsonrpc":"2.0","id":1,"method":"lab/n%d","params":[]}' % number)
    assert both.agree(b'{"jsonrpc":"2.0","id":1,"method":"lab/n299","params":[]}')
    assert not both.agree(b'{"jsonrpc":"2.0","id":1,"method":"lab/x","params":[]}')


def test_payloads_are_counted_where_they_become_events() -> None:
    both = Both("lab")
    text = b'{"jsonrpc":"2.0","id":1,"method":"m","params":[]}'
    both.agree(text)
    both.agree(b'{"jsonrpc":"2.0"}')
    both.agree(text)
    assert both.reader.decoded_bytes == 2 * len(text)


# ---------------------------------------------------------------- what is written

OPTIONS = st.builds(
    Options,
    trace=st.sampled_from([None, None, None, "t"]),
    idempotent=st.sampled_from([False, False, False, True]),
    stream_in=st.booleans(),
    stream_out=st.sampled_from([False, False, False, True]),
    progress=st.sampled_from([None, None, None, b""]),
    idle=st.sampled_from([None, None, None, 2.5]),
)
RAW = st.sampled_from(
    [b"", b"1", b'{"a":1}', *(b'"%b"' % (b"x" * size) for size in (110, 5_000, 12_286, 12_287, 61_438, 61_439))]
)
BODIES = st.builds(
    Body,
    RAW.flatmap(lambda raw: st.sampled_from([raw, msgspec.Raw(raw)])),
    st.sampled_from([(), (), (), (b"attached",)]),
)
SECONDS = st.one_of(
    st.floats(0.0004, 700_000), st.sampled_from([0.0, -1.0, 30.0, 0.0005, 0.0015, 1e-9, 29.9995, 2.5, 1e12, 1e16])
)
MILLISECONDS = st.integers(0, 10**9).map(lambda micro: micro / 1e3)
METAS = st.none() | st.builds(
    ReplyMeta,
    worker=st.sampled_from([None, "n-1", "node-12345", 'a"b', "a\\b", "\x7f", "é", ""]),
    attempts=st.integers(0, 3),
    elapsed_ms=MILLISECONDS,
    retryable=st.sampled_from([False, False, False, True]),
    trace=st.sampled_from([None, None, None, "t"]),
    timing=st.sampled_from([None, None, None, Timing(1.0, 2.0, None, 3.0)]),
    repeated=st.sampled_from([False, False, False, True]),
)
IDS = st.sampled_from([b"1", b'"a"', b'"%b"' % (b"x" * 128)])


def call(number: int, endpoint: str, body: Body, options: Options, left_s: float) -> Call:
    request = cast("Any", Request)(1, SESSION, b"1", None, "m", body, options, 0.0, 1.0)
    return Call(Attempt(number, request, cast("Any", None), 0.0), endpoint, "method", body, left_s)


CALLS = st.builds(call, st.sampled_from([1, 2**31, 2**60]), st.sampled_from(["lab", "data"]), BODIES, OPTIONS, SECONDS)
ENDS = st.builds(End, IDS, st.sampled_from([ENDED_OK, ENDED_OK, Outcome(kind=WORKER_ERROR)]), BODIES, METAS)


def new_link() -> SocketLink:
    return SocketLink(LoopLinks())


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(CALLS | ENDS, st.booleans(), st.sampled_from([0, 0, 1, 2**40]))
def test_messages_are_written_alike(message: Call | End, meta: bool, n: int) -> None:
    async def written() -> bytes | None:
        codec = JsonRpc(node="node", session_id=7, endpoint="lab", meta=meta)
        link = new_link()
        writer = link.new_writer(*codec.plain)
        assert writer is not None
        assert writer.write(message, n) == bool(link._pieces)
        pieces, link._pieces = link._pieces, []
        if not pieces:
            assert link.enqueued == 0
            return None
        piece = b"".join(pieces)
        assert all(isinstance(part, memoryview) for part in pieces[1:])  # what is within a frame
        assert len(pieces) == (1 if len(message.body.raw) <= 12_288 else 3)  # type: ignore[union-attr]
        assert link.enqueued == len(piece)
        assert link.dirty
        if isinstance(message, Call):
            assert message.attempt.mark == len(piece)
        expected = codec.encode_numbered(message, n) if n else codec.encode(message)
        text = b"".join(expected)
        assert piece == frame_header(TEXT, len(text)) + text
        return piece

    asyncio.run(written())


def plain_messages() -> list[tuple[Message, bool]]:
    body = Body(b'{"a":1}')
    return [
        (call(1, "lab", body, Options(), 30.0), False),
        (call(1, "lab", body, Options(stream_in=True), 29.9997), True),
        (End(b"1", ENDED_OK, body), False),
        (End(b"1", ENDED_OK, body, ReplyMeta(worker="n-1", attempts=1, elapsed_ms=0.512)), True),
    ]


def test_what_is_common_is_written_in_c() -> None:
    async def written() -> None:
        for message, meta in plain_messages():
            for n in (0, 5):
                link = new_link()
                writer = link.new_writer(b'{"jsonrpc":"2.0","id":"node-7-', "lab", meta)
                assert writer is not None and writer.write(message, n)
                link._pieces.clear()

    asyncio.run(written())


def test_an_outbox_that_is_closed_crowded_or_full_is_left_to_the_link() -> None:
    async def written() -> None:
        (worker, _), _, (caller, _), _ = plain_messages()

        def write(message: Message, **state: object) -> bool:
            link = new_link()
            for name, value in state.items():
                setattr(link, name, value)
            writer = link.new_writer(b'{"jsonrpc":"2.0","id":"node-7-', "lab", False)
            assert writer is not None
            before = link.enqueued
            taken = writer.write(message)
            assert taken == bool(link._pieces) == (link.enqueued > before)
            link._pieces.clear()
            return taken

        assert write(worker) and write(caller)
        soft, hard = 1 << 20, 8 << 20
        for state in (1, 2):
            assert not write(worker, _state=state) and not write(caller, _state=state)
        assert not write(worker, _congested=True) and write(caller, _congested=True)
        assert write(worker, enqueued=soft) and not write(worker, enqueued=soft + 1)
        assert write(caller, enqueued=soft + 1) and not write(caller, enqueued=hard)
        assert write(caller, enqueued=hard, flushed=10) is False
        assert write(caller, enqueued=hard, flushed=1000)
        assert not write(CancelAttempt(1))

    asyncio.run(written())


def test_strange_objects_are_not_touched() -> None:
    async def written() -> None:
        link = new_link()
        writer = link.new_writer(b"x", "lab", True)
        assert writer is not None
        body = Body(b"1")
        strange: list[Any] = [
            object(), None, 7, Call,
            Call(cast("Any", None), "lab", "m", body, 1.0), Call(cast("Any", 7), "lab", "m", body, 1.0),
            End(cast("Any", "text"), ENDED_OK, body), End(b"1", ENDED_OK, cast("Any", "body")),
            End(b"1", ENDED_OK, None),
            End(b"1", ENDED_OK, body, cast("Any", {"worker": "n"})),
            call(1, cast("Any", 7), body, Options(), 1.0), call(-1, "lab", body, Options(), 1.0),
            call(2**70, "lab", body, Options(), 1.0), call(1, "lab", Body(cast("Any", "str")), Options(), 1.0),
            call(1, "lab", body, cast("Any", None), 1.0), call(1, "lab", body, Options(), cast("Any", "soon")),
            call(1, "lab", Body(memoryview(b"abcdef")[::2]), Options(), 1.0),  # type: ignore[arg-type]
        ]  # fmt: skip
        for message in strange:
            assert not writer.write(message)
        for wrong in ((), (1, 2, 3), (None, "n"), (None, None)):
            with pytest.raises(TypeError):
                writer.write(*wrong)  # type: ignore[arg-type]
        with pytest.raises(OverflowError):
            writer.write(plain_messages()[0][0], -1)
        assert link._pieces == []

    asyncio.run(written())


# ---------------------------------------------------------------- the module itself


def test_wrong_arguments_are_told_not_crashed_on() -> None:
    reader = new_reader()
    events: list[Any] = []
    for wrong in (
        (b"", 0), (b"", 0, 0, ()), ("text", 0, 0, events), (b"", "0", 0, events), (b"", 0, None, events),
        (7, 0, 0, events),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            reader.read(*wrong)  # type: ignore[arg-type]
    for position, stop in ((-1, 1), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match="within"):
            reader.read(b"abc", position, stop, events)
        with pytest.raises(ValueError, match="within"):
            reader.begins(b"abc", position, stop, 9)
    for count in ((), (SESSION,), (SESSION, "prefix", {}, DEFAULT_OPTIONS), (SESSION, b"", [], DEFAULT_OPTIONS),
                  (SESSION, b"", {}, None)):  # fmt: skip
        with pytest.raises(TypeError):
            reader.decode_for(*count)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        native.Writer(b"", "", object(), print, 1, False)
    assert native.Reader.__new__(native.Reader).read(b"abc", 0, 3, events) == 0  # as if no bytes were allowed


def test_routes_that_are_none_are_passed_over() -> None:
    reader = new_reader()
    routes: dict[str, Any] = {"a": None, "b": ("x",), "c": ["x", "y"]}
    reader.decode_for(SESSION, b'"n-1-', routes, DEFAULT_OPTIONS)
    for name in (b"a", b"b", b"c"):
        frame = raw_frame(TEXT, b'{"jsonrpc":"2.0","id":1,"method":"%b","params":1}' % name)
        events: list[Any] = []
        reader.read(frame, 0, len(frame), events)
        assert type(events[0]) is tuple


def test_readers_and_writers_are_collected_with_what_they_refer_to() -> None:
    async def made() -> None:
        class Watched:
            gone = 0

            def __del__(self) -> None:
                Watched.gone += 1

        for _ in range(3):
            reader = new_reader()
            session: Any = Watched()
            reader.decode_for(session, b'"n-1-', {}, DEFAULT_OPTIONS)
            session.reader = reader
            link = new_link()
            session.writer = link.new_writer(b"", "", False)
            link._receiver = session
        del reader, session, link
        gc.collect()
        assert Watched.gone == 3

    asyncio.run(made())


def test_what_is_read_and_written_leaves_no_reference_behind() -> None:
    both = Both("lab")
    texts = [
        b'{"jsonrpc":"2.0","id":1,"method":"m","params":[]}',
        b'{"jsonrpc":"2.0","id":1,"method":"m","params":[],"meta":{"timeout":5}}',
        b'{"jsonrpc":"2.0","id":"node-7-12","result":"x"}',
        b'{"jsonrpc":"2.0","id":1,"method":"nobody","params":[]}',
        b"no JSON",
    ]
    watched: list[Any] = [SESSION, DEFAULT_OPTIONS, both.codecs[1]._routes["m"], ENDED_OK, True, Body]

    async def rounds() -> None:
        messages = plain_messages()
        link = new_link()
        writers = {meta: link.new_writer(b"x", "lab", meta) for meta in (False, True)}
        for _ in range(50):
            for text in texts:
                both.read(text)
            for message, meta in messages:
                writer = writers[meta]
                assert writer is not None
                writer.write(message, 3)
            link._pieces.clear()

    asyncio.run(rounds())
    gc.collect()
    before = list(map(sys.getrefcount, watched))
    asyncio.run(rounds())
    gc.collect()
    assert list(map(sys.getrefcount, watched)) == before


def test_events_are_those_of_the_core() -> None:
    both = Both("lab")
    frame = raw_frame(TEXT, b'{"jsonrpc":"2.0","id":1,"method":"m","params":[]}')
    events: list[Any] = []
    both.reader.read(frame, 0, len(frame), events)
    assert events == [Asked(SESSION, b"1", "lab", "m", Body(b"[]"), DEFAULT_OPTIONS)]
    frame = raw_frame(TEXT, b'{"jsonrpc":"2.0","id":"node-7-3","result":[]}')
    events.clear()
    both.reader.read(frame, 0, len(frame), events)
    assert events == [Answered(SESSION, 3, Body(b"[]"))]
    assert events[0].error is None
