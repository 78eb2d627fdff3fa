"""Streams, parts, progress and large values through both clients, against a real broker and a real worker."""

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.client.client import Client
from broker.node.broker import Broker
from broker.peer import errors
from broker.worker import current
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, broker_thread, our_threads, run, until

AHEAD = 40
"""items that may be under way to a reader who takes none: the windows of the reader, the broker and the worker"""


class Noted:
    """What the functions of the worker have seen."""

    def __init__(self) -> None:
        self.produced = 0
        self.taken = 0
        self.ran = 0
        self.cancelled: list[float] = []
        self.begun = threading.Event()
        self.go_on = threading.Event()


def serving(url: str) -> tuple[Worker, Noted]:
    worker, noted = Worker("data", url, SECRET), Noted()

    @worker.method
    def rows(count: int, size: int = 0) -> Generator[dict[str, Any], None, dict[str, int]]:
        for number in range(count):
            noted.produced += 1
            yield {"row": number, "data": bytes(size)}
        return {"rows": count}

    @worker.method
    async def ticks(count: int, fail_at: int = -1) -> AsyncIterator[int]:
        try:
            for number in range(count):
                if number == fail_at:
                    raise LookupError(f"no tick {number}")
                noted.produced += 1
                yield number
        except (asyncio.CancelledError, GeneratorExit):
            noted.cancelled.append(time.monotonic())
            raise

    @worker.method
    def hang(items: int = 0) -> Iterator[int]:
        yield from range(items)
        noted.begun.set()
        current().wait_cancelled(60)
        noted.cancelled.append(time.monotonic())

    @worker.method
    def wait() -> None:
        noted.begun.set()
        current().wait_cancelled(60)
        noted.cancelled.append(time.monotonic())

    @worker.method
    def lengths() -> list[int]:
        found = []
        noted.ran += 1
        try:
            for part in current().parts():
                noted.taken += 1
                found.append(len(part))
        except errors.Cancelled:
            noted.cancelled.append(time.monotonic())
            raise
        return found

    @worker.method
    def refuse_parts() -> None:
        for _ in current().parts():
            raise ValueError("not these")

    @worker.method
    async def one_by_one() -> int:
        async for _ in current().parts():
            noted.taken += 1
            await asyncio.get_running_loop().run_in_executor(None, noted.go_on.wait, 15)
        return noted.taken

    @worker.method
    async def twice() -> AsyncIterator[Any]:
        async for part in current().parts():
            yield part
            yield part

    @worker.method
    def steps(count: int) -> int:
        for number in range(1, count + 1):
            current().progress(number, count, f"step {number}")
        return count

    @worker.method
    def steps_and_items(count: int) -> Iterator[int]:
        for number in range(1, count + 1):
            current().progress(number, count)
            yield number

    @worker.method
    async def echo(*arguments: Any) -> list[Any]:
        noted.ran += 1
        return list(arguments)

    return worker, noted


Story = Callable[[AsyncClient, Noted, Broker], Awaitable[None]]


def tell(story: Story, **options: Any) -> None:
    """Run a story with a client, what the worker notes, and the broker; at its end nothing is left of any request."""

    async def main() -> None:
        async with broker_running() as broker:
            worker, noted = serving(broker.url)
            async with worker, AsyncClient(broker.url, SECRET, **options) as client:
                await story(client, noted, broker)
                await until(lambda: broker.router.pending.count == 0, "nothing is pending")

    run(main)


# ---------------------------------------------------------------- reading, asynchronously


def test_items_come_one_by_one_and_then_the_result() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        stream = await client.stream("data/rows", {"count": 100})
        with pytest.raises(RuntimeError, match="after its last item"):
            _ = stream.result
        assert [item["row"] async for item in stream] == list(range(100))
        assert stream.result == {"rows": 100}
        assert [item async for item in stream] == [], "it stays at its end"
        async with await client.stream("data/rows", [2], timing=True) as rows:
            assert (await anext(rows))["row"] == 0
            assert [item["row"] async for item in rows] == [1]
        assert rows.result == {"rows": 2}
        assert rows.timing is not None
        assert rows.timing["ended_ms"] >= 0
        plain = await client.stream("data/echo", [1])
        assert [item async for item in plain] == []
        assert (plain.result, plain.timing) == ([1], None)

    tell(story)


