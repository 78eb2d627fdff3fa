"""The least a broker in Python can do: `python -m benchmarks.relay [--port N] [--tls]` hands messages on, and no more.

Each caller is joined to a worker; what one side says, the other is sent. The links, the handshake and the joined
writes are the broker's own; there is no routing, no matching, no deadline, no authentication. What the broker costs
beyond this is what its promises cost.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from benchmarks.echo import self_signed
from broker.daemon.memory import keep_freed_memory
from broker.links.acceptor import Acceptor
from broker.links.handshake import check_upgrade, switching_protocols
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.links.take import take


class Relay:
    """One side: what it hears, the other side is sent."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.other: Relay | None = None

    def message(self, payload: bytes, binary: bool) -> None:
        assert self.other is not None
        self.other.link.send(payload, binary)

    def congested(self, congested: bool) -> None:
        if self.other is None:
            return
        if congested:
            self.other.link.pause_reading()
        else:
            self.other.link.resume_reading()

    def closed(self, code: int, reason: str) -> None:
        if self.other is not None:
            other, self.other = self.other, None
            other.other = None
            other.link.abort()


class RelayHandler(RequestHandler):
    """Whoever comes waits for one of the other role."""

    def initialize(self, links: LoopLinks, acceptors: list[Acceptor], waiting: dict[bool, deque[Relay]]) -> None:
        self.links = links
        self.acceptors = acceptors
        self.waiting = waiting

    async def get(self) -> None:
        upgrade: Any = check_upgrade(self.request.method or "", self.request.headers, self.request.version)
        works = self.get_query_argument("role", "caller") == "worker"
        stream = self.detach()
        self.acceptors[0].authenticated(stream)
        relay = Relay(await take(stream, switching_protocols(upgrade.key, None), self.links))
        if not self.waiting[not works]:
            self.waiting[works].append(relay)
            return
        other = self.waiting[not works].popleft()
        relay.other, other.other = other, relay
        for side in (other, relay):
            side.link.start(side)


async def start(port: int = 0, ssl_context: ssl.SSLContext | None = None) -> int:
    """Serve on the running loop; return the port."""
    links = LoopLinks(LinkLimits())
    acceptors: list[Acceptor] = []
    arguments = {"links": links, "acceptors": acceptors, "waiting": {True: deque(), False: deque()}}
    acceptors.append(Acceptor(HTTPServer(Application([("/ws/.*", RelayHandler, arguments)])), ssl_context=ssl_context))
    acceptors[0].add_sockets(bind_sockets(port, "127.0.0.1"))
    return int(acceptors[0].sockets[0].getsockname()[1])


async def _serve(port: int, ssl_context: ssl.SSLContext | None) -> None:
    print(f"relay on port {await start(port, ssl_context)}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay", description="hands messages on, and no more")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, printed")
    parser.add_argument("--tls", action="store_true", help="with a certificate made on the fly")
    options = parser.parse_args()
    import uvloop

    keep_freed_memory()  # as the broker does: what is compared is the work
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options.port, self_signed(Path(folder)) if options.tls else None))


if __name__ == "__main__":
    main()
