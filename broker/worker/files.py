"""A worker's view of one folder: list, stat, read, newest, watch, and write and delete where allowed.

Every path is relative to the folder and confined to it by what it resolves to: symbolic links may point anywhere
within, `..` may pass through, and whatever ends outside is refused. Files are opened component by component without
following links, so that a link put in place after the check leads nowhere.
"""

from __future__ import annotations

import asyncio
import base64
import fnmatch
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

READ_MAX_BYTES = 8 * 1024 * 1024
"""One `read` gives at most so much; `more` says that there is more."""
LIST_MAX = 10_000
LOOK_AGAIN_S = 2.0
"""How often a watched folder is read anew, whatever its file system tells of changes (network file systems: nothing)."""


class FileRefused(Exception):
    """A path or an operation this worker does not serve; the text names it and says why."""


class Files:
    """Serves one folder.

    `types` are the endings of the files that exist for callers (all if empty, case does not count); `writable`
    allows `write`, `deletable` allows `delete`. Raises NotADirectoryError if there is no such folder.
    """

    def __init__(
        self, folder: Path, *, types: tuple[str, ...] = (), writable: bool = False, deletable: bool = False
    ) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        self._root = folder.resolve()
        self._types = tuple(kind.lower() if kind.startswith(".") else f".{kind.lower()}" for kind in types)
        self._writable = writable
        self._deletable = deletable

    def list(self, path: str = ".", pattern: str = "*", recursive: bool = False, limit: int = 1000) -> dict[str, Any]:
        """Files and folders at `path` whose names match `pattern`, by name; at most `limit` of them."""
        if not 1 <= limit <= LIST_MAX:
            raise FileRefused(f"limit {limit} is not between 1 and {LIST_MAX}")
        folder = self._resolve(path)
        if not folder.is_dir():
            raise FileRefused(f"{path!r} is no folder")
        entries: list[dict[str, Any]] = []
        more = False
        for entry in self._walk(folder, recursive):
            if not fnmatch.fnmatchcase(entry.name, pattern):
                continue
            if len(entries) >= limit:
                more = True
                break
            entries.append(self._describe(entry))
        return {"entries": entries, "more": more}

    def stat(self, path: str) -> dict[str, Any]:
        """What there is at `path`: its type, size in bytes, time of its last change in Unix seconds."""
        return self._describe(self._existing(path))

    def read(
        self, path: str, offset: int = 0, length: int | None = None, encoding: Literal["base64"] | None = None
    ) -> dict[str, Any]:
        """The contents from `offset`, at most `length` bytes and at most 8 MiB at once; `more` if the file goes on.

        They come as an attachment, or as text with `encoding` "base64".
        """
        if offset < 0 or (length is not None and length < 0):
            raise FileRefused("offset and length count bytes from the start: they are not negative")
        if encoding not in (None, "base64"):
            raise FileRefused(f'encoding {encoding!r} is not known: leave it out, or "base64"')
        with self._open(path, os.O_RDONLY) as descriptor:
            size = os.fstat(descriptor).st_size
            data = _read_range(descriptor, offset, min(READ_MAX_BYTES, size if length is None else length))
        ends_at = offset + len(data)
        wanted = size if length is None else min(size, offset + length)
        return {
            "path": path,
            "size": size,
            "offset": offset,
            "length": len(data),
            "more": ends_at < wanted and len(data) > 0,
            "data": base64.b64encode(data).decode() if encoding else data,
        }

    def newest(self, pattern: str = "*", path: str = ".", recursive: bool = False) -> dict[str, Any] | None:
        """The file that matches `pattern` and was changed last; None if none matches."""
        files = list(self._matching(self._resolve(path), pattern, recursive))
        return self._describe(max(files, key=_modified)) if files else None

    async def watch(
        self,
        pattern: str = "*",
        path: str = ".",
        recursive: bool = False,
        existing: bool = False,
        after: float | None = None,
        minimum_bytes: int | None = None,
        stable_s: float = 0.3,
        timeout: float | None = None,  # noqa: ASYNC109 - what the caller asks, not a way to be cancelled
    ) -> dict[str, Any] | None:
        """Wait for a file that matches `pattern` and is complete, and describe it; None after `timeout` seconds.

        A file counts if it appears or changes after the call, or, with `after`, was changed later than that Unix time,
        or, with `existing`, is there already. It is complete when it has `minimum_bytes`, or, without, when its size
        has stood still for `stable_s` seconds.
        """
        folder = self._resolve(path)
        if not folder.is_dir():
            raise FileRefused(f"{path!r} is no folder")
        known = {} if existing or after is not None else self._marks(folder, pattern, recursive)
        ends_at = None if timeout is None else time.monotonic() + timeout
        sizes: dict[Path, tuple[int, float]] = {}
        async for _ in _ticks(folder, recursive, ends_at):
            if not folder.is_dir():
                raise FileRefused(f"the folder {path!r} has vanished while it was watched")
            for file, mark in self._marks(folder, pattern, recursive).items():
                if known.get(file) == mark or (after is not None and mark[0] / 1e9 <= after):
                    continue
                if _is_complete(file, mark[1], sizes, minimum_bytes, stable_s):
                    return self._describe(file)
        return None

    def write(self, path: str, data: bytes, offset: int | None = None, overwrite: bool = False) -> dict[str, Any]:
        """Write a file: new, whole over an old one with `overwrite`, or a range of it from `offset`."""
        if not self._writable:
            raise FileRefused("this worker does not write; it was started without --allow-write")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise FileRefused("data must be an attachment (bytes)")
        flags = os.O_WRONLY | os.O_CREAT | (0 if overwrite or offset is not None else os.O_EXCL)
        try:
            with self._open(path, flags) as descriptor:
                if offset is None:
                    os.ftruncate(descriptor, 0)
                _write_range(descriptor, offset or 0, memoryview(data))
                size = os.fstat(descriptor).st_size
        except FileExistsError:
            raise FileRefused(f"{path!r} exists; overwrite=true replaces it") from None
        return {"path": path, "size": size, "length": len(data)}

    def delete(self, path: str) -> dict[str, Any]:
        """Remove one file."""
        if not self._deletable:
            raise FileRefused("this worker does not delete; it was started without --allow-delete")
        file = self._existing(path)
        if not stat.S_ISREG(file.lstat().st_mode):
            raise FileRefused(f"{path!r} is no regular file")
        folder = self._descend(file.parent)
        try:
            os.unlink(file.name, dir_fd=folder)
        finally:
            os.close(folder)
        return {"path": path, "deleted": True}

    # ------------------------------------------------------------ confinement

    def _resolve(self, path: str) -> Path:
        """Where a path leads. Raises FileRefused if that is not within the folder."""
        if not isinstance(path, str) or "\0" in path:
            raise FileRefused("path must be text without NUL")
        if path.startswith(("/", "~")):
            raise FileRefused(f"{path!r}: paths are relative to the folder that is served")
        try:
            resolved = (self._root / path).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links
            raise FileRefused(f"{path!r} leads nowhere: {error}") from None
        if resolved != self._root and self._root not in resolved.parents:
            raise FileRefused(f"{path!r} leads out of the folder that is served")
        return resolved

    def _existing(self, path: str) -> Path:
        resolved = self._resolve(path)
        if not resolved.exists() or not self._is_served(resolved):
            raise FileRefused(f"there is no {path!r} here")
        return resolved

    def _is_served(self, file: Path) -> bool:
        return not self._types or file.suffix.lower() in self._types or file.is_dir()

    def _descend(self, folder: Path) -> int:
        """A descriptor of a folder within, opened step by step without following links."""
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        for name in folder.relative_to(self._root).parts:
            try:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    def _open(self, path: str, flags: int) -> _Opened:
        file = self._resolve(path) if flags & os.O_CREAT else self._existing(path)
        if not self._is_served(file):
            raise FileRefused(f"{path!r}: only files of the types {', '.join(self._types)} are served")
        try:
            folder = self._descend(file.parent)
        except OSError as error:
            raise FileRefused(f"{path!r}: {error.strerror}") from None
        try:
            # O_NONBLOCK: opening a pipe nobody writes to would wait for ever; regular files do not mind.
            descriptor = os.open(file.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=folder)
        except FileExistsError:
            raise
        except OSError as error:
            raise FileRefused(f"{path!r}: {error.strerror}") from None
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileRefused(f"{path!r} is no regular file")
        return _Opened(descriptor)

    # ------------------------------------------------------------ walking

    def _walk(self, folder: Path, recursive: bool) -> Iterator[Path]:
        """What is in a folder, by name; links that lead out, and files of other types, do not exist."""
        try:
            names = sorted(os.listdir(folder))  # noqa: PTH208 - names alone, in one call
        except OSError as error:
            raise FileRefused(f"{folder.relative_to(self._root)}: {error.strerror}") from None
        for name in names:
            entry = folder / name
            try:
                if entry.is_symlink():
                    self._resolve(str(entry.relative_to(self._root)))
                if not entry.exists() or not self._is_served(entry):
                    continue
            except (FileRefused, OSError):
                continue
            yield entry
            if recursive and entry.is_dir() and not entry.is_symlink():
                yield from self._walk(entry, recursive)

    def _matching(self, folder: Path, pattern: str, recursive: bool) -> Iterator[Path]:
        for entry in self._walk(folder, recursive):
            if fnmatch.fnmatchcase(entry.name, pattern) and entry.is_file():
                yield entry

    def _marks(self, folder: Path, pattern: str, recursive: bool) -> dict[Path, tuple[int, int]]:
        """For every file that matches: when it was changed (nanoseconds) and its size."""
        marks = {}
        for file in self._matching(folder, pattern, recursive):
            try:
                state = file.stat()
            except OSError:  # gone between
                continue
            marks[file] = state.st_mtime_ns, state.st_size
        return marks

    def _describe(self, entry: Path) -> dict[str, Any]:
        state = entry.stat()
        kind = "folder" if stat.S_ISDIR(state.st_mode) else "file" if stat.S_ISREG(state.st_mode) else "other"
        return {
            "path": str(entry.relative_to(self._root)) if entry != self._root else ".",
            "type": kind,
            "size": state.st_size,
            "modified": state.st_mtime,
        }


