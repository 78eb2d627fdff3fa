"""Accepting within bounds, over real sockets; running out of file descriptors in a process of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys

import pytest

from broker.links.acceptor import AcceptLimits, Opens
from tests.links.harness import LOOPS, Echoing, frame, raw_client, run, serving, until

loops = pytest.mark.parametrize("loop", LOOPS)


def nobody(connection: socket.socket, address: tuple[object, ...], data: bytes) -> bool:
    """Looks at what comes, and opens nothing."""
    assert data
    return False


async def silent(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What still comes; a socket closed with bytes unread is reset."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def let_go(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


@loops
@pytest.mark.parametrize(("kind", "opens"), [("socket", None), ("socket", nobody), ("tls", None), ("tls", nobody)])
def test_a_socket_without_a_first_request_is_closed(loop: str, kind: str, opens: Opens | None) -> None:
    async def main() -> None:
        async with serving(kind, accept_limits=AcceptLimits(first_request_s=0.3), opens=opens) as server:
            mute, first = await silent(server.port)
            slow, second = await silent(server.port)
            second.write(b"GET /plain HTTP/1.1\r\nHost: loc" if kind == "socket" else b"\x16\x03\x01\x02\x00")
            assert await rest(mute) == b""
            assert await rest(slow) == b""
            assert server.acceptor.counters.silent_closed == 2
            assert server.acceptor.unauthenticated == 0
            await let_go([first, second])

    run(main, loop)


@loops
def test_a_socket_with_a_first_request_stays(loop: str) -> None:
    async def main() -> None:
        async with serving(accept_limits=AcceptLimits(first_request_s=0.2)) as server:
            reader, writer = await silent(server.port)
            writer.write(b"GET /plain HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"plain")
            mute, other = await silent(server.port)
            await rest(mute)
            writer.write(b"GET /plain HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"plain")
            assert server.acceptor.counters.silent_closed == 1
            await let_go([writer, other])

    run(main, loop)


@loops
@pytest.mark.parametrize(
    ("limits", "counter"),
    [
        (AcceptLimits(unauthenticated_max=3), "refused_total"),
        (AcceptLimits(unauthenticated_loopback_max=3), "refused_address"),
    ],
)
@pytest.mark.parametrize("opens", [None, nobody])
def test_unauthenticated_sockets_are_capped_and_others_not(
    loop: str, limits: AcceptLimits, counter: str, opens: Opens | None
) -> None:
    async def main() -> None:
        async with serving(accept_limits=limits, receiver=Echoing, opens=opens) as server, raw_client(server) as client:
            held = [await silent(server.port) for _ in range(3)]
            await until(lambda: server.acceptor.unauthenticated == 3, "all are in")
            refused, fourth = await silent(server.port)
            assert await rest(refused) == b""
            assert getattr(server.acceptor.counters, counter) == 1
            client.writer.write(frame(1, b"still served"))
            assert await client.frame() == (1, b"still served")
            await let_go([held[0][1]])
            await until(lambda: server.acceptor.unauthenticated == 2, "one left")
            async with raw_client(server):
                assert server.acceptor.unauthenticated == 2
            await let_go([fourth, *(writer for _, writer in held[1:])])

    run(main, loop)


@loops
def test_a_socket_is_counted_once_whoever_takes_it_and_dropped_with_the_acceptor(loop: str) -> None:
    taken: list[tuple[socket.socket, bytes]] = []

    def opens(connection: socket.socket, address: tuple[object, ...], data: bytes) -> bool:
        if data.startswith(b"fail"):
            raise RuntimeError("on purpose")
        if data.startswith(b"mine"):
            taken.append((connection, connection.recv(100)))
        return data.startswith(b"mine")

    async def main() -> None:
        async with serving(accept_limits=AcceptLimits(first_request_s=0.3), opens=opens) as server:
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            acceptor, counters = server.acceptor, server.acceptor.counters
            _, first = await silent(server.port)
            first.write(b"mine and all that")
            await until(lambda: taken != [], "it was taken")
            assert taken[0][1] == b"mine and all that"
            assert (acceptor.unauthenticated, counters.accepted) == (0, 1)
            _, second = await silent(server.port)
            await until(lambda: acceptor.unauthenticated == 1, "one waits")
            await let_go([second])
            await until(lambda: acceptor.unauthenticated == 0, "it has left without a word")
            plain, third = await silent(server.port)
            third.write(b"GET /plain HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await plain.readline()).startswith(b"HTTP/1.1 ")
            failing, fourth = await silent(server.port)
            fourth.write(b"fail")
            assert await rest(failing) == b"", "what raises costs one connection, in its time"
            assert (counters.accepted, counters.silent_closed) == (4, 1)
            waiting, fifth = await silent(server.port)
            await until(lambda: counters.accepted == 5, "one more waits")
            acceptor.close()
            assert await rest(waiting) == b""
            taken[0][0].close()
            await let_go([first, third, fourth, fifth])

    run(main, loop)


class Failing:
    """As an SSLContext where the peer is gone already, with its socket or without."""

    def __init__(self, closes: bool) -> None:
        self.closes = closes

    def wrap_socket(self, connection: socket.socket, **_: object) -> socket.socket:
        if self.closes:
            socket.close(connection.detach())
        raise OSError("gone")


@loops
@pytest.mark.parametrize("closes", [True, False])
def test_a_socket_for_which_tls_cannot_begin_is_counted_and_closed(loop: str, closes: bool) -> None:
    async def main() -> None:
        async with serving() as server:
            server.acceptor.ssl_context = Failing(closes)  # type: ignore[assignment]
            reader, writer = await silent(server.port)
            assert await rest(reader) == b""
            counters = server.acceptor.counters
            assert (counters.tls_failed, counters.accepted, server.acceptor.unauthenticated) == (1, 0, 0)
            await let_go([writer])

    run(main, loop)


@loops
def test_accepts_beyond_the_rate_wait_and_are_served(loop: str) -> None:
    async def main() -> None:
        async with serving(accept_limits=AcceptLimits(accepts_per_s_max=50)) as server:
            began = asyncio.get_running_loop().time()
            pairs = await asyncio.gather(*(silent(server.port) for _ in range(20)))
            await until(lambda: server.acceptor.counters.accepted == 20, "all were accepted")
            assert asyncio.get_running_loop().time() - began > 0.25
            await let_go([writer for _, writer in pairs])

    run(main, loop)


@loops
def test_garbage_instead_of_tls_is_closed(loop: str) -> None:
    async def main() -> None:
        async with serving("tls") as server:
            reader, writer = await silent(server.port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await rest(reader)
            await until(lambda: server.acceptor.unauthenticated == 0, "forgotten")
            await let_go([writer])

    run(main, loop)


@pytest.mark.parametrize("name", AcceptLimits.__slots__)
def test_limits_that_let_nobody_in_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        AcceptLimits(**{name: 0})


EXHAUSTED = """
import asyncio, json, logging, resource, socket, sys, time
from tests.links.harness import LOOPS, frame, raw_client, run, serving, until
from broker.links.acceptor import AcceptLimits
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger().addHandler(Keep())
async def main():
    limits = AcceptLimits(pause_s=0.2)
    async with serving(accept_limits=limits) as server:
        counters = server.acceptor.counters
        async with raw_client(server):
            pass
        clients = [socket.socket() for _ in range(20)]
        used = max(client.fileno() for client in clients) + 5
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", server.port))
        await until(lambda: counters.pauses >= 1, "paused")
        accepted, cpu, pauses = counters.accepted, time.process_time(), counters.pauses
        await asyncio.sleep(1)
        cpu = time.process_time() - cpu
        pauses = counters.pauses - pauses
        stuck = counters.accepted - accepted
        for client in clients[:15]:
            client.close()
        await until(lambda: counters.accepted >= 18, "accepting went on")
        async with raw_client(server):
            served = True
        for client in clients:
            client.close()
    print(json.dumps({"cpu": cpu, "pauses": pauses, "stuck": stuck, "lines": lines, "served": served}))
run(main, sys.argv[1])
"""


@loops
def test_without_file_descriptors_accepting_pauses_and_resumes(loop: str) -> None:
    done = subprocess.run([sys.executable, "-c", EXHAUSTED, loop], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["served"]
    assert told["stuck"] == 0
    assert 2 <= told["pauses"] <= 6
    assert told["cpu"] < 0.3
    about = [line for line in told["lines"] if line.startswith("accepting pauses for 0.2 s: Too many open files")]
    assert len(about) == len(told["lines"]) <= 20
