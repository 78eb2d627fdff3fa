"""What is served of functions, objects and modules, and what is told of it."""

import functools
import json
import types

import pytest

from broker.worker.methods import (
    DESCRIBED_MAX_BYTES,
    describe,
    describe_all,
    make_method,
    no_method,
    public_methods,
    wrong_params,
)


class Camera:
    """A camera."""

    exposure = 3

    @property
    def costly(self) -> int:
        raise AssertionError("asking what it serves must not run it")

    def take(self, count: int = 1, *, name: str) -> bytes:
        """Take an image.

        More text.
        """
        return b""

    async def move(self, *steps: int, **how: str) -> None: ...

    @staticmethod
    def info() -> str:
        return ""

    def _inner(self) -> None: ...


def test_an_objects_public_methods() -> None:
    methods = {method.name: method for method in public_methods(Camera())}
    assert sorted(methods) == ["info", "move", "take"]
    assert methods["move"].is_async
    assert not methods["take"].is_async


def test_what_is_told_of_all_methods_has_a_bound() -> None:
    def told(long: str) -> None: ...

    told.__doc__ = "x" * 5000
    described = describe_all({f"m{number}": make_method(told, f"m{number}") for number in range(1000)})
    assert len(described) == 1000
    assert DESCRIBED_MAX_BYTES // 2 < len(json.dumps(described)) < DESCRIBED_MAX_BYTES + 20_000
    assert len(described["m0"]["doc"]) == 2000
    assert described["m999"] == {}


def test_a_modules_own_functions() -> None:
    module = types.ModuleType("mine")
    exec("from os.path import join\nimport os\nclass A: ...\ndef read(): ...\ndef _hidden(): ...", module.__dict__)
    assert [method.name for method in public_methods(module)] == ["read"]


def test_what_is_told_of_a_method() -> None:
    camera = Camera()
    assert describe(make_method(camera.take)) == {
        "doc": "Take an image.\n\nMore text.",
        "signature": "(count: int = 1, *, name: str) -> bytes",
        "params": [
            {"name": "count", "default": 1, "type": "int"},
            {"name": "name", "required": True, "kind": "keyword", "type": "str"},
        ],
        "returns": "bytes",
    }
    assert describe(make_method(camera.move))["params"] == [
        {"name": "steps", "many": "list", "type": "int"},
        {"name": "how", "many": "dict", "type": "str"},
    ]
    assert "signature" not in describe(make_method(dict.update, "update")), "it says nothing of itself"
    assert describe(make_method(functools.partial(camera.take, name="x"), "partial"))["params"]


@pytest.mark.parametrize("name", ["", "a b", "broker.ping", "a/b", "ä"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a method"):
        make_method(lambda: None, name)


def test_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="cannot be called"):
        make_method(5, "five")  # type: ignore[arg-type]


def called(function: object, *arguments: object, **named: object) -> object:
    method = make_method(function, "f")  # type: ignore[arg-type]
    try:
        method.function(*arguments, **named)
    except TypeError as error:
        return wrong_params(method, list(arguments), named, error)
    raise AssertionError("it did not fail")


def test_wrong_parameters_are_told_from_errors_within() -> None:
    def own(x: int) -> int:
        return x + "1"  # type: ignore[operator]

    def deeper(x: int) -> int:
        return own()  # type: ignore[call-arg]

    failure = called(own)
    assert failure is not None
    assert "missing a required argument: 'x'" in str(failure)
    assert "unexpected keyword argument 'y'" in str(called(own, 1, y=1))
    assert called(own, 1) is None
    assert called(deeper, 1) is None
    assert called(len, 5) is None, "a function in C that raises within"


def test_nearest_names() -> None:
    assert "did you mean read?" in str(no_method("raed", ["read", "write"]))
    assert "there are read, write" in str(no_method("xxxxxxx", ["read", "write"]))
