"""`broker context`: brokers by name, so that commands need neither --url nor --token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import click
import msgspec

from broker.auth.contexts import (
    LOCAL,
    ContextError,
    add_context,
    contexts_path,
    load_contexts,
    remove_context,
    use_context,
)
from broker.cli.exits import Exit, Failure

Result = TypeVar("Result")


@click.group()
def context() -> None:
    """Keep brokers by name, and choose which one commands go to.

    --url and --token go before BROKER_URL and BROKER_TOKEN, these before the context in use, and that before the
    broker running on this machine.
    """


@context.command()
@click.argument("name")
@click.option("--url", required=True, help="Where the broker is, such as https://broker.lab.example.")
@click.option("--token", default="", help="Token to get in with; - reads it from standard input.")
@click.option("--use", is_flag=True, help="Use it from now on; the first one is used anyway.")
def add(name: str, url: str, token: str, use: bool) -> None:
    """Keep a broker under NAME, in place of an older one of that name."""
    from broker.peer.connection import split_url

    if "://" not in url:
        raise Failure(Exit.USAGE, f"--url {url} names no scheme; write https://{url}, or http://{url}")
    try:
        split_url(url)
    except ValueError as error:
        raise Failure(Exit.USAGE, f"--url: {error}") from None
    if token == "-":  # noqa: S105 - the sign for standard input
        token = sys.stdin.readline().strip()
    if any(not letter.isprintable() or letter.isspace() for letter in token):
        raise Failure(Exit.USAGE, "--token holds spaces or control characters; no token does")
    replaced = _do(lambda: add_context(name, url, token))
    if use:
        _do(lambda: use_context(name))
    in_use = ", in use" if _do(load_contexts).current == name else f"; `broker context use {name}` goes there"
    click.echo(f"context {name} {'replaced' if replaced else 'kept'} in {contexts_path()}{in_use}", err=True)


@context.command()
@click.argument("name")
def use(name: str) -> None:
    """Send commands to the broker NAME from now on; "local" means the one running on this machine."""
    _do(lambda: use_context(name))
    where = "the broker running on this machine" if name == LOCAL else _do(load_contexts).contexts[name].url
    click.echo(f"commands go to {where}", err=True)


@context.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_contexts(as_json: bool) -> None:
    """List the brokers; * marks the one in use. Tokens are not shown."""
    kept = _do(load_contexts)
    rows = [
        {"name": name, "url": one.url, "token": bool(one.token), "in_use": name == kept.current}
        for name, one in kept.contexts.items()
    ]
    if as_json:
        click.echo(msgspec.json.encode(rows).decode())
        return
    if not rows:
        click.echo("no contexts; `broker context add NAME --url URL --token TOKEN` keeps one", err=True)
    from broker.cli.connection import print_table

    if rows:
        table = [["*" if row["in_use"] else "", str(row["name"]), str(row["url"]), "yes" if row["token"] else "no"]
                 for row in rows]  # fmt: skip
        print_table(table, ["", "name", "url", "token"])


@context.command()
@click.argument("name")
def remove(name: str) -> None:
    """Forget the broker NAME."""
    was_used = _do(lambda: remove_context(name))
    click.echo(f"context {name} removed{'; commands go to the broker on this machine' if was_used else ''}", err=True)


def _do(action: Callable[[], Result]) -> Result:
    try:
        return action()
    except ContextError as error:
        raise Failure(Exit.USAGE, str(error)) from None
