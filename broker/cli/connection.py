"""How commands reach a broker: their common options, one connection, and what every ending becomes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec

from broker.cli.exits import Exit, Failure, exit_for
from broker.client.async_client import AsyncClient
from broker.peer.errors import BrokerError, CannotConnect, ConnectionLost, Refused
from broker.peer.values import ValueUnfit

Command = TypeVar("Command", bound=Callable[..., None])
Result = TypeVar("Result")


def broker_options(command: Command) -> Command:
    """Adds --url, --token and --json."""
    url = click.option("--url", help="The broker.  [default: BROKER_URL, else the one running on this machine]")
    token = click.option("--token", help="Token to get in with.  [default: BROKER_TOKEN, else the local broker's]")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")
    return url(token(as_json(command)))


def run(
    action: Callable[[AsyncClient], Awaitable[Result]], url: str | None, token: str | None, as_json: bool,
    *, timeout: float | None = 30.0, reconnect: bool = False,
) -> Result:  # fmt: skip
    """Run `action` with a client; what the broker or a worker refuses becomes one line and an exit code."""

    async def main() -> Result:
        client = AsyncClient(url, token, timeout=timeout, reconnect=reconnect)
        try:
            return await action(client)  # the first request connects, within its own deadline
        finally:
            await client.close()

    try:
        return asyncio.run(main())
    except BrokerError as error:
        if as_json:
            click.echo(msgspec.json.encode({"error": error_view(error)}).decode())
        raise Failure(exit_code(error), str(error)) from None
    except ValueUnfit as error:
        raise Failure(Exit.USAGE, str(error)) from None


def exit_code(error: BrokerError) -> Exit:
    """The exit code by which a command tells an error."""
    if isinstance(error, CannotConnect):
        return Exit.CANNOT_CONNECT
    if isinstance(error, Refused):
        if error.status in (401, 403):
            return Exit.DENIED
        return Exit.COME_BACK if error.come_back else Exit.USAGE
    if isinstance(error, ConnectionLost):
        return Exit.COME_BACK
    return exit_for(error.outcome)


def error_view(error: BrokerError) -> dict[str, Any]:
    """An error as --json prints it."""
    view = {
        "outcome": error.outcome,
        "code": error.code,
        "message": error.detail,
        "endpoint": error.endpoint,
        "method": error.method,
        "retryable": error.retryable,
        "worker": error.worker,
        "attempts": error.attempts,
        "elapsed_s": round(error.elapsed_s, 6),
        "data": error.data,
    }
    if isinstance(error, ConnectionLost):
        view["may_have_executed"] = error.may_have_executed
    return view


def read_json(text: str | None) -> Any:
    """A JSON argument, `-` for standard input; None for none. Raises Failure for what is no JSON."""
    if text is None:
        return None
    where = "standard input" if text == "-" else f"{text!r:.60}"
    try:
        return msgspec.json.decode(sys.stdin.buffer.read() if text == "-" else text.encode())
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise Failure(Exit.USAGE, f"{where} is no JSON: {error}") from None


def print_json(value: object, *, pretty: bool = False) -> None:
    """Print a value as one line of JSON, or over several for eyes."""
    text = msgspec.json.encode(value)
    if pretty:
        text = msgspec.json.format(text, indent=2)
    click.echo(text.decode())


def print_table(rows: list[list[str]], heads: list[str]) -> None:
    """Print columns, as wide as they need to be; control characters in what others named do nothing."""
    shown = [heads, *([_clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(heads))]
    for row in shown:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _clean(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def clean_line(text: str) -> str:
    """Text of others for a terminal: one line, no control characters."""
    return _clean(" ".join(text.split()))
