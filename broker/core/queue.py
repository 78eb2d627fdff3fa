"""The requests of one endpoint that wait for a worker, and whose turn is next.

From the outside in:

* *Lanes*, one per priority, the higher first. When PASSED_MAX requests have been taken past a lower lane that waits,
  the next is taken from a lower lane: the one whose last turn is longest ago. So the highest lane has at least eight of
  nine, and a lane waits for at most nine times as many others as there are lower lanes that wait.
* In a lane the *principals* take turns, and of a principal its *sessions*. So neither many requests nor many
  connections of one token are worth more than one turn. Who comes to wait stands right before the one that had the last
  turn: who asks one at a time, beside one that floods, waits until a place is free, and not for another's turn as well.
* Of a session in one lane: in order of arrival, what was given out before and is to be tried again first.

Adding, taking and discarding cost the same however much waits (`benchmarks.flood`: 2.4 µs for in and out), as long as
the worker can do all of it. A worker that can do only some of it looks past the callers that have nothing for it, at
0.16 µs each; where nobody has anything for it, it looks at no caller at all.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import neg
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from broker.core.shares import Shares

if TYPE_CHECKING:
    from broker.core.lines import Line
    from broker.core.pending import Request
    from broker.core.registry import Registration
    from broker.core.sessions import Session

PASSED_MAX = 8
"""requests taken past a lower lane that waits, before it has a turn"""

Who = TypeVar("Who")
What = TypeVar("What")
Subject: TypeAlias = tuple[object, ...]


class Turns(OrderedDict[Who, What], Generic[Who, What]):
    """Those that wait, in the order of their turns; `last` had the last one."""

    __slots__ = ("last",)

    def __init__(self, last: Who | None = None) -> None:
        super().__init__()
        self.last = last

    def join(self, who: Who, what: What) -> None:
        """One more waits: its turn comes before the one that had the last."""
        self[who] = what
        if self.last in self:
            self.move_to_end(self.last)  # type: ignore[arg-type]

    def turn(self, who: Who) -> None:
        """It has its turn now."""
        self.last = who
        self.move_to_end(who)


Fifo: TypeAlias = "OrderedDict[Request, int]"
"""In order of arrival, which the number tells: it is lower for what came before."""
Waiting: TypeAlias = "dict[Line, Fifo]"
"""What one session has waiting in one lane."""
Caller: TypeAlias = "Turns[Session, Waiting]"


class Lane(Turns[str, Caller]):
    """The callers that wait with one priority. `since` is the number of the lane's last turn, or of its beginning."""

    __slots__ = ("since",)

    def __init__(self, last: str | None, since: int) -> None:
        super().__init__(last)
        self.since = since


