"""Which worker gets the next request."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from broker.core.classes import Classes, class_of

if TYPE_CHECKING:
    from broker.core.ids import SessionId
    from broker.core.registry import Registration

LEVELS_MAX = 4096
"""Loads at or above this count as equal, which bounds the levels' memory at 300 KiB per endpoint."""


GROUPS_REMEMBERED = 4096
"""groups whose worker is kept at hand"""


class Policy(ABC):
    """Chooses among the registrations that can take one more request; `registrations` are all, busy ones too."""

    __slots__ = ("registrations",)

    binds: bool = False
    """whether a group is bound to one registration, for which its requests wait"""

    def __init__(self, registrations: Collection[Registration] = ()) -> None:
        self.registrations = registrations

    @abstractmethod
    def add(self, registration: Registration) -> None:
        """This one can take requests."""

    @abstractmethod
    def remove(self, registration: Registration) -> None:
        """This one cannot, for now."""

    @abstractmethod
    def choose(self, method: str, group: str | None = None) -> Registration | None:
        """Which one takes a request for this method; None if none of them has it. Most policies mind no group."""

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

    def take(self, method: str, group: str | None = None) -> Registration | None:
        """As `choose`, and it has one request more."""
        registration = self.choose(method, group)
        if registration is not None:
            self.load(registration)
        return registration

    def target(self, method: str, group: str) -> Registration | None:
        """The one to which the group is bound for this method, busy or not; None if any may take it, or nobody can."""
        return None

    def came(self, registration: Registration) -> None:  # noqa: B027 - who is there matters where groups are bound
        """It serves the endpoint from now on, or has other methods."""

    def left(self, registration: Registration) -> None:  # noqa: B027
        """It serves the endpoint no more, or will have other methods."""

    @abstractmethod
    def __len__(self) -> int: ...


class LeastPending(Policy):
    """The one with the fewest requests in its hands; among equals the one that has waited longest.

    Registrations stand in levels by load, so choosing and moving cost the same for one worker and for a thousand.
    """

    __slots__ = ("_levels", "_lowest", "_size")

    def __init__(self, registrations: Collection[Registration] = ()) -> None:
        super().__init__(registrations)
        self._levels: list[dict[Registration, None]] = [{}]
        self._lowest = 0
        self._size = 0

    def add(self, registration: Registration) -> None:
        self._put(registration, min(registration.load, LEVELS_MAX))
        self._size += 1

    def remove(self, registration: Registration) -> None:
        del self._levels[min(registration.load, LEVELS_MAX)][registration]
        self._size -= 1

    def choose(self, method: str, group: str | None = None) -> Registration | None:
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

    def take(self, method: str, group: str | None = None) -> Registration | None:
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
        return super().take(method, group)

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

    def __init__(self, registrations: Collection[Registration] = ()) -> None:
        super().__init__(registrations)
        self._order: OrderedDict[Registration, None] = OrderedDict()

    def add(self, registration: Registration) -> None:
        self._order[registration] = None

    def remove(self, registration: Registration) -> None:
        del self._order[registration]

    def choose(self, method: str, group: str | None = None) -> Registration | None:
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

    def __init__(self, registrations: Collection[Registration] = ()) -> None:
        super().__init__(registrations)
        self._by_age: SortedDict[int, Registration] = SortedDict()

    def add(self, registration: Registration) -> None:
        self._by_age[registration.number] = registration

    def remove(self, registration: Registration) -> None:
        del self._by_age[registration.number]

    def choose(self, method: str, group: str | None = None) -> Registration | None:
        for number in reversed(self._by_age):
            registration: Registration = self._by_age[number]
            if registration.methods is None or method in registration.methods:
                return registration
        return None

    def changed(self, registration: Registration, before: int) -> None:
        """Load plays no part."""

    def __len__(self) -> int:
        return len(self._by_age)


class Sticky(LeastPending):
    """Requests of one group go to the same worker, and wait for it while others are free; the rest as least pending.

    Which one is found by rendezvous hashing: of those that have the method, the one with the highest `rank`. So one
    that comes or goes moves its own groups alone. Looking a group up that is not remembered costs 1 µs per worker.
    """

    __slots__ = ("_targets",)

    binds = True

    def __init__(self, registrations: Collection[Registration] = ()) -> None:
        super().__init__(registrations)
        self._targets: dict[tuple[str, str], Registration] = {}

    def choose(self, method: str, group: str | None = None) -> Registration | None:
        if group is None:
            return super().choose(method)
        target = self.target(method, group)
        return target if target is not None and target.free else None

    def take(self, method: str, group: str | None = None) -> Registration | None:
        return super().take(method) if group is None else Policy.take(self, method, group)

    def target(self, method: str, group: str) -> Registration | None:
        target = self._targets.get((method, group))
        if target is not None:
            return target
        able = [r for r in self.registrations if r.methods is None or method in r.methods]
        if not able:
            return None
        if len(self._targets) >= GROUPS_REMEMBERED:
            self._targets.clear()
        target = self._targets[method, group] = max(able, key=lambda r: rank(r.session.id, group))
        return target

    def came(self, registration: Registration) -> None:
        for (method, group), target in self._targets.items():
            if registration.methods is None or method in registration.methods:
                mine = rank(registration.session.id, group)
                if mine > rank(target.session.id, group):
                    self._targets[method, group] = registration

    def left(self, registration: Registration) -> None:
        self._targets = {name: target for name, target in self._targets.items() if target is not registration}


class Informed(Policy):
    """Another policy, which does not see whom the answers speak against, unless nobody else is free."""

    __slots__ = ("binds", "classes", "inner")

    def __init__(self, inner: Policy, classes: Classes) -> None:
        super().__init__(inner.registrations)
        self.inner = inner
        self.classes = classes
        self.binds = inner.binds

    def add(self, registration: Registration) -> None:
        self.inner.add(registration)

    def remove(self, registration: Registration) -> None:
        self.inner.remove(registration)

    def choose(self, method: str, group: str | None = None) -> Registration | None:
        passed_over = self.classes.passed_over(class_of(method))
        for each in passed_over:
            self.inner.remove(each)
        chosen = self.inner.choose(method, group)
        for each in passed_over:
            self.inner.add(each)
        return self.inner.choose(method, group) if chosen is None else chosen

    def changed(self, registration: Registration, before: int) -> None:
        self.inner.changed(registration, before)

    def target(self, method: str, group: str) -> Registration | None:
        return self.inner.target(method, group)

    def came(self, registration: Registration) -> None:
        self.inner.came(registration)

    def left(self, registration: Registration) -> None:
        self.inner.left(registration)
        self.classes.forget(registration)

    def __len__(self) -> int:
        return len(self.inner)


def rank(session: SessionId, group: str) -> bytes:
    """How well a group suits a worker: the same in every process, and no pattern in it."""
    return hashlib.blake2b(b"%d %b" % (session, group.encode()), digest_size=8).digest()


POLICIES: dict[str, Callable[[Collection[Registration]], Policy]] = {
    "least_pending": LeastPending,
    "round_robin": RoundRobin,
    "newest": Newest,
    "sticky": Sticky,
}
