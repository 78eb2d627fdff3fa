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
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from broker.worker.changes import Changes
from broker.worker.confined import Confined, Entry, FileChanged, FileRefused, Look, Parts, refusal, show
from broker.worker.requests import NoRequest, current

__all__ = ["FileChanged", "FileRefused", "Files"]

READ_MAX_BYTES = 8 * 1024 * 1024
"""One `read` gives at most so much; `more` says that there is more."""
LIST_MAX = 10_000
LIST_MAX_BYTES = 4 << 20
"""names in one listing; with what is said about each it stays below the bound of a message"""
PATTERN_MAX = 1000
STABLE_S = 0.3
LOOK_SOON_S = 0.2
LOOK_AGAIN_S = 2.0
"""How often a watched folder is read anew, whatever its file system tells of changes (those on a network: nothing)."""
LEFT_OVER_S = 86_400.0
"""An upload that nobody went on with for so long is removed when the next one begins in its folder."""

_PART = re.compile(r"\.broker-[A-Za-z0-9]{1,64}\.part")
_UPLOAD = re.compile(r"[A-Za-z0-9]{8,64}")
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
        version: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The contents from `offset`, at most `length` bytes and at most 8 MiB at once; `more` if the file goes on.

        They come as an attachment, or as text with `encoding` "base64". With the `version` of an earlier reply it is
        an error if the file has changed since; among several workers, that needs copies with equal times.
        """
        offset = _whole(offset, "offset", 0)
        if length is not None:
            length = _whole(length, "length", 0)
        if encoding not in (None, "base64"):
            raise FileRefused(f'encoding {show(encoding)} is not known: leave it out, or "base64"')
        parts, _ = self._existing(path)
        descriptor = self._open(parts, path)
        try:
            before = os.fstat(descriptor)
            ends_at = before.st_size if length is None else min(before.st_size, offset + length)
            data = _read_range(descriptor, offset, min(READ_MAX_BYTES, ends_at - offset))
            state = os.fstat(descriptor)
        except OSError as error:
            raise refusal(path, error) from None
        finally:
            os.close(descriptor)
        if version is not None and not version == _version(before) == _version(state):
            raise FileChanged(f"{show(path)} has changed since its version {show(version)}; read it anew")
        return {
            "path": path,
            "size": before.st_size,
            "offset": offset,
            "length": len(data),
            "more": 0 < len(data) < ends_at - offset,
            "version": _version(before),
            "data": base64.b64encode(data).decode() if encoding else data,
        }

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
        self, path: str, data: bytes, overwrite: bool = False, upload: str | None = None, offset: int = 0,
        last: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Write a file: a new one, or with `overwrite` in place of an old one. It appears when it is whole.

        A file larger than a message comes in pieces: each with the same `upload`, 8 to 64 letters and digits by
        chance, with the `offset` where it belongs, which is the end of the one before, and `last` false but for the
        last. Pieces that stop coming are removed after a day.
        """
        if not self._writable:
            raise FileRefused("this worker does not write; it was started without --allow-write")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise FileRefused('data must be bytes: an attachment, or {"$base64": "…"}')
        offset = _whole(offset, "offset", 0)
        if upload is None and (offset or not last):
            raise FileRefused("a file in pieces needs upload: letters and digits by chance, the same for all of them")
        if upload is not None and not _UPLOAD.fullmatch(_text(upload, "upload")):
            raise FileRefused(f"upload {show(upload)} is not 8 to 64 letters and digits")
        parts = self._place.resolve(path)
        if not parts:
            raise FileRefused(f"{show(path)} is a folder")
        if not self._is_served(parts):
            kinds = f"of the types {', '.join(self._types)}" if self._types else "of other names"
            raise FileRefused(f"{show(path)}: only files {kinds} are served")
        try:
            with self._place.folder(parts[:-1]) as folder:
                return self._write(folder, parts[-1], path, memoryview(data), overwrite, upload, offset, last)
        except OSError as error:
            raise refusal(path, error) from None

    def _write(
        self, folder: int, name: str, path: str, data: memoryview, overwrite: bool, upload: str | None, offset: int,
        last: bool,
    ) -> dict[str, Any]:  # fmt: skip
        mode = _check_target(folder, name, path, overwrite)
        part = f".broker-{upload or secrets.token_hex(8)}.part"
        if offset == 0 and upload is not None:
            _remove_left_overs(folder)
        size = offset + data.nbytes
        try:
            _append(folder, part, path, data, offset, mode, last)
            if last:
                _publish(folder, part, name, path, overwrite)
        except FileRefused:
            if upload is None or last:
                _unlink(folder, part)
            raise
        return {"path": path, "size": size, "length": data.nbytes, "written": last}

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
        return not _PART.fullmatch(name) and (not self._types or name.endswith(self._types))

    def _open(self, parts: Parts, path: str) -> int:
        """A descriptor of a regular file, to read."""
        if not parts:
            raise FileRefused(f"{show(path)} is no regular file")
        try:
            with self._place.folder(parts[:-1]) as folder:
                # Looked at before: opening some devices does something. O_NONBLOCK: opening a pipe that has come in
                # between would wait for ever.
                _check_regular(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False), path)
                descriptor = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise refusal(path, error) from None
        try:
            _check_regular(os.fstat(descriptor), path)
        except FileRefused:
            os.close(descriptor)
            raise
        return descriptor

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
    look = Look()
    try:
        request = current()
    except NoRequest:
        return look
    return _RequestLook(request)