def test_call_gives_the_list_of_the_items() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        assert await client.call("data/ticks", [3]) == [0, 1, 2]
        assert await (await client.submit("data/ticks", [2])) == [0, 1]
        assert [result async for result in client.map("data/ticks", [[1], [2]])] == [[0], [0, 1]]

    tell(story)


def test_a_slow_reader_stalls_the_worker() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        async with await client.stream("data/rows", {"count": 600, "size": 1000}) as rows:
            taken = 0
            async for _ in rows:
                taken += 1
                assert noted.produced <= taken + AHEAD
                await asyncio.sleep(0)
        assert (taken, noted.produced) == (600, 600)
        async with await client.stream("data/rows", {"count": 600}) as rows:
            await anext(rows)
            await until(lambda: noted.produced >= 604, "it produces what it may")
            assert (await client.call("data/echo", [1])) == [1], "others go on"
            assert noted.produced <= 600 + 1 + AHEAD

    tell(story)


@pytest.mark.parametrize("way", ["break", "aclose", "async with", "forgotten", "never read", "task"])
def test_whoever_leaves_cancels_the_request(way: str) -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        async def read() -> None:
            async for item in await client.stream("data/hang", [1]):
                assert item == 0

        if way == "task":
            task = asyncio.create_task(read())
            await until(noted.begun.is_set, "it hangs")
            task.cancel()
        else:
            stream = await client.stream("data/hang", [5])
            if way != "never read":
                async for item in stream:
                    assert item == 0
                    break
            if way == "aclose":
                stream = await client.stream("data/hang", [5])
                assert await anext(stream) == 0
                await stream.aclose()
                assert [item async for item in stream] == [], "closed"
            elif way == "async with":
                async with await client.stream("data/hang", [5]) as stream:
                    assert await anext(stream) == 0
            elif way == "break":
                with pytest.raises(errors.Cancelled, match="left before its end"):
                    await anext(stream)
                with pytest.raises(RuntimeError):
                    _ = stream.result
            else:
                loop_of_references = [stream]
                loop_of_references.append(loop_of_references)  # type: ignore[arg-type]
                del stream, loop_of_references
                gc.collect()
        asked = 2 if way in ("aclose", "async with") else 1
        await until(lambda: broker.router.counters.ended["cancelled"] == asked, "it is cancelled")
        await until(lambda: len(noted.cancelled) >= noted.begun.is_set(), "the function is told")

    tell(story)


def test_an_error_is_raised_once_behind_the_items_before_it() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        stream = await client.stream("data/ticks", {"count": 9, "fail_at": 6})
        seen = []
        with pytest.raises(errors.RemoteError, match="LookupError: no tick 6") as caught:
            async for item in stream:
                seen.append(item)
        assert seen == [0, 1, 2, 3, 4, 5]
        assert (caught.value.endpoint, caught.value.method) == ("data", "ticks")
        assert [item async for item in stream] == []
        with pytest.raises(RuntimeError, match="after its last item"):
            _ = stream.result
        for method, kind in (("nobody/rows", errors.NoEndpoint), ("data/nothing", errors.NoMethod)):
            with pytest.raises(kind):
                await anext(await client.stream(method))
        with pytest.raises(errors.DeadlineExceeded):
            async for _ in await client.stream("data/hang", [1], timeout=0.2):
                pass
        with pytest.raises(errors.DeadlineExceeded):
            async for _ in await client.stream("data/hang", [1], idle=0.2):
                pass

    tell(story)


