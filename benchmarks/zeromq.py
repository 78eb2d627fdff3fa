"""What a request costs the broker when one side or both speak ZeroMQ, beside a forwarder by hand that is unsigned.

`python -m benchmarks.zeromq [--loads 1x1,16x1,16x16] [--requests 5000] [--repeat 3] [--counts 1000]`

A load is callers × requests in flight of each. Measured is the processor time of the broker's process, all its threads
(libzmq's own do much of the work), in microseconds per request; another process, this one, is all callers and the one
worker. What is asked and answered is the same on all ways:

    zeromq           `broker serve`, both sides through the ZeroMQ door: signatures checked and made, matching,
                     deadlines, books
    forwarder        two ROUTER sockets and a `zmq.Poller`, `recv_multipart` and `send_multipart` of frames of the same
                     sizes: no signature, no books
    websocket        `broker serve`, both sides by WebSocket
    from websocket   `broker serve`, callers by WebSocket, the worker by ZeroMQ
    to websocket     `broker serve`, callers by ZeroMQ, the worker by WebSocket

Repetitions are interleaved, the best counts. Goals, for every load: zeromq at most 1.5 times the forwarder; where both
are spoken, at most 1.5 times the mean of zeromq and websocket. Exit code 1 if one is missed. `counts` are system calls
per request of each way, one at a time, where strace may attach.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import zmq

from benchmarks.counts import SHORT, system_calls
from benchmarks.lag import SECRET, masked, opening
from benchmarks.processes import ROOT, cpu_s, daemon, end, pinned, processors
from broker.auth.connection_files import read_connection_file
from broker.wire.frames import FrameParser
from broker.wire.session import DELIMITER
from broker.wire.signature import keyed, sign

GOAL_RATIO = 1.5
WAYS = {  # what the callers speak, and the worker
    "zeromq": ("zeromq", "zeromq"),
    "forwarder": ("zeromq", "zeromq"),
    "websocket": ("websocket", "websocket"),
    "from websocket": ("websocket", "zeromq"),
    "to websocket": ("zeromq", "websocket"),
}
MIXED = ("from websocket", "to websocket")
PARAMS = b'{"path":"/data/scan-0001/volume-0042.dcm","slice":17}'
HEADER = b'"msg_type":"%b","username":"load","session":"s","date":"2026-01-01T00:00:00Z","version":"5.4"}'
WARM = 500
READ_MAX = 262_144
ANSWERS_S = 20


class Place(NamedTuple):
    """What is measured: where callers and workers dial in, and its process."""

    callers_url: str
    worker_url: str
    key: str
    """signs; empty for the forwarder, which knows no signature"""
    port: int
    """of WebSockets"""
    pid: int


# ------------------------------------------------------------ the two brokers, each a process of its own


@contextmanager
def place(way: str, processor: int | None = None) -> Iterator[Place]:
    """The broker, or the forwarder, for the length of the block."""
    with ExitStack() as stack:
        if way == "forwarder":
            process = stack.enter_context(_forwarder(processor))
            assert process.stdout is not None
            front, back = json.loads(process.stdout.readline())
            yield Place(front, back, "", 0, process.pid)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            variables = {"BROKER_AUTH__ADMIN_TOKEN": SECRET, "BROKER_ZEROMQ__ENABLED": "true"}
            variables["BROKER_ZEROMQ__CONNECTION_FILE"] = str(folder / "zeromq.json")
            broker = stack.enter_context(daemon(variables, processor=processor))
            info = read_connection_file(folder / "zeromq.json")
            yield Place(info.url("shell"), info.url("shell"), info.key, broker.port, broker.pid)


@contextmanager
def _forwarder(processor: int | None) -> Iterator[subprocess.Popen[bytes]]:
    command = pinned([sys.executable, "-m", "benchmarks.zeromq", "--forwarder"], processor)
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            yield process
        finally:
            end(process)


def forward() -> None:
    """The least that stands between callers and one worker."""
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    urls = [f"tcp://127.0.0.1:{each.bind_to_random_port('tcp://127.0.0.1')}" for each in (front, back)]
    print(json.dumps(urls), flush=True)
    poller = zmq.Poller()
    for each in (front, back):
        poller.register(each, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if front in ready:
            back.send_multipart([b"worker", *front.recv_multipart()])
        if back in ready:
            front.send_multipart(back.recv_multipart()[1:])


# ------------------------------------------------------------ callers and the worker


class Peer(Protocol):
    """A caller, or the worker, whatever it speaks."""

    socket: Any
    """what a poller takes"""

    def ask(self) -> None:
        """Send a request."""
        ...

    def take(self) -> int:
        """Read what came; how many answers."""
        ...

    def answer(self) -> None:
        """Read what came and answer it, with what was asked."""
        ...


class Header(msgspec.Struct):
    msg_id: str


class Signed:
    """Speaks ZeroMQ."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], url: str, name: str, key: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.routing_id = name.encode()
        self.socket.connect(url)
        self._mac = keyed(key.encode()) if key else None
        self._name = name.encode()
        self._sent = 0

    def attach(self) -> None:
        """Become the worker. The forwarder takes it as such for its name, as soon as it has come."""
        if self._mac is None:
            time.sleep(0.3)  # it comes with the connection, and nobody says when
            return
        self._send([], b"attach_request", b"{}", b'{"endpoint":"data","role":"worker"}')
        assert b'"ok"' in self.socket.recv_multipart()[5]

    def _send(self, route: list[bytes], kind: bytes, parent: bytes, content: bytes) -> None:
        self._sent += 1
        head = b'{"msg_id":"%b-%d",%b' % (self._name, self._sent, HEADER % kind)  # what is sent twice is refused
        frames = [head, parent, b"{}", content]
        self.socket.send_multipart([*route, DELIMITER, sign(self._mac, frames) or b"0" * 64, *frames])

    def ask(self) -> None:
        self._send([], b"call_request", b"{}", b'{"endpoint":"data","method":"read","params":%b}' % PARAMS)

    def take(self) -> int:
        self.socket.recv_multipart()
        return 1

    def answer(self) -> None:
        frames = self.socket.recv_multipart()
        at = frames.index(DELIMITER)
        parent = b'{"msg_id":"%b"}' % msgspec.json.decode(frames[at + 2], type=Header).msg_id.encode()
        self._send(frames[:at], b"call_reply", parent, b'{"status":"ok","result":%b}' % PARAMS)


