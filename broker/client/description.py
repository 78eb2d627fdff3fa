"""What the workers of an endpoint tell of their methods: names, signatures, documentation; how to put params."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from broker.core.wrong import hint_for
from broker.peer.signatures import TEXT_MAX, read_signature

HINT_MAX = 300
"""characters of what is said about names that could have been meant"""


class Described(msgspec.Struct, frozen=True):
    """One method as a worker tells of it; `text` is its signature as it was written."""

    doc: str = ""
    text: str = ""
    signature: inspect.Signature | None = None


class Description:
    """What all workers of an endpoint tell together; of a method that several have, what the first says.

    `is_open`: one of them does not say which methods it has, so that any name may be one. `has_daemons`: one of them is
    an rt-cloud daemon, whose methods are `Class.attribute`. `unknown` says why nothing is known.
    """

    __slots__ = ("_open", "doc", "has_daemons", "is_open", "methods")

    def __init__(self, workers: Iterable[Mapping[str, Any]] = (), unknown: str = "") -> None:
        self.doc = ""
        self.methods: dict[str, Described] = {}
        self.is_open = self.has_daemons = False
        served = False
        for worker in workers:
            served = True
            self._read(worker)
        self.is_open = self.is_open or not served
        self._open = "Not all workers say which methods they have: any name may be one."
        if not served:
            self._open = f"Its methods are not known: {unknown or 'no worker is there'}."

    def _read(self, worker: Mapping[str, Any]) -> None:
        given, names = worker.get("info"), worker.get("methods")
        info = given if isinstance(given, dict) else {}
        self.is_open = self.is_open or names is None
        self.has_daemons = self.has_daemons or info.get("dialect") == "rtcloud"
        self.doc = self.doc or _text(info, "doc")
        told = info.get("methods")
        methods = told if isinstance(told, dict) else {}
        for name in (*(names or ()), *(methods if names is None else ())):
            about = methods.get(name)
            if isinstance(about, dict) and not self.methods.get(name, _NOTHING).text:
                self.methods[name] = Described(_text(about, "doc"), _text(about, "signature"), read_signature(about))
            else:
                self.methods.setdefault(name, _NOTHING)

    def may_have(self, name: str) -> bool:
        """Whether some worker has the method, or may have it: `Class.*` stands for whatever that class has."""
        return self.is_open or name in self.methods or f"{name.rpartition('.')[0]}.*" in self.methods

    def is_class(self, prefix: str, name: str) -> bool:
        """Whether a name after `prefix` is no method, but something that has methods."""
        if prefix + name in self.methods:
            return False
        below = f"{prefix}{name}."
        return (self.has_daemons and not prefix and self.is_open) or any(
            each.startswith(below) for each in self.methods
        )

    def below(self, prefix: str) -> Iterator[str]:
        """The names that come next after `prefix`, which is empty or ends with a dot; each once."""
        found = (name[len(prefix) :].partition(".")[0] for name in self.methods if name.startswith(prefix))
        return (each for each in dict.fromkeys(found) if each.isidentifier() and not each.startswith("_"))

    def summary(self, prefix: str) -> str:
        """The methods after `prefix`, a line for each: signature, and the first line of what they are for."""
        lines = [self.doc, ""] if self.doc else []
        for name, about in sorted(self.methods.items()):
            if name.startswith(prefix):
                first = about.doc.partition("\n")[0]
                lines.append(f"{name[len(prefix) :]}{about.text}{f'  {first}' if first else ''}")
        if self.is_open:
            lines.append(self._open)
        return "\n".join(lines)

    def hint(self, name: str, prefix: str) -> str:
        """Which name could have been meant instead."""
        return hint_for(name, sorted(self.below(prefix)))[:HINT_MAX]

    def params(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The params for a call with these arguments. Raises TypeError if they do not fit the signature."""
        about = self.methods.get(name)
        if about is None and self.has_daemons:
            return {"args": list(arguments), "kwargs": named}
        signature = None if about is None else about.signature
        if signature is not None:
            return _bound(name, signature, arguments, named)
        if arguments and named:
            raise TypeError(f"{name}: its worker tells no signature; give all arguments by position, or all by name")
        return list(arguments) if arguments else named or None


_NOTHING = Described()


def _bound(name: str, signature: inspect.Signature, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """JSON-RPC knows params by position or by name, not both (specification, section 4.2)."""
    try:
        bound = signature.bind(*arguments, **named)
    except TypeError as error:
        raise TypeError(f"{name}{signature}: {error}") from None
    if not named:
        return list(arguments) or None
    if not arguments:
        return named
    if not bound.kwargs:
        return list(bound.args)
    members: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.name not in bound.arguments:
            continue
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_KEYWORD:
            members |= value
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(f"{name}{signature}: it cannot be told {parameter.name} by position and others by name")
        else:
            members[parameter.name] = value
    return members


def _text(told: Mapping[str, Any], name: str) -> str:
    value = told.get(name)
    return value[:TEXT_MAX] if isinstance(value, str) else ""
