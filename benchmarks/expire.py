"""How late the event loop is while many requests expire together.

`python -m benchmarks.expire [--requests 100000] [--callers 20] [--goal-ms 50]`

A broker in this process; callers in another one send requests nobody serves, with `wait` and timeouts such that all
are due at the same moment. From that moment until the last has ended, the loop's lag is sampled every millisecond.
Each caller checks that every request of its own ended once, by its deadline. Exit code 1 if the goal was missed.
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


async def _caller(port: int, requests: int, due_at: float) -> int:
    """Send, then count what ends, each once."""
    reader, writer = await connected(port, "/ws/nobody?wait=1&listen=0")
    for number in range(requests):
        left_s = due_at - time.monotonic()
        text = b'{"jsonrpc":"2.0","id":%d,"method":"m","params":[1],"meta":{"timeout":%.6f}}' % (number, left_s)
        writer.write(masked(text))
        if number % 500 == 0:
            await writer.drain()
    await writer.drain()
    ended = set()
    for _ in range(requests):
        reply = json.loads(await message(reader))
        if reply["error"]["data"]["outcome"] == "deadline":
            ended.add(reply["id"])
    writer.close()
    return len(ended)


def _callers(port: int, callers: int, requests: int, due_at: float, results: Any) -> None:
    async def main() -> int:
        return sum(await asyncio.gather(*(_caller(port, requests, due_at) for _ in range(callers))))

    results.put(asyncio.run(main()))


async def measure(requests: int, callers: int, lead_s: float) -> dict[str, float]:
    """Expire `requests` at once; milliseconds of lag, seconds until the last had ended."""
    limits = {"queue_max": requests, "in_flight_max": requests, "outbox_hard_bytes": 256 << 20, "stall_s": 60}
    broker = broker_for(msgspec.convert({"server": {"port": 0}, "limits": limits}, Config))
    await broker.start()
    await broker.listen()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    due_at = time.monotonic() + lead_s
    process = context.Process(target=_callers, args=(broker.port, callers, requests // callers, due_at, results))
    process.start()
    pending = broker.router.pending
    while time.monotonic() < due_at - 0.1:
        await asyncio.sleep(0.05)
    waiting = pending.count
    probe = LagProbe()
    probe.start()
    while pending.count:
        await asyncio.sleep(0.01)
    took_s = time.monotonic() - due_at
    while any(link.outbox_bytes for link in broker.links.links):
        await asyncio.sleep(0.01)
    probe.stop()
    ended = await asyncio.to_thread(results.get)
    process.join()
    await broker.stop()
    return {
        "waiting": waiting,
        "ended": ended,
        "ended_s": round(took_s, 3),
        "lag_p50_ms": round(share(probe.samples, 0.5) * 1e3, 2),
        "lag_p99_ms": round(share(probe.samples, 0.99) * 1e3, 2),
        "lag_max_ms": round(max(probe.samples) * 1e3, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--callers", type=int, default=20)
    parser.add_argument("--lead", type=float, default=15.0, help="seconds to send them all")
    parser.add_argument("--goal-ms", type=float, default=50.0, help="lag that 99 %% of the samples must not exceed")
    arguments = parser.parse_args()
    many_files()
    import uvloop

    result = uvloop.run(measure(arguments.requests, arguments.callers, arguments.lead))
    print(json.dumps(result))
    if result["waiting"] < arguments.requests // arguments.callers * arguments.callers:
        print("not all requests were waiting when they fell due: give more --lead")
        return 1
    return int(result["lag_p99_ms"] > arguments.goal_ms or result["ended"] != result["waiting"])


if __name__ == "__main__":
    raise SystemExit(main())
