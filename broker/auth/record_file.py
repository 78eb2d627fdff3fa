"""A file of records that the daemon watches and the command line changes: tokens, users."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from broker.auth.private_files import Fingerprint, fingerprint_of, locked

Record = TypeVar("Record")
Read = Callable[[Path], tuple[Fingerprint | None, list[Record]]]
Write = Callable[[Path, list[Record]], None]


AGAIN_S = 1.0
"""how soon a file that cannot be used, and has not changed since, is read again: anybody who asks can cause it"""


class RecordFile(Generic[Record]):
    """One such file. `read` and `write` handle the whole and raise OSError or `error`, whose text is for people.

    What cannot be read later leaves the records as they were and is logged once. `what` is the records' plural.
    """

    def __init__(
        self,
        path: Path,
        read: Read[Record],
        write: Write[Record],
        error: type[Exception],
        what: str,
        log: logging.Logger | None = None,
    ) -> None:
        self.path = path
        self._read = read
        self._write = write
        self._error = error
        self._what = what
        self._log = log or logging.getLogger("broker.auth")
        self._complaint = ""
        self._fingerprint: Fingerprint | None = None
        self._unusable: Fingerprint | None = None
        self._again_at = 0.0

    def first(self) -> list[Record]:
        """The records; none if there is no file. Raises `error` if there is one that cannot be used."""
        self._fingerprint, records = self._read(self.path)
        return records

    def changed(self) -> list[Record] | None:
        """The records if the file has changed since they were read; None if not, or if it cannot be used now."""
        found: Fingerprint | None = None
        try:
            found = fingerprint_of(self.path)
            if found == self._fingerprint:
                self._complaint = ""
                return None
            if found is not None and found == self._unusable and time.monotonic() < self._again_at:
                return None
            self._fingerprint, records = self._read(self.path)
        except (OSError, self._error) as error:
            self._unusable, self._again_at = found, time.monotonic() + AGAIN_S
            self._complain(str(error))
            return None
        self._complaint = ""
        return records

    def replace(self, change: Callable[[list[Record]], list[Record]]) -> None:
        """Read, change and write the file under its lock. Raises `error`; the old file then stays."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self.path):
                if self.path.is_symlink():
                    raise self._error(f"{self.path} is a symbolic link; name the file it points to")
                self._write(self.path, change(self._read(self.path)[1]))
        except OSError as error:
            raise self._error(f"cannot change the {self._what} in {self.path}: {error}") from None

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            self._log.error("%s stay as they were: %s", self._what, complaint)
