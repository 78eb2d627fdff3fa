"""How long one publish to many listeners holds the event loop.

`python -m benchmarks.publish [--listeners 10000] [--publishes 20] [--goal-ms 10]`

A broker in this process, listeners in others that read everything. Measured is each slice in which copies are written
(`Engine._fan_out`) and each turn in which the outboxes are flushed, and the loop's lag meanwhile, sampled every
millisecond. Exit code 1 if a slice of the best of the publishes was longer than the goal.
"""

# ruff: noqa: ASYNC110 - the broker has no events for what is waited for here

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from typing import Any

import msgspec

from benchmarks.lag import LagProbe, broker_for, connected, many_files, masked, message, share
from broker.config.model import Config
from broker.engine.engine import Engine
from broker.links.link import Writer

CONNECTING = 100


def _listeners(port: int, count: int, publishes: int, results: Any) -> None:
    async def one(gate: asyncio.Semaphore, left: list[int]) -> int:
        async with gate:
            reader, writer = await connected(port, "/ws/lab")
        left[0] -= 1
        if not left[0]:
            results.put("there")
        heard = 0
        for _ in range(publishes):
            heard += b"broker.message" in await message(reader)
        writer.close()
        return heard

    async def main() -> int:
        gate, left = asyncio.Semaphore(CONNECTING), [count]
        return sum(await asyncio.gather(*(one(gate, left) for _ in range(count))))

    many_files()
    results.put(asyncio.run(main()))


async def measure(listeners: int, publishes: int) -> dict[str, float]:
    """Publish to `listeners`; milliseconds."""
    limits = {"unauthenticated_max": 100_000, "accepts_per_s": 1_000_000, "ping_interval_s": 0}
    broker = broker_for(msgspec.convert({"server": {"port": 0}, "limits": limits}, Config))
    await broker.start()
    await broker.listen()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    halves = (listeners // 2, listeners - listeners // 2)
    processes = [
        context.Process(target=_listeners, args=(broker.port, count, publishes, results)) for count in halves if count
    ]
    for process in processes:
        process.start()
    for _ in processes:
        await asyncio.to_thread(results.get)
    slices = _timed(Engine, "_fan_out")
    flushes = _timed(Writer, "_flush")
    reader, writer = await connected(broker.port, "/ws/lab?listen=0")
    totals, copying, writing, lags = [], [], [], []
    for number in range(publishes):
        slices.clear()
        flushes.clear()
        probe = LagProbe()
        probe.start()
        began = time.monotonic()
        publish = b'{"jsonrpc":"2.0","id":%d,"method":"broker.publish","params":{"endpoint":"lab","data":"%b"}}'
        writer.write(masked(publish % (number, b"x" * 100)))
        await message(reader)
        while len(broker.router.fanouts) or any(link.outbox_bytes for link in broker.links.links):
            await asyncio.sleep(0)
        totals.append(time.monotonic() - began)
        probe.stop()
        copying.append(max(slices))
        writing.append(max(flushes))
        lags += probe.samples
    writer.close()
    heard = sum([await asyncio.to_thread(results.get) for _ in processes])
    for process in processes:
        process.join()
    await broker.stop()
    return {
        "heard": heard,
        "copying_best_ms": round(min(copying) * 1e3, 2),
        "copying_max_ms": round(max(copying) * 1e3, 2),
        "writing_best_ms": round(min(writing) * 1e3, 2),
        "writing_max_ms": round(max(writing) * 1e3, 2),
        "lag_p99_ms": round(share(lags, 0.99) * 1e3, 2),
        "publish_best_ms": round(min(totals) * 1e3, 1),
    }


def _timed(kind: Any, name: str) -> list[float]:
    """Replace a method of a class by one that notes how long it took."""
    took: list[float] = []
    method = getattr(kind, name)

    def timed(self: Any) -> None:
        began = time.perf_counter()
        method(self)
        took.append(time.perf_counter() - began)

    setattr(kind, name, timed)
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listeners", type=int, default=10_000)
    parser.add_argument("--publishes", type=int, default=20)
    parser.add_argument("--goal-ms", type=float, default=10.0, help="a slice must not be longer")
    arguments = parser.parse_args()
    many_files()
    import uvloop

    result = uvloop.run(measure(arguments.listeners, arguments.publishes))
    print(json.dumps(result))
    complete = result["heard"] == arguments.listeners * arguments.publishes
    held_ms = max(result["copying_best_ms"], result["writing_best_ms"])
    return int(held_ms > arguments.goal_ms or not complete)


if __name__ == "__main__":
    raise SystemExit(main())
