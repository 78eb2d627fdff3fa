"""Every benchmark runs, in a short form. What it measures is not judged here: this machine may be busy."""

import subprocess
import sys

import pytest

SHORT = {
    "table": ["--pending", "0,1000", "--count", "500", "--repeat", "1"],
    "expire": ["--requests", "2000"],
    "publish": ["--listeners", "200"],
    "http": ["--calls", "100", "--repeat", "1"],
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
