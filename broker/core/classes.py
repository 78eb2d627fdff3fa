"""Which workers of an endpoint have the class a method belongs to (`Class.attribute`), told beforehand or learned.

Some dialects do not say what a worker serves. Then its answers tell, as far as they can: who has answered a class well
has it. Who has answered it with errors only may lack it, or may have been asked for something that failed; that is
held against it for a while, and only if another is known to have the class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from broker.core.registry import Registration
    from broker.core.sessions import Session

NAMES_MAX = 1000
"""names of classes remembered per endpoint, of each kind; callers may make up any number of them"""


class ClassesOf(frozenset[str]):
    """All methods of some classes, in the place of a set of methods: `Class.*`, as which they are shown."""

    def __contains__(self, method: object) -> bool:
        return isinstance(method, str) and super().__contains__(f"{class_of(method)}.*")


def class_of(method: str) -> str:
    """What stands before the first dot."""
    return method.partition(".")[0]


class Doubt(msgspec.Struct, eq=False):
    """A worker has answered a class with an error, and never well; held until its deadline, which stands in `slot`."""

    classes: Classes
    registration: Registration
    name: str
    slot: dict[Session | Doubt, None] | None = None

    def end(self) -> None:
        """It is over, because its time is, or for a better reason."""
        of_name = self.classes.doubts[self.name]
        del of_name[self.registration]
        if not of_name:
            del self.classes.doubts[self.name]
        if self.slot is not None:
            self.slot.pop(self, None)
            self.slot = None


class Classes:
    """What was learned about the workers of one endpoint, by the names of classes; the oldest names go first."""

    __slots__ = ("doubts", "had")

    def __init__(self) -> None:
        self.had: OrderedDict[str, dict[Registration, None]] = OrderedDict()
        self.doubts: OrderedDict[str, dict[Registration, Doubt]] = OrderedDict()

    def has(self, name: str, registration: Registration) -> None:
        """It has answered this class well."""
        self.had.setdefault(name, {})[registration] = None
        if len(self.had) > NAMES_MAX:
            self.had.popitem(last=False)
        if (doubt := self.doubts.get(name, {}).get(registration)) is not None:
            doubt.end()

    def doubt(self, name: str, registration: Registration) -> Doubt | None:
        """It has answered this class with an error; None if it has answered it well before."""
        if registration in self.had.get(name, ()):
            return None
        if (earlier := self.doubts.get(name, {}).get(registration)) is not None:
            earlier.end()
        while len(self.doubts) >= NAMES_MAX and name not in self.doubts:
            self._end_all(next(iter(self.doubts.values())))
        doubt = Doubt(self, registration, name)
        self.doubts.setdefault(name, {})[registration] = doubt
        return doubt

    def forget(self, registration: Registration) -> None:
        """It has left."""
        for name, having in list(self.had.items()):
            having.pop(registration, None)
            if not having:
                del self.had[name]
        for doubted in list(self.doubts.values()):
            self._end_all({registration: doubted[registration]} if registration in doubted else {})

    @staticmethod
    def _end_all(doubted: Mapping[Registration, Doubt]) -> None:
        for doubt in list(doubted.values()):
            doubt.end()

    def passed_over(self, name: str) -> list[Registration]:
        """Who is not to be asked for this class as long as somebody better is free; nobody unless somebody has it."""
        doubted = self.doubts.get(name)
        return [each for each in doubted if each.free] if doubted and name in self.had else []

    def check(self, registrations: Collection[Registration]) -> None:
        """Assert that all views agree. For tests and simulators."""
        for having in self.had.values():
            assert having and all(each in registrations for each in having)
        for name, doubted in self.doubts.items():
            assert doubted
            for registration, doubt in doubted.items():
                assert registration in registrations and registration not in self.had.get(name, ())
                assert doubt.slot is not None and doubt in doubt.slot
