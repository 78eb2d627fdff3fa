"""One configuration out of a TOML file, the environment and the command line's flags, or one clear error."""

import difflib
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import msgspec

from broker.config import rules
from broker.config.errors import ConfigError
from broker.config.fields import FIELDS, SECTIONS, Path, bare_values, dotted, field_at, literal, variable
from broker.config.model import Config, Endpoint
from broker.core.access import is_name

__all__ = ["ConfigError", "Loaded", "check", "chosen_file", "load", "load_with_origins"]

FLAGS = "command line"
CODE = "Config"
"""the source of what a program has made itself"""
SHOWN_MAX = 80
"""characters of a wrong value that an error repeats"""


class _Setting(msgspec.Struct, frozen=True):
    """One value as somebody wrote it. `base` is where relative paths start; `text` says it came as a string."""

    value: Any
    source: str
    text: bool = False
    base: FilePath | None = None


class Loaded(msgspec.Struct, frozen=True):
    """A configuration and, for every value somebody set, where it came from (a file, a variable, the flags)."""

    config: Config
    origins: dict[Path, str]


def chosen_file(flag: str | FilePath | None, environment: Mapping[str, str]) -> FilePath | None:
    """The configuration file to read: the flag's, else BROKER_CONFIG's, else none."""
    chosen = flag or environment.get("BROKER_CONFIG")
    return FilePath(chosen).expanduser() if chosen else None


