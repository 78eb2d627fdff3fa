"""The JSON-RPC codec, rule by rule."""

# ruff: noqa: UP031 - JSON is full of braces

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any, cast

import pytest

from broker.core import errors
from broker.core.errors import Outcome
from broker.core.events import Answered, Asked, BadReply, Cancel, Refused, Stray
from broker.core.messages import Body, Broadcast, CancelAttempt, End, Options, ReplyMeta
from broker.core.sessions import Session
from broker.wire.jsonrpc import ENVELOPE_MAX, BadMessage, JsonRpc, encode_error, is_batch, split_batch


class SessionStub:
    """All that the codec asks of a session: which ids are in flight."""

    def __init__(self, *in_flight: bytes) -> None:
        self.requests = dict.fromkeys(in_flight)


def codec(endpoint: str = "lab", *, in_flight: tuple[bytes, ...] = (), **options: Any) -> JsonRpc:
    made = JsonRpc(node="node", session_id=7, endpoint=endpoint, **options)
    made.session = cast("Session", SessionStub(*in_flight))
    return made


def call(text: str | bytes, endpoint: str = "lab") -> Asked:
    event = codec(endpoint).decode(text if isinstance(text, bytes) else text.encode())
    assert isinstance(event, Asked), event
    return event


def refused(text: str | bytes, endpoint: str = "lab", **options: Any) -> tuple[Any, bool]:
    """The answer to a message that is none, and whether it is a strike."""
    with pytest.raises(BadMessage) as caught:
        codec(endpoint, **options).decode(text if isinstance(text, bytes) else text.encode())
    return json.loads(caught.value.answer), caught.value.strike


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("text", "wire_id"),
    [
        ("0", b"0"),
        ("-0", b"-0"),
        ('""', b'""'),
        ('"0"', b'"0"'),
        (str(2**63), str(2**63).encode()),
        (str(2**64 - 1), str(2**64 - 1).encode()),
        (str(-(2**63)), str(-(2**63)).encode()),
        ('"%s"' % ("x" * 128), b'"%b"' % (b"x" * 128)),
        ('"\\u0041\\/"', b'"A/"'),
        ('"\\ud83d\\ude00"', '"😀"'.encode()),
        ('"\\""', b'"\\""'),
        ('"null"', b'"null"'),
    ],
)
def test_ids(text: str, wire_id: bytes) -> None:
    assert call('{"jsonrpc":"2.0","id":%s,"method":"m"}' % text).wire_id == wire_id


@pytest.mark.parametrize(
    "text",
    ["null", "true", "1.5", "1.0", "1e3", "-1.0", str(2**64), str(-(2**63) - 1), "9" * 5000, "[1]", '{"a":1}',
     '"%s"' % ("x" * 129), '"%s"' % ("é" * 65), '"%s"' % ("\\u00e9" * 65)],
)  # fmt: skip
def test_no_ids(text: str) -> None:
    answer, strike = refused('{"jsonrpc":"2.0","id":%s,"method":"m"}' % text)
    assert (answer["id"], answer["error"]["code"]) == (None, -32600)
    assert answer["error"]["message"] == "Invalid Request"
    assert not strike


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\x41"', '"a', "007", "+1", "0x10", "1.", "'a'", "undefined"])
def test_ids_that_are_no_json(text: str) -> None:
    answer, strike = refused('{"jsonrpc":"2.0","id":%s,"method":"m"}' % text)
    assert (answer["id"], answer["error"]["code"]) == (None, -32700)
    assert strike


# ---------------------------------------------------------------- the envelope


