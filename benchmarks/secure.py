"""What TLS costs: this broker beside a relay that only hands messages on, both with TLS and without.

`python -m benchmarks.secure [--repeat 3] [--seconds 1.5]`

TLS is tornado's, so a link under it is read and written through an IOStream. The relay does the same with the same
links and nothing else, which makes it what the parts cost. 16 workers, because the relay joins each caller to a worker
of its own. Goal: what the broker costs beyond the relay is under TLS no more than 1.5 times what it is without.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.loads import Told, best
from benchmarks.subjects import Figures, subject

LOADS: dict[str, dict[str, Any]] = {
    "16x1": {"callers": 16, "workers": 16},
    "16x16": {"callers": 16, "workers": 16, "flight": 16},
    "16KiB": {"callers": 16, "workers": 16, "flight": 16, "bytes": 16_384},
    "accept": {"mode": "accept", "idle": 16},
}
SUBJECTS = {
    "ours tls": ("ours", True),
    "relay tls": ("relay", True),
    "ours": ("ours", False),
    "relay": ("relay", False),
}
GOAL_RATIO = 1.5


def measure(loads: Sequence[str], repeat: int, seconds: float, tell: Told) -> dict[str, dict[str, Figures]]:
    """By load and subject, the best of the repetitions."""
    found: dict[str, dict[str, list[Figures]]] = {load: {name: [] for name in SUBJECTS} for load in loads}
    for repetition in range(repeat):
        for load in loads:
            for name, (kind, tls) in SUBJECTS.items():
                with subject(kind, tls=tls) as system:
                    one = system.run(**LOADS[load], seconds=seconds, warm=seconds / 3)
                found[load][name].append(one)
                tell(f"{repetition + 1}/{repeat} {name} {load}: {one['cpu_us']}")
    return {load: {name: best(each) for name, each in row.items() if each} for load, row in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secure", description="what TLS costs the broker")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--loads", default=",".join(LOADS))
    given = parser.parse_args()
    found = measure(
        given.loads.split(","), given.repeat, given.seconds, lambda text: print(text, file=sys.stderr, flush=True)
    )
    print(json.dumps(found))
    row = {name: one["cpu_us"] for name, one in found.get("16x16", {}).items()}
    return int(bool(row) and row["ours tls"] - row["relay tls"] > GOAL_RATIO * (row["ours"] - row["relay"]))


if __name__ == "__main__":
    sys.exit(main())
