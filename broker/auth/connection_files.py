"""Connection files on disk: written so that only their owner can read them, read only if nobody else could."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from broker.auth.private_files import HeldFile, is_held, read_whole, replace_file
from broker.wire.connection_file import SIZE_MAX, ConnectionFileError, ConnectionInfo, check, parse, render

KEY_MAX = 4096
"""bytes of a key file"""


def write_connection_file(path: Path, info: ConnectionInfo) -> None:
    """Put a connection file there, whole and 0600; it holds the key. Raises ConnectionFileError, OSError."""
    check(info)
    os.close(replace_file(path, render(info)))


class ConnectionFile(HeldFile):
    """The connection file of a running broker, from `write` to `remove`."""

    @classmethod
    def write(cls, path: Path, info: ConnectionInfo) -> Self:
        """As `write_connection_file`. Raises ConnectionFileError also when a running broker's file is there."""
        check(info)
        if _is_held(path):
            raise ConnectionFileError(f"{path} is that of another running broker: each needs a file of its own")
        return cls.hold(path, render(info))


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False  # there is none, or it cannot be ours; what writes it says what is wrong
    try:
        return is_held(descriptor)
    finally:
        os.close(descriptor)


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