@pytest.mark.parametrize(
    "text",
    [
        '{"jsonrpc":"2.0","id":1,"method":"m","params":[],"id":7}',
        '{"jsonrpc":"2.0","id":7,"id":1,"method":"m","params":[]}',
        '{"jsonrpc":"2.0","id":1234,"method":"m","id":5}',
        '{"jsonrpc":"2.0","id":123,"method":"m","params":[],"meta":{},"id":7}',
        '{"jsonrpc":"2.0","id":7,"method":"m","params":[],"meta":1,"meta":{}}',
        '{"jsonrpc":"2.0","method":"m","params":[],"method":"broker.ping"}',
        '{"jsonrpc": "2.0", "method": "m", "params": [], "params": {}}',
        '{"jsonrpc":"2.0","id":12345,"id":"node-7-1"}',
        '{"jsonrpc":"2.0","id":"node-7-1","result":1,"result":2}',
        '{"jsonrpc":"2.0","result":1,"result":2}',
        '{"result":1,"result":"2.0","jsonrpc":"2.0"}',
        '{"jsonrpc":"2.0","id":"node-7-1","result":1,"\\u0069d":"node-7-2"}',
        '{"jsonrpc":"2.0","id":1,"method":"m","\\u006dethod":"n"}',
        '{"jsonrpc":"2.0","id":1,"method":"m","params":"%s","id":2}' % ("x" * 5000),
        '{"jsonrpc":"2.0","id":1,"method":"m","x":1,"x":2}',
    ],
)
def test_a_member_twice_is_refused(text: str) -> None:
    answer, strike = refused(text)
    assert (answer["id"], answer["error"]["code"]) == (None, -32600)
    assert "stands twice" in answer["error"]["data"]["detail"]
    assert strike


def test_a_member_twice_among_thousands_is_found_in_a_moment() -> None:
    members = [f'"{number:x}":0' for number in range(7000)]
    text = '{"jsonrpc":"2.0","id":1,"method":"m",%s,"1b57":1}' % ",".join(members)
    assert len(text) < ENVELOPE_MAX
    spent_s = []
    for _ in range(3):  # the best of three: the garbage of all tests before may be collected in one
        began = time.process_time()
        answer, strike = refused(text)
        spent_s.append(time.process_time() - began)
    assert min(spent_s) < 0.2, "a look at every name for every name takes half a second"
    assert strike
    assert "'1b57' stands twice" in answer["error"]["data"]["detail"]


@pytest.mark.parametrize(
    "text",
    [
        '{"jsonrpc":"2.0","id":1,"method":"m","params":{"id":1,"id":2,"method":"x","method":"y"}}',
        '{"jsonrpc":"2.0","id":1,"method":"m","params":[{"params":1},{"params":1}],"x":{"id":1,"id":2}}',
    ],
)
def test_twice_within_a_payload_is_nobodys_business(text: str) -> None:
    assert call(text).method == "m"


@pytest.mark.parametrize(
    ("text", "code", "strike"),
    [
        ("", -32700, True),
        ("   ", -32700, True),
        ("{", -32700, True),
        ("nonsense", -32700, True),
        ("\ufeff{}", -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m"} {}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":[NaN]}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":[-Infinity]}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":["\\ud800"]}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":["\\udc00\\ud800"]}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":["\n"]}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":[1,]}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":[01]}', -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":%s}' % ("[" * 100_000), -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":%s1%s}' % ("[" * 100_000, "]" * 100_000), -32700, True),
        ('{"a":' * 100_000, -32700, True),
        ('{"jsonrpc":"2.0","id":1,"method":"m","x":%s%s}' % ("[" * 20_000, "]" * 20_000), -32700, True),
        ("null", -32600, False),
        ("7", -32600, False),
        ('"x"', -32600, False),
        ("{}", -32600, False),
        ('{"jsonrpc":2.0,"id":1,"method":"m"}', -32600, False),
        ('{"jsonrpc":"2","id":1,"method":"m"}', -32600, False),
        ('{"id":1,"method":"m"}', -32600, False),
        ('{"jsonrpc":"2.0"}', -32600, False),
        ('{"jsonrpc":"2.0","params":[]}', -32600, False),
        ('{"jsonrpc":"2.0","id":1,"method":null}', -32600, False),
        ('{"jsonrpc":"2.0","id":1,"method":["m"]}', -32600, False),
        ('{"jsonrpc":"2.0","method":1,"params":"bar"}', -32600, False),
        ('{"jsonrpc":"2.0","id":1,"method":"m","x":"%s"}' % ("y" * ENVELOPE_MAX), -32600, True),
    ],
)
def test_what_is_no_message(text: str, code: int, strike: bool) -> None:
    answer, struck = refused(text)
    assert answer["error"]["code"] == code
    assert struck is strike
    assert answer["error"]["data"]["outcome"] == "invalid"
    assert len(json.dumps(answer)) < 1000, "nothing large comes back"


