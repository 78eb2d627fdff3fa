"""What a stream costs the broker, beside a loop that only hands messages on; and what a slow reader costs others.

`python -m benchmarks.stream [--mb 200] [--parts 262000,65536,4096] [--repeat 3] [--json]`

A worker streams parts to a caller, under credit. Once the broker is between the two, once a loop with the same links
that reads a message and writes it to the other side. Measured is the processor time of what is between, per MB, best
of the repetitions. Exit code 1 if the broker needs more than twice as much for parts of the size the SDK makes.

`python -m benchmarks.stream --slow [--mb 2048] [--rate 40]`

A caller reads that many MB a second. Measured are how much the broker's memory grows at its peak, and the latency of
another caller's small requests, quiet and beside the stream. Exit code 1 if it grows by more than 32 MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from benchmarks import relay
from benchmarks.lag import SECRET, broker_for, share
from broker.config.model import Config
from broker.links.connect import connect
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.wire.attachments import pack

MB = 1 << 20
RATIO_MAX = 2.0
GROWTH_MAX_MIB = 32.0
WINDOW = 8
"""parts the reader lets be under way, as the SDK does"""
SDK_PART = 262_000
PINGS_QUIET = 300
PING_PAUSE_S = 0.01


class Call(msgspec.Struct):
    """As much of a message as these peers look at."""

    id: str | int | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"")
    error: msgspec.Raw = msgspec.Raw(b"")


class Upto(msgspec.Struct):
    """`$/credit`."""

    upto: int


_decode = msgspec.json.Decoder(Call).decode
_decode_upto = msgspec.json.Decoder(Upto).decode


# ---------------------------------------------------------------- what is between the two


async def _start_broker() -> int:
    broker = broker_for(msgspec.convert({"server": {"port": 0}, "limits": {"ping_interval_s": 0}}, Config))
    await broker.start()
    await broker.listen()
    return broker.port


async def _between(kind: str, pipe: Connection) -> None:
    """Serve, and tell processor time and peak memory whenever asked; None ends it."""
    pipe.send(await (relay.start() if kind == "relay" else _start_broker()))
    while await asyncio.to_thread(pipe.recv) is not None:
        pipe.send((time.process_time(), peak_bytes()))


def peak_bytes() -> int:
    """The most memory this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------- the peers


class Streamer:
    """A worker: answers `stream {parts, size}` with so many parts, and everything else at once."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ended = asyncio.get_running_loop().create_future()
        self._id: object = None
        self._data = b""
        self._next = self._parts = self._upto = 0

    def message(self, payload: bytes, binary: bool) -> None:
        said = _decode(payload)
        if said.method == "$/credit":
            self._upto = max(self._upto, _decode_upto(said.params).upto)
            self._go_on()
        elif said.method and said.method.endswith("stream"):
            wanted = json.loads(bytes(said.params))
            self._id, self._parts, self._data = said.id, wanted["parts"], bytes(wanted["size"])
            self._next, self._upto = 0, 4
            self._go_on()
        elif said.id is not None:
            self.link.send(b'{"jsonrpc":"2.0","id":%b,"result":1}' % json.dumps(said.id).encode())

    def _go_on(self) -> None:
        name = json.dumps(self._id).encode()
        while self._next < min(self._parts, self._upto):
            text = b'{"jsonrpc":"2.0","method":"$/part","params":{"id":%b,"seq":%d,"data":{"$buffer":0}}}'
            self.link.send_parts(pack([text % (name, self._next)], [self._data]), True)
            self._next += 1
        if self._parts and self._next == self._parts:
            self._parts = 0
            self.link.send(b'{"jsonrpc":"2.0","id":%b,"result":null}' % name)

    def congested(self, congested: bool) -> None: ...

    def closed(self, code: int, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Reader:
    """A caller: takes a stream, `rate` bytes a second at most; `done` when it has ended."""

    def __init__(self, link: Link, rate: float | None = None) -> None:
        self.link = link
        self.loop = asyncio.get_running_loop()
        self.rate = rate
        self.got = self.bytes = self._told = 0
        self.done: asyncio.Future[str] = self.loop.create_future()
        self._ids = itertools.count(1)
        self._began = 0.0

    def ask(self, parts: int, size: int) -> asyncio.Future[str]:
        self.got = self.bytes = 0
        self._told = 4
        self.id = next(self._ids)
        self.done = self.loop.create_future()
        self._began = self.loop.time()
        params = b'{"parts":%d,"size":%d}' % (parts, size)
        meta = b'{"timeout":3600,"stream":"in"}'
        call = b'{"jsonrpc":"2.0","id":%d,"method":"stream","params":%b,"meta":%b}'
        self.link.send(call % (self.id, params, meta))
        return self.done

    def message(self, payload: bytes, binary: bool) -> None:
        if binary:
            self.got += 1
            self.bytes += len(payload)
            self._consume()
            return
        said = _decode(payload)
        if said.method is None and not self.done.done():
            self.done.set_result(bytes(said.error).decode())

    def _consume(self) -> None:
        """Grant more when half of the window is used, as soon as the rate allows."""
        if self._told - self.got > WINDOW // 2:
            return
        self._told = self.got + WINDOW
        text = b'{"jsonrpc":"2.0","method":"$/credit","params":{"id":%d,"upto":%d}}' % (self.id, self._told)
        early_s = self.bytes / self.rate - (self.loop.time() - self._began) if self.rate else 0.0
        if early_s > 0:
            self.loop.call_later(early_s, self.link.send, text)
        else:
            self.link.send(text)

    def congested(self, congested: bool) -> None: ...

    def closed(self, code: int, reason: str) -> None:
        if not self.done.done():
            self.done.set_result(f"closed: {code} {reason}")


class Pinger:
    """A caller of small requests, one after the other; `latencies` in seconds."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.heard = asyncio.Event()

    def message(self, payload: bytes, binary: bool) -> None:
        self.heard.set()

    def congested(self, congested: bool) -> None: ...

    def closed(self, code: int, reason: str) -> None:
        self.heard.set()

    async def ping(self) -> float:
        self.heard.clear()
        began = time.perf_counter()
        self.link.send(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}')
        await self.heard.wait()
        return time.perf_counter() - began


