"""`broker config`: writes a commented file, checks one, shows what holds."""

import os
from pathlib import Path

import click

from broker.cli.exits import Exit, Failure
from broker.config.load import Loaded, chosen_file, load_with_origins

_FILE = click.argument("file", required=False, type=click.Path(path_type=Path))


@click.group()
def config() -> None:
    """Write, check and show the configuration.

    FILE defaults to the one in BROKER_CONFIG. Environment variables (BROKER_SECTION__KEY) win over the file.
    """


@config.command()
@click.argument("file", default="broker.toml", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
def init(file: Path, force: bool) -> None:
    """Write a commented configuration with all defaults to FILE (broker.toml; - is standard output)."""
    from broker.config.render import default_toml

    if str(file) == "-":
        click.echo(default_toml(), nl=False)
        return
    try:
        with file.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(default_toml())
    except FileExistsError:
        raise Failure(Exit.USAGE, f"{file}: exists already; --force overwrites it") from None
    click.echo(f"wrote {file}; edit it, then: broker config check {file}", err=True)


@config.command()
@_FILE
def check(file: Path | None) -> None:
    """Check FILE, the environment and the TLS files they name; exit code 2 and one line if something is wrong."""
    from broker.config.certificates import server_context

    loaded = _load(file)
    server_context(loaded.config.server)
    sources = list(dict.fromkeys(loaded.origins.values()))
    click.echo(f"ok: {', '.join(sources) if sources else 'nothing but defaults'}")


@config.command()
@_FILE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(file: Path | None, as_json: bool) -> None:
    """Print what holds, and where each value that is no default comes from. Secrets are not shown."""
    from broker.config import render

    loaded = _load(file)
    if as_json:
        import json

        click.echo(json.dumps(render.effective_dict(loaded.config), indent=2))
    else:
        click.echo(render.effective_toml(loaded.config, loaded.origins), nl=False)


@config.command(hidden=True)
def docs() -> None:
    """Print docs/configuration.md."""
    from broker.config.render import configuration_page

    click.echo(configuration_page(), nl=False)


def _load(file: Path | None) -> Loaded:
    return load_with_origins(chosen_file(file, os.environ), os.environ)
