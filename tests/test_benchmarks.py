"""Every benchmark runs, in a short form. What it measures is not judged here: this machine may be busy."""

import subprocess
import sys

import pytest

SHORT = {
    "table": ["--pending", "0,1000", "--count", "500", "--repeat", "1"],
    "expire": ["--requests", "2000"],
    "publish": ["--listeners", "200"],
    "flood": ["--calls", "20", "--repeat", "1", "--workers", "2", "--window", "40"],
    "http": ["--calls", "100", "--repeat", "1"],
    "stream": ["--mb", "4", "--repeat", "1"],
    "embedding": ["--threads", "8", "--calls", "160", "--repeat", "1"],
    "kernels": ["--cells", "10", "--mb", "3"],
    "front_ends": ["--count", "20", "--repeat", "1"],
    "sdk": ["--calls", "200", "--repeat", "1", "--memory", "1000"],
}


@pytest.mark.parametrize("name", SHORT)
def test_a_benchmark_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *SHORT[name]],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr  # 1: a goal was missed
    assert "Traceback" not in done.stderr
    assert any(character.isdigit() for character in done.stdout), "no figures"


@pytest.mark.timeout(120)
def test_a_slow_reader_of_a_long_stream_leaves_the_brokers_memory_flat() -> None:
    """64 MB at 4 MB/s: at most 32 MiB more, else the exit code is 1. Two gigabytes as a command."""
    command = [sys.executable, "-m", "benchmarks.stream", "--slow", "--mb", "64", "--rate", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 MB at 4 MB/s" in done.stdout
