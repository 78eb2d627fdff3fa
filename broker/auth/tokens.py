"""Tokens: 256 random bits each, kept as digests in one file that the daemon and the command line share."""

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from broker.auth.record_file import RecordFile
from broker.auth.token_file import (
    MOMENT_MAX,
    TokenError,
    TokenRecord,
    check_record,
    read_tokens,
    write_tokens,
)
from broker.core.access import Grant, Principal, Role

PREFIX = "brk_"
"""How a token of ours begins, so that people and secret scanners know one when they see it."""

TOKENS_MAX = 10_000
ENDED_KEPT_S = 30 * 86400.0
"""How long revoked and expired tokens stay listed; a later `create` drops them."""

_Z85_KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # ZeroMQ RFC 32

RELOAD_INTERVAL_S = 1.0
EVERYTHING = (Grant(Role.CALLER | Role.WORKER | Role.LISTENER | Role.ADMIN, ("*",)),)


class UnknownToken(TokenError):
    """No token has this id or name, or several share the name."""


def new_secret() -> str:
    """A fresh token: the prefix and 256 random bits in base64url."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """The SHA-256 under which a secret is known.

    One fast hash is enough and a slow, salted one would buy nothing: those are for passwords, which can be
    tried from a list; 256 random bits cannot.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def curve_digest(public_key: bytes) -> bytes:
    """Under which a CURVE public key (Z85, 40 characters) is known, beside the tokens.

    No token has such a digest, whoever sends a public key for one: 0xff stands in no UTF-8.
    """
    return hashlib.sha256(b"\xff" + public_key).digest()


def local_principal() -> Principal:
    """Whoever can read this process's access file: the user who started it. May do everything."""
    return Principal("local", EVERYTHING, None, "local")


def admin_principal() -> Principal:
    """Who holds the token of `auth.admin_token`. May do everything."""
    return Principal("admin", EVERYTHING, None, "admin")


def default_tokens_path() -> Path:
    """`broker/tokens.json` in the user's state folder ($XDG_STATE_HOME, else ~/.local/state).

    Raises TokenError if the user has no home folder.
    """
    return state_path("tokens.json", "auth.tokens_file")


