"""The engine: effects in order, one timer, slices, and links whose own code raises."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

import pytest

from broker.core.access import Grant, Role
from broker.core.errors import DRAINED
from broker.core.events import Asked, Attached, CloseLink, Congested, Detached
from broker.core.limits import Limits
from broker.core.messages import Body, Call, End, Message, Options
from broker.core.router import Router
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links import compiled
from broker.wire.pieces import join_reply

EVERYTHING = (Grant(Role.CALLER | Role.WORKER),)


class Recorder:
    """A link that keeps what it is told, and raises where it is asked to."""

    takes_binary = True

    def __init__(self, raising: frozenset[str] = frozenset()) -> None:
        self.raising = raising
        self.messages: list[Message] = []
        self.told: list[object] = []
        self.on_deliver: Callable[[Message], None] | None = None

    def deliver(self, message: Message) -> None:
        self._maybe("deliver")
        self.messages.append(message)
        if self.on_deliver is not None:
            self.on_deliver(message)

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        self._maybe("broadcast")
        self.messages.append(message)
        return True

    def close(self, code: int, reason: str) -> None:
        self._maybe("close")
        self.told.append((code, reason))

    def pause_reading(self) -> None:
        self._maybe("pause")
        self.told.append("pause")

    def resume_reading(self) -> None:
        self._maybe("resume")
        self.told.append("resume")

    def _maybe(self, what: str) -> None:
        if what in self.raising:
            raise RuntimeError(f"{what} failed")


class World:
    def __init__(self, **options: int) -> None:
        self.router = Router(Limits(slot_s=0.01), join=join_reply, node="n", now=0.0)
        self.engine = Engine(self.router, asyncio.get_running_loop(), compiled=compiled.wanted(), **options)
        self.delays: list[float] = []

    def attach(
        self, link: Recorder, role: Role = Role.CALLER, endpoint: str | None = "e", expires_at: float | None = None
    ) -> Session:
        number = self.engine.next_session()
        attached = Attached(
            session=number,
            link=link,
            principal="p",
            grants=EVERYTHING,
            role=role,
            endpoint=endpoint,
            listen=role == Role.LISTENER,
            expires_at=expires_at,
        )
        self.engine.feed(attached)
        return self.router.sessions.by_id[number]

    def ask(self, session: Session, wire_id: int, timeout: float | None = None, wait: bool = False) -> None:
        self.engine.feed(Asked(session, wire_id, "e", "m", Body(b"1"), Options(timeout=timeout, wait=wait)))


def run(main: Callable[[], object]) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(30):
            await main()  # type: ignore[misc]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(guarded())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def test_effects_are_performed_at_once_and_in_order() -> None:
    async def main() -> None:
        world = World()
        caller, worker = Recorder(), Recorder()
        session = world.attach(caller)
        world.attach(worker, Role.WORKER)
        for number in range(3):
            world.ask(session, number)
        assert [type(m) for m in worker.messages] == [Call] * 3
        assert [m.attempt.id for m in worker.messages if isinstance(m, Call)] == [1, 2, 3]
        world.engine.stop()

    run(main)


def test_an_event_fed_while_effects_are_performed_joins_the_end() -> None:
    """A link that breaks while it is written to says so from inside `deliver`."""

    async def main() -> None:
        world = World()
        caller, worker = Recorder(), Recorder()
        session = world.attach(caller)
        working = world.attach(worker, Role.WORKER)
        worker.on_deliver = lambda message: world.engine.feed(Detached(working, 1006, "broke", 0))
        world.ask(session, 1)
        (end,) = caller.messages
        assert isinstance(end, End)
        assert end.outcome.kind.name == "worker_lost"
        assert world.router.effects == []
        world.router.check()
        world.engine.stop()

    run(main)


@pytest.mark.parametrize("raising", ["deliver", "deliver close", "pause", "pause close", "close"])
def test_a_link_whose_code_raises_harms_nobody_else(raising: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        world = World()
        bad, good = Recorder(frozenset(raising.split())), Recorder()
        first, second = world.attach(bad), world.attach(good)
        router = world.router
        if "pause" in raising:
            world.engine.feed(Congested(first, True))
        if raising == "close":
            router.effects.append(CloseLink(first, DRAINED, "x"))
        world.ask(first, 1)
        world.ask(second, 1)
        assert len(good.messages) == 1, "whoever comes after it is told all the same"
        assert router.effects == []
        if "close" not in raising:
            assert bad.told[0] == (1011, "the broker failed to write to this link")
        world.engine.stop()

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "failed" in caplog.text


def test_there_is_one_timer_and_it_is_moved_only_forward() -> None:
    async def main() -> None:
        world = World()
        loop, armed = asyncio.get_running_loop(), []
        call_later = loop.call_later

        def counting(delay: float, *arguments: object):  # type: ignore[no-untyped-def]
            armed.append(delay)
            return call_later(delay, *arguments)  # type: ignore[arg-type]

        loop.call_later = counting  # type: ignore[method-assign, assignment]
        session = world.attach(Recorder())
        world.attach(Recorder(), Role.WORKER)
        for number in range(100):
            world.ask(session, number, timeout=20 + number)
        assert len(armed) == 1, "the earliest slot did not change"
        world.ask(session, 1000, timeout=5)
        assert len(armed) == 2
        assert armed[1] < 6
        world.engine.stop()
        assert world.engine._timer is None

    run(main)


def test_deadlines_expire_in_slices_with_turns_between() -> None:
    async def main() -> None:
        world = World(prune_slice=10)
        caller = Recorder()
        session = world.attach(caller)
        for number in range(95):
            world.ask(session, number, timeout=0.03, wait=True)
        at_turn: list[int] = []
        while len(caller.messages) < 95:
            await asyncio.sleep(0)
            at_turn.append(len(caller.messages))
        steps = {b - a for a, b in itertools.pairwise(at_turn)}
        assert max(steps) <= 10
        assert [m.wire_id for m in caller.messages if isinstance(m, End)] == list(range(95))
        world.engine.stop()

    run(main)


def test_a_deadline_is_never_early_and_a_nearer_one_is_seen() -> None:
    async def main() -> None:
        world = World()
        caller = Recorder()
        session = world.attach(caller)
        asked = world.engine.now()
        world.ask(session, 1, timeout=5, wait=True)
        world.ask(session, 2, timeout=0.05, wait=True)
        await until(lambda: len(caller.messages) == 1)
        assert world.engine.now() - asked >= 0.05
        (end,) = caller.messages
        assert isinstance(end, End)
        assert end.wire_id == 2
        world.engine.stop()

    run(main)


def test_credentials_expire_by_the_same_timer() -> None:
    async def main() -> None:
        world = World()
        link = Recorder()
        world.attach(link, expires_at=world.engine.now() + 0.05)
        await until(lambda: bool(link.told))
        assert link.told == [(4401, "the credential has expired")]
        world.engine.stop()

    run(main)


def test_a_broadcast_goes_out_in_slices_and_survives_who_raises_or_leaves() -> None:
    async def main() -> None:
        world = World(fanout_slice=4)
        links = [Recorder(frozenset({"broadcast"}) if number == 5 else frozenset()) for number in range(11)]
        sessions = [world.attach(link, Role.LISTENER) for link in links]
        publisher = world.attach(Recorder())
        world.engine.feed(Asked(publisher, 1, "", "broker.publish", Body(b'{"endpoint":"e","data":1}'), Options()))
        heard = [sum(1 for m in link.messages if not isinstance(m, End)) for link in links]
        assert sum(heard) == 4, "only the first slice yet"
        world.engine.feed(Detached(sessions[10], 1000, "", 0))
        await until(lambda: len(world.router.fanouts) == 0)
        heard = [sum(1 for m in link.messages if not isinstance(m, End)) for link in links]
        assert heard == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]
        assert links[5].told[0] == (1011, "the broker failed to write to this link")
        assert world.router.counters.copies == 9
        world.engine.stop()

    run(main)


def test_nothing_is_left_after_stop() -> None:
    async def main() -> None:
        world = World(fanout_slice=1)
        session = world.attach(Recorder())
        world.attach(Recorder(), Role.LISTENER)
        world.attach(Recorder(), Role.LISTENER)
        world.ask(session, 1, timeout=0.01, wait=True)
        world.engine.feed(Asked(session, 2, "", "broker.publish", Body(b'{"endpoint":"e","data":1}'), Options()))
        world.engine.stop()
        await asyncio.sleep(0.05)
        assert world.router.pending.count == 1, "nothing ticks any more"

    run(main)


def test_events_that_came_together_are_all_taken_in_though_one_fails() -> None:
    async def main() -> None:
        world = World()
        worker, caller = Recorder(), world.attach(Recorder())
        world.attach(worker, Role.WORKER)
        good = [Asked(caller, b"%d" % number, "e", "m", Body(b"1"), Options()) for number in range(4)]
        bad = Asked(caller, b"bad", "e", "m", Body(b"1"), Options())
        asked = world.router.handlers[Asked]

        def failing(event: Asked, now: float) -> None:
            if event is bad:
                raise RuntimeError("on purpose")
            asked(event, now)

        world.router.handlers[Asked] = failing
        with pytest.raises(RuntimeError, match="on purpose"):
            world.engine.feed_all([good[0], bad, good[1], bad, good[2]])
        assert world.router.pending.count == 3
        assert len(worker.messages) == 3
        world.engine.feed_all([good[3]])
        assert world.router.pending.count == 4
        assert world.router.effects == []
        world.engine.stop()

    run(main)


def test_events_that_came_together_are_performed_though_the_program_is_interrupted() -> None:
    async def main() -> None:
        world = World()
        worker, caller = Recorder(), world.attach(Recorder())
        world.attach(worker, Role.WORKER)
        good = Asked(caller, b"1", "e", "m", Body(b"1"), Options())
        asked = world.router.handlers[Asked]

        def interrupted(event: Asked, now: float) -> None:
            if event is not good:
                raise KeyboardInterrupt
            asked(event, now)

        world.router.handlers[Asked] = interrupted
        with pytest.raises(KeyboardInterrupt):
            world.engine.feed_all([good, Asked(caller, b"2", "e", "m", Body(b"1"), Options())])
        assert len(worker.messages) == 1
        assert world.router.effects == []
        world.engine.stop()

    run(main)