class Queue:
    """What waits at one endpoint. The caller says in which line, and no two lines may hold the same work."""

    __slots__ = (
        "_back",
        "_front",
        "_lanes",
        "_last",
        "_latest",
        "_lines",
        "_order",
        "_passed",
        "_shares",
        "_size",
        "_turns",
    )

    def __init__(self) -> None:
        self._shares = Shares()
        self._lines: dict[Line, None] = {}
        self._lanes: dict[int, Lane] = {}
        self._order: list[int] = []
        self._last: dict[int, str] = {}
        self._latest: dict[Subject, Request] | None = None
        self._size = self._front = self._back = self._passed = self._turns = 0

    # ------------------------------------------------------------ in and out

    def put(self, request: Request, line: Line) -> None:
        """Add after what its session has waiting. It must not wait yet."""
        self._back += 1
        self._insert(request, line, self._back)
        self._shares.add(request, line)

    def put_first(self, request: Request, line: Line) -> None:
        """Add before what its session has waiting in its lane: it has waited before. It may wait already."""
        self.discard(request)
        self._front -= 1
        self._insert(request, line, self._front).move_to_end(request, last=False)
        self._shares.add_first(request, line)

    def replace(self, request: Request, successor: Request, line: Line) -> None:
        """Give its place to another: it stands first in its session; in nobody's place, it stands last."""
        if request in self:
            self.put_first(successor, line)
            self.discard(request)
        else:
            self.put(successor, line)

    def discard(self, request: Request) -> None:
        """Take out, wherever it stands, if it waits."""
        if request in self._shares:
            lane = self._lanes[request.options.priority]
            caller = lane[request.session.principal]
            self._remove(request, lane, caller, caller[request.session])

    def take(self, registration: Registration, now: float) -> Request | None:
        """Take out the one whose turn it is, of those this worker can do.

        What has expired is taken out and passed over, and is nobody's turn; but not if it has a key: then another may
        take it over.
        """
        while True:
            request = self._next(registration)
            if request is None:
                return None
            session, priority = request.session, request.options.priority
            lane = self._lanes[priority]
            caller = lane[session.principal]
            if request.deadline > now or request.work is not None:
                self._turn(priority, lane)
                self._last[priority] = session.principal
                lane.turn(session.principal)
                caller.turn(session)
                self._remove(request, lane, caller, caller[session])
                return request
            self._remove(request, lane, caller, caller[session])

    def sort(self, line_of: Callable[[Request], Line]) -> None:
        """What the workers can do has changed: ask for the line of each anew. Turns and places stay."""
        for line in self._lines:
            line.waiting = 0
        self._lines.clear()
        for lane in self._lanes.values():
            for caller in lane.values():
                for waiting in caller.values():
                    places = sorted((place, request) for fifo in waiting.values() for request, place in fifo.items())
                    waiting.clear()
                    for place, request in places:
                        line = line_of(request)
                        waiting.setdefault(line, OrderedDict())[request] = place
                        self._lines[line] = None
                        line.waiting += 1
                        self._shares.move(request, line)

    # ------------------------------------------------------------ who has to go

    def displaced(self, principal: str) -> Request | None:
        """The one that goes if one of this principal comes while the queue is full; None if it is the newcomer.

        It is the newest of who holds the most, if that is more than this principal's share. Nobody's only request goes,
        and none that a worker has had.
        """
        newest = self._shares.newest_of_largest(principal)
        return None if newest is None or newest.attempts else newest

    def superseded(self, session: Session, method: str, group: str | None) -> Request | None:
        """The newest that waits for the same method with the same group of the same principal; without one, session."""
        if self._latest is None:
            self._latest = {subject_of(request): request for request in self}
        return self._latest.get(_subject(session, method, group))

    # ------------------------------------------------------------ what there is

    def __contains__(self, request: Request) -> bool:
        return request in self._shares

    def __iter__(self) -> Iterator[Request]:
        """All, in the order in which they were asked."""
        return iter(sorted(self._shares, key=lambda request: request.id))

    def __len__(self) -> int:
        return self._size

    # ------------------------------------------------------------ inside

    def _insert(self, request: Request, line: Line, place: int) -> Fifo:
        session, priority = request.session, request.options.priority
        principal = session.principal
        lane = self._lanes.get(priority)
        if lane is None:
            lane = self._lanes[priority] = Lane(self._last.get(priority), self._turns)
            insort(self._order, priority, key=neg)
        caller = lane.get(principal)
        if caller is None:
            caller = Turns()
            lane.join(principal, caller)
        waiting = caller.get(session)
        if waiting is None:
            waiting = {}
            caller.join(session, waiting)
        fifo = waiting.get(line)
        if fifo is None:
            fifo = waiting[line] = OrderedDict()
        fifo[request] = place
        if not line.waiting:
            self._lines[line] = None
        line.waiting += 1
        self._size += 1
        if self._latest is not None:
            self._latest[subject_of(request)] = request
        return fifo

    def _remove(self, request: Request, lane: Lane, caller: Caller, waiting: Waiting) -> None:
        line = self._shares.remove(request)
        fifo = waiting[line]
        del fifo[request]
        self._size -= 1
        line.waiting -= 1
        if not line.waiting:
            del self._lines[line]
        if not fifo:
            del waiting[line]
            if not waiting:
                del caller[request.session]
                if not caller:
                    del lane[request.session.principal]
                    if not lane:
                        del self._lanes[request.options.priority]
                        self._order.remove(request.options.priority)
        if self._latest is not None and self._latest.get(subject := subject_of(request)) is request:
            del self._latest[subject]

    def _next(self, registration: Registration) -> Request | None:
        """Whose turn it is."""
        lines = self._lines
        if len(lines) > 1:
            return self._search([line for line in lines if line.fits(registration)])
        for line in lines:  # the common step: one line, which is everything
            if line.fits(registration):
                for caller in self._lanes[self._lanes_in_turn()[0]].values():
                    for waiting in caller.values():
                        return next(iter(waiting[line]))
        return None

    def _search(self, lines: list[Line]) -> Request | None:
        """Whose turn it is among those in these lines."""
        if not lines:
            return None
        only = lines[0] if len(lines) == 1 else None
        for priority in self._lanes_in_turn():
            for caller in self._lanes[priority].values():
                for waiting in caller.values():
                    if only is not None:
                        if only in waiting:
                            return next(iter(waiting[only]))
                    elif not waiting.keys().isdisjoint(lines):
                        heads = [next(iter(waiting[line].items())) for line in lines if line in waiting]
                        return min(heads, key=lambda head: head[1])[0]
        return None

    def _lanes_in_turn(self) -> list[int]:
        order = self._order
        if self._passed < PASSED_MAX or len(order) == 1:
            return order
        return sorted(order[1:], key=lambda priority: self._lanes[priority].since) + order[:1]

    def _turn(self, priority: int, lane: Lane) -> None:
        """Something of this lane is given out."""
        order = self._order
        self._turns += 1
        lane.since = self._turns
        if len(order) == 1 or (priority != order[0] and self._passed >= PASSED_MAX):
            self._passed = 0
        elif priority != order[-1]:
            self._passed += 1


def subject_of(request: Request) -> Subject:
    """What a request is about, where the newest is to win."""
    return _subject(request.session, request.method, request.options.group)


def _subject(session: Session, method: str, group: str | None) -> Subject:
    return (session, method) if group is None else (session.principal, group, method)
