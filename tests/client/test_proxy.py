"""Behind a proxy that cuts connections nobody has spoken on for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker import AsyncClient, Worker
from tests.peer.harness import SECRET, broker_running, run, until

IDLE_S = 0.4
SERVER = {"allowed_hosts": ["127.0.0.1"]}  # the proxy's port is not the broker's


class Proxy:
    """Hands bytes on, both ways, and counts the connections it cut."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.cut = 0
        self.opened = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        spoken = asyncio.Event()
        ways = [
            asyncio.ensure_future(self._hand_on(reader, back, spoken)),
            asyncio.ensure_future(self._hand_on(there, writer, spoken)),
        ]
        try:
            while not any(way.done() for way in ways):
                spoken.clear()
                await asyncio.wait_for(spoken.wait(), IDLE_S)
        except TimeoutError:
            self.cut += 1
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, back):
                end.transport.abort()

    @staticmethod
    async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spoken: asyncio.Event) -> None:
        while data := await reader.read(65_536):
            spoken.set()
            writer.write(data)
            await writer.drain()
        spoken.set()


@asynccontextmanager
async def proxied(port: int) -> AsyncIterator[tuple[Proxy, str]]:
    proxy = Proxy(port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield proxy, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


def adder(url: str) -> Worker:
    worker = Worker("data", url, SECRET)

    @worker.method
    async def add(a: int, b: int) -> int:
        return a + b

    return worker


@pytest.mark.parametrize("ping_interval_s", [20.0, 0.1])
def test_a_proxy_that_cuts_idle_connections(ping_interval_s: float) -> None:
    """Both ends come back by themselves; a ping interval below the proxy's patience spares them the way."""

    async def main() -> None:
        limits = {"ping_interval_s": ping_interval_s}
        async with broker_running(server=SERVER, limits=limits) as broker, proxied(broker.port) as (proxy, url):
            worker = adder(url)
            await worker.start()
            try:
                async with AsyncClient(url, SECRET) as client:
                    assert await client.call("data/add", {"a": 1, "b": 2}, wait=True, timeout=10) == 3
                    if ping_interval_s > IDLE_S:
                        await until(lambda: proxy.cut >= 2, "client and worker were cut off")
                    else:
                        await asyncio.sleep(3 * IDLE_S)  # nobody speaks but the pings
                        assert (proxy.cut, proxy.opened) == (0, 2)
                    assert await client.call("data/add", {"a": 2, "b": 2}, wait=True, timeout=10) == 4
            finally:
                await worker.stop()

    run(main)
