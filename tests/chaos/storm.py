"""Everybody comes back at once: `python -m tests.chaos.storm --clients 10000`.

So many clients of the SDK, each with a session of its own, lose their broker to a SIGKILL; it is started again on the
same port. Measured is how long until all of them are there again. Exit code 1 if that was more than 30 s.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from broker import AsyncClient
from tests.daemon.process import daemon

TOKEN = "storm-token-0123456789-0123456789-abcdef"
CONNECTING = 200
BACK_MAX_S = 30.0
ENVIRONMENT = {"BROKER_AUTH__ADMIN_TOKEN": TOKEN}


class Storm:
    """One storm. `back_s` is how long after the new start the last client was back, `ready_s` the broker itself."""

    def __init__(self, clients: int, folder: Path) -> None:
        self.clients = clients
        self.folder = folder
        self.back_s: dict[float, float] = {}
        """by the share of clients that were back"""
        self.ready_s = 0.0
        self.sessions = 0
        self.answered = 0
        self.cpu_s: dict[str, float] = {}
        """processor time from the new start until all were back, of the broker and of all clients together"""

    def run(self) -> None:
        """Do it."""
        asyncio.run(self._main())

    async def _main(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        with daemon(self.folder, env=ENVIRONMENT) as first:
            port = first.port
            clients = [AsyncClient(first.url, TOKEN, timeout=BACK_MAX_S * 4) for _ in range(self.clients)]
            gate = asyncio.Semaphore(CONNECTING)
            await asyncio.gather(*(self._connect(client, gate) for client in clients))
            first.signal(signal.SIGKILL)
            first.ended()
        await self._until(lambda: not any(client.is_connected for client in clients), "all have noticed")
        try:
            await self._restart(port, clients)
        finally:
            await asyncio.gather(*(client.close() for client in clients))

    async def _restart(self, port: int, clients: list[AsyncClient]) -> None:
        began, own_s = time.monotonic(), time.process_time()
        for stale in (self.folder / "xdg_runtime_dir" / "broker").glob("*.json"):
            stale.unlink()
        with daemon(self.folder, "--port", str(port), env=ENVIRONMENT, wait=False) as second:
            await asyncio.to_thread(second.ready)
            self.ready_s = time.monotonic() - began
            for share in (0.5, 0.9, 0.99, 1.0):
                wanted = int(len(clients) * share)
                await self._until(lambda wanted=wanted: self._back(clients) >= wanted, f"{wanted} are back")  # type: ignore[misc]
                self.back_s[share] = time.monotonic() - began
            self.cpu_s = {"clients": time.process_time() - own_s, "broker": cpu_s(second.process.pid)}
            answers = await asyncio.gather(*(client.ping() for client in clients))
            self.answered = len({answer["peer"] for answer in answers})
            self.sessions = int((await asyncio.to_thread(second.metrics))["broker_sessions"])

    @staticmethod
    async def _connect(client: AsyncClient, gate: asyncio.Semaphore) -> None:
        async with gate:
            await client.connect()

    @staticmethod
    def _back(clients: list[AsyncClient]) -> int:
        return sum(client.is_connected for client in clients)

    @staticmethod
    async def _until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + BACK_MAX_S * 4
        while not condition():
            assert time.monotonic() < deadline, f"never came true: {what}"
            await asyncio.sleep(0.05)


def cpu_s(pid: int) -> float:
    """Processor time of a process so far; to the second."""
    told = subprocess.run(["ps", "-o", "cputime=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    days, _, clock = told.strip().rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + 86_400 * int(days or 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.storm", description="everybody comes back at once")
    parser.add_argument("--clients", type=int, default=10_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(given.clients, Path(folder))
        storm.run()
    print(f"the broker was ready after {storm.ready_s:.2f} s, {storm.answered} clients were answered")
    print(", ".join(f"{share:.0%} back after {seconds:.1f} s" for share, seconds in storm.back_s.items()))
    print(f"processor time meanwhile: {storm.cpu_s['broker']:.1f} s broker, {storm.cpu_s['clients']:.1f} s clients")
    return 1 if storm.back_s[1.0] > BACK_MAX_S or storm.answered != given.clients else 0


if __name__ == "__main__":
    sys.exit(main())
