"""`broker endpoints`, `describe`, `peers`, `ping`: what the broker says of itself."""

from __future__ import annotations

import time
from typing import Any

import click

from broker.cli.connection import broker_options, clean_line, counted, print_json, print_table, run


@click.command()
@broker_options
def endpoints(url: str | None, token: str | None, as_json: bool) -> None:
    """List the endpoints and how busy they are."""
    found = run(lambda client: client.endpoints(), url, token, as_json)
    columns = ["endpoint", "workers", "free", "executing", "queued", "listeners"]
    print_rows(found, columns, "no endpoint is known; start a worker", as_json)


@click.command()
@broker_options
def peers(url: str | None, token: str | None, as_json: bool) -> None:
    """List who is connected (for administrators)."""
    found = run(lambda client: client.call("broker.admin.peers"), url, token, as_json)
    columns = ["peer", "principal", "role", "endpoint", "serves", "remote", "requests", "executing", "connected_s"]
    print_rows(found, columns, "nobody is connected", as_json)


@click.command()
@broker_options
def ping(url: str | None, token: str | None, as_json: bool) -> None:
    """Ask the broker for a sign of life."""

    async def ask(client: Any) -> dict[str, Any]:
        began = time.perf_counter()
        told: dict[str, Any] = await client.ping()
        return told | {"round_trip_ms": round((time.perf_counter() - began) * 1e3, 3), "url": client.url}

    told = run(ask, url, token, as_json)
    if as_json:
        print_json(told)
        return
    click.echo(
        f"broker {told['node']} at {told['url']} answered in {told['round_trip_ms']:g} ms; up for "
        f"{told['uptime_s']:.0f} s; this was peer {told['peer']}"
    )


@click.command()
@click.argument("endpoint")
@broker_options
def describe(endpoint: str, url: str | None, token: str | None, as_json: bool) -> None:
    """Show the workers of ENDPOINT and their methods."""
    told = run(lambda client: client.describe(endpoint), url, token, as_json)
    if as_json:
        print_json(told)
        return
    queued, executing = told["queued"], told["executing"]
    workers = counted(len(told["workers"]), "worker")
    click.echo(f"{told['endpoint']}: {workers}, {executing} executing, {queued} queued")
    for worker in told["workers"]:
        _print_worker(worker)


def _print_worker(worker: dict[str, Any]) -> None:
    info = worker["info"] if isinstance(worker["info"], dict) else {}
    name = clean_line(str(info.get("name") or ""))
    load = f"{worker['executing']} of {worker['capacity']} at work"
    click.echo(f"  {worker['peer']}{f' {name}' if name else ''} ({load})")
    described = info.get("methods") if isinstance(info.get("methods"), dict) else {}
    assert isinstance(described, dict)
    methods = worker["methods"]
    if methods is None:
        click.echo("    any method")
    for method in methods or ():
        about = described.get(method)
        about = about if isinstance(about, dict) else {}
        first = str(about.get("doc") or "").strip().partition("\n")[0]
        signature = clean_line(str(about.get("signature") or ""))
        click.echo(f"    {method}{signature}{f'  {clean_line(first)}' if first else ''}")


def print_rows(found: list[dict[str, Any]], columns: list[str], none: str, as_json: bool) -> None:
    """Print rows as a table of these columns, or as JSON; `none` says that there are none."""
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo(none, err=True)
        return
    print_table([[_cell(row.get(column)) for column in columns] for row in found], columns)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value)
