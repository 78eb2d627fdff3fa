"""`broker call`: asks a worker and prints the reply, its items as they come."""

from __future__ import annotations

import difflib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec

from broker.cli import transfer
from broker.cli.bar import Bar
from broker.cli.connection import broker_options, grace_option, print_json, read_json, run
from broker.cli.exits import Exit, Failure
from broker.cli.output import Printed, Saved
from broker.cli.outputs import Outputs, is_kernel
from broker.cli.ranges import goes_on
from broker.cli.transfer import STANDARD, Source, Target, save_ranges
from broker.client.async_client import AsyncClient
from broker.core.options import PRIORITY_MAX, RETRIES_MAX
from broker.peer.errors import BrokerError, NoEndpoint, NoMethod
from broker.peer.values import ValueUnfit, decode

Output = Printed | Saved | Outputs


@click.command()
@click.argument("method", metavar="ENDPOINT/METHOD")
@click.argument("params", metavar="[JSON]", required=False)
@click.option("--attach", "attach", multiple=True, metavar="[NAME=]FILE", help="Send a file: as parameter NAME, or "
              'where the JSON says {"$buffer": 0}.')  # fmt: skip
@click.option("--in", "source", type=click.Path(path_type=Path, allow_dash=True), help="Send a file of any size in "
              "parts, as the worker takes them (- is standard input).")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, allow_dash=True), help="Write the bytes of the reply to a file, "
              "as they come; it is there when all have come (- is standard output).")  # fmt: skip
@click.option("--timeout", type=float, help="Deadline in seconds.  [default: the endpoint's, 30 unless configured; "
              "streams go on for as long as they flow]")  # fmt: skip
@click.option("--idle", type=float, help="Seconds a stream may stand still.  [default: the endpoint's]")
@click.option("--wait", is_flag=True, help="Queue until a worker comes, if there is none.")
@click.option("--idempotent", is_flag=True, help="It may be tried on another worker if one is lost.")
@click.option("--retries", type=click.IntRange(0, RETRIES_MAX), help="How often, with --idempotent.  [default: 1]")
@click.option("--key", help="A repeat with the same key gets the reply of the first, and runs nothing.")
@click.option("--priority", type=click.IntRange(-PRIORITY_MAX, PRIORITY_MAX), default=0, show_default=True,
              help="Higher goes first where requests queue.")  # fmt: skip
@click.option("--group", help="Requests of one group go to one worker, or displace each other; see the endpoint.")
@click.option("--progress/--no-progress", default=None, help="Show on standard error how far it is.  [default: on a "
              "terminal, without --json]")  # fmt: skip
@click.option("--timing", is_flag=True, help="Print on standard error where the time went, as JSON.")
@grace_option
@broker_options
def call(
    method: str, params: str | None, attach: tuple[str, ...], url: str | None, token: str | None, as_json: bool,
    source: Path | None, out: Path | None, progress: bool | None, timing: bool, grace: float,
    **options: Any,
) -> None:  # fmt: skip
    """Ask ENDPOINT/METHOD with the parameters JSON (- reads them from standard input) and print the reply.

    Items of a stream are printed as lines of JSON as they come; what code in a kernel shows, as it would here.
    """
    if params == "-" and source == STANDARD:
        raise Failure(Exit.USAGE, "standard input holds the parameters or what --in sends, not both")
    arguments = _attach(read_json(params), attach)
    for name in ("timeout", "idle"):
        if options[name] is not None and not options[name] > 0:
            raise Failure(Exit.USAGE, f"--{name} {options[name]:g} is not a positive number of seconds")
    if options["key"] is not None and (source is not None or timing):
        raise Failure(Exit.USAGE, "--key is for a request that is repeated as a whole, without --in and --timing")
    if progress is None and as_json:
        progress = False
    asking = _Asking(method, arguments, options, timing)

    async def ask(client: AsyncClient) -> None:
        with ExitStack() as stack:
            given = None if source is None else Source(source)
            bar = stack.enter_context(Bar(method, shown=progress, after_s=transfer.SHOWN_AFTER_S))
            if given is not None:
                stack.callback(given.close)
            target = None if out is None else stack.enter_context(Target(out))
            told = await asking.run(client, given, target, bar, as_json)
        if timing:  # the bar has been finished
            click.echo(msgspec.json.encode({"timing_ms": asking.timing}).decode(), err=True)
        if target is not None and not target.is_standard:
            click.echo(f"wrote {target.written} bytes to {target.path}", err=True)
            if told is not None:
                print_json(told, pretty=sys.stdout.isatty() and not as_json)

    try:
        run(ask, url, token, as_json, reconnect=True, grace=grace)
    except TypeError as error:
        raise Failure(Exit.USAGE, str(error)) from None


class _Asking:
    """One request, and what becomes of its reply."""

    def __init__(self, method: str, params: Any, options: dict[str, Any], timing: bool) -> None:
        self._method = method
        self._params = params
        self._options = options
        self._timing = timing
        self.timing: dict[str, Any] | None = None

    async def run(
        self, client: AsyncClient, source: Source | None, target: Target | None, bar: Bar, as_json: bool
    ) -> Any:
        """Ask, and print or save what comes. Returns what is to be printed when all is saved; None for nothing."""
        output: Output
        output = Printed(bar, as_json) if target is None else Saved(target, bar, as_json, self._method)
        endpoint, _, method = self._method.partition("/")
        if method == "execute" and target is None and not as_json and await is_kernel(client, endpoint):
            output = Outputs(client, endpoint, bar)
        try:
            result = await self._ask(client, source, output, bar)
        except (NoEndpoint, NoMethod) as error:
            await suggest(client, error)
            raise
        if target is None or not goes_on(result):
            return await output.result(result)

        async def ask_again(params: dict[str, Any]) -> Any:
            return await client.call(self._method, params, **(self._options | {"key": None}))

        return await save_ranges(ask_again, self._params, result, target, bar)

    async def _ask(self, client: AsyncClient, source: Source | None, output: Output, bar: Bar) -> Any:
        """The items go to `output`; returns the result."""
        told = bar.tell if bar.is_shown else None
        if self._options["key"] is not None:
            return await client.call(self._method, self._params, progress=told, **self._options)
        parts = None if source is None else source.pieces(bar.count)
        stream = await client.stream(
            self._method, self._params, progress=told, parts=parts, timing=self._timing, **self._options
        )  # fmt: skip
        async with stream:
            async for item in stream:
                await output.item(item)
        self.timing = stream.timing
        return stream.result


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


async def suggest(client: AsyncClient, error: BrokerError, endpoint: str | None = None) -> None:
    """Say which names look like the one that does not exist; `endpoint` where the broker was asked about it."""
    try:
        if isinstance(error, NoEndpoint):
            wanted = endpoint or error.endpoint
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
        what = "Endpoints here" if isinstance(error, NoEndpoint) else f"Methods of {error.endpoint}"
        error.advice = f"{what}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}."
