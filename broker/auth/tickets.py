"""One-time tickets: what a browser puts into a WebSocket's URL instead of its token."""

import math
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable

import msgspec

from broker.auth.facts import Refused
from broker.auth.tokens import digest_of
from broker.core.access import Principal

LIVE_S = 30.0
TICKETS_MAX = 10_000
PER_PRINCIPAL_MAX = 100


class Tickets:
    """Tickets of 256 random bits, each good once and for `live_s` seconds, bounded overall and per principal.

    `clock` is monotonic time in seconds: a step of the wall clock moves no ticket. Kept by digest and in
    memory only.
    """

    __slots__ = ("_clock", "_held", "_live", "_per_principal_max", "_tickets_max", "live_s")

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        live_s: float = LIVE_S,
        tickets_max: int = TICKETS_MAX,
        per_principal_max: int = PER_PRINCIPAL_MAX,
    ) -> None:
        self._clock = clock
        self.live_s = live_s
        self._tickets_max = tickets_max
        self._per_principal_max = per_principal_max
        self._live: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()  # oldest first
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        self._prune()
        return len(self._live)

    def issue(self, principal: Principal) -> str:
        """A ticket for a principal: 43 characters of base64url.

        Raises Refused: 403 to one who came by a ticket (a ticket that leaked could otherwise be renewed for
        ever), 429 with Retry-After at a bound.
        """
        if principal.kind == "ticket":
            raise Refused(403, "a ticket cannot be exchanged for another; use the token")
        self._prune()
        if len(self._live) >= self._tickets_max or self._held[principal.name] >= self._per_principal_max:
            raise Refused(429, "too many unused tickets", (("Retry-After", str(math.ceil(self.live_s))),))
        ticket = secrets.token_urlsafe(32)
        self._live[digest_of(ticket)] = (self._clock() + self.live_s, principal)
        self._held[principal.name] += 1
        return ticket

    def redeem(self, ticket: str) -> Principal | None:
        """The principal the ticket was issued to, of kind `ticket`, its expiry unchanged; None if it is not live.

        The ticket is spent. Whether the principal's own credential still holds is for the caller to see.
        """
        self._prune()
        entry = self._live.pop(digest_of(ticket), None)
        if entry is None:
            return None
        self._drop(entry[1])
        return msgspec.structs.replace(entry[1], kind="ticket")

    def _prune(self) -> None:
        now = self._clock()
        while self._live:
            digest, (dies_at, principal) = next(iter(self._live.items()))
            if dies_at > now:
                return
            del self._live[digest]
            self._drop(principal)

    def _drop(self, principal: Principal) -> None:
        self._held[principal.name] -= 1
        if not self._held[principal.name]:
            del self._held[principal.name]
