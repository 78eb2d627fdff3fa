"""`broker call`: asks a worker and prints the reply."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from broker.cli.connection import broker_options, print_json, read_json, run
from broker.cli.exits import Exit, Failure
from broker.cli.transfer import goes_on, save_ranges
from broker.client.async_client import AsyncClient
from broker.peer.errors import BrokerError, NoEndpoint, NoMethod
from broker.peer.values import ValueUnfit, decode, encode
from broker.wire.attachments import expand


@click.command()
@click.argument("method", metavar="ENDPOINT/METHOD")
@click.argument("params", metavar="[JSON]", required=False)
@click.option("--attach", "attach", multiple=True, metavar="[NAME=]FILE", help="Send a file: as parameter NAME, or "
              'where the JSON says {"$buffer": 0}.')  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, allow_dash=True), help="Write the bytes of the reply to a file.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Deadline in seconds.")
@click.option("--wait", is_flag=True, help="Queue until a worker comes, if there is none.")
@click.option("--idempotent", is_flag=True, help="It may be tried on another worker if one is lost.")
@broker_options
def call(
    method: str, params: str | None, attach: tuple[str, ...], out: Path | None, timeout: float, wait: bool,
    idempotent: bool, url: str | None, token: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Ask ENDPOINT/METHOD with the parameters JSON (- reads them from standard input) and print the reply."""
    arguments = _attach(read_json(params), attach)
    if timeout <= 0:
        raise Failure(Exit.USAGE, f"--timeout {timeout:g} is not a positive number of seconds")

    async def ask(client: AsyncClient) -> tuple[Any, bool]:
        """The reply, and whether its bytes are saved already."""
        try:
            reply = await client.call(method, arguments, wait=wait, idempotent=idempotent)
        except (NoEndpoint, NoMethod) as error:
            await _suggest(client, error)
            raise
        if out is None or not goes_on(reply):
            return reply, False

        async def ask_again(params: dict[str, Any]) -> Any:
            return await client.call(method, params, idempotent=idempotent)

        try:
            return await save_ranges(ask_again, arguments, reply, out), True
        except OSError as error:
            if isinstance(error, BrokerError):
                raise
            raise Failure(Exit.USAGE, f"--out {out}: {error.strerror}") from None

    try:
        result, is_saved = run(ask, url, token, as_json, timeout=timeout)
    except TypeError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    if not is_saved:
        _print(result, out, as_json)
    elif str(out) != "-":
        click.echo(f"wrote {result['length']} bytes to {out}", err=True)
        print_json(result, pretty=sys.stdout.isatty() and not as_json)


def _attach(params: Any, attach: tuple[str, ...]) -> Any:
    """The parameters with the files in them."""
    unnamed: list[bytes] = []
    named: dict[str, bytes] = {}
    for text in attach:
        name, sign, file = text.partition("=")
        if sign and name.isidentifier() and not Path(text).exists():
            named[name] = _read(file)
        else:
            unnamed.append(_read(text))
    if unnamed:
        raw = msgspec.json.encode(params)
        for index in range(len(unnamed)):
            if b'{"$buffer":%d}' % index not in raw:
                hint = f'write {{"$buffer": {index}}} where it belongs, or --attach NAME=FILE'
                raise Failure(Exit.USAGE, f"the JSON does not refer to attachment {index}; {hint}")
        try:
            params = decode(raw, unnamed)
        except ValueUnfit as error:
            raise Failure(Exit.USAGE, str(error)) from None
    if named:
        if not isinstance(params, dict | None):
            raise Failure(Exit.USAGE, "--attach NAME=FILE needs parameters by name: a JSON object, or none")
        params = (params or {}) | named
    return params


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise Failure(Exit.USAGE, f"--attach {file}: {error.strerror}") from None


def _print(result: Any, out: Path | None, as_json: bool) -> None:
    """The reply as JSON; its bytes into a file if wanted, else in base64 for programs, in words for eyes."""
    text, attachments = encode(result)
    pretty = sys.stdout.isatty() and not as_json
    if out is not None:
        if len(attachments) != 1:
            _print_whole(result, pretty)
            raise Failure(Exit.USAGE, f"--out {out}: the reply has {len(attachments)} attachments, not one")
        _save(bytes(attachments[0]), out)
        if str(out) != "-" and text != b'{"$buffer":0}':
            print_json(msgspec.Raw(text), pretty=pretty)
        return
    _print_whole(result, pretty)


def _save(data: bytes, out: Path) -> None:
    if str(out) == "-":
        sys.stdout.buffer.write(data)
        return
    try:
        out.write_bytes(data)
    except OSError as error:
        raise Failure(Exit.USAGE, f"--out {out}: {error.strerror}") from None
    click.echo(f"wrote {len(data)} bytes to {out}", err=True)


def _print_whole(result: Any, pretty: bool) -> None:
    """For programs with its bytes in base64, for eyes with a word about them."""
    if pretty:
        result = _in_words(result)
    text, attachments = encode(result)
    print_json(msgspec.Raw(expand(text, attachments) if attachments else text), pretty=pretty)


def _in_words(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes; --out FILE keeps them>"
    if isinstance(value, dict):
        return {name: _in_words(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_in_words(item) for item in value]
    return value


async def _suggest(client: AsyncClient, error: BrokerError) -> None:
    """Say which names there are that look like the one that does not exist."""
    try:
        if isinstance(error, NoEndpoint):
            wanted = error.endpoint
            names = [one["endpoint"] for one in await client.endpoints() if one["workers"]]
        else:
            wanted = error.method
            told = await client.describe(error.endpoint)
            names = sorted({name for worker in told["workers"] for name in worker["methods"] or ()})
    except BrokerError:
        return  # what went wrong first is what there is to tell
    near = difflib.get_close_matches(wanted, names, 3, 0.5)
    if near:
        error.advice = f"Did you mean {', '.join(near)}?"
    elif names:
        error.advice = f"There are {', '.join(names[:10])}{', …' if len(names) > 10 else ''}."
