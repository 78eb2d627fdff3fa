"""A worker's view of one folder: list, stat, read, newest, watch, and write and delete where allowed.

Every path is relative to the folder and confined to it by what it resolves to (`Confined`): symbolic links may point
anywhere within, `..` may pass through, and whatever ends outside is refused.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import fnmatch
import math
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from broker.worker.changes import Changes
from broker.worker.confined import Confined, Entry, FileChanged, FileRefused, Look, Parts, refusal, show
from broker.worker.requests import NoRequest, Request, current
from broker.worker.uploads import PART, Upload, check_regular, remove_left_overs

__all__ = ["FileChanged", "FileRefused", "Files"]

READ_MAX_BYTES = 8 * 1024 * 1024
"""One `read` that does not stream gives at most so much; `more` says that there is more."""
PIECE_BYTES = 252 * 1024
"""read at a time: whole pages, and with its JSON text one part, which is at most 256 KiB"""
LIST_MAX = 10_000
LIST_MAX_BYTES = 4 << 20
"""names in one listing; with what is said about each it stays below the bound of a message"""
PATTERN_MAX = 1000
STABLE_S = 0.3
LOOK_SOON_S = 0.2
LOOK_AGAIN_S = 2.0
"""How often a watched folder is read anew, whatever its file system tells of changes (those on a network: nothing)."""

_CURSOR = re.compile(r"(-?[0-9]{1,20}):(.*)", re.DOTALL)

Mark = tuple[int, int]


class Files:
    """Serves one folder.

    `types` are the endings of the files that exist for callers, such as `.dcm` or `.nii.gz` (all if empty; case does
    not count); `writable` allows `write`, `deletable` allows `delete`; a worker serves and describes only what is
    allowed. Raises NotADirectoryError if there is no such folder, ValueError for `/`, `/proc`, `/sys` and `/dev`.
    """

    def __init__(
        self, folder: Path, *, types: tuple[str, ...] = (), writable: bool = False, deletable: bool = False
    ) -> None:
        self._place = Confined(folder)
        self._types = tuple(kind.lower() if kind.startswith(".") else f".{kind.lower()}" for kind in types)
        self._writable = writable
        self._deletable = deletable
        self._changes = Changes()
        if writable:
            with self._place.folder(()) as root:
                remove_left_overs(root)

    def __dir__(self) -> Iterator[str]:
        """What there is, without what is not allowed: this is what `Worker.add_object` goes by."""
        allowed = {"write": self._writable, "delete": self._deletable}
        return (name for name in super().__dir__() if allowed.get(name, True))

    def list(
        self, path: str = ".", pattern: str = "*", recursive: bool = False, limit: int = 1000, after: str | None = None
    ) -> dict[str, Any]:
        """What is at `path` and matches `pattern`, by name; at most `limit` entries, from behind the path `after`.

        `pattern` knows `*`, `?` and `[…]`, and is compared with the name, not the path. `more` says that the listing
        goes on; `after` with the path of its last entry gives what follows.
        """
        limit = _whole(limit, "limit", 1, LIST_MAX)
        parts, matches = self._folder_at(path), _matcher(pattern)
        behind = () if after is None else tuple(_text(after, "after").split("/"))
        look = _look()
        entries: list[dict[str, Any]] = []
        size, more = 0, False
        for entry in self._walk(parts, recursive, look, path):
            if entry.parts <= behind or not matches(entry.parts[-1]):
                continue
            if len(entries) >= limit or size > LIST_MAX_BYTES:
                more = True
                break
            entries.append(_describe(entry.parts, entry.state))
            size += 100 + 6 * len(entries[-1]["path"])  # what JSON may need for it
        told: dict[str, Any] = {"entries": entries, "more": more}
        if look.unnameable:
            told["unnameable"] = look.unnameable
        return told

    def stat(self, path: str) -> dict[str, Any]:
        """What there is at `path`: its type, size in bytes, time of its last change in Unix seconds, and version."""
        parts, state = self._existing(path)
        return _describe(parts, state)

    def read(
        self, path: str, offset: int = 0, length: int | None = None, encoding: Literal["base64"] | None = None,
        version: str | None = None, stream: bool = False,
    ) -> dict[str, Any] | Generator[bytes, None, dict[str, Any]]:  # fmt: skip
        """The contents from `offset`, at most `length` bytes; with `stream` however much, else at most 8 MiB at once.

        With `stream` they come as parts of bytes, and the reply says the rest, with their CRC-32. Without, they are in
        the reply as `data`, an attachment, or text with `encoding` "base64"; `more` says that the file goes on. With
        the `version` of an earlier reply it is an error if the file has changed since; among several workers, that
        needs copies with equal times.
        """
        offset = _whole(offset, "offset", 0)
        if length is not None:
            length = _whole(length, "length", 0)
        if encoding not in (None, "base64"):
            raise FileRefused(f'encoding {show(encoding)} is not known: leave it out, or "base64"')
        if stream and encoding:
            raise FileRefused("a stream is of bytes; leave out encoding, or stream")
        parts, _ = self._existing(path)
        if stream:
            return self._read_on(parts, path, offset, length, version)
        with self._open(parts, path) as descriptor:
            try:
                before = os.fstat(descriptor)
                ends_at = before.st_size if length is None else min(before.st_size, offset + length)
                data = _read_range(descriptor, offset, min(READ_MAX_BYTES, ends_at - offset))
                state = os.fstat(descriptor)
            except OSError as error:
                raise refusal(path, error) from None
        if version is not None and not version == _version(before) == _version(state):
            raise _changed_since(path, version)
        more = 0 < len(data) < ends_at - offset
        told = _describe_range(path, before, offset, len(data), more)
        return told | {"data": base64.b64encode(data).decode() if encoding else data}

    def _read_on(
        self, parts: Parts, path: str, offset: int, length: int | None, version: str | None
    ) -> Generator[bytes, None, dict[str, Any]]:
        """A range piece by piece, each read when the caller takes it; raises FileChanged as soon as that shows."""
        request = _request()
        with self._open(parts, path) as descriptor:
            before = os.fstat(descriptor)
            if version is not None and version != _version(before):
                raise _changed_since(path, version)
            ends_at = before.st_size if length is None else min(before.st_size, offset + length)
            position, crc = offset, 0
            while position < ends_at:
                try:
                    piece = _read_range(descriptor, position, min(PIECE_BYTES, ends_at - position))
                    state = os.fstat(descriptor)
                except OSError as error:
                    raise refusal(path, error) from None
                if _version(state) != _version(before) or not piece:
                    raise FileChanged(f"{show(path)} changed while it was read; read it anew")
                position += len(piece)
                crc = zlib.crc32(piece, crc)
                if request is not None:
                    request.progress(position - offset, ends_at - offset, "bytes")
                yield piece
        return _describe_range(path, before, offset, position - offset, False) | {"crc32": crc}

    def newest(self, pattern: str = "*", path: str = ".", recursive: bool = False) -> dict[str, Any] | None:
        """The file that matches `pattern` and was changed last; None if none matches."""
        files = self._matching(self._folder_at(path), _matcher(pattern), recursive, _look(), path)
        newest = max(files, key=lambda entry: (entry.state.st_mtime_ns, entry.parts), default=None)
        return None if newest is None else _describe(newest.parts, newest.state)

    async def watch(
        self,
        pattern: str = "*",
        path: str = ".",
        recursive: bool = False,
        existing: bool = False,
        after: float | str | None = None,
        minimum_bytes: int | None = None,
        stable_s: float = STABLE_S,
        timeout: float | None = None,  # noqa: ASYNC109 - what the caller asks, not a way to be cancelled
    ) -> dict[str, Any] | None:
        """Wait for a file that matches `pattern` and is complete, and describe it; None after `timeout` seconds.

        A file counts if it appears or changes after the call, or, with `existing`, is there already, or, with
        `after`, was changed later than that Unix time. It is complete when it has `minimum_bytes`, or, without, when
        it is not empty and has not changed for `stable_s` seconds. Of several the one changed first is told. Giving
        the `cursor` of one answer as `after` of the next call tells all files one by one.
        """
        parts, matches, after_mark = self._folder_at(path), _matcher(pattern), _after(after)
        stable_s = _seconds(stable_s, "stable_s")
        if minimum_bytes is not None:
            minimum_bytes = _whole(minimum_bytes, "minimum_bytes", 0)
        ends_at = math.inf if timeout is None else time.monotonic() + _seconds(timeout, "timeout")
        seen: dict[Parts, tuple[Mark, float]] = {}
        known: dict[Parts, Mark] | None = {} if existing or after is not None else None
        look = _look()
        pause = LOOK_SOON_S
        try:
            with self._changes.listen(self._place.root.joinpath(*parts), recursive) as changed:
                while True:
                    changed.clear()
                    began = time.monotonic()
                    look.names = 0
                    found = await asyncio.to_thread(self._files_now, parts, matches, recursive, look, path)
                    now = time.monotonic()
                    if known is None:
                        known = {entry.parts: _mark(entry.state) for entry in found}
                    candidates = [entry for entry in found if _counts(entry, known, after_mark)]
                    settles_s = LOOK_AGAIN_S
                    for entry in sorted(candidates, key=lambda entry: (entry.state.st_mtime_ns, entry.parts)):
                        left_s = _settles_in(entry, seen, minimum_bytes, stable_s, now)
                        if left_s <= 0:
                            return _describe(entry.parts, entry.state) | {"cursor": _cursor(entry)}
                        settles_s = min(settles_s, left_s)
                    if now >= ends_at:
                        return None
                    # A folder of many files, or on a slow disk, is read at most half of the time.
                    await asyncio.sleep(min(now - began, ends_at - now))
                    wait_s = min(pause, settles_s, ends_at - now)
                    try:
                        async with asyncio.timeout(wait_s):
                            await changed.wait()
                        pause = LOOK_SOON_S
                    except TimeoutError:
                        pause = min(2 * pause, LOOK_AGAIN_S)
        finally:
            look.stopped = True  # a thread that still reads the folder ends too

    def write(
        self, path: str, data: bytes | None = None, overwrite: bool = False, size: int | None = None
    ) -> dict[str, Any]:
        """Write a file: a new one, or with `overwrite` in place of an old one. It appears when it is whole.

        The contents are `data`, or, without, the parts that the caller sends, each of bytes: a file of any size. With
        `size` it is refused unless they are so many bytes. The reply has their CRC-32.
        """
        if not self._writable:
            raise FileRefused("this worker does not write; it was started without --allow-write")
        if size is not None:
            size = _whole(size, "size", 0)
        pieces = _given(data)
        parts = self._place.resolve(path)
        if not parts:
            raise FileRefused(f"{show(path)} is a folder")
        if not self._is_served(parts):
            kinds = f"of the types {', '.join(self._types)}" if self._types else "of other names"
            raise FileRefused(f"{show(path)}: only files {kinds} are served")
        try:
            with self._place.folder(parts[:-1]) as folder, Upload(folder, parts[-1], path, overwrite) as upload:
                _fill(upload, pieces, size)
                upload.publish()
        except OSError as error:
            raise refusal(path, error) from None
        return {"path": path, "size": upload.size, "length": upload.size, "written": True, "crc32": upload.crc32}

    def delete(self, path: str) -> dict[str, Any]:
        """Remove one file; of a link only the link."""
        if not self._deletable:
            raise FileRefused("this worker does not delete; it was started without --allow-delete")
        parts = self._named(path)
        try:
            with self._place.folder(parts[:-1]) as folder:
                kind = stat.S_IFMT(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode)
                if kind not in (stat.S_IFREG, stat.S_IFLNK):
                    raise FileRefused(f"{show(path)} is no regular file")
                os.unlink(parts[-1], dir_fd=folder)
        except OSError as error:
            raise refusal(path, error) from None
        return {"path": path, "deleted": True}

    # ------------------------------------------------------------ finding

    def _existing(self, path: str) -> tuple[Parts, os.stat_result]:
        """Where a path leads, if there is something that is served."""
        parts = self._place.resolve(path)
        try:
            state = self._place.state(parts)
        except OSError as error:
            raise refusal(path, error) from None
        if stat.S_ISLNK(state.st_mode) or not (stat.S_ISDIR(state.st_mode) or self._is_served(parts)):
            raise FileRefused(f"there is no {show(path)} here")
        return parts, state

    def _folder_at(self, path: str) -> Parts:
        parts, state = self._existing(path)
        if not stat.S_ISDIR(state.st_mode):
            raise FileRefused(f"{show(path)} is no folder")
        return parts

    def _named(self, path: str) -> Parts:
        """The path itself where its last name is a link, which need not lead anywhere."""
        target = self._place.resolve(path)
        above, _, name = path.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            raise FileRefused(f"{show(path)} is no regular file")
        parts = (*self._place.resolve(above or "."), name)
        if not (self._is_served(parts) and self._is_served(target)):
            raise FileRefused(f"there is no {show(path)} here")
        return parts

    def _is_served(self, parts: Parts) -> bool:
        name = parts[-1].lower() if parts else ""
        return not PART.fullmatch(name) and (not self._types or name.endswith(self._types))

    @contextmanager
    def _open(self, parts: Parts, path: str) -> Iterator[int]:
        """A descriptor of a regular file, to read."""
        if not parts:
            raise FileRefused(f"{show(path)} is no regular file")
        try:
            with self._place.folder(parts[:-1]) as folder:
                # Looked at before: opening some devices does something. O_NONBLOCK: opening a pipe that has come in
                # between would wait for ever.
                check_regular(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False), path)
                descriptor = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise refusal(path, error) from None
        try:
            check_regular(os.fstat(descriptor), path)
            yield descriptor
        finally:
            os.close(descriptor)

    def _walk(self, parts: Parts, recursive: bool, look: Look, path: str) -> Iterator[Entry]:
        """What is in a folder; files that are not served do not exist."""
        try:
            for entry in self._place.walk(parts, recursive, look):
                served = self._is_served(entry.parts) and self._is_served(entry.target)
                if served or stat.S_ISDIR(entry.state.st_mode):
                    yield entry
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise FileRefused(f"the folder {show(path)} has vanished") from None
            raise refusal(path, error) from None

    def _matching(
        self, parts: Parts, matches: Callable[[str], object], recursive: bool, look: Look, path: str
    ) -> Iterator[Entry]:
        for entry in self._walk(parts, recursive, look, path):
            if matches(entry.parts[-1]) and stat.S_ISREG(entry.state.st_mode):
                yield entry

    def _files_now(self, *arguments: Any) -> tuple[Entry, ...]:
        return tuple(self._matching(*arguments))


# ---------------------------------------------------------------- what callers give


def _look() -> Look:
    """A walk that ends when the request it answers, if any, is cancelled."""
    request = _request()
    return Look() if request is None else _RequestLook(request)


def _request() -> Request | None:
    """The request that is answered, if any: files may be looked at without one."""
    try:
        return current()
    except NoRequest:
        return None


class _RequestLook(Look):
    """The account of a walk that answers a request."""

    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request

    def check(self) -> None:
        """Raises FileRefused when nobody waits any more."""
        self.stopped = self.stopped or self._request.cancelled
        super().check()


def _whole(value: Any, name: str, least: int, most: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FileRefused(f"{name} {value!r:.40} is not a whole number from {least} to {most}")
    return value


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise FileRefused(f"{name} {value!r:.40} is not a number of seconds, at least 0")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FileRefused(f"{name} {value!r:.40} is no text")
    return value


def _matcher(pattern: str) -> Callable[[str], object]:
    if len(_text(pattern, "pattern")) > PATTERN_MAX:
        raise FileRefused(f"pattern has {len(pattern)} letters, more than {PATTERN_MAX}")
    if "/" in pattern:
        raise FileRefused(f"pattern {show(pattern)} is compared with names, not paths; give the folder as path")
    return re.compile(fnmatch.translate(pattern)).match


def _after(value: Any) -> tuple[float, int, Parts] | None:
    """From where on files count: a time, or exactly what a cursor says."""
    if value is None:
        return None
    if isinstance(value, str):
        match = _CURSOR.fullmatch(value)
        if match is None:
            raise FileRefused(f"after {show(value)} is neither a Unix time nor the cursor of an answer")
        return -math.inf, int(match[1]), tuple(match[2].split("/"))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FileRefused(f"after {value!r:.40} is neither a Unix time nor the cursor of an answer")
    return float(value), 0, ()


# ---------------------------------------------------------------- what files are


def _describe(parts: Parts, state: os.stat_result) -> dict[str, Any]:
    kind = "folder" if stat.S_ISDIR(state.st_mode) else "file" if stat.S_ISREG(state.st_mode) else "other"
    return {
        "path": "/".join(parts) or ".",
        "type": kind,
        "size": state.st_size,
        "modified": state.st_mtime,
        "version": _version(state),
    }


def _describe_range(path: str, state: os.stat_result, offset: int, length: int, more: bool) -> dict[str, Any]:
    return {
        "path": path, "size": state.st_size, "offset": offset, "length": length, "more": more,
        "version": _version(state),
    }  # fmt: skip


def _changed_since(path: str, version: str) -> FileChanged:
    return FileChanged(f"{show(path)} has changed since its version {show(version)}; read it anew")


def _version(state: os.stat_result) -> str:
    """Differs when the contents do: of time and size only, so that equal copies on several machines agree."""
    return f"{state.st_mtime_ns:x}-{state.st_size:x}"


def _mark(state: os.stat_result) -> Mark:
    return state.st_mtime_ns, state.st_size


def _cursor(entry: Entry) -> str:
    return f"{entry.state.st_mtime_ns}:{'/'.join(entry.parts)}"


def _counts(entry: Entry, known: dict[Parts, Mark], after: tuple[float, int, Parts] | None) -> bool:
    if known.get(entry.parts) == _mark(entry.state):
        return False
    if after is None:
        return True
    time_s, mtime_ns, parts = after
    if parts:
        return (entry.state.st_mtime_ns, entry.parts) > (mtime_ns, parts)
    return entry.state.st_mtime > time_s  # the very number `modified` tells


def _settles_in(
    entry: Entry, seen: dict[Parts, tuple[Mark, float]], minimum_bytes: int | None, stable_s: float, now: float
) -> float:
    """In how many seconds a file will be complete if it does not change; 0 if it is."""
    mark = _mark(entry.state)
    if minimum_bytes is not None:
        return 0.0 if mark[1] >= minimum_bytes else math.inf
    before, since = seen.get(entry.parts, (None, now))
    if mark != before:
        seen[entry.parts] = mark, now
        since = now
    if mark[1] == 0:
        return math.inf  # made, and not written yet
    return max(0.0, stable_s - (now - since))


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


# ---------------------------------------------------------------- writing


def _given(data: Any) -> Iterable[Any]:
    """What a file is to hold, piece by piece."""
    if data is not None:
        return (data,)
    request = _request()
    if request is None or not request.has_parts:
        raise FileRefused('data is missing: bytes (an attachment, or {"$base64": "…"}), or parts of a stream')
    return request.parts()


def _fill(upload: Upload, pieces: Iterable[Any], size: int | None) -> None:
    """Take all that is given. Raises FileRefused if it is no bytes, or not as much as was said."""
    request = _request()
    for piece in pieces:
        if not isinstance(piece, (bytes, bytearray, memoryview)):
            kind = type(piece).__name__
            raise FileRefused(f'data must be bytes (an attachment, or {{"$base64": "…"}}), not of type {kind}')
        upload.append(memoryview(piece).cast("B") if memoryview(piece).nbytes else memoryview(b""))
        if size is not None and upload.size > size:
            raise FileRefused(f"{show(upload.path)}: more than the {size} bytes came that were announced")
        if request is not None:
            request.progress(upload.size, size, "bytes")
    if size is not None and upload.size != size:
        raise FileRefused(f"{show(upload.path)}: {upload.size} bytes came of the {size} that were announced")
