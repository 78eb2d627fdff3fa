"""What a notebook front end gets of a kernel through the broker, beside the same kernel behind jupyter_server.

`python -m benchmarks.front_ends [--jupyter PYTHON] [--repeat 3] [--json]`

Broker, kernel worker, kernel and this client are processes of their own, as they are in use. `PYTHON` is an interpreter
in whose environment jupyter_server and ipykernel are (by default `JUPYTER_PYTHON`, or this one); without jupyter_server
only the broker is measured. Repetitions are interleaved, the best counts. Exit code 1 if a goal is missed.

* `display`: messages of display data, per second and in MB/s, from the first to the last, and how many of them came.
  Both servers speak the subprotocol v1, and jupyter_server's rate limit is off, or it would drop them. Goal: half as
  many per second as jupyter_server, as each goes over one process more.
* `1+1`: milliseconds from the request until both its reply and the kernel's word that it is idle, median of 200.
  Goal: at most 1 ms more than jupyter_server.
* `stuck`: by how many MiB more the broker's resident memory grows while the kernel prints 100 MB and displays 20 MB, if
  a front end does not read it; and what another that reads gets of the displays. Goal: 64 MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

from websockets.asyncio.client import ClientConnection, connect

from broker.wire.kernel import V1, Sign, read_v1, tell, write_v1
from broker.worker.kernel.ports import free_ports

TOKEN = "a-token-for-this-benchmark-alone-0123456789"
KERNEL = "bench"
GOAL_RATE = 0.5
GOAL_MS = 1.0
GOAL_STUCK_MIB = 64
DISPLAYS = 20
SIZES = ((1 << 10, 5000), (64 << 10, 1000), (1 << 20, 100))
PATIENCE_S = 60.0
_numbers = itertools.count()


class Server(NamedTuple):
    """Where a kernel's channels are."""

    name: str
    url: str
    kernel: str
    process: int


class Page:
    """A front end."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def ask(self, msg_type: str, content: dict[str, Any]) -> str:
        """Send a request; its id."""
        number = f"bench_{next(_numbers)}"
        message = tell("shell", msg_type, content, Sign(number, "bench", "2026-01-02T03:04:05.000006Z"))
        await self.socket.send(b"".join(write_v1(message)))
        return number

    async def execute(self, code: str) -> str:
        """Run a cell."""
        return await self.ask(
            "execute_request",
            {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False},
        )

    async def done(self, number: str) -> tuple[int, float, float]:
        """Wait for a cell's reply and its end; how many displays came, and when the first and the last."""
        replied = idle = False
        count, first, last = 0, 0.0, 0.0
        raw = self.socket.transport.get_extra_info("socket")
        while not (replied and idle):
            # Acknowledged at once. Else what a server writes second waits 40 ms for it if Nagle's algorithm is on,
            # as jupyter_server's does: 44 ms for `1+1` instead of 3.5 (2026-11-21).
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            frame = await self.socket.recv(decode=False)
            assert isinstance(frame, bytes)
            message = read_v1(frame)
            if b"were left out" in message.content:
                print(message.content.decode(), file=sys.stderr)
            if b'"display_data"' in message.header:
                last = time.perf_counter()
                first = first or last
                count += 1
            elif message.parent_header and number.encode() in message.parent_header:
                replied = replied or message.channel == "shell"
                idle = idle or (message.channel == "iopub" and b'"idle"' in message.content)
        return count, first, last


@contextmanager
def page_url(server: Server, session: str) -> Iterator[str]:
    """The address of a kernel's channels."""
    yield f"{server.url.replace('http', 'ws')}/api/kernels/{server.kernel}/channels?session_id={session}&token={TOKEN}"


async def _measure_display(server: Server, size: int, count: int) -> tuple[float, int]:
    """Messages per second, of those that came, and how many these were."""
    with page_url(server, "display") as url:
        async with connect(url, subprotocols=[V1], max_size=None) as socket:  # type: ignore[list-item]
            page = Page(socket)
            await page.done(await page.execute("from IPython.display import publish_display_data"))
            code = f"data = 'x' * {size}\nfor i in range({count}): publish_display_data({{'text/plain': data}})"
            found, first, last = await page.done(await page.execute(code))
            return (found - 1) / (last - first), found


