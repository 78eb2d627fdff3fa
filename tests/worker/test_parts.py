"""`Parts`: what a caller sends, taken by threads and by coroutines, ended and cancelled at any moment."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from broker.peer.errors import Cancelled
from broker.worker.parts import Parts, no_parts
from tests.peer.harness import until


def in_thread(work: Callable[[], Any]) -> "asyncio.Future[Any]":
    return asyncio.ensure_future(asyncio.to_thread(work))


def test_a_thread_takes_them_in_order_and_the_caller_is_told() -> None:
    async def main() -> None:
        consumed: list[int] = []
        parts = Parts(consumed.append)
        taking = in_thread(lambda: list(parts))
        for number in range(100):
            parts.put(number)
            if number % 10 == 0:
                await asyncio.sleep(0)
        parts.end()
        assert await taking == list(range(100))
        await until(lambda: sum(consumed) == 100, "every item is told as taken, once")
        assert await in_thread(lambda: list(parts)) == []

    asyncio.run(main())


def test_a_coroutine_takes_them_in_order_and_the_caller_is_told() -> None:
    async def main() -> None:
        consumed: list[int] = []
        parts = Parts(consumed.append)
        taken = []

        async def take() -> None:
            async for part in parts:
                taken.append(part)

        taking = asyncio.create_task(take())
        parts.put("a")
        parts.put(None)
        await until(lambda: len(taken) == 2, "both are taken")
        assert not taking.done()
        parts.put("b")
        parts.end()
        await taking
        assert (taken, consumed) == (["a", None, "b"], [1, 1, 1])

    asyncio.run(main())


def test_what_nobody_takes_is_not_told_as_taken() -> None:
    async def main() -> None:
        consumed: list[int] = []
        parts = Parts(consumed.append)
        for number in range(8):
            parts.put(number)
        assert await in_thread(lambda: next(parts)) == 0
        await until(lambda: consumed == [1], "one is taken")

    asyncio.run(main())


def test_cancelling_wakes_a_thread_that_waits_and_drops_the_rest() -> None:
    async def main() -> None:
        parts = Parts(lambda _: None)
        waits = threading.Event()

        def take() -> None:
            waits.set()
            next(parts)

        taking = in_thread(take)
        await until(waits.is_set, "it waits")
        parts.cancel()
        with pytest.raises(Cancelled, match="nobody waits"):
            await taking
        parts = Parts(lambda _: None)
        parts.put(1)
        parts.cancel()
        with pytest.raises(Cancelled):
            await in_thread(lambda: next(parts))
        with pytest.raises(Cancelled):
            await anext(parts)

    asyncio.run(main())


def test_mistakes_that_would_stop_the_worker_are_told() -> None:
    async def main() -> None:
        parts = Parts(lambda _: None)
        with pytest.raises(RuntimeError, match="async for item in current"):
            next(parts)

        def elsewhere() -> None:
            asyncio.run(anext(parts))  # type: ignore[arg-type]

        with pytest.raises(RuntimeError, match="another event loop"):
            await in_thread(elsewhere)

    asyncio.run(main())


def test_a_caller_that_sends_none_has_none() -> None:
    async def main() -> None:
        assert [part async for part in no_parts()] == []

    assert list(no_parts()) == []
    asyncio.run(main())


def test_a_worker_that_has_gone_leaves_what_came() -> None:
    parts: list[Parts] = []

    async def main() -> None:
        parts.append(Parts(lambda _: None))
        parts[0].put(1)
        parts[0].end()

    asyncio.run(main())
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(parts[0]))
    thread.start()
    thread.join(20)
    assert found == [1]


def test_who_is_cancelled_while_it_waits_takes_nobody_else_along() -> None:
    async def main() -> None:
        parts = Parts(lambda _: None)
        first, second = (asyncio.ensure_future(anext(parts)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait((first,))
        parts.put("one")
        assert await second == "one"

    asyncio.run(main())
