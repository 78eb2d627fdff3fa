"""The file of tokens: what one record holds, and reading and replacing the whole."""

import os
import re
from pathlib import Path
from typing import Literal

import msgspec

from broker.auth.private_files import Fingerprint, give_to_folder_owner, read_whole, replace_file
from broker.core.access import NAME, ROLE_NAMES, Grant, Principal, Role, is_name, is_pattern

FILE_MAX_BYTES = 16 << 20
PATTERNS_MAX = 100
RESERVED_NAMES = ("admin", "local", "host", "zeromq")
"""Names of principals that are not made from stored tokens; they share nothing with one."""

MOMENT_MAX = 1e11
"""Unix seconds, about the year 5100, which datetime can still show."""

_ID = re.compile(r"[0-9a-f]{8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class TokenError(Exception):
    """What is wrong with a token, its name or the file of tokens, in one line that names the thing."""


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stored token. Times are wall-clock Unix seconds; `digest` is the token's SHA-256 in hex."""

    id: str
    name: str
    digest: str
    roles: tuple[str, ...]
    endpoints: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None
    kind: Literal["token", "curve"] = "token"
    """`curve`: the digest is that of a public key, whose other half ZeroMQ asks for"""

    def state(self, now: float) -> str:
        """`valid`, `expired` or `revoked` at the wall-clock time `now`."""
        if self.revoked is not None:  # whatever the clock says: it may have been set back since
            return "revoked"
        return "valid" if self.expires is None or now < self.expires else "expired"

    def principal(self) -> Principal:
        """Whom the token proves. Tokens of one name are one principal, so that a token can be replaced."""
        return Principal(self.name, grants_of(self.roles, self.endpoints), self.expires, self.kind, self.id)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    tokens: list[TokenRecord]


def check_record(record: TokenRecord) -> None:
    """Raise TokenError naming what is wrong with a record."""
    if _ID.fullmatch(record.id) is None or _DIGEST.fullmatch(record.digest) is None:
        raise TokenError(f"{record.id!r} is no token's id, or its digest is none")
    check_holder("a token", record.name, record.roles, record.endpoints)
    if not all(0 <= moment < MOMENT_MAX for moment in (record.created, record.expires or 0, record.revoked or 0)):
        raise TokenError(f"a moment of the token {record.id} is out of range")


def check_holder(what: str, name: str, roles: tuple[str, ...], endpoints: tuple[str, ...]) -> None:
    """Raise TokenError naming what is wrong with a principal's name or its grant, as files keep them."""
    if not is_name(name):
        raise TokenError(f"the name {name!r} does not match {NAME.pattern}")
    if name in RESERVED_NAMES:
        raise TokenError(f"the name {name!r} is the broker's own; take another")
    for role in roles:
        if role not in ROLE_NAMES:
            raise TokenError(f"the role {role!r} is none of {', '.join(ROLE_NAMES)}")
    if not roles or not 1 <= len(endpoints) <= PATTERNS_MAX:
        raise TokenError(f"{what} needs a role and 1 to {PATTERNS_MAX} endpoint patterns")
    for pattern in endpoints:
        if not is_pattern(pattern):
            raise TokenError(f"{pattern!r} is no endpoint pattern: a name in which * may stand for anything")


def grants_of(roles: tuple[str, ...], endpoints: tuple[str, ...]) -> tuple[Grant, ...]:
    """What a record's roles at its endpoints allow."""
    combined = Role.NONE
    for role in roles:
        combined |= ROLE_NAMES[role]
    return (Grant(combined, endpoints),)


def read_tokens(path: Path) -> tuple[Fingerprint | None, list[TokenRecord]]:
    """The file's state and its tokens; none if there is no file. Raises TokenError naming what is wrong."""
    try:
        found = read_whole(path, FILE_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise TokenError(f"cannot read the tokens: {error}") from None
    return (None, []) if found is None else (found[0], _decoded(path, found[1]))


def _decoded(path: Path, data: bytes) -> list[TokenRecord]:
    try:
        file = msgspec.json.decode(data, type=_File)
        for record in file.tokens:
            check_record(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TokenError) as error:
        raise TokenError(f"{path} is damaged: {error}") from None
    records = file.tokens
    distinct = len({record.id for record in records}) == len({record.digest for record in records}) == len(records)
    if file.version != 1 or not distinct:
        raise TokenError(f"{path} is damaged: doubled tokens, or a version ({file.version}) other than 1")
    return records


def write_tokens(path: Path, records: list[TokenRecord]) -> None:
    """Put these tokens in place of the file's, at once and durably. Raises OSError; the old file then stays."""
    data = msgspec.json.format(msgspec.json.encode(_File(1, records)), indent=1) + b"\n"
    os.close(replace_file(path, data, lambda descriptor: give_to_folder_owner(descriptor, path.parent)))
