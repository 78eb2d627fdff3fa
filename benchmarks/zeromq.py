"""What a request costs the broker when both sides speak ZeroMQ, signed, beside a forwarder by hand that is unsigned.

`python -m benchmarks.zeromq [--load 1x1,16x1,16x16] [--requests 20000] [--repeat 3] [--profile]`

A load is callers x requests in flight of each. Measured is the processor time of the broker's process, all its threads
(libzmq's own do much of the work), in microseconds per request; a second process is all callers and the worker. Frames
have the same sizes in both. The columns:

    broker      the ZeroMQ door: signatures checked and made, matching, deadlines, books
    forwarder   two ROUTER sockets and a `zmq.Poller`, `recv_multipart` and `send_multipart`: no signature, no books

Repetitions are interleaved, the best counts. Goal: broker at most 1.5 times the forwarder, for every load. Exit code 1
if it is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from typing import Any

import msgspec
import zmq

from broker.wire.session import DELIMITER
from broker.wire.signature import keyed, sign

GOAL_RATIO = 1.5
KEY = b"0123456789abcdef0123456789abcdef"
PARAMS = b'{"path":"/data/scan-0001/volume-0042.dcm","slice":17}'


# ------------------------------------------------------------ the two brokers, each a process of its own


def told() -> bool:
    """Answer one line of standard input with the processor time used so far; False at its end."""
    line = sys.stdin.readline()
    if line:
        print(time.process_time(), flush=True)
    return bool(line)


async def serve_broker() -> None:
    from broker.config.model import Config, ZeroMQ
    from broker.node.broker import Broker

    async with Broker(Config(zeromq=ZeroMQ(enabled=True))) as broker:
        info = await broker.open_zeromq()
        gc.collect()
        gc.freeze()  # as `broker serve` does
        print(json.dumps([info.url("shell"), info.url("shell"), info.key]), flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, lambda: told() or ended.set())
        await ended.wait()


def serve_forwarder() -> None:
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    urls = [f"tcp://127.0.0.1:{each.bind_to_random_port('tcp://127.0.0.1')}" for each in (front, back)]
    print(json.dumps([*urls, ""]), flush=True)
    poller = zmq.Poller()
    for each in (front, back, 0):
        poller.register(each, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if front in ready:
            back.send_multipart([b"worker", *front.recv_multipart()])
        if back in ready:
            front.send_multipart(back.recv_multipart()[1:])
        if 0 in ready and not told():
            context.destroy(linger=0)
            return


# ------------------------------------------------------------ callers and the worker


class Header(msgspec.Struct):
    msg_id: str
    msg_type: str


class Load:
    """All callers, and one worker that answers with what it was asked."""

    def __init__(self, callers_url: str, worker_url: str, key: str, callers: int, window: int) -> None:
        self.context = zmq.Context()
        self.mac = keyed(key.encode()) if key else None
        self.signed = bool(key)
        self.window = window
        self.asked = 0
        self.poller = zmq.Poller()
        self.worker = self._socket(worker_url, b"worker")
        if self.signed:
            self.worker.send_multipart(self._frames("attach_request", {"endpoint": "data", "role": "worker"}))
            assert b'"ok"' in self.worker.recv_multipart()[5]
        else:
            time.sleep(0.3)  # until the forwarder knows the worker
        self.callers = [self._socket(callers_url, b"caller-%d" % number) for number in range(callers)]
        self._head = b'"msg_type":"%b","username":"load","session":"s","date":"2026-01-01T00:00:00Z","version":"5.4"}'

    def _socket(self, url: str, name: bytes) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.routing_id = name
        socket.connect(url)
        self.poller.register(socket, zmq.POLLIN)
        return socket

    def _frames(self, kind: str, content: object) -> list[bytes]:
        self.asked += 1
        header = {"msg_id": f"load-{self.asked}", "msg_type": kind, "session": "s"}
        frames = [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
        return [DELIMITER, sign(self.mac, frames), *frames]

    def ask(self, caller: zmq.Socket[bytes]) -> None:
        self.asked += 1
        header = b'{"msg_id":"load-%d",%b' % (self.asked, self._head % b"call_request")
        frames = [header, b"{}", b"{}", b'{"endpoint":"data","method":"read","params":%b}' % PARAMS]
        caller.send_multipart([DELIMITER, sign(self.mac, frames) or b"0" * 64, *frames])

    def answer(self) -> None:
        frames = self.worker.recv_multipart()
        at = frames.index(DELIMITER)
        msg_id = msgspec.json.decode(frames[at + 2], type=Header).msg_id.encode()
        self.asked += 1
        header = b'{"msg_id":"reply-%d",%b' % (self.asked, self._head % b"call_reply")
        reply = [header, b'{"msg_id":"%b"}' % msg_id, b"{}", b'{"status":"ok","result":%b}' % PARAMS]
        self.worker.send_multipart([*frames[:at], DELIMITER, sign(self.mac, reply) or b"0" * 64, *reply])

    def run(self, count: int) -> None:
        """Ask and be answered so many times."""
        left, due = count, count
        for caller in self.callers:
            for _ in range(min(self.window, left)):
                self.ask(caller)
                left -= 1
        while due:
            for socket, _ in self.poller.poll(20_000):
                if socket is self.worker:
                    self.answer()
                else:
                    socket.recv_multipart()
                    due -= 1
                    if left:
                        left -= 1
                        self.ask(socket)

    def close(self) -> None:
        self.context.destroy(linger=0)


def cost_us(kind: str, callers: int, window: int, count: int, profile: str) -> float:
    """Processor time of one broker per request, in microseconds."""
    command = [sys.executable, *(["-m", "cProfile", "-o", profile] if profile and kind == "broker" else [])]
    with subprocess.Popen(
        [*command, "-m", "benchmarks.zeromq", "--serve", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        load = Load(*json.loads(process.stdout.readline()), callers, window)

        def used() -> float:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return float(process.stdout.readline())  # type: ignore[union-attr]

        try:
            load.run(min(count, 500))
            before = used()
            load.run(count)
            return (used() - before) / count * 1e6
        finally:
            load.close()
            process.stdin.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", default="1x1,16x1,16x16")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", default="", metavar="FILE", help="Profile the broker's process.")
    parser.add_argument("--serve", choices=["broker", "forwarder"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve == "broker":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_broker())
        return 0
    if given.serve == "forwarder":
        serve_forwarder()
        return 0
    missed = False
    print(f"{'load':>8} {'broker':>10} {'forwarder':>10} {'ratio':>7}   µs of the broker's processor time per request")
    for load in given.load.split(","):
        callers, window = map(int, load.split("x"))
        best: dict[str, Any] = {}
        for _ in range(given.repeat):
            for kind in ("broker", "forwarder"):
                cost = cost_us(kind, callers, window, given.requests, given.profile)
                best[kind] = min(cost, best.get(kind, cost))
        ratio = best["broker"] / best["forwarder"]
        missed = missed or ratio > GOAL_RATIO
        print(f"{load:>8} {best['broker']:>10.1f} {best['forwarder']:>10.1f} {ratio:>7.2f}", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
