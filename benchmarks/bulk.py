"""Large payloads: 10 MiB in one message, 100 MiB in parts, beside a relay that only hands the same frames on.

`python -m benchmarks.bulk [--whole 10] [--parts 100] [--repeat 3]`

Figures are processor time per MiB that goes through, and by how much the peak memory grew. Whole: one caller, one
worker, so many MiB in the request and in the reply. In parts: a stream with credit, parts of the SDK's size. Goals: at
most twice the relay; memory grows by at most 64 MiB. Exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from benchmarks.processes import peak_kib
from benchmarks.stream import MB, SDK_PART, cpu_per_mb
from benchmarks.subjects import Figures, subject

RATIO_MAX = 2.0
GROWTH_MAX_MIB = 64.0


def whole(mib: float, repeat: int, seconds: float) -> Figures:
    """One message there and one back, of so many MiB."""
    found: Figures = {}
    for _ in range(repeat):
        for name in ("relay", "ours"):
            with subject(name) as system:
                before = peak_kib(system.pid)
                one = system.run(callers=1, workers=1, bytes=int(mib * MB), seconds=seconds, warm=seconds / 3)
                grown = (peak_kib(system.pid) - before) / 1024
            ms = one["cpu_us"] / 1000 / (2 * mib)
            found[f"{name}_ms_per_mib"] = round(min(ms, found.get(f"{name}_ms_per_mib", ms)), 4)
            found[f"{name}_grown_mib"] = round(max(grown, found.get(f"{name}_grown_mib", grown)), 1)
    return found


async def in_parts(mib: float, repeat: int) -> Figures:
    """A stream of so many MiB."""
    relay, _ = await cpu_per_mb("relay", int(mib * MB), SDK_PART, repeat)
    ours, grown = await cpu_per_mb("broker", int(mib * MB), SDK_PART, repeat)
    return {"relay_ms_per_mib": round(relay, 4), "ours_ms_per_mib": round(ours, 4), "ours_grown_mib": round(grown, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk", description="large payloads, whole and in parts")
    parser.add_argument("--whole", type=float, default=10, help="MiB of the message")
    parser.add_argument("--parts", type=float, default=100, help="MiB of the stream")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="measured of the whole message")
    given = parser.parse_args()
    found = {
        "whole": whole(given.whole, given.repeat, given.seconds),
        "parts": asyncio.run(in_parts(given.parts, given.repeat)),
    }
    print(json.dumps(found))
    return int(
        any(
            one["ours_ms_per_mib"] > RATIO_MAX * one["relay_ms_per_mib"] or one["ours_grown_mib"] > GROWTH_MAX_MIB
            for one in found.values()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