async def _measure_latency(server: Server, count: int) -> float:
    """Median, in milliseconds."""
    with page_url(server, "latency") as url:
        async with connect(url, subprotocols=[V1], max_size=None) as socket:  # type: ignore[list-item]
            page, took = Page(socket), []
            for _ in range(20 + count):
                begun = time.perf_counter()
                await page.done(await page.execute("1+1"))
                took.append(1000 * (time.perf_counter() - begun))
            return statistics.median(took[20:])


def _resident_mib(process: int) -> float:
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


async def _measure_stuck(server: Server, *, stuck: bool) -> tuple[float, int]:
    """MiB by which a broker grew that nobody has used yet, and the displays that came to who reads."""
    shown = "publish_display_data({'text/plain': 'x' * 1_000_000})"
    code = f"print('x' * 100_000_000)\nfor i in range({DISPLAYS}): {shown}"
    with page_url(server, "reads") as url, page_url(server, "stuck") as other:
        async with AsyncExitStack() as stack:
            page = Page(await stack.enter_async_context(connect(url, subprotocols=[V1], max_size=None)))  # type: ignore[list-item]
            await page.done(await page.execute("from IPython.display import publish_display_data"))
            before = _resident_mib(server.process)
            if stuck:
                # One message read ahead at most: from then on the system's buffers fill, and then the broker's.
                await stack.enter_async_context(connect(other, subprotocols=[V1], max_size=None, max_queue=1))  # type: ignore[list-item]
            count, _, _ = await page.done(await page.execute(code))
            return _resident_mib(server.process) - before, count


def _stuck(folder: str, repeat: int) -> dict[str, Any]:
    """Measure in brokers of their own, by turns, and take medians: memory that was let go of hides what is used."""
    grown: dict[bool, list[float]] = {False: [], True: []}
    counts: dict[bool, list[int]] = {False: [], True: []}
    for turn, stuck in itertools.product(range(repeat), (False, True)):
        own = Path(folder, f"stuck-{turn}-{stuck}")
        own.mkdir(mode=0o700)
        with ExitStack() as stack:
            mib, count = asyncio.run(_measure_stuck(_broker(stack, str(own)), stuck=stuck))
        grown[stuck].append(mib)
        counts[stuck].append(count)
    alone, beside = (statistics.median(grown[stuck]) for stuck in (False, True))
    return {
        "alone_mib": round(alone, 1), "stuck_adds_mib": round(beside - alone, 1), "displays": DISPLAYS,
        "came_alone": counts[False], "came_beside_stuck": counts[True],
    }  # fmt: skip


# ------------------------------------------------------------ the servers


def _request(method: str, url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Authorization": f"token {TOKEN}"}, method=method)
    with urlopen(request, timeout=PATIENCE_S) as answer:
        return json.loads(answer.read() or b"null")


def _until_there(url: str) -> Any:
    ends_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _request("GET", url)
        except (URLError, ConnectionError):
            if time.monotonic() > ends_at:
                raise
            time.sleep(0.05)


def _started(stack: ExitStack, command: list[str], folder: str, **environment: str) -> subprocess.Popen[bytes]:
    with Path(folder, "log").open("ab") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"XDG_RUNTIME_DIR": folder, "XDG_STATE_HOME": folder} | environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

    def end() -> None:
        process.terminate()
        process.wait(20)

    stack.callback(end)
    return process


def _broker(stack: ExitStack, folder: str) -> Server:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "broker", "serve", "--port", str(port)]
    process = _started(stack, command, folder, BROKER_AUTH__ADMIN_TOKEN=TOKEN)
    url = f"http://127.0.0.1:{port}"
    _until_there(f"{url}/api/kernels")
    _started(stack, [sys.executable, "-m", "benchmarks.front_ends", "--worker", url], folder)
    _until_there(f"{url}/api/kernels/{KERNEL}")
    return Server("broker", url, KERNEL, process.pid)


