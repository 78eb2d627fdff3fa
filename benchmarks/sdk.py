"""What the Python SDK costs at both ends, and whether its memory stays flat.

`python -m benchmarks.sdk [--calls 20000] [--repeat 3] [--memory 1000000] [--json]`

A daemon, a worker and the measured client are processes of their own. Figures are processor time per call in
microseconds (this process's `time.process_time` for the client, /proc for the worker), the best of the repetitions,
with 1, 16 and 256 calls in flight. `websockets` is a client of bare `websockets` and `json` that does the least a
caller can do: an id, a dict of futures, one reading task.

`--memory N` makes N calls afterwards and prints the resident memory of client and worker at a tenth of them and at
the end. Goals: client at 16 in flight at most twice `websockets`; worker at most 100 µs; memory flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from websockets.asyncio.client import connect

from benchmarks.processes import cpu_s, daemon, end, rss_kib
from broker import AsyncClient

TOKEN = secrets.token_urlsafe(32)
WORKER = """
import sys
from broker import Worker
worker = Worker("bench", capacity=1000)

@worker.method
def threaded(number: int) -> int:
    return number

@worker.method
async def plain(number: int) -> int:
    return number

worker.run()
"""
IN_FLIGHT = (1, 16, 256)
GOAL_RATIO = 2.0
GOAL_WORKER_US = 100.0

Call = Callable[[int], Awaitable[object]]


async def in_flight(call: Call, calls: int, width: int) -> None:
    """Make so many calls, `width` at a time."""

    async def lane(first: int) -> None:
        for number in range(first, calls, width):
            await call(number)

    await asyncio.gather(*(lane(first) for first in range(width)))


async def measured(call: Call, calls: int, width: int, repeat: int, worker: int) -> tuple[float, float]:
    """Best processor time per call, of this process and of the worker, in µs."""
    await in_flight(call, calls // 10, width)
    best, best_worker = float("inf"), float("inf")
    for _ in range(repeat):
        before, worker_before = time.process_time(), cpu_s(worker)
        await in_flight(call, calls, width)
        best = min(best, (time.process_time() - before) / calls * 1e6)
        best_worker = min(best_worker, (cpu_s(worker) - worker_before) / calls * 1e6)
    return best, best_worker


class Bare:
    """The least a caller over `websockets` can do."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("http", "ws", 1) + "/ws/bench"
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._made = 0

    async def __aenter__(self) -> Bare:
        self._socket = await connect(self._url, additional_headers={"Authorization": f"Bearer {TOKEN}"})
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await self._socket.close()

    async def _read(self) -> None:
        async for text in self._socket:
            reply = json.loads(text)
            self._waiting.pop(reply["id"]).set_result(reply["result"])

    async def call(self, number: int) -> object:
        self._made += 1
        self._waiting[self._made] = future = asyncio.get_running_loop().create_future()
        request = {"jsonrpc": "2.0", "id": self._made, "method": "plain", "params": {"number": number}}
        await self._socket.send(json.dumps(request))
        return await future


async def compare(url: str, worker: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    async with AsyncClient(url, TOKEN) as client, Bare(url) as bare:
        await client.call("bench/plain", {"number": 0}, wait=True, timeout=30)  # the worker is there
        for width in IN_FLIGHT:
            calls, repeat = arguments.calls, arguments.repeat
            ours, plain = await measured(
                lambda n: client.call("bench/plain", {"number": n}), calls, width, repeat, worker
            )
            theirs, _ = await measured(bare.call, calls, width, repeat, worker)
            _, threaded = await measured(
                lambda n: client.call("bench/threaded", {"number": n}), calls, width, repeat, worker
            )
            row = {"in_flight": width, "client": ours, "websockets": theirs, "worker": plain, "worker_thread": threaded}
            rows.append({name: round(value, 1) for name, value in row.items()})
    return rows


async def memory(url: str, worker: int, calls: int) -> dict[str, int]:
    async with AsyncClient(url, TOKEN) as client:

        async def call(number: int) -> object:
            return await client.call("bench/plain", {"number": number})

        await in_flight(call, calls // 10, 256)
        early = {"client_kib": rss_kib(os.getpid()), "worker_kib": rss_kib(worker)}
        await in_flight(call, calls - calls // 10, 256)
        return {
            "calls": calls,
            "client_kib_at_a_tenth": early["client_kib"],
            "client_kib": rss_kib(os.getpid()),
            "worker_kib_at_a_tenth": early["worker_kib"],
            "worker_kib": rss_kib(worker),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with daemon({"BROKER_AUTH__ADMIN_TOKEN": TOKEN}) as running:
        environment = running.environment | {"BROKER_URL": running.url, "BROKER_TOKEN": TOKEN}
        worker = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, stderr=subprocess.DEVNULL)
        try:
            rows = asyncio.run(compare(running.url, worker.pid, arguments))
            flat = asyncio.run(memory(running.url, worker.pid, arguments.memory)) if arguments.memory else {}
        finally:
            end(worker)
    if arguments.json:
        print(json.dumps({"cpu_us_per_call": rows, "memory": flat}))
    else:
        print("CPU µs per call\n" + "".join(f"{name:>14}" for name in rows[0]))
        for row in rows:
            print("".join(f"{value:>14}" for value in row.values()))
        for name, value in flat.items():
            print(f"{name:>24} {value:>10}")
    at_16 = next(row for row in rows if row["in_flight"] == 16)
    return int(at_16["client"] > GOAL_RATIO * at_16["websockets"] or at_16["worker"] > GOAL_WORKER_US)


if __name__ == "__main__":
    sys.exit(main())
