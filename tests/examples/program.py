"""`python -m examples.realtime` as a process, and a scanner as another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker import Client
from broker.auth.tokens import TokenStore
from tests.daemon.process import REPOSITORY, environment

PATIENCE_S = 30.0


class Process:
    """A process whose output goes to a file; it has ended when the block has."""

    def __init__(self, folder: Path, *command: str, **more: str) -> None:
        self.log_file = folder / f"{'-'.join(command[:2])}.log"
        with self.log_file.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment(folder, {"PYTHONUNBUFFERED": "1", **more}), cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def logged(self, pattern: str, count: int = 1) -> str:
        """Wait until the log matches so often; the last match's first group, or all of it."""
        found = self.until(
            lambda: found if len(found := list(re.finditer(pattern, self.log))) >= count else None, pattern
        )
        return str(found[-1][found[-1].re.groups])

    def until(self, look: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := look()):
            assert time.monotonic() < deadline, f"never came true: {what}\n{self.log[-3000:]}"
            time.sleep(0.02)
        return value

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Program(Process):
    """The program, on a free port."""

    def __init__(self, folder: Path, *flags: str) -> None:
        super().__init__(folder, "examples.realtime", "--port", "0", *flags)
        self.folder = folder

    def __enter__(self) -> Program:
        try:
            self.page = self.logged(r"Open   (\S+)")
        except BaseException:
            self.__exit__()
            raise
        self.url, self.key = self.page.split("/?key=")
        return self

    def client(self) -> Client:
        """As the command line comes in."""
        return Client(f"{self.url}/broker", self.key)

    def scanner(self, times: int = 1) -> Process:
        """A scanner that dials in with a token, as from another machine; which one it is."""
        store = TokenStore(self.folder / "xdg_state_home" / "broker" / "tokens.json")
        _, secret = store.create(f"room-{times}", ("worker",), ("scanner",))
        process = Process(
            self.folder, "examples.realtime.scanner", BROKER_URL=f"{self.url}/broker", BROKER_TOKEN=secret
        )  # fmt: skip
        process.logged("serving scanner", times)
        return process


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True
