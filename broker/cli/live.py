"""`broker pending`, `broker trace`: requests that have not ended: how old, where they wait, who has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from broker.cli.connection import broker_options, clean_line, print_json, run
from broker.cli.exits import Exit, Failure
from broker.cli.listings import print_rows
from broker.client.async_client import AsyncClient
from broker.peer.errors import Denied

_NUMBER_DIGITS = 18
"""longer than that, digits are a trace id"""


@click.command()
@click.argument("endpoint", required=False)
@broker_options
def pending(endpoint: str | None, url: str | None, token: str | None, as_json: bool) -> None:
    """List the requests that have not ended, or those of ENDPOINT; who is no administrator sees his own."""
    found = _find({"endpoint": endpoint} if endpoint else {}, url, token, as_json)
    for row in found if not as_json else ():
        row["state"] = _state(row)
        row["parts"] = "/".join(str(flow["parts"]) if flow else "-" for flow in (row["up"], row["down"]))
    columns = ["request", "endpoint", "method", "state", "peer", "worker", "attempts", "parts", "age_s", "left_s"]
    print_rows(found, columns, "nothing is pending", as_json)


@click.command()
@click.argument("id")
@broker_options
def trace(id: str, url: str | None, token: str | None, as_json: bool) -> None:
    """Show a request that has not ended: by the broker's number, a traceparent, or the trace id in it."""
    is_number = id.isascii() and id.isdigit() and len(id) <= _NUMBER_DIGITS
    found = _find({"request": int(id)} if is_number else {"trace": id}, url, token, as_json)
    if not found:
        text = f"no live request is {clean_line(id)!r:.80}; it has ended, or there never was one"
        raise Failure(Exit.NOT_SERVED, text)
    if as_json:
        print_json(found)
        return
    for number, row in enumerate(found):
        if number:
            click.echo()
        click.echo(clean_line(f"request {row['request']}: {row['endpoint']}/{row['method']}, {_state(row)}"))
        for name, text in _describe(row):
            click.echo(f"  {name:<11}{clean_line(text)}")


def _find(params: dict[str, object], url: str | None, token: str | None, as_json: bool) -> list[dict[str, Any]]:
    """All that fit, for administrators; of others their own, and a line says so."""

    async def ask(client: AsyncClient) -> tuple[list[dict[str, Any]], bool]:
        try:
            return await client.call("broker.admin.pending", params), False
        except Denied:
            return await client.call("broker.pending", params), True

    found, own = run(ask, url, token, as_json)
    if own and not as_json:
        click.echo("these are your own requests; administrators see all", err=True)
    return found


def _state(row: dict[str, Any]) -> str:
    if row["place"] is not None:
        return f"queued as {row['place']}"
    return f"joined {row['leader']}" if row["leader"] is not None else str(row["state"])


def _describe(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What there is to say of one request, by name."""
    yield "asked by", f"{row['peer']} ({row['principal']})"
    yield "worker", f"{row['worker'] or 'none'}, {row['attempts']} attempt{'' if row['attempts'] == 1 else 's'}"
    yield "age", f"{row['age_s']:.1f} s, {row['left_s']:.1f} s until its deadline"
    if row["idle_left_s"] is not None:
        yield "idle", f"{row['idle_left_s']:.1f} s until it has stood still too long"
    for name, flow in (("to worker", row["up"]), ("to caller", row["down"])):
        if flow is not None:
            how = "ended" if flow["ended"] else f"{flow['credit']} more may come"
            yield name, f"{flow['parts']} parts, {flow['bytes']} bytes, {how}"
    if row["joined"]:
        yield "joined by", f"{row['joined']} with the same key"
    labels = [f"{name} {row[name]}" for name in ("key", "group") if row[name] is not None]
    if row["priority"]:
        labels.append(f"priority {row['priority']}")
    if labels:
        yield "asked with", ", ".join(labels)
    if row["trace"] is not None:
        yield "trace", row["trace"]