def test_what_cannot_be_streamed_is_said_at_once() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        before = broker.router.counters.accepted
        with pytest.raises(errors.InvalidRequest, match="take call, not stream"):
            await client.stream("data/rows", [1], key="a")
        with pytest.raises(errors.InvalidRequest, match="key sends no items"):
            await client.call("data/lengths", key="a", parts=[b""])
        with pytest.raises(errors.InvalidRequest, match="priority 10"):
            await client.call("data/echo", priority=10)
        with pytest.raises(errors.InvalidRequest, match="idle"):
            await client.stream("data/echo", idle=0)
        with pytest.raises(TypeError, match="has no argument 'tineout'; did you mean timeout"):
            await client.stream("data/rows", [1], tineout=5)
        for parts in (b"abc", "abc", {"a": 1}, 5):
            with pytest.raises(TypeError, match="parts is a"):
                await client.call("data/lengths", parts=parts)  # type: ignore[arg-type]
        for function in (5, asyncio.sleep):
            with pytest.raises(TypeError, match="give a plain function"):
                await client.call("data/echo", progress=function)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="give a list"):
            await anext(client.map("data/lengths", [None], parts=iter([b"a"])))
        assert broker.router.counters.accepted == before

    tell(story)
    for grace, kind in ((-1, ValueError), (float("inf"), ValueError), ("5", TypeError)):
        with pytest.raises(kind, match="grace"):
            AsyncClient("http://127.0.0.1:1", "x", grace=grace)  # type: ignore[arg-type]


def test_giving_up_waiting_for_one_item_loses_none() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        async with await client.stream("data/twice", parts=_when(noted.go_on)) as stream:
            assert await anext(stream) == "first"
            assert await anext(stream) == "first"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(stream)
            noted.go_on.set()
            assert [item async for item in stream] == ["second", "second"]

    tell(story)


async def _when(event: threading.Event) -> AsyncIterator[str]:
    yield "first"
    await until(event.is_set, "it may go on")
    yield "second"


# ---------------------------------------------------------------- parts


def test_parts_of_every_kind() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        threads = set()

        def produce() -> Iterator[bytes]:
            for length in range(40):
                threads.add(threading.current_thread())
                yield bytes(length)

        async def produce_here() -> AsyncIterator[bytes]:
            for length in range(40):
                yield bytes(length)

        expected = list(range(40))
        assert await client.call("data/lengths", parts=produce()) == expected
        assert threading.current_thread() not in threads
        assert await client.call("data/lengths", parts=produce_here()) == expected
        assert await client.call("data/lengths", parts=[bytes(length) for length in expected]) == expected
        assert await client.call("data/lengths", parts=[]) == []
        assert await client.call("data/lengths", parts=iter(())) == []
        assert await client.call("data/lengths", parts=(bytes(3_000_000), "äö", [1, 2])) == [3_000_000, 2, 2]
        assert [one async for one in client.map("data/lengths", [None] * 3, parts=[b"a", b"bc"])] == [[1, 2]] * 3
        assert await (await client.submit("data/lengths", parts=produce())) == expected
        stream = await client.stream("data/twice", parts=({"n": n} for n in range(50)))
        assert [item["n"] async for item in stream] == [n for n in range(50) for _ in range(2)]
        assert await client.call("data/lengths", [], parts=[b"a"]) == [1]
        await until(lambda: not our_threads_of_parts(), "their threads have ended")

    tell(story)


def our_threads_of_parts() -> list[str]:
    return [name for name in our_threads() if name == "broker-client-parts"]


def test_parts_that_cannot_even_begin() -> None:
    class Wrong:
        def __iter__(self) -> Iterator[bytes]:
            raise StopIteration("nothing")

    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await client.call("data/lengths", parts=Wrong(), timeout=10)

    tell(story)