def test_wrong_types_are_answered_with_the_id_they_came_with() -> None:
    assert refused('{"jsonrpc":"2.0","id":"a","method":7}')[0]["id"] == "a"
    assert refused('{"id":0,"method":"m"}')[0]["id"] == 0
    assert refused('{"id":1.5,"method":"m"}')[0]["id"] is None
    assert refused('{"id":"node-7-1","result":1}')[0]["id"] is None, "a broken reply is nobody's request"


def test_a_broken_message_never_ends_a_request_in_flight_under_its_id() -> None:
    for wire_id in (b"7", b'"a"'):
        text = b'{"jsonrpc":"1.0","id":%b,"method":"m"}' % wire_id
        assert refused(text)[0]["id"] == json.loads(wire_id)
        assert refused(text, in_flight=(wire_id,))[0]["id"] is None


@pytest.mark.parametrize("size", [20_000, 1_000_000])
def test_numbers_of_a_million_digits_pass_where_nobody_looks(size: int) -> None:
    text = '{"jsonrpc":"2.0","id":1,"method":"m","params":[%s]}' % ("9" * size)
    assert len(call(text).body.raw) == size + 2
    spaced = '{ "jsonrpc" : "2.0","id":1,"method":"m","params":[%s]}' % ("9" * size)
    assert len(call(spaced).body.raw) == size + 2
    beside = '{"jsonrpc":"2.0","id":1,"method":"m","x":%s}' % ("9" * 20_000)
    assert call(beside).method == "m"


@pytest.mark.parametrize("method", ["m", "é", "x" * 129, "m\n", ".m", "-", "a b", "", "a/b", "m\x00", "*", "__proto__"])
@pytest.mark.parametrize("endpoint", ["lab", ""])
def test_names_match_in_full(method: str, endpoint: str) -> None:
    written = method if endpoint else f"lab/{method}"
    event = codec(endpoint).decode(json.dumps({"jsonrpc": "2.0", "id": 1, "method": written}).encode())
    if method in ("m", "__proto__"):
        assert isinstance(event, Asked)
        assert (event.endpoint, event.method) == ("lab", method)
    else:
        assert isinstance(event, Refused)
        assert (event.kind, event.wire_id) == (errors.INVALID_REQUEST, b"1")
        assert len(event.method) <= 128


@pytest.mark.parametrize("method", ["/m", "/broker.ping", "/", "lab/broker.message", "lab/broker.x", "a/b/c", "lab//m"])
def test_the_brokers_own_methods_have_one_spelling(method: str) -> None:
    """`lab/broker.message` would reach a listening worker as what looks like a broadcast of the broker's."""
    message = {"jsonrpc": "2.0", "id": 1, "method": method}
    event = codec("").decode(json.dumps(message).encode())
    assert isinstance(event, Refused)
    assert event.kind is errors.INVALID_REQUEST
    del message["id"]
    refused(json.dumps(message), "")


def test_a_method_that_was_good_once_is_judged_by_its_options_again() -> None:
    link = codec()
    for meta, kind in (({}, Asked), ({"x": 1}, Refused), ({"timeout": 1}, Asked)):
        text = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "m", "meta": meta})
        assert isinstance(link.decode(text.encode()), kind)
    for number in range(2000):
        link.decode(b'{"jsonrpc":"2.0","id":1,"method":"m%d"}' % number)
    assert len(link._routes) <= 256, "what is remembered per link is bounded"


def test_options_come_from_the_link_and_the_message() -> None:
    link = codec(defaults=Options(timeout=5.0, wait=True))
    event = link.decode(b'{"jsonrpc":"2.0","id":1,"method":"m","meta":{"wait":false,"trace":"t"}}')
    assert isinstance(event, Asked)
    assert (event.options.timeout, event.options.wait, event.options.trace) == (5.0, False, "t")
    assert event.options.meta, "who sends meta is sent it"
    plain = link.decode(b'{"jsonrpc":"2.0","id":1,"method":"m"}')
    assert isinstance(plain, Asked)
    assert plain.options.wait
    assert not plain.options.meta


