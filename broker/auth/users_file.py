"""The file of users: what one record holds, and reading and writing the whole."""

import hashlib
import os
from pathlib import Path

import msgspec

from broker.auth.passwords import PasswordError, check_hash
from broker.auth.private_files import Fingerprint, give_to_folder_owner, read_whole, replace_file
from broker.auth.token_file import MOMENT_MAX, TokenError, check_holder, grants_of
from broker.core.access import Principal

FILE_MAX_BYTES = 16 << 20
USERS_MAX = 10_000


class UserError(Exception):
    """What is wrong with a user, a name or the file of users, in one line that names the thing and no password."""


class UserRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One user. Times are wall-clock Unix seconds; `hash` is the password's, with its parameters."""

    name: str
    hash: str
    roles: tuple[str, ...]
    endpoints: tuple[str, ...]
    created: float
    changed: float
    disabled: bool = False

    @property
    def id(self) -> str:
        """This very entry: another after any change, so that what was opened with the old one can be told and ended."""
        return f"{self.name}:{hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()}"

    @property
    def state(self) -> str:
        """`valid` or `disabled`."""
        return "disabled" if self.disabled else "valid"

    def principal(self) -> Principal:
        """Whom the password proves. A token of the same name is the same principal."""
        return Principal(self.name, grants_of(self.roles, self.endpoints), None, "user", user_id=self.id)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    users: list[UserRecord]


def check_user(record: UserRecord) -> None:
    """Raise UserError naming what is wrong with a record."""
    try:
        check_holder("a user", record.name, record.roles, record.endpoints)
        check_hash(record.hash)
    except TokenError as error:
        raise UserError(str(error)) from None
    except PasswordError as error:
        raise UserError(f"the user {record.name}: {error}") from None
    if not all(0 <= moment < MOMENT_MAX for moment in (record.created, record.changed)):
        raise UserError(f"a moment of the user {record.name} is out of range")


def read_users(path: Path) -> tuple[Fingerprint | None, list[UserRecord]]:
    """The file's state and its users; none if there is no file.

    Raises UserError naming what is wrong; a file that others may read is: its hashes could be tried elsewhere.
    """
    try:
        found = read_whole(path, FILE_MAX_BYTES, secret=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the users: {error}") from None
    return (None, []) if found is None else (found[0], _decoded(path, found[1]))


def _decoded(path: Path, data: bytes) -> list[UserRecord]:
    try:
        file = msgspec.json.decode(data, type=_File)
        for record in file.users:
            check_user(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, UserError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if file.version != 1 or len({record.name for record in file.users}) != len(file.users):
        raise UserError(f"{path} is damaged: doubled users, or a version ({file.version}) other than 1")
    if len(file.users) > USERS_MAX:
        raise UserError(f"{path} has {len(file.users)} users, more than {USERS_MAX}")
    return file.users


def write_users(path: Path, records: list[UserRecord]) -> None:
    """Put these users in place of the file's, at once and durably. Raises OSError; the old file then stays."""
    data = msgspec.json.format(msgspec.json.encode(_File(1, records)), indent=1) + b"\n"
    os.close(replace_file(path, data, lambda descriptor: give_to_folder_owner(descriptor, path.parent)))