def load(
    file: FilePath | str | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """The configuration that holds: `overrides` beat `environment`, which beats `file`, which beats the defaults.

    `environment` is the process's (only BROKER_SECTION__KEY is looked at), `overrides` maps dotted paths such as
    "server.port" to values; None means not given. Raises ConfigError; nothing is half loaded.
    """
    return load_with_origins(file, environment, overrides).config


def load_with_origins(
    file: FilePath | str | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Loaded:
    """As `load`, with the source of every value that is not a default. Raises ConfigError."""
    settings: dict[Path, _Setting] = {}
    names: dict[str, None] = {}
    if file is not None:
        file = FilePath(file)
        document = _read(file)
        settings.update(_from_file(document, file))
        endpoints = document.get("endpoints", {})
        names.update(dict.fromkeys(endpoints))
    settings.update(_from_environment(environment or {}))
    settings.update(_from_flags(overrides or {}))
    names.update(dict.fromkeys(path[1] for path in settings if path[0] == "endpoints"))
    config = _build({path: _convert(path, setting) for path, setting in settings.items()}, list(names))
    _check_together(config, settings)
    return Loaded(config, {path: setting.source for path, setting in settings.items()})


def check(config: Config) -> None:
    """Judge a configuration that a program has made itself as one from a file is judged.

    Raises TypeError for what is no Config, ConfigError with the key for a value that is wrong.
    """
    if not isinstance(config, Config):
        raise TypeError(f"the configuration is a {type(config).__name__}; expected a Config, made in code or by `load`")
    for section, kind in SECTIONS.items():
        part = getattr(config, section)
        if section != "endpoints":
            _expect_kind((section,), part, kind)
            continue
        _expect_kind((section,), part, dict)
        for name, endpoint in part.items():
            if not isinstance(name, str):
                raise ConfigError(f"{CODE}: endpoints has the key {name!r:.80}: expected names of endpoints")
            _check_name(CODE, name)
            _expect_kind((section, name), endpoint, kind)
    settings = {path: _Setting(value, CODE) for path, value in bare_values(config)}
    for path, setting in settings.items():
        _convert(path, setting)
    changed = {path: setting for path, setting in settings.items() if setting.value != _default_at(path)}
    _check_together(config, changed)


def _expect_kind(path: Path, part: object, kind: type) -> None:
    if not isinstance(part, kind):
        right = "a dict of Endpoint by name" if kind is dict else f"broker.config.model.{kind.__name__}(…)"
        raise ConfigError(f"{CODE}: {dotted(path)} is a {type(part).__name__}: expected {right}")


def _default_at(path: Path) -> Any:
    field = field_at(path)
    return None if field is None else field.default


def _check_together(config: Config, settings: Mapping[Path, _Setting]) -> None:
    """What several keys break together is said of the one that somebody set. Raises ConfigError."""
    for problem in rules.problems(config):
        path, right = next((each for each in problem if each[0] in settings), problem[0])
        raise _wrong(path, settings.get(path), _value_at(config, path), right)


def _read(file: FilePath) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: no valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: no valid TOML: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{file}: no valid TOML: nested too deep") from None


def _from_file(document: dict[str, Any], file: FilePath) -> Iterator[tuple[Path, _Setting]]:
    source, base = str(file), file.absolute().parent
    for section, table in document.items():
        if section not in SECTIONS:
            raise _unknown(source, (section,))
        _expect_table(source, (section,), table)
        if section != "endpoints":
            yield from _table(source, base, (section,), table)
            continue
        for name, endpoint in table.items():
            _check_name(source, name)
            _expect_table(source, (section, name), endpoint)
            yield from _table(source, base, (section, name), endpoint)


def _table(source: str, base: FilePath, prefix: Path, table: dict[str, Any]) -> Iterator[tuple[Path, _Setting]]:
    for key, value in table.items():
        path = (*prefix, key)
        if field_at(path) is None:
            if isinstance(value, dict) and prefix[0] == "endpoints":
                quoted = ".".join(path[1:])
                raise ConfigError(f'{source}: a name with dots is quoted: expected [endpoints."{quoted}"]')
            raise _unknown(source, path)
        yield path, _Setting(value, source, base=base)


def _expect_table(source: str, path: Path, value: Any) -> None:
    if not isinstance(value, dict):
        header = f"[{dotted(path)}]" if path != ("endpoints",) else "[endpoints.NAME]"
        raise ConfigError(f"{source}: {dotted(path)} = {_shown(value)}: expected a table, {header}")


def _check_name(source: str, name: str) -> None:
    if not is_name(name):
        raise ConfigError(
            f"{source}: endpoints.{_shown(name)}: expected as an endpoint's name at most 128 of the characters "
            "A-Z a-z 0-9 _ . - and neither . nor - at its start"
        )


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[Path, _Setting]]:
    for name, value in environment.items():
        if not name.startswith("BROKER_") or "__" not in name:
            continue
        section, _, rest = name.removeprefix("BROKER_").partition("__")
        middle, key = [], rest
        if section.lower() == "endpoints" and "__" in rest:
            endpoint, _, key = rest.rpartition("__")
            _check_name(name, endpoint)
            middle = [endpoint]
        path = (section.lower(), *middle, key.lower())
        if field_at(path) is None:
            raise _unknown(name, path, variable)
        yield path, _Setting(value, name, text=True)


def _from_flags(overrides: Mapping[str, object]) -> Iterator[tuple[Path, _Setting]]:
    for name, value in overrides.items():
        if value is None:
            continue
        path = tuple(name.split("."))
        if field_at(path) is None:
            raise _unknown(FLAGS, path)
        yield path, _Setting(value, FLAGS)


def _convert(path: Path, setting: _Setting) -> Any:
    """The value in the model's type, paths made whole. Raises ConfigError."""
    field = field_at(path)
    assert field is not None
    value = setting.value
    if setting.text and field.is_list:
        value = [each.strip() for each in value.split(",") if each.strip()]
    elif setting.text and field.is_map:
        pairs = (each.partition("=") for each in value.split(",") if each.strip())
        value = {key.strip(): text.strip() for key, _, text in pairs}
    try:
        converted = msgspec.convert(value, field.kind, strict=not (setting.text and not field.is_list))
    except msgspec.ValidationError:
        raise _wrong(path, setting, setting.value, f"expected {field.expects}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise _wrong(path, setting, setting.value, f"expected {field.expects}")
    for text in converted if field.is_list else [converted]:
        if isinstance(text, str) and not _is_clean(text):
            raise _wrong(path, setting, setting.value, f"expected {field.expects}, in UTF-8, no control characters")
    return _whole_path(converted, setting.base) if field.is_path else converted


def _is_clean(text: str) -> bool:
    """Whether it is free of control characters and of bytes that were no UTF-8 (surrogates)."""
    return not any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in text)


def _whole_path(text: str, base: FilePath | None) -> str:
    if not text:
        return text
    try:
        path = FilePath(text).expanduser()
    except RuntimeError:  # ~NOBODY: there is no such user, so the name is meant as it stands
        path = FilePath(text)
    return str(base / path if base is not None else path)


def _build(values: dict[Path, Any], endpoints: list[str]) -> Config:
    tables: dict[Path, dict[str, Any]] = {("endpoints", name): {} for name in endpoints}
    for path, value in values.items():
        tables.setdefault(path[:-1], {})[path[-1]] = value
    sections: dict[str, Any] = {
        section: struct(**tables.get((section,), {})) for section, struct in SECTIONS.items() if section != "endpoints"
    }
    named = {name: Endpoint(**tables["endpoints", name]) for name in endpoints}
    return Config(**sections, endpoints=named)


def _value_at(config: Config, path: Path) -> Any:
    table = getattr(config, path[0])
    return getattr(table[path[1]] if path[0] == "endpoints" else table, path[-1])


def _wrong(path: Path, setting: _Setting | None, value: Any, right: str) -> ConfigError:
    source = setting.source if setting is not None else "default"
    field = field_at(path)
    shown = "<secret>" if field is not None and field.is_secret else _shown(value)
    return ConfigError(f"{source}: {dotted(path)} = {shown}: {right}")


def _shown(value: Any) -> str:
    """A wrong value for an error: as TOML, on one line, cut."""
    known = isinstance(value, str | bool | int | float) or (
        isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    )
    text = literal(value) if known else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "…"


def _unknown(source: str, path: Path, write: Callable[[Path], str] = dotted) -> ConfigError:
    """Names the nearest key that exists; where none is near, all that would be right at that place."""
    subject = f"unknown variable {source}" if write is variable else f"{source}: unknown key {dotted(path)}"
    near = _nearest(path)
    if near is not None:
        return ConfigError(f"{subject}; did you mean {write(near) if len(near) > 1 else f'[{near[0]}]'}?")
    return ConfigError(f"{subject}; known there: {', '.join(FIELDS.get(path[0], SECTIONS))}")


def _nearest(path: Path) -> Path | None:
    """The key or section most likely meant: of the same name elsewhere, else spelled alike here, else anywhere."""
    section, key = path[0], path[-1].lower()
    if len(path) == 1:
        sections = difflib.get_close_matches(key, SECTIONS, n=1)
        if sections:
            return (sections[0],)
    endpoint = path[1] if len(path) == 3 else "NAME"
    every = [
        (each, endpoint, name) if each == "endpoints" else (each, name)
        for each, fields in FIELDS.items()
        for name in fields
    ]
    same = [each for each in every if each[-1] == key]
    if same:
        return same[0]
    here = {each[-1]: each for each in every if each[0] == section or len(path) == 1}
    whole, anywhere = dotted(path).lower(), {dotted(each): each for each in every}
    keys = {each[-1]: each for each in reversed(every)}
    for wanted, pool, cutoff in ((key, here, 0.75), (key, keys, 0.75), (key, here, 0.6), (whole, anywhere, 0.75)):
        matches = difflib.get_close_matches(wanted, pool, n=1, cutoff=cutoff)
        if matches:
            return pool[matches[0]]
    return None