def _jupyter(stack: ExitStack, folder: str, python: str) -> Server | None:
    if subprocess.run([python, "-c", "import jupyter_server"], capture_output=True, check=False).returncode:
        return None
    (port,) = free_ports(1)
    options = (
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.open_browser=False",
        f"--IdentityProvider.token={TOKEN}", "--ZMQChannelsWebsocketConnection.limit_rate=False", "--allow-root",
        f"--ServerApp.root_dir={folder}",
    )  # fmt: skip
    process = _started(stack, [python, "-m", "jupyter_server", *options], folder, HOME=folder, PYTHONPATH="")
    url = f"http://127.0.0.1:{port}"
    _until_there(f"{url}/api/kernels")
    model = _request("POST", f"{url}/api/kernels", {"name": "python3"})
    return Server("jupyter_server", url, model["id"], process.pid)


async def _work(url: str) -> None:
    """The kernel worker's process."""
    from broker.worker.kernel.process import Started
    from broker.worker.kernel.worker import KernelWorker

    worker = KernelWorker(f"kernels.{KERNEL}", Started("python3"), url, TOKEN)
    await worker.start()
    await worker.wait()


def measure(python: str, repeat: int, count: int) -> dict[str, Any]:
    """All figures; `count` of all messages, or 0 for thousands."""
    found: dict[str, Any] = {"display": [], "ms": {}}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        broker = _broker(stack, folder)
        jupyter = _jupyter(stack, folder, python)
        servers = [server for server in (jupyter, broker) if server is not None]
        if jupyter is not None:
            found["jupyter_server_version"] = _request("GET", f"{jupyter.url}/api")["version"]
        for size, usual in SIZES:
            rates: dict[str, list[tuple[float, int]]] = {server.name: [] for server in servers}
            for _ in range(repeat):
                for server in servers:
                    rates[server.name].append(asyncio.run(_measure_display(server, size, count or usual)))
            best = {name: round(max(rate for rate, _ in each)) for name, each in rates.items()}
            came = {f"{name}_came": [came for _, came in each] for name, each in rates.items()}
            found["display"].append({"kib": size >> 10, "sent": count or usual, **best, **came})
        for server in servers:
            fastest = min(asyncio.run(_measure_latency(server, count or 200)) for _ in range(repeat))
            found["ms"][server.name] = round(fastest, 2)
        return found | {"stuck": _stuck(folder, repeat)}


def tell_figures(found: dict[str, Any]) -> None:
    """Print them for people."""
    for row in found["display"]:
        for name in found["ms"]:
            of = f", {row[name] / row['jupyter_server']:.2f} of it" if "jupyter_server" in row else ""
            rate = f"{row[name]:8}/s {row[name] * row['kib'] * 1024 / 1e6:8.1f} MB/s"
            came = ", ".join(map(str, row[f"{name}_came"]))
            print(f"display {row['kib']:5} KiB  {name:15} {rate}{of}; of {row['sent']} came {came}")
    for name, took in found["ms"].items():
        print(f"1+1                {name:15} {took:8.2f} ms")
    stuck = found["stuck"]
    print(f"stuck              broker grew {stuck['alone_mib']} MiB, with a stuck front end", end=" ")
    print(f"{stuck['stuck_adds_mib']} MiB more; of {stuck['displays']} displays", end=" ")
    print(f"who reads got {stuck['came_alone']}, beside a stuck one {stuck['came_beside_stuck']}")


def missed(found: dict[str, Any]) -> bool:
    """Whether a goal is."""
    slow = any(row["broker"] < GOAL_RATE * row.get("jupyter_server", 0) for row in found["display"])
    late = found["ms"]["broker"] > GOAL_MS + found["ms"].get("jupyter_server", found["ms"]["broker"])
    return slow or late or found["stuck"]["stuck_adds_mib"] > GOAL_STUCK_MIB


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jupyter", default=os.environ.get("JUPYTER_PYTHON", sys.executable))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--count", type=int, default=0, help="of all messages, instead of thousands")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        asyncio.run(_work(given.worker))
        return 0
    found = measure(given.jupyter, given.repeat, given.count)
    if given.json:
        print(json.dumps(found))
    else:
        tell_figures(found)
    return int(missed(found))


if __name__ == "__main__":
    sys.exit(main())
