"""What a worker serves: functions by name, with their documentation and signatures."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from broker.core.access import is_name
from broker.worker.faults import BAD_PARAMS, NO_METHOD, Failure

DOC_MAX = 2000
"""characters of a docstring that are told to the broker"""

Function = Callable[..., Any]


class Method(msgspec.Struct, frozen=True):
    """One function under its name. `is_async`: calling it gives something to be awaited, or an async iterator.

    With `whole` it is called with the method's name and the parameters as they came.
    """

    name: str
    function: Function
    is_async: bool
    whole: bool = False


def make_method(function: Function, name: str | None = None) -> Method:
    """A function as a method. Raises TypeError for what is none, ValueError for a name that is none."""
    if not callable(function):
        raise TypeError(f"{function!r:.80} cannot be called, so it cannot be served")
    name = str(name or getattr(function, "__name__", ""))
    if not is_name(name) or name.startswith("broker."):
        raise ValueError(f"{name!r} is no name of a method; names are 1 to 128 of A-Z a-z 0-9 _ . -")
    call = getattr(type(function), "__call__", None)  # noqa: B004 - an object whose call is a coroutine function
    return Method(name, function, _is_async(function) or _is_async(call))


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def public_methods(source: object) -> Iterator[Method]:
    """The functions of an object, or those a module itself defines, whose names begin with no underscore."""
    for name in dir(source):
        if name.startswith("_"):
            continue
        if isinstance(inspect.getattr_static(source, name, None), property):
            continue  # asking for it would run it
        value = getattr(source, name, None)
        if inspect.ismodule(source):
            if not inspect.isfunction(value) or value.__module__ != source.__name__:
                continue
        elif not (inspect.isroutine(value)):
            continue
        yield make_method(value, name)


def describe(method: Method) -> dict[str, Any]:
    """What `broker.describe` tells of a method: `doc`, `signature`, and `params` with name, kind, type, default."""
    told: dict[str, Any] = {}
    doc = inspect.getdoc(method.function)
    if doc:
        told["doc"] = doc[:DOC_MAX]
    try:
        signature = _signature(method.function)
    except (TypeError, ValueError):
        return told  # a function written in C that says nothing of itself
    told["signature"] = str(signature)[:DOC_MAX]
    told["params"] = [_describe(parameter) for parameter in signature.parameters.values()]
    return told


class _Text(str):
    """An annotation that is text already (PEP 563) and is shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _signature(function: Function) -> inspect.Signature:
    """The signature, its annotations as they were written. Raises TypeError and ValueError where there is none."""
    signature = inspect.signature(function)
    parameters = [one.replace(annotation=_written(one.annotation)) for one in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=_written(signature.return_annotation))


def _written(annotation: Any) -> Any:
    return _Text(annotation) if isinstance(annotation, str) else annotation


def _describe(parameter: inspect.Parameter) -> dict[str, Any]:
    told: dict[str, Any] = {"name": parameter.name}
    if parameter.kind is parameter.VAR_POSITIONAL:
        told["many"] = "list"
    elif parameter.kind is parameter.VAR_KEYWORD:
        told["many"] = "dict"
    elif parameter.default is parameter.empty:
        told["required"] = True
    elif parameter.default is None or isinstance(parameter.default, (bool, int, float, str)):
        told["default"] = parameter.default
    if parameter.annotation is not parameter.empty:
        annotation = parameter.annotation
        told["type"] = str(annotation) if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return told


def wrong_params(method: Method, arguments: list[Any], named: dict[str, Any], error: TypeError) -> Failure | None:
    """Why a function could not be called like this; None if that was not the reason of its TypeError."""
    if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
        return None  # raised within it
    try:
        signature = _signature(method.function)
        signature.bind(*arguments, **named)
    except TypeError as reason:
        return Failure(BAD_PARAMS, "Invalid params", {"detail": f"{method.name}{signature}: {reason}"})
    except ValueError:
        return Failure(BAD_PARAMS, "Invalid params", {"detail": f"{method.name}: {error}"})
    return None


def no_method(name: str, names: list[str]) -> Failure:
    """There is no such method here; the names that come near."""
    near = difflib.get_close_matches(name, names, 3, 0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names[:20]) or 'none'}"
    return Failure(NO_METHOD, "Method not found", {"detail": f"no method {name[:128]}; {hint}", "near": near})
