"""How many wrong credentials an address may send before it is told to wait."""

import ipaddress
from collections.abc import Callable

from broker.auth.buckets import Buckets
from broker.auth.proxies import parse_address

ADDRESSES_MAX = 10_000


class Guesses:
    """A bucket of failures per address: a minute's worth at once, refilled evenly.

    IPv6 counts by /64, which is what one customer is given. At most `addresses_max` addresses are remembered,
    the longest unheard is forgotten first (and its bucket with it, so this slows guessing; that it is hopeless
    is due to the 256 bits of tokens, and to the buckets that users have beside). `clock` is monotonic time in seconds.
    """

    __slots__ = ("_buckets",)

    def __init__(self, clock: Callable[[], float], *, per_minute: int = 60, addresses_max: int = ADDRESSES_MAX) -> None:
        self._buckets = Buckets(clock, per_minute=per_minute, keys_max=addresses_max)

    def __len__(self) -> int:
        return len(self._buckets)

    def wrong(self, remote: str) -> int:
        """Note a failure: 0 while there are any left, else the whole seconds until there is one again."""
        return self._buckets.take(group_of(remote))

    def wait_s(self, remote: str) -> int:
        """What `wrong` would return; nothing is noted."""
        return self._buckets.wait_s(group_of(remote))

    def right(self, remote: str) -> None:
        """Take back a failure that was noted before it was known for none."""
        self._buckets.give_back(group_of(remote))


def group_of(remote: str) -> str:
    """The key under which an address is counted: itself, or the /64 of an IPv6 address."""
    address = parse_address(remote)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)
