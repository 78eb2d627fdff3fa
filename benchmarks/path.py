"""The way of a request through the broker without sockets: bytes of callers in, bytes of replies out.

`python -m benchmarks.path [--rounds 200] [--pure]` prints processor time per request, best of the rounds. A round is 16
requests of each of 16 callers, given to 4 workers and answered. Frames, links, peers, engine and router are the
broker's own; only the transport below the link is a list. `benchmarks.counts` runs it under callgrind.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from broker.links import compiled
from broker.links.compiled import PURE

CALLERS, WORKERS, FLIGHT = 16, 4, 16
PER_ROUND = CALLERS * FLIGHT
WARM = 3
BODY = b"x" * 128
MASK = bytes(4)


class Transport:
    """Below a link: keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0


class Path:
    """A router with callers and workers attached over links."""

    def __init__(self) -> None:
        from broker.core.access import Role
        from broker.core.limits import Limits
        from broker.core.router import Router
        from broker.engine.engine import Engine
        from broker.links.loop import LoopLinks
        from broker.wire.pieces import join_reply

        self.links = LoopLinks()
        self.router = Router(Limits(capacity=1_000_000, in_flight_max=1_000_000), join=join_reply)
        self.engine = Engine(self.router, asyncio.get_running_loop(), compiled=compiled.wanted())
        self.workers = [self._attached(Role.WORKER) for _ in range(WORKERS)]
        self.callers = [self._attached(Role.CALLER) for _ in range(CALLERS)]
        self._next_id = 0

    def _attached(self, role: Any) -> tuple[Any, Transport]:
        from broker.core.access import Grant
        from broker.core.events import Attached
        from broker.links.socket import SocketLink
        from broker.transports.websocket.peer import WebSocketPeer
        from broker.wire.jsonrpc import JsonRpc

        number, transport = self.engine.next_session(), Transport()
        link = SocketLink(self.links)
        link.connection_made(transport)  # type: ignore[arg-type]
        codec = JsonRpc(node=self.router.node, session_id=number, endpoint="echo")
        peer = WebSocketPeer(self.engine, link, codec, 1 << 24, 1000)
        self.engine.feed(
            Attached(
                session=number, link=peer, principal="p", grants=(Grant(role),), role=role, endpoint="echo",
                listen=False,
            )
        )  # fmt: skip
        peer.start(self.router.sessions.by_id[number])
        return link, transport

    def _receive(self, link: Any, data: bytes) -> None:
        for at in range(0, len(data), 65_536):
            piece = data[at : at + 65_536]
            buffer = link.get_buffer(len(piece))
            buffer[: len(piece)] = piece
            link.buffer_updated(len(piece))

    def take_in(self, texts: Sequence[tuple[Any, bytes]]) -> float:
        """Each link gets its bytes, then what that led to is written; the processor time of all that."""
        began = time.process_time()
        for link, data in texts:
            self._receive(link, data)
        self.links.writer._flush()
        return time.process_time() - began

    def requests(self) -> list[tuple[Any, bytes]]:
        """One round's requests, as their links get them."""
        text = b'{"jsonrpc":"2.0","id":%d,"method":"echo","params":{"data":"%b"}}'
        first = self._next_id
        self._next_id += FLIGHT
        data = b"".join(framed(text % (first + number, BODY)) for number in range(FLIGHT))
        return [(link, data) for link, _ in self.callers]

    def answers(self) -> list[tuple[Any, bytes]]:
        """The workers' answers to all they have been asked."""
        found = []
        for link, transport in self.workers:
            asked, transport.written = b"".join(transport.written), []
            found.append((link, b"".join(framed(_answer_to(text)) for text in texts_of(asked))))
        return found

    def round(self) -> float:
        """One round; the processor time of its requests and of its answers."""
        took = self.take_in(self.requests())
        took += self.take_in(self.answers())
        for _, transport in self.callers:
            transport.written.clear()
        return took

    def cost_us(self, rounds: int) -> float:
        """Processor time per request in the best of the rounds, in µs."""
        return min(self.round() for _ in range(rounds)) / PER_ROUND * 1e6

    def under_callgrind(self, rounds: int) -> None:
        """Instructions are counted only while bytes are taken in and what follows from them is written."""
        for make in (self.requests, self.answers):
            texts = [text for _ in range(rounds if make == self.requests else 1) for text in make()]
            _instrument("on")
            self.take_in(texts)
            _instrument("off")


def _instrument(state: str) -> None:
    """Let callgrind count, or not. Being told costs 0.15 million instructions of this process itself."""
    command = ["callgrind_control", f"--instr={state}", str(os.getpid())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def framed(text: bytes) -> bytes:
    """A text frame as a client sends it."""
    size = len(text)
    head = bytes((0x81, 0x80 | size)) if size < 126 else bytes((0x81, 0xFE)) + size.to_bytes(2, "big")
    return head + MASK + text


def texts_of(data: bytes) -> list[bytes]:
    """What stands in the frames of a server."""
    found, at = [], 0
    while at < len(data):
        size, at = data[at + 1], at + 2
        if size == 126:
            size, at = int.from_bytes(data[at : at + 2], "big"), at + 2
        found.append(data[at : at + size])
        at += size
    return found


def _answer_to(text: bytes) -> bytes:
    return b'{"jsonrpc":"2.0","id":%b,"result":"%b"}' % (json.dumps(json.loads(text)["id"]).encode(), BODY)


async def _measure(rounds: int, callgrind: bool) -> dict[str, float]:
    path = Path()
    await asyncio.sleep(0)
    path.cost_us(WARM)
    gc.collect()
    gc.freeze()
    gc.disable()
    us = 0.0
    if callgrind:
        path.under_callgrind(rounds)
    else:
        us = path.cost_us(rounds)
    ended = path.router.counters.ended["ok"]
    path.engine.stop()
    if ended != (rounds + WARM) * PER_ROUND:
        raise SystemExit(f"{ended} requests ended well")
    return {"requests": rounds * PER_ROUND, "cpu_us": round(us, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description="processor time per request, without sockets")
    parser.add_argument("--rounds", type=int, default=200, help="of 256 requests each")
    parser.add_argument("--pure", action="store_true", help="without the compiled core")
    parser.add_argument("--callgrind", action="store_true", help="count instructions; to be started under callgrind")
    options = parser.parse_args()
    if options.pure:
        os.environ[PURE] = "1"
    print(json.dumps(asyncio.run(_measure(options.rounds, options.callgrind))))


if __name__ == "__main__":
    main()
