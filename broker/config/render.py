"""The configuration as text: the commented default file, the documentation page, and what holds just now."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from broker.config.fields import FIELDS, SECTIONS, Field, Path, dotted, literal, values, variable
from broker.config.model import Config, Limits

WIDTH = 100

_OPENING = """\
The broker's configuration. Everything here is the default: keep what you change, delete the rest.

Flags on the command line win over environment variables, these over this file, this over the defaults.
The variable of a key is BROKER_SECTION__KEY, so that of port in [server] is BROKER_SERVER__PORT;
lists are written with commas there. Read a file with --config FILE or BROKER_CONFIG=FILE;
`broker config check FILE` says whether it is right, `broker config show` what holds."""

_ENDPOINTS_NOTE = "One table per endpoint; NAME is the endpoint's name, in quotes if it has a dot in it."


def default_toml() -> str:
    """The commented file of all keys with their defaults; it is what `configs/default.toml` holds."""
    blocks = ["\n".join(_comment(_OPENING))]
    for section, fields in FIELDS.items():
        in_endpoints = section == "endpoints"
        off = "# " if in_endpoints else ""  # no endpoint is configured by default
        note = _ENDPOINTS_NOTE if in_endpoints else ""
        header = [*_comment(f"{SECTIONS[section].__doc__} {note}".strip())]
        header.append(f"{off}[endpoints.NAME]" if in_endpoints else f"[{section}]")
        blocks.append("\n".join(header))
        blocks.extend("\n".join(_key(field, off)) for field in fields.values())
    return "\n\n".join(blocks) + "\n"


def effective_toml(config: Config, origins: Mapping[Path, str]) -> str:
    """What holds, as TOML, with the source of every value that is no default; secrets are not shown."""
    lines: list[str] = []
    table: Path | None = None
    for path, value in values(config):
        if path[:-1] != table:
            table = path[:-1]
            lines += ["", f"[{dotted(table)}]"]
        if value is None:
            continue
        source = f"  # {_one_line(origins[path])}" if path in origins else ""
        lines.append(f"{path[-1]} = {literal(value)}{source}")
    return "\n".join(lines[1:]) + "\n"


def effective_dict(config: Config) -> dict[str, Any]:
    """What holds, as plain dicts ready for JSON; secrets are not shown."""
    result: dict[str, Any] = {section: {} for section in FIELDS}
    for path, value in values(config):
        table = result
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = list(value) if isinstance(value, tuple) else value
    return result


def configuration_page() -> str:
    """`docs/configuration.md`: every key in tables, by section."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Configuration\n"
    yield "<!-- Generated from broker/config/model.py by `broker config docs`; a test compares. -->\n"
    yield (
        "Flags win over environment variables, these over the file (`--config FILE` or `BROKER_CONFIG`), this over\n"
        "the defaults. `broker config init` writes a commented file, `check` reads one, `show` says what holds and\n"
        "where each value comes from. An unknown key or a wrong value anywhere is an error that names it.\n"
        "Relative paths in a file start at that file's folder. Lists are written with commas in variables.\n"
    )
    for section, fields in FIELDS.items():
        table: Path = ("endpoints", "NAME") if section == "endpoints" else (section,)
        yield f"## `[{dotted(table)}]`\n"
        yield f"{SECTIONS[section].__doc__}\n"
        if section == "endpoints":
            yield f"{_ENDPOINTS_NOTE}\n"
        yield "| key | default | right values | meaning | variable |"
        yield "|---|---|---|---|---|"
        for field in fields.values():
            default = f"`{literal(field.default)}`" if field.default is not None else ""
            name = f"`{variable((*table, field.name))}`"
            yield f"| `{field.name}` | {default} | {field.expects} | {field.description} | {name} |"
        yield ""


def _key(field: Field, off: str) -> Iterator[str]:
    yield from _comment(f"{field.description} ({field.expects})")
    # An endpoint's key without a default takes the value of [limits]; TOML cannot write "none".
    value = getattr(Limits(), field.name) if field.default is None else field.default
    yield f"{off}{field.name} = {literal(value)}"


def _comment(text: str) -> list[str]:
    lines: list[str] = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, WIDTH - 2, break_long_words=False) or [""]
    return [f"# {line}".rstrip() for line in lines]


def _one_line(text: str) -> str:
    return text.encode("unicode_escape").decode()
