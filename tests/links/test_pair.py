"""Both ends of a link in memory: what `tests/links/test_link.py` asks of WebSockets, as far as there is no wire."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from broker.core.budget import Budget
from broker.links.compiled import core
from broker.links.limits import LinkLimits
from broker.links.link import Writer
from broker.links.loop import LoopLinks
from broker.links.pair import PairLink, make_pair
from broker.wire import native
from broker.wire.frames import binary_frame, text_frame
from tests.links.harness import LOOPS, Recorder, run, until

MIB = 1 << 20
loops = pytest.mark.parametrize("loop", LOOPS)


class Ends:
    """A pair with its receivers; afterwards nothing may be left of it."""

    def __init__(self, limits: LinkLimits | None = None, *, start: tuple[bool, bool] = (True, True)) -> None:
        self.budget = Budget()
        self.links = LoopLinks(limits, budget=self.budget), LoopLinks(limits)
        self.here, self.there = make_pair(*self.links)
        self.ours, self.theirs = Recorder(self.here), Recorder(self.there)  # type: ignore[arg-type]
        for link, recorder, begin in ((self.here, self.ours, start[0]), (self.there, self.theirs, start[1])):
            if begin:
                link.start(recorder)

    async def __aenter__(self) -> Ends:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None:
            await self.links[0].close()
            assert not self.links[0].pairs and not self.links[1].pairs
            assert self.budget.used == 0
            assert all(len(one.closings) <= 1 for one in (self.ours, self.theirs))


def told(*closings: tuple[int, str]) -> list[tuple[int, str]]:
    return list(closings)


@loops
def test_messages_of_all_sizes_come_whole_and_in_order_both_ways(loop: str) -> None:
    async def main() -> None:
        async with Ends() as ends:
            whole = [(b"", False), (b"x", True), ("é".encode(), False), (b"m" * (5 * MIB), True)]
            whole += [(str(number).encode(), bool(number & 1)) for number in range(3000)]
            for payload, binary in whole:
                ends.here.send(payload, binary)
                ends.there.send(memoryview(payload), binary)
            ends.here.send_parts([b"a", memoryview(b"bc"), b""], True)
            assert ends.theirs.messages == [] and ends.ours.messages == []  # never from inside send
            await until(lambda: len(ends.theirs.messages) > len(whole) and len(ends.ours.messages) == len(whole), "all")
            assert ends.theirs.messages == [*whole, (b"abc", True)]
            assert ends.ours.messages == whole
            assert all(type(payload) is bytes for payload, _ in ends.ours.messages)
            assert (ends.here.outbox_bytes, ends.there.outbox_bytes) == (0, 0)
            assert ends.ours.congestion == []  # it was above the soft bound within one turn only

    run(main, loop)


@loops
def test_all_of_a_turn_is_handed_over_in_one_call_of_the_loop(loop: str) -> None:
    async def main() -> None:
        links, other = LoopLinks(), LoopLinks()
        pairs = [make_pair(links, other) for _ in range(20)]
        heard = [Recorder(there) for _, there in pairs]  # type: ignore[arg-type]
        for (_, there), recorder in zip(pairs, heard, strict=True):
            there.start(recorder)
        await asyncio.sleep(0)
        calls = 0
        schedule = links.loop.call_soon

        class Counting:
            def call_soon(self, *arguments: object) -> object:
                nonlocal calls
                calls += 1
                return schedule(*arguments)  # type: ignore[arg-type]

        links.writer._loop = Counting()  # type: ignore[assignment]
        for here, _ in pairs:
            for _ in range(10):
                here.send(b"x")
        assert calls == 1
        await asyncio.sleep(0)
        assert [len(one.messages) for one in heard] == [10] * 20
        await links.close()
        assert not other.pairs

    run(main, loop)


@loops
def test_what_is_sent_before_the_start_is_heard(loop: str) -> None:
    async def main() -> None:
        async with Ends(start=(True, False)) as ends:
            ends.here.send(b"early")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert ends.here.outbox_bytes == 5
            ends.there.start(ends.theirs)
            await until(lambda: ends.theirs.messages == [(b"early", False)], "heard")
            with pytest.raises(RuntimeError, match="was started before"):
                ends.there.start(ends.theirs)

    run(main, loop)


@loops
def test_a_large_outbox_leaves_turns_to_others(loop: str) -> None:
    async def main() -> None:
        async with Ends(LinkLimits(write_turn_bytes=65_536)) as ends:
            for _ in range(40):
                ends.here.send(b"x" * 65_536)
            for turn in range(1, 5):
                await asyncio.sleep(0)
                assert len(ends.theirs.messages) <= turn
            await until(lambda: len(ends.theirs.messages) == 40, "all came")

    run(main, loop)


# ── bounds ──


@loops
def test_an_end_that_takes_nothing_is_closed_at_the_hard_bound(loop: str) -> None:
    async def main() -> None:
        limits = LinkLimits()
        async with Ends(limits) as ends:
            ends.there.pause_reading()
            sent = 0
            while ends.here.is_open:
                ends.here.send(b"x" * 100_000)
                sent += 1
                assert ends.here.outbox_bytes <= limits.outbox_hard_bytes
                if sent % 10 == 0:
                    await asyncio.sleep(0)
            assert ends.ours.closings == ends.theirs.closings == []  # never from inside send
            await until(lambda: bool(ends.ours.closings and ends.theirs.closings), "told")
            assert [code for code, _ in ends.ours.closings] == [4408]
            assert ends.ours.closings[0][1].endswith("bytes wait in the outbox, and 100000 more came")
            assert ends.theirs.closings == ends.ours.closings
            assert ends.ours.congestion == [True]
            assert ends.links[0].counters.slow_closes == 1
            assert sent == limits.outbox_hard_bytes // 100_000 + 1

    run(main, loop)


@loops
def test_one_message_above_the_hard_bound_may_stand_alone(loop: str) -> None:
    async def main() -> None:
        async with Ends(LinkLimits(outbox_soft_bytes=1000, outbox_hard_bytes=2000, outbox_reading_bytes=2000)) as ends:
            ends.there.pause_reading()
            ends.here.send(b"x" * 5000)
            assert ends.here.is_open
            ends.here.send(b"x")
            assert not ends.here.is_open

    run(main, loop)


@loops
def test_large_messages_that_coincide_in_one_turn_pass(loop: str) -> None:
    async def main() -> None:
        async with Ends() as ends:
            for _ in range(8):  # 40 MiB, five times the hard bound
                ends.here.send(b"x" * (5 * MIB))
            await until(lambda: len(ends.theirs.messages) == 8, "all came")
            assert ends.ours.closings == []

    run(main, loop)


@loops
def test_a_message_above_the_bound_of_who_gets_it_is_1009(loop: str) -> None:
    async def main() -> None:
        async with Ends(LinkLimits(message_max_bytes=1000)) as ends:
            ends.here.send(b"x" * 1000)
            ends.here.send(b"x" * 1001)
            ends.here.send(b"not looked at")
            await until(lambda: bool(ends.ours.closings and ends.theirs.closings), "told")
            assert ends.theirs.messages == [(b"x" * 1000, False)]
            assert ends.ours.closings == told((1009, "a message of 1001 bytes is above the bound"))

    run(main, loop)


@loops
def test_congestion_is_told_once_each_way_and_nothing_is_lost(loop: str) -> None:
    async def main() -> None:
        async with Ends(LinkLimits(outbox_hard_bytes=64 * MIB)) as ends:
            ends.there.pause_reading()
            for number in range(60):
                ends.here.send(bytes([number]) * 300_000, True)
            assert ends.ours.congestion == []  # never from inside send
            assert ends.here.is_crowded()
            mark = ends.here.enqueued
            await until(lambda: ends.budget.outboxes == 60 * 300_000, "counted")
            assert ends.here.flushed == 0
            ends.there.resume_reading()
            await until(lambda: ends.ours.congestion[-1:] == [False], "relieved")
            await until(lambda: ends.here.flushed == mark, "all is handed over")
            assert ends.theirs.messages == [(bytes([number]) * 300_000, True) for number in range(60)]
            assert not ends.here.is_crowded()

    run(main, loop)


@loops
def test_broadcasts_lose_their_header_and_are_dropped_above_the_soft_bound(loop: str) -> None:
    async def main() -> None:
        async with Ends(LinkLimits(outbox_hard_bytes=64 * MIB)) as ends:
            sizes = (0, 125, 126, 65_535, 65_536)
            for size in sizes:
                assert ends.here.send_frame(text_frame(b"t" * size))
                assert ends.here.send_frame(binary_frame(b"b" * size))
            await until(lambda: len(ends.theirs.messages) == 10, "all came")
            wanted = [pair for size in sizes for pair in ((b"t" * size, False), (b"b" * size, True))]
            assert ends.theirs.messages == wanted
            ends.there.pause_reading()
            ends.here.send(b"x" * (2 * MIB))
            assert not ends.here.send_frame(text_frame(b"news"))
            assert (ends.here.broadcasts_dropped, ends.links[0].counters.broadcasts_dropped) == (1, 1)
            ends.there.resume_reading()

    run(main, loop)


# ── the end ──


@loops
def test_close_hands_over_what_is_queued_and_tells_both_once(loop: str) -> None:
    async def main() -> None:
        async with Ends() as ends:
            ends.here.send(b"last")
            ends.there.send(b"not looked at")
            ends.here.close(4412, "drained")
            assert not ends.here.is_open and ends.here.is_crowded()
            ends.here.send(b"too late")
            await until(lambda: bool(ends.ours.closings and ends.theirs.closings), "told")
            assert ends.theirs.messages == [(b"last", False)]
            assert ends.ours.messages == []
            assert ends.ours.closings == ends.theirs.closings == told((4412, "drained"))
            assert ends.here.flushed_at_last == ends.here.enqueued == 4
            for link in (ends.here, ends.there):
                link.send(b"dropped")
                assert not link.send_frame(text_frame(b"dropped"))
                link.close(1000)
                link.abort()
                link.pause_reading()
                link.resume_reading()
            await asyncio.sleep(0.01)
            assert len(ends.ours.closings) == len(ends.theirs.closings) == 1

    run(main, loop)


@loops
def test_a_close_waits_for_an_end_that_reads_again_but_not_for_ever(loop: str) -> None:
    async def main() -> None:
        async with Ends(LinkLimits(close_timeout_s=10)) as ends:
            ends.there.pause_reading()
            ends.here.send(b"last")
            ends.here.close(1000, "done")
            await asyncio.sleep(0.01)
            assert ends.theirs.closings == []
            ends.there.resume_reading()
            await until(lambda: ends.theirs.closings == [(1000, "done")], "told")
            assert ends.theirs.messages == [(b"last", False)]
        async with Ends(LinkLimits(close_timeout_s=0.05)) as ends:
            ends.there.pause_reading()
            ends.here.send(b"last")
            ends.here.close(1000, "done")
            await until(lambda: ends.theirs.closings == [(1000, "done")], "told though it reads nothing")
            assert ends.theirs.messages == []
            assert ends.here.flushed_at_last == 0

    run(main, loop)


@loops
def test_both_ends_may_close_at_once(loop: str) -> None:
    async def main() -> None:
        async with Ends() as ends:
            ends.here.close(1000, "we")
            ends.there.close(1001, "they")
            await until(lambda: bool(ends.ours.closings and ends.theirs.closings), "told")
            assert len(ends.ours.closings) == len(ends.theirs.closings) == 1

    run(main, loop)


@loops
def test_abort_drops_what_is_queued_and_tells_its_code(loop: str) -> None:
    async def main() -> None:
        async with Ends() as ends:
            ends.here.send(b"x" * MIB)
            ends.here.abort(4409, "replaced")
            assert ends.ours.closings == []  # never from inside a call
            assert ends.here.flushed_at_last == 0
            await until(lambda: bool(ends.ours.closings and ends.theirs.closings), "told")
            assert ends.theirs.messages == []
            assert ends.ours.closings == ends.theirs.closings == told((4409, "replaced"))

    run(main, loop)


@loops
def test_an_end_that_is_started_after_the_end_is_told(loop: str) -> None:
    async def main() -> None:
        async with Ends(start=(True, False)) as ends:
            ends.here.abort(1006, "gone")
            await until(lambda: bool(ends.ours.closings), "told")
            assert not ends.links[1].pairs, "an end that was never started is let go of too"
            ends.there.start(ends.theirs)
            await until(lambda: ends.theirs.closings == [(1006, "gone")], "told late")

    run(main, loop)


@loops
@pytest.mark.parametrize("where", ["message", "congested", "closed"])
def test_a_receiver_that_raises_ends_its_own_pair_only(loop: str, where: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    async def main() -> None:
        async with Ends() as ends, Ends() as others:
            setattr(ends.ours if where == "congested" else ends.theirs, where, fail)
            if where == "congested":
                ends.there.pause_reading()
            ends.here.send(b"x" * (2 * MIB))
            others.here.send(b"fine")
            if where == "closed":
                ends.here.abort(1000, "")
            await until(lambda: bool(others.theirs.messages), "the others go on")
            if where == "congested":
                ends.there.resume_reading()
            await until(lambda: not ends.here.is_open, "ended")
            await until(lambda: bool(ends.ours.closings), "told")
            assert ends.ours.closings[0][0] == (1000 if where == "closed" else 1011)
            assert sum(each.counters.receiver_errors for each in ends.links) == 1

    with caplog.at_level(logging.CRITICAL):
        run(main, loop)


@loops
def test_an_answer_from_inside_a_message_comes_in_a_later_turn(loop: str) -> None:
    async def main() -> None:
        async with Ends() as ends:
            depth = 0

            def bounce(link: PairLink) -> Callable[[bytes, bool], None]:
                def message(payload: bytes, binary: bool) -> None:
                    nonlocal depth
                    depth += 1
                    assert depth == 1, "a receiver was called inside another"
                    if len(payload) < 50:
                        link.send(payload + b".")
                    depth -= 1

                return message

            ends.ours.message = bounce(ends.here)  # type: ignore[method-assign]
            ends.theirs.message = bounce(ends.there)  # type: ignore[method-assign]
            ends.here.send(b"")
            await until(lambda: ends.here.enqueued + ends.there.enqueued == sum(range(51)), "to and fro")

    run(main, loop)


def test_both_ends_belong_to_one_loop() -> None:
    async def elsewhere(links: LoopLinks) -> None:
        with pytest.raises(ValueError, match="one event loop"):
            make_pair(links, LoopLinks())

    async def main() -> None:
        await asyncio.to_thread(asyncio.run, elsewhere(LoopLinks()))

    asyncio.run(main())


WRITERS = [Writer] + [lambda loop: Writer(loop, flush_link=native.flush)] * (core() == "compiled core")


@pytest.mark.parametrize("new_writer", WRITERS)
def test_what_ends_the_program_while_one_link_is_flushed_keeps_no_other_from_being_flushed_later(
    new_writer: Callable[[asyncio.AbstractEventLoop], Writer],
) -> None:
    """A program may catch Ctrl-C and turn its loop again, to stop in good order."""

    class Flushed:
        dirty = False
        flushes = 0

        def flush(self) -> None:
            self.dirty = False
            self.flushes += 1

    class Interrupted(Flushed):
        def flush(self) -> None:
            super().flush()
            raise KeyboardInterrupt

    loop = asyncio.new_event_loop()
    writer, links = new_writer(loop), [Flushed(), Interrupted(), Flushed(), Flushed()]
    for link in links:
        writer.mark(link)
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.sleep(0.001))
    assert [link.flushes for link in links] == [1, 1, 0, 0]
    loop.run_until_complete(asyncio.sleep(0.001))
    assert [link.flushes for link in links] == [1, 1, 1, 1]
    many = [Flushed() for _ in range(300)]
    for link in many:
        writer.mark(link)
    turns = 0
    while not all(link.flushes for link in many):
        loop.call_soon(loop.stop)
        loop.run_forever()
        turns += 1
    assert turns == 3, "128 in each"
    assert [link.flushes for link in many] == [1] * 300
    loop.close()
