"""The envelope decoder against a slow reference: what is accepted means the same, what is refused may be refused."""

from __future__ import annotations

import json
import os
import re
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.events import Answered, Asked, BadReply, Cancel, Refused, Stray
from broker.core.options import OptionError, read_options
from broker.core.sessions import Session
from broker.wire.jsonrpc import BadMessage, JsonRpc

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1500"))
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class NoSession:
    """All that the codec asks of a session."""

    requests: dict[bytes, object] = {}  # noqa: RUF012 - stays empty


def codec(endpoint: str) -> JsonRpc:
    made = JsonRpc(node="node", session_id=7, endpoint=endpoint)
    made.session = cast("Session", NoSession())
    return made


# ---------------------------------------------------------------- the reference


class Refusable(Exception):
    """Why a message may be refused."""


def refuse_constant(name: str) -> object:
    raise Refusable(f"{name} is no JSON")


def envelope_of(text: bytes) -> dict[str, Any]:
    """The members of the envelope; raises Refusable for everything the protocol lets a broker refuse."""
    pairs: list[tuple[str, Any]] = []

    def remember(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found
        return dict(found)

    try:
        value = json.loads(text.decode(), object_pairs_hook=remember, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refusable(str(error)) from None
    if not isinstance(value, dict):
        raise Refusable("no object")
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise Refusable("a member twice")
    if value.get("jsonrpc") != "2.0":
        raise Refusable("another version")
    if "method" in value and not isinstance(value["method"], str):
        raise Refusable("a method that is no string")
    try:
        text.decode().encode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refusable("a lone surrogate") from None
    return value


def check_id(value: object) -> None:
    if isinstance(value, str):
        if len(json.dumps(value, ensure_ascii=False).encode()) > 130:
            raise Refusable("a long id")
    elif type(value) is not int or not -(2**63) <= value < 2**64:
        raise Refusable("no id")


def check_call(envelope: dict[str, Any], endpoint: str) -> tuple[str, str]:
    method = envelope["method"]
    if method.startswith("broker."):
        endpoint = ""
    elif not endpoint:
        endpoint, _, method = method.partition("/")
        if not NAME.fullmatch(endpoint):
            raise Refusable("no endpoint")
    if not NAME.fullmatch(method) or (endpoint and method.startswith("broker.")):
        raise Refusable("no name")
    if "meta" in envelope:
        try:
            read_options(json.dumps(envelope["meta"]).encode())
        except OptionError:
            raise Refusable("options") from None
    return endpoint, method


def agree(endpoint: str, text: bytes) -> str:
    """Decode, compare with the reference; returns what became of it."""
    try:
        event = codec(endpoint).decode(text)
    except BadMessage as bad:
        answer = json.loads(bad.answer)
        assert answer["error"]["code"] in (-32700, -32600, -32602)
        why = why_refusable(text, endpoint)
        assert why, f"refused without a reason ({answer['error']['data']['detail']})"
        if answer["id"] is not None:
            assert answer["id"] == json.loads(text)["id"]
        return "refused"
    if isinstance(event, BadReply):  # no JSON, but it says which attempt it was to answer
        assert why_refusable(text, endpoint)
        assert re.search(rb'"id"\s*:\s*"node-7-0*%d"' % event.attempt, text)
        return "bad reply"
    envelope = envelope_of(text)  # what is accepted, the reference reads too
    if isinstance(event, Asked):
        assert (event.endpoint, event.method) == check_call(envelope, endpoint)
        assert (event.wire_id is not None) == ("id" in envelope)
        if event.wire_id is not None:
            check_id(envelope["id"])
            same(json.loads(cast("bytes", event.wire_id)), envelope["id"])
        assert (len(event.body.raw) > 0) == ("params" in envelope)
        if "params" in envelope:
            same(json.loads(bytes(event.body.raw)), envelope["params"])
        return "asked"
    if isinstance(event, Refused):
        assert why_refusable(text, endpoint) or envelope["method"].startswith("$/")
        same(json.loads(cast("bytes", event.wire_id)), envelope["id"])
        return "refused by outcome"
    if isinstance(event, Answered):
        assert "method" not in envelope
        assert re.fullmatch(f"node-7-0*{event.attempt}", envelope["id"])
        if envelope.get("error") is not None:
            assert event.error is not None
        else:
            assert event.error is None
            same(json.loads(bytes(event.body.raw)), envelope.get("result"))
        return "answered"
    if isinstance(event, Stray):
        assert "method" not in envelope
        assert event.foreign == str(envelope.get("id")).startswith("node-")
        return "stray"
    assert envelope["method"].startswith("$/")
    assert "id" not in envelope
    if isinstance(event, Cancel):
        same(json.loads(cast("bytes", event.wire_id)), envelope["params"]["id"])
    return "protocol"


def same(a: object, b: object) -> None:
    assert type(a) is type(b)
    assert a == b


def why_refusable(text: bytes, endpoint: str) -> str:
    try:
        envelope = envelope_of(text)
        if "method" not in envelope:
            if not {"id", "result"} & set(envelope) and envelope.get("error") is None:
                raise Refusable("neither a request nor a reply")
            return ""
        if "id" in envelope:
            check_id(envelope["id"])
        if envelope["method"].startswith("$/"):
            if envelope["method"] == "$/cancelRequest":
                params = envelope.get("params")
                check_id(params.get("id") if isinstance(params, dict) else None)
            return ""
        check_call(envelope, endpoint)
    except Refusable as why:
        return str(why)
    return ""


# ---------------------------------------------------------------- what is thrown at it

VALUES = st.sampled_from(
    [
        '"2.0"',
        "2.0",
        '"2.1"',
        "1",
        "0",
        "-0",
        "7",
        "12",
        "123",
        "1.0",
        "1e2",
        "007",
        "null",
        "true",
        '""',
        '"a"',
        '"A1"',
        '"lab/m"',
        '"m"',
        '"broker.ping"',
        '"$/cancelRequest"',
        '"$/x"',
        '"m\\n"',
        '"\\u006d"',
        '"\\ud83d\\ude00"',
        '"\\ud800"',
        '"é"',
        "[]",
        "{}",
        '{"id":1}',
        '{"id":1,"id":2}',
        "[1,]",
        "NaN",
        "Infinity",
        '{"timeout":5}',
        '{"timout":5}',
        '{"timeout":5,"timeout":6}',
        '"node-7-1"',
        '"node-7-01"',
        '"node-8-1"',
        '"node\\u002d7-1"',
        '{"code":1,"message":"x"}',
        '{"code":true,"message":"x"}',
        '{"code":-32003,"message":"x"}',
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
        '"%s"' % ("x" * 129),
        '{"$buffer":0}',
        '"\\x"',
        "'a'",
        "1 1",
        "[" * 20 + "]" * 20,
        '" "',
        "[1, 2, {}]",
        '{"a": "b"}',
    ]
)
RIGHT = {
    "jsonrpc": ['"2.0"'],
    "id": ["1", "0", '"a"', "12", '"node-7-1"', '"node-8-1"'],
    "params": ["[]", "{}", "1", '{"id":1}'],
    "method": ['"m"', '"lab/m"', '"broker.ping"', '"$/cancelRequest"'],
    "result": ["1", "null", "[1,2]"],
    "error": ['{"code":1,"message":"x"}', "1", "null"],
    "meta": ["{}", '{"timeout":5}', "1"],
}
KEYS = ['"id"', '"meta"', '"params"', '"method"', '"jsonrpc"', '"result"', '"error"', '"\\u0069d"', '"x"', '""', '"ID"']
SHAPES = [
    ("jsonrpc", "id", "method", "params"),
    ("jsonrpc", "id", "method"),
    ("jsonrpc", "method", "params"),
    ("jsonrpc", "id", "result"),
    ("jsonrpc", "id", "error"),
    ("jsonrpc", "id", "method", "params", "meta"),
    ("jsonrpc", "id"),
    ("jsonrpc", "method", "params", "meta"),
    ("jsonrpc", "id", "result", "error"),
    ("jsonrpc",),
]
SPACE = st.sampled_from(["", "", "", " ", "  ", "\n", "\t"])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message of a known shape in any order and spacing, perhaps with a member more, twice, or wrong."""
    members = [(f'"{key}"', draw(st.sampled_from(RIGHT[key]))) for key in draw(st.sampled_from(SHAPES))]
    for _ in range(draw(st.integers(0, 2))):
        what = draw(st.integers(0, 2))
        if what == 0:
            members.insert(draw(st.integers(0, len(members))), (draw(st.sampled_from(KEYS)), draw(VALUES)))
        elif what == 1:
            at = draw(st.integers(0, len(members) - 1))
            members[at] = (members[at][0], draw(VALUES))
        else:
            members = draw(st.permutations(members))
    colon, comma = draw(st.sampled_from([(":", ","), (": ", ", "), (None, None)]))
    text = "{"
    for at, (key, value) in enumerate(members):
        text += ("" if at == 0 else comma or "," + draw(SPACE)) + key + (colon or ":" + draw(SPACE)) + value
    return (draw(SPACE) + text + "}" + draw(SPACE)).encode()


@given(messages(), st.sampled_from(["", "lab"]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_messages_of_any_shape(text: bytes, endpoint: str) -> None:
    agree(endpoint, text)


@given(messages(), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.binary(max_size=3)), max_size=3))
@settings(max_examples=EXAMPLES, deadline=None)
def test_messages_with_bytes_gone_wrong(text: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    for at, gone, put in changes:
        text = text[:at] + put + text[at + gone :]
    try:
        text.decode()
    except UnicodeDecodeError:
        return  # frames are checked for UTF-8 before
    agree("lab", text)


@given(st.text(max_size=60))
@settings(max_examples=EXAMPLES // 5, deadline=None)
def test_any_text(text: str) -> None:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return
    agree("", encoded)


def test_the_examples_reach_everything() -> None:
    """The fuzzer's own words, tried by hand once each: it would be worth nothing if all of them were refused."""
    seen = set()
    for shape in SHAPES:
        for number in range(6):
            body = ",".join(f'"{key}":{RIGHT[key][number % len(RIGHT[key])]}' for key in shape)
            for endpoint in ("", "lab"):
                seen.add(agree(endpoint, b"{%b}" % body.encode()))
    assert seen == {"asked", "answered", "stray", "refused", "refused by outcome", "protocol"}
