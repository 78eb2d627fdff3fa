"""What a worker serves: functions by name, with their documentation and signatures."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from broker.core.access import is_name
from broker.peer import signatures
from broker.peer.signatures import signature_of
from broker.worker.faults import BAD_PARAMS, NO_METHOD, Failure

DOC_MAX = 2000
"""characters of a docstring that are told to the broker"""

DESCRIBED_MAX_BYTES = 256 << 10
"""of JSON that is told of all methods together, so that the workers of an endpoint fit into one `broker.describe`"""

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
    """What `broker.describe` tells of a method: `doc`, cut at DOC_MAX, and its signature (`signatures.describe`)."""
    told: dict[str, Any] = {}
    doc = inspect.getdoc(method.function)
    if doc:
        told["doc"] = doc[:DOC_MAX]
    try:
        signature = signature_of(method.function)
    except (TypeError, ValueError):
        return told  # a function written in C that says nothing of itself
    return told | signatures.describe(signature)


def describe_all(methods: Mapping[str, Method]) -> dict[str, dict[str, Any]]:
    """What is told of each; of those for which there is no room any more, the name alone."""
    told, room = {}, DESCRIBED_MAX_BYTES
    for name, method in methods.items():
        about = describe(method)
        room -= len(msgspec.json.encode(about))
        told[name] = about if room >= 0 else {}
    return told


def wrong_params(method: Method, arguments: list[Any], named: dict[str, Any], error: TypeError) -> Failure | None:
    """Why a function could not be called like this; None if that was not the reason of its TypeError."""
    if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
        return None  # raised within it
    try:
        signature = signature_of(method.function)
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
