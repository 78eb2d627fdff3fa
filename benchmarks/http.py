"""What one `POST /call` costs, beside a bare handler of the HTTP server it stands on.

`python -m benchmarks.http [--calls 5000] [--repeat 3] [--json]`

Measured is the processor time of this process in microseconds per request, the best of the repetitions. Client and
server share the process, so the client's own cost (one write and one read of a raw socket, the same in all columns) is
in all of them; `per request` is what stays when the cost of the client against an echoing socket is taken off.

The columns: a socket that answers with fixed bytes (`client`), a tornado handler that reads a JSON body and answers
`{}` (`bare`), `POST /call` with a worker in the same process behind the router (`call`), and the same refused with 404
before it reaches a worker (`refused`).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import time
from collections.abc import Awaitable, Callable

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from benchmarks.nolink import NoLink
from broker.auth.tokens import local_principal
from broker.config.model import Config, Server
from broker.core.access import Grant, Role
from broker.core.events import Answered, Attached
from broker.core.messages import Body, Call, Message
from broker.core.sessions import Session
from broker.node.broker import Broker

SECRET = "a-secret-for-this-benchmark-alone-0123"
BODY = b'{"path":"a.dcm"}'


class Bare(RequestHandler):
    """What tornado costs by itself."""

    def post(self) -> None:
        self.finish(b"{}")


class Worker(NoLink):
    """A worker's link that answers at once, with no socket between."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.session: Session

    def deliver(self, message: Message) -> None:
        if type(message) is Call:
            self.broker.engine.feed(Answered(self.session, message.attempt.id, Body(b"{}")))


def request_to(path: str, port: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {SECRET}\r\n"
    return f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


async def cost_us(port: int, path: str, calls: int) -> float:
    """Processor time per request over one kept connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = request_to(path, port)
    for count in (calls // 10, calls):
        gc.collect()
        begun = time.process_time()
        for _ in range(count):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(size)
    spent = time.process_time() - begun
    writer.close()
    await writer.wait_closed()
    return spent / calls * 1e6


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers every request with the same bytes."""
    try:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(BODY))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def measure(calls: int, repeat: int) -> dict[str, float]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    echo_port = server.sockets[0].getsockname()[1]
    sockets = bind_sockets(0, "127.0.0.1")
    bare = HTTPServer(Application([("/", Bare)]))
    bare.add_sockets(sockets)
    broker = Broker(Config(server=Server(port=0)), fixed={SECRET: local_principal()})
    await broker.start()
    await broker.listen()
    worker = Worker(broker)
    number = broker.engine.next_session()
    grants = (Grant(Role.WORKER),)
    broker.engine.feed(
        Attached(session=number, link=worker, principal="w", grants=grants, role=Role.WORKER, endpoint="e")
    )
    worker.session = broker.router.sessions.by_id[number]
    columns: dict[str, Callable[[], Awaitable[float]]] = {
        "client": lambda: cost_us(echo_port, "/", calls),
        "bare": lambda: cost_us(sockets[0].getsockname()[1], "/", calls),
        "call": lambda: cost_us(broker.port, "/call/e/m", calls),
        "refused": lambda: cost_us(broker.port, "/call/nobody/m", calls),
    }
    best = {name: min([await column() for _ in range(repeat)]) for name, column in columns.items()}
    server.close()
    bare.stop()
    await bare.close_all_connections()
    await broker.stop()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    best = asyncio.run(measure(options.calls, options.repeat))
    own = best["bare"] - best["client"]
    if options.json:
        print(json.dumps({name: round(total - best["client"], 1) for name, total in best.items() if name != "client"}))
        return
    print("column     µs in all   µs per request   × bare")
    for name, total in best.items():
        print(f"{name:<9} {total:10.1f} {total - best['client']:16.1f} {(total - best['client']) / own:8.2f}")


if __name__ == "__main__":
    main()