@pytest.mark.parametrize("kind", ["plain", "asynchronous", "list"])
def test_an_exception_of_the_parts_is_raised_and_cancels(kind: str) -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        wrong = OSError("the camera is off")

        def produce() -> Iterator[bytes]:
            yield b"a"
            raise wrong

        async def produce_here() -> AsyncIterator[bytes]:
            yield b"a"
            raise wrong

        def parts() -> Any:
            return {"plain": produce(), "asynchronous": produce_here(), "list": [b"a", {1}]}[kind]

        expected = ValueError if kind == "list" else OSError
        with pytest.raises(expected) as caught:
            await client.call("data/lengths", parts=parts())
        assert kind == "list" or caught.value is wrong
        with pytest.raises(expected):
            await (await client.submit("data/lengths", parts=parts()))
        stream = await client.stream("data/lengths", parts=parts())
        with pytest.raises(expected):
            await anext(stream)
        assert [item async for item in stream] == [], "raised once"
        await until(lambda: broker.router.counters.ended["cancelled"] == 3, "they are cancelled")
        await until(lambda: len(noted.cancelled) == noted.ran, "the functions that had begun are told")

    tell(story)


def test_a_stalled_worker_stalls_the_parts() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        given = 0

        def produce() -> Iterator[bytes]:
            nonlocal given
            for _ in range(200):
                given += 1
                yield b"x"

        call = asyncio.create_task(client.call("data/one_by_one", parts=produce()))
        await until(lambda: given >= 4, "it sends what it may")
        assert await client.call("data/echo", [1]) == [1], "others go on"
        assert given <= noted.taken + AHEAD
        noted.go_on.set()
        assert await call == 200

    tell(story)


def test_a_request_that_ends_before_its_parts() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        closed = []
        blocked = threading.Event()

        def produce() -> Iterator[bytes]:
            try:
                while True:
                    yield b"x"
                    blocked.wait(30)
            finally:
                closed.append("plain")

        async def produce_here() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(30)
            finally:
                closed.append("asynchronous")

        with pytest.raises(errors.RemoteError, match="not these"):
            await client.call("data/refuse_parts", parts=produce_here())
        await until(lambda: closed == ["asynchronous"], "it is closed")
        with pytest.raises(errors.RemoteError, match="not these"):
            await client.call("data/refuse_parts", parts=produce())
        with pytest.raises(errors.DeadlineExceeded):
            await client.call("data/lengths", parts=produce(), timeout=0.2)
        assert closed == ["asynchronous"], "nobody can end a function that blocks"
        blocked.set()
        await until(lambda: closed == ["asynchronous", "plain", "plain"], "it is closed as soon as it does not")

    tell(story)


def test_closing_the_client_ends_streams_and_parts() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        async with AsyncClient(broker.url, SECRET) as other:
            stream = await other.stream("data/hang", [1], parts=_when(threading.Event()))
            assert await anext(stream) == 0
        with pytest.raises(errors.ConnectionLost, match="closed on this side"):
            await anext(stream)
        assert [item async for item in stream] == []

    tell(story)


# ---------------------------------------------------------------- progress


def test_progress_is_told_on_the_loop() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        told: list[Any] = []
        threads = set()

        def note(done: float, total: float | None, text: str | None) -> None:
            told.append((done, total, text))
            threads.add(threading.current_thread())

        assert await client.call("data/steps", [5], progress=note) == 5
        assert told[-1] == (5, 5, "step 5")
        assert threads == {threading.current_thread()}
        assert await client.call("data/steps_and_items", [3], progress=note) == [1, 2, 3]
        assert told[-1] == (3, 3, None)
        stream = await client.stream("data/steps_and_items", [4], progress=note)
        assert [item async for item in stream] == [1, 2, 3, 4]
        assert told[-1] == (4, 4, None)
        assert await (await client.submit("data/steps", [6], progress=note)) == 6
        assert told[-1] == (6, 6, "step 6")
        assert [one async for one in client.map("data/steps", [[7]], progress=note)] == [7]
        assert told[-1] == (7, 7, "step 7")
        before = len(told)
        assert await client.call("data/steps", [5]) == 5
        assert len(told) == before

    tell(story)


