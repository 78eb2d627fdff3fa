"""How stored records (tokens, users) are printed for people."""

from collections.abc import Sequence
from datetime import UTC, datetime

import click


def print_table(rows: list[dict[str, object]], columns: Sequence[str]) -> None:
    """These columns of the rows, under their names, aligned."""
    lines = [columns, *(tuple(_cell(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def moment(seconds: float) -> str:
    """A time in Unix seconds as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return "never" if value is None else str(value)
