"""Connection files on disk: written so that only their owner can read them, read only if nobody else could."""

from __future__ import annotations

import os
from pathlib import Path

from broker.auth.private_files import read_whole, replace_file
from broker.wire.connection_file import SIZE_MAX, ConnectionFileError, ConnectionInfo, check, parse, render

KEY_MAX = 4096
"""bytes of a key file"""


def write_connection_file(path: Path, info: ConnectionInfo) -> None:
    """Put a connection file there, whole and 0600; it holds the key. Raises ConnectionFileError, OSError."""
    check(info)
    os.close(replace_file(path, render(info)))


def remove_connection_file(path: Path, info: ConnectionInfo) -> None:
    """Remove the file that `info` was written to, unless it says something else by now: then it is another's."""
    try:
        if read_connection_file(path) == info:
            path.unlink()
    except (ConnectionFileError, OSError):
        pass  # gone, or no longer ours to judge


def read_connection_file(path: Path) -> ConnectionInfo:
    """What the file says.

    Raises ConnectionFileError naming the file, FileNotFoundError, and PermissionError when others than its reader could
    have read or written it.
    """
    try:
        return parse(_secret(path, SIZE_MAX))
    except ValueError as error:
        raise ConnectionFileError(f"{path}: {error}") from None


def read_key_file(path: Path) -> bytes:
    """The key in a file, without the white space around it. Raises as `read_connection_file`, ValueError if empty."""
    key = _secret(path, KEY_MAX).strip()
    if not key:
        raise ValueError(f"{path} is empty: a key file holds the key, and nothing is signed without one")
    return key


def _secret(path: Path, size_max: int) -> bytes:
    found = read_whole(path, size_max, secret=True)
    if found is None:
        raise FileNotFoundError(f"there is no file {path}")
    return found[1]
