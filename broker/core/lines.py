"""Which of the waiting requests the same workers can do: those stand in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.registry import Registration

METHODS_REMEMBERED = 1000
"""methods whose line is kept at hand; callers may make up any number of them"""


class Line:
    """Requests that the same workers can do: all that have `method`, or `target` alone, to which a group is bound.

    `method` is one of the line's methods; for all of them the answer is the same. `waiting` is how many stand here.
    """

    __slots__ = ("method", "target", "waiting")

    def __init__(self, method: str, target: Registration | None = None) -> None:
        self.method = method
        self.target = target
        self.waiting = 0

    def fits(self, registration: Registration) -> bool:
        """Whether this worker can do what stands here."""
        if self.target is not None:
            return self.target is registration
        return registration.methods is None or self.method in registration.methods


class Lines:
    """The lines of one endpoint, by what its workers have declared.

    Workers that all do the same, or everything, make one line. Sets of methods are what counts, not workers: one more
    worker of a kind that is there changes nothing.
    """

    __slots__ = ("_bound", "_by_ability", "_by_method", "_declared", "changed")

    def __init__(self) -> None:
        self._declared: dict[frozenset[str], int] = {}
        self._by_ability: dict[tuple[bool, ...], Line] = {}
        self._by_method: dict[str, Line] = {}
        self._bound: dict[Registration, Line] = {}
        self.changed = False
        """whether requests that wait may stand in a line that is none any more"""

    def of(self, method: str) -> Line:
        """The line of a request for this method that any worker may do that has it."""
        return self._by_method.get(method) or self._find(method)

    def bound(self, target: Registration) -> Line:
        """The line of what this worker alone may do."""
        line = self._bound.get(target)
        if line is None:
            line = self._bound[target] = Line("", target)
        return line

    def declare(self, methods: frozenset[str] | None) -> None:
        """One more worker has these methods."""
        if methods is not None:
            count = self._declared.get(methods, 0)
            self._declared[methods] = count + 1
            if not count:
                self._begin_anew()

    def withdraw(self, methods: frozenset[str] | None) -> None:
        """A worker that had these methods has them no more."""
        if methods is not None:
            self._declared[methods] -= 1
            if not self._declared[methods]:
                del self._declared[methods]
                self._begin_anew()

    def forget(self, target: Registration) -> None:
        """Nothing is bound to this worker any more."""
        self._bound.pop(target, None)

    def _find(self, method: str) -> Line:
        ability = tuple(method in methods for methods in self._declared)
        line = self._by_ability.get(ability)
        if line is None:
            line = self._by_ability[ability] = Line(method)
        if len(self._by_method) >= METHODS_REMEMBERED:
            self._by_method.clear()
        self._by_method[method] = line
        return line

    def _begin_anew(self) -> None:
        self._by_ability.clear()
        self._by_method.clear()
        self.changed = True
