"""A broker with a real kernel behind it: ipykernel, started by jupyter_client, as users have it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jupyter_client

from broker.client.async_client import AsyncClient, Subscription
from broker.node.broker import Broker
from broker.worker.kernel.bounds import BOUNDS, Bounds
from broker.worker.kernel.process import Process, Started, kernel_ports
from broker.worker.kernel.worker import KernelWorker
from tests.peer.harness import SECRET, broker_running

ENDPOINT = "kernels.test"


@asynccontextmanager
async def kernel_running(
    process: Process | None = None, broker: Broker | None = None, bounds: Bounds = BOUNDS
) -> AsyncIterator[tuple[KernelWorker, AsyncClient]]:
    """A worker with its kernel and a client, at a broker of their own unless one is given."""
    if broker is None:
        async with broker_running() as own, kernel_running(process, own, bounds) as both:
            yield both
        return
    worker = KernelWorker(ENDPOINT, process or Started("python3"), broker.url, SECRET, bounds=bounds)
    async with AsyncClient(broker.url, SECRET, timeout=30) as client, worker:
        yield worker, client


@asynccontextmanager
async def elsewhere(tmp_path: Path) -> AsyncIterator[tuple[Path, Any]]:
    """A kernel that somebody else has started, and its manager."""
    file = str(tmp_path / "kernel.json")
    manager = jupyter_client.AsyncKernelManager(kernel_name="python3", connection_file=file, **kernel_ports())
    await manager.start_kernel()
    try:
        yield tmp_path / "kernel.json", manager
    finally:
        await manager.shutdown_kernel(now=True)


async def outputs(client: AsyncClient, code: str, **more: Any) -> tuple[list[Any], Any]:
    """The items and the result of `execute`."""
    async with await client.stream(f"{ENDPOINT}/execute", {"code": code} | more, timeout=None) as stream:
        items = [item async for item in stream]
    return items, stream.result


async def heard(messages: Subscription, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The next broadcast that fits."""
    async with asyncio.timeout(30):
        while True:
            message: dict[str, Any] = (await messages.get()).data
            if fits(message):
                return message


def is_status(state: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a broadcast tells this state."""
    return lambda told: told["header"]["msg_type"] == "status" and told["content"]["execution_state"] == state


def header(number: int, msg_type: str) -> dict[str, Any]:
    """A header as front ends make them."""
    return {
        "msg_id": f"front_{number}", "msg_type": msg_type, "session": "front", "username": "me", "version": "5.4",
        "date": "2026-11-21T00:00:00Z",
    }  # fmt: skip


def execute_content(code: str, **more: Any) -> dict[str, Any]:
    """The content of an `execute_request` as front ends make it."""
    return {
        "code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": True,
        "stop_on_error": True,
    } | more  # fmt: skip
