"""Sign-ins of browsers: what a session cookie stands for, and how it is written and read."""

from __future__ import annotations

import heapq
import math
import re
import secrets
from collections.abc import Callable, Container

import msgspec

from broker.auth.facts import Refused, RequestFacts
from broker.auth.tokens import digest_of
from broker.core.access import Principal

LIVE_S = 12 * 3600.0
LOGINS_MAX = 10_000
PER_PRINCIPAL_MAX = 1000
"""of one principal: so many daemons that share a user may come back in one moment, each with a sign-in of its own"""
_SPARE = 1000


class _Login(msgspec.Struct, frozen=True):
    dies_at: float
    principal: Principal


class Logins:
    """Sign-ins by 256 random bits each, kept by digest and in memory only, for at most `live_s` seconds.

    `clock` is wall-clock time in seconds: the sign-in's end becomes the principal's, so that links opened with the
    cookie end with it. Bounded overall and per principal: at the latter who signs in once more loses the oldest
    sign-in, at the former who has most of them does.
    """

    __slots__ = ("_by_name", "_clock", "_ends", "_live", "_logins_max", "_per_principal_max", "live_s")

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        live_s: float = LIVE_S,
        logins_max: int = LOGINS_MAX,
        per_principal_max: int = PER_PRINCIPAL_MAX,
    ) -> None:
        self.live_s = live_s
        self._clock = clock
        self._logins_max = logins_max
        self._per_principal_max = per_principal_max
        self._live: dict[str, _Login] = {}  # by login_id
        self._by_name: dict[str, dict[str, None]] = {}  # the login_ids of a principal, oldest first
        self._ends: list[tuple[float, str]] = []  # a heap: a token may expire before the sign-in's own time

    def __len__(self) -> int:
        self._prune()
        return len(self._live)

    def open(self, principal: Principal) -> tuple[str, float]:
        """Sign somebody in: the cookie's value, 43 characters of base64url, and the seconds it is good for.

        Raises Refused 429 with Retry-After when as many principals are signed in as may be.
        """
        self._prune()
        own = self._by_name.get(principal.name, {})
        if len(own) >= self._per_principal_max:
            self.close(next(iter(own)))
        elif len(self._live) >= self._logins_max:
            largest = max(self._by_name.values(), key=len)
            if len(largest) == 1:
                raise Refused(429, f"{self._logins_max} sign-ins are open", (("Retry-After", "60"),))
            self.close(next(iter(largest)))
        value, now = secrets.token_urlsafe(32), self._clock()
        login_id = _login_id(value)
        dies_at = min(now + self.live_s, math.inf if principal.expires_at is None else principal.expires_at)
        signed_in = msgspec.structs.replace(principal, kind="login", expires_at=dies_at, login_id=login_id)
        self._live[login_id] = _Login(dies_at, signed_in)
        self._by_name.setdefault(principal.name, {})[login_id] = None
        heapq.heappush(self._ends, (dies_at, login_id))
        return value, dies_at - now

    def find(self, value: str) -> Principal | None:
        """Who signed in with this cookie, of kind `login`; None if nobody did, or it has ended.

        Whether the token they signed in with still holds is for the caller to see.
        """
        login = self._live.get(_login_id(value))
        return None if login is None or login.dies_at <= self._clock() else login.principal

    def close(self, login_id: str) -> bool:
        """End a sign-in; False if there is none."""
        login = self._live.pop(login_id, None)
        if login is None:
            return False
        own = self._by_name[login.principal.name]
        del own[login_id]
        if not own:
            del self._by_name[login.principal.name]
        return True

    def is_open(self, login_id: str) -> bool:
        """Whether a sign-in has neither ended nor expired."""
        login = self._live.get(login_id)
        return login is not None and login.dies_at > self._clock()

    def close_all_of(self, ids: Container[str]) -> frozenset[str]:
        """End the sign-ins made with these tokens or by these users (`user_id`); the login_ids that ended."""
        ended = frozenset(
            login_id
            for login_id, login in self._live.items()
            if login.principal.token_id in ids or login.principal.user_id in ids
        )
        for login_id in ended:
            self.close(login_id)
        return ended

    def _prune(self) -> None:
        """Drop what has ended, and keep the heap from growing by what was closed before its time."""
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            self.close(heapq.heappop(self._ends)[1])
        if len(self._ends) > 2 * len(self._live) + _SPARE:
            self._ends = [(login.dies_at, login_id) for login_id, login in self._live.items()]
            heapq.heapify(self._ends)


def _login_id(value: str) -> str:
    """A sign-in's name inside the process: the digest, from which nobody gets back to the cookie."""
    return digest_of(value).hex()


def cookie_name(port: int, prefix: str = "") -> str:
    """The name of the cookie of a broker listening on this port, or under this prefix of an application that does.

    Browsers keep cookies per host, whatever the port (RFC 6265 section 8.5): under one name, two brokers of one
    machine would sign each other's people out.
    """
    return f"broker-{port}{re.sub('[^A-Za-z0-9_.]', '-', prefix)}"


def cookie_values(facts: RequestFacts, name: str) -> tuple[str, ...]:
    """All values sent under this cookie's name (RFC 6265 section 5.4)."""
    pairs = (pair.strip(" \t").partition("=") for line in facts.header("cookie") for pair in line.split(";"))
    return tuple(value for key, _, value in pairs if key == name)


def set_cookie(name: str, value: str, live_s: float, *, secure: bool, path: str = "/") -> str:
    """The Set-Cookie header (RFC 6265 section 4.1) of a sign-in; with 0 seconds it takes the cookie away."""
    attributes = f"Path={path}; Max-Age={max(0, int(live_s))}; HttpOnly; SameSite=Strict"
    return f"{name}={value}; {attributes}{'; Secure' if secure else ''}"
