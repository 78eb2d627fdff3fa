"""What one request costs in things that can be counted, whoever else uses the machine.

`python -m benchmarks.counts [--requests 1000] [--pure]` prints one JSON object:

    reads, writes      system calls per request that receive and send, read and write, where strace may attach (absent
    calls              otherwise), and those of any kind
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
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path as File

from benchmarks.path import PER_ROUND, Path
from benchmarks.processes import ROOT
from benchmarks.subjects import Subject, subject
from broker.links.compiled import PURE

SHORT = 100
WAITING_ROUNDS = 8
CALLGRIND_ROUNDS = 4
ATTACH_S = 10
READS = ("read", "readv", "recvfrom", "recvmsg")
WRITES = ("write", "writev", "sendto", "sendmsg")


def wire_counts(requests: int, *, pure: bool = False) -> dict[str, float]:
    """System calls and bytes per request of a daemon with one caller and one worker."""
    with subject("pure" if pure else "ours") as system:
        _asked(system, SHORT)
        short, long = _asked(system, SHORT), _asked(system, SHORT + requests)
        found = {"bytes_out": round((long - short) / requests, 3)}
        return found | system_calls(system.pid, requests, lambda count: _asked(system, count))


def _asked(system: Subject, count: int) -> float:
    """Make so many requests; how many bytes came."""
    found = system.run(callers=1, workers=1, count=count)
    return float(found["bytes_each"]) * count


def system_calls(pid: int, requests: int, ask: Callable[[int], object]) -> dict[str, float]:
    """`reads`, `writes`, all `calls` per request, of which `ask` makes so many; empty where strace cannot attach."""
    found: Counter[str] = Counter()
    for count, times in ((SHORT + requests, 1), (SHORT, -1)):
        calls = _traced(pid, partial(ask, count))
        if calls is None:
            return {}
        for name, number in calls.items():
            found[name] += times * number
    counts = {"reads": sum(found[name] for name in READS), "writes": sum(found[name] for name in WRITES)}
    return {name: round(value / requests, 3) for name, value in (counts | {"calls": found.total()}).items()}


def _traced(pid: int, work: Callable[[], object]) -> dict[str, int] | None:
    """System calls of a process's threads, by name, while work is done; None where strace is not or may not."""
    if shutil.which("strace") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = ["strace", "-f", "-c", "-o", f"{folder}/counts", "-p", str(pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        attached = "attached" in tracer.stderr.readline()
        if attached:
            work()
            tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=ATTACH_S)
        if not attached:
            return None
        # share, seconds, microseconds per call, calls, errors if there were some, name
        lines = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+)(?: +\d+)? +(\w+)$", File(folder, "counts").read_text(), re.M)
        return {name: int(calls) for calls, name in lines if name != "total"}


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
