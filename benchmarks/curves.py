"""How the cost of a request grows: with connections, requests in flight, endpoints, workers, listeners, bytes.

`python -m benchmarks.curves [--only in_flight] [--most 1000000] [--repeat 2] [--seconds 1.0]`

Each point is a broker started for it, the best of the repetitions, in processor time of the broker. A curve should be
flat, or linear where each request has more to do (bytes). nats-server stands beside it where it has the same thing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.loads import Told, best
from benchmarks.subjects import Figures, peers, subject

MB = 1 << 20
ROOMY = {
    "BROKER_LIMITS__QUEUE_MAX": "2000000",
    "BROKER_LIMITS__IN_FLIGHT_MAX": "2000000",
    "BROKER_LIMITS__DEADLINE_S": "600",
    "BROKER_LIMITS__DEADLINE_MAX_S": "600",
    "BROKER_LIMITS__MEMORY_SOFT_BYTES": str(8 << 30),
    "BROKER_LIMITS__MEMORY_HARD_BYTES": str(12 << 30),
    "BROKER_LIMITS__OUTBOX_SOFT_BYTES": str(512 * MB),
    "BROKER_LIMITS__OUTBOX_HARD_BYTES": str(768 * MB),
    "BROKER_LIMITS__OUTBOX_READING_BYTES": str(1 << 30),
}
"""room for a million requests in flight"""
MANY_ACCEPTS = {"BROKER_LIMITS__ACCEPTS_PER_S": "100000"}


@dataclass(frozen=True)
class Curve:
    """One figure as a function of one number."""

    title: str
    axis: str
    points: tuple[int, ...]
    options: Callable[[int], dict[str, Any]]
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False
    """whether nats-server is measured too"""
    unit: str = "CPU µs per request"
    most_beside: int = 1 << 60
    linear: bool = False
    """whether each request has more to do the further right it stands"""


def _in_flight(count: int) -> dict[str, Any]:
    callers = min(100, count)
    return {"callers": callers, "flight": count // callers}


CURVES: Mapping[str, Curve] = {
    "connections": Curve(
        "Connections, one request in flight on each", "connections", (1, 10, 100, 1000, 10_000),
        lambda n: {"callers": n}, {**ROOMY, **MANY_ACCEPTS}, beside=True,
    ),
    "in_flight": Curve(
        "In flight, waiting in the endpoint's queue", "requests in flight",
        (1, 10, 100, 1000, 10_000, 100_000, 1_000_000), _in_flight, ROOMY,
    ),
    "held": Curve(
        "In flight, all given to workers who take their time", "requests in flight",
        (100, 1000, 10_000, 100_000, 1_000_000),
        lambda n: {**_in_flight(n), "hold": n // 5, "worker_path": "/ws/echo?role=worker&capacity=1000000"}, ROOMY,
    ),
    "endpoints": Curve(
        "Endpoints, asked in turn, 16×16", "endpoints", (1, 10, 100, 1000, 10_000),
        lambda n: {"callers": 16, "flight": 16, "workers": min(n, 16), "endpoints": n},
    ),
    "workers": Curve(
        "Workers of one endpoint, 64×16", "workers", (1, 10, 100, 1000),
        lambda n: {"callers": 64, "flight": 16, "workers": n}, MANY_ACCEPTS, beside=True,
    ),
    "listeners": Curve(
        "Listeners of one broadcast", "listeners", (1, 10, 100, 1000, 10_000),
        lambda n: {"mode": "publish", "listeners": n}, MANY_ACCEPTS, beside=True, unit="CPU µs per delivery",
    ),
    "bytes": Curve(
        "Bytes of request and of reply, 4×1", "bytes",
        (0, 128, 1024, 4096, 16_384, 65_536, 262_144, MB, 4 * MB, 10 * MB), lambda n: {"callers": 4, "bytes": n},
        beside=True, most_beside=MB - 1024, linear=True,
    ),
}  # fmt: skip


def measure(name: str, repeat: int, seconds: float, most: int, tell: Told) -> dict[str, list[Figures]]:
    """By subject, the points of one curve up to `most`. A point that failed is told and left out."""
    curve = CURVES[name]
    subjects = ["ours", *(["nats"] if curve.beside and "nats" in peers() else [])]
    found: dict[str, list[Figures]] = {each: [] for each in subjects}
    for point in (each for each in curve.points if each <= most):
        for system in subjects:
            if system != "ours" and point > curve.most_beside:
                continue
            rounds = []
            for _ in range(1 if point > 100_000 and not curve.linear else repeat):
                try:
                    with subject(system, curve.environment) as running:
                        rounds.append(running.run(**{"seconds": seconds, "warm": seconds / 3, **curve.options(point)}))
                except RuntimeError as error:
                    tell(f"{name} {point}: {error}")
            if rounds:
                found[system].append({"at": point, **best(rounds)})
                tell(f"{name} {system} {point}: {found[system][-1]['cpu_us']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description="how the cost of a request grows")
    parser.add_argument("--only", choices=tuple(CURVES), action="append", help="some of the curves")
    parser.add_argument("--most", type=int, default=1 << 60, help="leave out points beyond this")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    for name in given.only or CURVES:
        found = measure(
            name, given.repeat, given.seconds, given.most, lambda text: print(text, file=sys.stderr, flush=True)
        )
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
