"""Other processes: starting a daemon, what processor time and memory they use, which processor they run on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from broker.links.compiled import PURE

START_S = 30.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Daemon:
    """A broker that serves, as a process of its own."""

    url: str
    pid: int
    environment: dict[str, str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def token(self, name: str, role: str) -> str:
        """Make a token."""
        command = [sys.executable, "-m", "broker", "token", "create", name, "--role", role]
        done = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()


@contextmanager
def daemon(
    environment: Mapping[str, str] | None = None, *, processor: int | None = None, pure: bool = False
) -> Iterator[Daemon]:
    """`broker serve` on a free port, with files of its own, for the length of the block.

    `environment` configures it (`BROKER_LIMITS__…`); `processor` is the only one it may run on; `pure` leaves the
    compiled core out. It has ended when the block has. SystemExit, with its log, if it does not start in 30 s.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        files = {"BROKER_AUTH__TOKENS_FILE": f"{folder}/tokens.json", "XDG_RUNTIME_DIR": folder, "PYTHONPATH": _path()}
        variables = {**os.environ, **files, **({PURE: "1"} if pure else {}), **(environment or {})}
        log = Path(folder, "log")
        with log.open("w") as stream:
            command = pinned([sys.executable, "-P", "-m", "broker", "serve", "--port", "0"], processor)
            process = subprocess.Popen(command, env=variables, stderr=stream, stdout=stream, cwd=folder)
        try:
            yield Daemon(_url(process, log), process.pid, variables)
        finally:
            end(process)


def _path() -> str:
    """This tree first, whatever is installed."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The daemon's URL, from its log."""
    ends_at = time.monotonic() + START_S
    while time.monotonic() < ends_at and process.poll() is None:
        found = re.search(r"serves on (https?://[^\s\"]+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise SystemExit("the daemon did not start:\n" + log.read_text())


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL if that is not heard within ten seconds."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def pinned(command: Sequence[str], processor: int | None) -> list[str]:
    """The same command on one processor."""
    return list(command) if processor is None else ["taskset", "-c", str(processor), *command]


def processors() -> tuple[int, int]:
    """One for what is measured, one for the load; the same one where there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


def family(pid: int) -> list[int]:
    """A process and all that came of it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def cpu_s(pid: int) -> float:
    """Processor time of a process, all its threads, in seconds, to the nanosecond."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def rss_kib(pid: int) -> int:
    """Resident memory of a process, in KiB."""
    return _status(pid, "VmRSS")


def peak_kib(pid: int) -> int:
    """The most memory a process ever had resident, in KiB."""
    return _status(pid, "VmHWM")


def _status(pid: int, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])
