"""`Worker` against a real broker: results, failures, cancelling, threads, loss, draining, signals."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.worker import Fault, NoRequest, current
from broker.worker.worker import Worker
from tests.peer.harness import CALLER, SECRET, broker_running, our_threads, run, until


def test_plain_and_async_functions_by_position_and_by_name() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET, name="camera 1")
            threads = set()

            @worker.method
            def add(a: int, b: int = 1) -> int:
                threads.add(threading.current_thread().name)
                return a + b

            @worker.method("named.otherwise")
            async def other(*, x: bytes) -> dict[str, bytes]:
                return {"x": x[::-1]}

            worker.add(lambda: None, "nothing")
            async with worker:
                assert await client.call("data/add", [1, 2]) == 3
                assert await client.call("data/add", {"a": 5}) == 6
                assert await client.call("data/named.otherwise", {"x": b"abc"}) == {"x": b"cba"}
                assert await client.call("data/nothing") is None
                assert all(name.startswith("worker-data") for name in threads)
                described = (await client.describe("data"))["workers"][0]
                assert described["info"]["name"] == "camera 1"
                assert described["capacity"] == 64
                assert described["methods"] == ["add", "named.otherwise", "nothing"]
                assert described["peer"] == worker.peer

    run(main)


def test_failures_of_every_kind_are_answered_and_the_worker_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even this")

    def raises(what: str) -> Any:
        if what == "value":
            raise ValueError("line 1\nline 2")
        if what == "exit":
            sys.exit("over and out")
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "unprintable":
            raise Unprintable
        if what == "fault":
            raise Fault("no beam", code=7, data={"energy": 0}, retryable=True)
        if what == "strange fault":
            raise Fault("x", data=object())
        if what == "long":
            raise ValueError("x" * 100_000)
        if what == "surrogate":
            raise ValueError("\ud800")
        if what == "cancelled":
            raise asyncio.CancelledError
        if what == "own code":
            raise Fault("pretends", code=-32003)
        return {"value": {1, 2}}

    async def araises(what: str) -> Any:
        return raises(what)

    expected = {
        "value": ("ValueError", "line 1\nline 2"),
        "exit": ("SystemExit", "the function called sys.exit('over and out'); the worker goes on"),
        "interrupt": ("KeyboardInterrupt", "KeyboardInterrupt"),
        "unprintable": ("Unprintable", "Unprintable"),
        "strange fault": ("Fault", "x"),
        "long": ("ValueError", "x" * 4000),
        "surrogate": ("ValueError", "?"),
        "cancelled": ("CancelledError", "CancelledError"),
        "set": ("ValueUnfit", "the result cannot be sent: a value of type set is no JSON; make it a list"),
    }

    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET, timeout=10) as client:
            worker = Worker("data", broker.url, SECRET)
            worker.add(raises)
            worker.add(araises)
            async with worker:
                for method in ("raises", "araises"):
                    for what, (kind, text) in expected.items():
                        with pytest.raises(errors.RemoteError) as caught:
                            await client.call(f"data/{method}", [what])
                        assert (caught.value.type, caught.value.detail, caught.value.code) == (kind, text, -32000)
                        assert not caught.value.retryable
                    with pytest.raises(errors.RemoteError) as caught:
                        await client.call(f"data/{method}", ["fault"])
                    error = caught.value
                    assert (error.code, error.detail, error.data, error.retryable) == (
                        7,
                        "no beam",
                        {"energy": 0},
                        True,
                    )
                    with pytest.raises(errors.RemoteError) as caught:
                        await client.call(f"data/{method}", ["own code"])
                    assert caught.value.code == -32000, "the broker's codes are the broker's"
                    for params in ([], {"other": 1}, [1, 2]):
                        with pytest.raises(errors.RemoteError, match="Invalid params: ") as caught:
                            await client.call(f"data/{method}", params)
                        assert caught.value.code == -32602
            assert broker.router.counters.ended["worker_error"] == 2 * (len(expected) + 5)

    with caplog.at_level(logging.WARNING):
        run(main)
    assert "data/raises failed: line 1" in caplog.text
    assert "Traceback" in caplog.text


def test_a_result_too_large_and_params_that_are_no_container() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET, timeout=10) as client:
            worker = Worker("data", broker.url, SECRET)
            worker.add(bytes, "zeros")
            async with worker:
                assert len(await client.call("data/zeros", [1000])) == 1000
                assert await client.call("data/zeros", [17 << 20]) == bytes(17 << 20), "it travels in pieces by itself"
                assert worker._connection is not None
                worker._connection.session.value_max_bytes = 18 << 20
                with pytest.raises(errors.RemoteError, match="above the bound"):
                    await client.call("data/zeros", [19 << 20])
                assert await client.call("data/zeros", [1]) == b"\0"
                assert client.is_connected
                assert client._connection is not None
                raw = client._connection.request("data/zeros", b'"text"')
                with pytest.raises(errors.RemoteError, match="Invalid params: params is 'text'"):
                    await raw

    run(main)


def test_cancelling_reaches_the_function() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET, capacity=4)
            seen: list[object] = []

            @worker.method
            def blocks() -> None:
                request = current()
                assert (request.endpoint, request.method) == ("data", "blocks")
                assert request.left_s is not None
                assert 0 < request.left_s <= 0.3
                seen.append(request.wait_cancelled(20))
                seen.append(request.cancelled)

            @worker.method
            async def sleeps() -> None:
                try:
                    await asyncio.sleep(20)
                finally:
                    seen.append(current().cancelled)

            async with worker:
                for method in ("blocks", "sleeps"):
                    seen.clear()
                    with pytest.raises(errors.DeadlineExceeded):
                        await client.call(f"data/{method}", timeout=0.3)
                    await until(lambda: seen, "it has heard of it")
                    assert all(one is True for one in seen)
                await until(lambda: not worker.executing, "nothing runs any more")
            assert not worker._answering._by_id
            with pytest.raises(NoRequest):
                current()

    run(main)


def test_a_function_that_blocks_for_ever_costs_its_slot_and_nothing_else() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            release = threading.Event()
            worker = Worker("data", broker.url, SECRET, capacity=2, drain=0.1)
            worker.add(lambda: release.wait(30), "blocks")
            worker.add(lambda: 1, "one")
            async with worker:
                with pytest.raises(errors.DeadlineExceeded):
                    await client.call("data/blocks", timeout=0.1)
                assert await client.call("data/one") == 1
                began = time.monotonic()
            assert time.monotonic() - began < 10, "it does not wait for it either"
            release.set()
            await until(lambda: not any(t.name.startswith("worker-") for t in threading.enumerate()), "threads ended")

    run(main)


def test_threads_that_all_hang_are_told_and_what_waits_behind_them_is_kept_by_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            release = threading.Event()
            begun: list[int] = []

            def blocks(number: int, data: bytes = b"") -> int:
                begun.append(number)
                release.wait(30)
                return number

            worker = Worker("data", broker.url, SECRET, capacity=2, drain=0.1)
            worker.add(blocks)
            async with worker:
                for number in range(4):
                    with pytest.raises(errors.DeadlineExceeded):
                        await client.call("data/blocks", [number, b"x" * 1000], timeout=0.1)
                await until(lambda: worker.executing == 2, "what was not begun is forgotten")
                assert begun == [0, 1]
                waits = asyncio.create_task(client.call("data/blocks", [4]))
                release.set()
                assert await waits == 4
                assert begun == [0, 1, 4]
                await until(lambda: not worker.executing, "all threads have returned")
            await until(lambda: not our_threads(), "threads ended")

    run(main)
    (told,) = [record.getMessage() for record in caplog.records if "busy" in record.getMessage()]
    assert told.startswith("all 2 threads are busy with requests that nobody waits for any more, the first with data/b")


def test_capacity_bounds_how_many_run_at_once() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            lock = threading.Lock()
            now, most = 0, 0

            def work() -> None:
                nonlocal now, most
                with lock:
                    now += 1
                    most = max(most, now)
                time.sleep(0.005)
                with lock:
                    now -= 1

            worker = Worker("data", broker.url, SECRET, capacity=3)
            worker.add(work)
            async with worker:
                await asyncio.gather(*(client.call("data/work") for _ in range(40)))
            assert 2 <= most <= 3

    run(main)


def test_it_comes_back_and_serves_again() -> None:
    async def main() -> None:
        worker = Worker("data", "http://127.0.0.1:1", SECRET)
        worker.add(lambda: "here", "where")
        running: asyncio.Event = asyncio.Event()
        cancelled = []

        @worker.method
        async def hang() -> None:
            running.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        async with broker_running() as broker:
            port = broker.port
            worker._target = lambda: (f"http://127.0.0.1:{port}", SECRET)
            await worker.start()
            async with AsyncClient(broker.url, SECRET) as client:
                assert await client.call("data/where") == "here"
                hanging = asyncio.create_task(client.call("data/hang"))
                await running.wait()
                broker.links.links[0].abort()
                with pytest.raises(errors.WorkerLost):
                    await hanging
                await until(lambda: cancelled, "nobody waits for it: it is cancelled")
                assert await client.call("data/where", wait=True, timeout=20) == "here"
        async with broker_running(port), AsyncClient(f"http://127.0.0.1:{port}", SECRET) as client:
            assert await client.call("data/where", wait=True, timeout=20) == "here"
            await worker.stop()
            with pytest.raises(errors.NoWorker):
                await client.call("data/where")

    run(main)


def test_it_waits_for_a_broker_unless_told_not_to() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            port = broker.port
        url = f"http://127.0.0.1:{port}"
        impatient = Worker("data", url, SECRET, wait=False)
        impatient.add(lambda: 1, "one")
        with pytest.raises(errors.CannotConnect):
            await impatient.start()
        patient = Worker("data", url, SECRET)
        patient.add(lambda: 1, "one")
        starting = asyncio.create_task(patient.start())
        await asyncio.sleep(0.05)
        async with broker_running(port):
            await starting
            await patient.stop()

    run(main)


def test_what_the_broker_does_not_allow_ends_it() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            for token, kind in ((CALLER, errors.Denied), ("wrong" * 9, errors.Refused)):
                worker = Worker("data", broker.url, token)
                worker.add(lambda: 1, "one")
                with pytest.raises(kind):
                    await worker.start()
            worker = Worker("data", broker.url, SECRET)
            worker.add(lambda: 1, "one")
            await worker.start()
            broker.links.links[0].close(4403, "go away")
            with pytest.raises(errors.ConnectionLost, match="4403 go away"):
                await worker.wait()
            await worker.stop()

    run(main)


def test_two_workers_of_one_name_share_the_work() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            workers = [Worker("data", broker.url, SECRET, name="twin") for _ in range(2)]
            for number, worker in enumerate(workers):
                worker.add(lambda number=number: number, "who")
                await worker.start()
            found = {await client.call("data/who") for _ in range(10)}
            assert found == {0, 1}
            for worker in workers:
                await worker.stop()

    run(main)


def test_stopping_drains() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET)
            begun, release = asyncio.Event(), asyncio.Event()

            @worker.method
            async def wait() -> str:
                begun.set()
                await release.wait()
                return "done"

            await worker.start()
            call = asyncio.create_task(client.call("data/wait"))
            await begun.wait()
            stopping = asyncio.create_task(worker.stop())
            await until(lambda: not broker.router.registry.by_name["data"].registrations, "it takes no more")
            with pytest.raises(errors.NoWorker):
                await client.call("data/wait")
            release.set()
            assert await call == "done"
            await stopping
            await worker.stop()

    run(main)


def test_notifications_and_publishing_from_a_thread() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET)

            @worker.method
            def note(text: str) -> None:
                worker.publish({"noted": text}, topic="notes")
                worker.publish(b"bytes")

            async with worker, await client.subscribe("data", topic="notes") as notes:
                everything = await client.subscribe("data")
                await client.notify("data/note", ["hello"])
                assert (await notes.get(10)).data == {"noted": "hello"}
                assert (await everything.get(10)).data == b"bytes"
                await client.notify("data/note", [1, 2, 3])  # wrong, and nobody is told
                await client.call("data/note", ["again"])
                assert (await notes.get(10)).data == {"noted": "again"}
            await until(lambda: not worker.executing, "nothing runs any more")

    run(main)


def test_publishing_before_the_start_and_after_the_end_is_lost() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            worker = Worker("data", broker.url, SECRET)
            worker.add(lambda: None, "nothing")
            worker.publish("too early")
            await worker.start()
            await worker.stop()
            worker.publish("too late")

    run(main)


def test_draining_does_not_wait_for_what_nobody_waits_for() -> None:
    async def main() -> None:
        hanging = threading.Event()
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET, drain=50)
            worker.add(hanging.wait, "hang")
            await worker.start()
            with pytest.raises(errors.DeadlineExceeded):
                await client.call("data/hang", timeout=0.1)
            async with asyncio.timeout(20):
                await worker.stop()
            hanging.set()
            await until(lambda: not our_threads(), "the thread has ended")

    run(main)


def test_a_fallback_answers_every_method() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET)
            worker.add_fallback(lambda method, params: [method, params])
            async with worker:
                assert await client.call("data/anything", {"a": 1}) == ["anything", {"a": 1}]
                assert await client.call("data/other") == ["other", None]

    run(main)


def test_mistakes_in_the_program_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="no name of an endpoint"):
        Worker("a/b")
    with pytest.raises(ValueError, match="capacity 0"):
        Worker("data", capacity=0)
    worker = Worker("data", "http://127.0.0.1:1", "x")
    worker.add(len)
    with pytest.raises(ValueError, match="has a method len already"):
        worker.add(len)
    with pytest.raises(ValueError, match="no public methods"):
        worker.add_object(object())
    with pytest.raises(ValueError, match="has no methods"):
        asyncio.run(Worker("data", "http://127.0.0.1:1", "x").start())


PROGRAM = """
import asyncio, sys, time, logging
from broker import Worker
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
worker = Worker("data", sys.argv[1], sys.argv[2])
@worker.method
async def stubborn():
    print("begun", flush=True)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

