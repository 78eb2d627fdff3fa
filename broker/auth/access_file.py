"""The access file: how commands of the same user on the same machine find a running broker and get in."""

import os
import re
import tempfile
from itertools import islice
from pathlib import Path
from typing import Self

import msgspec

from broker.auth.private_files import HeldFile, is_held, make_private_folder, read_checked
from broker.config.model import Server

DEFAULT_PORT = Server().port
FILES_MAX = 1000
_SIZE_MAX = 64 << 10
_NAME = re.compile(r"([1-9][0-9]{0,4})\.json")


class AccessError(Exception):
    """Why there is no access file to write or to use, in one line that says what to do."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """What the file holds: the broker's URL, this start's token, its process, Unix seconds of its start."""

    url: str
    token: str
    pid: int
    started: float


def runtime_folder() -> Path:
    """Where access files lie: `broker` in the user's runtime folder, else `broker-<uid>` in the temporary one.

    $XDG_RUNTIME_DIR counts only if it is the user's own (after sudo it is not); without it the usual
    /run/user/<uid> is tried, so that a cron job finds what a login started.
    """
    uid = os.geteuid()
    for runtime in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}"):
        if runtime.startswith("/") and _is_own_folder(Path(runtime)):
            return Path(runtime, "broker")
    return Path(tempfile.gettempdir(), f"broker-{uid}")


def _is_own_folder(folder: Path) -> bool:
    try:
        state = folder.stat()
    except OSError:
        return False
    return folder.is_dir() and state.st_uid == os.geteuid() and not state.st_mode & 0o022


class AccessFile(HeldFile):
    """The access file of a running broker, from `write` to `remove`."""

    @classmethod
    def write(cls, port: int, access: Access, folder: Path | None = None) -> Self:
        """Write the file for a port (0600, whole at once), over one left behind.

        Raises AccessError when the folder is not the user's own or cannot be written.
        """
        folder = folder or runtime_folder()
        path = folder / f"{port}.json"
        try:
            make_private_folder(folder)
            return cls.hold(path, msgspec.json.encode(access))
        except OSError as error:
            raise AccessError(f"cannot write the access file {path}: {error}") from None


def live(folder: Path | None = None) -> dict[int, Access]:
    """The user's running brokers, by port. Files that are stale, damaged or not the user's own are passed over."""
    folder = folder or runtime_folder()
    if not _is_own_folder(folder) or folder.is_symlink():
        return {}
    ports = sorted(
        int(match[1]) for entry in islice(folder.iterdir(), FILES_MAX) if (match := _NAME.fullmatch(entry.name))
    )
    found = ((port, _read(folder / f"{port}.json")) for port in ports)
    return {port: access for port, access in found if access is not None}


def find(port: int | None = None, folder: Path | None = None) -> Access:
    """The running broker a command means: on `port` if given, else on the default port, else the only one.

    Raises AccessError when there is none, or several and none on the default port: taking the newest would
    send a command to a broker nobody named.
    """
    folder = folder or runtime_folder()
    brokers = live(folder)
    if port is not None:
        if port not in brokers:
            raise AccessError(f"no broker of yours runs on port {port} (none in {folder}); give a URL and a token")
        return brokers[port]
    if DEFAULT_PORT in brokers:
        return brokers[DEFAULT_PORT]
    if len(brokers) == 1:
        return next(iter(brokers.values()))
    if brokers:
        urls = ", ".join(access.url for access in brokers.values())
        raise AccessError(f"several brokers of yours run here; say which with --url: {urls}")
    message = f"no broker of yours runs here (none in {folder})"
    raise AccessError(f"{message}; start one with `broker serve`, or give --url and --token")


def _read(path: Path) -> Access | None:
    try:
        # NOFOLLOW: no link planted under a port's name; NONBLOCK: no FIFO to hang on.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        access = msgspec.json.decode(read_checked(descriptor, path, _SIZE_MAX), type=Access)
        return access if is_held(descriptor) and _is_running(access.pid) else None
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    # The lock alone would outlive the broker in a child that it forked.
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, as somebody else
    return True
