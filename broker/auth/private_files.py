"""Files that only their owner may read: where they lie, how they are replaced whole, and whom to believe."""

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

LOCK_TIMEOUT_S = 5.0

Fingerprint = tuple[int, int, int, int]
"""What differs whenever a file was replaced or written to."""


def fingerprint_of(path: Path) -> Fingerprint | None:
    """The file's present one; None if there is no file. Raises OSError."""
    try:
        return _fingerprint(path.stat())
    except FileNotFoundError:
        return None


def _fingerprint(state: os.stat_result) -> Fingerprint:
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def read_whole(path: Path, size_max: int, *, secret: bool = False) -> tuple[Fingerprint, bytes] | None:
    """A file's state and contents as `read_checked` has them; None if there is none. Raises as `read_checked`."""
    try:
        # Links are followed: secrets are often mounted as such, and the file's owner and mode are checked.
        # NONBLOCK: a FIFO of this name must not hold the daemon.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        state = os.fstat(descriptor)
        return _fingerprint(state), read_checked(descriptor, path, size_max, secret=secret)
    finally:
        os.close(descriptor)


def make_private_folder(folder: Path) -> None:
    """See that a folder exists, is the caller's own, no link, and closed to others (0700).

    Raises PermissionError naming the folder when it is somebody else's, OSError when it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is not a folder of your own (owner uid {state.st_uid})")
    if state.st_mode & 0o077:
        folder.chmod(0o700)


def read_checked(descriptor: int, path: Path, size_max: int, *, secret: bool = False) -> bytes:
    """The contents of an open regular file that nobody but its reader or root could have written.

    Raises PermissionError naming the file when others own it or may write to it (`secret`: or may read it),
    ValueError when it is no regular file or has more than `size_max` bytes.
    """
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path} is no regular file")
    if state.st_uid not in {os.geteuid(), 0} or state.st_mode & 0o022:
        raise PermissionError(f"{path} could have been written by others (uid {state.st_uid}); chmod 600 it")
    if secret and state.st_mode & 0o077:
        raise PermissionError(f"{path} can be read by others (mode {state.st_mode & 0o777:o}); chmod 600 it")
    if state.st_size > size_max:
        raise ValueError(f"{path} has {state.st_size} bytes, more than {size_max}")
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(size_max)


def replace_file(path: Path, data: bytes, prepare: Callable[[int], None] = lambda _: None) -> int:
    """Put `data` in place of the file at once (0600; readers see the old or the new whole) and durably.

    `prepare` is called with the new file's descriptor before it takes its name. Returns the descriptor, which
    the caller closes. Raises OSError; the old file then stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # of the temporary one nobody has heard
    try:
        os.fchmod(descriptor, 0o600)
        prepare(descriptor)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        temporary.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        raise
    return descriptor


class HeldFile:
    """A private file of a running process, from `hold` to `remove`.

    It stays locked while the process lives, and the system takes the lock away with the process: so a file left by a
    killed one is known for stale.
    """

    __slots__ = ("_descriptor", "path")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def hold(cls, path: Path, data: bytes) -> Self:
        """Put it there as `replace_file` does, over one of another process too. Raises OSError."""
        return cls(path, replace_file(path, data, prepare=_hold))

    def remove(self) -> None:
        """Remove the file, unless a later process has put its own there. Harmless when repeated."""
        if self._descriptor < 0:
            return
        try:
            if os.path.samestat(self.path.lstat(), os.fstat(self._descriptor)):
                self.path.unlink()
        except OSError:
            pass  # gone already, with its folder perhaps: unlocking makes it stale anyway
        finally:
            os.close(self._descriptor)
            self._descriptor = -1


def _hold(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(descriptor: int) -> bool:
    """Whether an open file is a HeldFile of a process that lives, this one included."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _sync_folder(folder: Path) -> None:
    # Without it a power cut may bring back the old name's contents, say a revoked token.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems cannot; the file has been replaced by now
    finally:
        os.close(descriptor)


def give_to_folder_owner(descriptor: int, folder: Path) -> None:
    """When root writes into a service's folder, the file becomes the service's, or it could not read it."""
    if os.geteuid() == 0:
        state = folder.stat()
        os.fchown(descriptor, state.st_uid, state.st_gid)


@contextmanager
def locked(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock beside a file against other writers, threads of this process included.

    Raises TimeoutError naming the lock after `timeout_s` seconds, OSError when it cannot be made.
    """
    # A file beside it, because the file itself is replaced; kept, because removing it would race.
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        state = os.fstat(descriptor)
        if state.st_uid == os.geteuid() and state.st_nlink == 1 and state.st_size == 0:
            give_to_folder_owner(descriptor, path.parent)
        _wait_for_lock(descriptor, lock, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, lock: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{lock} is held by another process for {timeout_s:g} s") from None
            time.sleep(0.02)
        else:
            return
