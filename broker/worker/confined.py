"""One folder and nothing beside it: paths are resolved within, and opened step by step without following links."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from broker.worker.faults import Fault

LOOK_MAX = 1_000_000
"""names that one request may look at"""
DEPTH_MAX = 64
"""folders below each other that a recursive walk enters; more is refused"""

Parts = tuple[str, ...]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class FileRefused(Fault):
    """A path or an operation this worker does not serve; the text names it and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message, data={"type": type(self).__name__, "message": message})


class FileChanged(FileRefused):
    """A file is no longer the one of which the first ranges were read."""


class Entry(NamedTuple):
    """Something found in a walk: where it stands, where it leads if it is a link, and what is there."""

    parts: Parts
    target: Parts
    state: os.stat_result


class Look:
    """One walk's account: whether somebody still waits for it, and what it passed over."""

    __slots__ = ("names", "stopped", "unnameable")

    def __init__(self) -> None:
        self.names = 0
        self.stopped = False
        self.unnameable = 0
        """entries whose names are no Unicode; no message can name them"""

    def count(self, names: int) -> None:
        """So many more names. Raises FileRefused for too many, or when nobody waits any more."""
        self.names += names
        if self.names > LOOK_MAX:
            raise FileRefused(f"more than {LOOK_MAX} names are there; name a folder further down")
        self.check()

    def check(self) -> None:
        """Raises FileRefused when nobody waits any more."""
        if self.stopped:
            raise FileRefused("nobody waits for it any more")


def show(path: object) -> str:
    """A path for an error message."""
    return f"{path!r:.300}"


def refusal(path: object, error: OSError) -> FileRefused:
    """Why the system would not, without saying where on this machine that was."""
    if error.errno == errno.ENOENT:
        return FileRefused(f"there is no {show(path)} here")
    return FileRefused(f"{show(path)}: {error.strerror or type(error).__name__}")


class Confined:
    """A folder and what is below it.

    `resolve` says where a path leads, links and `..` included, and refuses what is not below. Everything else takes
    what it returned, and goes there by descriptors without following any link: one that was put in place after the
    check leads nowhere. (Hard links cannot be told from the files themselves.)
    Raises NotADirectoryError if there is no such folder, ValueError for one of the system's own.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is no such folder", str(folder))
        self.root = folder.resolve()
        if _is_of_system(self.root):
            own = "/, /proc, /sys and /dev"
            raise ValueError(f"{self.root}: {own} hold the system's own files; name the folder that holds the data")

    def resolve(self, path: str) -> Parts:
        """The names from the folder down to where a path leads. Raises FileRefused if that is not below."""
        if not isinstance(path, str) or "\0" in path:
            raise FileRefused("path must be text without NUL")
        if not _is_unicode(path):
            raise FileRefused(f"there is no {show(path)} here")
        if path.startswith("/"):
            raise FileRefused(f"{show(path)}: paths are relative to the folder that is served")
        try:
            resolved = (self.root / path).resolve()
        except OSError as error:
            raise refusal(path, error) from None
        except RuntimeError:
            raise FileRefused(f"{show(path)}: its links lead in a circle") from None
        if resolved != self.root and self.root not in resolved.parents:
            raise FileRefused(f"{show(path)} leads out of the folder that is served")
        return resolved.relative_to(self.root).parts

    @contextmanager
    def folder(self, parts: Parts) -> Iterator[int]:
        """A descriptor of a folder. Raises OSError if it is none, or a link stands in the way."""
        descriptor = self._open_root()
        try:
            for name in parts:
                below = os.open(name, _FOLDER, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_root(self) -> int:
        try:
            return os.open(self.root, _FOLDER)
        except FileNotFoundError:
            raise FileRefused("the folder that is served has vanished; make it again, or serve another") from None

    def state(self, parts: Parts) -> os.stat_result:
        """What is there. Raises OSError if there is nothing, or the way has become a link."""
        if not parts:
            with self.folder(()) as root:
                return os.fstat(root)
        with self.folder(parts[:-1]) as folder:
            return os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)

    def walk(self, parts: Parts, recursive: bool, look: Look) -> Iterator[Entry]:
        """What is in a folder, by name; what is in a folder below comes after it.

        A link that leads out, or nowhere, does not exist; one to a folder is not entered. Raises OSError if `parts`
        is no folder or has gone, FileRefused for too many names.
        """
        with self.folder(parts) as folder:
            yield from self._walk(folder, parts, recursive, look, DEPTH_MAX)

    def _walk(self, folder: int, parts: Parts, recursive: bool, look: Look, depth: int) -> Iterator[Entry]:
        for name in _names(folder, look):
            look.check()
            here = (*parts, name)
            try:
                state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                target = here
                if stat.S_ISLNK(state.st_mode):
                    target = self.resolve("/".join(here))
                    state = self.state(target)
                    if stat.S_ISLNK(state.st_mode):
                        continue
            except (OSError, FileRefused):  # gone since, or a link that leads out
                continue
            yield Entry(here, target, state)
            if recursive and stat.S_ISDIR(state.st_mode) and target == here:
                if depth == 0:
                    raise FileRefused(f"{show('/'.join(here))}: more than {DEPTH_MAX} folders below each other")
                try:
                    below = os.open(name, _FOLDER, dir_fd=folder)
                except OSError:  # not ours to read, or gone since
                    continue
                try:
                    yield from self._walk(below, here, recursive, look, depth - 1)
                finally:
                    os.close(below)


def _is_of_system(root: Path) -> bool:
    """Whether a folder holds files that are no files: /proc/self/mem calls itself a regular one."""
    names = root.parts[1:3]
    return not names or (names[0] in ("proc", "sys", "dev") and names != ("dev", "shm"))


def _names(folder: int, look: Look) -> list[str]:
    """The names in a folder that a message can hold, sorted."""
    names = []
    unseen = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            unseen += 1
            if unseen >= 1000:
                look.count(unseen)
                unseen = 0
            if entry.name.isascii() or _is_unicode(entry.name):
                names.append(entry.name)
            else:
                look.unnameable += 1
    look.count(unseen)
    names.sort()
    return names


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
