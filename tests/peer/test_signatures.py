"""Signatures there and back; what is no signature, and what is too much of one."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from broker.peer.signatures import DETAIL_MAX, PARAMS_MAX, TEXT_MAX, UNTOLD, describe, read_signature, signature_of


def everything(a: int, /, b: str = "b", *more: bytes, c: bool, d: float | None = None, **rest: list[int]) -> bytes: ...
def nothing(): ...  # type: ignore[no-untyped-def]
def objects(a=print, b=("x",)): ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize("function", [everything, nothing, signature_of])
def test_there_and_back(function: Any) -> None:
    signature = signature_of(function)
    read = read_signature(json.loads(json.dumps(describe(signature))))
    assert read is not None
    assert str(read) == str(signature) == describe(signature)["signature"]
    assert [each.kind for each in read.parameters.values()] == [each.kind for each in signature.parameters.values()]


def test_a_default_that_cannot_be_told_is_still_one() -> None:
    read = read_signature(describe(signature_of(objects)))
    assert str(read) == "(a=…, b=…)"
    assert read is not None and read.parameters["a"].default is UNTOLD
    assert read.bind()


def test_it_is_bounded() -> None:
    source = f"def long(a={'x' * 5000!r}, b: {'y' * 5000} = 1, {', '.join(f'c{i}=0' for i in range(60))}): ..."
    found: dict[str, Any] = {}
    exec(f"from __future__ import annotations\n{source}", found)
    told = describe(signature_of(found["long"]))
    assert len(told["signature"]) == TEXT_MAX
    assert told["params"][0] == {"name": "a"}, "it has a default, which is too long to be told"
    assert len(told["params"][1]["type"]) == DETAIL_MAX
    exec(f"def many({', '.join(f'a{i}' for i in range(PARAMS_MAX + 1))}): ...", found)
    assert "params" not in describe(signature_of(found["many"]))


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"params": None},
        {"params": "x"},
        {"params": [{}]},
        {"params": [{"name": 1}]},
        {"params": ["x"]},
        {"params": [{"name": "a b"}]},
        {"params": [{"name": "class"}]},
        {"params": [{"name": "a"}, {"name": "a"}]},
        {"params": [{"name": "a"}, {"name": "b", "required": True}]},
        {"params": [{"name": "a", "many": "set"}]},
        {"params": [{"name": "a", "many": ["list"]}]},
        {"params": [{"name": "a", "kind": {}}]},
        {"params": [{"name": f"a{i}"} for i in range(PARAMS_MAX + 1)]},
    ],
)
def test_what_is_no_signature(told: dict[str, Any]) -> None:
    assert read_signature(told) is None


def test_a_strange_type_is_no_type() -> None:
    read = read_signature({"params": [{"name": "a", "required": True, "type": 3}], "returns": []})
    assert str(read) == "(a)"
    assert read is not None and read.return_annotation is inspect.Signature.empty
