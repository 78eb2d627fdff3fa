"""Values there and back: what travels, what is refused and how it says so."""

import datetime
import enum
import json
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.peer.values import Array, ValueUnfit, decode, encode


def there_and_back(value: Any) -> Any:
    return decode(*encode(value))


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1, 2**63, 10**30, 0.1, "", "ä\u2028\x00", [], {}, {"a": [1, {"b": None}]}, [[[]]], {"$buffer": 7}],
)
def test_json_comes_back_as_it_was(value: object) -> None:
    raw, attachments = encode(value)
    assert not attachments
    assert json.loads(raw) == value
    assert decode(raw, attachments) == value


@pytest.mark.parametrize("data", [b"", b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(b"abcdef")[::2]])
def test_bytes_of_any_kind_come_back_as_bytes(data: bytes) -> None:
    raw, attachments = encode({"deep": [data, 1]})
    assert raw == b'{"deep":[{"$buffer":0},1]}'
    assert [bytes(attachment) for attachment in attachments] == [bytes(data)]
    assert there_and_back({"deep": [data, 1]}) == {"deep": [bytes(data), 1]}


def test_what_is_mutable_is_copied_at_once() -> None:
    data, array = bytearray(b"abc"), np.zeros(3, "u1")
    _, attachments = encode([data, memoryview(data), array])
    data[:] = b"xyz"
    array[:] = 7
    assert [bytes(a) for a in attachments] == [b"abc", b"abc", b"\0\0\0"]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(6, dtype=">i2").reshape(2, 3).T,
        np.array(3.5),
        np.zeros((0, 4), "f4"),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.array(["a", "bcd"]),
        np.array([b"a", b"bcd"]),
        np.array(["2024-01-01", "2024-01-02"], dtype="M8[D]"),
        np.array([np.nan, np.inf]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_keep_dtype_shape_and_contents(array: Any) -> None:
    back = there_and_back([array])[0]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_an_array_is_described_on_the_wire() -> None:
    raw, attachments = encode({"a": np.arange(3, dtype="<f4")})
    assert json.loads(raw) == {"a": {"$array": {"$buffer": 0}, "dtype": "<f4", "shape": [3]}}
    assert bytes(attachments[0]) == np.arange(3, dtype="<f4").tobytes()


def test_without_numpy_an_array_is_a_plain_record_that_can_be_sent_on(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, attachments = encode(np.arange(3, dtype="<f4"))
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "numpy", None)
        plain = decode(raw, attachments)
        assert plain == Array("<f4", (3,), np.arange(3, dtype="<f4").tobytes())
        raw, attachments = encode([plain, 1])
    back = decode(raw, attachments)[0]
    assert (back == np.arange(3, dtype="<f4")).all()


def test_common_values_have_their_plain_form() -> None:
    @dataclass
    class Point:
        x: int
        data: bytes

    class Colour(enum.Enum):
        RED = "red"

    value = [
        np.int64(3), np.float32(0.5), np.bool_(True), Path("a/b"), Colour.RED, Point(1, b"d"), (1, 2),
        datetime.datetime(2024, 1, 2, 3, 4, tzinfo=datetime.UTC), uuid.UUID(int=1),
    ]  # fmt: skip
    assert there_and_back(value) == [
        3, 0.5, True, "a/b", "red", {"x": 1, "data": b"d"}, [1, 2],
        "2024-01-02T03:04:00+00:00", "00000000-0000-0000-0000-000000000001",
    ]  # fmt: skip


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1, 2}, "type set is no JSON; make it a list"),
        (object(), "type object is no JSON"),
        ({"a": lambda: 1}, "type function is no JSON"),
        (float("nan"), "NaN and infinity are no JSON"),
        (np.float32("nan"), "NaN and infinity are no JSON"),
        ([b"x", float("inf")], "NaN and infinity are no JSON"),
        ({(1, 2): 3}, "keys must be"),
        ("\ud800", "no Unicode"),
        (np.array([object()]), "no plain layout"),
        (np.zeros(2, [("a", "i4")]), "no plain layout"),
        (circular(), "contains itself"),
        ([b""] * 1025, "more than 1024 attachments"),
    ],
)
def test_what_cannot_travel_is_named(value: object, says: str) -> None:
    with pytest.raises(ValueUnfit, match=says):
        encode(value)


def test_what_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ValueUnfit, match="nested too deeply"):
        encode(deep())
    with pytest.raises(ValueUnfit):
        decode(b"[" * 100_000 + b"]" * 100_000, ())


@pytest.mark.parametrize(
    "raw",
    [
        b'{"$buffer":1}', b'{"$buffer":-1}', b'{"$buffer":true}', b'{"$buffer":"0"}', b"{", b"",
        b'{"$array":{"$buffer":1},"dtype":"u1","shape":[1]}',
        b'{"$array":{"$buffer":0},"dtype":"O","shape":[1]}',
        b'{"$array":{"$buffer":0},"dtype":"i4,i4","shape":[1]}',
        b'{"$array":{"$buffer":0},"dtype":"no such","shape":[1]}',
        b'{"$array":{"$buffer":0},"dtype":"u1","shape":[5]}',
        b'{"$array":{"$buffer":0},"dtype":"u1","shape":[-1]}',
        b'{"$array":{"$buffer":0},"dtype":"u1","shape":1}',
        b'{"$array":0,"dtype":"u1","shape":[1]}',
    ],
)  # fmt: skip
def test_a_damaged_reference_is_refused(raw: bytes) -> None:
    if not raw:
        assert decode(raw, [b"abc"]) is None
        return
    with pytest.raises(ValueUnfit):
        decode(raw, [b"abc"])
