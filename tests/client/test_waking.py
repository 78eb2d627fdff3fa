"""Threads whose calls have ended wake each other in rows, and no row that breaks keeps anybody waiting."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from broker.client import client
from broker.client.client import Told, Waking
from tests.transports.websocket.harness import run, until


def waiting(told: Told, loop: asyncio.AbstractEventLoop, results: list[Any]) -> threading.Thread:
    def wait() -> None:
        try:
            results.append(told.wait(loop))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("many", [1, client.WAKEN_MAX, client.WAKEN_MAX + 1, 50])
def test_each_of_many_is_woken_with_its_own_end(many: int) -> None:
    async def main() -> None:
        loop, waking, results = asyncio.get_running_loop(), Waking(), list[Any]()
        calls = [Told(waking) for _ in range(many)]
        threads = [waiting(told, loop, results) for told in calls]
        for number, told in enumerate(calls):
            if number % 2:
                told.set_exception(ValueError(number))
            else:
                told.set_result(number)
        await until(lambda: not any(thread.is_alive() for thread in threads), "all go on")
        assert sorted(one for one in results if isinstance(one, int)) == list(range(0, many, 2))
        assert sorted(one.args[0] for one in results if isinstance(one, ValueError)) == list(range(1, many, 2))
        assert [told.following for told in calls] == [None] * many

    run(main)


def test_the_loop_itself_wakes_one_in_a_row() -> None:
    async def main() -> None:
        waking = Waking()
        calls = [Told(waking) for _ in range(client.WAKEN_MAX * 2 + 1)]
        for told in calls:
            told.set_result(None)
        assert all(told._lock.locked() for told in calls), "none within the turn: its end wakes all"
        await asyncio.sleep(0)
        awake = [number for number, told in enumerate(calls) if not told._lock.locked()]
        assert awake == [0, client.WAKEN_MAX, client.WAKEN_MAX * 2]

    run(main)


def test_a_row_that_breaks_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the row never comes to wake the second; who waits looks by itself."""
    monkeypatch.setattr(client, "LOOK_S", 0.02)

    async def main() -> None:
        loop, waking, results = asyncio.get_running_loop(), Waking(), list[Any]()
        nobody, second, third = (Told(waking) for _ in range(3))
        threads = [waiting(told, loop, results) for told in (second, third)]
        for told in (nobody, second, third):
            told.set_result("ended")
        await until(lambda: not any(thread.is_alive() for thread in threads), "both go on")
        assert results == ["ended", "ended"]

    run(main)
