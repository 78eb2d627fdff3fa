"""`broker user`: add, list and remove the users who sign in with name and password."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from broker.auth.users import UserStore, default_users_path
from broker.auth.users_file import UserError, UserRecord
from broker.cli.exits import Exit, Failure
from broker.cli.records import moment, print_table
from broker.cli.token import grant_options

_INPUT_MAX_BYTES = 4096

Command = TypeVar("Command", bound=Callable[..., None])


def _file_options(command: Command) -> Command:
    users_file = click.option(
        "--users-file", type=click.Path(path_type=Path), help="File of the users.  [default: auth.users_file]"
    )
    config = click.option("--config", "config_file", help="Configuration that names it.  [default: BROKER_CONFIG]")
    return users_file(config(command))


def _password_option(command: Command) -> Command:
    text = "Read the password from standard input instead of asking on the terminal."
    return click.option("--password-stdin", is_flag=True, help=text)(command)


@click.group()
def user() -> None:
    """Add, list and remove users, who sign in with a password. A running broker notices within a second."""


@user.command()
@click.argument("name")
@grant_options
@_password_option
@_file_options
def add(
    *,
    name: str,
    roles: tuple[str, ...],
    endpoints: tuple[str, ...],
    password_stdin: bool,
    users_file: Path | None,
    config_file: str | None,
) -> None:
    """Add the user NAME and ask for a password.

    --role and --endpoint may be given several times; in a PATTERN, * stands for any run of characters.
    """
    store = _opened(users_file, config_file)
    try:
        store.check_new(name, roles, endpoints)  # before somebody types a password in vain
        record = store.add(name, _password(password_stdin), roles, endpoints)
    except UserError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    click.echo(f"user {record.name}: {', '.join(record.roles)} at {', '.join(record.endpoints)}", err=True)


@user.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@_file_options
def list_users(as_json: bool, users_file: Path | None, config_file: str | None) -> None:
    """List the users. Passwords are not stored and so not shown."""
    rows = [_row(record) for record in _opened(users_file, config_file).users()]
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(rows))
    elif rows:
        print_table(rows, ("name", "state", "roles", "endpoints", "created", "changed"))
    else:
        click.echo("no users; `broker user add NAME` adds one", err=True)


@user.command()
@click.argument("name")
@_file_options
def remove(name: str, users_file: Path | None, config_file: str | None) -> None:
    """Remove a user. What was opened with the password is closed."""
    record = _changed(lambda: _opened(users_file, config_file).remove(name))
    click.echo(f"user {record.name} removed", err=True)


@user.command()
@click.argument("name")
@_password_option
@_file_options
def password(name: str, password_stdin: bool, users_file: Path | None, config_file: str | None) -> None:
    """Give a user another password. What was opened with the old one is closed."""
    store = _opened(users_file, config_file)
    try:
        store.get(name)  # before somebody types a password in vain
        record = store.set_password(name, _password(password_stdin))
    except UserError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    click.echo(f"user {record.name} has another password", err=True)


@user.command()
@click.argument("name")
@_file_options
def disable(name: str, users_file: Path | None, config_file: str | None) -> None:
    """Shut a user out, who stays in the list. What was opened with the password is closed."""
    record = _changed(lambda: _opened(users_file, config_file).set_disabled(name, True))
    click.echo(f"user {record.name} disabled", err=True)


@user.command()
@click.argument("name")
@_file_options
def enable(name: str, users_file: Path | None, config_file: str | None) -> None:
    """Let a disabled user in again, with the old password."""
    record = _changed(lambda: _opened(users_file, config_file).set_disabled(name, False))
    click.echo(f"user {record.name} enabled", err=True)


def _changed(change: Callable[[], UserRecord]) -> UserRecord:
    try:
        return change()
    except UserError as error:
        raise Failure(Exit.USAGE, str(error)) from None


def _password(from_stdin: bool) -> str:
    """The new password. It is never an argument: other users of the machine see those."""
    if from_stdin:
        return _from_stdin()
    if not sys.stdin.isatty():
        raise Failure(Exit.USAGE, "there is no terminal to ask for the password on; give --password-stdin")
    return str(click.prompt("Password", hide_input=True, confirmation_prompt="The same again", err=True))


def _from_stdin() -> str:
    data = sys.stdin.buffer.read(_INPUT_MAX_BYTES + 1)
    if len(data) > _INPUT_MAX_BYTES:
        raise Failure(Exit.USAGE, f"standard input has more than {_INPUT_MAX_BYTES} bytes; a password is one line")
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise Failure(Exit.USAGE, "the password on standard input is not UTF-8") from None


def _opened(users_file: Path | None, config_file: str | None) -> UserStore:
    try:
        return UserStore(users_file or _configured_file(config_file) or default_users_path())
    except UserError as error:
        raise Failure(Exit.USAGE, str(error)) from None


def _configured_file(config_file: str | None) -> Path | None:
    from broker.config.load import chosen_file, load

    configured = load(chosen_file(config_file, os.environ), os.environ).auth.users_file
    return Path(configured) if configured else None


def _row(record: UserRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "state": record.state,
        "roles": record.roles,
        "endpoints": record.endpoints,
        "created": moment(record.created),
        "changed": moment(record.changed),
    }
