"""How long one caller waits while another floods the same endpoint, and what the queue between them costs.

`python -m benchmarks.flood [--calls 300] [--repeat 3] [--workers 4] [--window 1200]`

A daemon, workers that take 9 to 11 ms for a call and one call at a time (with 10 ms sharp, all would run in step, begun
by the flood, and free their places at one moment), a caller with a token of its own that asks one at a time, and, in
the second half, another token that keeps `--window` requests in flight over four connections: more than the queue
holds, so that some are refused and come again after the `retry_after_ms` they were told. Each is a process. Printed are
milliseconds from asking to answer, each figure from its best repetition: noise makes either half look worse, never
better. The goal: the 99th percentile beside the flood is at most the quiet one plus one service, which is what a quiet
call takes at the median: 10 ms and the way to the worker and back. Exit code 1 if it is missed. The same bound, exact
and for workers that do run in step, is a test in `tests/core/test_fairness.py`.

`queue_us` is what one request costs on its way in and out of the queue while 1,000 of 100 callers wait in it;
`plain_us` is the same for a bare OrderedDict, which knows neither callers nor priorities.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections import OrderedDict
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from benchmarks.lag import share
from benchmarks.nolink import NoLink
from benchmarks.processes import daemon
from broker.core.access import Grant, Role
from broker.core.events import Attached
from broker.core.lines import Line
from broker.core.messages import DEFAULT_OPTIONS, EMPTY
from broker.core.pending import Request
from broker.core.queue import Queue
from broker.core.registry import Registration
from broker.core.sessions import Session

SERVICE_S = 0.010
SPREAD = 0.1
CONNECTIONS = 4
WAITING = 1000
CALLERS = 100
COUNT = 50_000


def opened(url: str, token: str, query: str = "") -> connect:
    """A WebSocket to the endpoint, for `async with`."""
    address = f"{url.replace('http', 'ws', 1)}/ws/flooded?{query}"
    return connect(address, additional_headers={"Authorization": f"Bearer {token}"}, compression=None)


def call(number: int) -> str:
    """One request."""
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": "work"})


# ---------------------------------------------------------------- the other processes


def _work(url: str, token: str, workers: int, events: Any) -> None:
    async def one() -> None:
        async with opened(url, token, "role=worker&capacity=1") as socket:
            events.put("there")
            async for text in socket:
                asked = json.loads(text)
                if "id" in asked:
                    await asyncio.sleep(SERVICE_S * random.uniform(1 - SPREAD, 1 + SPREAD))
                    await socket.send(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": None}))

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(workers)))

    asyncio.run(main())


def _flood(url: str, token: str, window: int, events: Any) -> None:
    async def again(socket: ClientConnection, number: int, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        await socket.send(call(number))

    async def one(asking: int) -> None:
        pauses: set[asyncio.Task[None]] = set()
        async with opened(url, token) as socket:
            for number in range(asking):
                await again(socket, number, 0.0)
            answered = 0
            async for text in socket:
                reply = json.loads(text)
                pause_s = reply["error"]["data"]["retry_after_ms"] / 1000 if "error" in reply else 0.0
                asking += 1
                task = asyncio.create_task(again(socket, asking, pause_s))
                pauses.add(task)
                task.add_done_callback(pauses.discard)
                answered += "result" in reply
                if answered == 1:
                    events.put("flooding")

    async def main() -> None:
        await asyncio.gather(*(one(window // CONNECTIONS) for _ in range(CONNECTIONS)))

    asyncio.run(main())


# ---------------------------------------------------------------- the caller


async def asked_one_by_one(url: str, token: str, calls: int) -> list[float]:
    """How long each call took, in milliseconds."""
    took = []
    async with opened(url, token) as socket:
        for number in range(calls):
            began = time.perf_counter()
            await socket.send(call(number))
            reply = json.loads(await socket.recv())
            took.append((time.perf_counter() - began) * 1e3)
            if "result" not in reply:
                raise SystemExit(f"the quiet caller was answered with {reply}")
    return took


def measured(url: str, tokens: dict[str, str], calls: int, window: int) -> dict[str, float]:
    """One repetition: the caller alone, then beside the flood."""
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    quiet = asyncio.run(asked_one_by_one(url, tokens["quiet"], calls))
    flood = context.Process(target=_flood, args=(url, tokens["flood"], window, events))
    flood.start()
    try:
        for _ in range(CONNECTIONS):
            events.get(timeout=30)
        beside = asyncio.run(asked_one_by_one(url, tokens["quiet"], calls))
    finally:
        flood.terminate()
        flood.join()
    figures = {"quiet_p50_ms": (quiet, 0.5), "quiet_p99_ms": (quiet, 0.99)}
    figures |= {"flooded_p50_ms": (beside, 0.5), "flooded_p99_ms": (beside, 0.99)}
    return {name: round(share(took, part), 2) for name, (took, part) in figures.items()}


def beside_a_flood(calls: int, repeat: int, workers: int, window: int) -> dict[str, float]:
    """Each figure as it was in its best repetition."""
    with daemon() as running:
        tokens = {name: running.token(name, role) for name, role in ROLES.items()}
        context = multiprocessing.get_context("spawn")
        events = context.Queue()
        worker = context.Process(target=_work, args=(running.url, tokens["worker"], workers, events))
        worker.start()
        try:
            for _ in range(workers):
                events.get(timeout=30)
            found = [measured(running.url, tokens, calls, window) for _ in range(repeat)]
        finally:
            worker.terminate()
            worker.join()
    return {name: min(figures[name] for figures in found) for name in found[0]}


ROLES = {"worker": "worker", "quiet": "caller", "flood": "caller"}


# ---------------------------------------------------------------- the queue alone


def queue_costs_us(repeat: int) -> dict[str, float]:
    """Processor time of one request in and out, in µs: this queue and a bare OrderedDict."""
    grants = (Grant(Role.CALLER),)
    sessions = [
        Session(
            Attached(
                session=number, link=NoLink(), principal=f"p{number}", grants=grants, role=Role.CALLER, endpoint="e",
                listen=False, capacity=None,
            ), 0.0, 1,
        )
        for number in range(CALLERS)
    ]  # fmt: skip
    requests = [
        Request(number, sessions[number % CALLERS], number, None, "m", EMPTY, DEFAULT_OPTIONS, 0.0, 1.0)  # type: ignore[arg-type]
        for number in range(WAITING + COUNT)
    ]
    costs: dict[str, float] = {}
    for _ in range(repeat):
        for name, run in (("queue_us", _through_the_queue), ("plain_us", _through_a_dict)):
            us = run(requests) / COUNT * 1e6
            costs[name] = min(costs.get(name, us), us)
    return {name: round(us, 2) for name, us in costs.items()}


def _through_the_queue(requests: list[Request]) -> float:
    queue, line, worker = Queue(), Line("m"), Registration(requests[0].session, None)  # type: ignore[arg-type]
    for request in requests[:WAITING]:
        queue.put(request, line)
    began = time.process_time()
    for request in requests[WAITING:]:
        queue.put(request, line)
        queue.take(worker, 0.0)
    return time.process_time() - began


def _through_a_dict(requests: list[Request]) -> float:
    waiting = OrderedDict[Request, None]((request, None) for request in requests[:WAITING])
    began = time.process_time()
    for request in requests[WAITING:]:
        waiting[request] = None
        del waiting[next(iter(waiting))]
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--window", type=int, default=1200)
    given = parser.parse_args()
    result = beside_a_flood(given.calls, given.repeat, given.workers, given.window)
    print(json.dumps(result | queue_costs_us(given.repeat)))
    return int(result["flooded_p99_ms"] > result["quiet_p99_ms"] + result["quiet_p50_ms"])


if __name__ == "__main__":
    raise SystemExit(main())
