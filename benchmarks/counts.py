"""What one request costs in things that can be counted, whoever else uses the machine.

`python -m benchmarks.counts [--requests 1000] [--pure]` prints one JSON object:

    reads, writes      read(2) and write(2) calls per request, from /proc/PID/io
    calls              system calls of any kind per request, where strace may attach (absent otherwise)
    bytes_out          bytes that the broker writes per request, as the generator receives them
    blocks, kib        memory blocks of Python, and KiB, that one request holds while it waits for its answer
    blocks_left        blocks still held when all have been answered: slots of deadlines, however many they were
    instructions       of the processor, between bytes in and bytes out, where valgrind is installed (absent otherwise)

Calls, bytes: one caller, one request in flight, so that nothing depends on what gathers in a turn of the loop. Each is
the difference of a long run and a short one, so that starting, connecting and leaving are not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path as File

from benchmarks.path import PER_ROUND, Path
from benchmarks.processes import ROOT
from benchmarks.subjects import Subject, subject
from broker.links.compiled import PURE

SHORT = 100
WAITING_ROUNDS = 8
CALLGRIND_ROUNDS = 4
ATTACH_S = 10


def wire_counts(requests: int, *, pure: bool = False) -> dict[str, float]:
    """System calls and bytes per request of a daemon with one caller and one worker."""
    with subject("pure" if pure else "ours") as system:
        _asked(system, SHORT)
        short, long = _io(system, SHORT), _io(system, SHORT + requests)
        counts: dict[str, float] = {
            name: round((long[name] - short[name]) / requests, 3) for name in ("syscr", "syscw", "bytes")
        }
        calls = _traced(system, SHORT + requests), _traced(system, SHORT)
    found = {"reads": counts["syscr"], "writes": counts["syscw"], "bytes_out": counts["bytes"]}
    if calls[0] is not None and calls[1] is not None:
        found["calls"] = round((calls[0] - calls[1]) / requests, 3)
    return found


def _asked(system: Subject, count: int) -> float:
    """Make so many requests; how many bytes came."""
    found = system.run(callers=1, workers=1, count=count)
    return float(found["bytes_each"]) * count


def _io(system: Subject, count: int) -> dict[str, float]:
    def calls() -> dict[str, float]:
        text = File(f"/proc/{system.pid}/io").read_text()
        return {name: float(value) for name, value in re.findall(r"(\w+): (\d+)", text)}

    before = calls()
    received = _asked(system, count)
    after = calls()
    return {"bytes": received, **{name: after[name] - before[name] for name in ("syscr", "syscw")}}


def _traced(system: Subject, count: int) -> int | None:
    """System calls of the daemon's threads while so many requests are made; None where strace is not or may not."""
    if shutil.which("strace") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = ["strace", "-f", "-c", "-o", f"{folder}/counts", "-p", str(system.pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        attached = "attached" in tracer.stderr.readline()
        if attached:
            _asked(system, count)
            tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=ATTACH_S)
        if not attached:
            return None
        total = re.search(r"^\s*100\.00\s+[\d.]+\s+\d+\s+(\d+)", File(folder, "counts").read_text(), re.MULTILINE)
        return int(total[1]) if total else None


async def _held(rounds: int) -> dict[str, float]:
    path = Path()
    await asyncio.sleep(0)
    for _ in range(rounds):  # so that tables and lists have grown as far as they will
        path.take_in(path.requests())
    path.take_in(path.answers())
    for _, transport in path.callers:
        transport.written.clear()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    requests = rounds * PER_ROUND
    texts = [path.requests() for _ in range(rounds)]
    size, blocks = tracemalloc.get_traced_memory()[0], sys.getallocatedblocks()
    for text in texts:
        path.take_in(text)
    written = sum(len(data) for _, transport in path.workers for data in transport.written)
    held_size, held_blocks = tracemalloc.get_traced_memory()[0] - written, sys.getallocatedblocks()
    path.take_in(path.answers())
    for _, transport in path.callers:
        transport.written.clear()
    del texts, text
    left = sys.getallocatedblocks()
    tracemalloc.stop()
    gc.enable()
    path.router.check()
    path.engine.stop()
    return {
        "blocks": round((held_blocks - blocks) / requests, 2),
        "kib": round((held_size - size) / requests / 1024, 3),
        "blocks_left": left - blocks,
    }


def memory_counts(rounds: int = WAITING_ROUNDS) -> dict[str, float]:
    """What a request holds that waits with `rounds` × 256 others, in this process."""
    return asyncio.run(_held(rounds))


def instructions(*, pure: bool = False) -> float | None:
    """Instructions per request without sockets, by callgrind; None where that is not installed."""
    if shutil.which("valgrind") is None or shutil.which("callgrind_control") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        command += [sys.executable, "-m", "benchmarks.path", "--callgrind", "--rounds", str(CALLGRIND_ROUNDS)]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
        command += ["--pure"] if pure else []
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or collected is None:
        raise RuntimeError(f"callgrind failed: {done.stderr[-500:]}")
    return round(int(collected[1]) / (CALLGRIND_ROUNDS * PER_ROUND))


def measure(requests: int, *, pure: bool = False) -> dict[str, float]:
    """All counts. `blocks` and `kib` are those of this process, compiled core or not."""
    found = {**wire_counts(requests, pure=pure), **memory_counts()}
    counted = instructions(pure=pure)
    return found if counted is None else {**found, "instructions": counted}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description="what a request costs, counted")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pure", action="store_true", help="without the compiled core")
    given = parser.parse_args()
    if given.pure:
        os.environ[PURE] = "1"
    print(json.dumps(measure(given.requests, pure=given.pure)))


if __name__ == "__main__":
    main()
