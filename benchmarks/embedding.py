"""What a blocking call from one of many threads costs the program that has the broker in it.

`python -m benchmarks.embedding [--threads 128] [--calls 12800] [--repeat 3] [--json]`

Measured is the processor time of this process, all its threads, in microseconds per call. Threads ask in turn and wait;
an echo worker, a process of its own whose cost is not counted, answers over a WebSocket. The columns:

    broker       `Broker.request_from_thread`: matching, deadlines, cancelling, books and all
    rtcloud      a re-creation, written for this comparison, of the semaphore-per-request model of rt-cloud's request
                 handler: callbacks by call id, a semaphore per request, the loop entered by `add_callback` for each
                 message while the thread waits until it is written, replies in base64 with their MD5, and a look at
                 all callbacks for old ones with each reply
    bare         the same with nothing but ids, semaphores and JSON: no dialect, no pruning, no wait for the writing
    inner        `await Broker.request` on the loop, so many in flight, for comparison

Repetitions are interleaved, the best counts. Goal: broker at most a third of `rtcloud`. Exit code 1 if it is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler

from broker import Broker, Grant, Principal, Role
from broker.config.model import Config, Server
from broker.links.connect import connect
from broker.links.link import Link
from broker.links.loop import LoopLinks

GOAL_RATIO = 1 / 3
TIMEOUT_S = 30.0


# ------------------------------------------------------------ the worker, a process of its own


class Echo:
    """Answers every request with its params, in either dialect."""

    def __init__(self, link: Link, ended: asyncio.Future[None]) -> None:
        self.link = link
        self.ended = ended

    def message(self, payload: bytes, binary: bool) -> None:
        asked = json.loads(payload)
        if "cmd" in asked:
            data = json.dumps(asked["args"]).encode()
            digest = hashlib.md5(data).hexdigest()
            answer = {name: asked[name] for name in ("cmd", "class", "attribute", "callId")} | {
                "status": 200, "dataSerialization": "json", "data": base64.b64encode(data).decode(),
                "dataSize": len(data), "hash": digest, "compressed": False, "fileSize": len(data), "fileHash": digest,
                "numParts": 1, "multipart": False, "partId": 1,
            }  # fmt: skip
        elif "callId" in asked:
            answer = {"callId": asked["callId"], "data": asked["args"]}
        else:
            answer = {"jsonrpc": "2.0", "id": asked["id"], "result": asked["params"]}
        self.link.send(json.dumps(answer).encode())

    def congested(self, congested: bool) -> None: ...

    def closed(self, code: int, reason: str) -> None:
        self.ended.set_result(None)


async def work(url: str) -> None:
    links = LoopLinks()
    link = await connect(url, links)
    ended = asyncio.get_running_loop().create_future()
    link.start(Echo(link, ended))
    print("ready", flush=True)
    await ended
    await links.close()


# ------------------------------------------------------------ the same by hand


class ByHand(WebSocketHandler):
    """Where the worker connects to."""

    def initialize(self, requests: Requests) -> None:
        self.requests = requests

    def open(self, *_: str) -> None:
        self.requests.connections.append(self)

    def on_message(self, message: str | bytes) -> None:
        self.requests.answered(json.loads(message))

    def on_close(self) -> None:
        self.requests.connections.remove(self)


class Callback:
    """One request that waits: what a thread is woken by, where the answer goes, since when."""

    def __init__(self) -> None:
        self.semaphore = threading.Semaphore(0)
        self.answer: Any = None
        self.since = time.time()


class Requests:
    """Asks over the newest connection: an id, a semaphore and a place for the answer per request."""

    def __init__(self, loop: IOLoop) -> None:
        self.loop = loop
        self.connections: list[ByHand] = []
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, Callback] = {}

    def answered(self, answer: dict[str, Any]) -> None:
        with self._lock:
            callback = self._waiting[answer["callId"]]
        if "hash" in answer:
            data = base64.b64decode(answer["data"])
            if len(data) != answer["dataSize"] or hashlib.md5(data).hexdigest() != answer["hash"]:
                raise ValueError("damaged")
            callback.answer = json.loads(data)
            self._prune()
        else:
            callback.answer = answer["data"]
        callback.semaphore.release()

    def _prune(self) -> None:
        """Look for requests that wait for more than five minutes."""
        now = time.time()
        with self._lock:
            for number in [number for number, callback in self._waiting.items() if now - callback.since > 300]:
                self._waiting.pop(number).semaphore.release()

    def _ask(self, what: dict[str, Any]) -> tuple[int, str]:
        with self._lock:
            number = next(self._ids)
            self._waiting[number] = Callback()
        return number, json.dumps(what | {"callId": number})

    def _wait(self, number: int) -> Any:
        callback = self._waiting[number]
        if not callback.semaphore.acquire(timeout=TIMEOUT_S):
            raise TimeoutError
        with self._lock:
            del self._waiting[number]
        return callback.answer

    def do_bare(self, args: Any) -> Any:
        number, text = self._ask({"args": args})
        self.loop.add_callback(self.connections[-1].write_message, text)
        return self._wait(number)

    def do(self, args: Any) -> Any:
        number, text = self._ask({"cmd": "rpc", "class": "Echo", "attribute": "echo", "args": args, "kwargs": {}})
        written = threading.Condition()
        is_written: list[bool] = []

        def write() -> None:
            self.connections[-1].write_message(text)
            with written:
                is_written.append(True)
                written.notify()

        with written:
            self.loop.add_callback(write)
            if not written.wait_for(lambda: bool(is_written), TIMEOUT_S):
                raise TimeoutError
        return self._wait(number)


# ------------------------------------------------------------ measuring


def in_threads(call: Callable[[Any], Any], threads: int, calls: int) -> float:
    """Processor time per call in µs, threads and loop together; blocks."""
    begin = threading.Barrier(threads + 1)
    wrong: list[object] = []

    def run(number: int) -> None:
        begin.wait()
        for each in range(number, calls, threads):
            answer = call([each])
            if answer != [each]:
                wrong.append(answer)

    many = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for one in many:
        one.start()
    begin.wait()
    begun = time.process_time()
    for one in many:
        one.join()
    spent = time.process_time() - begun
    if wrong:
        raise SystemExit(f"wrong answers: {wrong[:3]}")
    return spent / calls * 1e6


async def on_loop(broker: Broker, width: int, calls: int) -> float:
    async def lane(first: int) -> None:
        for number in range(first, calls, width):
            assert await broker.request("bench/echo", [number]) == [number]

    begun = time.process_time()
    await asyncio.gather(*(lane(number) for number in range(width)))
    return (time.process_time() - begun) / calls * 1e6


def start_worker(url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.embedding", "--worker", url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def apart(function: Callable[..., float], *arguments: Any) -> float:
    """Run something that blocks in a thread of its own."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def measure(threads: int, calls: int, repeat: int) -> dict[str, float]:
    anybody = Principal("bench", (Grant(Role.WORKER),))
    broker = Broker(Config(server=Server(port=0)), authenticate=lambda request: anybody)
    await broker.start()
    requests = Requests(IOLoop.current())
    application = Application([*broker.routes("/broker"), ("/wsData", ByHand, {"requests": requests})])
    sockets = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(application)
    server.add_sockets(sockets)
    port = sockets[0].getsockname()[1]
    workers = [
        start_worker(f"ws://127.0.0.1:{port}/broker/ws/bench?role=worker&capacity=1000"),
        start_worker(f"ws://127.0.0.1:{port}/wsData"),
    ]
    loop = asyncio.get_running_loop()
    try:
        for worker in workers:
            assert worker.stdout is not None
            if await loop.run_in_executor(None, worker.stdout.readline) != "ready\n":
                raise SystemExit("the worker did not start")
        columns: dict[str, Callable[[], Awaitable[float]]] = {
            "broker": lambda: apart(in_threads, lambda n: broker.request_from_thread("bench/echo", n), threads, calls),
            "rtcloud": lambda: apart(in_threads, requests.do, threads, calls),
            "bare": lambda: apart(in_threads, requests.do_bare, threads, calls),
            "inner": lambda: on_loop(broker, threads, calls),
        }
        best = dict.fromkeys(columns, float("inf"))
        for _ in range(repeat):
            for name, column in columns.items():
                best[name] = min(best[name], await column())
        return best
    finally:
        server.stop()
        await broker.stop()
        for connection in list(requests.connections):
            connection.close()
        for worker in workers:
            await loop.run_in_executor(None, worker.wait)
            if worker.stdout is not None:
                worker.stdout.close()
        await server.close_all_connections()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=128)
    parser.add_argument("--calls", type=int, default=12_800)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", metavar="URL", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asyncio.run(work(options.worker))
        return 0
    best = asyncio.run(measure(options.threads, options.calls, options.repeat))
    if options.json:
        print(json.dumps({name: round(value, 1) for name, value in best.items()}))
    else:
        print(f"CPU µs per call, {options.threads} threads\n" + "".join(f"{name:>12}" for name in best))
        print("".join(f"{value:12.1f}" for value in best.values()))
        for name in ("rtcloud", "bare"):
            print(f"broker costs {best['broker'] / best[name]:.2f} of {name}")
    return int(best["broker"] > GOAL_RATIO * best["rtcloud"])


if __name__ == "__main__":
    sys.exit(main())
