"""What is known of every key of the model: its path, default, sentence, and in words what values are right."""

import json
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
from msgspec import inspect

from broker.config.model import Auth, Config, Endpoint, Kernels, Limits, Log, RtCloud, Server, ZeroMQ

SECTIONS: dict[str, type[msgspec.Struct]] = {
    "server": Server,
    "auth": Auth,
    "limits": Limits,
    "endpoints": Endpoint,
    "rtcloud": RtCloud,
    "zeromq": ZeroMQ,
    "kernels": Kernels,
    "log": Log,
}
"""Sections in the order of the file; `endpoints` holds one table per name."""

Path = tuple[str, ...]
"""Where a value stands: ("server", "port") or ("endpoints", NAME, "closed")."""

REDACTED = "<redacted>"


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One key. `kind` is the type to convert to; `expects` completes the sentence "expected …"."""

    section: str
    name: str
    kind: Any
    default: Any
    description: str
    expects: str
    is_list: bool
    is_map: bool
    is_path: bool
    is_secret: bool


def literal(value: Any) -> str:
    """A value as TOML writes it; None, which TOML lacks, is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return (f"{int(value):_}" if abs(value) >= 10_000 else str(int(value))) if whole else repr(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {literal(each)}" for key, each in value.items()) + " }"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(literal(each) for each in value) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _expects(kind: inspect.Type, extra: dict[str, Any]) -> str:
    """What values are right, in words."""
    if isinstance(kind, inspect.Metadata):
        return _expects(kind.type, extra | (kind.extra or {}))
    if isinstance(kind, inspect.UnionType):
        return next(_expects(each, extra) for each in kind.types if not isinstance(each, inspect.NoneType))
    if isinstance(kind, inspect.VarTupleType):
        return "a list of " + _expects(kind.item_type, extra)
    if "expects" in extra:
        return str(extra["expects"])
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
        if kind.ge is None:
            return f"{noun} above {literal(kind.gt)}, at most {literal(kind.le)}"
        return f"{noun} from {literal(kind.ge)} to {literal(kind.le)}"
    return "the path of a file" if extra.get("path") else "a text"


def _field(section: str, info: msgspec.structs.FieldInfo) -> Field:
    kind = inspect.type_info(info.type)
    extra = (kind.extra or {}) if isinstance(kind, inspect.Metadata) else {}
    schema = (kind.extra_json_schema or {}) if isinstance(kind, inspect.Metadata) else {}
    bare = kind.type if isinstance(kind, inspect.Metadata) else kind
    if isinstance(bare, inspect.LiteralType):
        *others, last = (literal(choice) for choice in get_args(get_args(info.type)[0]))
        extra = {"expects": f"{', '.join(others)} or {last}"}
    return Field(
        section=section,
        name=info.name,
        kind=info.type,
        default=info.default if info.default_factory is msgspec.NODEFAULT else info.default_factory(),
        description=schema.get("description", ""),
        expects=_expects(bare, extra),
        is_list=isinstance(bare, inspect.VarTupleType),
        is_map=isinstance(bare, inspect.DictType),
        is_path=bool(extra.get("path")),
        is_secret=bool(extra.get("secret")),
    )


FIELDS: dict[str, dict[str, Field]] = {
    section: {info.name: _field(section, info) for info in msgspec.structs.fields(struct)}
    for section, struct in SECTIONS.items()
}
"""All keys by section and name, in the order of the model."""


def field_at(path: Path) -> Field | None:
    """The key at a path, None where there is none."""
    if len(path) != (3 if path[0] == "endpoints" else 2):
        return None
    return FIELDS.get(path[0], {}).get(path[-1])


def dotted(path: Path) -> str:
    """The path as it is written in TOML; an endpoint's name with dots in it is quoted."""
    return ".".join(f'"{part}"' if "." in part else part for part in path)


def variable(path: Path) -> str:
    """The environment variable that sets the value; an endpoint's name keeps its case."""
    middle = path[1:-1]
    return "BROKER_" + "__".join((path[0].upper(), *middle, path[-1].upper()))


def values(config: Config) -> Iterator[tuple[Path, Any]]:
    """Every value of a configuration with its path, secrets as `REDACTED`, in the order of the model."""
    for path, value in bare_values(config):
        field = field_at(path)
        yield path, REDACTED if field is not None and field.is_secret and value else value


def bare_values(config: Config) -> Iterator[tuple[Path, Any]]:
    """The same with its secrets."""
    for section, fields in FIELDS.items():
        part = getattr(config, section)
        tables = (
            {(section, name): table for name, table in part.items()} if section == "endpoints" else {(section,): part}
        )
        for prefix, table in tables.items():
            for name in fields:
                yield (*prefix, name), getattr(table, name)