def state_path(name: str, key: str) -> Path:
    """A file of ours in the user's state folder; `key` of the configuration would name another.

    Raises TokenError if the user has no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):  # the specification: relative values are to be ignored
        return Path(state, "broker", name)
    try:
        return Path.home() / ".local" / "state" / "broker" / name
    except RuntimeError:
        raise TokenError(f"this user has no home folder; set {key} or XDG_STATE_HOME") from None


class TokenStore:
    """The tokens of one file: changed by `create` and `revoke`, in any process, and looked up by the daemon.

    The file is read when the store is made (missing: no tokens) and again when it has changed, looked for at
    most once per second. What cannot be read later leaves the tokens as they were and is logged once.
    `clock` is wall-clock time, `monotonic` paces the looking, both in seconds.
    Raises TokenError if the file is there and cannot be used.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        log: logging.Logger | None = None,
    ) -> None:
        self.path = path
        self.reloads = 0
        self._clock = clock
        self._monotonic = monotonic
        self._file = RecordFile(path, read_tokens, write_tokens, TokenError, "tokens", log)
        self._looked_at = monotonic()
        self._by_digest: dict[bytes, tuple[TokenRecord, Principal]] = {}
        self._by_id: dict[str, TokenRecord] = {}
        self._gone: set[str] = set()
        # Stands in where no token is found, so that finding none takes the same steps.
        self._nobody = (_stand_in(), Principal("nobody", ()))
        self._take(self._file.first())

    def tokens(self) -> tuple[TokenRecord, ...]:
        """All tokens of the file, oldest first, ended ones too."""
        self._reload_if_changed()
        return tuple(self._by_id.values())

    def create(
        self,
        name: str = "",
        roles: Iterable[str] = ("caller",),
        endpoints: Iterable[str] = ("*",),
        expires_in_s: float | None = None,
        *,
        curve_key: bytes = b"",
    ) -> tuple[TokenRecord, str]:
        """A new token and its secret, which is stored nowhere.

        `name` (default: the token's id) says who the bearer is; several tokens may share one. With `curve_key`, the
        public key (Z85) of a ZeroMQ peer, holding its secret half is the proof, and there is no secret here.
        Raises TokenError naming a bad name, role, pattern, key or expiry, a full or unusable file.
        """
        if curve_key and _Z85_KEY.fullmatch(curve_key) is None:
            raise TokenError("a CURVE public key has 40 characters (Z85)")
        if expires_in_s is not None and not 0 < expires_in_s < MOMENT_MAX / 10:
            raise TokenError(f"a token cannot expire in {expires_in_s} s")
        now, secret, token_id = self._clock(), "" if curve_key else new_secret(), secrets.token_hex(4)
        record = TokenRecord(
            id=token_id,
            name=name or token_id,
            digest=(curve_digest(curve_key) if curve_key else digest_of(secret)).hex(),
            kind="curve" if curve_key else "token",
            roles=tuple(dict.fromkeys(roles)),
            endpoints=tuple(dict.fromkeys(endpoints)),
            created=now,
            expires=None if expires_in_s is None else now + expires_in_s,
        )
        check_record(record)
        self._change(lambda records: _added(records, record, now))
        return record, secret

    def revoke(self, id_or_name: str) -> TokenRecord:
        """End a token now; one that has ended already is returned as it is.

        An id goes before a name. Raises UnknownToken saying what is like it, TokenError for an unusable file.
        """
        now = self._clock()
        found: list[TokenRecord] = []

        def revoked(records: list[TokenRecord]) -> list[TokenRecord]:
            target = _find(records, id_or_name, now)
            ended = target if target.revoked is not None else msgspec.structs.replace(target, revoked=now)
            found.append(ended)
            return [ended if record.id == target.id else record for record in records]

        self._change(revoked)
        return found[0]

    def lookup(self, digest: bytes) -> Principal | None:
        """The principal of a valid token with this SHA-256; None for unknown, expired and revoked alike."""
        self._look_again()
        # A dict is no leak here: who guesses controls the secret, not its digest, so how far a digest got in a
        # comparison teaches nothing about the next guess. compare_digest decides all the same, against a
        # stand-in where nothing was found, so that every guess takes the same steps.
        if digest not in self._by_digest:
            self._reload_if_changed()  # it may have been made a moment ago
        record, principal = self._by_digest.get(digest, self._nobody)
        same = hmac.compare_digest(bytes.fromhex(record.digest), digest)
        return principal if same & (record.state(self._clock()) == "valid") else None

    def is_valid(self, token_id: str) -> bool:
        """Whether the token with this id exists and is neither expired nor revoked."""
        self._look_again()
        record = self._by_id.get(token_id)
        return record is not None and record.state(self._clock()) == "valid"

    def refresh(self) -> frozenset[str]:
        """Read the file if it has changed; the ids of tokens revoked, removed or altered since the last call.

        To be called once per second: the sessions of these tokens are to be closed. (Expiry is no change of
        the file and stands in each principal.)
        """
        self._reload_if_changed()
        gone, self._gone = frozenset(self._gone), set()
        return gone

    def _look_again(self) -> None:
        if self._monotonic() - self._looked_at >= RELOAD_INTERVAL_S:
            self._reload_if_changed()

    def _reload_if_changed(self) -> None:
        self._looked_at = self._monotonic()
        records = self._file.changed()
        if records is not None:
            self.reloads += 1
            self._take(records)

    def _take(self, records: list[TokenRecord]) -> None:
        old, self._by_id = self._by_id, {record.id: record for record in records}
        self._by_digest = {bytes.fromhex(record.digest): (record, record.principal()) for record in records}
        # A token altered by hand counts as gone too: its sessions hold the old grants.
        self._gone.update(
            token_id
            for token_id, record in old.items()
            if record.revoked is None and self._by_id.get(token_id) != record
        )

    def _change(self, change: Callable[[list[TokenRecord]], list[TokenRecord]]) -> None:
        self._file.replace(change)
        self._reload_if_changed()


def _stand_in() -> TokenRecord:
    return TokenRecord(
        id="0" * 8, name="nobody", digest=secrets.token_hex(32), roles=(), endpoints=(), created=0.0, revoked=0.0
    )


def _ended_at(record: TokenRecord) -> float:
    return min((moment for moment in (record.expires, record.revoked) if moment is not None), default=math.inf)


def _added(records: list[TokenRecord], record: TokenRecord, now: float) -> list[TokenRecord]:
    kept = [old for old in records if now - _ended_at(old) < ENDED_KEPT_S]
    if len(kept) >= TOKENS_MAX:
        raise TokenError(f"there are {len(kept)} tokens already, the most allowed; revoke some")
    if any(old.id == record.id for old in kept):
        raise TokenError("the new token's id is taken; try again")
    if any(old.digest == record.digest for old in records):
        raise TokenError("this key stands there already, valid or ended; make a new pair")
    return [*kept, record]


def _find(records: list[TokenRecord], id_or_name: str, now: float) -> TokenRecord:
    for record in records:
        if record.id == id_or_name:
            return record
    named = [record for record in records if record.name == id_or_name]
    candidates = [record for record in named if record.state(now) == "valid"] or named[-1:]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        ids = ", ".join(record.id for record in candidates)
        raise UnknownToken(f"several valid tokens are named {id_or_name!r}; say which by its id: {ids}")
    raise UnknownToken(f"no token has the id or name {id_or_name!r}{_nearest(records, id_or_name)}")


def _nearest(records: list[TokenRecord], id_or_name: str) -> str:
    import difflib  # only when something was mistyped

    names = list(dict.fromkeys(text for record in records for text in (record.name, record.id)))
    near = difflib.get_close_matches(id_or_name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
