"""How commands reach a broker: their common options, one connection, and what every ending becomes."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import click
import msgspec

from broker.cli.exits import Exit, Failure, exit_for
from broker.client.async_client import AsyncClient
from broker.client.requests import DEFAULT_GRACE_S
from broker.peer.errors import BrokerError, CannotConnect, ConnectionLost, Refused
from broker.peer.values import ValueUnfit

DAY_S = 86400.0
URL_HELP = (
    "The broker: its URL, or the connection file (.json) or address (tcp://ip:port/key) of its ZeroMQ door.  "
    "[default: BROKER_URL, else the one running on this machine]"
)

Command = TypeVar("Command", bound=Callable[..., None])
Result = TypeVar("Result")


def counted(count: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def broker_options(command: Command) -> Command:
    """Adds --url, --token and --json."""
    url = click.option("--url", help=URL_HELP)
    token = click.option("--token", help="Token to get in with.  [default: BROKER_TOKEN, else the local broker's]")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")
    return url(token(as_json(command)))


def grace_option(command: Command) -> Command:
    """Adds --grace."""
    text = "Seconds the broker keeps what is under way when the connection breaks; 0: none."
    option = click.option(
        "--grace", type=click.FloatRange(0, DAY_S), default=DEFAULT_GRACE_S, show_default=True, metavar="SECONDS",
        help=text,
    )  # fmt: skip
    return option(command)


def run(
    action: Callable[[AsyncClient], Awaitable[Result]], url: str | None, token: str | None, as_json: bool,
    *, timeout: float | None = 30.0, reconnect: bool = False, grace: float = DEFAULT_GRACE_S,
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Result:  # fmt: skip
    """Run `action` with a client; what the broker or a worker refuses becomes one line and an exit code.

    `new_loop` makes another event loop than asyncio's own.
    """
    is_interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler

    async def main() -> Result:
        client = AsyncClient(url, token, timeout=timeout, reconnect=reconnect, grace=grace)
        with _interrupted_between_callbacks() if is_interruptible else nullcontext():
            try:
                return await action(client)  # the first request connects, within its own deadline
            finally:
                await client.close()

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except BrokerError as error:
        if as_json:
            click.echo(msgspec.json.encode({"error": error_view(error)}).decode())
        raise Failure(exit_code(error), str(error)) from None
    except ValueUnfit as error:
        raise Failure(Exit.USAGE, str(error)) from None


@contextmanager
def _interrupted_between_callbacks() -> Iterator[None]:
    """Ctrl-C cancels this task, and a second one ends the program at once.

    asyncio's own handler cancels in the middle of whatever runs; where that was just about to end a future, it printed
    a traceback (1 of about 20 interrupted `call --out`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


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
