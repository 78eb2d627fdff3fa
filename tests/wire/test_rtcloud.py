"""rt-cloud's dialect: what goes out, what comes in, and everything that can be wrong with it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import pickle
import random
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from broker.core.events import Answered, BadReply, PartSent, Stray
from broker.core.messages import DEFAULT_OPTIONS, Body, Call, Credit, Notify
from broker.core.sessions import Session
from broker.wire.pieces import join
from broker.wire.rtcloud import PICKLED, Bounds, CallIds, NoReply, Result, RtCloud, Unfit, clean, encode_request
from tests.docs.blocks import ROOT, blocks_of

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "rtcloud.json").read_text())
BOUNDS = Bounds(message_max_bytes=1 << 20, piece_max_bytes=4096)


class End:
    """A codec, calls to it, and all events its answers make."""

    def __init__(self, bounds: Bounds = BOUNDS, ids: CallIds | None = None) -> None:
        self.ids = CallIds(itertools.count(5).__next__) if ids is None else ids
        self.codec = RtCloud(self.ids, bounds)
        self.codec.session = cast(Session, SimpleNamespace())
        self.events: list[Any] = []

    def call(self, attempt: int = 1, raw: bytes = b"[]", *attachments: bytes, method: str = "C.a") -> int:
        """Ask; the id it got."""
        request = SimpleNamespace(options=DEFAULT_OPTIONS)
        call = Call(
            cast(Any, SimpleNamespace(id=attempt, request=request)), "data", method, Body(raw, attachments), 1.0
        )
        return int(json.loads(b"".join(self.codec.encode(call)))["callId"])

    def take(self, message: object, *, upto: int | None = 1 << 20) -> Any:
        """Take in one message and all that follows from it; the last event, if any."""
        decoded = self.codec.decode(message if isinstance(message, bytes) else json.dumps(message).encode())
        if not isinstance(decoded, Result):
            if decoded is not None:
                self.events.append(decoded)
            return decoded
        if upto is not None:
            self.codec.grant(Credit(None, decoded.attempt, upto))
        return self.work(decoded)

    def work(self, result: Result) -> Any:
        event = None
        while result.is_ready:
            step = result.step()
            if step is not None:
                event = step
                self.events.append(step)
                if not isinstance(step, PartSent):
                    self.codec.forget(step.attempt)
        return event

    @property
    def value(self) -> tuple[bytes, tuple[Any, ...]]:
        """What the pieces and the last word make."""
        *parts, last = self.events
        assert isinstance(last, Answered) and all(isinstance(each, PartSent) and each.more for each in parts)
        assert [part.seq for part in parts] == list(range(len(parts)))
        return join([part.body.attachments[0] for part in parts], last.body.raw)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def single(call_id: int, data: bytes, kind: str = "bytes", **more: Any) -> dict[str, Any]:
    """An answer in one part, as daemons write it; `more` replaces members."""
    return {
        "cmd": "rpc", "class": "C", "attribute": "a", "callId": call_id, "dataSerialization": kind, "status": 200,
        "fileSize": len(data), "fileHash": md5(data), "numParts": 1, "partId": 1, "hash": md5(data),
        "data": base64.b64encode(data).decode(), "dataSize": len(data), **more,
    }  # fmt: skip


def parts(call_id: int, data: bytes, size: int, kind: str = "bytes", *, packed: bool = False) -> list[dict[str, Any]]:
    cut = [data[at : at + size] for at in range(0, len(data), size)]
    told = {"fileSize": len(data), "fileHash": md5(data), "numParts": len(cut), "multipart": True}
    messages = []
    for number, each in enumerate(cut, 1):
        message = single(call_id, each, kind, **told, partId=number)
        if packed:
            message |= {"compressed": True, "data": base64.b64encode(zlib.compress(each)).decode()}
        messages.append(message)
    return messages


# ---------------------------------------------------------------- requests


def test_a_request_with_bytes_is_as_the_golden_sample() -> None:
    golden = VECTORS["encodeByteTypeArgs"]
    raw = b'{"args":["f.bin",{"$buffer":0},7],"kwargs":{"data":{"$buffer":1}}}'
    attachments = (base64.b64decode(golden["encodedBytes_1"]), base64.b64decode(golden["kwargs"]["data"]))
    text = b"".join(encode_request("DataInterface.putFile", Body(raw, attachments), golden["callId"]))
    assert json.loads(text) == golden
    assert list(json.loads(text)) == list(golden)


def test_the_messages_in_the_documentation_are_those_of_the_wire() -> None:
    blocks = {block.options["file"]: json.loads(block.text) for block in blocks_of(ROOT / "docs" / "rtcloud.md")
              if block.language == "json"}  # fmt: skip
    call = encode_request("DataInterface.putFile", Body(b'["f.bin",{"$buffer":0},7]', (b"\x00\xffraw",)), 4)
    assert json.loads(b"".join(call)) == blocks["call.json"]
    for name, value in (("answer.json", b'{"fileCount": 3}'), ("failure.json", None)):
        end = End(ids=CallIds(lambda: 4))
        end.call()
        event = end.take(blocks[name])
        assert isinstance(event, Answered)
        if value is not None:
            assert event.body.raw == value
        else:
            assert event.error is not None and b"no such file: f.bin" in event.body.raw


@pytest.mark.parametrize(
    ("params", "args", "kwargs"),
    [
        (b"", [], {}),
        (b"null", [], {}),
        (b"[]", [], {}),
        (b"{}", [], {}),
        (b'[1, "a", [2], {"b": null}]', [1, "a", [2], {"b": None}], {}),
        (b'{"x": 1, "args": 2}', [], {"x": 1, "args": 2}),
        (b'{"args": [1]}', [1], {}),
        (b'{"kwargs": {"x": [1]}}', [], {"x": [1]}),
        (b'{"args": null, "kwargs": null}', [], {}),
        (b'{"args": [1], "kwargs": {"x\\"y": 2}}', [1], {'x"y': 2}),
        ('["ä\\u2028"]'.encode(), ["ä\u2028"], {}),
    ],
)
def test_params_become_args_and_kwargs(params: bytes, args: list[Any], kwargs: dict[str, Any]) -> None:
    message = json.loads(b"".join(encode_request("Data.get.all", Body(params), 3)))
    assert message == {
        "cmd": "rpc", "class": "Data", "attribute": "get.all", "args": args, "kwargs": kwargs, "callId": 3
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "params", "attachments"),
    [
        ("plain", b"[]", ()),
        (".a", b"[]", ()),
        ("C.", b"[]", ()),
        ("C.a", b"5", ()),
        ("C.a", b'"text"', ()),
        ("C.a", b'{"args": 5}', ()),
        ("C.a", b'{"args": [], "kwargs": []}', ()),
        ("C.a", b'[[{"$buffer":0}]]', (b"x",)),
        ("C.a", b'{"k":{"in":{"$buffer":0}}}', (b"x",)),
        ("C.a", b'[{"$buffer":1}]', (b"x",)),
        ("C.a", b'{"$buffer":0}', (b"x",)),
        ("C.a", b"[" * 100_000 + b"]" * 100_000, ()),
        ("C.a", b'{"k":' * 100_000 + b"1" + b"}" * 100_000, ()),
    ],
)
def test_what_cannot_be_said_to_a_daemon_is_refused(method: str, params: bytes, attachments: tuple[bytes, ...]) -> None:
    end = End()
    with pytest.raises(Unfit):
        end.call(1, params, *attachments, method=method)
    assert not len(end.ids) and not end.codec.open_count


def test_a_daemon_takes_no_parts_from_a_caller() -> None:
    end = End()
    request = SimpleNamespace(options=SimpleNamespace(stream_out=True))
    with pytest.raises(Unfit, match="no parts"):
        end.codec.encode(Call(cast(Any, SimpleNamespace(id=1, request=request)), "d", "C.a", Body(b"[]"), 1.0))


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("name", ["single", "compressed"])
def test_golden_answers_in_one_part(name: str) -> None:
    (golden,) = VECTORS[name]
    end = End(ids=CallIds(lambda: golden["callId"]))
    end.call()
    event = end.take(golden)
    data = base64.b64decode(golden["data"])
    assert isinstance(event, Answered) and event.body.raw == b'{"$buffer":0}'
    assert bytes(event.body.attachments[0]) == (zlib.decompress(data) if name == "compressed" else data)
    assert not len(end.ids) and not end.codec.open_count and not end.codec.results


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_golden_parts_in_any_order(order: tuple[int, ...]) -> None:
    golden = VECTORS["multipart_with_part_size_4"]
    end = End(ids=CallIds(lambda: 9))
    end.call()
    for at in order:
        end.take(golden[at])
    text, (data,) = end.value
    assert (text, bytes(data)) == (b'{"$buffer":0}', b"0123456789")


def test_an_empty_result_is_no_message_at_all() -> None:
    assert VECTORS["empty"] == []


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "pickle", "json"])
def test_parts_of_any_size_make_the_value(kind: str, packed: bool) -> None:
    data = b"[%b1]" % (b"12, 345, " * 130_000)
    assert len(data) > BOUNDS.message_max_bytes
    end = End()
    for message in parts(end.call(), data, 100_000, kind, packed=packed):
        end.take(message)
        assert end.codec.held_bytes <= 100_000
    text, attachments = end.value
    if kind == "json":
        assert text == data and attachments == ()
    else:
        assert bytes(attachments[0]) == data
        assert json.loads(text) == ({"$buffer": 0} if kind == "bytes" else {"$pickle": {"$buffer": 0}})
    assert max(len(event.body.attachments[0]) for event in end.events[:-1]) <= BOUNDS.piece_max_bytes


@pytest.mark.parametrize("kind", ["bytes", "pickle"])
def test_parts_without_a_byte_are_an_empty_value(kind: str) -> None:
    end, call_id = End(), 5
    end.call()
    for number in (1, 2):
        end.take(single(call_id, b"", kind, numParts=2, partId=number, multipart=True))
    (event,) = end.events
    assert event.body.attachments == (b"",) and b"$joined" not in event.body.raw


def test_json_in_parts_is_put_together_while_it_fits_one_message() -> None:
    data = json.dumps(list(range(10_000))).encode()
    end = End()
    for message in parts(end.call(), data, 7000, "json", packed=True):
        end.take(message)
    assert len(end.events) == 1 and end.events[0].body == Body(data)
    assert end.codec.held_bytes == 0


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("value", "text"), [(None, b"null"), (True, b"true"), (False, b"false")])
def test_pickled_constants_are_recognised(protocol: int, value: object, text: bytes) -> None:
    end = End()
    event = end.take(single(end.call(), pickle.dumps(value, protocol), "pickle"))
    assert event.body == Body(text)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_other_pickle_is_opaque(protocol: int) -> None:
    for value in (0, 1, "N.", [None], {"a": True}, b"\x80\x04N."):
        data = pickle.dumps(value, protocol)
        end = End()
        event = end.take(single(end.call(), data, "pickle"))
        assert event.body == Body(b'{"$pickle":{"$buffer":0}}', (data,))
    assert set(PICKLED) == {pickle.dumps(each, n) for each in (None, True, False) for n in range(6)}


def test_nothing_here_can_unpickle() -> None:
    for file in (Path(__file__).parents[2] / "broker").rglob("*.py"):
        assert "import pickle" not in file.read_text() and "from pickle" not in file.read_text(), file


def test_a_page_may_answer_with_three_members() -> None:
    end = End()
    end.call()
    event = end.take({"status": 200, "dataSerialization": "json", "data": base64.b64encode(b'{"a": 1}').decode()})
    assert event.attempt == 1 and event.body == Body(b'{"a": 1}')


def test_an_answer_without_an_id_counts_only_where_one_call_can_be_meant() -> None:
    message = {"status": 200, "dataSerialization": "json", "data": "MQ=="}
    end = End()
    end.call(1)
    end.call(2)
    assert end.take(message) == Stray(end.codec.session, nameless=True)
    end.codec.give_up(1)  # its answer may still come, and would be taken for that of call 2
    assert end.take(message) == Stray(end.codec.session, nameless=True)
    assert end.codec.open_count == 1
    end.codec.forget(2)
    assert isinstance(end.take(message), Stray)  # this was it
    end.call(3)
    assert end.take(message).attempt == 3
    for attempt in (4, 5):
        end.call(attempt)
        end.codec.give_up(attempt)
    for _ in range(2):
        assert isinstance(end.take(message), Stray)  # both have been answered, if late
    end.call(6)
    assert end.take(message).attempt == 6


def test_an_answer_without_an_id_to_a_notification_is_not_taken_for_another() -> None:
    message = {"status": 200, "dataSerialization": "json", "data": "MQ=="}
    end = End()
    end.codec.encode_notify(Notify("data", "C.tell", Body(b"[]"), end.codec.session))
    end.call(1)
    assert isinstance(end.take(message), Stray) and end.codec.open_count == 1


def test_the_error_of_a_daemon_is_cut_and_cleaned() -> None:
    end = End()
    text = "RPC Exception: rpc: \x1b[31mno\x00\r\nfile\u2028" + "x" * 5000
    event = end.take({"cmd": "rpc", "callId": end.call(), "status": 400, "error": text})
    assert event.error.code == -32000
    error = json.loads(bytes(event.body.raw))
    assert error["data"] == {"dialect": "rtcloud", "status": 400}
    assert error["message"].startswith("RPC Exception: rpc:  [31mno file x") and len(error["message"]) == 1001
    assert clean("  ") == ""


@pytest.mark.parametrize(("error", "text"), [({"a": 1}, '{"a":1}'), (None, "null"), ("", "status 500")])
def test_errors_of_any_shape_end_their_call(error: object, text: str) -> None:
    end = End()
    event = end.take({"callId": end.call(), "status": 500, "error": error})
    assert json.loads(bytes(event.body.raw))["message"].replace(" ", "") == text.replace(" ", "")


def test_of_a_very_long_error_only_the_beginning_is_looked_at() -> None:
    text = clean("\x01a" * 2_000_000)
    assert len(text) == 1001 and text.endswith("…")
    assert clean("\x01" * 5000) == "…" and clean("\x01" * 4000) == ""


def test_a_notification_is_a_call_whose_answer_comes_too_late() -> None:
    end = End()
    text = b"".join(end.codec.encode_notify(Notify("data", "C.a", Body(b"[1]"), end.codec.session)))
    call_id = json.loads(text)["callId"]
    assert end.take(single(call_id, b"x")) == Stray(end.codec.session)


def test_pieces_wait_for_credit_and_the_last_word_does_not() -> None:
    end = End()
    data = bytes(40_000)
    first, second = parts(end.call(), data, 20_000)
    end.take(first, upto=None)
    result = end.codec.results[1]
    assert len(end.events) == 4 and result.waits_for_caller and not result.is_ready
    end.take(second, upto=None)
    assert len(end.events) == 4 and result.held_bytes == 40_000
    for upto in range(5, 11):
        end.codec.grant(Credit(None, 1, upto))
        end.work(result)
        assert len(end.events) == min(upto, 10) + (upto >= 10)
    assert bytes(end.value[1][0]) == data


def test_credit_may_come_before_the_first_part() -> None:
    end = End()
    call_id = end.call()
    end.codec.grant(Credit(None, 1, 100))
    end.codec.grant(Credit(None, 77, 100))  # of a call that is over
    for message in parts(call_id, bytes(40_000), 20_000):
        end.take(message, upto=None)
    assert len(end.value[1][0]) == 40_000
    assert not end.codec._granted


# ---------------------------------------------------------------- bad input


def broken(end: End) -> str:
    assert isinstance(end.events[-1], BadReply), end.events[-1]
    assert not end.codec.results and not end.codec.open_count and not len(end.ids)
    return str(end.events[-1].detail)


BAD_SINGLE: list[tuple[dict[str, Any], str]] = [
    ({"hash": "0" * 32, "fileHash": "0" * 32}, "MD5 of part 1"),
    ({"fileHash": "0" * 32}, "MD5 of the whole"),
    ({"hash": "no hash"}, "MD5 of part 1"),
    ({"dataSize": 4}, "3 bytes, and 4"),
    ({"dataSize": -1}, "-1 bytes"),
    ({"dataSize": 1 << 40}, "the bound is"),
    ({"fileSize": 4}, "4 by the fileSize"),
    ({"fileSize": -4}, "fileSize is -4"),
    ({"data": "YWJj*"}, "base64"),
    ({"data": "YWJ"}, "base64"),
    ({"data": None}, "no data"),
    ({"data": 5}, "cannot be read"),
    ({"dataSerialization": "yaml"}, "'yaml' is none of"),
    ({"dataSerialization": None}, "none of"),
    ({"partId": 0}, "part 0 of 1"),
    ({"partId": 2}, "part 2 of 1"),
    ({"partId": "1"}, "cannot be read"),
    ({"numParts": 0}, "numParts is 0"),
    ({"numParts": None, "multipart": True}, "numParts is missing"),
    ({"numParts": 2, "partId": None}, "partId is missing"),
    ({"status": 302}, "status 302"),
    ({"status": 10**30}, "status 1000"),
    ({"compressed": True}, "part 1"),
    ({"dataSerialization": "json"}, "no JSON"),
]


@pytest.mark.parametrize(("members", "words"), BAD_SINGLE, ids=[str(each[0])[:40] for each in BAD_SINGLE])
def test_an_answer_that_is_not_what_it_says_is_a_bad_reply(members: dict[str, Any], words: str) -> None:
    end = End()
    message = single(end.call(), b"abc") | members
    if message["data"] is None:
        del message["data"]
    end.take(message)
    assert words in broken(end)


@pytest.mark.parametrize("data", [b"NaN", b"[1,]", b'"\xff"', b"1}", b'1,"id":2', b"[" * 100_000, b""])
def test_json_that_is_none_reaches_nobody(data: bytes) -> None:
    end = End()
    end.take(single(end.call(), data, "json"))
    assert "no JSON" in broken(end)


def test_a_bomb_is_not_unpacked_beyond_what_it_declares() -> None:
    bomb = zlib.compress(bytes(200 << 20), 9)
    for declared in (None, 1000, 1 << 20):
        end = End(Bounds())
        message = single(end.call(), b"", compressed=True, fileSize=None, fileHash=None, hash=None)
        message |= {"data": base64.b64encode(bomb).decode(), "dataSize": declared}
        end.take(message)
        assert "unpacks to more than" in broken(end)


def test_a_bomb_in_parts_passes_on_no_more_than_it_declares() -> None:
    end = End()
    message = parts(end.call(), bytes(8000), 4000, packed=True)[0]
    message["data"] = base64.b64encode(zlib.compress(bytes(1 << 20))).decode()
    end.take(message)
    assert sum(len(each.body.attachments[0]) for each in end.events[:-1]) <= 4001 + 64
    assert "more than 4000 bytes" in broken(end)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zlib.compress(b"abc" * 9)[:-3], "ends too early"),
        (zlib.compress(b"abc" * 9) + b"more", "something follows"),
        (zlib.compress(b"abc" * 9) + bytes(100_000), "something follows"),
        (b"", "ends too early"),
        (b"abc", "incorrect header"),
    ],
)
def test_damaged_compression(data: bytes, words: str) -> None:
    end = End()
    message = single(end.call(), b"abc" * 9) | {"compressed": True, "data": base64.b64encode(data).decode()}
    end.take(message)
    assert words in broken(end)


def test_duplicates_count_once_and_parts_beyond_the_window_do_not() -> None:
    data = bytes(range(200)) * 2
    end = End()
    messages = parts(end.call(), data, 10)
    assert end.take(messages[3]) is None and end.codec.held_bytes == 10
    assert end.codec.decode(json.dumps(messages[3]).encode()) is None and end.codec.held_bytes == 10
    for message in [messages[1], messages[1], messages[0], messages[0], messages[1], *messages[2:5]]:
        end.take(message)
    assert len(end.events) == 5
    end.take(messages[5 + 17])
    assert "too early" in broken(end)
    assert isinstance(end.take(messages[5]), Stray)


@pytest.mark.parametrize("member", ["numParts", "fileSize", "fileHash", "dataSerialization"])
def test_parts_that_disagree_about_the_whole(member: str) -> None:
    end = End()
    first, second, _ = parts(end.call(), bytes(30), 10)
    end.take(first)
    end.take(second | {member: {"numParts": 4, "fileSize": 31, "fileHash": "x", "dataSerialization": "json"}[member]})
    assert "what an earlier one did not" in broken(end)


def test_a_part_beyond_the_total() -> None:
    end = End()
    message = parts(end.call(), bytes(30), 10)[0]
    end.take(message | {"partId": 4})
    assert "part 4 of 3" in broken(end)


def test_a_wrong_md5_of_the_whole_is_noticed_at_the_end() -> None:
    end = End()
    for message in parts(end.call(), bytes(30), 10):
        end.take(message | {"fileHash": "0" * 32})
    assert "MD5 of the whole" in broken(end)


def test_ids_of_others_are_strays_and_those_of_other_daemons_foreign() -> None:
    ids = CallIds(itertools.count(5).__next__)
    one, other = End(ids=ids), End(ids=ids)
    mine, theirs = one.call(), other.call()
    assert one.take(single(theirs, b"x")) == Stray(one.codec.session, foreign=True)
    assert one.take(single(999, b"x")) == Stray(one.codec.session, foreign=False)
    assert one.take(b'{"callId": %d, "status": "x"}' % theirs) == Stray(one.codec.session, foreign=True)
    other.codec.give_up(1)
    assert one.take(single(theirs, b"x")) == Stray(one.codec.session, foreign=False)
    assert isinstance(one.take(single(mine, b"x")), Answered)


@pytest.mark.parametrize(
    ("text", "strike"),
    [
        (b"", True), (b"hello", True), (b'{"status":200', True), (b'{"a":' * 100_000, True), (b"5", False),
        (b"[]", False),        (b"{}", False), (b'{"cmd":"ping"}', False), (b'{"status":"x"}', False),
    ],
)  # fmt: skip
def test_what_is_no_answer(text: bytes, strike: bool) -> None:
    end = End()
    end.call()
    with pytest.raises(NoReply) as error:
        end.take(text)
    assert error.value.strike is strike
    assert end.codec.open_count == 1


def test_an_answer_that_is_no_json_still_says_which_call_it_ends() -> None:
    end = End()
    end.take(b'{"status":200,"callId": %d, "data":"' % end.call())
    assert "cannot be read" in broken(end)


def test_what_is_remembered_of_calls_that_were_given_up_is_bounded() -> None:
    end = End()
    for attempt in range(1, 3000):
        end.call(attempt)
        end.codec.give_up(attempt)
    assert len(end.codec._given_up) == 1000
    assert not len(end.ids) and not end.codec.open_count


def test_the_end_of_a_link_forgets_everything() -> None:
    end = End()
    end.take(parts(end.call(), bytes(100), 10)[3])
    end.codec.close()
    assert not len(end.ids) and not end.codec.held_bytes and not end.codec.open_count


def test_random_parts_never_hold_more_than_the_window() -> None:
    draw = random.Random(7)
    for _ in range(200):
        data = draw.randbytes(draw.randint(1, 3000))
        size = draw.randint(1, 500)
        end = End(Bounds(1 << 20, 256))
        messages = parts(end.call(), data, size, packed=draw.random() < 0.5)
        if len(messages) < 2:
            continue
        order = sorted(range(len(messages)), key=lambda at: at + draw.random() * 8)
        for at in order:
            for _ in range(draw.choice((1, 1, 2))):
                end.take(messages[at], upto=draw.choice((None, 1 << 20)))
        if 1 in end.codec.results:
            end.codec.grant(Credit(None, 1, 1 << 20))
            end.work(end.codec.results[1])
        end.events = [each for each in end.events if not isinstance(each, Stray)]
        assert bytes(end.value[1][0]) == data


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 1 << 31, 1 << 63, 1 << 80, 1.5, "", "x", "0" * 32, "bytes", "json", "pickle",
    "YWJj", "YWJj*", "eJxLTEpOxI0AsgwLfQ==", [], [1], {}, {"a": 1}, "\ud800",
]  # fmt: skip


def test_no_message_breaks_the_codec() -> None:
    """Members replaced, missing, of any type: always an event, a result or NoReply, and tables that agree."""
    draw = random.Random(11)
    ended = 0
    for _ in range(4000):
        end = End(Bounds(5000, 300))
        data = draw.choice((b"abc", b"[1]", b"N.", bytes(900)))
        kind = draw.choice(("bytes", "json", "pickle"))
        for message in parts(end.call(), data, draw.choice((2, 400, 1000)), kind, packed=draw.random() < 0.3)[:20]:
            for name in draw.sample(sorted(message), draw.choice((0, 0, 1, 2))):
                message[name] = draw.choice(VALUES)
                if draw.random() < 0.2:
                    del message[name]
            text = json.dumps(message).encode()
            if draw.random() < 0.05:
                at = draw.randrange(len(text))
                text = text[:at] + draw.randbytes(1) + text[at + 1 :]
            try:
                end.take(text)
            except NoReply:
                pass
        codec = end.codec
        final = [each for each in end.events if isinstance(each, (Answered, BadReply))]
        assert len(final) == 1 - codec.open_count and len(codec._attempts) == len(codec._call_ids) == len(end.ids)
        assert set(codec.results) <= set(codec._call_ids) and codec.held_bytes >= 0
        ended += len(final)
    assert ended > 2000
