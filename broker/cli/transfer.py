"""Saves a file that comes in ranges, with a progress bar where somebody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from broker.client.files import Ranges, replacing

SHOWN_AFTER_S = 1.0
"""quicker transfers show nothing"""


def goes_on(reply: Any) -> bool:
    """Whether a reply is the first range of a file that has more."""
    return isinstance(reply, dict) and reply.get("more") is True and isinstance(reply.get("data"), bytes)


async def save_ranges(
    ask: Callable[[dict[str, Any]], Awaitable[Any]], params: Any, reply: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Save all ranges of a file, of which `reply` is the first, as `out` (`-`: standard output).

    `ask` sends a request with the parameters it gets. Returns what the reply says beside its bytes.
    Raises what it raises, BadReply, and OSError.
    """
    # By position only the path can be told from the rest.
    given = dict(params) if isinstance(params, dict) else {"path": reply.get("path")}
    ranges = Ranges({**given, "offset": reply.get("offset", 0)}, str(given.get("path")))
    with _opened(out) as file, progress(f"reading {given.get('path')}") as tell:
        file.write(ranges.take(reply))
        while not ranges.is_done:
            file.write(ranges.take(await ask(ranges.params())))
            tell(ranges.received, ranges.total)
    summary = {name: value for name, value in reply.items() if name != "data"}
    return summary | {"length": ranges.received, "more": False}


@contextmanager
def _opened(out: Path) -> Iterator[IO[bytes]]:
    if str(out) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with replacing(out) as file:
        yield file


@contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function to tell how many bytes of how many are done; on a terminal it draws, from the second second on."""
    began = time.monotonic()
    bar: Any = None
    label = "".join(letter if letter.isprintable() else "?" for letter in text)

    def tell(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and sys.stderr.isatty() and time.monotonic() - began >= SHOWN_AFTER_S:
            bar = click.progressbar(length=total, label=label, file=sys.stderr)
            bar.__enter__()
        if bar is not None:
            bar.update(done - bar.pos)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
