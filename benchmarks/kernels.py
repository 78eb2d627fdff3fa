"""What it costs to have the broker between a caller and a Jupyter kernel.

`python -m benchmarks.kernels [--cells 1000] [--mb 100] [--json]`

Broker, kernel and worker are processes of their own. The same cell, `1+1`, is run in turns with `direct`
(jupyter_client's BlockingKernelClient at the kernel's own sockets), so that both meet the same noise: as `request` (our
Client, `kernels.NAME/shell`), then as `relay` (BlockingKernelClient at the sockets of `broker kernel connect`, one
process more, and one that listens). Measured is the time from the request to the reply: its median in ms, and what is
added to that of `direct`. `cpu` is the processor time per cell of broker, worker and `kernel connect`, in µs.

Then the kernel prints `--mb` MB while one caller reads it and one listens to IOPub without reading: the peak resident
memory of broker and worker before and after, in MiB. Goals: `request` adds at most 1 ms, `relay` two; the broker grows
by at most 64 MiB. Exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from benchmarks.processes import Daemon, cpu_s, daemon, end, peak_kib
from benchmarks.sdk import TOKEN
from broker import AsyncClient, Client
from broker.worker.kernel.process import kernel_ports

ENDPOINT = "kernels.bench"
GOAL_MS = 1.0
GOAL_RELAY_MS = 2.0
GOAL_GROWN_MIB = 64
CELL = {"code": "1+1", "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}


def peak_mib(pid: int) -> float:
    """The most memory a process has had resident, in MiB."""
    return peak_kib(pid) / 1024


def blocking(path: str) -> Any:
    """jupyter_client's own client at the kernel of a connection file."""
    client = BlockingKernelClient(connection_file=path)
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=30)
    return client


def by_jupyter(client: Any) -> Callable[[], object]:
    """Run the cell; IOPub is not read, as it is the same on all ways."""

    def cell() -> object:
        msg_id = client.execute("1+1", store_history=False, allow_stdin=False)
        while (reply := client.get_shell_msg(timeout=30))["parent_header"]["msg_id"] != msg_id:
            pass
        return reply

    return cell


def by_request(client: Client) -> Callable[[], object]:
    made = 0

    def cell() -> object:
        nonlocal made
        made += 1
        header = {"msg_id": f"bench_{made}", "msg_type": "execute_request", "session": "bench", "username": "bench"}
        message = {"header": header | {"version": "5.4", "date": "2026-11-21T00:00:00Z"}, "content": CELL}
        return client.call(f"{ENDPOINT}/shell", message, timeout=None)

    return cell


def latency(ways: dict[str, Callable[[], object]], cells: int) -> dict[str, float]:
    """Medians in ms of ways that take turns, `direct` first among them, and what the other adds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(cells + 20):
        for name, cell in ways.items():
            begun = time.perf_counter()
            cell()
            if number >= 20:
                times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(each) * 1000 for name, each in times.items()}
    (other,) = (name for name in ways if name != "direct")
    return {
        f"direct_beside_{other}_ms": medians["direct"], f"{other}_ms": medians[other],
        f"{other}_adds_ms": medians[other] - medians["direct"],
    }  # fmt: skip


def cpu_us(way: str, cell: Callable[[], object], cells: int, pids: dict[str, int]) -> dict[str, float]:
    """The processor time of each process per cell."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    for _ in range(cells):
        cell()
    return {f"{way}_cpu_{name}_us": (cpu_s(pid) - before[name]) / cells * 1e6 for name, pid in pids.items()}


async def printing(url: str, mb: int, pids: dict[str, int]) -> dict[str, Any]:
    """What it does to the memory of broker and worker that a kernel prints without end."""
    before = {name: peak_mib(pid) for name, pid in pids.items()}
    code = f"for _ in range({mb}): print('x' * 999_999)"
    async with (
        AsyncClient(url, TOKEN) as client,
        AsyncClient(url, TOKEN) as deaf,
        await deaf.subscribe(ENDPOINT, topic="iopub"),
    ):
        begun, came = time.perf_counter(), 0
        async with await client.stream(f"{ENDPOINT}/execute", {"code": code}, timeout=None) as stream:
            async for item in stream:
                came += len(item.get("text", ""))
        spent_s = time.perf_counter() - begun
    told: dict[str, Any] = {"printed_mb": mb, "came_mb": came / 1e6, "spent_s": spent_s}
    for name, pid in pids.items():
        told |= {f"{name}_mib_before": before[name], f"{name}_mib_peak": peak_mib(pid)}
    return told


def measure(broker: Daemon, folder: Path, arguments: argparse.Namespace) -> Any:
    url, environment = broker.url, broker.environment | {"BROKER_URL": broker.url, "BROKER_TOKEN": TOKEN}
    file = str(folder / "kernel.json")
    manager = KernelManager(kernel_name="python3", connection_file=file, **kernel_ports())
    manager.start_kernel()
    started: list[subprocess.Popen[bytes]] = []

    def begin(*command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "broker", *command], env=environment, stderr=subprocess.DEVNULL
        )
        started.append(process)
        return process

    try:
        worker = begin("work", "kernel", "--connection-file", manager.connection_file, "--endpoint", ENDPOINT)
        with Client(url, TOKEN) as client:
            client.call(f"{ENDPOINT}/state", wait=True, timeout=30)
            direct, pids = blocking(manager.connection_file), {"broker": broker.pid, "worker": worker.pid}
            request = by_request(client)
            told = latency({"direct": by_jupyter(direct), "request": request}, arguments.cells)
            told |= cpu_us("request", request, arguments.cells, pids)
            relayed = folder / "relay.json"
            connected = begin("kernel", "connect", ENDPOINT, "--connection-file", str(relayed))
            ends_at = time.monotonic() + 20
            while not relayed.exists() and time.monotonic() < ends_at:
                time.sleep(0.05)
            relay = blocking(str(relayed))
            told |= latency({"direct": by_jupyter(direct), "relay": by_jupyter(relay)}, arguments.cells)
            told |= cpu_us("relay", by_jupyter(relay), arguments.cells, pids | {"connect": connected.pid})
            direct.stop_channels()
            relay.stop_channels()
        return told | asyncio.run(printing(url, arguments.mb, pids))
    finally:
        for process in started:
            end(process)
        manager.shutdown_kernel(now=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        os.environ |= {"IPYTHONDIR": f"{name}/ipython", "JUPYTER_RUNTIME_DIR": name}
        with daemon({"BROKER_AUTH__ADMIN_TOKEN": TOKEN}) as broker:
            told = measure(broker, folder, arguments)
    told = {name: round(value, 3) for name, value in told.items()}
    if arguments.json:
        print(json.dumps(told))
    else:
        for name, value in told.items():
            print(f"{name:>24} {value:>10}")
    late = told["request_adds_ms"] > GOAL_MS or told["relay_adds_ms"] > GOAL_RELAY_MS
    return int(late or told["broker_mib_peak"] - told["broker_mib_before"] > GOAL_GROWN_MIB)


if __name__ == "__main__":
    sys.exit(main())
