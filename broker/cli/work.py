"""`broker work`: runs a worker that serves a Python object or a command."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from broker.cli.connection import exit_code
from broker.cli.exits import Exit, Failure
from broker.cli.main import LazyGroup
from broker.daemon.logs import LineFormatter, escape
from broker.peer.errors import BrokerError
from broker.worker.worker import CAPACITY, Worker

WORKERS: dict[str, tuple[str, str]] = {
    "files": ("broker.cli.files:files", "Serve a folder: list, read, watch, and write where allowed."),
    "kernel": ("broker.cli.kernels:kernel", "Serve a Jupyter kernel."),
    "kernels": ("broker.cli.kernels:kernels", "Start Jupyter kernels for who asks, and serve them."),
    "python": ("broker.cli.work:python", "Serve a function, an object, a class or a module."),
    "exec": ("broker.cli.work:execute", "Serve a command: one process per request."),
}
"""Where each kind of worker lives and its line of help."""

Command = TypeVar("Command", bound=Callable[..., None])


@click.group(cls=LazyGroup, table=WORKERS)
def work() -> None:
    """Be a worker until SIGTERM or Ctrl-C, which let requests under way finish; a second one ends at once."""


def worker_options(command: Command) -> Command:
    """Adds --endpoint, --name, --capacity, and what `link_options` adds."""
    options = (
        click.option("--endpoint", required=True, help="The endpoint to serve."),
        click.option("--name", default="", help="What `broker describe` shows.  [default: HOST:PID]"),
        click.option(
            "--capacity", type=click.IntRange(1, 1_000_000), default=CAPACITY, show_default=True,
            help="Requests at a time.",
        ),
    )  # fmt: skip
    command = link_options(0.0)(command)
    for option in reversed(options):
        command = option(command)
    return command


def link_options(grace: float) -> Callable[[Command], Command]:
    """Adds --grace (with this default), --no-wait, --url, --token and --json."""
    options = (
        click.option(
            "--grace", type=click.FloatRange(0, 1_000_000), default=grace, show_default=True, metavar="SECONDS",
            help="Go on with requests for so long while the connection is lost.",
        ),
        click.option("--no-wait", is_flag=True, help="Fail if there is no broker now, instead of trying on."),
        click.option("--url", help="The broker.  [default: BROKER_URL, else the one running on this machine]"),
        click.option("--token", help="Token to get in with.  [default: BROKER_TOKEN, else the local broker's]"),
        click.option("--json", "as_json", is_flag=True, help="Say what happens in lines of JSON."),
    )  # fmt: skip

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.argument("target", metavar="MODULE:OBJECT")
@worker_options
def python(
    target: str, endpoint: str, name: str, capacity: int, grace: float, no_wait: bool, url: str | None,
    token: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Serve OBJECT of MODULE (found as `python -m` finds it, this folder included).

    A function is served by its name; an object by its public methods; a class is made an object first; without
    OBJECT, the functions of the module.
    """
    worker = new_worker(endpoint, url, token, name, capacity, grace, no_wait)
    _fill(worker, _load(target), target)
    run_worker(worker, as_json=as_json)


@click.command("exec", context_settings={"ignore_unknown_options": True})
@worker_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(
    command: tuple[str, ...], endpoint: str, name: str, capacity: int, grace: float, no_wait: bool, url: str | None,
    token: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Answer every method by running COMMAND: JSON on its standard input, the result as JSON on its standard output.

    It finds BROKER_ENDPOINT, BROKER_METHOD and BROKER_TIMEOUT in its environment. It is killed when the request is
    cancelled or its deadline passes.
    """
    from broker.worker.command import Command

    worker = new_worker(endpoint, url, token, name, capacity, grace, no_wait)
    worker.add_fallback(Command(command))
    run_worker(worker, as_json=as_json)


def new_worker(
    endpoint: str, url: str | None, token: str | None, name: str, capacity: int, grace: float, no_wait: bool
) -> Worker:
    """The worker that the options ask for. Raises Failure for a name that is none."""
    try:
        return Worker(endpoint, url, token, name=name, capacity=capacity, grace=grace, wait=not no_wait)
    except ValueError as error:
        raise Failure(Exit.USAGE, str(error)) from None


def run_worker(worker: Worker, *, as_json: bool) -> None:
    """Run a worker in the foreground; what it has to say goes to standard error, on wish as lines of JSON."""
    said = logging.getLogger("broker")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(json_lines=True) if as_json else _Lines())
    said.addHandler(handler)
    level = said.level
    said.setLevel(logging.INFO)
    try:
        worker.run()
    except BrokerError as error:
        raise Failure(exit_code(error), str(error)) from None
    finally:
        said.setLevel(level)
        said.removeHandler(handler)


class _Lines(logging.Formatter):
    """The message in one line, then the traceback, indented: what callers sent neither forges lines nor does anything
    to a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The lines."""
        lines = [record.getMessage()]
        if record.exc_info:
            lines += [f"  {line}" for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(map(escape, lines))


def _load(target: str) -> Any:
    """What MODULE:OBJECT names. Raises Failure."""
    module_name, _, path = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        text = f"{target}: there is no module {error.name} (looked in {here} and sys.path)"
        raise Failure(Exit.USAGE, text) from None
    except Exception as error:
        raise Failure(Exit.USAGE, f"{target}: importing it failed: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise Failure(Exit.USAGE, f"{target}: importing it called sys.exit({error.code!r})") from None
    for name in filter(None, path.split(".")):
        if not hasattr(found, name):
            raise Failure(Exit.USAGE, f"{target}: {getattr(found, '__name__', module_name)} has no {name}")
        found = getattr(found, name)
    return found


def _fill(worker: Worker, found: Any, target: str) -> None:
    import inspect

    try:
        if isinstance(found, type):
            found = found()
        if inspect.isroutine(found):
            worker.add(found)
        else:
            worker.add_object(found)
    except Exception as error:
        raise Failure(Exit.USAGE, f"{target} cannot be served: {error}") from error
