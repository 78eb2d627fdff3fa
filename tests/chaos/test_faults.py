"""Faults of whole processes and links, with the SDK at both ends."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from broker import AsyncClient, Worker
from broker.peer.errors import ConnectionLost, WorkerLost
from tests.chaos.proxy import Proxy
from tests.chaos.storm import ENVIRONMENT, TOKEN, Storm
from tests.daemon.process import daemon
from tests.peer.harness import SECRET, broker_running, run, until


class Holding:
    """A worker whose method `hold` waits until it is let go."""

    def __init__(self, url: str, token: str) -> None:
        self.begun: list[str] = []
        self.go = asyncio.Event()
        self.worker = Worker("data", url, token)

        @self.worker.method
        async def hold(name: str) -> str:
            self.begun.append(name)
            await self.go.wait()
            return name


@pytest.mark.timeout(120)
def test_fault_07_callers_of_a_killed_broker_are_told_or_served_by_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        with daemon(tmp_path, env=ENVIRONMENT) as first:
            port = first.port
            holding = Holding(first.url, TOKEN)
            client = AsyncClient(first.url, TOKEN, timeout=60)
            await holding.worker.start()
            once = asyncio.ensure_future(client.call("data/hold", ["once"]))
            again = asyncio.ensure_future(client.call("data/hold", ["again"], idempotent=True, wait=True))
            await until(lambda: len(holding.begun) == 2, "both have begun")
            first.signal(signal.SIGKILL)
            first.ended()
        await until(lambda: not client.is_connected, "the caller has noticed")
        late = asyncio.ensure_future(client.call("data/hold", ["late"], wait=True))
        with daemon(tmp_path, "--port", str(port), env=ENVIRONMENT):
            with pytest.raises(ConnectionLost) as caught:
                await once
            assert caught.value.may_have_executed
            await until(lambda: sorted(holding.begun) == ["again", "again", "late", "once"], "the others have begun")
            holding.go.set()
            assert await again == "again"
            assert await late == "late"
            await client.close()
            await holding.worker.stop()

    run(main, timeout_s=90)


@pytest.mark.timeout(180)
def test_fault_08_five_hundred_clients_come_back_after_a_restart(tmp_path: Path) -> None:
    """Ten thousand with `python -m tests.chaos.storm`."""
    storm = Storm(500, tmp_path)
    storm.run()
    assert storm.answered == 500, "not all of them have a session of their own"
    assert storm.sessions == 500
    assert storm.back_s[1.0] < 30


SERVER = {"allowed_hosts": ["127.0.0.1"]}  # the proxy's port is not the broker's


def test_fault_05_a_caller_whose_link_is_cut_misses_no_reply_and_no_item() -> None:
    """Cut again and again, while replies and items are on their way: each comes once, and nothing runs twice."""

    async def main() -> None:
        async with broker_running(server=SERVER) as broker:
            proxy = Proxy(broker.port)
            url = f"http://127.0.0.1:{await proxy.listen('caller')}"
            worker = Worker("data", broker.url, SECRET)
            ran: list[int] = []

            @worker.method
            async def square(number: int) -> int:
                ran.append(number)
                await asyncio.sleep(0.001 * (number % 7))
                return number * number

            @worker.method
            async def count(upto: int):  # type: ignore[no-untyped-def]
                for number in range(upto):
                    yield number
                    await asyncio.sleep(0)

            async with worker, AsyncClient(url, SECRET, timeout=60) as client:
                calls = [asyncio.ensure_future(client.call("data/square", [n])) for n in range(200)]
                items: list[int] = []

                async def read() -> None:
                    async with await client.stream("data/count", [500]) as stream:
                        async for item in stream:
                            items.append(item)

                reading = asyncio.ensure_future(read())
                for at in (50, 150, 250, 350, 450):
                    await until(lambda at=at: len(items) >= at, "items come")  # type: ignore[misc]
                    for pair in list(proxy.pairs["caller"]):
                        proxy.cut(pair)
                assert await asyncio.gather(*calls) == [n * n for n in range(200)]
                await reading
                assert items == list(range(500))
                assert sorted(ran) == list(range(200))
                assert broker.router.counters.resumed >= 3
            await proxy.close()

    run(main)


def test_fault_01_a_worker_that_dies_in_a_stream_ends_it_once_and_a_fresh_one_is_tried_again() -> None:
    """What has flowed to its caller is not begun anew; what is gathered for its caller is."""

    async def main() -> None:
        async with broker_running(server=SERVER) as broker:
            proxy = Proxy(broker.port)
            workers = []
            stuck = asyncio.Event()

            async def rows(upto: int):  # type: ignore[no-untyped-def]
                for number in range(upto):
                    yield number
                if not stuck.is_set():
                    stuck.set()
                    await asyncio.sleep(60)

            for name in ("first", "second"):
                url = f"http://127.0.0.1:{await proxy.listen(name)}"
                workers.append(Worker("data", url, SECRET, capacity=1))
                workers[-1].add(rows)

            def busy() -> str:
                loads = broker.router.registry.by_name["data"].registrations
                by_load = {
                    len(session.attempts): worker.peer
                    for session in loads
                    for worker in workers
                    if worker.peer == broker.router.state.peer_name(session)
                }
                return "first" if by_load[1] == workers[0].peer else "second"

            async with workers[0], workers[1], AsyncClient(broker.url, SECRET, timeout=30) as client:
                options = {"idempotent": True, "retries": 2}
                whole = asyncio.ensure_future(
                    client.call(
                        "broker.call",
                        {
                            "endpoint": "data",
                            "method": "rows",
                            "params": [3],
                            "stream": "none",
                            **options,
                        },
                    )
                )
                await until(stuck.is_set, "the first has sent all its items")
                proxy.cut(proxy.pairs[busy()][0])
                assert await whole == [0, 1, 2]

                stuck.clear()
                await until(lambda: len(broker.router.registry.by_name["data"].registrations) == 2, "both are back")
                got = []
                with pytest.raises(WorkerLost):
                    async with await client.stream("data/rows", [3], **options) as stream:
                        async for item in stream:
                            got.append(item)
                            if len(got) == 3:
                                await until(stuck.is_set, "it waits")
                                proxy.cut(proxy.pairs[busy()][0])
                assert got == [0, 1, 2]
            await proxy.close()

    run(main)
