"""What one request costs in the table of pending requests, with none, 100,000 or a million others waiting in it.

`python -m benchmarks.table [--pending 0,100000,1000000] [--count 50000] [--repeat 3] [--json]`

Measured is the processor time of this process (`time.process_time`), in microseconds per request, the best of the
repetitions. Before each measurement the table is filled with requests whose deadlines are spread over 30 s, and then
`gc.collect(); gc.freeze()` is called, as the daemon does once it is up: what already waits is not walked over by the
collector while the measurement runs. Event objects are built inside the measured loops.

The columns:

* `table match fresh`: `Pending.open`, then `Pending.close` of that same request, 256 of them in flight at a time.
* `table match any`: `Pending.open`, then `Pending.close` of one drawn at random from all that wait. This is the worst
  case: at a million every step misses the processor's caches.
* `table expire`: `Pending.open`, then `take_due` in slices of 500 and `Pending.close`.
* `router match fresh`, `router match any`: `Asked` in, `Call` out, `Answered` in, `End` out, through
  `Router.handle`, with 64 workers under `least_pending`.
* `router expire`: `Asked` in, `Call` out, then `Router.tick` in slices of 500, `CancelAttempt` and `End` out.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable

from benchmarks.nolink import NoLink
from broker.core.access import Grant, Role
from broker.core.budget import Budget
from broker.core.events import Answered, Asked, Attached
from broker.core.limits import Limits
from broker.core.messages import DEFAULT_OPTIONS, Body, Call, Options
from broker.core.pending import Pending, Request
from broker.core.registry import Endpoint, Registry
from broker.core.router import Router
from broker.core.sessions import Session
from broker.links import compiled
from broker.wire.native import Matcher, match_for
from broker.wire.pieces import join_reply

CALLERS = 128
WORKERS = 64
WINDOW = 256
SLICE = 500
SPREAD_S = 30.0
GOAL_TABLE_US = 2.0
GOAL_ROUTER_US = 4.0
BODY = Body(b'{"path":"a.dcm"}')
RESULT = Body(b"[1]")


def limits_for(pending: int, count: int) -> Limits:
    return Limits(capacity=pending + count + 1, in_flight_max=pending + count + 1)


def attached(number: int, role: Role) -> Attached:
    return Attached(
        session=number, link=NoLink(), principal="bench", grants=(Grant(role),), role=role, endpoint="e",
        listen=False, capacity=1_000_000,
    )  # fmt: skip


class Table:
    """`Pending` alone, filled."""

    def __init__(self, pending: int, count: int) -> None:
        limits = limits_for(pending, count)
        self.pending = Pending(limits, Budget())
        self.endpoint: Endpoint = Registry(limits, {}).get_or_make("e")  # type: ignore[assignment]
        self.sessions = [Session(attached(number, Role.CALLER), 0.0, 1) for number in range(CALLERS)]
        self.next_id = 0
        self.now = 1000.0
        self.waiting = [self.open(self.now + SPREAD_S * (1 + i / pending)) for i in range(pending)]
        random.Random(1).shuffle(self.waiting)

    def open(self, deadline: float) -> Request:
        self.next_id = number = self.next_id + 1
        session = self.sessions[number % CALLERS]
        return self.pending.open(
            session, number // CALLERS, self.endpoint, "m", BODY, DEFAULT_OPTIONS, self.now, deadline
        )

    def match_fresh(self, count: int) -> None:
        close = self.pending.close
        for _ in range(count // WINDOW):
            window = [self.open(self.now + SPREAD_S) for _ in range(WINDOW)]
            for request in window:
                close(request)

    def match_any(self, count: int) -> None:
        close, waiting = self.pending.close, self.waiting
        for index in range(count):
            request = self.open(self.now + SPREAD_S)
            at = index % len(waiting)
            waiting[at], request = request, waiting[at]
            close(request)

    def expire(self, count: int) -> None:
        close, take_due = self.pending.close, self.pending.take_due
        for _ in range(count):
            self.open(self.now + 0.01)
        while due := take_due(self.now + 0.1, SLICE):
            for request in due:
                close(request)
        self.now += 0.1


class Routed:
    """The router, filled: every waiting request is in the hands of a worker."""

    def __init__(self, pending: int, count: int) -> None:
        self.router = Router(limits_for(pending, count), join=join_reply)
        if compiled.wanted() and Matcher is not None:  # as the engine does
            match_for(self.router)
        self.now = 1000.0
        self.next_id = 0
        for number in range(CALLERS + WORKERS):
            role = Role.CALLER if number < CALLERS else Role.WORKER
            self.router.handle(attached(number, role), self.now)
        self.sessions = list(self.router.sessions.by_id.values())[:CALLERS]
        self.waiting = [self.ask(Options(timeout=SPREAD_S * (1 + i / pending))) for i in range(pending)]
        random.Random(1).shuffle(self.waiting)

    def ask(self, options: Options) -> Call:
        self.next_id = number = self.next_id + 1
        effects = self.router.handle(
            Asked(self.sessions[number % CALLERS], number // CALLERS, "e", "m", BODY, options), self.now
        )
        call = effects[0].message  # type: ignore[union-attr]
        effects.clear()
        assert type(call) is Call
        return call

    def match_fresh(self, count: int) -> None:
        asked, answered = self.router.handlers[Asked], self.router.handlers[Answered]
        effects, sessions, now, number = self.router.effects, self.sessions, self.now, self.next_id
        for _ in range(count // WINDOW):
            for _ in range(WINDOW):
                number += 1
                asked(Asked(sessions[number % CALLERS], number // CALLERS, "e", "m", BODY, DEFAULT_OPTIONS), now)
            calls = [effect.message.attempt for effect in effects]  # type: ignore[union-attr]
            effects.clear()
            for attempt in calls:
                answered(Answered(attempt.registration.session, attempt.id, RESULT), now)
            effects.clear()
        self.next_id = number

    def match_any(self, count: int) -> None:
        asked, answered = self.router.handlers[Asked], self.router.handlers[Answered]
        effects, sessions, now, number = self.router.effects, self.sessions, self.now, self.next_id
        waiting = self.waiting
        for index in range(count):
            number += 1
            asked(Asked(sessions[number % CALLERS], number // CALLERS, "e", "m", BODY, DEFAULT_OPTIONS), now)
            at = index % len(waiting)
            attempt = waiting[at].attempt
            waiting[at] = effects[0].message  # type: ignore[union-attr, assignment]
            answered(Answered(attempt.registration.session, attempt.id, RESULT), now)
            effects.clear()
        self.next_id = number

    def expire(self, count: int) -> None:
        asked, tick, options = self.router.handlers[Asked], self.router.tick, Options(timeout=0.01)
        effects, sessions, now, number = self.router.effects, self.sessions, self.now, self.next_id
        for _ in range(count):
            number += 1
            asked(Asked(sessions[number % CALLERS], number // CALLERS, "e", "m", BODY, options), now)
            effects.clear()
        self.next_id = number
        self.now = now = now + 0.1
        while tick(now, SLICE):
            effects.clear()
        effects.clear()


def cost_us(run: Callable[[int], None], count: int, repeat: int) -> float:
    """Processor time per request, the best of the repetitions. A short first run warms the interpreter up."""
    run(WINDOW)
    best = float("inf")
    for _ in range(repeat):
        gc.collect()
        gc.freeze()
        started = time.process_time()
        run(count)
        best = min(best, time.process_time() - started)
    return best / count * 1e6


def measure(pending: int, count: int, repeat: int) -> dict[str, float]:
    """All columns with that many requests pending."""
    count = max(count // WINDOW, 1) * WINDOW
    found: dict[str, float] = {"pending": pending}
    makers: tuple[tuple[str, type[Table | Routed]], ...] = (("table", Table), ("router", Routed))
    for name, maker in makers:
        subject = maker(pending, count)
        found[f"{name} match fresh"] = cost_us(subject.match_fresh, count, repeat)
        if pending:
            found[f"{name} match any"] = cost_us(subject.match_any, count, repeat)
        found[f"{name} expire"] = cost_us(subject.expire, count, repeat)
        del subject
        gc.unfreeze()
        gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU µs per request in the table of pending requests")
    parser.add_argument("--pending", default="0,100000,1000000", help="how many wait, comma-separated")
    parser.add_argument("--count", type=int, default=50_000, help="requests per repetition")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    given = parser.parse_args()
    columns = [f"{part} {what}" for part in ("table", "router") for what in ("match fresh", "match any", "expire")]
    if not given.json:
        print("CPU µs per request, best of", given.repeat)
        print(f"{'pending':>10}", *(f"{column:>18}" for column in columns))
    for text in given.pending.split(","):
        found = measure(int(text), given.count, given.repeat)
        if given.json:
            print(json.dumps(found), flush=True)
        else:
            cells = (f"{found[column]:18.2f}" if column in found else f"{'–':>18}" for column in columns)
            print(f"{found['pending']:>10}", *cells, flush=True)
    if not given.json:
        goals = (GOAL_TABLE_US if column.startswith("table") else GOAL_ROUTER_US for column in columns)
        print(f"{'goal ≤':>10}", *(f"{goal:18.2f}" for goal in goals))


if __name__ == "__main__":
    main()
