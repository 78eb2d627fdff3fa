"""What was freed after large messages is used again, and not more of it kept than is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from broker.daemon.memory import KEPT_MAX_BYTES

ROUNDS = """
import json, resource
from pathlib import Path
from broker.daemon.memory import keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

def faults(count, mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = []
    for _ in range(10):
        held = [bytes(bytearray(b"x") * (mib << 20)) for _ in range(count)]
        held.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = resident_mib()
kept = keep_freed_memory()
few = faults(2, 10)
many = faults(10, 10)
print(json.dumps({"kept": kept, "few": few, "grown": resident_mib() - before}))
"""


def rounds(**more: str) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | more
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_used_again_and_no_more_kept_than_is_said() -> None:
    ours = rounds()
    if not ours["kept"]:
        pytest.skip("another C library")
    assert ours["few"] < 20_000, "2,560 pages of 4 KiB each time three blocks of 10 MiB are made: 76,800 in all"
    assert ours["grown"] <= (KEPT_MAX_BYTES >> 20) + 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_whoever_has_set_it_in_the_environment_has_decided() -> None:
    assert not rounds(MALLOC_TRIM_THRESHOLD_="100000")["kept"]
