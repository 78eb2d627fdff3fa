"""Requests, broadcasts, connections: what they cost this broker and its peers, side by side in one run.

`python -m benchmarks.loads [--repeat 3] [--seconds 1.5] [--subjects ours,floor,nats] [--loads 16x16,idle]`

Figures are processor time of the process in the middle (all its threads and children) per completed request of four
messages, as the generator reads it; per delivery for `fan-out`, per connection for `accept`; KiB for `idle`. N×M is
callers × requests in flight of each, four workers. What is measured has one processor, the generator the other.
Subjects take turns, and turn round from one repetition to the next; the best repetition of each counts, because
neighbours on a shared machine only ever add.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.subjects import Figures, peers, subject

LOADS: Mapping[str, dict[str, Any]] = {
    "idle": {"mode": "idle", "idle": 2000, "seconds": 1.0},
    "1x1": {"callers": 1},
    "16x1": {"callers": 16},
    "16x16": {"callers": 16, "flight": 16},
    "128x1": {"callers": 128},
    "128x16": {"callers": 128, "flight": 16},
    "16KiB": {"callers": 16, "flight": 16, "bytes": 16_384},
    "fan-out": {"mode": "publish", "listeners": 1000},
    "accept": {"mode": "accept", "idle": 16},
}
SLOW = {"crossbar": ("1x1", "16x1", "16x16", "128x1", "128x16", "fan-out", "accept")}
"""Crossbar needs minutes for the rest"""
SMALLEST = ("cpu_us", "p50_us", "p99_us", "kib_each")
LARGEST = ("per_s", "per_cpu_s")

Told = Callable[[str], None]


def best(found: Iterable[Figures]) -> Figures:
    """Of each figure the best there was; of what is not judged, the last."""
    joined: Figures = {}
    for one in found:
        for name, value in one.items():
            pick = min if name in SMALLEST else max if name in LARGEST else None
            joined[name] = pick(joined[name], value) if pick and name in joined else value
    return joined


def measure(
    subjects: Sequence[str], loads: Sequence[str], repeat: int, seconds: float, tell: Told
) -> dict[str, dict[str, Figures]]:
    """By load and subject, the best of the repetitions. What a subject cannot do is told and left out."""
    found: dict[str, dict[str, list[Figures]]] = {load: {name: [] for name in subjects} for load in loads}
    for repetition in range(repeat):
        for name in subjects if repetition % 2 == 0 else list(reversed(subjects)):
            with subject(name) as system:
                for load in loads:
                    if load not in SLOW.get(name, loads):
                        continue
                    try:
                        one = system.run(**{"seconds": seconds, "warm": seconds / 3, **LOADS[load]})
                    except RuntimeError as error:
                        tell(f"{load}: {error}")
                        continue
                    found[load][name].append(one)
                    tell(f"{repetition + 1}/{repeat} {name} {load}: {one.get('cpu_us', one.get('kib_each'))}")
    return {load: {name: best(all_of) for name, all_of in row.items() if all_of} for load, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loads", description="CPU of the broker per request")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="measured, of each load")
    parser.add_argument("--subjects", default=",".join(("ours", "pure", "floor", *peers())))
    parser.add_argument("--loads", default=",".join(LOADS))
    given = parser.parse_args()
    found = measure(
        given.subjects.split(","), given.loads.split(","), given.repeat, given.seconds,
        lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
