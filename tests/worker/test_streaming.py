"""Methods that yield, callers that send parts, progress, grace: a worker against a real broker."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.node.broker import Broker
from broker.peer import errors
from broker.peer.values import Encoded
from broker.worker import Fault, current
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, run, until

KINDS = ["in a thread", "in a coroutine"]


def new_worker(broker: Broker, *functions: Any, **options: Any) -> Worker:
    worker = Worker("data", broker.url, SECRET, **options)
    for function in functions:
        worker.add(function)
    return worker


class Counter:
    """Counts without end, and remembers how it was stopped; twice the same, for a thread and for a coroutine."""

    def __init__(self) -> None:
        self.given = 0
        self.stopped: list[type[BaseException]] = []

    def count(self, most: int = 1 << 30) -> Iterator[int]:
        try:
            for number in range(most):
                self.given = number + 1
                yield number
        except BaseException as error:
            self.stopped.append(type(error))
            raise
        return most

    async def acount(self, most: int = 1 << 30) -> AsyncIterator[int]:
        try:
            for number in range(most):
                self.given = number + 1
                yield number
        except BaseException as error:
            self.stopped.append(type(error))
            raise

    def method(self, kind: str) -> str:
        return "data/count" if kind == "in a thread" else "data/acount"


def is_suspended(worker: Worker, counter: Counter) -> bool:
    """Whether the only request waits for its caller to take more."""
    (request,) = worker._answering.running
    return counter.given > 0 and (request.waiting is not None if request.task is None else True)


async def settled(counter: Counter) -> int:
    """How many items were given when no more are given."""
    given = -1
    while given != counter.given:
        given = counter.given
        for _ in range(50):
            await asyncio.sleep(0.002)
    return given


# ---------------------------------------------------------------- items


def test_what_a_method_yields_comes_item_by_item_and_what_it_returns_is_the_result() -> None:
    def rows(count: int) -> Iterator[Any]:
        for number in range(count):
            yield {"row": number, "data": bytes(number)}
        return "all"

    async def arows(count: int) -> AsyncIterator[Any]:
        for number in range(count):
            yield {"row": number, "data": bytes(number)}

    class Callable_:
        __name__ = "callable"

        async def __call__(self) -> AsyncIterator[int]:
            yield 1

    async def gives() -> AsyncIterator[Any]:
        return arows(2)

    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = new_worker(broker, rows, arows, gives, Callable_())
            worker.add(lambda: iter([1, None, "x"]), "iterator")
            worker.add(lambda: {"plain": 1}, "plain")
            async with worker:
                for method, result in (("rows", "all"), ("arows", None)):
                    for count in (0, 1, 300):
                        stream = await client.stream(f"data/{method}", [count])
                        items = [item async for item in stream]
                        assert items == [{"row": number, "data": bytes(number)} for number in range(count)]
                        assert stream.result == result
                for method, expected in (("iterator", [1, None, "x"]), ("callable", [1]), ("plain", [])):
                    stream = await client.stream(f"data/{method}")
                    assert [item async for item in stream] == expected
                    assert stream.result == ({"plain": 1} if method == "plain" else None)
                assert len([item async for item in await client.stream("data/gives")]) == 2
                # Who takes no parts gets the list of them; a result is one more.
                assert await client.call("data/arows", [1]) == [{"row": 0, "data": b""}]
                assert await client.call("data/rows", [1]) == [{"row": 0, "data": b""}, "all"]
                await until(lambda: worker.executing == 0, "all have ended")

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caller_that_does_not_read_suspends_the_function_and_nothing_else(kind: str) -> None:
    async def main() -> None:
        counter = Counter()
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, counter.count, counter.acount) as worker,
        ):
            stream = await client.stream(counter.method(kind), [500])
            await until(lambda: worker.executing and is_suspended(worker, counter), "it is suspended")
            given = await settled(counter)
            assert 4 <= given <= 70, "what the reader's window holds, and one ahead"
            assert await client.call("data/count", [2]) == [0, 1, 2]
            counter.given = 0
            assert [item async for item in stream] == list(range(500))
            assert counter.given == 500

    run(main)


@pytest.mark.parametrize("how", ["left", "closed", "deadline", "idle", "client closed", "task cancelled"])
@pytest.mark.parametrize("kind", KINDS)
def test_cancelling_closes_a_function_that_waits_for_its_reader(kind: str, how: str) -> None:
    async def main() -> None:
        counter = Counter()
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            AsyncClient(broker.url, SECRET) as other,
            new_worker(broker, counter.count, counter.acount, capacity=1) as worker,
        ):
            limits: dict[str, Any] = {"deadline": {"timeout": 0.3}, "idle": {"idle": 0.3, "timeout": None}}
            if how == "task cancelled":
                call = asyncio.create_task(client.call(counter.method(kind)))
                await until(lambda: counter.given > 100, "it goes on")
                call.cancel()
            else:
                stream = await client.stream(counter.method(kind), **limits.get(how, {}))
                await until(lambda: worker.executing and is_suspended(worker, counter), "it is suspended")
                await settled(counter)
                if how == "left":
                    async for _ in stream:
                        break
                elif how == "closed":
                    await stream.aclose()
                elif how == "client closed":
                    await client.close()
            await until(lambda: counter.stopped, "the function is told")
            assert counter.stopped == [GeneratorExit]
            await until(lambda: worker.executing == 0, "its place is free")
            counter.stopped.clear()
            # With a capacity of one this needs the very thread that was waiting.
            assert await other.call("data/count", [1], timeout=10) == [0, 1]
            if how in ("deadline", "idle"):
                with pytest.raises(errors.DeadlineExceeded):
                    async for _ in stream:
                        pass

    run(main)


def test_cancelling_reaches_a_coroutine_that_waits_for_something_else() -> None:
    async def main() -> None:
        stopped: list[str] = []
        sleeps = asyncio.Event()

        async def rows() -> AsyncIterator[int]:
            yield 1
            try:
                sleeps.set()
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                stopped.append("cancelled")
                raise
            finally:
                stopped.append("finally")

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, rows) as worker,
        ):
            stream = await client.stream("data/rows")
            assert await anext(stream) == 1
            await sleeps.wait()
            await stream.aclose()
            await until(lambda: worker.executing == 0, "it has ended")
            assert stopped == ["cancelled", "finally"]

    run(main)


def test_a_coroutine_that_swallows_its_cancelling_is_closed_at_its_next_item() -> None:
    async def main() -> None:
        stopped: list[str] = []
        sleeps = asyncio.Event()

        async def rows() -> AsyncIterator[int]:
            try:
                yield 1
                try:
                    sleeps.set()
                    await asyncio.sleep(100)
                except asyncio.CancelledError:
                    stopped.append("swallowed")
                yield 2
            finally:
                stopped.append("closed")

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, rows) as worker,
        ):
            stream = await client.stream("data/rows")
            assert await anext(stream) == 1
            await sleeps.wait()
            await stream.aclose()
            await until(lambda: worker.executing == 0, "it has ended")
            assert stopped == ["swallowed", "closed"]

    run(main)


def test_a_thread_that_works_when_it_is_cancelled_is_closed_at_its_next_item() -> None:
    async def main() -> None:
        seen: list[object] = []
        works = threading.Event()

        def rows() -> Iterator[int]:
            yield 1
            works.set()
            try:
                seen.append(current().wait_cancelled(20))
                yield 2
            finally:
                seen.append("closed")

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, rows) as worker,
        ):
            stream = await client.stream("data/rows")
            assert await anext(stream) == 1
            await until(works.is_set, "it works on the next")
            await stream.aclose()
            await until(lambda: worker.executing == 0, "it has ended")
            assert seen == [True, "closed"]

    run(main)


def test_stopping_does_not_interrupt_what_a_cancelled_coroutine_does_at_its_end() -> None:
    async def main() -> None:
        seen: list[str] = []
        begun, cleans, cleaned = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def works() -> None:
            begun.set()
            try:
                await asyncio.sleep(100)
            finally:
                cleans.set()
                await cleaned.wait()
                seen.append("clean")

        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = await new_worker(broker, works).start()
            call = asyncio.create_task(client.call("data/works"))
            await begun.wait()
            call.cancel()
            await cleans.wait()
            stopping = asyncio.create_task(worker.stop())
            await until(lambda: worker._connection is not None and not worker._connection.is_up, "it stops")
            cleaned.set()
            await stopping
            assert seen == ["clean"]

    run(main)


def test_a_failure_follows_the_items_before_it(caplog: pytest.LogCaptureFixture) -> None:
    def fails(how: str) -> Iterator[Any]:
        yield 1
        if how == "fault":
            raise Fault("no beam", code=7)
        if how == "stop":
            raise StopIteration
        if how == "exit":
            raise SystemExit(3)
        yield {1, 2}

    async def afails(how: str) -> AsyncIterator[Any]:
        yield 1
        if how == "fault":
            raise Fault("no beam", code=7)
        if how == "stop":
            raise StopAsyncIteration
        if how == "exit":
            raise SystemExit(3)
        yield {1, 2}

    async def main() -> None:
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, fails, afails) as worker,
        ):
            for method in ("data/fails", "data/afails"):
                for how, says in (("fault", "no beam"), ("stop", "generator raised Stop"), ("exit", "sys.exit"),
                                  ("set", "of type set is no JSON")):  # fmt: skip
                    stream = await client.stream(method, [how])
                    assert await anext(stream) == 1
                    with pytest.raises(errors.RemoteError, match=says):
                        await anext(stream)
                with pytest.raises(errors.RemoteError, match="Invalid params"):
                    await anext(await client.stream(method))
            assert worker.executing == 0

    with caplog.at_level(logging.WARNING):
        run(main)
    assert "data/fails failed: no beam" in caplog.text


def test_nobody_takes_the_items_of_a_notification() -> None:
    async def main() -> None:
        counter = Counter()
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, counter.count, counter.acount) as worker,
        ):
            for number, method in enumerate(("data/count", "data/acount")):
                await client.notify(method)
                await until(lambda number=number: len(counter.stopped) == number + 1, "it is closed at its first item")
                assert counter.given == 1
                counter.given = 0
            await until(lambda: worker.executing == 0, "nothing runs")

    run(main)


def test_stopping_the_worker_finishes_streams_that_are_read_and_closes_those_that_are_not() -> None:
    async def main() -> None:
        counter = Counter()
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = await new_worker(broker, counter.count, drain=20).start()
            stream = await client.stream("data/count", [200])
            assert await anext(stream) == 0
            stopping = asyncio.create_task(worker.stop())
            assert [item async for item in stream] == list(range(1, 200))
            await stopping
            counter.given = 0
            worker = await new_worker(broker, counter.count, drain=0.1).start()
            stream = await client.stream("data/count")
            await until(lambda: counter.given, "it runs")
            await worker.stop()
            assert counter.stopped == [GeneratorExit]
            with pytest.raises(errors.WorkerLost):
                async for _ in stream:
                    pass

    run(main)


# ---------------------------------------------------------------- large values


def test_a_value_of_any_size_comes_and_goes_whole() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = new_worker(broker)
            worker.add(bytes, "zeros")
            worker.add(lambda data: len(data), "measure")
            worker.add(lambda data: data, "echo")
            worker.add(lambda size: iter([b"small", bytes(size), b"small"]), "items")
            async with worker:
                large = bytes(range(256)) * 80_000
                assert await client.call("data/zeros", [20_000_000]) == bytes(20_000_000)
                assert await client.call("data/measure", [large]) == len(large)
                assert await client.call("data/echo", {"data": large}) == large
                items = [item async for item in await client.stream("data/items", [3_000_000])]
                assert items == [b"small", bytes(3_000_000), b"small"]

    run(main)


def test_an_item_above_the_bound_is_a_failure_and_closes_the_function() -> None:
    async def main() -> None:
        closed: list[str] = []

        def items() -> Iterator[bytes]:
            try:
                yield b"small"
                yield bytes(2 << 20)
                yield b"never"
            finally:
                closed.append("thread")

        async def aitems() -> AsyncIterator[bytes]:
            try:
                yield b"small"
                yield bytes(2 << 20)
                yield b"never"
            finally:
                closed.append("coroutine")

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, items, aitems) as worker,
        ):
            assert worker._connection is not None
            worker._connection.session.value_max_bytes = 1 << 20
            for method in ("data/items", "data/aitems"):
                stream = await client.stream(method)
                assert await anext(stream) == b"small"
                with pytest.raises(errors.RemoteError, match="is above the bound") as caught:
                    await anext(stream)
                assert caught.value.type == "TooLarge"
            await until(lambda: worker.executing == 0, "both have ended")
            assert sorted(closed) == ["coroutine", "thread"]

    run(main)


# ---------------------------------------------------------------- parts


def add_all() -> int:
    return sum(current().parts())


async def aadd_all() -> int:
    return sum([part async for part in current().parts()])


def doubled() -> Iterator[int]:
    for part in current().parts():
        yield 2 * part


async def adoubled() -> AsyncIterator[int]:
    async for part in current().parts():
        yield 2 * part


def test_what_a_caller_sends_is_taken_part_by_part() -> None:
    async def main() -> None:
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, add_all, aadd_all, doubled, adoubled) as worker,
        ):
            for method in ("data/add_all", "data/aadd_all"):
                assert await client.call(method, parts=range(1000)) == 499_500
                assert await client.call(method, parts=[]) == 0
                assert await client.call(method) == 0, "who sends none has none"
            for method in ("data/doubled", "data/adoubled"):
                stream = await client.stream(method, parts=range(300))
                assert [item async for item in stream] == [2 * number for number in range(300)]
            await until(lambda: worker.executing == 0, "all have ended")

    run(main)


def test_a_method_that_reads_no_parts_stalls_its_own_caller_only() -> None:
    async def main() -> None:
        begun, release = threading.Event(), threading.Event()
        asked = 0

        def deaf() -> str:
            begun.set()
            release.wait(20)
            return "never read any"

        async def parts() -> AsyncIterator[int]:
            nonlocal asked
            for number in range(10_000):
                asked = number
                yield number

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, deaf, add_all),
        ):
            call = asyncio.create_task(client.call("data/deaf", parts=parts()))
            await until(begun.is_set, "it has begun")
            for _ in range(3):
                assert await client.call("data/add_all", parts=range(200)) == 19_900
            assert asked < 100, "the caller is held back"
            release.set()
            assert await call == "never read any"

    run(main)


@pytest.mark.parametrize("how", ["cancelled", "deadline", "parts fail"])
@pytest.mark.parametrize("kind", KINDS)
def test_cancelling_reaches_a_function_that_waits_for_parts(kind: str, how: str) -> None:
    async def main() -> None:
        taken: list[int] = []
        ended: list[BaseException] = []

        def takes() -> None:
            try:
                for part in current().parts():
                    taken.append(part)
            except BaseException as error:
                ended.append(error)
                raise

        async def atakes() -> None:
            try:
                async for part in current().parts():
                    taken.append(part)
            except BaseException as error:
                ended.append(error)
                raise

        async def parts() -> AsyncIterator[int]:
            yield 1
            if how == "parts fail":
                await until(lambda: taken, "it has taken one")
                raise KeyError("no more film")
            await asyncio.sleep(100)

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, takes, atakes, add_all, capacity=1) as worker,
        ):
            method = "data/takes" if kind == "in a thread" else "data/atakes"
            timeout = 0.4 if how == "deadline" else 20
            call = asyncio.create_task(client.call(method, parts=parts(), timeout=timeout))
            await until(lambda: taken, "it has taken one")
            if how == "cancelled":
                call.cancel()
            expected = {
                "cancelled": asyncio.CancelledError, "deadline": errors.DeadlineExceeded, "parts fail": KeyError,
            }  # fmt: skip
            with pytest.raises(expected[how]):
                await call
            await until(lambda: worker.executing == 0, "it has ended")
            (error,) = ended
            assert isinstance(error, errors.Cancelled if kind == "in a thread" else asyncio.CancelledError)
            assert await client.call("data/add_all", parts=[1, 2], timeout=10) == 3

    run(main)


# ---------------------------------------------------------------- progress


def works(steps: int) -> str:
    for step in range(steps):
        current().progress(step + 1, steps, f"step {step + 1}")
    return "done"


async def aworks(steps: int) -> str:
    return works(steps)


def test_progress_comes_now_and_then_and_the_last_one_for_sure() -> None:
    async def main() -> None:
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, works, aworks),
        ):
            told: list[Any] = []
            for method in ("data/works", "data/aworks"):
                told.clear()
                result = await client.call(method, [5000], progress=lambda *progress: told.append(progress))
                assert result == "done"
                await until(lambda: told and told[-1] == (5000, 5000, "step 5000"), "the last one has come")
                assert 1 <= len(told) < 500
                assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
                assert await client.call(method, [3]) == "done", "nobody asks: it does nothing"

    run(main)


# ---------------------------------------------------------------- grace


@pytest.mark.parametrize("kind", KINDS)
def test_with_grace_a_broken_link_ends_nothing(kind: str) -> None:
    async def main() -> None:
        counter = Counter()
        release = asyncio.Event()

        async def waits() -> str:
            await release.wait()
            return "answered"

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET, timeout=None) as client,
            new_worker(broker, counter.count, counter.acount, waits, grace=20) as worker,
        ):
            call = asyncio.create_task(client.call("data/waits", timeout=30))
            stream = await client.stream(counter.method(kind), [300], timeout=30)
            assert await anext(stream) == 0
            await until(lambda: worker.executing == 2, "both run")
            assert worker._connection is not None
            link = worker._connection._link
            assert link is not None
            link.abort(1006, "cable cut")
            # Not that it has no link: with a short wait the next one is there before anybody has looked.
            await until(lambda: worker._connection is not None and worker._connection._link is not link, "it is cut")
            release.set()
            assert await call == "answered"
            assert [item async for item in stream] == list(range(1, 300))
            assert worker.executing == 0
            assert await client.call("data/count", [1], wait=True) == [0, 1]
            assert not counter.stopped

    run(main)


def test_without_grace_a_broken_link_ends_what_runs() -> None:
    async def main() -> None:
        counter = Counter()
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            new_worker(broker, counter.count) as worker,
        ):
            stream = await client.stream("data/count")
            assert await anext(stream) == 0
            assert worker._connection is not None
            assert worker._connection._link is not None
            worker._connection._link.abort(1006, "cable cut")
            with pytest.raises(errors.WorkerLost):
                async for _ in stream:
                    pass
            await until(lambda: counter.stopped == [GeneratorExit], "the function is closed")
            await until(lambda: worker.executing == 0, "nothing runs")

    run(main)


def test_grace_is_a_number_of_seconds() -> None:
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="is not a number of seconds"):
            Worker("data", grace=wrong)


def test_a_coroutine_sends_items_and_returns_a_result() -> None:
    sent: list[bool] = []

    async def rows(count: int) -> dict[str, int]:
        for row in range(count):
            sent.append(await current().send({"row": row, "bytes": b"x" * 100_000}))
        return {"rows": count}

    def in_a_thread() -> None:
        asyncio.run(current().send(1))

    async def raw() -> Encoded:
        await current().send(Encoded(b'{"n": {"$buffer":0}}', [b"abc"]))
        return Encoded(b"[1]")

    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET, timeout=20) as client:
            worker = new_worker(broker, rows, in_a_thread, raw)
            async with worker:
                stream = await client.stream("data/rows", {"count": 50})
                assert (await anext(stream))["row"] == 0
                await until(lambda: not worker._connection.session.outbox, "it sent what it may")  # type: ignore[union-attr]
                assert len(sent) < 50, "it waits until the caller takes more"
                assert [item["row"] async for item in stream] == list(range(1, 50))
                assert stream.result == {"rows": 50} and all(sent)
                assert await client.call("data/raw") == [{"n": b"abc"}, [1]]
                with pytest.raises(errors.RemoteError, match="send\\(\\) is for coroutines"):
                    await client.call("data/in_a_thread")
                await client.notify("data/rows", {"count": 1})
                await until(lambda: len(sent) == 51, "the notification was worked on")
                assert sent[-1] is False, "nobody waits for its items"

    run(main)
