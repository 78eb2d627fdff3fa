"""Signing in with name and password: dear for who guesses, cheap for who was right a moment ago."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable
from hashlib import blake2b

from broker.auth.attempts import PER_MINUTE, Attempts
from broker.auth.guesses import Guesses
from broker.auth.hashing import Hashing
from broker.auth.passwords import verify
from broker.auth.users import User, UserStore
from broker.core.access import Principal


class Throttled(Exception):
    """Too many were wrong; `wait_s` is the whole seconds until one more may be tried."""

    def __init__(self, wait_s: int) -> None:
        super().__init__(wait_s)
        self.wait_s = wait_s


class SignIn:
    """Judges names and passwords of the users of a store, on one event loop.

    After a right password a keyed digest of it is kept, in memory only and with a key of this process: the same user
    coming again, as a program does that reconnects for ever, costs no slow hash. It is void as soon as the user's
    entry changes. `clock` is monotonic time in seconds, `guesses` the buckets of addresses.
    """

    def __init__(
        self, users: UserStore, clock: Callable[[], float], guesses: Guesses, *, per_minute: int = PER_MINUTE
    ) -> None:
        self.users = users
        self.hashing = Hashing()
        self.attempts = Attempts(clock, guesses, per_minute=per_minute)
        self._key = secrets.token_bytes(32)
        self._remembered: dict[str, bytes] = {}  # user id → digest of name, password and hash
        self._reloads = users.reloads
        self._under_way: dict[bytes, asyncio.Task[bool]] = {}

    async def check(self, name: str, password: str, remote: str) -> Principal | None:
        """Who this is; None for a name that nobody has, a wrong password and a disabled user, after the same time.

        Raises Throttled, without looking at the password; Refused 503 if too many wait for their hash.
        """
        user = self.users.find(name)
        if user is not None and user.disabled:
            user = None  # from here on like a name that nobody has
        self._forget_changed()
        wait_s = self.attempts.wait_s(name, remote)
        if wait_s:
            raise Throttled(wait_s)
        encoded = self._hash_for(name, user)
        digest = self._digest(name, password, encoded)
        kept = self._remembered.get(user.id, b"") if user is not None else b""
        right = hmac.compare_digest(kept, digest) or await self._verified(digest, encoded, name, password, remote)
        if not right or user is None or not self.users.is_valid(user.id):  # the entry may have changed meanwhile
            return None
        self._remembered[user.id] = digest
        self.attempts.was_right(name, remote)
        return user.principal

    async def close(self) -> None:
        """Let the threads go; who waits is refused."""
        await self.hashing.close()

    def _hash_for(self, name: str, user: User | None) -> str:
        if user is not None:
            return user.hash
        return self.users.stand_in(name) if len(self.users) else ""

    async def _verified(self, digest: bytes, encoded: str, name: str, password: str, remote: str) -> bool:
        """The slow way. The same attempt made twice at once is one: 20 daemons that start together need one hash."""
        task = self._under_way.get(digest)
        if task is not None:
            return await asyncio.shield(task)
        known = self.attempts.is_known(name, remote)
        give_back = self.attempts.take(name, remote)

        # In closures: the event loop's debug log shows arguments.
        def job() -> bool:
            return verify(encoded, password)

        async def run() -> bool:
            right = False
            try:
                # Where there are no users there is nothing to find out, and nothing to burn the processor for.
                right = bool(encoded) and await self.hashing.run(job, known=known)
            except BaseException:
                give_back()
                raise
            finally:
                del self._under_way[digest]
            if right:
                give_back()
            return right

        task = self._under_way[digest] = asyncio.get_running_loop().create_task(run())
        task.add_done_callback(_look_at)
        return await asyncio.shield(task)

    def _digest(self, name: str, password: str, encoded: str) -> bytes:
        keyed = blake2b(key=self._key, digest_size=32)
        for text in (name, encoded, password):
            raw = text.encode("utf-8", "surrogatepass")
            keyed.update(len(raw).to_bytes(8))
            keyed.update(raw)
        return keyed.digest()

    def _forget_changed(self) -> None:
        if self._reloads != self.users.reloads:
            self._reloads = self.users.reloads
            self._remembered = {key: value for key, value in self._remembered.items() if self.users.is_valid(key)}


def _look_at(task: asyncio.Task[bool]) -> None:
    """Who started it may have left: what it raised is then nobody's."""
    if not task.cancelled():
        task.exception()
