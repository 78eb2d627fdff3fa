"""Users: names with the hashes of their passwords, in one file that the daemon and the command line share."""

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from broker.auth.passwords import PasswordError, checked_password, hash_password, stand_in
from broker.auth.record_file import RecordFile
from broker.auth.token_file import TokenError, check_holder
from broker.auth.tokens import state_path
from broker.auth.users_file import USERS_MAX, UserError, UserRecord, read_users, write_users
from broker.core.access import Principal


class UnknownUser(UserError):
    """No user has this name."""


def default_users_path() -> Path:
    """`broker/users.json` in the user's state folder, beside the tokens. Raises UserError without a home folder."""
    try:
        return state_path("users.json", "auth.users_file")
    except TokenError as error:
        raise UserError(str(error)) from None


class User(msgspec.Struct, frozen=True):
    """A user as the daemon looks one up."""

    id: str
    hash: str
    disabled: bool
    principal: Principal


class UserStore:
    """The users of one file: changed by `add`, `remove` and others, in any process, and looked up by the daemon.

    The file is read when the store is made (missing: no users) and again when it has changed. What cannot be read
    later leaves the users as they were and is logged once. `clock` is wall-clock time in seconds.
    Raises UserError if the file is there and cannot be used, or can be read by others.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], float] = time.time, log: logging.Logger | None = None
    ) -> None:
        self.path = path
        self.reloads = 0
        self._clock = clock
        self._file = RecordFile(path, read_users, write_users, UserError, "users", log)
        self._key = secrets.token_bytes(32)
        self._records: list[UserRecord] = []
        self._by_name: dict[str, User] = {}
        self._ids: frozenset[str] = frozenset()
        self._gone: set[str] = set()
        self._stand_ins: list[str] = []
        self._take(self._file.first())

    def __len__(self) -> int:
        return len(self._by_name)

    def users(self) -> tuple[UserRecord, ...]:
        """All users of the file, in the order in which they were added."""
        self._reload_if_changed()
        return tuple(self._records)

    def get(self, name: str) -> UserRecord:
        """The record of a user. Raises UnknownUser saying what is like the name."""
        return _find(list(self.users()), name)

    def check_new(self, name: str, roles: Iterable[str], endpoints: Iterable[str]) -> None:
        """What `add` raises before it comes to the password."""
        try:
            check_holder("a user", name, tuple(roles), tuple(endpoints))
        except TokenError as error:
            raise UserError(str(error)) from None
        _check_room(list(self.users()), name)

    def add(
        self, name: str, password: str, roles: Iterable[str] = ("caller",), endpoints: Iterable[str] = ("*",)
    ) -> UserRecord:
        """A new user. Takes the time of a hash, before the file is locked.

        Raises UserError naming a bad name, role, pattern or password, a name that is taken, a full or unusable file.
        """
        roles, endpoints, now = tuple(dict.fromkeys(roles)), tuple(dict.fromkeys(endpoints)), self._clock()
        self.check_new(name, roles, endpoints)
        record = UserRecord(
            name=name, hash=_hashed(password), roles=roles, endpoints=endpoints, created=now, changed=now
        )
        self._change(lambda records: _added(records, record))
        return record

    def set_password(self, name: str, password: str) -> UserRecord:
        """Give a user another password; what was opened with the old one ends.

        Raises UnknownUser, UserError for a bad password or an unusable file.
        """
        self.get(name)  # before the hash, which takes its time
        return self._alter(name, hash=_hashed(password), changed=self._clock())

    def set_disabled(self, name: str, disabled: bool) -> UserRecord:
        """Shut a user out, or let one in again. Raises as `remove`."""
        return self._alter(name, disabled=disabled)

    def remove(self, name: str) -> UserRecord:
        """Remove a user now. Raises UnknownUser saying what is like it, UserError for an unusable file."""
        removed: list[UserRecord] = []

        def without(records: list[UserRecord]) -> list[UserRecord]:
            removed.append(_find(records, name))
            return [record for record in records if record.name != name]

        self._change(without)
        return removed[-1]

    def find(self, name: str) -> User | None:
        """The user of this name, as the file has it now, disabled ones too."""
        # The file is looked at for every name, so that an unknown one costs no more: 2 µs.
        self._reload_if_changed()
        return self._by_name.get(name)

    def stand_in(self, name: str) -> str:
        """A hash that no password has, for a name that nobody has: it costs what users' hashes here cost.

        Always the same one for one name, as it would be for a user.
        """
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), key=self._key, digest_size=8).digest()
        return self._stand_ins[int.from_bytes(digest) % len(self._stand_ins)]

    def is_valid(self, user_id: str) -> bool:
        """Whether this very entry is still there and not disabled."""
        return user_id in self._ids

    def refresh(self) -> frozenset[str]:
        """Read the file if it has changed; the ids of entries removed or changed since the last call.

        To be called once per second: what was opened with these is to be closed.
        """
        self._reload_if_changed()
        gone, self._gone = frozenset(self._gone), set()
        return gone

    def _reload_if_changed(self) -> None:
        records = self._file.changed()
        if records is not None:
            self.reloads += 1
            self._take(records)

    def _take(self, records: list[UserRecord]) -> None:
        self._records = records
        self._by_name = {
            record.name: User(record.id, record.hash, record.disabled, record.principal()) for record in records
        }
        before, self._ids = self._ids, frozenset(user.id for user in self._by_name.values() if not user.disabled)
        self._gone |= before - self._ids
        costs = {record.hash.rsplit("$", 2)[0]: record.hash for record in records}
        self._stand_ins = [stand_in(encoded) for _, encoded in sorted(costs.items())]

    def _alter(self, name: str, **fields: object) -> UserRecord:
        altered: list[UserRecord] = []

        def change(records: list[UserRecord]) -> list[UserRecord]:
            altered.append(msgspec.structs.replace(_find(records, name), **fields))
            return [altered[-1] if record.name == name else record for record in records]

        self._change(change)
        return altered[-1]

    def _change(self, change: Callable[[list[UserRecord]], list[UserRecord]]) -> None:
        self._file.replace(change)
        self._reload_if_changed()


def _hashed(password: str) -> str:
    try:
        return hash_password(checked_password(password))
    except PasswordError as error:
        raise UserError(str(error)) from None


def _added(records: list[UserRecord], record: UserRecord) -> list[UserRecord]:
    _check_room(records, record.name)  # again: now under the lock
    return [*records, record]


def _check_room(records: list[UserRecord], name: str) -> None:
    if any(old.name == name for old in records):
        raise UserError(f"there is a user {name} already; `broker user password` gives another password")
    if len(records) >= USERS_MAX:
        raise UserError(f"there are {len(records)} users already, the most allowed; remove some")


def _find(records: list[UserRecord], name: str) -> UserRecord:
    for record in records:
        if record.name == name:
            return record
    import difflib  # only when something was mistyped

    near = difflib.get_close_matches(name, [record.name for record in records], n=1)
    raise UnknownUser(f"there is no user {name!r:.150}{f'; did you mean {near[0]!r}?' if near else ''}")