def test_methods_with_a_dollar() -> None:
    link = codec()
    event = link.decode(b'{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":"\\u0041"}}')
    assert isinstance(event, Cancel)
    assert event.wire_id == b'"A"'
    assert link.decode(b'{"jsonrpc":"2.0","method":"$/setTrace","params":{}}') is None
    asked = link.decode(b'{"jsonrpc":"2.0","id":3,"method":"$/cancelRequest","params":{"id":1}}')
    assert isinstance(asked, Refused)
    assert asked.kind is errors.NO_METHOD
    for params in ("{}", "[1]", "null", '{"id":null}', '{"id":1.5}', '{"id":true}'):
        refused('{"jsonrpc":"2.0","method":"$/cancelRequest","params":%s}' % params)
    refused('{"jsonrpc":"2.0","method":"$/cancelRequest"}')


# ---------------------------------------------------------------- replies as they really come


def reply(members: str, attachments: tuple[bytes, ...] = ()) -> Any:
    return codec().decode(('{"jsonrpc":"2.0",%s}' % members).encode(), attachments)


def raw(body: Body) -> Any:
    return json.loads(bytes(body.raw))


def test_neither_result_nor_error_is_null() -> None:
    event = reply('"id":"node-7-12"')
    assert isinstance(event, Answered)
    assert (event.attempt, event.error, bytes(event.body.raw)) == (12, None, b"null")


@pytest.mark.parametrize(
    ("more", "result"), [('"result":[1.0],', b"[1.0]"), ('"result":null,', b"null"), ("", b"null")]
)
def test_an_error_of_null_is_no_error(more: str, result: bytes) -> None:
    event = reply('"id":"node-7-12",%s"error": null' % more)
    assert isinstance(event, Answered)
    assert (event.attempt, event.error, bytes(event.body.raw)) == (12, None, result)
    stray = reply('"id":null,%s"error":null' % more)
    assert isinstance(stray, Stray)
    assert stray.nameless and stray.error is None


def test_both_is_the_error() -> None:
    event = reply('"id":"node-7-12","result":1,"error":{"code":5,"message":"x","data":[1.0]}')
    assert event.error.code == 5
    assert bytes(event.body.raw) == b'{"code":5,"message":"x","data":[1.0]}'


@pytest.mark.parametrize("code", [0, -32601, -32000, -32020, 1, -(10**30)])
def test_errors_with_any_other_code_pass(code: int) -> None:
    event = reply('"id":"node-7-1","error":{"code":%d,"message":""}' % code)
    assert event.error.code == code
    assert raw(event.body) == {"code": code, "message": ""}


@pytest.mark.parametrize("data", ['"text"', '{"a":1,"a":2}', "null", "1e2", '{"$base64":"b25l"}'])
def test_error_data_passes_untouched(data: str) -> None:
    event = reply('"id":"node-7-1","error":{"code":1,"message":"é\\n","data":%s,"more":1}' % data)
    assert bytes(event.body.raw) == ('{"code":1,"message":"é\\n","data":%s}' % data).encode()


@pytest.mark.parametrize(
    "error",
    ['"it broke"', "5", "false", "[]", "{}", '{"message":"x"}', '{"code":1}', '{"code":"1","message":"x"}',
     '{"code":1.5,"message":"x"}', '{"code":true,"message":"x"}', '{"code":null,"message":"x"}',
     '{"code":1,"message":null}', '{"code":1,"message":{"a":1}}'],
)  # fmt: skip
def test_an_error_that_is_none_becomes_internal_with_the_original(error: str) -> None:
    event = reply('"id":"node-7-1","error":%s' % error)
    assert event.error.code == -32603
    assert raw(event.body) == {"code": -32603, "message": "Internal error", "data": json.loads(error)}