def test_items_beside_progress_are_gathered_up_to_the_bound() -> None:
    """What a call gathers is bounded whether or not its progress is told."""

    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        assert client._connection is not None
        client._connection.session.value_max_bytes = 2000
        for progress in (None, lambda done, total, text: None):
            with pytest.raises(errors.TooLarge, match="above the bound of 2000 bytes"):
                await client.call("data/steps_and_items", [100_000], progress=progress)

    tell(story)


def test_a_progress_function_that_fails_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        called = 0

        def fail(done: float, total: float | None, text: str | None) -> None:
            nonlocal called
            called += 1
            raise LookupError("no bar")

        with caplog.at_level(logging.ERROR, "broker.client"):
            stream = await client.stream("data/steps_and_items", [300], progress=fail)
            assert len([item async for item in stream]) == 300
            assert await client.call("data/steps", [3], progress=fail) == 3
        assert called >= 2
        assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [LookupError] * 2, "once each"

    tell(story)


# ---------------------------------------------------------------- values of any size, options, grace


def test_values_larger_than_a_message_arrive_whole() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        data = os.urandom(20 << 20)
        assert await client.call("data/echo", [data, "ä"]) == [data, "ä"]
        (item,) = [item async for item in await client.stream("data/rows", {"count": 1, "size": 20 << 20})]
        assert item == {"row": 0, "data": bytes(20 << 20)}
        stream = await client.stream("data/twice", parts=[data])
        assert [item == data async for item in stream] == [True, True]

    tell(story)


def test_a_key_runs_once() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        first = await client.call("data/echo", [1], key="k", priority=3, group="g")
        assert await client.call("data/echo", [1], key="k", priority=3, group="g") == first == [1]
        assert noted.ran == 1
        with pytest.raises(errors.KeyConflict):
            await client.call("data/echo", [2], key="k")

    tell(story)


def test_a_broken_link_does_not_show_within_the_grace() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        waiting = asyncio.create_task(client.call("data/one_by_one", parts=[b"a", b"b"]))
        await until(lambda: noted.taken == 1, "the worker has it")
        seen = []
        async with await client.stream("data/rows", {"count": 400, "size": 5000}) as rows:
            async for item in rows:
                seen.append(item["row"])
                if item["row"] in (50, 150, 300):
                    link = client._connection._link  # type: ignore[union-attr]
                    assert link is not None
                    link.abort()
        assert seen == list(range(400))
        assert rows.result == {"rows": 400}
        noted.go_on.set()
        assert await waiting == 2
        assert noted.produced == 400, "nothing ran twice"

    tell(story)


def test_without_grace_a_broken_link_ends_what_was_under_way() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        stream = await client.stream("data/hang", [2])
        assert await anext(stream) == 0
        await until(lambda: stream._inflow.items and noted.begun.is_set(), "the next has come, and it hangs")
        client._connection._link.abort()  # type: ignore[union-attr]
        assert await anext(stream) == 1, "what has come is there"
        with pytest.raises(errors.ConnectionLost) as caught:
            await anext(stream)
        assert caught.value.may_have_executed
        assert [item async for item in stream] == []
        await until(lambda: noted.cancelled, "the function is told")

    tell(story, grace=0)


def test_what_has_no_deadline_does_not_wait_for_ever_for_a_broker_that_is_gone() -> None:
    async def story(client: AsyncClient, noted: Noted, broker: Broker) -> None:
        async with AsyncClient(broker.url, SECRET, grace=0.2) as other:
            stream = await other.stream("data/hang", [1], idempotent=True)
            assert await anext(stream) == 0
            lost = [
                asyncio.create_task(other.call("data/wait", timeout=None)),
                asyncio.create_task(anext(stream)),
            ]
            waits = [
                asyncio.create_task(other.call("data/wait", timeout=None, idempotent=True)),
                asyncio.create_task(other.call("data/wait", timeout=600)),
            ]
            await until(lambda: broker.router.pending.count == 4, "the broker has them")
            other._target = other._connection._target = lambda: ("http://127.0.0.1:1", SECRET)  # type: ignore[union-attr]
            other._connection._link.abort()  # type: ignore[union-attr]
            for task in lost:
                with pytest.raises(errors.ConnectionLost, match=r"none again within 0\.2 s") as caught:
                    await task
                assert caught.value.may_have_executed
            assert not any(task.done() for task in waits)
        for task in waits:
            with pytest.raises(errors.ConnectionLost):
                await task

    tell(story)


