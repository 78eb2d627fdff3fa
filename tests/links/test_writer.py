"""When what has gathered is written: at the end of a turn, or right behind a read where nothing else comes."""

from __future__ import annotations

import asyncio

from broker.links.link import _ALONE_TURNS, _AT_ONCE_READS, Writer


class Flushed:
    """A link that counts how often it is written."""

    def __init__(self) -> None:
        self.dirty = False
        self.flushes = 0

    def flush(self) -> None:
        self.dirty = False
        self.flushes += 1


def read(writer: Writer, link: Flushed) -> bool:
    """As a socket does it: something comes, which makes a link dirty. Whether it was written right behind it."""
    before = link.flushes
    if writer.begin_read():
        writer.mark(link)
        writer.end_read()
    else:
        writer.mark(link)
    return link.flushes > before


async def turns(writer: Writer, reads: int, count: int) -> list[bool]:
    """So many turns of the loop with so many reads each: which of them were written at once."""
    at_once = []
    for _ in range(count):
        links = [Flushed() for _ in range(reads)]
        at_once += [read(writer, link) for link in links]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [link.flushes for link in links] == [1] * reads, "once each, sooner or later"
    return at_once


def test_lone_reads_are_written_at_once_and_looked_at_now_and_then() -> None:
    async def main() -> None:
        writer = Writer(asyncio.get_running_loop())
        assert await turns(writer, 1, _ALONE_TURNS) == [False] * _ALONE_TURNS
        for _ in range(3):
            assert await turns(writer, 1, _AT_ONCE_READS) == [True] * _AT_ONCE_READS
            assert await turns(writer, 1, 1) == [False]

    asyncio.run(main())


def test_reads_that_come_together_are_gathered_again() -> None:
    async def main() -> None:
        writer = Writer(asyncio.get_running_loop())
        await turns(writer, 1, _ALONE_TURNS)
        many = await turns(writer, 16, 20)
        assert many == [True] * _AT_ONCE_READS + [False] * (16 * 20 - _AT_ONCE_READS)
        assert await turns(writer, 1, _ALONE_TURNS) == [False] * _ALONE_TURNS

    asyncio.run(main())


def test_what_is_marked_outside_of_reads_is_written_in_the_same_turn_as_ever() -> None:
    async def main() -> None:
        writer, link = Writer(asyncio.get_running_loop()), Flushed()
        await turns(writer, 1, _ALONE_TURNS)
        writer.mark(link)
        other = Flushed()
        assert not read(writer, other), "something is gathered already"
        assert link.flushes == 0
        await asyncio.sleep(0)
        assert (link.flushes, other.flushes) == (1, 1)

    asyncio.run(main())
