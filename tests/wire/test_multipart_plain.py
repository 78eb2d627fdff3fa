"""What is read and written without JSON-RPC in between, against the long way round: the same comes out."""

from __future__ import annotations

import json
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.errors import ENDED_OK, WORKER_ERROR, Outcome
from broker.core.events import Answered, Asked
from broker.core.messages import Body, Call, CancelAttempt, End, Message, ReplyMeta
from broker.core.pending import Attempt
from broker.core.sessions import Session
from broker.wire.jsonrpc import BadMessage, Decoded, JsonRpc
from broker.wire.multipart import Multipart, MultipartError
from broker.wire.multipart_plain import PlainReader, PlainWriter
from tests.wire.test_jsonrpc_fuzz import NoSession

SESSION = cast("Session", NoSession())


def codec(endpoint: str = "", *, meta: bool = False) -> JsonRpc:
    made = JsonRpc(node="n1", session_id=7, endpoint=endpoint, meta=meta)
    made.session = SESSION
    return made


def frames(header: str, parent: str, content: str | bytes) -> list[bytes]:
    body = content if isinstance(content, bytes) else content.encode()
    return [header.encode(), parent.encode(), b"{}", body]


def call(content: str | bytes, msg_id: str = '"c-1"', kind: str = "call_request") -> list[bytes]:
    return frames(f'{{"msg_id":{msg_id},"msg_type":"{kind}","session":"s"}}', "{}", content)


def reply(content: str | bytes, parent: str = '{"msg_id":"n1-7-12"}', kind: str = "call_reply") -> list[bytes]:
    return frames(f'{{"msg_id":"r-1","msg_type":"{kind}"}}', parent, content)


def told(event: Decoded) -> tuple[object, ...]:
    """Everything an event says."""
    if isinstance(event, Asked):
        body = bytes(event.body.raw), event.body.attachments
        return Asked, event.session, event.wire_id, event.endpoint, event.method, *body, event.options
    assert isinstance(event, Answered)
    return Answered, event.session, event.attempt, bytes(event.body.raw), event.body.attachments, event.error


def read_plainly(rpc: JsonRpc, *messages: list[bytes]) -> list[Asked | Answered | None]:
    reader = PlainReader()
    rpc.read_by(reader)
    return [reader.read(each) for each in messages]


def long_way(rpc: JsonRpc, message: list[bytes]) -> Decoded:
    text = Multipart("s").read(message)
    text.decode()
    return rpc.decode(text)


PLAIN = [
    call('{"endpoint":"lab","method":"scan","params":{"a":1}}'),
    call('{"endpoint": "lab", "method": "scan", "params": [1, 2]}'),
    call('{"method":"lab/scan","params":null}', '"9"'),
    reply('{"status":"ok","result":[1,2]}'),
    reply('{"result": {"a": null}, "status": "ok"}'),
]


@pytest.mark.parametrize("message", PLAIN)
def test_common_messages_are_read_plainly(message: list[bytes]) -> None:
    rpc = codec()
    expected = long_way(rpc, message)  # from then on the method is known to be good
    (event,) = read_plainly(rpc, message)
    assert event is not None
    assert told(event) == told(expected)


LEFT = {
    "a method not seen before": call('{"endpoint":"lab","method":"other","params":1}'),
    "no params": call('{"endpoint":"lab","method":"scan"}'),
    "options": call('{"endpoint":"lab","method":"scan","params":1,"meta":{"timeout":1}}'),
    "a member twice": call('{"endpoint":"lab","method":"scan","params":1,"params":2}'),
    "an attachment in the text": call('{"endpoint":"lab","method":"scan","params":{"$base64":"AA=="}}'),
    "text beyond ASCII": call('{"endpoint":"lab","method":"scan","params":"é"}'),
    "no UTF-8": call(b'{"endpoint":"lab","method":"scan","params":"\xff"}'),
    "an id with an escape": call('{"endpoint":"lab","method":"scan","params":1}', '"c\\u0041"'),
    "an id that is too long": call('{"endpoint":"lab","method":"scan","params":1}', f'"{"x" * 129}"'),
    "an id that is a number": call('{"endpoint":"lab","method":"scan","params":1}', "1"),
    "a short form": call('{"endpoint":"lab"}', kind="serve_request"),
    "no JSON": call('{"endpoint":"lab","method":"scan","params":'),
    "an error": reply('{"status":"error","ename":"E","evalue":"v","traceback":[]}'),
    "a reply with meta": reply('{"status":"ok","result":1,"meta":{"retryable":true}}'),
    "a reply without a result": reply('{"status":"ok"}'),
    "two results": reply('{"status":"ok","result":1,"result":2}'),
    "another's id": reply('{"status":"ok","result":1}', '{"msg_id":"n1-8-12"}'),
    "an id that names no attempt": reply('{"status":"ok","result":1}', '{"msg_id":"n1-7-x"}'),
    "no parent": reply('{"status":"ok","result":1}', "{}"),
    "the answer to a short form": reply('{"status":"ok","result":1}', kind="serve_reply"),
}


@pytest.mark.parametrize("message", LEFT.values(), ids=LEFT.keys())
def test_what_is_not_common_is_left_to_the_long_way(message: list[bytes]) -> None:
    rpc = codec()
    long_way(rpc, PLAIN[0])
    assert read_plainly(rpc, message) == [None]


