"""`broker work kernel` and `broker work kernels`: Jupyter kernels of this machine as workers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from broker.cli.exits import Exit, Failure
from broker.cli.work import link_options, run_worker

if TYPE_CHECKING:
    from broker.worker.worker import Worker

GRACE_S = 30.0
DEFAULT = "python3"


@click.command()
@click.option("--endpoint", required=True, help="The endpoint to serve, such as kernels.alice.")
@click.option("--name", help=f"The kernel to start, as `jupyter kernelspec list` names it.  [default: {DEFAULT}]")
@click.option(
    "--connection-file", type=click.Path(path_type=Path), help="A kernel that runs, instead of starting one; it is "
    "left running.",
)  # fmt: skip
@link_options(GRACE_S)
def kernel(
    endpoint: str, name: str | None, connection_file: Path | None, grace: float, no_wait: bool, url: str | None,
    token: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Serve a Jupyter kernel: started here and ended with this command, or attached to.

    Its ports stay on this machine. `broker kernel connect` brings notebooks and consoles to it from anywhere, and
    `broker call ENDPOINT/execute` runs code.
    """
    from broker.worker.kernel.process import Attached, Started
    from broker.worker.kernel.worker import KernelWorker

    if name is not None and connection_file is not None:
        raise Failure(Exit.USAGE, "--name starts a kernel, --connection-file attaches to one; give one of them")
    process = Started(name or DEFAULT) if connection_file is None else Attached(connection_file)
    try:
        worker = KernelWorker(endpoint, process, url, token, grace=grace, wait=not no_wait)
    except ValueError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    _run(worker, as_json=as_json)


@click.command()
@click.option("--endpoint", default="kernels", show_default=True, help="The endpoint that starts kernels; each is "
              "served as ENDPOINT.ID.")  # fmt: skip
@click.option("--name", default=DEFAULT, show_default=True, help="The kernel for who names none.")
@click.option("--kernels-max", type=click.IntRange(1, 1000), default=16, show_default=True, help="Kernels at a time.")
@link_options(GRACE_S)
def kernels(
    endpoint: str, name: str, kernels_max: int, grace: float, no_wait: bool, url: str | None, token: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Start Jupyter kernels for who asks, and serve each as ENDPOINT.ID: specs, start, list, stop.

    They end with this command.
    """
    from broker.worker.kernel.offering import KernelsWorker

    try:
        worker = KernelsWorker(
            endpoint, url, token, kernels_max=kernels_max, default=name, grace=grace, wait=not no_wait
        )
    except ValueError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    _run(worker, as_json=as_json)


def _run(worker: Worker, *, as_json: bool) -> None:
    from broker.worker.kernel.process import KernelError

    try:
        run_worker(worker, as_json=as_json)
    except KernelError as error:
        raise Failure(Exit.USAGE, str(error)) from None
