"""Start and stop of a broker in a program: in any order, from anywhere, with threads and hooks in the midst of it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from broker import AsyncClient, Broker, errors
from broker.node.presence import Peer
from tests.node.hosting import descriptors, embedded, hosting, in_thread, in_threads
from tests.transports.websocket.harness import ADMIN, run, until


def add(a: float, b: float) -> float:
    return a + b


async def sleep() -> None:
    await asyncio.get_running_loop().create_future()


# ── start and stop ──


def test_it_stops_before_its_start_and_twice_and_starts_once_only() -> None:
    async def main() -> None:
        broker = Broker()
        await broker.stop()
        await broker.start()
        with pytest.raises(RuntimeError, match="runs already"):
            await broker.start()
        await asyncio.gather(broker.stop(), broker.stop())
        await broker.stop()

    run(main)


def test_started_again_on_another_loop_it_serves_what_it_served() -> None:
    broker = Broker()
    met: list[Peer] = []
    broker.endpoint("echo", lambda peer, method, params: method, met.append)
    gone = broker.serve("gone", {"add": add})
    broker.reject("shut", "for today")

    async def main() -> None:
        async with broker:
            assert await broker.request("echo/hello") == "hello"
            assert await asyncio.to_thread(broker.request_from_thread, "echo/thread") == "thread"
            with pytest.raises(errors.Denied):
                await broker.request("shut/anything")
            async with AsyncClient(broker) as client:
                await client.subscribe("echo")
            await gone.close()

    asyncio.run(main())
    asyncio.run(main())
    assert len(met) == 2
    assert [served.endpoint for served in broker._served] == ["echo"]


def test_a_hundred_lives_leave_what_one_leaves() -> None:
    async def life() -> None:
        broker = Broker()
        await broker.start()
        broker.serve("sum", {"add": add, "sleep": sleep})
        waits = broker.submit("sum/sleep")
        assert await asyncio.to_thread(broker.request_from_thread, "sum/add", [1, 2]) == 3
        await broker.stop()
        assert isinstance(waits.exception(), errors.ShuttingDown)

    async def main() -> None:
        loop, both = asyncio.get_running_loop(), threading.Barrier(2)
        loop.set_default_executor(ThreadPoolExecutor(2))  # whose threads are all there from the start
        await asyncio.gather(*(loop.run_in_executor(None, both.wait) for _ in range(2)))
        await life()
        gc.collect()
        before = descriptors(), threading.active_count(), len(asyncio.all_tasks())
        objects = len(gc.get_objects())
        for _ in range(100):
            await life()
        gc.collect()
        assert (descriptors(), threading.active_count(), len(asyncio.all_tasks())) == before
        assert len(gc.get_objects()) < objects + 2000  # a life has thousands

    run(main)


def test_functions_may_be_taken_back_before_the_start() -> None:
    async def main() -> None:
        broker = Broker()
        await broker.endpoint("early", None, lambda peer: None).close()
        broker.endpoint("early", lambda peer, method, params: "second", lambda peer: None)
        async with broker:
            assert await broker.request("early/x") == "second"

    run(main)


@pytest.mark.parametrize("where", ["hook", "function", "cancelled"])
def test_a_stop_is_whole_though_it_ends_who_waits_for_it(where: str) -> None:
    """The functions of the broker are ended by its end; what they began is not."""

    async def main() -> None:
        broker = Broker()
        asked = asyncio.Event()

        async def stop(*_: Any) -> None:
            asked.set()
            await broker.stop()

        broker.endpoint("end", stop, stop if where == "hook" else None)
        broker.endpoint("busy", lambda peer, method, params: time.sleep(0.05))
        await broker.start()
        engine, waits = broker.engine, broker.submit("busy/x")
        while not broker.pending():
            await asyncio.sleep(0)
        if where == "hook":
            client = await AsyncClient(broker).connect()
            await client.subscribe("end")
        elif where == "function":
            broker.submit("end/now")
        else:
            task = asyncio.create_task(stop())
            await asked.wait()
            await asyncio.sleep(0)
            task.cancel()
        await asked.wait()
        await broker.stop()
        assert engine._stopped and broker._stopping is None
        assert isinstance(waits.exception(), errors.ShuttingDown)
        await until(lambda: len(asyncio.all_tasks()) == 1, "no task is left")
        if where == "hook":
            await client.close()

    run(main)


# ── where it does not belong ──


def test_what_belongs_to_the_loop_is_refused_elsewhere_and_harms_nothing() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", {"add": add})

        async def elsewhere() -> None:
            for wrong in (
                broker.request("sum/add", [1, 2]), broker.drain(1), broker.close_all("x"), broker.stop(),
                broker.listen(),
            ):  # fmt: skip
                with pytest.raises(RuntimeError, match="event loop that the broker was started on"):
                    await wrong
            with pytest.raises(RuntimeError, match="event loop that the broker was started on"):
                broker.stream("sum/add", [1, 2])
            assert broker.request_from_thread("sum/add", [1, 2]) == 3  # it blocks that loop, not the broker's

        await in_thread(lambda: asyncio.run(elsewhere()))
        with pytest.raises(RuntimeError, match="event loop that the broker was started on"):
            await in_thread(lambda: broker.stream("sum/add", [1, 2]))
        assert await broker.request("sum/add", [1, 2]) == 3
        broker.router.check()
        await broker.stop()

    run(main)


def test_after_a_fork_a_thread_is_told_and_does_not_wait() -> None:
    """In the child the lock may be held for ever, by a thread that is not there."""

    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", {"add": add})
        lock = broker._threads._lock

        def fork() -> int:
            with lock:  # as another thread holds it at that moment
                child = os.fork()
            if child:
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            code = 1
            try:
                signal.alarm(10)
                lock.acquire(blocking=False)
                broker.request_from_thread("sum/add", [1, 2])
            except RuntimeError as error:
                code = 0 if "fork" in str(error) else 2
            finally:
                os._exit(code)

        assert await in_thread(fork) == 0
        assert await asyncio.to_thread(broker.request_from_thread, "sum/add", [1, 2]) == 3
        await broker.stop()

    run(main)


def test_threads_are_told_when_the_loop_has_ended_and_the_broker_was_forgotten() -> None:
    told: list[object] = []
    asked = threading.Barrier(4)
    broker = Broker()

    def call() -> None:
        asked.wait()
        broker.request_from_thread("far/away", wait=True)

    def stream() -> None:
        asked.wait()
        for _ in broker.stream_from_thread("far/away", wait=True):
            pass

    def progress() -> None:
        asked.wait()
        broker.request_from_thread("far/away", wait=True, progress=lambda *_: None)

    def thread(function: Any) -> None:
        try:
            function()
        except BaseException as error:
            told.append(error)

    threads = [threading.Thread(target=thread, args=(one,), daemon=True) for one in (call, stream, progress)]

    async def main() -> None:
        await broker.start()
        for each in threads:
            each.start()
        await asyncio.to_thread(asked.wait)
        while len(broker.pending()) < 3:
            await asyncio.sleep(0.001)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    for each in threads:
        each.join(10)
    assert [type(error) for error in told] == [errors.ConnectionLost] * 3
    assert all(error.may_have_executed for error in told if isinstance(error, errors.ConnectionLost))


def test_each_of_many_threads_that_ask_while_it_stops_has_one_outcome() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", {"add": add, "sleep": sleep}, capacity=100)
        under_way = threading.Semaphore(0)

        def ask(number: int) -> object:
            if number % 2:
                return broker.request_from_thread("sum/sleep", timeout=50)
            while True:
                assert broker.request_from_thread("sum/add", [number, 1]) == number + 1
                under_way.release()

        async def stop() -> None:
            for _ in range(200):
                await asyncio.to_thread(under_way.acquire)
            await until(lambda: broker.router.pending.count >= 50, "all sleep")
            await broker.stop()

        stopping = asyncio.create_task(stop())
        told = await in_threads(100, ask)
        await stopping
        kinds = {type(error) for error in told}
        assert kinds <= {errors.ShuttingDown, errors.ConnectionLost, RuntimeError}
        assert {type(error) for error in told[1::2]} == {errors.ShuttingDown}

    run(main)


# ── hooks and functions that misbehave ──


def test_a_hook_that_raises_what_is_no_exception_keeps_no_other_from_being_told() -> None:
    async def main() -> None:
        broker = await embedded()
        told: list[str] = []

        def wrong(peer: Peer) -> None:
            told.append(peer.name)
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            future.result()  # CancelledError, which is no Exception

        broker.endpoint("chat", None, wrong, wrong)
        for _ in range(2):
            async with AsyncClient(broker) as client:
                await client.subscribe("chat")
        await until(lambda: len(told) == 4, "each was told twice")
        await broker.stop()

    run(main)


def test_a_hook_may_close_the_endpoint_and_all_connections() -> None:
    async def main() -> None:
        broker = await embedded()
        closed: list[int] = []

        async def close(_: Peer) -> None:
            broker.reject("chat", "full")
            closed.append(await broker.close_all("in a moment"))

        broker.endpoint("chat", lambda peer, method, params: "heard", close)
        async with hosting(broker=broker) as host:
            await host.peer("/broker/ws/chat", ADMIN)
            await until(lambda: bool(closed), "all are closed")
            assert closed == [1] and broker.peers("chat") == []
            with pytest.raises(errors.Denied, match="full"):
                await broker.request("chat/x")
            broker.reject("chat", None)
            assert await broker.request("chat/x") == "heard"

    run(main)


def test_a_function_that_would_wait_for_its_own_end_is_told() -> None:
    async def main() -> None:
        broker = await embedded()

        async def on_message(peer: Peer, method: str, params: object) -> str:
            if method == "later":
                later.append(asyncio.create_task(served.close()))
                return "soon"
            await served.close()
            return "never"

        later: list[asyncio.Task[None]] = []
        served = broker.endpoint("end", on_message)
        with pytest.raises(errors.RemoteError, match="task of its own"):
            await broker.request("end/now")
        assert await broker.request("end/later") == "soon"
        await later[0]
        with pytest.raises(errors.BrokerError):
            await broker.request("end/now")
        await broker.stop()

    run(main)


def test_a_callback_that_raises_what_is_no_exception_loses_nobody_elses_outcome() -> None:
    """It must not come through the links on which the outcomes of others are."""

    async def main() -> None:
        broker = await embedded()
        broker.serve("lab", [sleep])
        told: list[object] = []

        def wrong(*_: object) -> None:
            told.append(None)
            raise asyncio.CancelledError

        for number in range(20):
            if number % 2:
                broker.submit("lab/sleep").add_done_callback(wrong)
            else:
                broker.call_back("lab/sleep", None, wrong)
        future = broker.submit("lab/sleep")
        async with AsyncClient(broker) as client:
            other = asyncio.create_task(client.call("lab/sleep"))
            await until(lambda: broker.router.pending.count == 22, "all are asked")
            for live in broker.pending():
                assert broker.cancel(live.request)
            with pytest.raises(errors.Cancelled):
                await other
        await until(lambda: len(told) == 20, "all callbacks were called")
        assert isinstance(future.exception(), errors.Cancelled)
        await broker.stop()

    run(main)


def test_a_callback_is_a_plain_function() -> None:
    async def main() -> None:
        broker = await embedded()

        async def told(value: object, error: object) -> None: ...

        with pytest.raises(TypeError, match="coroutine function"):
            broker.call_back("lab/x", None, told)
        assert not broker.pending()
        await broker.stop()

    run(main)


def test_names_that_are_none_are_refused_in_broadcasts() -> None:
    async def main() -> None:
        broker = await embedded()
        for endpoint, topic in (("a b", None), ("chat", "a b"), ("", None), ("chat", "")):
            with pytest.raises(ValueError, match="is no name"):
                broker.broadcast(endpoint, 1, topic)
        await broker.stop()

    run(main)
