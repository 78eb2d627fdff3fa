"""A file that is being written: under a name of its own until it is whole, and gone with whoever does not finish it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
import zlib
from types import TracebackType
from typing import Self

from broker.worker.confined import FileRefused, show

PART = re.compile(r"\.broker-[A-Za-z0-9]{1,64}\.part")
"""the names of files that are not whole; they are neither shown nor served"""
SYNC_BYTES = 64 << 20
"""written to disk every so many bytes: what waits in memory stays bounded, and the last wait is short"""
YOUNG_S = 60.0
"""a part younger than this is not looked at: between its making and its lock it looks like one left over"""
LEFT_OVER_S = 86_400.0
"""where files cannot be locked, a part that has not grown for so long is left over"""


class Upload:
    """Writes one file in a folder (a descriptor); `with` removes what `publish` has not given its name.

    `path` is what its caller calls it. A lock is held on what is written, by which others see that somebody is at it.
    Raises FileRefused if something is there that stays, or the disk is full; OSError if the folder may not be written.
    """

    __slots__ = (
        "_descriptor", "_folder", "_is_published", "_name", "_overwrite", "_part", "_synced", "crc32", "path", "size",
    )  # fmt: skip

    def __init__(self, folder: int, name: str, path: str, overwrite: bool) -> None:
        self._folder = folder
        self._name = name
        self._overwrite = overwrite
        self._part = f".broker-{secrets.token_hex(8)}.part"
        self._is_published = False
        self._synced = 0
        self.path = path
        self.size = 0
        """bytes so far"""
        self.crc32 = 0
        """of these bytes"""
        mode = _check_target(folder, name, path, overwrite)
        remove_left_overs(folder)
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(self._part, flags, mode, dir_fd=folder)
        _lock(self._descriptor)

    def append(self, data: memoryview) -> None:
        """Put bytes behind what has come."""
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            while data:
                written = os.pwrite(self._descriptor, data, self.size)
                self.size += written
                data = data[written:]
            if self.size - self._synced >= SYNC_BYTES:
                self._sync()
        except OSError as error:
            raise self._not_written(error) from None

    def publish(self) -> None:
        """Give what is whole its name, at once. Raises FileRefused if somebody else took it meanwhile."""
        try:
            self._sync()  # some file systems tell only now that they are full
            if self._overwrite or not self._linked():
                os.rename(self._part, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except FileExistsError:
            raise _exists(self.path) from None
        except OSError as error:
            raise self._not_written(error) from None
        self._is_published = True

    def _linked(self) -> bool:
        """Whether it has its name, if that was free; where there are no hard links, the name is only kept for it."""
        try:
            os.link(self._part, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=False)
        except FileExistsError:
            raise
        except (OSError, NotImplementedError):
            os.close(os.open(self._name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=self._folder))
            return False
        os.unlink(self._part, dir_fd=self._folder)
        return True

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        self._synced = self.size

    def _not_written(self, error: OSError) -> FileRefused:
        return FileRefused(f"{show(self.path)} is not written: {error.strerror}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_published:
            _unlink(self._folder, self._part)  # before the lock goes, and above all on a full disk
        os.close(self._descriptor)


def remove_left_overs(folder: int) -> None:
    """Remove what uploads have left whose process was killed: the parts that nobody has locked."""
    try:
        with os.scandir(folder) as entries:
            parts = [entry.name for entry in entries if PART.fullmatch(entry.name)]
    except OSError:
        return  # a folder that may be written and not listed
    for name in parts:
        if _is_left_over(folder, name):
            _unlink(folder, name)


def _is_left_over(folder: int, name: str) -> bool:
    try:
        # Those who lock over a network want a descriptor that may write.
        descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return False
    try:
        state = os.fstat(descriptor)
        age_s = time.time() - state.st_mtime
        if not stat.S_ISREG(state.st_mode) or age_s < YOUNG_S:
            return False
        return _lock(descriptor, else_free=age_s > LEFT_OVER_S)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, else_free: bool = False) -> bool:
    """Whether nobody else had it locked; `else_free` where files cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return else_free and error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _check_target(folder: int, name: str, path: str, overwrite: bool) -> int:
    """The mode for what is written. Raises FileRefused if something is there that stays."""
    try:
        state = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return 0o644
    check_regular(state, path)
    if not overwrite:
        raise _exists(path)
    return stat.S_IMODE(state.st_mode) & 0o777


def check_regular(state: os.stat_result, path: str) -> None:
    """Raises FileRefused for what is no regular file."""
    if not stat.S_ISREG(state.st_mode):
        raise FileRefused(f"{show(path)} is no regular file")


def _exists(path: str) -> FileRefused:
    return FileRefused(f"{show(path)} exists; overwrite=true replaces it")


def _unlink(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        pass