# ---------------------------------------------------------------- the synchronous client


@pytest.fixture
def running() -> Iterator[tuple[Broker, asyncio.AbstractEventLoop, Noted]]:
    with broker_thread() as (broker, loop):
        worker, noted = serving(broker.url)
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(20)
        yield broker, loop, noted
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(20)


Running = tuple[Broker, asyncio.AbstractEventLoop, Noted]


def ended(running: Running, what: str) -> int:
    async def count() -> int:
        return running[0].router.counters.ended[what]

    return asyncio.run_coroutine_threadsafe(count(), running[1]).result(20)


def wait_until(condition: Callable[[], object], what: str) -> None:
    waiter = threading.Event()
    for _ in range(2000):
        if condition():
            return
        waiter.wait(0.01)
    pytest.fail(f"never came true: {what}")


def test_the_same_from_threads(running: Running) -> None:
    broker, _, noted = running
    with Client(broker.url, SECRET) as client:
        stream = client.stream("data/rows", {"count": 500, "size": 100})
        with pytest.raises(RuntimeError, match="after its last item"):
            _ = stream.result
        taken = 0
        for item in stream:
            assert item["row"] == taken
            taken += 1
            assert noted.produced <= taken + AHEAD
        assert (taken, stream.result) == (500, {"rows": 500})
        assert list(stream) == []
        with client.stream("data/rows", [3], timing=True) as rows:
            assert next(rows)["row"] == 0
            assert [item["row"] for item in rows] == [1, 2]
        assert rows.result == {"rows": 3}
        assert rows.timing is not None
        stream = client.stream("data/ticks", {"count": 9, "fail_at": 6})
        seen = []
        with pytest.raises(errors.RemoteError, match="no tick 6"):
            for item in stream:
                seen.append(item)
        assert seen == [0, 1, 2, 3, 4, 5]
        assert list(stream) == []
        with pytest.raises(errors.NoMethod):
            next(client.stream("data/nothing"))
        with pytest.raises(errors.InvalidRequest, match="idle"):
            next(client.stream("data/rows", [1], idle=-1))
        with pytest.raises(errors.InvalidRequest, match="take call"):
            client.stream("data/rows", [1], key="a")
        assert client.call("data/lengths", parts=(bytes(n) for n in range(30))) == list(range(30))
        assert client.submit("data/lengths", parts=[b"a"]).result(20) == [1]
        assert list(client.map("data/lengths", [None] * 2, parts=[b"a"])) == [[1], [1]]
        stream = client.stream("data/twice", parts=_numbers(30))
        assert list(stream) == [n for n in range(30) for _ in range(2)]
        data = os.urandom(20 << 20)
        assert client.call("data/echo", [data]) == [data]
        with pytest.raises(TypeError, match="give a list"):
            next(client.map("data/lengths", [None], parts=iter([b"a"])))
    with pytest.raises(errors.ConnectionLost, match="closed"):
        client.stream("data/rows", [1])


async def _numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


