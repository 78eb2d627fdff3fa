"""The queue against a slow and plain model, and its rules one by one."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core import lines
from broker.core.access import Role
from broker.core.events import Attached
from broker.core.lines import Line, Lines
from broker.core.messages import EMPTY, Options
from broker.core.pending import Request
from broker.core.queue import PASSED_MAX, Queue
from broker.core.registry import Registration
from broker.core.sessions import Session
from tests.core.harness import EVERYTHING, NoLink

NOW = 100.0


class Bench:
    """Makes sessions and requests that belong to no router, and one queue with them in one line."""

    def __init__(self) -> None:
        self.made = 0
        self.line = Line("m")

    def filled(self, *requests: Request) -> Queue:
        queue = Queue()
        for request in requests:
            queue.put(request, self.line)
        return queue

    def session(self, principal: str) -> Session:
        self.made += 1
        event = Attached(
            session=self.made, link=NoLink(), principal=principal, grants=EVERYTHING, role=Role.CALLER, endpoint=None,
            listen=False, capacity=None,
        )  # fmt: skip
        return Session(event, NOW, 1)

    def request(self, session: Session, method: str = "m", *, deadline: float = NOW + 1, **options: object) -> Request:
        self.made += 1
        return Request(
            self.made, session, self.made, None, method, EMPTY, Options(**options), NOW, deadline  # type: ignore[arg-type]
        )  # fmt: skip


def worker(methods: Iterable[str] | None = None) -> Registration:
    registration = Registration(None, None)  # type: ignore[arg-type]
    registration.methods = None if methods is None else frozenset(methods)
    return registration


def taken(queue: Queue, registration: Registration | None = None, now: float = NOW) -> list[Request]:
    """Everything, in the order of turns."""
    registration = registration or worker()
    return list(iter(lambda: queue.take(registration, now), None))


def names(requests: Iterable[Request]) -> str:
    return " ".join(request.session.principal for request in requests)


# ---------------------------------------------------------------- turns


def test_principals_take_turns_however_much_each_has_waiting() -> None:
    bench = Bench()
    a, b, c = (bench.session(name) for name in "abc")
    queue = bench.filled(*(bench.request(s) for s in (a, a, a, a, b, b, c)))
    assert names(taken(queue)) == "a b c a b a a"


def test_sessions_of_one_principal_share_its_turn() -> None:
    bench = Bench()
    flood = [bench.session("a") for _ in range(5)]
    b = bench.session("b")
    queue = bench.filled(*(bench.request(s) for s in flood for _ in range(2)), *(bench.request(b) for _ in range(4)))
    order = taken(queue)
    assert names(order) == "a b a b a b a b a a a a a a"
    assert [r.session for r in order if r.session is not b] == [*flood, *flood], "each session in its turn"


def test_one_session_is_served_in_order_of_arrival() -> None:
    bench = Bench()
    a = bench.session("a")
    requests = [bench.request(a, method) for method in "xyxzy"]
    assert taken(bench.filled(*requests)) == requests


def test_who_comes_stands_before_the_one_that_had_the_last_turn() -> None:
    bench = Bench()
    a, b, c, d = (bench.session(name) for name in "abcd")
    queue = bench.filled(*(bench.request(s) for s in (a, a, a, b, b)))
    anybody = worker()
    assert queue.take(anybody, NOW).session is a  # type: ignore[union-attr]
    queue.put(bench.request(c), bench.line)
    queue.put(bench.request(d), bench.line)
    assert names(taken(queue)) == "b c d a b a", "after those that have waited for their turn, before who had one"


def test_who_comes_back_at_once_after_its_turn_stands_last() -> None:
    bench = Bench()
    a, b = bench.session("a"), bench.session("b")
    queue = bench.filled(bench.request(a), bench.request(b), bench.request(b))
    assert queue.take(worker(), NOW).session is a  # type: ignore[union-attr]
    queue.put(bench.request(a), bench.line)
    assert names(taken(queue)) == "b a b"


def test_who_had_the_last_turn_is_remembered_while_nothing_waits() -> None:
    bench = Bench()
    a, b = bench.session("a"), bench.session("b")
    queue = bench.filled(bench.request(a))
    taken(queue)
    queue.put(bench.request(a), bench.line)
    queue.put(bench.request(b), bench.line)
    assert names(taken(queue)) == "b a"


def test_what_has_expired_is_nobodys_turn() -> None:
    bench = Bench()
    a, b = bench.session("a"), bench.session("b")
    late, fresh = bench.request(a, deadline=NOW), bench.request(a)
    queue = bench.filled(late, bench.request(b), fresh)
    assert queue.take(worker(), NOW) is fresh
    assert late not in queue and len(queue) == 1


# ---------------------------------------------------------------- lanes


def test_higher_priorities_go_first() -> None:
    bench = Bench()
    a = bench.session("a")
    requests = [bench.request(a, priority=priority) for priority in (0, -9, 9, 3)]
    assert [r.options.priority for r in taken(bench.filled(*requests))] == [9, 3, 0, -9]


def test_a_lower_lane_has_one_turn_of_nine() -> None:
    bench = Bench()
    a = bench.session("a")
    queue = bench.filled(*(bench.request(a, priority=priority) for priority in (5, 0) for _ in range(40)))
    order = [request.options.priority for request in taken(queue)]
    assert order[:27] == ([5] * PASSED_MAX + [0]) * 3


def test_several_lower_lanes_share_that_turn_and_none_starves() -> None:
    bench = Bench()
    a = bench.session("a")
    priorities = (5, 0, -1, -9)
    queue = bench.filled(*(bench.request(a, priority=priority) for priority in priorities for _ in range(60)))
    order = [request.options.priority for request in taken(queue)][:54]
    assert [priority for priority in order if priority != 5] == [0, -1, -9, 0, -1, -9]
    assert order.count(5) == 48


def test_lanes_are_passed_only_while_something_waits_there() -> None:
    bench = Bench()
    a = bench.session("a")
    queue = bench.filled(*(bench.request(a, priority=5) for _ in range(20)))
    anybody = worker()
    for _ in range(12):
        queue.take(anybody, NOW)
    queue.put(bench.request(a, priority=0), bench.line)
    assert [request.options.priority for request in taken(queue)] == [5] * 8 + [0], "twelve had passed nobody"


def test_turns_are_kept_per_lane() -> None:
    bench = Bench()
    a, b = bench.session("a"), bench.session("b")
    high = [bench.request(s, priority=1) for s in (a, a, b)]
    low = [bench.request(s) for s in (a, a, b)]
    assert names(taken(bench.filled(*low, *high))) == "a b a a b a"


# ---------------------------------------------------------------- what a worker can do


def test_a_worker_is_given_only_what_it_can_do_and_turns_stay_fair() -> None:
    bench = Bench()
    a, b = bench.session("a"), bench.session("b")
    sort = Lines()
    reader, anybody = worker(["read"]), worker()
    sort.declare(reader.methods)
    queue = Queue()
    for session, method in ((a, "write"), (a, "read"), (a, "read"), (b, "write"), (b, "read")):
        queue.put(bench.request(session, method), sort.of(method))
    assert [(r.session.principal, r.method) for r in taken(queue, reader)] == [
        ("a", "read"),
        ("b", "read"),
        ("a", "read"),
    ]
    assert queue.take(reader, NOW) is None and len(queue) == 2
    assert names(taken(queue, anybody)) == "b a", "a had the last turn"


def test_order_of_arrival_holds_across_methods() -> None:
    bench = Bench()
    a = bench.session("a")
    sort = Lines()
    sort.declare(frozenset({"x"}))
    requests = [bench.request(a, method) for method in "xyxxyyx"]
    queue = Queue()
    for request in requests:
        queue.put(request, sort.of(request.method))
    assert taken(queue) == requests


def test_workers_of_one_kind_make_one_line_for_what_they_do() -> None:
    sort = Lines()
    assert sort.of("x") is sort.of("y"), "nobody has declared anything"
    for _ in range(3):
        sort.declare(frozenset({"x", "y"}))
    assert sort.of("x") is sort.of("y") is not sort.of("z")
    sort.changed = False
    sort.withdraw(frozenset({"x", "y"}))
    assert not sort.changed, "there are two more of them"
    sort.declare(frozenset({"y"}))
    assert len({sort.of("x"), sort.of("y"), sort.of("z")}) == 3


def test_methods_made_up_by_callers_fill_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "METHODS_REMEMBERED", 10)
    sort = Lines()
    found = {sort.of(f"m{number}") for number in range(100)}
    assert len(found) == 1 and len(sort._by_method) <= 10


# ---------------------------------------------------------------- first, replaced, gone


def test_what_is_put_first_stands_first_of_its_session_and_lane() -> None:
    bench = Bench()
    a, b = bench.session("a"), bench.session("b")
    waiting = [bench.request(a), bench.request(a), bench.request(b), bench.request(a, priority=1)]
    queue = bench.filled(*waiting)
    again, once_more = bench.request(a), bench.request(a)
    queue.put_first(again, bench.line)
    queue.put_first(once_more, bench.line)
    queue.put_first(once_more, bench.line)
    assert taken(queue) == [waiting[3], once_more, waiting[2], again, waiting[0], waiting[1]]


def test_a_successor_stands_first_in_its_session_and_in_nobodys_place_last() -> None:
    bench = Bench()
    a, other = bench.session("a"), bench.session("a")
    first, second, third = (bench.request(a) for _ in range(3))
    theirs = bench.request(other)
    queue = bench.filled(first, second, third, theirs)
    here, there, nowhere = bench.request(a), bench.request(other), bench.request(a)
    queue.replace(second, here, bench.line)
    assert [r for r in queue if r.session is a] == [first, third, here]
    queue.replace(third, there, bench.line)
    queue.replace(third, nowhere, bench.line)
    assert taken(queue) == [here, there, first, theirs, nowhere]


def test_all_that_is_discarded_leaves_nothing_behind() -> None:
    bench = Bench()
    queue = Queue()
    requests = [
        bench.request(bench.session("ab"[number % 2]), priority=number % 3, group="g" if number % 2 else None)
        for number in range(30)
    ]
    for request in requests:
        queue.put(request, bench.line)
    assert queue.superseded(requests[1].session, "m", "g") is requests[29]
    assert list(queue) == requests and len(queue) == 30
    for request in requests:
        queue.discard(request)
        queue.discard(request)
    assert not len(queue) and not list(queue) and not queue._lanes and not queue._order and not queue._lines
    assert not queue._latest and queue.displaced("c") is None and bench.line.waiting == 0


# ---------------------------------------------------------------- who has to go


def test_the_newest_of_who_holds_most_makes_room() -> None:
    bench = Bench()
    a, b = bench.session("a"), bench.session("b")
    requests = [bench.request(s) for s in (a, a, b, a)]
    queue = bench.filled(*requests)
    assert queue.displaced("c") is requests[3] is queue.displaced("b")
    assert queue.displaced("a") is None, "nobody holds more"
    queue.discard(requests[3])
    queue.discard(requests[1])
    assert queue.displaced("c") is None, "nobody's only request goes"


def test_what_a_worker_has_had_makes_no_room() -> None:
    bench = Bench()
    a = bench.session("a")
    tried, new = bench.request(a), bench.request(a)
    tried.attempts = 1
    queue = bench.filled(new)
    queue.put_first(tried, bench.line)
    assert queue.displaced("b") is new
    new.attempts = 1
    assert queue.displaced("b") is None


# ---------------------------------------------------------------- against a model


class Plain:
    """The same rules over plain lists, searched through from the front."""

    def __init__(self) -> None:
        self.lanes: dict[int, list[str]] = {}
        self.callers: dict[tuple[int, str], list[Session]] = {}
        self.waiting: dict[tuple[int, Session], list[Request]] = {}
        self.last: dict[object, object] = {}
        self.since: dict[int, int] = {}
        self.passed = self.turns = 0

    def _join(self, ring: list, who: object, key: object) -> None:  # type: ignore[type-arg]
        if who not in ring:
            ring.append(who)
            if self.last.get(key) in ring:
                ring.remove(self.last[key])
                ring.append(self.last[key])

    def put(self, request: Request, *, first: bool = False) -> None:
        priority, session = request.options.priority, request.session
        if priority not in self.lanes:
            self.lanes[priority], self.since[priority] = [], self.turns
        self._join(self.lanes[priority], session.principal, priority)
        self._join(self.callers.setdefault((priority, session.principal), []), session, (priority, session.principal))
        waiting = self.waiting.setdefault((priority, session), [])
        waiting.insert(0 if first else len(waiting), request)

    def discard(self, request: Request) -> None:
        priority, session = request.options.priority, request.session
        caller = (priority, session.principal)
        self.waiting[priority, session].remove(request)
        if not self.waiting[priority, session]:
            self.callers[caller].remove(session)
            if not self.callers[caller]:
                self.last.pop(caller, None)
                self.lanes[priority].remove(session.principal)
                if not self.lanes[priority]:
                    del self.lanes[priority]

    def take(self, methods: frozenset[str] | None) -> Request | None:
        order = sorted(self.lanes, reverse=True)
        turns = order
        if self.passed >= PASSED_MAX and len(order) > 1:
            turns = [*sorted(order[1:], key=lambda priority: self.since[priority]), order[0]]
        for priority in turns:
            for principal in self.lanes[priority]:
                for session in self.callers[priority, principal]:
                    for request in self.waiting[priority, session]:
                        if methods is None or request.method in methods:
                            self._turn(order, priority, principal, session)
                            self.discard(request)
                            return request
        return None

    def _turn(self, order: list[int], priority: int, principal: str, session: Session) -> None:
        self.turns += 1
        self.since[priority] = self.turns
        if len(order) == 1 or (priority != order[0] and self.passed >= PASSED_MAX):
            self.passed = 0
        elif priority != order[-1]:
            self.passed += 1
        for ring, who, key in (
            (self.lanes[priority], principal, priority),
            (self.callers[priority, principal], session, (priority, principal)),
        ):
            self.last[key] = who
            ring.remove(who)  # type: ignore[arg-type]
            ring.append(who)  # type: ignore[arg-type]


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 150))
def test_the_queue_agrees_with_the_plain_model(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    bench, queue, model, sort = Bench(), Queue(), Plain(), Lines()
    sessions = [bench.session(name) for name in "aaabbcd"]
    workers = [worker(methods) for methods in (None, None, "x", "xy")]
    for each in workers:
        sort.declare(each.methods)
    waiting: list[Request] = []
    for _ in range(steps):
        match rng.choice("pppptttfdw"):
            case "p" | "f" as how:
                request = bench.request(rng.choice(sessions), rng.choice("xyz"), priority=rng.choice((0, 0, 2, -1)))
                waiting.append(request)
                (queue.put if how == "p" else queue.put_first)(request, sort.of(request.method))
                model.put(request, first=how == "f")
            case "d" if waiting:
                request = waiting.pop(rng.randrange(len(waiting)))
                queue.discard(request)
                model.discard(request)
            case "w":  # a worker says anew what it can do
                each = rng.choice(workers)
                before, each.methods = each.methods, rng.choice((None, frozenset("x"), frozenset("yz"), frozenset()))
                sort.declare(each.methods)
                sort.withdraw(before)
                queue.sort(lambda request: sort.of(request.method))
            case _:
                each = rng.choice(workers)
                wanted = model.take(each.methods)
                assert queue.take(each, NOW) is wanted
                if wanted is not None:
                    waiting.remove(wanted)
        assert len(queue) == len(waiting) and set(queue) == set(waiting)
        shares = [sum(r.session.principal == name for r in waiting) for name in "abcd"]
        room = queue.displaced("nobody")
        assert (room is not None) == (max(shares) > 1)