class _RequestLook(Look):
    """The account of a walk that answers a request."""

    __slots__ = ("_request",)

    def __init__(self, request: Any) -> None:
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


def _check_regular(state: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise FileRefused(f"{show(path)} is no regular file")


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


def _check_target(folder: int, name: str, path: str, overwrite: bool) -> int:
    """The mode for what is written. Raises FileRefused if something is there that stays."""
    try:
        state = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return 0o644
    _check_regular(state, path)
    if not overwrite:
        raise _exists(path)
    return stat.S_IMODE(state.st_mode) & 0o777


def _exists(path: str) -> FileRefused:
    return FileRefused(f"{show(path)} exists; overwrite=true replaces it")


def _append(folder: int, part: str, path: str, data: memoryview, offset: int, mode: int, last: bool) -> None:
    """Put a piece behind what has come of a file. Raises FileRefused if it does not fit there, or the disk is full."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if offset == 0 else 0)
    try:
        descriptor = os.open(part, flags, mode, dir_fd=folder)
    except FileExistsError:
        raise FileRefused(f"{show(path)}: this upload has begun already; begin another") from None
    except FileNotFoundError:
        raise FileRefused(f"{show(path)}: this upload has not begun here, or was given up; begin another") from None
    try:
        there = os.fstat(descriptor).st_size
        if there != offset:
            raise FileRefused(f"{show(path)}: {there} bytes have come, so offset {offset} does not follow")
        _write_range(descriptor, offset, data)
        if last:
            os.fsync(descriptor)  # some file systems tell only now that they are full
    except OSError as error:
        _unlink(folder, part)  # above all on a full disk
        raise FileRefused(f"{show(path)} is not written: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _write_range(descriptor: int, offset: int, data: memoryview) -> None:
    data = data.cast("B") if data.nbytes else data
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset += written
        data = data[written:]


def _publish(folder: int, part: str, name: str, path: str, overwrite: bool) -> None:
    """Give what is whole its name, at once. Raises FileRefused if somebody else took it meanwhile."""
    try:
        if not overwrite:
            try:
                os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                raise _exists(path) from None
            except (OSError, NotImplementedError):  # no hard links there: keep the name before it is replaced
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=folder))
            else:
                os.unlink(part, dir_fd=folder)
                return
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise FileRefused(f"{show(path)} is not written: {error.strerror}") from None


def _unlink(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        pass


def _remove_left_overs(folder: int) -> None:
    """What uploads that were given up long ago have left."""
    now = time.time()
    with os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name) and now - entry.stat(follow_symlinks=False).st_mtime > LEFT_OVER_S:
                _unlink(folder, entry.name)
