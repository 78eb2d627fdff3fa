"""Where the door may be, on which loop, and what becomes of peers that stop, die or come back."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.auth.connection_files import write_connection_file
from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.worker.worker import Worker
from tests.links.harness import LOOPS
from tests.transports.websocket.harness import ADMIN
from tests.transports.zeromq.harness import Raw, run, running, until
from tests.transports.zeromq.test_hostile import WORKER
from tests.transports.zeromq.test_subscribers import subscriber

KEY = "0123456789abcdef0123456789abcdef"


def has_ipv6() -> bool:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = context.socket(zmq.ROUTER)
        socket.set(zmq.IPV6, 1)
        socket.bind("tcp://[::1]:*")
        return True
    except zmq.ZMQError:
        return False
    finally:
        context.destroy(linger=0)


def door(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "ipc":
        return {"transport": "ipc", "host": str(folder / "door")}
    if kind == "ipv6" and not has_ipv6():
        pytest.skip("there is no IPv6 here")
    return {"host": "::1" if kind == "ipv6" else "127.0.0.1"}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["ipc", "ipv6", "ipv4"])
def test_the_door_is_the_same_over_ipc_and_ipv6_and_on_each_loop(kind: str, loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        section = door(kind, tmp_path) | {"roles": ["caller", "worker", "listener"]}
        async with running(zeromq=section, limits={"header_timeout_s": 0.5}) as home:
            file = tmp_path / "zeromq.json"
            write_connection_file(file, home.info)
            where = str(file) if kind == "ipc" else home.url
            begun, gate = asyncio.Event(), asyncio.Event()

            async def hang() -> None:
                begun.set()
                await gate.wait()

            worker = Worker("data", where)
            worker.add(lambda value: value, name="echo")
            worker.add(hang)
            await worker.start()
            async with AsyncClient(where) as client, AsyncClient(where, ADMIN) as other, Raw(home.info) as raw:
                assert await client.call("data/echo", {"value": bytes(2_000_000)}) == bytes(2_000_000)
                if kind == "ipc":
                    remotes = {peer.link.remote for peer in home.door.shell.peers.values()}
                    assert remotes == {f"localhost:{os.getuid()}:{os.getgid()}"}
                assert await asyncio.gather(*(other.call("data/echo", [at]) for at in range(300))) == [*range(300)]
                topic = (await raw.ask("topic_key_request", {"endpoint": "data", "topic": "news"}))["result"]["topic"]
                async with subscriber(home.info, topic.encode()) as listener:
                    await until(lambda: home.door.topics == 1, "it listens")
                    await raw.ask("publish_request", {"endpoint": "data", "topic": "news", "data": 1})
                    assert await listener.poll(5000)
                async with Raw(home.info):
                    await until(lambda: home.door.counters.evicted == 1, "who says nothing is put out")
                call = asyncio.create_task(client.call("data/hang"))
                await begun.wait()
                worker._connection._link.abort()  # type: ignore[union-attr]
                with pytest.raises(errors.WorkerLost):
                    await call
            gate.set()
            await worker.stop(now=True)
            await until(lambda: home.door.peers == 0, "nobody is left")
            assert home.refused() == {}
        assert not list(tmp_path.glob("door*"))

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_fault_02_a_worker_that_stands_still_is_noticed_by_its_silence(loop: str) -> None:
    """Stopped (SIGSTOP), its system still takes what comes, as on a machine that hangs: only its pongs are missing."""

    async def main() -> None:
        async with running(limits={"ping_interval_s": 0.3, "ping_timeout_s": 0.3}) as home:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", WORKER, home.url, stdout=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            async with AsyncClient(home.url) as client:
                try:
                    assert await process.stdout.readline() == b"ready\n"
                    call = asyncio.create_task(client.call("data/hang"))
                    assert await process.stdout.readline() == b"begun\n"
                    process.send_signal(signal.SIGSTOP)
                    async with asyncio.timeout(10):
                        with pytest.raises(errors.WorkerLost):
                            await call
                    assert home.counters.ended["worker_lost"] == 1
                    process.send_signal(signal.SIGCONT)  # it comes back by itself
                    await until(lambda: home.door.peers == 2, "it is back")
                finally:
                    with suppress(ProcessLookupError):
                        process.send_signal(signal.SIGKILL)
                    await process.wait()

    run(main, loop)


def test_a_worker_that_asked_for_a_grace_comes_back_and_answers() -> None:
    async def main() -> None:
        async with running() as home:
            begun, gate = asyncio.Event(), asyncio.Event()
            executed: list[int] = []

            async def read(number: int) -> bytes:
                executed.append(number)
                begun.set()
                await gate.wait()
                return b"voxels" * 100_000

            worker = Worker("data", home.url, grace=30)
            worker.add(read)
            await worker.start()
            async with AsyncClient(home.url) as client:
                call = asyncio.create_task(client.call("data/read", [7]))
                await begun.wait()
                worker._connection._link.abort()  # type: ignore[union-attr]
                await until(lambda: home.door.peers == 1, "its link is gone")
                gate.set()  # it answers while there is no link
                assert await call == b"voxels" * 100_000
                assert executed == [7]
                assert home.counters.attempts == 1
                assert "worker_lost" not in home.counters.ended or not home.counters.ended["worker_lost"]
                assert await client.call("data/read", [8]) == b"voxels" * 100_000
            await worker.stop(now=True)

    run(main)


def test_a_worker_that_does_not_come_back_within_its_grace_is_lost() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            asked = {"endpoint": "data", "role": "worker", "grace": 0.3}
            assert (await raw.ask("attach_request", asked))["status"] == "ok"
            async with AsyncClient(home.url) as client:
                call = asyncio.create_task(client.call("data/read"))
                await raw.find("call_request")
                raw.close()
                with pytest.raises(errors.WorkerLost):
                    await call

    run(main)


def test_who_comes_back_under_the_same_routing_id_after_a_silent_end_gets_in() -> None:
    """libzmq keeps the id for the connection that had it until that is gone, and ignores the new one for good; so the
    broker ends who says nothing, and libzmq tries again."""

    async def main() -> None:
        limits = {"header_timeout_s": 0.5, "ping_interval_s": 0.5, "ping_timeout_s": 0.5}
        async with running(limits=limits) as home:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", FIXED, home.info.url("shell"), home.info.key, stdout=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"attached\n"
            process.send_signal(signal.SIGSTOP)
            try:
                async with Raw(home.info, routing_id=b"scanner") as raw:
                    for _ in range(20):  # what it says until it is let in is lost
                        msg_id = await raw.send("ping_request")
                        if await raw.socket.poll(500):
                            break
                    assert (await raw.find("ping_reply"))["content"]["status"] == "ok", msg_id
            finally:
                os.kill(process.pid, signal.SIGKILL)
                await process.wait()

    run(main)


FIXED = """
import sys, zmq
from jupyter_client.session import Session
context = zmq.Context()
socket = context.socket(zmq.DEALER)
socket.routing_id = b"scanner"
socket.connect(sys.argv[1])
session = Session(key=sys.argv[2].encode())
session.send(socket, "attach_request", {})
socket.recv_multipart()
print("attached", flush=True)
socket.recv_multipart()
"""
