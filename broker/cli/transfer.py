"""Bytes between files and requests: `--in` in pieces, `--out` as they come, files that come in ranges."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from broker.cli.bar import Bar
from broker.cli.connection import clean_line
from broker.cli.exits import Exit, Failure
from broker.cli.ranges import Ranges
from broker.client.files import replacing

SHOWN_AFTER_S = 1.0
"""quicker transfers show nothing"""
PIECE_BYTES = 256 * 1024 - 4096
"""read from a file at a time: with its JSON text one part"""

STANDARD = Path("-")
"""standard input, or standard output"""


class Source:
    """A file to be sent, piece after piece. Raises Failure if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self.total: int | None = None
        if path != STANDARD:
            try:
                self._file = path.open("rb", buffering=0)
                state = os.fstat(self._file.fileno())
            except OSError as error:
                raise Failure(Exit.USAGE, f"--in {path}: {error.strerror}") from None
            if state.st_size:
                self.total = state.st_size  # a device or a pipe does not know

    def pieces(self, count: Callable[[int, int | None], object]) -> Iterator[bytes]:
        """What is in it; `count` is told how much of how much has been read."""
        done = 0
        try:
            while piece := self._read():
                yield piece
                done += len(piece)
                count(done, self.total)
        finally:
            self.close()

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()

    def _read(self) -> bytes:
        try:
            if self._file is not None:
                return self._file.read(PIECE_BYTES)
            # Not through the buffer of sys.stdin: its lock, held by a thread that waits for input, would be missed
            # at the end of the process.
            return os.read(sys.stdin.fileno(), PIECE_BYTES)
        except OSError as error:
            if error.errno is None:  # standard input that is no file
                return sys.stdin.buffer.read(PIECE_BYTES)
            raise Failure(Exit.USAGE, f"--in {self._path}: {error.strerror}") from None


class Target:
    """Where bytes are saved: standard output, or a file that takes its name when all has come, and else is not there.

    A context manager. What cannot be written raises Failure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    @property
    def is_standard(self) -> bool:
        """Whether it is standard output."""
        return self.path == STANDARD

    async def write(self, data: bytes | memoryview) -> None:
        """Write, without holding up the event loop."""
        try:
            await asyncio.to_thread(self._write, data)
        except OSError as error:
            raise self._failed(error) from None
        self.written += len(data)

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(data)

    def _failed(self, error: OSError) -> Exception:
        if self.is_standard and isinstance(error, BrokenPipeError):
            return error  # who read it went away: not our failure
        return Failure(Exit.USAGE, f"--out {self.path}: {error.strerror}")

    def __enter__(self) -> Self:
        try:
            self._file = sys.stdout.buffer if self.is_standard else self._stack.enter_context(replacing(self.path))
        except OSError as error:
            raise self._failed(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.is_standard:
                sys.stdout.buffer.flush()
            self._stack.__exit__(kind, error, trace)
        except OSError as failed:
            if failed is error or error is not None:
                raise
            raise self._failed(failed) from None


async def save_ranges(
    ask: Callable[[dict[str, Any]], Awaitable[Any]], params: Any, reply: dict[str, Any], target: Target, bar: Bar
) -> dict[str, Any]:
    """Save all ranges of a file, of which `reply` is the first.

    `ask` sends a request with the parameters it gets. Returns what the reply says beside its bytes.
    Raises what it raises, BadReply, and Failure.
    """
    # By position only the path can be told from the rest.
    given = dict(params) if isinstance(params, dict) else {"path": reply.get("path")}
    ranges = Ranges({**given, "offset": reply.get("offset", 0)}, str(given.get("path")))
    bar.label = clean_line(f"reading {given.get('path')}")
    await target.write(ranges.take(reply))
    while not ranges.is_done:
        await target.write(ranges.take(await ask(ranges.params())))
        bar.count(ranges.received, ranges.total)
    summary = {name: value for name, value in reply.items() if name != "data"}
    return summary | {"length": ranges.received, "more": False}
