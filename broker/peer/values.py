"""Python values to JSON and attachments, and back. Nothing is ever pickled.

Bytes of any kind become an attachment, `{"$buffer": 0}` in the JSON; a numpy array becomes
`{"$array": {"$buffer": 0}, "dtype": "<f4", "shape": [2, 3]}`, its bytes in C order.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import sys
import uuid
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, TypeGuard

import msgspec

from broker.wire.attachments import ATTACHMENTS_MAX

Attachments = Sequence["bytes | memoryview"]

ARRAY_KINDS = frozenset("biufcmMSU")
"""kinds of numpy dtypes that travel: whatever has one plain memory layout; objects and structures do not"""


class ValueUnfit(ValueError):
    """A value that cannot travel, or that came damaged; the text says which and what would do."""


@dataclasses.dataclass(frozen=True)
class Array:
    """A numpy array where numpy is not installed: its dtype as numpy writes it, its shape, its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Encoded:
    """A value that is JSON text already, with the attachments it refers to: `encode` gives it back as it is.

    For who passes on what others have written. As a whole value only, not within another.
    """

    __slots__ = ("attachments", "text")

    def __init__(self, text: bytes, attachments: Attachments = ()) -> None:
        self.text = text
        self.attachments = attachments


def _make_encoder(default: Any) -> json.JSONEncoder:
    return json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=default)


def _refuse(value: object) -> object:
    raise _Lifting


class _Lifting(Exception):
    """There are values in it that are not plain JSON."""


_encode_plain = _make_encoder(_refuse).encode
_encode_numbers = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def encode(value: object) -> tuple[bytes, list[bytes | memoryview]]:
    """A value as JSON text and the attachments it refers to.

    Takes what JSON knows, bytes, bytearray, memoryview and numpy arrays (attachments), numpy's scalars, dataclasses,
    enums, paths, dates and UUIDs, and `Encoded`. Raises ValueUnfit for anything else, NaN and infinity among it.
    """
    if type(value) is Encoded:
        return value.text, list(value.attachments)
    try:
        return _encode_plain(value).encode(), []
    except _Lifting:
        attachments: list[bytes | memoryview] = []
        try:
            return _make_encoder(_Lifter(attachments).lift).encode(value).encode(), attachments
        except (ValueError, TypeError, RecursionError) as error:
            raise _explain(error) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise _explain(error) from None


def _explain(error: Exception) -> ValueUnfit:
    if isinstance(error, ValueUnfit):
        return error
    text = str(error)
    if "Out of range float" in text:
        return ValueUnfit("NaN and infinity are no JSON; send None, or a numpy array, which may hold them")
    if "Circular" in text:
        return ValueUnfit("it contains itself")
    if isinstance(error, RecursionError):
        return ValueUnfit("it is nested too deeply")
    if isinstance(error, UnicodeEncodeError):
        return ValueUnfit(f"text that is no Unicode: {error.reason}; send bytes")
    return ValueUnfit(text)


class _Lifter:
    """Takes out of a value what JSON does not know."""

    __slots__ = ("_attachments",)

    def __init__(self, attachments: list[bytes | memoryview]) -> None:
        self._attachments = attachments

    def lift(self, value: Any) -> object:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._attach(_flat(value))
        numpy = sys.modules.get("numpy")  # a value of numpy's cannot exist without it
        if numpy is not None:
            if isinstance(value, numpy.ndarray):
                return self._attach_array(value)
            if isinstance(value, numpy.generic):
                return self._scalar(value)
        if isinstance(value, Array):
            return {"$array": self._attach(_flat(value.data)), "dtype": value.dtype, "shape": list(value.shape)}
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, PurePath):
            return str(value)
        if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
            return value.isoformat()
        if isinstance(value, uuid.UUID):
            return str(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, msgspec.Struct):
            return msgspec.structs.asdict(value)
        kind = type(value)
        hint = "; make it a list" if isinstance(value, (set, frozenset)) else ""
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        raise ValueUnfit(f"a value of type {name} is no JSON{hint}")

    def _scalar(self, value: Any) -> object:
        plain = value.item()
        if isinstance(plain, float) and not math.isfinite(plain):
            raise ValueUnfit("NaN and infinity are no JSON; send None, or a numpy array, which may hold them")
        return plain

    def _attach(self, data: bytes | memoryview) -> dict[str, int]:
        if len(self._attachments) >= ATTACHMENTS_MAX:
            raise ValueUnfit(f"more than {ATTACHMENTS_MAX} attachments in one message")
        self._attachments.append(data)
        return {"$buffer": len(self._attachments) - 1}

    def _attach_array(self, array: Any) -> object:
        if array.dtype.kind not in ARRAY_KINDS:
            raise ValueUnfit(f"a numpy array of dtype {array.dtype} has no plain layout; send its parts, or bytes")
        data = array.tobytes()  # a copy, in C order: the array may change before it is sent
        return {"$array": self._attach(data), "dtype": array.dtype.str, "shape": list(array.shape)}


def _flat(value: bytes | bytearray | memoryview) -> bytes | memoryview:
    """The bytes themselves, as they are now: what is mutable is copied, since it may be sent later."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, memoryview) and value.readonly and value.contiguous:
        return value.cast("B") if value.nbytes else b""
    return bytes(value)


def decode(raw: bytes | memoryview | msgspec.Raw, attachments: Attachments) -> Any:
    """A value from JSON text, with its attachments in their places: bytes, and numpy arrays (read-only).

    Raises ValueUnfit for text that is no JSON and for a reference to an attachment that is not there.
    """
    try:
        value = _decode(raw) if memoryview(raw).nbytes else None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueUnfit(f"it is no JSON: {error}") from None
    if attachments:
        try:
            return _put_back(value, attachments)
        except RecursionError:
            raise ValueUnfit("it is nested too deeply") from None
    return value


def _put_back(value: Any, attachments: Attachments) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and "$buffer" in value:
            return bytes(_at(value["$buffer"], attachments))
        if len(value) == 3 and "$array" in value:
            return _array(value, attachments)
        return {key: _put_back(item, attachments) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_back(item, attachments) for item in value]
    return value


def _at(index: Any, attachments: Attachments) -> bytes | memoryview:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(attachments):
        raise ValueUnfit(f'"$buffer": {index!r:.40} names none of its {len(attachments)} attachments')
    return attachments[index]


def _array(value: dict[str, Any], attachments: Attachments) -> Any:
    reference, dtype, shape = value["$array"], value.get("dtype"), value.get("shape")
    if not isinstance(reference, dict) or not isinstance(dtype, str) or not _is_shape(shape):
        raise ValueUnfit('"$array" wants {"$buffer": n}, "dtype" a text and "shape" a list of lengths')
    data = _at(reference.get("$buffer"), attachments)
    try:
        import numpy
    except ImportError:
        return Array(dtype, tuple(shape), bytes(data))
    try:
        kind = numpy.dtype(dtype)
        if kind.kind not in ARRAY_KINDS or kind.hasobject:
            raise ValueUnfit(f"an array of dtype {dtype!r:.40} is not taken")
        if kind.itemsize * math.prod(shape) != len(data):
            raise ValueUnfit(f"an array of dtype {dtype} and shape {shape} does not have {len(data)} bytes")
        if not len(data):
            return numpy.empty(shape, kind)
        return numpy.frombuffer(data, kind).reshape(shape)
    except (TypeError, ValueError, SyntaxError) as error:
        raise _explain(error) from None


def _is_shape(shape: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list) and len(shape) <= 32
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
    )  # fmt: skip
