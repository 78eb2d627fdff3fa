"""The sweep with a clock of the test's own, and once over a real half-open connection."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from broker.links.limits import LinkCounters, LinkLimits
from broker.links.link import Link
from broker.links.liveness import Liveness
from broker.wire.frames import PING, PONG
from tests.links.harness import ENDS, frame, raw_client, run, serving, until


class Clock:
    """The part of an event loop the sweep uses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.due: float | None = None
        self.tick = lambda: None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, tick: object) -> Clock:
        self.due, self.tick = when, cast("type[None]", tick)
        return self

    def cancel(self) -> None:
        self.due = None

    def advance(self, seconds: float) -> None:
        """Let time pass, with every tick at its moment."""
        end = self.now + seconds
        while self.due is not None and self.due <= end:
            self.now = self.due
            self.tick()
        self.now = end


class Line:
    """The part of a link the sweep uses; it is heard only when the test says so."""

    def __init__(self) -> None:
        self.heard = False
        self.heard_at = 0.0
        self.paused = False
        self.is_open = True
        self.flushed = 0
        self.pings = 0
        self.aborted: list[str] = []
        self.slowed: list[str] = []

    def ping(self) -> None:
        self.pings += 1

    def progress(self) -> int:
        return self.flushed

    def abort(self, code: int = 1006, reason: str = "") -> None:
        self.aborted.append(reason)
        self.is_open = False

    def slow(self, reason: str) -> None:
        self.slowed.append(reason)


def watching(limits: LinkLimits | None = None) -> tuple[Clock, Liveness, Line]:
    clock, line = Clock(), Line()
    liveness = Liveness(cast("asyncio.AbstractEventLoop", clock), limits or LinkLimits(), LinkCounters())
    liveness.add(cast("Link", line))
    return clock, liveness, line


@pytest.mark.parametrize("heard_s", [0.0, 0.3, 1.7, 2.4, 2.6, 7.7])
def test_a_dead_link_is_noticed_within_interval_and_timeout(heard_s: float) -> None:
    clock, _, line = watching()
    clock.advance(heard_s)
    line.heard = True
    began = clock.now
    while not line.aborted:
        clock.advance(0.1)
    assert line.aborted == ["ping timeout"]
    assert line.pings == 1
    assert 20 < clock.now - began <= 40


def test_a_link_that_answers_is_pinged_again_and_never_dropped() -> None:
    clock, _, line = watching()
    answered = 0
    for _ in range(6000):
        clock.advance(0.1)
        if line.pings > answered:
            answered = line.pings
            clock.advance(19)
            line.heard = True
    assert line.aborted == []
    assert answered > 5


def test_a_talking_link_is_never_pinged() -> None:
    clock, _, line = watching()
    for _ in range(100):
        clock.advance(5)
        line.heard = True
    assert (line.pings, line.aborted) == (0, [])


def test_a_paused_link_is_left_alone() -> None:
    clock, _, line = watching()
    line.paused = True
    clock.advance(300)
    assert (line.pings, line.aborted) == (0, [])


def test_no_pings_with_an_interval_of_zero() -> None:
    clock, _, line = watching(LinkLimits(ping_interval_s=0))
    clock.advance(300)
    assert (line.pings, line.aborted) == (0, [])


def test_a_late_sweep_forgives() -> None:
    clock, liveness, line = watching()
    clock.advance(19)
    assert line.pings == 1
    clock.advance(15)
    clock.now += 10  # stopped: no tick came at its moment
    clock.tick()
    assert line.aborted == []
    clock.advance(19)
    assert line.aborted == []
    clock.advance(1.5)
    assert line.aborted == ["ping timeout"]
    assert liveness.ticking


def test_an_outbox_without_progress_is_slow_and_one_with_some_is_not() -> None:
    clock, liveness, line = watching()
    liveness.blocked(cast("Link", line))
    for _ in range(30):
        clock.advance(5)
        line.flushed += 1
        line.heard = True
    assert line.slowed == []
    clock.advance(10)
    assert line.slowed == []
    clock.advance(1.5)
    assert line.slowed == ["nothing read for 10 s"]


def test_a_late_sweep_forgives_a_stalled_outbox() -> None:
    clock, liveness, line = watching()
    liveness.blocked(cast("Link", line))
    clock.advance(8)
    clock.now += 60
    clock.tick()
    assert line.slowed == []


def test_a_link_that_drains_is_no_longer_watched() -> None:
    clock, liveness, line = watching(LinkLimits(ping_interval_s=0))
    liveness.blocked(cast("Link", line))
    clock.advance(8)
    liveness.unblocked(cast("Link", line))
    clock.advance(60)
    assert line.slowed == []


@pytest.mark.parametrize("offset_s", [0.0, 0.1, 0.49])
def test_a_closing_link_is_dropped_at_most_at_its_timeout(offset_s: float) -> None:
    clock, liveness, line = watching()
    clock.advance(offset_s)
    liveness.closing(cast("Link", line))
    began = clock.now
    while not line.aborted:
        clock.advance(0.01)
    assert 1 < clock.now - began <= 2.01


def test_the_timer_runs_only_while_there_are_links() -> None:
    clock, liveness, line = watching()
    assert liveness.ticking
    liveness.forget(cast("Link", line))
    assert not liveness.ticking
    assert clock.due is None


@pytest.mark.parametrize(("kind", "loop"), ENDS)
def test_a_half_open_peer_is_dropped_and_one_that_answers_is_not(kind: str, loop: str) -> None:
    async def main() -> None:
        limits = LinkLimits(ping_interval_s=0.4, ping_timeout_s=0.8)
        async with serving(kind, limits=limits) as server, raw_client(server) as silent, raw_client(server) as lively:
            silent_peer, lively_peer = await server.peer(0), await server.peer(1)
            pings = 0
            while not silent_peer.closings or pings < 3:
                assert await lively.frame() == (PING, b"")
                lively.writer.write(frame(PONG, b""))
                pings += 1
            assert silent_peer.closings == [(1006, "ping timeout")]
            assert lively_peer.closings == []
            assert server.links.counters.ping_timeouts == 1
            assert await silent.frame() == (PING, b"")
            await until(lambda: silent_peer.link not in server.links.links, "gone")

    run(main, loop)