@pytest.mark.parametrize("code", range(-32020, -31999))
def test_the_brokers_own_codes_are_wrapped(code: int) -> None:
    original = {"code": code, "message": "mine", "data": {"outcome": "deadline", "retryable": True}}
    event = reply('"id":"node-7-1","error":%s' % json.dumps(original))
    if -32019 <= code <= -32001:
        assert event.error.code == -32000
        assert raw(event.body) == {"code": -32000, "message": "mine", "data": {"cause": original}}
    else:
        assert event.error.code == code
        assert raw(event.body) == original


@pytest.mark.parametrize(
    ("meta", "retryable"), [('{"retryable":true}', True), ('{"retryable":1}', False), ("[]", False), ("{}", False)]
)
def test_a_worker_marks_its_error_retryable(meta: str, retryable: bool) -> None:
    event = reply('"id":"node-7-1","error":{"code":1,"message":"x"},"meta":%s' % meta)
    assert event.error.retryable is retryable


def test_replies_without_an_id_are_nameless() -> None:
    for members in (
        '"id":null,"error":{"code":-32700,"message":"Parse error"}',
        '"error":{"code":-32600,"message":""}',
    ):
        event = reply(members)
        assert isinstance(event, Stray)
        assert event.nameless
        assert event.error is not None
        assert not event.foreign


@pytest.mark.parametrize(
    ("wire_id", "foreign"),
    [
        ('"node-8-1"', True),
        ('"node-71-1"', True),
        ('"node-"', True),
        ('"other-7-1"', False),
        ("7", False),
        ('"x"', False),
        ('"node-7-"', True),
        ('"node-7-x"', True),
        ('"node-7--1"', True),
        ('"node-7-٣"', True),
        ('"node-7-%s"' % ("1" * 90), True),
    ],
)
def test_replies_to_what_was_not_asked_here(wire_id: str, foreign: bool) -> None:
    event = reply(f'"id":{wire_id},"result":1')
    assert isinstance(event, Stray)
    assert event.foreign is foreign
    assert not event.nameless


def test_an_attempts_id_may_be_written_with_escapes() -> None:
    event = reply('"id":"node\\u002d7-1","result":1')
    assert isinstance(event, Answered)
    assert event.attempt == 1


def test_a_reply_with_bad_base64_is_a_bad_reply_and_a_call_is_invalid() -> None:
    event = reply('"id":"node-7-3","result":{"$base64":"x"}')
    assert isinstance(event, BadReply)
    assert event.attempt == 3
    asked = codec().decode(b'{"jsonrpc":"2.0","id":1,"method":"m","params":{"$base64":"x"}}')
    assert isinstance(asked, Refused)
    assert "$base64" in asked.detail
    refused('{"jsonrpc":"2.0","method":"m","params":{"$base64":"x"}}')


def test_base64_is_taken_out_of_params_and_results() -> None:
    asked = call('{"jsonrpc":"2.0","id":1,"method":"m","params":[{"$base64":"b25l"}]}')
    assert bytes(asked.body.raw) == b'[{"$buffer":0}]'
    assert [bytes(a) for a in asked.body.attachments] == [b"one"]
    answered = reply('"id":"node-7-3","result":{"$base64":"b25l"}', (b"zero",))
    assert bytes(answered.body.raw) == b'{"$buffer":1}'
    assert [bytes(a) for a in answered.body.attachments] == [b"zero", b"one"]


def test_base64_does_not_hide_a_member_that_stands_twice() -> None:
    refused('{"jsonrpc":"2.0","id":1,"method":"m","params":{"$base64":"b25l"},"id":2}')


# ---------------------------------------------------------------- writing


def text_of(pieces: Any) -> Any:
    return json.loads(b"".join(pieces))


def test_ends_carry_the_id_as_it_came() -> None:
    end = End(b'"a\\""', Outcome(kind=errors.OK), Body(b"[1.0]"))
    assert b"".join(codec().encode(end)) == b'{"jsonrpc":"2.0","id":"a\\"","result":[1.0]}'


def test_attachments_go_binary_or_as_base64() -> None:
    end = End(b"1", Outcome(kind=errors.OK), Body(b'{"$buffer":0}', (b"one",)))
    assert text_of(codec().encode(end))["result"] == {"$base64": "b25l"}
    packed = b"".join(codec(binary=True).encode(end))
    assert packed.endswith(b"one")
    assert packed[:4] == b"\0\0\0\2"


