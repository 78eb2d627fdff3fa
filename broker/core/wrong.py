"""What is wrong with a value of the wrong type, or with a name nobody knows, in words for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

import msgspec

_NAME_MAX = 40
"""characters of an unknown name that are repeated"""
_WORDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "object": "an object",
    "array": "a list",
}  # fmt: skip
_FOUND = _WORDS | {"float": "a fraction"}
_TYPES = re.compile(r"`([a-z |]+)`")
_PATTERN = re.compile(r" matching regex .*", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


def hint_for(name: str, names: Iterable[str], form: str = "{}") -> str:
    """`did you mean …?`, or which names there are, if any; `form` is how a name is written."""
    names = list(names)
    near = difflib.get_close_matches(name[: 2 * _NAME_MAX], names, 1)  # comparing takes time by the length
    return f"did you mean {form.format(near[0])}?" if near else f"there are {', '.join(names) or 'none'}"


def what_is_wrong(
    error: msgspec.ValidationError, names: Iterable[str] = (), given: Mapping[str, str] | None = None, whole: str = ""
) -> str:
    """One line: which member, what was expected, what was found.

    `names` are those that could have been meant, `given` what was written where all is text, `whole` stands for the
    value as a whole.
    """
    text, _, path = str(error).partition(" - at `$")
    path = path.removeprefix(".").removesuffix("`") or whole
    unknown, missing = _UNKNOWN.fullmatch(text), _MISSING.fullmatch(text)
    if unknown:
        text = f"unknown member {unknown[1][:_NAME_MAX]!r}; {hint_for(unknown[1], names)}"
    elif missing:
        text = f"{missing[1]} is missing"
    else:
        text = _say_types(text, (given or {}).get(path))
    return f"{path}: {text}" if path else text


def _say_types(text: str, given: str | None) -> str:
    expected, comma, found = text.partition(", got ")
    if "regex" in expected:  # names have one, nothing else has
        expected = _PATTERN.sub(": 1 to 128 of A-Z a-z 0-9 _ . -, the first none of . -", expected)
    expected = _TYPES.sub(lambda match: _either(match[1]), expected)
    expected = expected[:1].lower() + expected[1:]
    if not comma:
        return expected
    found = _TYPES.sub(lambda match: _FOUND.get(match[1], match[1]), found)
    return f"{expected}, got {found if given is None else repr(given[:_NAME_MAX])}"


def _either(types: str) -> str:
    *first, last = [_WORDS.get(kind, kind) for kind in types.split(" | ") if kind != "null"] or ["null"]
    return f"{', '.join(first)} or {last}" if first else last