class Request(msgspec.Struct):
    id: msgspec.Raw


class Framed:
    """Speaks JSON-RPC over a WebSocket."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(opening(port, path))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        assert head.startswith(b"HTTP/1.1 101"), head
        self._frames = FrameParser(masked=False)
        self._sent = 0

    def _came(self) -> list[bytes]:
        return [text for _, text in self._frames.feed(self.socket.recv(READ_MAX))]

    def ask(self) -> None:
        self._sent += 1
        text = b'{"jsonrpc":"2.0","id":%d,"method":"data/read","params":%b}'
        self.socket.sendall(masked(text % (self._sent, PARAMS)))

    def take(self) -> int:
        return len(self._came())

    def answer(self) -> None:
        for text in self._came():
            asked = bytes(msgspec.json.decode(text, type=Request).id)
            self.socket.sendall(masked(b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (asked, PARAMS)))


class Load:
    """All callers, and one worker."""

    def __init__(self, at: Place, way: str, callers: int, window: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._window = window
        self._worker = self._peer(at, WAYS[way][1], "worker")
        self._callers = [self._peer(at, WAYS[way][0], f"caller-{number}") for number in range(callers)]
        self._poller = zmq.Poller()
        self._by_socket: dict[Any, Peer] = {}
        for peer in (self._worker, *self._callers):
            self._poller.register(peer.socket, zmq.POLLIN)
            self._by_socket[peer.socket if isinstance(peer, Signed) else peer.socket.fileno()] = peer

    def _peer(self, at: Place, speaks: str, name: str) -> Peer:
        works = name == "worker"
        if speaks == "websocket":
            return Framed(at.port, "/ws/data?role=worker" if works else "/ws")
        peer = Signed(self._context, at.worker_url if works else at.callers_url, name, at.key)
        if works:
            peer.attach()
        return peer

    def run(self, count: int) -> None:
        """Ask and be answered so many times."""
        left, due = count, count
        for caller in self._callers:
            for _ in range(min(self._window, left)):
                caller.ask()
                left -= 1
        while due:
            ready = self._poller.poll(ANSWERS_S * 1000)
            if not ready:
                raise RuntimeError(f"{due} of {count} requests were not answered in {ANSWERS_S} s")
            for one, _ in ready:
                peer = self._by_socket[one]
                if peer is self._worker:
                    peer.answer()
                    continue
                came = peer.take()
                due -= came
                for _ in range(min(came, left)):
                    peer.ask()
                    left -= 1

    def close(self) -> None:
        for peer in (self._worker, *self._callers):
            peer.socket.close()
        self._context.destroy(linger=0)


@contextmanager
def load(at: Place, way: str, callers: int, window: int) -> Iterator[Load]:
    """The load, connected, for the length of the block."""
    one = Load(at, way, callers, window)
    try:
        yield one
    finally:
        one.close()


# ------------------------------------------------------------ what is measured


def cost_us(way: str, callers: int, window: int, count: int) -> float:
    """Processor time of one broker per request, in microseconds."""
    with place(way, processors()[0]) as at, load(at, way, callers, window) as one:
        one.run(min(count, WARM))
        before = cpu_s(at.pid)
        one.run(count)
        return (cpu_s(at.pid) - before) / count * 1e6


def counts(way: str, requests: int) -> dict[str, float]:
    """System calls per request, one at a time (`benchmarks.counts.system_calls`)."""
    with place(way) as at, load(at, way, 1, 1) as one:
        one.run(SHORT)
        return system_calls(at.pid, requests, one.run)


def measure(loads: list[str], requests: int, repeat: int, tell: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """By load and way, the best of the repetitions."""
    best: dict[str, dict[str, float]] = {}
    for name in loads:
        callers, window = map(int, name.split("x"))
        row = best[name] = {}
        for repetition in range(repeat):
            for way in WAYS:
                cost = cost_us(way, callers, window, requests)
                row[way] = round(min(cost, row.get(way, cost)), 1)
                tell(f"{repetition + 1}/{repeat} {way} {name}: {cost:.1f}")
    return best


def missed(row: dict[str, float]) -> bool:
    """Whether a goal is."""
    mixed = GOAL_RATIO * (row["zeromq"] + row["websocket"]) / 2
    return row["zeromq"] > GOAL_RATIO * row["forwarder"] or max(row[way] for way in MIXED) > mixed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="1x1,16x1,16x16")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--counts", type=int, default=1000, help="requests whose system calls are counted; 0: none")
    parser.add_argument("--forwarder", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.forwarder:
        forward()
        return 0
    os.sched_setaffinity(0, {processors()[1]})
    found: dict[str, Any] = measure(
        given.loads.split(","), given.requests, given.repeat, lambda text: print(text, file=sys.stderr, flush=True)
    )
    counted = {way: counts(way, given.counts) for way in WAYS if given.counts}
    print(json.dumps({"loads": found, "counts": counted}))
    return int(any(missed(row) for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
