"""`Client`: the same from threads, from inside a running event loop, and from a process that is interrupted."""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import broker as package
from broker.client.client import Client
from broker.node.broker import Broker
from broker.peer import errors
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_thread, our_threads

Running = tuple[Broker, asyncio.AbstractEventLoop]


@pytest.fixture
def running() -> Iterator[Running]:
    with broker_thread() as (broker, loop):
        worker = Worker("data", broker.url, SECRET)
        worker.add(lambda *arguments: list(arguments), "echo")
        worker.add(waiting, "hang")
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(20)
        yield broker, loop
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(20)


def waiting() -> str:
    """Block until nobody waits."""
    from broker.worker import current

    return f"cancelled {current().wait_cancelled(50)}"


def counted(running: Running, what: str) -> int:
    async def count() -> int:
        return running[0].router.counters.ended[what]

    return asyncio.run_coroutine_threadsafe(count(), running[1]).result(20)


def pending(running: Running) -> int:
    async def count() -> int:
        return running[0].router.pending.count

    return asyncio.run_coroutine_threadsafe(count(), running[1]).result(20)


def wait_until(condition: Any, what: str) -> None:
    waiter = threading.Event()
    for _ in range(2000):
        if condition():
            return
        waiter.wait(0.01)
    pytest.fail(f"never came true: {what}")


def test_the_same_names_as_the_asynchronous_one() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    inner = {"asked", "cancel_asked", "item", "items_ended", "heard", "link_changed", "gave_up", "standing_refused"}
    assert public(package.Client) == public(package.AsyncClient) - inner


def test_call_submit_map_publish_subscribe(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        assert client.is_connected
        assert client.url == running[0].url
        assert client.call("data/echo", [1, b"two"]) == [1, b"two"]
        assert client.submit("data/echo", [3]).result(20) == [3]
        assert list(client.map("data/echo", ([x] for x in range(50)), concurrency=4)) == [[x] for x in range(50)]
        assert client.describe("data")["endpoint"] == "data"
        assert [one["endpoint"] for one in client.endpoints()] == ["data"]
        assert client.ping()["peer"]
        client.notify("data/echo", [1])
        with client.subscribe("data") as messages:
            assert client.publish("data", "x")["listeners"] == 1
            assert messages.get(20).data == "x"
            client.publish("data", "y")
            for message in messages:
                assert message.data == "y"
                break
            with pytest.raises(TimeoutError):
                messages.get(0.01)
        assert list(messages) == []
        with pytest.raises(errors.RemoteError):
            list(client.map("data/hang", [[1]]))
        with pytest.raises(errors.DeadlineExceeded):
            client.call("data/hang", timeout=0.1)
        with pytest.raises(TypeError):
            client.call("data/echo", 5)
    assert not our_threads() or our_threads() == [name for name in our_threads() if name.startswith("worker-")]
    with pytest.raises(errors.ConnectionLost, match="closed"):
        client.call("data/echo")
    client.close()


def test_it_connects_by_itself_and_says_if_it_cannot(running: Running) -> None:
    client = Client(running[0].url, SECRET)
    assert client.call("data/echo", [1]) == [1]
    client.close()
    refused = Client("http://127.0.0.1:1", "x")
    with pytest.raises(errors.CannotConnect):
        refused.call("data/echo")
    refused.close()
    Client("http://127.0.0.1:1", "x").close()


def test_inside_a_running_event_loop_as_in_a_notebook(running: Running) -> None:
    async def cell() -> list[int]:
        with Client(running[0].url, SECRET) as client:
            result: list[int] = client.call("data/echo", [1, 2])
            return result

    assert asyncio.run(cell()) == [1, 2]


def test_waiting_in_its_own_thread_is_refused_instead_of_hanging(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        said: list[str] = []
        asked: list[Any] = []

        def done(future: Any) -> None:
            asked.append(client.submit("data/echo", [2]))
            for wait in (lambda: client.call("data/echo"), client.ping, lambda: next(client.map("data/echo", [[1]])),
                         client.close):  # fmt: skip
                try:
                    wait()
                except RuntimeError as error:
                    said.append(str(error))
            assert future.result() == [1]

        client.submit("data/hang").cancel()
        future = client.submit("data/echo", [1])
        future.add_done_callback(done)
        assert future.result(20) == [1]
        wait_until(lambda: len(said) == 4, "every wait was refused")
        assert all("cannot wait in its own thread" in text for text in said)
        assert asked[0].result(20) == [2]


def test_many_threads_use_one_client(running: Running) -> None:
    with Client(running[0].url, SECRET) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: client.call("data/echo", [x]), range(400)))
    assert found == [[x] for x in range(400)]


def test_cancelling_a_future_cancels_the_function(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        future = client.submit("data/hang")
        wait_until(lambda: pending(running) == 1, "it is pending")
        assert future.cancel()
        wait_until(lambda: counted(running, "cancelled") == 1, "it is cancelled")
        done, _ = concurrent.futures.wait([future], timeout=5)
        assert done == {future}
        assert pending(running) == 0


def test_close_ends_what_is_in_flight_in_other_threads(running: Running) -> None:
    client = Client(running[0].url, SECRET).connect()
    future = client.submit("data/hang")
    wait_until(lambda: pending(running) == 1, "it is pending")
    client.close()
    with pytest.raises(errors.ConnectionLost):
        future.result(5)


def test_a_forked_child_is_told(running: Running) -> None:
    client = Client(running[0].url, SECRET).connect()
    stream = client.stream("data/hang")
    client._process += 1
    with pytest.raises(RuntimeError, match="after a fork make a new one"):
        client.submit("data/echo")
    with pytest.raises(RuntimeError, match="after a fork make a new one"):
        next(stream)
    client._process -= 1
    stream.close()
    client.close()


def test_ctrl_c_cancels_at_the_worker(running: Running) -> None:
    program = """
import sys
from broker import Client
with Client(sys.argv[1], sys.argv[2]) as client:
    try:
        client.call("data/hang")
    except KeyboardInterrupt:
        print("interrupted")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, running[0].url, SECRET], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: pending(running) == 1, "it is pending")
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (b"interrupted\n", b"", 0)
    assert counted(running, "cancelled") == 1


def test_a_client_that_is_never_closed_does_not_keep_the_process(running: Running) -> None:
    program = 'import sys, broker; print(broker.Client(sys.argv[1], sys.argv[2]).call("data/echo", [1]))'
    done = subprocess.run(
        [sys.executable, "-c", program, running[0].url, SECRET], capture_output=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"[1]\n", b"", 0)
