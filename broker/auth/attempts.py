"""How often passwords may be tried: dear for guesses, and no way to lock a user out of where they have been before."""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from broker.auth.buckets import Buckets
from broker.auth.guesses import Guesses, group_of

PER_MINUTE = 10
NAMES_MAX = 50_000
"""names with a bucket. One is forgotten only while it is full again: as many hashes do not fit into a minute."""
PLACES_MAX = 32
"""addresses remembered per user; the longest unseen goes first"""
USERS_MAX = 10_000


class Attempts:
    """Buckets of wrong passwords, `per_minute` each.

    An address (IPv6: the /64) from which a user signed in well before has a bucket for that user alone. All other
    addresses share the user's, and pay from their own (`guesses`, shared with wrong tokens) beside. Names that
    nobody has are treated alike. All is bounded and in memory. `clock` is monotonic time in seconds.
    """

    __slots__ = ("_guesses", "_key", "_names", "_places", "_seen")

    def __init__(self, clock: Callable[[], float], guesses: Guesses, *, per_minute: int = PER_MINUTE) -> None:
        self._guesses = guesses
        self._key = secrets.token_bytes(32)
        self._names = Buckets(clock, per_minute=per_minute, keys_max=NAMES_MAX)
        self._places = Buckets(clock, per_minute=per_minute, keys_max=NAMES_MAX)
        self._seen: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()  # name → addresses, longest unseen first

    def is_known(self, name: str, remote: str) -> bool:
        """Whether this user signed in well from there."""
        return group_of(remote) in self._seen.get(name, ())

    def wait_s(self, name: str, remote: str) -> int:
        """0 if one more may be tried, else the whole seconds until then."""
        if self.is_known(name, remote):
            return self._places.wait_s((name, group_of(remote)))
        return max(self._guesses.wait_s(remote), self._names.wait_s(self._digest(name)))

    def take(self, name: str, remote: str) -> Callable[[], None]:
        """Charge for an attempt, before it is known how it ends; what is returned gives it back.

        Charged first, so that many at once are not all tried on the last one left.
        """
        if self.is_known(name, remote):
            place = (name, group_of(remote))
            self._places.take(place)
            return lambda: self._places.give_back(place)
        digest = self._digest(name)
        self._guesses.wrong(remote)
        self._names.take(digest)

        def give_back() -> None:
            self._guesses.right(remote)
            self._names.give_back(digest)

        return give_back

    def was_right(self, name: str, remote: str) -> None:
        """This user has signed in from there."""
        places = self._seen.pop(name, None) or OrderedDict()
        self._seen[name] = places
        group = group_of(remote)
        places[group] = None
        places.move_to_end(group)
        if len(places) > PLACES_MAX:
            places.popitem(last=False)
        if len(self._seen) > USERS_MAX:
            self._seen.popitem(last=False)

    def _digest(self, name: str) -> bytes:
        """Names of strangers are of any length, and may be passwords typed into the wrong field."""
        return blake2b(name.encode("utf-8", "surrogatepass"), key=self._key, digest_size=16).digest()