class _Opened:
    """An open descriptor for a `with` block."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _modified(file: Path) -> tuple[int, str]:
    """By time, and by name where the clock is too coarse to tell."""
    try:
        return file.stat().st_mtime_ns, file.name
    except OSError:
        return 0, file.name


def _read_range(descriptor: int, offset: int, length: int) -> bytes:
    """As much of a range as there is; a read may give less than asked."""
    pieces: list[bytes] = []
    while length > 0:
        piece = os.pread(descriptor, length, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write_range(descriptor: int, offset: int, data: memoryview) -> None:
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            offset += written
            data = data[written:]
    except OSError as error:
        raise FileRefused(f"not written: {error.strerror}; the file may be incomplete") from None


def _is_complete(
    file: Path, size: int, sizes: dict[Path, tuple[int, float]], minimum_bytes: int | None, stable_s: float
) -> bool:
    """Whether a file is large enough, or has not grown for a while."""
    if minimum_bytes is not None:
        return size >= minimum_bytes
    now = time.monotonic()
    before, since = sizes.get(file, (-1, now))
    if size != before:
        sizes[file] = size, now
        return stable_s <= 0
    return now - since >= stable_s


async def _ticks(folder: Path, recursive: bool, ends_at: float | None) -> AsyncIterator[None]:
    """Yield now, soon after each change below a folder, and every so often, until the time is up."""
    from watchfiles import awatch

    yield
    stop = asyncio.Event()
    changes = awatch(
        folder, recursive=recursive, step=50, debounce=200, rust_timeout=100, yield_on_timeout=True, stop_event=stop
    )
    looked_at = time.monotonic()
    try:
        settling = 5  # rounds of 0.1 s in which a file that changed may come to rest
        async for changed in changes:
            now = time.monotonic()
            if ends_at is not None and now >= ends_at:
                yield
                return
            settling = 20 if changed else settling - 1
            if settling > 0 or now - looked_at >= LOOK_AGAIN_S:
                looked_at = now
                yield
    finally:
        stop.set()
        await changes.aclose()