@worker.method
def slow(s):
    print("begun", flush=True)
    time.sleep(s)
    return "finished"
worker.run()
print("clean", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_drains_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROGRAM, broker.url, SECRET, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            call = asyncio.create_task(client.call("data/slow", [0.5], wait=True))
            assert process.stdout is not None
            while b"begun" not in await process.stdout.readline():
                pass
            os.kill(process.pid, number)
            assert await call == "finished"
            out, err = await process.communicate()
            assert (process.returncode, err) == (0, b"")
            assert out.endswith(b"clean\n")

    run(main)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROGRAM, broker.url, SECRET, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            call = asyncio.create_task(client.call("data/slow", [60], wait=True))
            assert process.stdout is not None
            while b"begun" not in await process.stdout.readline():
                pass
            os.kill(process.pid, signal.SIGTERM)
            while b"draining" not in await process.stdout.readline():
                pass
            os.kill(process.pid, signal.SIGTERM)
            with pytest.raises(errors.WorkerLost):
                await call
            assert await process.wait() == 0

    run(main)


def test_a_coroutine_that_swallows_its_cancelling_does_not_keep_the_process() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROGRAM, broker.url, SECRET, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            call = asyncio.create_task(client.call("data/stubborn", wait=True))
            assert process.stdout is not None
            while b"begun" not in await process.stdout.readline():
                pass
            call.cancel()
            process.send_signal(signal.SIGTERM)
            out, _ = await asyncio.wait_for(process.communicate(), 20)
            assert process.returncode == 0
            assert b"data/stubborn is cancelled and does not end; left behind" in out
            assert b"clean" in out.splitlines()

    run(main)


def test_a_killed_worker_is_told_to_the_caller() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROGRAM, broker.url, SECRET, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            call = asyncio.create_task(client.call("data/slow", [60], wait=True))
            assert process.stdout is not None
            while b"begun" not in await process.stdout.readline():
                pass
            process.kill()
            with pytest.raises(errors.WorkerLost, match="The request may have run") as caught:
                await call
            assert caught.value.worker
            await process.communicate()

    run(main)
