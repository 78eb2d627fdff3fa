"""`ProgressTold`: not too often, the latest, and the last one always."""

import asyncio
import threading
from typing import Any

import pytest

from broker.peer.session import Asked
from broker.worker import progress as module
from broker.worker.progress import ProgressTold, Told
from broker.worker.requests import Request
from tests.peer.harness import until


def run(story: Any) -> list[Told]:
    """What was passed on while a story was told."""
    sent: list[Told] = []

    async def main() -> None:
        told = ProgressTold(lambda *told: not sent.append(told))  # type: ignore[func-returns-value]
        await asyncio.wait_for(story(told, sent), 20)
        if told._timer is not None:
            told._timer.cancel()

    asyncio.run(main())
    return sent


def test_the_first_goes_at_once_and_the_last_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 1000)

    async def story(told: ProgressTold, sent: list[Told]) -> None:
        for number in range(1000):
            told.tell((number, 1000, None))
        assert sent == [(0, 1000, None)]
        told.finish()
        told.tell((5, None, "too late"))
        told.finish()

    assert run(story) == [(0, 1000, None), (999, 1000, None)]


def test_what_nobody_waits_for_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 1000)

    async def story(told: ProgressTold, sent: list[Told]) -> None:
        told.tell((1, None, None))
        told.tell((2, None, None))
        told.drop()
        told.tell((3, None, None))

    assert run(story) == [(1, None, None)]


def test_the_latest_follows_after_a_while_and_then_silence_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)

    async def story(told: ProgressTold, sent: list[Told]) -> None:
        told.tell((1, None, None))
        told.tell((2, None, None))
        told.tell((3, None, "x"))
        await until(lambda: len(sent) == 2, "the latest has followed")
        await until(lambda: not told._is_due, "nothing is scheduled")
        told.tell((4, None, None))
        assert len(sent) == 3

    assert run(story) == [(1, None, None), (3, None, "x"), (4, None, None)]


def test_what_finds_no_room_goes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    sent: list[Told] = []

    async def main() -> None:
        tries = 0

        def send(*told: Any) -> bool:
            nonlocal tries
            tries += 1
            if tries > 3:
                sent.append(told)
            return tries > 3

        told = ProgressTold(send)
        told.tell((1, None, None))
        await until(lambda: sent, "there is room")
        await until(lambda: not told._is_due, "nothing is scheduled")

    asyncio.run(main())
    assert sent == [(1, None, None)]


def test_threads_that_tell_all_the_time_are_passed_on_now_and_then_and_the_last_for_sure() -> None:
    async def story(told: ProgressTold, sent: list[Told]) -> None:
        def work() -> None:
            for number in range(20_000):
                told.tell((number, None, None))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0)
        await until(lambda: not told._is_due, "the last has been passed on")
        assert sent[-1] == told._latest
        assert told._latest is not None
        assert told._latest[0] == 19_999
        assert len(sent) < 2000

    run(story)


def test_a_request_whose_caller_does_not_ask_tells_nothing() -> None:
    request = Request(Asked(1, "data", "work", b"", ()))  # type: ignore[arg-type]
    assert request.progress_told is None
    request.progress("anything")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((1,), (1, None, None)),
        ((0.5, 2, "half"), (0.5, 2, "half")),
        ((True,), (1.0, None, None)),
        (("5",), TypeError),
        ((float("nan"),), TypeError),
        ((1, float("inf")), TypeError),
        ((None,), TypeError),
        ((1, None, b"x"), TypeError),
        (([],), TypeError),
    ],
)
def test_what_may_be_told(given: Any, told: Any) -> None:
    async def story(progress: ProgressTold, sent: list[Told]) -> None:
        request = Request(Asked(1, "data", "work", b"", ()))  # type: ignore[arg-type]
        request.progress_told = progress
        if told is TypeError:
            with pytest.raises(TypeError):
                request.progress(*given)
        else:
            request.progress(*given)
            assert sent == [told]

    run(story)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")

    async def story(progress: ProgressTold, sent: list[Told]) -> None:
        request = Request(Asked(1, "data", "work", b"", ()))  # type: ignore[arg-type]
        request.progress_told = progress
        request.progress(numpy.int64(3), numpy.float32(4))
        assert sent == [(3.0, 4.0, None)]
        assert all(type(number) is float for number in sent[0][:2])

    run(story)