def test_meta_is_written_only_where_it_is_wanted() -> None:
    end = End(b"1", Outcome(kind=errors.OK), Body(b"1"), ReplyMeta(worker="w", attempts=1, elapsed_ms=2.5))
    assert text_of(codec().encode(end))["meta"] == {"worker": "w", "attempts": 1, "elapsed_ms": 2.5}


@pytest.mark.parametrize("kind", [kind for kind in errors.KINDS if kind is not errors.OK])
def test_every_outcome_of_the_brokers_own(kind: Any) -> None:
    outcome = Outcome(
        kind=kind, detail="why", retryable=kind.retryable, dispatched=True, endpoint="lab", method="m", attempts=2,
        elapsed_ms=1.5,
    )  # fmt: skip
    answer = json.loads(encode_error(b"7", outcome))
    assert (answer["jsonrpc"], answer["id"], answer["error"]["code"]) == ("2.0", 7, kind.code)
    assert answer["error"]["data"] == {
        "outcome": kind.name, "retryable": kind.retryable, "dispatched": True, "endpoint": "lab", "method": "m",
        "attempts": 2, "elapsed_ms": 1.5, "detail": "why",
    }  # fmt: skip
    if kind.code <= -32600:
        assert answer["error"]["message"] == kind.text, "the specification's own words"


def test_a_duplicate_is_told_with_the_id_in_the_data() -> None:
    end = End(b'"a"', Outcome(kind=errors.DUPLICATE_ID, detail="d"))
    answer = text_of(codec().encode(end))
    assert (answer["id"], answer["error"]["code"], answer["error"]["data"]["id"]) == (None, -32010, "a")


def test_cancels_and_broadcasts() -> None:
    assert text_of(codec().encode(CancelAttempt(5))) == {
        "jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": "node-7-5"},
    }  # fmt: skip
    everything = Broadcast("lab", "t", 3, Body(b"[1e2]"))
    assert b"".join(codec().encode(everything)) == (
        b'{"jsonrpc":"2.0","method":"broker.message","params":{"endpoint":"lab","topic":"t","seq":3,"data":[1e2]}}'
    )
    assert text_of(codec().encode(Broadcast(None, None, None, Body(b"0"))))["params"] == {"data": 0}


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("text", [b"[]", b" []", b"\t\r\n [1]", b"["])
def test_what_is_a_batch(text: bytes) -> None:
    assert is_batch(text)


@pytest.mark.parametrize("text", [b"", b"{}", b" {}", b"1", b'"["', b"\xef\xbb\xbf[]"])
def test_what_is_no_batch(text: bytes) -> None:
    assert not is_batch(text)


@pytest.mark.parametrize("result", ['"caf\\udce9"', '"\\ud800"', "NaN", "[1,]", '"cut'])
def test_a_reply_that_is_no_json_ends_its_attempt(result: str) -> None:
    """As Python's json writes file names that are no UTF-8, and what numpy calls missing."""
    for text in (
        '{"jsonrpc":"2.0","id":"node-7-12","result":%s}',
        '{"jsonrpc": "2.0", "result": %s, "id": "node-7-12"}',
    ):
        event = codec().decode((text % result).encode())
        assert isinstance(event, BadReply)
        assert event.attempt == 12
        assert "no JSON" in event.detail
    refused('{"jsonrpc":"2.0","id":"node-8-12","result":%s}' % result)  # not its own


def test_a_batch_of_millions_is_refused_before_they_are_held() -> None:
    text = b"[" + b"0," * 1_000_000 + b"0]"
    split_batch(b"[0]", 1000)  # what reads batches of so many is made once, of 4 MiB while it is made
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage, match="at most 1000 members"):
            split_batch(text, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_members_of_a_batch_stay_as_they_came() -> None:
    assert split_batch(b'[ {"a":1e2} ,1,[],"x"]', 4) == [b'{"a":1e2}', b"1", b"[]", b'"x"']
    for text in (b"[]", b"[1,2,3,4,5]", b"[1", b"[" * 100_000, b"[1] 2"):
        with pytest.raises(BadMessage):
            split_batch(text, 4)