async def _open(port: int, path: str) -> Link:
    headers = [("Authorization", f"Bearer {SECRET}")]
    return await connect(f"ws://127.0.0.1:{port}{path}", LoopLinks(), headers=headers)


async def _stream(port: int, pipe: Connection) -> None:
    """The streaming worker's process."""
    link = await _open(port, "/ws/lab?role=worker&binary=1")
    streamer = Streamer(link)
    link.start(streamer)
    pipe.send("there")
    await streamer.ended


async def _ping(port: int, pipe: Connection) -> None:
    """The process of who must not notice: quiet first, then until it is told to stop."""
    worker, caller = await _open(port, "/ws/other?role=worker"), await _open(port, "/ws/other")
    worker.start(Streamer(worker))
    pinger = Pinger(caller)
    caller.start(pinger)
    quiet = []
    for _ in range(PINGS_QUIET):
        quiet.append(await pinger.ping())
        await asyncio.sleep(PING_PAUSE_S)
    pipe.send(quiet)
    beside = []
    while not pipe.poll():
        beside.append(await pinger.ping())
        await asyncio.sleep(PING_PAUSE_S)
    pipe.send(beside)


# ---------------------------------------------------------------- processes


def _run(main: Callable[..., Any], *arguments: Any) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*arguments))


@asynccontextmanager
async def process(main: Callable[..., Any], *arguments: Any) -> AsyncIterator[Connection]:
    """Something of the above in a process of its own, which has ended when the block has."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_run, args=(main, *arguments, there), daemon=True)
    child.start()
    try:
        yield here
    finally:
        child.kill()
        await asyncio.to_thread(child.join)


async def _told(pipe: Connection) -> Any:
    return await asyncio.to_thread(pipe.recv)


async def _facts(pipe: Connection) -> tuple[float, int]:
    """Processor time and peak memory of what is between."""
    pipe.send("facts")
    cpu_s, peak = await _told(pipe)
    return cpu_s, peak


async def _ended(done: asyncio.Future[str]) -> None:
    error = await done
    if error:
        raise RuntimeError(f"the stream ended with {error}")


async def cpu_per_mb(kind: str, total: int, size: int, repeat: int) -> tuple[float, float]:
    """Milliseconds of processor time per MB of the broker, or of the relay, in the best of the repetitions.

    The second figure is by how many MiB its peak memory grew over all of them.
    """
    async with process(_between, kind) as between:
        port = await _told(between)
        async with process(_stream, port) as worker:
            await _told(worker)
            link = await _open(port, "/ws/lab?binary=1&listen=0")
            reader = Reader(link)
            link.start(reader)
            await _ended(reader.ask(20, size))
            best = float("inf")
            _, peak_before = await _facts(between)
            parts = max(1, total // size)
            for _ in range(repeat):
                before, _ = await _facts(between)
                await _ended(reader.ask(parts, size))
                after, peak = await _facts(between)
                if reader.got != parts:
                    raise RuntimeError(f"{reader.got} parts came of {parts}")
                best = min(best, (after - before) / (reader.bytes / MB))
            link.abort()
    return best * 1000, (peak - peak_before) / MB


async def beside_a_slow_reader(total: int, rate: float) -> dict[str, float]:
    """What a stream to a slow reader does to the broker's memory and to others' latency."""
    async with process(_between, "broker") as between:
        port = await _told(between)
        async with process(_stream, port) as worker, process(_ping, port) as pings:
            await _told(worker)
            quiet = await _told(pings)
            link = await _open(port, "/ws/lab?binary=1&listen=0")
            reader = Reader(link, rate)
            link.start(reader)
            _, before = await _facts(between)
            began = time.monotonic()
            await _ended(reader.ask(max(1, total // SDK_PART), SDK_PART))
            took_s = time.monotonic() - began
            _, after = await _facts(between)
            pings.send("stop")
            beside = await _told(pings)
            link.abort()
    return {
        "MB": reader.bytes / MB,
        "seconds": took_s,
        "growth MiB": (after - before) / MB,
        "quiet p99 ms": share(quiet, 0.99) * 1000,
        "beside p99 ms": share(beside, 0.99) * 1000,
        "beside max ms": max(beside) * 1000,
    }


# ---------------------------------------------------------------- the command


async def _compare(total: int, sizes: Sequence[int], repeat: int, as_json: bool) -> int:
    if not as_json:
        print(f"CPU ms per MB, best of {repeat}")
        print(f"{'part':>10}{'relay':>10}{'broker':>10}{'ratio':>8}")
    code = 0
    for size in sizes:
        least, _ = await cpu_per_mb("relay", total, size, repeat)
        broker, grown = await cpu_per_mb("broker", total, size, repeat)
        row = {"part": size, "relay": round(least, 4), "broker": round(broker, 4), "grown_mib": round(grown, 1)}
        text = f"{size:>10}{least:>10.3f}{broker:>10.3f}{broker / least:>8.2f}"
        print(json.dumps(row) if as_json else text, flush=True)
        if size >= SDK_PART and broker / least > RATIO_MAX:
            code = 1
    if not as_json:
        print(f"goal: at most {RATIO_MAX:g} for parts of {SDK_PART} bytes")
    return code


async def _slow(total: int, rate: float, as_json: bool) -> int:
    found = await beside_a_slow_reader(total, rate)
    if as_json:
        print(json.dumps({name: round(value, 2) for name, value in found.items()}))
        return int(found["growth MiB"] > GROWTH_MAX_MIB)
    print(f"{found['MB']:.0f} MB at {rate / MB:g} MB/s in {found['seconds']:.1f} s")
    print(f"the broker's peak memory grew by {found['growth MiB']:.1f} MiB (at most {GROWTH_MAX_MIB:g})")
    text = "another caller's requests: p99 {quiet p99 ms:.2f} ms quiet, {beside p99 ms:.2f} ms beside it"
    print(f"{text.format(**found)} (longest {found['beside max ms']:.1f})")
    return 1 if found["growth MiB"] > GROWTH_MAX_MIB else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description="what streams cost the broker")
    parser.add_argument("--mb", type=float, default=None, help="of each stream; default 200, with --slow 2048")
    parser.add_argument("--parts", default=f"{SDK_PART},65536,4096", help="sizes of parts in bytes, comma-separated")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--slow", action="store_true", help="a reader that takes its time, and who is beside it")
    parser.add_argument("--rate", type=float, default=40.0, help="MB a second the slow reader takes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.slow:
        return asyncio.run(_slow(int((given.mb or 2048) * MB), given.rate * MB, given.json))
    sizes = [int(size) for size in given.parts.split(",")]
    return asyncio.run(_compare(int((given.mb or 200) * MB), sizes, given.repeat, given.json))


if __name__ == "__main__":
    sys.exit(main())
