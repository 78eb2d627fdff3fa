"""How much of one endpoint's queue each caller holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.lines import Line
    from broker.core.pending import Request


class Shares:
    """What waits, by principal, with the line it stands in; the oldest first.

    Principals stand in levels by how much they hold, so that the largest is found without a search.
    """

    __slots__ = ("_held", "_levels")

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[Request, Line]] = {}
        self._levels: list[dict[str, None]] = [{}]

    def add(self, request: Request, line: Line) -> None:
        """One more waits; it must not wait yet."""
        principal, levels = request.session.principal, self._levels
        held = self._held.get(principal)
        if held is None:
            held = self._held[principal] = OrderedDict()
        before = len(held)
        held[request] = line
        if before:
            del levels[before][principal]
        if len(levels) == before + 1:
            levels.append({principal: None})
        else:
            levels[before + 1][principal] = None

    def add_first(self, request: Request, line: Line) -> None:
        """As `add`, but as if it had come before all others."""
        self.add(request, line)
        self._held[request.session.principal].move_to_end(request, last=False)

    def remove(self, request: Request) -> Line:
        """One that waits does so no longer; the line it stood in."""
        principal, levels = request.session.principal, self._levels
        held = self._held[principal]
        line = held.pop(request)
        left = len(held)
        del levels[left + 1][principal]
        if left:
            levels[left][principal] = None
        else:
            del self._held[principal]
        if not levels[-1]:
            del levels[-1]  # the one below is not empty: shares change by one
        return line

    def move(self, request: Request, line: Line) -> None:
        """It stands in another line from now on."""
        self._held[request.session.principal][request] = line

    def newest_of_largest(self, principal: str) -> Request | None:
        """The newest request of who holds most, if this principal holds less; None if that is but one, or nobody's."""
        largest = len(self._levels) - 1
        if largest < 2 or len(self._held.get(principal, ())) >= largest:
            return None
        return next(reversed(self._held[next(iter(self._levels[largest]))]))

    def __contains__(self, request: Request) -> bool:
        held = self._held.get(request.session.principal)
        return held is not None and request in held

    def __iter__(self) -> Iterator[Request]:
        for held in self._held.values():
            yield from held