def test_nothing_is_read_before_it_is_said_for_whom() -> None:
    assert PlainReader().read(PLAIN[3]) is None


VALUES = st.sampled_from(
    ['1', '"é"', '{"$base64":"AA=="}', "[1, 2]", "null", '"\\u00e9"', '{"status":"ok"}', "nonsense", '""', "true", " 1"]
)  # fmt: skip
NAMES = st.sampled_from(["endpoint", "method", "params", "meta", "status", "result", "para", "code", "m\\u0065thod"])
MEMBERS = st.tuples(
    NAMES, st.sampled_from(['"lab"', '"scan"', '"ok"', '"lab/scan"', '"broker.x"', '"$/part"', '"error"']) | VALUES
)  # fmt: skip
IDS = st.sampled_from(['"c-1"', '"é"', '"\\u0041"', "1", "null", '""', '"n1-7-3"', '"n1-7-\\u0033"', '"n1-7-07"'])
KINDS = st.sampled_from(["call_request", "call_reply", "call_request", "call_reply", "call_notify", "x_reply"])


@given(
    st.lists(MEMBERS, max_size=5), st.sampled_from([",", ", ", " ,"]), st.sampled_from([":", ": "]), KINDS, IDS, IDS
)  # fmt: skip
def test_whatever_is_read_plainly_is_what_the_long_way_reads(
    members: list[tuple[str, str]], comma: str, colon: str, kind: str, msg_id: str, parent: str
) -> None:  # fmt: skip
    content = "{" + comma.join(f'"{name}"{colon}{value}' for name, value in members) + "}"
    message = frames(
        f'{{"msg_id":{msg_id},"msg_type":"{kind}"}}', f'{{"msg_id":{parent}}}', content
    )  # fmt: skip
    rpc = codec()
    for known in PLAIN[:3]:
        long_way(rpc, known)
    (event,) = read_plainly(rpc, message)
    if event is None:
        return
    try:
        expected = long_way(rpc, message)
    except (BadMessage, MultipartError) as error:
        pytest.fail(f"the long way refuses it: {error}")
    assert told(event) == told(expected)


# ---------------------------------------------------------------- writing


def written(message: Message, endpoint: str = "", *, meta: bool = False) -> list[list[object] | None]:
    """Its frames as they are written plainly, and the long way round."""
    rpc = codec(endpoint, meta=meta)
    plain, long = Multipart("s", date="d"), Multipart("s", date="d")
    direct = PlainWriter(plain, *rpc.plain).frames(message)
    return [None if direct is None else list(direct), list(long.write(b"".join(rpc.encode(message))))]


def a_call(raw: bytes = b'{"a":1}', *buffers: bytes) -> Call:
    attempt = cast("Attempt", type("NoAttempt", (), {"id": 12})())
    return Call(attempt, "lab", "scan", Body(raw, buffers), 1.5)


@pytest.mark.parametrize("endpoint", ["", "lab", "other"])
@pytest.mark.parametrize("raw", [b'{"a":1}', '["é"]'.encode(), b"null"])
def test_common_calls_are_written_as_the_long_way_writes_them(endpoint: str, raw: bytes) -> None:
    direct, long = written(a_call(raw), endpoint)
    assert direct is not None
    assert direct == long


@pytest.mark.parametrize("wire_id", [b'"c-1"', b"17"])
@pytest.mark.parametrize("raw", [b'{"a":1}', b"null"])
def test_common_results_are_written_as_the_long_way_writes_them(wire_id: bytes, raw: bytes) -> None:
    direct, long = written(End(wire_id, ENDED_OK, Body(raw)))
    assert direct is not None
    assert direct == long


@pytest.mark.parametrize(
    "message",
    [
        a_call(b"1", b"buffer"),
        a_call(b""),
        a_call(b'"' + b"x" * 5000 + b'"'),
        End(b'"c-1"', ENDED_OK, Body(b"1", (b"buffer",))),
        End(b'"c-1"', ENDED_OK, Body(b"1"), ReplyMeta(worker="w", attempts=1, elapsed_ms=1.0)),
        End(b'"c-1"', Outcome(kind=WORKER_ERROR), Body(b'{"code":1,"message":"m"}')),
        CancelAttempt(3),
    ],
    ids=["buffers", "no params", "large", "a result's buffers", "meta", "an error", "another message"],
)
def test_what_is_not_common_is_not_written_plainly(message: Message) -> None:
    assert PlainWriter(Multipart("s"), *codec().plain).frames(message) is None


def test_a_call_that_tells_its_time_is_not_written_plainly() -> None:
    assert PlainWriter(Multipart("s"), *codec(meta=True).plain).frames(a_call()) is None


def test_the_answer_to_a_short_form_has_its_name() -> None:
    multipart = Multipart("s")
    multipart.read(call("{}", '"c-1"', "serve_request"))
    made = PlainWriter(multipart, *codec().plain).frames(End(b'"c-1"', ENDED_OK, Body(b"null")))
    assert made is not None
    assert json.loads(bytes(made[0]))["msg_type"] == "serve_reply"
