"""Contexts: the brokers a person uses, by name, with URL and token, and which of them is meant when none is named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from broker.auth.private_files import locked, make_private_folder, read_checked, replace_file

CONTEXTS_MAX = 1000
LOCAL = "local"
"""the name that stands for the broker running on this machine; no context has it"""
_SIZE_MAX = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class ContextError(Exception):
    """Why contexts cannot be read or changed, in one line that says what to do."""


class Context(msgspec.Struct, frozen=True):
    """One broker: where it is and how to get in."""

    url: str
    token: str = ""


class Contexts(msgspec.Struct, frozen=True):
    """All of them, by name; `current` is the one in use, None for the broker on this machine."""

    contexts: dict[str, Context] = {}
    current: str | None = None

    @property
    def in_use(self) -> Context | None:
        """The broker that is meant when none is named."""
        return self.contexts.get(self.current) if self.current is not None else None


def contexts_path() -> Path:
    """Where they are kept: `broker/contexts.json` in $XDG_CONFIG_HOME, else in ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(home if home.startswith("/") else Path.home() / ".config", "broker", "contexts.json")


def load_contexts(path: Path | None = None) -> Contexts:
    """What is kept; nothing if there is no file. Raises ContextError if it is damaged, or others could write it."""
    path = path or contexts_path()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return Contexts()
    except OSError as error:
        raise ContextError(f"cannot read the contexts {path}: {error.strerror}") from None
    try:
        return msgspec.json.decode(read_checked(descriptor, path, _SIZE_MAX), type=Contexts)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ContextError(f"{path} is damaged ({error}); mend or remove it") from None
    except (OSError, ValueError) as error:
        raise ContextError(str(error)) from None
    finally:
        os.close(descriptor)


def add_context(name: str, url: str, token: str, path: Path | None = None) -> bool:
    """Keep a broker under a name; the first one is in use at once. Returns whether it took another's place.

    Raises ContextError for a name that is none.
    """
    if not _NAME.fullmatch(name) or name == LOCAL:
        taken = f"; {LOCAL} stands for the broker on this machine" if name == LOCAL else ""
        raise ContextError(f"{name!r:.80} is no name for a context: 1 to 64 of A-Z a-z 0-9 _ . -{taken}")

    def change(old: Contexts) -> Contexts:
        if len(old.contexts) >= CONTEXTS_MAX and name not in old.contexts:
            raise ContextError(f"there are {CONTEXTS_MAX} contexts; remove some")
        first = name if not old.contexts else old.current
        return Contexts(old.contexts | {name: Context(url, token)}, first)

    return name in _change(change, path).contexts


def use_context(name: str, path: Path | None = None) -> None:
    """Use this one from now on; `local` uses none. Raises ContextError if there is none of that name."""

    def change(old: Contexts) -> Contexts:
        if name != LOCAL:
            _known(old, name)
        return Contexts(old.contexts, None if name == LOCAL else name)

    _change(change, path)


def remove_context(name: str, path: Path | None = None) -> bool:
    """Forget one; whether it was in use. Raises ContextError if there is none of that name."""

    def change(old: Contexts) -> Contexts:
        _known(old, name)
        left = {other: context for other, context in old.contexts.items() if other != name}
        return Contexts(left, None if old.current == name else old.current)

    return _change(change, path).current == name


def _known(contexts: Contexts, name: str) -> None:
    if name not in contexts.contexts:
        there = ", ".join(contexts.contexts) or "none"
        raise ContextError(f"there is no context {name!r:.80}; there are: {there}")


def _change(change: Callable[[Contexts], Contexts], path: Path | None) -> Contexts:
    """Replace what is kept; returns what was."""
    path = path or contexts_path()
    try:
        make_private_folder(path.parent)
        with locked(path):
            old = load_contexts(path)
            os.close(replace_file(path, msgspec.json.format(msgspec.json.encode(change(old)), indent=2)))
            return old
    except OSError as error:
        raise ContextError(f"cannot write the contexts {path}: {error}") from None
