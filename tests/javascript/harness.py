"""A broker process that can be killed and started again on its port, and the tools the tests need beside Python."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STATIC = ROOT / "broker" / "admin" / "web" / "static"
TOKEN = "a-token-for-the-tests-of-pages-and-scripts-0123456789"
PATIENCE_S = 30.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, politely."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.01)


def tool(name: str) -> str:
    """The path of a program. Where it is not installed the test is skipped, or fails where CI is true."""
    path = shutil.which(name)
    if path is None:
        missing(f"{name} is not installed")
    assert path is not None
    return path


def npm_packages() -> Path:
    """Where npm put what `package.json` names."""
    folder = HERE / "node_modules"
    if not folder.is_dir():
        missing("run `npm install` in tests/javascript first")
    return folder


def missing(reason: str) -> None:
    """What a test needs is not there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class BrokerProcess:
    """`broker serve`, its log in a file. `start` again after `stop` or `kill` takes the same port."""

    def __init__(self, folder: Path) -> None:
        for name in ("run", "state"):
            (folder / name).mkdir(mode=0o700)
        self._folder = folder
        self._log_file = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.url = ""
        self.start()

    def start(self) -> None:
        """Returns when it serves."""
        given = {key: value for key, value in os.environ.items() if not key.startswith("BROKER_")}
        given |= {"XDG_RUNTIME_DIR": str(self._folder / "run"), "XDG_STATE_HOME": str(self._folder / "state")}
        given["BROKER_AUTH__ADMIN_TOKEN"] = TOKEN
        with self._log_file.open("wb") as log:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "broker", "serve", "--port", str(self.port)],
                cwd=self._folder, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: process.poll() is not None or " serves on " in self.log(), "the broker serves")
        found = re.search(r" serves on (http://[^\s\"]+:(\d+))", self.log())
        assert found, self.log()
        self.url, self.port = found[1], int(found[2])

    def log(self) -> str:
        return self._log_file.read_text("utf-8", "replace")

    def kill(self) -> None:
        """As a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """Drain and end; a broker that was killed is left alone."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(15)
        finally:
            self._process.kill()
