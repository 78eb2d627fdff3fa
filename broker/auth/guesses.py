"""How many wrong credentials an address may send before it is told to wait."""

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Callable

from broker.auth.proxies import parse_address

ADDRESSES_MAX = 10_000


class Guesses:
    """A token bucket of failures per address: a minute's worth at once, refilled evenly.

    IPv6 counts by /64, which is what one customer is given. At most `addresses_max` addresses are remembered,
    the longest unheard is forgotten first (and its bucket with it, so this slows guessing; that it is hopeless
    is due to the 256 bits). `clock` is monotonic time in seconds.
    """

    __slots__ = ("_addresses_max", "_buckets", "_clock", "_per_minute")

    def __init__(self, clock: Callable[[], float], *, per_minute: int = 60, addresses_max: int = ADDRESSES_MAX) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._addresses_max = addresses_max
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, as of when

    def __len__(self) -> int:
        return len(self._buckets)

    def wrong(self, remote: str) -> int:
        """Note a failure: 0 while there are any left, else the whole seconds until there is one again."""
        key, now = group_of(remote), self._clock()
        left, at = self._buckets.pop(key, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - at) * self._per_minute / 60)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now)
        if len(self._buckets) > self._addresses_max:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) * 60 / self._per_minute))


def group_of(remote: str) -> str:
    """The key under which an address is counted: itself, or the /64 of an IPv6 address."""
    address = parse_address(remote)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)
