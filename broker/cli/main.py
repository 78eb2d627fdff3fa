"""The `broker` command: finds the subcommand, imports nothing else, and turns every ending into an exit code."""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, shell_complete

from broker._version import VERSION
from broker.cli.exits import MEANINGS, Exit, Failure
from broker.config.errors import ConfigError
from broker.links.compiled import core

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("broker.cli.serve:serve", "Run the broker."),
    "call": ("broker.cli.call:call", "Ask ENDPOINT/METHOD and print the reply."),
    "broadcast": ("broker.cli.broadcasts:broadcast", "Send to everybody who listens."),
    "listen": ("broker.cli.broadcasts:listen", "Print broadcasts as they come."),
    "work": ("broker.cli.work:work", "Be a worker: serve a folder, Python or a command."),
    "kernel": ("broker.cli.kernel:kernel", "Use a Jupyter kernel at the other end as if it ran here."),
    "endpoints": ("broker.cli.listings:endpoints", "List the endpoints and how busy they are."),
    "describe": ("broker.cli.listings:describe", "Show an endpoint's workers and methods."),
    "peers": ("broker.cli.listings:peers", "List who is connected."),
    "pending": ("broker.cli.live:pending", "List the requests that have not ended."),
    "trace": ("broker.cli.live:trace", "Show one of them, by its number or its trace."),
    "ping": ("broker.cli.listings:ping", "Ask the broker for a sign of life."),
    "demo": ("broker.cli.demo:demo", "Show the whole story with real processes."),
    "doctor": ("broker.cli.doctor:doctor", "Find out what is wrong between here and the broker."),
    "context": ("broker.cli.context:context", "Keep several brokers by name and choose one."),
    "completion": ("broker.cli.completion:completion", "Print a completion script for bash, zsh or fish."),
    "token": ("broker.cli.token:token", "Create, list and revoke tokens."),
    "curve": ("broker.cli.curve:curve", "Make, allow, list and revoke the CURVE keys of ZeroMQ peers."),
    "user": ("broker.cli.user:user", "Add, list and remove users, who sign in with a password."),
    "config": ("broker.cli.config:config", "Write, check and show the configuration."),
}
"""Where each command lives (module:attribute) and its line of help, so that --help needs no import."""


_OUTPUT_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""what the system says of a disk that is full or broken when the output goes there; files of other names are named"""


class LazyGroup(click.Group):
    """A group whose commands stand in a table and are imported when they are run."""

    def __init__(self, *arguments: Any, table: dict[str, tuple[str, str]], **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, imported now; None if the table has no such name."""
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table's lines of help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code.value), meaning) for code, meaning in MEANINGS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes names and options from the table, without imports."""
        names = [
            CompletionItem(name, help=text) for name, (_, text) in self.table.items() if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"broker {VERSION} ({core()})")
        ctx.exit()


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def cli() -> None:
    """A request broker: workers dial out, callers ask, every accepted request ends exactly once, by its deadline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's) and returns its exit code; errors are one line on stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - as long as the process
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # a closed pipe is to be noticed here, not while the interpreter ends
        return code
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except (click.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return Exit.PIPE_CLOSED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return Exit.USAGE
    except Exception as error:
        if os.environ.get("BROKER_TRACEBACK") == "1":
            traceback.print_exc()
        code, text = _explain(error)
        print(f"broker: {_one_line(text)}", file=sys.stderr)
        return code


def _run(arguments: list[str]) -> int:
    """Runs the command, or answers a shell that asks for completions. Raises whatever ended the command."""
    # Not click's own main(): that one answers a closed pipe with exit code 1, which has another meaning here.
    completion = os.environ.get("_BROKER_COMPLETE")
    if completion:
        return shell_complete(cli, {}, "broker", "_BROKER_COMPLETE", completion)
    with cli.make_context("broker", arguments) as context:
        cli.invoke(context)
    return Exit.OK


def _explain(error: Exception) -> tuple[Exit, str]:
    """The exit code and the one line for an error that ended a command."""
    if isinstance(error, Failure):
        return error.code, str(error)
    if isinstance(error, ConfigError):
        return Exit.USAGE, str(error)
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "broker"
        return Exit.USAGE, f"{error.format_message()} (see '{command} --help')"
    if isinstance(error, click.ClickException):
        return Exit.USAGE, error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return Exit.USAGE, f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _OUTPUT_FAILED:
        return Exit.USAGE, f"the output cannot be written: {error.strerror}"
    if isinstance(error, ConnectionError):
        return Exit.CANNOT_CONNECT, f"the connection failed: {error}"
    kind = type(error).__name__
    return Exit.DEFECT, f"unexpected {kind}: {error} (a defect of this program; BROKER_TRACEBACK=1 shows where)"


def _one_line(text: str) -> str:
    """The text without line breaks and control characters, which would say other things to the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _discard_output() -> None:
    """Lets what is still buffered go nowhere, so that the interpreter does not complain while it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
