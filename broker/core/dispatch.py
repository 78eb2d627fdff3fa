"""Which worker gets the next request, and the requests that wait for one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

if TYPE_CHECKING:
    from broker.core.pending import Request
    from broker.core.registry import Registration

LEVELS_MAX = 4096
"""Loads at or above this count as equal, which bounds the levels' memory at 300 KiB per endpoint."""


class Policy(ABC):
    """Chooses among the registrations that can take one more request."""

    __slots__ = ()

    @abstractmethod
    def add(self, registration: Registration) -> None:
        """This one can take requests."""

    @abstractmethod
    def remove(self, registration: Registration) -> None:
        """This one cannot, for now."""

    @abstractmethod
    def choose(self, method: str) -> Registration | None:
        """Which one takes a request for this method; None if none of them has it."""

    @abstractmethod
    def changed(self, registration: Registration, before: int) -> None:
        """Its load was `before` and is now `registration.load`."""

    def load(self, registration: Registration) -> None:
        """It has one request more; it must be free."""
        before = registration.load
        if before + 1 >= registration.capacity:
            registration.free = False
            self.remove(registration)
            registration.load = before + 1
        else:
            registration.load = before + 1
            self.changed(registration, before)

    def take(self, method: str) -> Registration | None:
        """As `choose`, and it has one request more."""
        registration = self.choose(method)
        if registration is not None:
            self.load(registration)
        return registration

    @abstractmethod
    def __len__(self) -> int: ...


class LeastPending(Policy):
    """The one with the fewest requests in its hands; among equals the one that has waited longest.

    Registrations stand in levels by load, so choosing and moving cost the same for one worker and for a thousand.
    """

    __slots__ = ("_levels", "_lowest", "_size")

    def __init__(self) -> None:
        self._levels: list[dict[Registration, None]] = [{}]
        self._lowest = 0
        self._size = 0

    def add(self, registration: Registration) -> None:
        self._put(registration, min(registration.load, LEVELS_MAX))
        self._size += 1

    def remove(self, registration: Registration) -> None:
        del self._levels[min(registration.load, LEVELS_MAX)][registration]
        self._size -= 1

    def choose(self, method: str) -> Registration | None:
        if not self._size:
            return None
        levels, lowest = self._levels, self._lowest
        while not levels[lowest]:
            lowest += 1
        self._lowest = lowest
        for registration in levels[lowest]:
            if registration.methods is None or method in registration.methods:
                return registration
        for level in levels[lowest + 1 :]:
            for registration in level:
                if registration.methods is None or method in registration.methods:
                    return registration
        return None

    def take(self, method: str) -> Registration | None:
        if not self._size:
            return None
        levels, lowest = self._levels, self._lowest
        while not levels[lowest]:
            lowest += 1
        self._lowest = lowest
        registration = next(iter(levels[lowest]))
        load = registration.load + 1
        level = load if load < LEVELS_MAX else LEVELS_MAX
        if registration.methods is None and load < registration.capacity and level < len(levels):
            del levels[lowest][registration]  # the common step, without a call
            levels[level][registration] = None
            registration.load = load
            return registration
        return super().take(method)

    def changed(self, registration: Registration, before: int) -> None:
        levels, load = self._levels, registration.load
        level = load if load < LEVELS_MAX else LEVELS_MAX
        del levels[before if before < LEVELS_MAX else LEVELS_MAX][registration]
        if level < len(levels):  # it is there: the common step, without a call
            levels[level][registration] = None
            if level < self._lowest:
                self._lowest = level
        else:
            self._put(registration, level)

    def _put(self, registration: Registration, level: int) -> None:
        levels = self._levels
        while len(levels) <= level:
            levels.append({})
        levels[level][registration] = None
        if level < self._lowest:
            self._lowest = level

    def __len__(self) -> int:
        return self._size


class RoundRobin(Policy):
    """Each in turn, whatever their load."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[Registration, None] = OrderedDict()

    def add(self, registration: Registration) -> None:
        self._order[registration] = None

    def remove(self, registration: Registration) -> None:
        del self._order[registration]

    def choose(self, method: str) -> Registration | None:
        for registration in self._order:
            if registration.methods is None or method in registration.methods:
                self._order.move_to_end(registration)
                return registration
        return None

    def changed(self, registration: Registration, before: int) -> None:
        """Load plays no part."""

    def __len__(self) -> int:
        return len(self._order)


class Newest(Policy):
    """The one that came last, as long as it has capacity; older ones are the reserve."""

    __slots__ = ("_by_age",)

    def __init__(self) -> None:
        self._by_age: SortedDict[int, Registration] = SortedDict()

    def add(self, registration: Registration) -> None:
        self._by_age[registration.number] = registration

    def remove(self, registration: Registration) -> None:
        del self._by_age[registration.number]

    def choose(self, method: str) -> Registration | None:
        for number in reversed(self._by_age):
            registration: Registration = self._by_age[number]
            if registration.methods is None or method in registration.methods:
                return registration
        return None

    def changed(self, registration: Registration, before: int) -> None:
        """Load plays no part."""

    def __len__(self) -> int:
        return len(self._by_age)


POLICIES: dict[str, Callable[[], Policy]] = {
    "least_pending": LeastPending,
    "round_robin": RoundRobin,
    "newest": Newest,
}


class Queue:
    """The requests of one endpoint that wait for a worker, in the order they came."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: OrderedDict[Request, None] = OrderedDict()

    def put(self, request: Request) -> None:
        """Add at the end."""
        self._waiting[request] = None

    def put_first(self, request: Request) -> None:
        """Add at the front: it has waited before."""
        self._waiting[request] = None
        self._waiting.move_to_end(request, last=False)

    def discard(self, request: Request) -> None:
        """Take out, wherever it stands."""
        self._waiting.pop(request, None)

    def take(self, registration: Registration) -> Request | None:
        """Take out the first one this worker can do."""
        methods = registration.methods
        for request in self._waiting:
            if methods is None or request.method in methods:
                del self._waiting[request]
                return request
        return None

    def __contains__(self, request: object) -> bool:
        return request in self._waiting

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)
