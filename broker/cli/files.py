"""`broker work files`: serves a folder."""

from __future__ import annotations

from pathlib import Path

import click

from broker.cli.exits import Exit, Failure
from broker.cli.work import new_worker, run_worker, worker_options
from broker.worker.files import Files


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@worker_options
@click.option("--types", default="", metavar="LIST", help="Serve only files that end so, such as .dcm,.nii.gz.")
@click.option("--allow-write", is_flag=True, help="Let callers write files.")
@click.option("--allow-delete", is_flag=True, help="Let callers delete files.")
def files(
    folder: Path, endpoint: str, name: str, capacity: int, grace: float, no_wait: bool, url: str | None,
    token: str | None, types: str, allow_write: bool, allow_delete: bool, as_json: bool,
) -> None:  # fmt: skip
    """Serve the folder DIR: list, stat, read, newest, watch, and write and delete where allowed.

    Paths are relative to DIR, and nothing outside it can be reached, symbolic links included. Several such workers
    may serve one endpoint; then their folders should hold the same.
    """
    kinds = tuple(kind.strip() for kind in types.split(",") if kind.strip())
    if any("/" in kind or kind == "." for kind in kinds):
        raise Failure(Exit.USAGE, f"--types {types}: give endings with commas between, such as .dcm,.png")
    try:
        served = Files(folder, types=kinds, writable=allow_write, deletable=allow_delete)
    except NotADirectoryError:
        raise Failure(Exit.USAGE, f"{folder}: there is no such folder") from None
    except ValueError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    worker = new_worker(endpoint, url, token, name, capacity, grace, no_wait)
    worker.add_object(served)
    run_worker(worker, as_json=as_json)
