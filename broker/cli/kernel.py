"""`broker kernel connect`: a kernel at the other end of the broker as a local connection file."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from broker.cli.call import suggest
from broker.cli.connection import broker_options, grace_option, print_json, run
from broker.cli.exits import Exit, Failure
from broker.client.async_client import AsyncClient
from broker.peer.errors import NoEndpoint

if TYPE_CHECKING:
    from broker.client.kernel_relay import KernelRelay


@click.group()
def kernel() -> None:
    """Use Jupyter kernels that are served by `broker work kernel`."""


@kernel.command()
@click.argument("endpoint")
@click.option(
    "--connection-file", type=click.Path(path_type=Path), help="Where to write it.  [default: ENDPOINT.json in this "
    "folder]",
)  # fmt: skip
@grace_option
@broker_options
def connect(
    endpoint: str, connection_file: Path | None, grace: float, url: str | None, token: str | None, as_json: bool
) -> None:
    """Make the kernel at ENDPOINT usable as if it ran here, until Ctrl-C.

    Writes a connection file for `jupyter console --existing FILE`, `jupyter qtconsole --existing FILE` and
    BlockingKernelClient, readable by you alone, and removes it at the end. The sockets are on loopback.
    """
    from broker.auth.connection_files import write_connection_file
    from broker.client.kernel_relay import KernelRelay, NoKernel

    path = (connection_file or Path(f"{endpoint}.json")).absolute()
    if path.exists():
        raise Failure(
            Exit.USAGE, f"{path} is there already: another kernel's, or left behind; remove it, or name another"
        )

    async def relay(client: AsyncClient) -> None:
        try:
            async with KernelRelay(client, endpoint) as relay:
                write_connection_file(path, relay.info)
                try:
                    if as_json:
                        print_json({"endpoint": endpoint, "connection_file": str(path)})
                    else:
                        click.echo(f"{endpoint} is at {path}; jupyter console --existing {path}", err=True)
                    await _until_ended(relay)
                finally:
                    path.unlink(missing_ok=True)
        except NoEndpoint as error:
            await suggest(client, error, endpoint)
            raise
        except NoKernel as error:
            raise Failure(Exit.USAGE, str(error)) from None

    run(relay, url, token, as_json, reconnect=True, grace=grace)


async def _until_ended(relay: KernelRelay) -> None:
    """Wait for SIGTERM; Ctrl-C cancels. Raises what ends the relay otherwise."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    relaying, told = loop.create_task(relay.wait()), loop.create_task(ended.wait())
    try:
        await asyncio.wait((relaying, told), return_when=asyncio.FIRST_COMPLETED)
        if relaying.done():
            relaying.result()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        for task in (relaying, told):
            task.cancel()
