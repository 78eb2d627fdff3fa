"""What other brokers were seen to fail at, as tests on this one: over real sockets, with the SDK at both ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker import AsyncClient, Worker
from broker.node.broker import Broker
from broker.peer.errors import DeadlineExceeded, Overloaded, RemoteError
from tests.chaos.kills import Kills
from tests.peer.harness import SECRET, broker_running, run, until


class Bench:
    """A broker, a worker with a method that blocks until it is let go, and a client."""

    def __init__(self, broker: Broker, worker: Worker, client: AsyncClient) -> None:
        self.broker = broker
        self.client = client
        self.worker = worker
        self.begun: list[int] = []
        self.go = asyncio.Event()

    def ask(self, number: int, timeout: float = 20.0) -> asyncio.Future[int]:
        return asyncio.ensure_future(self.client.call("data/hold", [number], timeout=timeout))

    @property
    def waiting(self) -> int:
        return len(self.broker.router.registry.by_name["data"].queue)


@asynccontextmanager
async def bench(capacity: int = 1, queue_max: int = 1000) -> AsyncIterator[Bench]:
    async with broker_running(limits={"queue_max": queue_max}) as broker:
        worker = Worker("data", broker.url, SECRET, capacity=capacity)
        async with AsyncClient(broker.url, SECRET) as client:
            made = Bench(broker, worker, client)

            @worker.method
            async def hold(number: int) -> int:
                made.begun.append(number)
                await made.go.wait()
                return number

            @worker.method
            async def stubborn(number: int) -> None:
                made.begun.append(number)
                while not made.go.is_set():
                    try:
                        await asyncio.sleep(0.01)
                    except asyncio.CancelledError:
                        pass

            @worker.method
            async def fail(number: int) -> None:
                raise ValueError(f"no {number}")

            async with worker:
                yield made
                made.go.set()


def test_after_a_timeout_at_capacity_1_the_endpoint_serves_again_at_once() -> None:
    async def main() -> None:
        async with bench(capacity=1) as it:
            with pytest.raises(DeadlineExceeded) as caught:
                await it.client.call("data/stubborn", [0], timeout=0.3)
            assert caught.value.phase == "executing"
            began = time.monotonic()
            with pytest.raises(RemoteError, match="no 1"):
                await it.client.call("data/fail", [1], timeout=20)
            assert time.monotonic() - began < 5
            assert it.begun == [0]

    run(main)


def test_a_queue_limit_of_2_accepts_2() -> None:
    async def main() -> None:
        async with bench(capacity=1, queue_max=2) as it:
            calls = [it.ask(0)]
            await until(lambda: it.begun == [0], "the worker is busy")
            calls += [it.ask(1), it.ask(2)]
            await until(lambda: it.waiting == 2, "two wait")
            with pytest.raises(Overloaded) as caught:
                await it.ask(3)
            assert caught.value.bound == "queue" and not caught.value.dispatched
            it.go.set()
            assert await asyncio.gather(*calls) == [0, 1, 2]
            assert it.begun == [0, 1, 2]

    run(main)


def test_queued_calls_with_budgets_of_2_s_end_at_2_s() -> None:
    async def main() -> None:
        async with bench(capacity=1) as it:
            first = it.ask(0)
            await until(lambda: it.begun == [0], "the worker is busy")
            began = time.monotonic()
            ended = await asyncio.gather(*(it.ask(number, 2.0) for number in range(1, 21)), return_exceptions=True)
            took_s = time.monotonic() - began
            assert {(type(error), getattr(error, "phase", "")) for error in ended} == {(DeadlineExceeded, "queued")}
            assert 1.99 <= took_s < 5
            assert all(1.99 <= error.elapsed_s < 5 for error in ended)
            it.go.set()
            assert await first == 0
            assert it.begun == [0], "what had expired was given out"

    run(main)


def test_an_exception_of_the_worker_does_not_stall_what_is_queued_behind_it() -> None:
    async def main() -> None:
        async with bench(capacity=1) as it:
            first = it.ask(0)
            await until(lambda: it.begun == [0], "the worker is busy")
            failing = [asyncio.ensure_future(it.client.call("data/fail", [n], timeout=20)) for n in range(5)]
            await until(lambda: it.waiting == 5, "five wait")
            behind = it.ask(1)
            await until(lambda: it.waiting == 6, "six wait")
            it.go.set()
            assert await first == 0
            assert await behind == 1
            errors = await asyncio.gather(*failing, return_exceptions=True)
            assert [error.detail for error in errors] == [f"no {n}" for n in range(5)]

    run(main)


def test_five_parallel_calls_run_in_parallel() -> None:
    """All five have begun before any has ended."""

    async def main() -> None:
        async with bench(capacity=5) as it:
            calls = [it.ask(number) for number in range(5)]
            await until(lambda: len(it.begun) == 5, "all five run")
            assert not any(call.done() for call in calls)
            it.go.set()
            assert await asyncio.gather(*calls) == [0, 1, 2, 3, 4]

    run(main)


def test_five_parallel_functions_that_block_run_in_parallel() -> None:
    async def main() -> None:
        import threading

        together = threading.Barrier(5)
        async with broker_running() as broker:
            worker = Worker("data", broker.url, SECRET, capacity=5)
            worker.add(lambda: together.wait(20), "meet")
            async with worker, AsyncClient(broker.url, SECRET) as client:
                met = await asyncio.gather(*(client.call("data/meet", timeout=20) for _ in range(5)))
        assert sorted(met) == [0, 1, 2, 3, 4]

    run(main)


@pytest.mark.timeout(180)
def test_requests_with_random_kills_leave_an_empty_table(tmp_path: Path) -> None:
    """A million with `python -m tests.chaos.kills`."""
    kills = Kills(20_000, tmp_path, seed=1)
    kills.run()
    assert kills.ended == 20_000
    assert kills.kills >= 5
    assert kills.outcomes["ok"] > 10_000 and kills.outcomes["worker_lost"] > 0
    assert kills.left == {}
