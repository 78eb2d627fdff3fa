"""Every published figure, with one command: `python -m benchmarks.all [--only loads,curves] [--out docs] [--short]`.

Each part is a benchmark of its own, run as a command; its progress is shown, its figures are the lines of JSON that it
prints. They are written to `OUT/performance/figures.json`, together with the machine, its load and the commit; from
that file alone come the plots beside it and the tables of `OUT/performance.md`. With `--only`, the other parts stay as
they were measured before. Peers are measured where they are installed. All of it takes about 40 minutes; `--short` a
few minutes, for figures that are good for nothing but seeing that everything runs. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from benchmarks.processes import ROOT
from benchmarks.subjects import peers
from broker.links.compiled import core

PARTS: dict[str, tuple[str, str]] = {  # command, and what makes it short
    "loads": ("loads --repeat 3", "--repeat 1 --seconds 0.3 --subjects ours,floor --loads 16x16,fan-out"),
    "curves": ("curves --repeat 2", "--repeat 1 --seconds 0.2 --most 100"),
    "secure": ("secure --repeat 3", "--repeat 1 --seconds 0.3 --loads 16x1"),
    "zeromq": ("zeromq", "--repeat 1 --requests 100 --loads 16x1 --counts 50"),
    "kernels": ("kernels --json", "--cells 10 --mb 3"),
    "front_ends": ("front_ends --json", "--count 20 --repeat 1"),
    "bulk": ("bulk --repeat 3", "--repeat 1 --whole 1 --parts 10 --seconds 0.2"),
    "counts": ("counts", "--requests 100"),
    "counts_pure": ("counts --pure", "--requests 100"),
    "path": ("path --rounds 400", "--rounds 20"),
    "path_pure": ("path --rounds 400 --pure", "--rounds 20"),
    "table": ("table --json", "--pending 0,1000 --count 500 --repeat 1"),
    "http": ("http --json", "--calls 100 --repeat 1"),
    "stream": ("stream --json", "--mb 4 --repeat 1"),
    "slow_reader": ("stream --slow --json", "--mb 16 --rate 8"),
    "embedding": ("embedding --json", "--threads 8 --calls 160 --repeat 1"),
    "sdk": ("sdk --json --memory 200000", "--calls 200 --repeat 1 --memory 1000"),
    "expire": ("expire", "--requests 2000 --lead 2"),
    "publish": ("publish", "--listeners 200 --publishes 3"),
    "flood": ("flood", "--calls 20 --repeat 1 --workers 2 --window 40"),
}


def run(name: str, *, short: bool) -> dict[str, Any]:
    """One part: its figures, when and beside which load they were measured. SystemExit if it failed."""
    command, shortened = PARTS[name]
    module, *words = [*command.split(), *(shortened.split() if short else [])]
    began, load = time.monotonic(), os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *words], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode not in (0, 1) or not found:  # 1: a goal was missed, which the figures say
        raise SystemExit(f"benchmarks.{module} {' '.join(words)} ended with {done.returncode}")
    return {
        "at": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
        "seconds": round(time.monotonic() - began),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "figures": {key: value for one in found for key, value in one.items()} if name == "curves" else found,
    }


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    nats = _said("nats-server", "--version") or _said("/usr/sbin/nats-server", "--version")
    crossbar = _said(os.environ.get("CROSSBAR", "crossbar"), "version")
    found = re.search(r"Crossbar\.io\s*:\s*(?:Crossbar\.io COMMUNITY )?([\d.]+)", crossbar)
    return {
        "processor": model[1] if model else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
        "core": core(),
        "nats": nats.rpartition(" ")[2].lstrip("v"),
        "crossbar": found[1] if found else "",
        "peers": peers(),
    }


def _said(*command: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description="every published figure")
    parser.add_argument("--only", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where performance.md and performance/ are")
    parser.add_argument("--short", action="store_true", help="to see that everything runs")
    given = parser.parse_args()
    folder = given.out / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "figures.json"
    names = given.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    known["machine"] = machine()
    for number, name in enumerate(names, 1):
        print(f"=== {number}/{len(names)} {name}", file=sys.stderr, flush=True)
        known["parts"][name] = part = run(name, short=given.short)
        print(f"=== {name}: {part['seconds']} s", file=sys.stderr, flush=True)
        file.write_text(json.dumps(known, indent=1) + "\n")
    plots.draw(known, folder)
    page = given.out / "performance.md"
    if page.exists():
        page.write_text(report.filled(page.read_text(encoding="utf-8"), known), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
