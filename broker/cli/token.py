"""`broker token`: make, list and revoke the tokens by which callers and workers prove who they are."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from broker.auth.token_file import TokenError, TokenRecord
from broker.auth.tokens import TokenStore, default_tokens_path
from broker.cli.exits import Exit, Failure
from broker.cli.records import moment, print_table
from broker.core.access import ROLE_NAMES

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_LENGTH = re.compile(r"([0-9]{1,6})([smhdw])")

Command = TypeVar("Command", bound=Callable[..., None])


def seconds(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """`90s`, `15m`, `12h`, `30d` or `2w` as seconds."""
    if value is None:
        return None
    match = _LENGTH.fullmatch(value)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is no length of time; write 90s, 15m, 12h, 30d or 2w")
    return float(int(match[1]) * _UNITS_S[match[2]])


def file_options(command: Command) -> Command:
    """Which file the tokens and keys stand in."""
    tokens_file = click.option(
        "--tokens-file", type=click.Path(path_type=Path), help="File of the tokens.  [default: auth.tokens_file]"
    )
    config = click.option("--config", "config_file", help="Configuration that names it.  [default: BROKER_CONFIG]")
    return tokens_file(config(command))


def grant_options(command: Command) -> Command:
    """What somebody may do, and where."""
    role = click.option(
        "--role", "roles", multiple=True, default=("caller",), show_default=True, type=click.Choice(list(ROLE_NAMES))
    )
    endpoint = click.option(
        "--endpoint", "endpoints", multiple=True, default=("*",), metavar="PATTERN", help="Where.  [default: *]"
    )
    return role(endpoint(command))


def expires_option(command: Command) -> Command:
    """For how long."""
    text = "Such as 12h or 30d.  [default: never]"
    return click.option("--expires", callback=seconds, metavar="LENGTH", help=text)(command)


@click.group()
def token() -> None:
    """Make, list and revoke tokens. A running broker notices within a second."""


@token.command()
@click.argument("name", default="")
@grant_options
@expires_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what `list` tells, and the token.")
@file_options
def create(
    *,
    name: str,
    roles: tuple[str, ...],
    endpoints: tuple[str, ...],
    expires: float | None,
    as_json: bool,
    tokens_file: Path | None,
    config_file: str | None,
) -> None:
    """Make a token for NAME and print it, once, to standard output.

    --role and --endpoint may be given several times; in a PATTERN, * stands for any run of characters.
    """
    store = opened(tokens_file, config_file)
    try:
        record, secret = store.create(name, roles, endpoints, expires)
    except TokenError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(row_of(record, time.time()) | {"token": secret}))
        return
    until = "never expires" if record.expires is None else f"expires {moment(record.expires)}"
    roles_text, endpoints_text = ", ".join(record.roles), ", ".join(record.endpoints)
    click.echo(f"token {record.id} for {record.name}: {roles_text} at {endpoints_text}; {until}", err=True)
    click.echo("It is shown this once; only its digest is kept.", err=True)
    click.echo(secret)


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@file_options
def list_tokens(as_json: bool, tokens_file: Path | None, config_file: str | None) -> None:
    """List the tokens, ended ones too. Secrets are not stored and so not shown."""
    now = time.time()
    tokens = opened(tokens_file, config_file).tokens()
    rows = [row_of(record, now) for record in tokens if record.kind == "token"]
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(rows))
    elif rows:
        print_table(rows, ("id", "name", "state", "roles", "endpoints", "created", "expires"))
    else:
        click.echo("no tokens; `broker token create` makes one", err=True)


@token.command()
@click.argument("id_or_name")
@file_options
def revoke(id_or_name: str, tokens_file: Path | None, config_file: str | None) -> None:
    """End the token with this id, or the only valid one of this name. Its live sessions are closed."""
    try:
        record = opened(tokens_file, config_file).revoke(id_or_name, "token")
    except TokenError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    click.echo(f"token {record.id} of {record.name} revoked {moment(record.revoked or 0.0)}", err=True)


def opened(tokens_file: Path | None, config_file: str | None) -> TokenStore:
    """The store in the file given, configured or default. Raises Failure."""
    try:
        return TokenStore(tokens_file or _configured_file(config_file) or default_tokens_path())
    except TokenError as error:
        raise Failure(Exit.USAGE, str(error)) from None


def _configured_file(config_file: str | None) -> Path | None:
    from broker.config.load import chosen_file, load

    configured = load(chosen_file(config_file, os.environ), os.environ).auth.tokens_file
    return Path(configured) if configured else None


def row_of(record: TokenRecord, now: float) -> dict[str, object]:
    """What a list says of one."""
    return {
        "id": record.id,
        "name": record.name,
        "state": record.state(now),
        "roles": record.roles,
        "endpoints": record.endpoints,
        "created": moment(record.created),
        "expires": None if record.expires is None else moment(record.expires),
        "revoked": None if record.revoked is None else moment(record.revoked),
    }
