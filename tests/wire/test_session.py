"""Jupyter's messages: the golden bytes, the table of what is accepted, Message, packers, bad input."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.wire.session import (
    DELIMITER,
    Message,
    MessageError,
    Session,
    SignatureError,
    extract_header,
    feed_identities,
    find_packer,
    message_id,
)
from tests.wire.jupyter import GOLDEN, of_format

KEY = b"a0436f6c-1916-498b-8eb9-e81ab9368e84"
DATE = "2026-01-02T03:04:05.000006Z"
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)  # fmt: skip
DICTS = st.dictionaries(st.text(max_size=5), NESTED, max_size=4)


def session(key: bytes = KEY, **more: Any) -> Session:
    return Session(key, "sess-0", username="u", process=7, **more)


def message(own: Session | None = None, **content: Any) -> dict[str, Any]:
    own = own or session()
    return own.build(own.header("execute_request", DATE), content or {"code": "1+1"})


def signed(frames: list[Any]) -> list[Any]:
    return feed_identities(frames)[1]


# --- golden bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", of_format("zmq_wire"), ids=lambda vector: str(vector["name"]))
def test_what_jupyter_client_wrote_is_read_and_signed_alike(vector: dict[str, Any]) -> None:
    frames = [bytes.fromhex(frame) for frame in vector["frames_hex"]]
    own = Session(vector["key"].encode(), "other", scheme=vector["signature_scheme"])
    identities, behind = feed_identities(frames)
    assert identities == [bytes.fromhex(identity) for identity in vector["idents_hex"]]
    assert own.sign(behind[1:5]) == behind[0]
    read = own.deserialize(behind)
    expected = vector["msg"]
    assert {name: read[name] for name in ("header", "parent_header", "metadata", "content")} == {
        name: expected[name] for name in ("header", "parent_header", "metadata", "content")
    }
    assert [bytes(buffer).hex() for buffer in read["buffers"]] == expected["buffers"]


@pytest.mark.parametrize("vector", of_format("zmq_wire"), ids=lambda vector: str(vector["name"]))
def test_what_is_serialised_reads_as_the_golden_message(vector: dict[str, Any]) -> None:
    own = Session(vector["key"].encode(), "other", scheme=vector["signature_scheme"])
    buffers = [bytes.fromhex(buffer) for buffer in vector["msg"]["buffers"]]
    frames = own.serialize({**vector["msg"], "buffers": buffers}, [bytes.fromhex(i) for i in vector["idents_hex"]])
    golden = [bytes.fromhex(frame) for frame in vector["frames_hex"]]
    at = len(vector["idents_hex"])
    assert frames[: at + 1] == golden[: at + 1]
    assert len(frames[at + 1]) == len(golden[at + 1]), "the signature, over other white space"
    assert [json.loads(bytes(f)) for f in frames[at + 2 : at + 6]] == [json.loads(f) for f in golden[at + 2 : at + 6]]
    assert frames[at + 6 :] == golden[at + 6 :]


def outcome(own: Session, frames: list[Any], *, content: bool = True) -> str:
    try:
        own.deserialize(signed(frames), content=content)
    except (SignatureError, MessageError) as error:
        return error.cause
    return "accepted"


def test_the_table_of_what_is_accepted() -> None:
    """Row by row as upstream, with the differences named: what is refused is never remembered, and the number of frames
    is looked at first.
    """
    own = session()
    frames = own.serialize(message())
    tampered = [*frames[:5], b'{"code": "2+2"}', *frames[6:]]
    assert outcome(own, frames) == "accepted"
    assert outcome(own, frames) == "duplicate_signature"
    fresh = session()
    assert outcome(fresh, frames, content=False) == "accepted"
    assert outcome(fresh, frames) == "accepted", "a look does not remember"
    forged = session()
    assert outcome(forged, tampered) == "invalid_signature"
    assert outcome(forged, frames) == "accepted", "a forgery blocks nothing; upstream: Duplicate Signature"
    assert outcome(forged, tampered) == "invalid_signature"
    assert outcome(session(), [DELIMITER, b"", *frames[2:]]) == "unsigned"
    assert outcome(session(), [*frames, b"appended"]) == "accepted", "buffers are not signed"
    assert outcome(session(), frames[:5]) == "malformed"
    assert outcome(session(), [DELIMITER, bytes(frames[1]).upper(), *frames[2:]]) == "invalid_signature"
    with pytest.raises(MessageError, match="no delimiter") as refused:
        feed_identities(frames[1:])
    assert refused.value.cause == "no_delimiter"
    for scheme in ("sha256", "hmac-nope"):
        with pytest.raises(ValueError, match="signature_scheme"):
            session(scheme=scheme)
    assert outcome(session(), session().serialize(message(x=float("nan")))) == "accepted"
    assert len(GOLDEN["zmq_wire_acceptance_table"]) == 14, "a new row belongs here"


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packer", ["json", "msgpack", (lambda value: json.dumps(value).encode(), json.loads)])
@given(content=DICTS, metadata=DICTS, identities=st.lists(st.binary(max_size=5), max_size=3), data=st.data())
def test_what_is_serialised_comes_back(
    packer: Any, content: dict[str, Any], metadata: dict[str, Any], identities: list[bytes], data: st.DataObject
) -> None:
    buffers = data.draw(st.lists(st.binary(max_size=20), max_size=3))
    if packer == "msgpack":  # which has no larger integers
        content, metadata = (json.loads(json.dumps(value), parse_int=lambda _: 1) for value in (content, metadata))
        content, metadata = ({k.encode("utf-8", "replace").decode(): 1 for k in value} for value in (content, metadata))
    own, other = session(packer=packer), session(packer=packer)
    parent = own.header("parent", DATE)
    made = own.build(own.header("comm_msg", DATE), content, parent, metadata)
    frames = own.serialize({**made, "buffers": buffers}, identities)
    again, behind = feed_identities(frames)
    assert again == identities
    read = other.deserialize(behind)
    assert [bytes(buffer) for buffer in read.pop("buffers")] == buffers
    assert read == made
    assert read["parent_header"] == parent


@given(st.lists(st.binary(max_size=30), max_size=9))
def test_random_frames_are_refused_with_a_cause(frames: list[bytes]) -> None:
    for own in (session(), session(b"")):
        try:
            own.deserialize(frames)
        except (SignatureError, MessageError) as error:
            assert error.cause in {"unsigned", "invalid_signature", "malformed"}
        else:
            raise AssertionError("accepted")


@pytest.mark.parametrize("part", range(1, 5))
@pytest.mark.parametrize(
    "bad", [b"", b"[]", b"1", b"null", b"{", b"\xff", b"[" * 200_000, b'{"a":' * 200_000, b'{"msg_id":1,"msg_type":2}']
)
def test_a_well_signed_message_that_is_none_is_malformed(part: int, bad: bytes) -> None:
    if part > 1 and bad.endswith(b"}"):
        bad = b'"text"'
    own = session()
    frames: list[Any] = list(own.serialize(message())[2:])
    frames[part - 1] = bad
    with pytest.raises(MessageError, match="malformed message") as refused:
        own.deserialize([own.sign(frames), *frames])
    assert refused.value.cause == "malformed"


@pytest.mark.parametrize("count", range(5))
def test_too_few_frames_are_refused_before_anything_else(count: int) -> None:
    frames = session().serialize(message())[1 : 1 + count]
    with pytest.raises(MessageError, match=f"{count} frames behind the delimiter"):
        session().deserialize(frames)
    with pytest.raises(MessageError, match=f"{count} frames behind the delimiter"):
        session(b"").deserialize(frames)


def test_the_history_is_bounded() -> None:
    own, other = session(), session(history_max=2)
    sent = [own.serialize(message(own)) for _ in range(3)]
    assert [outcome(other, frames) for frames in sent] == ["accepted"] * 3
    assert [outcome(other, frames) for frames in reversed(sent)] == ["duplicate_signature"] * 2 + ["accepted"]


# --- building --------------------------------------------------------------------------------------------------------


def test_a_message_has_a_header_a_parent_and_its_own_metadata() -> None:
    own = session(metadata={"a": 1, "b": 1})
    first = own.build(own.header("kernel_info_request", DATE))
    reply = own.build(own.header("kernel_info_reply", DATE), {"status": "ok"}, first, {"b": 2})
    assert first["header"] == {
        "msg_id": "sess-0_7_0", "msg_type": "kernel_info_request", "username": "u", "session": "sess-0", "date": DATE,
        "version": "5.4",
    }  # fmt: skip
    assert (first["msg_id"], first["msg_type"]) == ("sess-0_7_0", "kernel_info_request")
    assert reply["parent_header"] == first["header"]
    assert reply["metadata"] == {"a": 1, "b": 2}
    assert reply["msg_id"] == message_id("sess-0", 7, 1)
    assert own.metadata == {"a": 1, "b": 1}


def test_content_that_is_packed_already_passes() -> None:
    own = session()
    for content in (b'{"a":1}', '{"a":1}'):
        assert own.serialize({**message(), "content": content})[-1] == b'{"a":1}'
    assert own.serialize({**message(), "content": None})[-1] == b"{}"
    with pytest.raises(TypeError, match="not list"):
        own.serialize({**message(), "content": [1]})


def test_an_identity_alone_is_one() -> None:
    assert session().serialize(message(), b"me")[:2] == [b"me", DELIMITER]


def test_no_key_is_shown() -> None:
    assert KEY.decode() not in repr(session())
    assert "unsigned" in repr(session(b""))


def test_a_key_and_a_scheme_that_are_assigned_hold() -> None:
    sender, receiver = session(), session()
    sender.key = receiver.key = b"another"
    frames = signed(sender.serialize(message()))
    receiver.deserialize(frames)
    with pytest.raises(SignatureError, match="Invalid Signature"):
        session().deserialize(frames)
    sender.signature_scheme = "hmac-sha512"
    frames = signed(sender.serialize(message()))
    assert len(frames[0]) == 128
    with pytest.raises(SignatureError, match="is the scheme the same"):
        receiver.deserialize(frames)
    sender.key = b""
    assert signed(sender.serialize(message()))[0] == b""
    assert "unsigned" in repr(sender)


def test_a_key_or_a_scheme_that_is_none_is_refused_and_the_old_one_stays() -> None:
    own = session()
    with pytest.raises(ValueError, match="names no hash"):
        own.signature_scheme = "hmac-nothing"
    for key in ("text", None, 5):
        with pytest.raises(TypeError, match="has to be bytes"):
            own.key = key  # type: ignore[assignment]
        with pytest.raises(TypeError, match="has to be bytes"):
            session(key)  # type: ignore[arg-type]
    assert (own.key, own.signature_scheme) == (KEY, "hmac-sha256")
    session().deserialize(signed(own.serialize(message())))


def test_extract_header() -> None:
    made = message()
    assert extract_header(made) == made["header"]
    assert extract_header(made["header"]) == made["header"]
    assert extract_header(Message(made)) == made["header"]
    assert extract_header(None) == extract_header({}) == {}
    with pytest.raises(KeyError, match="neither a message"):
        extract_header({"content": {}})


@given(DICTS)
def test_a_message_converts_to_and_from_a_dict(value: dict[str, Any]) -> None:
    made = Message(value)
    assert dict(made) == value
    assert Message(made) == made
    assert all(name in made for name in value)


def test_a_message_has_attributes() -> None:
    made = Message(message(code="1+1"))
    assert made.header.msg_type == "execute_request"
    assert made["content"].code == "1+1"
    assert made == Message(dict(made))
    assert "Message({'header'" in repr(made)
    with pytest.raises(AttributeError):
        _ = made.nothing
    with pytest.raises(KeyError):
        _ = made["nothing"]
    assert dict(Message({"keys": 1})) == {"keys": 1}
    assert Message({"keys": 1})["keys"] == 1
    own = session()
    assert own.deserialize(signed(own.serialize(made)))["content"] == {"code": "1+1"}


# --- packers ---------------------------------------------------------------------------------------------------------


def test_json_says_what_json_can_say() -> None:
    pack, unpack = find_packer("json")
    assert unpack(pack({"name": "\udc80", "big": 2**200, "x": [1.5, None]})) == {
        "name": "\udc80", "big": 2**200, "x": [1.5, None],
    }  # fmt: skip
    assert unpack(pack({"x": float("nan")})) == {"x": None}
    assert str(unpack(b'{"x": NaN}')["x"]) == "nan", "as some kernels write it"
    assert unpack(pack({"x": {1}, "y": (1, 2)})) == {"x": [1], "y": [1, 2]}, "as jupyter_client does it"
    with pytest.raises(TypeError):
        pack({"x": object()})


Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@pytest.mark.parametrize(
    ("packer", "named"),
    [
        ("pickle", "never pickle"),
        ("json.loads", "there is no packer"),
        ((pickle.dumps, pickle.loads), "may run what a peer sends"),
        ((lambda value: json.dumps(value).encode(), pickle.loads), "may run what a peer sends"),
        ((functools.partial(json.dumps), json.loads), "bytes are needed"),
        ((lambda _: b"{}", json.loads), "no pair"),
    ],
)
def test_a_packer_that_cannot_be_one(packer: str | Pair, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        session(packer=packer)