def test_leaving_a_stream_in_a_thread_cancels_the_request(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        held = client.stream("data/hang", [3])
        for item in held:
            assert item == 0
            break
        wait_until(lambda: ended(running, "cancelled") == 1, "break")
        with pytest.raises(errors.Cancelled, match="left before its end"):
            next(held)
        with pytest.raises(LookupError), client.stream("data/hang", [3]) as held:
            next(held)
            raise LookupError
        wait_until(lambda: ended(running, "cancelled") == 2, "with")
        assert list(held) == []
        client.stream("data/hang", [3])
        gc.collect()
        wait_until(lambda: ended(running, "cancelled") == 3, "forgotten")
        with pytest.raises(OSError, match="off"):
            client.call("data/lengths", parts=_failing())
        with pytest.raises(OSError, match="off"):
            next(client.stream("data/lengths", parts=_failing()))
        wait_until(lambda: ended(running, "cancelled") == 5, "the parts failed")
        last = client.stream("data/hang", [1])
        assert next(last) == 0
    with pytest.raises(errors.ConnectionLost):
        next(last)
    last.close()


def _failing() -> Iterator[bytes]:
    yield b"a"
    raise OSError("the camera is off")


def test_progress_is_told_in_the_thread_that_waits(running: Running) -> None:
    told: list[Any] = []

    def note(done: float, total: float | None, text: str | None) -> None:
        assert total is not None
        told.append((done / total, threading.current_thread().name))

    def fail(done: float, total: float | None, text: str | None) -> None:
        raise LookupError("no bar")

    here = threading.current_thread().name
    with Client(running[0].url, SECRET) as client:
        assert client.call("data/steps", [5], progress=note) == 5
        assert told[-1] == (1, here)
        assert list(client.stream("data/steps_and_items", [4], progress=note)) == [1, 2, 3, 4]
        assert told[-1] == (1, here)
        assert client.submit("data/steps", [6], progress=note).result(20) == 6
        assert told[-1] == (1, "broker-client")
        assert list(client.map("data/steps", [[6]], progress=note)) == [6]
        assert client.call("data/steps", [5], progress=fail) == 5
        with pytest.raises(errors.DeadlineExceeded):
            client.call("data/wait", timeout=0.2, progress=note)


def test_several_threads_share_a_stream(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        stream = client.stream("data/rows", [300])
        seen: list[int] = []

        def read() -> None:
            while (item := next(stream, None)) is not None:
                seen.append(item["row"])

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(seen) == list(range(300))


def test_a_stream_is_not_waited_for_in_the_clients_own_thread(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        said: list[str] = []
        stream = client.stream("data/hang")

        def done(_: Any) -> None:
            with pytest.raises(RuntimeError, match="cannot wait in its own thread") as caught:
                next(stream)
            said.append(str(caught.value))

        client.submit("data/echo").add_done_callback(done)
        wait_until(lambda: said, "it is refused")
        stream.close()


INTERRUPTED = {
    "call": 'client.call("data/wait")',
    "call that tells its progress": 'client.call("data/wait", progress=print)',
    "waiting for an item": 'stream = client.stream("data/hang", [2])\n        for item in stream: pass',
    "waiting for the next one": 'stream = client.stream("data/hang", [0])\n        next(stream)',
    "busy with an item": 'stream = client.stream("data/hang", [1])\n        for item in stream: time.sleep(60)',
    "sending": 'client.call("data/wait", parts=iter(lambda: time.sleep(60), 1))',
}


@pytest.mark.parametrize("doing", INTERRUPTED)
def test_ctrl_c_stops_the_function_at_the_worker(running: Running, doing: str) -> None:
    program = f"""
import sys, time
from broker import Client
client = Client(sys.argv[1], sys.argv[2])
def cell():
    try:
        {INTERRUPTED[doing]}
    except KeyboardInterrupt as error:
        kept = error  # as a notebook keeps the last one, with all its frames
        print("interrupted", flush=True)
        sys.stdin.read()
cell()
"""
    broker, _, noted = running
    process = subprocess.Popen(
        [sys.executable, "-c", program, broker.url, SECRET],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert noted.begun.wait(30)
    sent_at = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: noted.cancelled, "the function is told, while the process lives on")
    assert process.poll() is None
    took_s = noted.cancelled[0] - sent_at
    print(f"{doing}: {took_s * 1e3:.1f} ms from the signal to the function")
    assert took_s < 5  # 100 ms are promised; what a loaded machine takes is no measure
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (b"interrupted\n", b"", 0)
