"""Very many requests while workers are killed at random: `python -m tests.chaos.kills --requests 1000000`.

All of them end, and nothing is left in the broker's tables.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from broker import AsyncClient
from broker.peer.errors import BrokerError
from tests.chaos.run import HELD, PATIENCE_S, WorkerProcess, rss_bytes
from tests.daemon.process import Daemon, daemon

WORKERS = 2
IN_FLIGHT = 200


class Kills:
    """One run. Afterwards `left` says what the broker still holds: nothing, if all is well."""

    def __init__(self, requests: int, folder: Path, seed: int) -> None:
        self.requests = requests
        self.folder = folder
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.kills = 0
        self.left: dict[str, float] = {}
        self.rss_bytes: list[int] = []
        self._asked = 0

    @property
    def ended(self) -> int:
        """How many requests have ended at their caller."""
        return sum(self.outcomes.values())

    def run(self) -> None:
        """Ask them all."""
        with daemon(self.folder, "--log-level", "info") as running:
            workers = [
                WorkerProcess(f"worker{number}", self.folder, running.url, running.token, 64)
                for number in range(WORKERS)
            ]
            try:
                asyncio.run(self._main(running, workers))
            finally:
                for worker in workers:
                    worker.signal(signal.SIGKILL)

    async def _main(self, running: Daemon, workers: list[WorkerProcess]) -> None:
        async with AsyncClient(running.url, running.token) as client:
            for worker in workers:
                worker.start()
            await client.call("data/echo", {"tag": "-", "data": b""}, wait=True, timeout=PATIENCE_S)
            self.rss_bytes.append(rss_bytes(running.process.pid))
            killer = asyncio.ensure_future(self._kill(workers))
            await asyncio.gather(*(self._ask(client) for _ in range(IN_FLIGHT)))
            killer.cancel()
            await asyncio.gather(killer, return_exceptions=True)
            metrics = running.metrics()
            self.rss_bytes.append(rss_bytes(running.process.pid))
        self.left = {name: metrics[name] for name in HELD if metrics[name]}
        ended = sum(count for name, count in metrics.items() if name.startswith("broker_requests_ended_total"))
        if metrics["broker_requests_accepted_total"] != ended:
            self.left["books"] = metrics["broker_requests_accepted_total"] - ended

    async def _ask(self, client: AsyncClient) -> None:
        while self._asked < self.requests:
            self._asked += 1
            seconds = self.random.choice((0.0, 0.0, 0.0, 0.0, 0.02))
            params = {"tag": "-", "data": b"", "seconds": seconds}
            again = self.random.random() < 0.1
            try:
                await client.call("data/echo", params, timeout=20, wait=True, idempotent=again)
            except BrokerError as error:
                self.outcomes[error.outcome] += 1
            else:
                self.outcomes["ok"] += 1

    async def _kill(self, workers: list[WorkerProcess]) -> None:
        """Kill one after some hundred or thousand requests, again and again; each comes back at once."""
        while True:
            until = self.ended + self.random.randrange(200, 3000)
            while self.ended < until:
                await asyncio.sleep(0.002)
            worker = self.random.choice(workers)
            worker.signal(signal.SIGKILL)
            self.kills += 1
            worker.start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(given.requests, Path(folder), given.seed)
        kills.run()
    took_s = time.monotonic() - began
    print(f"{kills.ended} requests in {took_s:.0f} s, {kills.kills} kills: {dict(kills.outcomes.most_common())}")
    print(f"the broker's memory: {' → '.join(f'{size >> 20} MiB' for size in kills.rss_bytes)}")
    print(f"left in its tables: {kills.left or 'nothing'}")
    return 1 if kills.left or kills.ended != given.requests else 0


if __name__ == "__main__":
    sys.exit(main())
