"""`broker serve`: runs the broker in the foreground until SIGTERM or Ctrl-C."""

import os
from pathlib import Path

import click

from broker.cli.exits import Exit, Failure
from broker.config.load import chosen_file, load


@click.command()
@click.option("--host", help="Address to listen on (server.host).")
@click.option("--port", type=int, help="Port to listen on; 0 lets the system choose (server.port).")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file (BROKER_CONFIG).")
@click.option("--insecure", is_flag=True, default=None, help="Listen on a public address without TLS.")
@click.option("--log-format", type=click.Choice(["auto", "human", "json"]), help="Form of the log (log.format).")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="log.level.")
def serve(
    host: str | None,
    port: int | None,
    config_file: Path | None,
    insecure: bool | None,
    log_format: str | None,
    log_level: str | None,
) -> None:
    """Run the broker.

    Flags go before the environment (BROKER_SECTION__KEY), which goes before the configuration file.
    SIGTERM or Ctrl-C drains and ends, a second one ends at once, SIGHUP reloads the configuration.
    """
    from broker.auth.token_file import TokenError
    from broker.auth.users_file import UserError
    from broker.config.model import Config
    from broker.daemon.serve import StartError, run

    def read() -> Config:
        overrides = {
            "server.host": host,
            "server.port": port,
            "server.insecure": insecure,
            "log.format": log_format,
            "log.level": log_level,
        }
        return load(chosen_file(config_file, os.environ), os.environ, overrides)

    try:
        code = run(read(), read)
    except (StartError, TokenError, UserError) as error:
        raise Failure(Exit.USAGE, str(error)) from None
    click.get_current_context().exit(code)
