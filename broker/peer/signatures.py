"""Signatures as data: what a worker tells of its functions, and what a caller makes of that again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

TEXT_MAX = 2000
"""characters of a signature as text"""
PARAMS_MAX = 100
"""parameters that are told; of a function with more, the text alone"""
DETAIL_MAX = 200
"""characters of a default or of a type; a longer default is not told, a longer type is cut"""

_KINDS: dict[str, Any] = {"positional": inspect.Parameter.POSITIONAL_ONLY, "keyword": inspect.Parameter.KEYWORD_ONLY}
_MANY: dict[str, Any] = {"list": inspect.Parameter.VAR_POSITIONAL, "dict": inspect.Parameter.VAR_KEYWORD}


class _Text(str):
    """An annotation that is text already (PEP 563), or a default that is not known: shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


UNTOLD = _Text("…")
"""stands for a default that was not told"""


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, its annotations as they were written. Raises TypeError and ValueError where there is none."""
    signature = inspect.signature(function)
    parameters = [one.replace(annotation=_written(one.annotation)) for one in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=_written(signature.return_annotation))


def _written(annotation: Any) -> Any:
    return _Text(annotation) if isinstance(annotation, str) else annotation


def describe(signature: inspect.Signature) -> dict[str, Any]:
    """A signature as JSON, at most some 50 KB: `signature`, the text; `params`, each with name, kind, type and default
    as far as it has them; `returns`, the type.

    `kind` stands only where a parameter is given by position alone (`positional`) or by name alone (`keyword`).
    """
    told: dict[str, Any] = {"signature": str(signature)[:TEXT_MAX]}
    if len(signature.parameters) <= PARAMS_MAX:
        told["params"] = [_describe(parameter) for parameter in signature.parameters.values()]
    if signature.return_annotation is not signature.empty:
        told["returns"] = _type(signature.return_annotation)
    return told


def _describe(parameter: inspect.Parameter) -> dict[str, Any]:
    told: dict[str, Any] = {"name": parameter.name}
    if parameter.kind is parameter.VAR_POSITIONAL:
        told["many"] = "list"
    elif parameter.kind is parameter.VAR_KEYWORD:
        told["many"] = "dict"
    elif parameter.default is parameter.empty:
        told["required"] = True
    elif _can_be_told(parameter.default):
        told["default"] = parameter.default
    for name, kind in _KINDS.items():
        if parameter.kind is kind:
            told["kind"] = name
    if parameter.annotation is not parameter.empty:
        told["type"] = _type(parameter.annotation)
    return told


def _can_be_told(default: Any) -> bool:
    return default is None or (isinstance(default, (bool, int, float, str)) and len(str(default)) <= DETAIL_MAX)


def _type(annotation: Any) -> str:
    text = str(annotation) if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text[:DETAIL_MAX]


def read_signature(told: dict[str, Any]) -> inspect.Signature | None:
    """What `describe` told, as a signature again; None for what says nothing of its parameters, or nothing sound.

    Types are texts, and a default that was not told is `UNTOLD`.
    """
    params = told.get("params")
    if not isinstance(params, list) or len(params) > PARAMS_MAX:
        return None
    try:
        parameters = [_read(each) for each in params]
        returns = told.get("returns")
        return inspect.Signature(
            parameters, return_annotation=_Text(returns) if isinstance(returns, str) else inspect.Signature.empty
        )
    except (ValueError, TypeError, KeyError):
        return None  # names that are none, twice, or in an order that cannot be


def _read(told: Any) -> inspect.Parameter:
    if not isinstance(told, dict):
        raise TypeError("a parameter is an object")
    many = told.get("many")
    kind = _MANY[many] if many else _KINDS.get(told.get("kind", ""), inspect.Parameter.POSITIONAL_OR_KEYWORD)
    default: Any = inspect.Parameter.empty
    if not many and told.get("required") is not True:
        default = told.get("default", UNTOLD)
    written = told.get("type")
    annotation = _Text(written) if isinstance(written, str) else inspect.Parameter.empty
    return inspect.Parameter(told["name"], kind, default=default, annotation=annotation)
