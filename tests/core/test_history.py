"""What topics keep, and who hears it again: once, in order, before what comes then."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from broker.core import errors
from broker.core.access import Role
from broker.core.events import Deliver, StartFanout
from broker.core.history import TURNS_MAX
from broker.core.limits import EndpointLimits, Limits
from broker.core.sessions import Session
from tests.core.harness import SLICE, World

Accepts = Callable[[Session], bool]


def keeping(history: int = 100, *, limits: Limits | None = None, **more: Any) -> World:
    """A broker that keeps broadcasts of the endpoint e."""
    return World(limits, {"e": EndpointLimits(history=history, **more)})


def result(world: World, session: Session, method: str, **params: Any) -> Any:
    end = world.command(session, method, **params)
    assert end.outcome.kind is errors.OK, end.outcome.detail
    assert end.body is not None
    return json.loads(bytes(end.body.raw))


def publish(world: World, publisher: Session, count: int, topic: str | None = "t", data: Any = 1) -> None:
    for _ in range(count):
        result(world, publisher, "broker.publish", endpoint="e", topic=topic, data=data)


def since(world: World, session: Session, number: int, topic: str | None = "t", **more: Any) -> tuple[int, int]:
    """Subscribe from a number on; what is the last there is, and the first still there."""
    told = result(world, session, "broker.subscribe", endpoint="e", topic=topic, since=number, **more)
    return told["seq"], told["first"]


class Ears:
    """Does what the engine does, one slice at a time, and notes which numbers each session hears."""

    def __init__(self, world: World, accepts: Accepts = lambda _: True, slice_max: int = SLICE) -> None:
        self.world = world
        self.accepts = accepts
        self.slice_max = slice_max
        self.heard: list[tuple[Session, int | None]] = []
        self.given_up = 0

    def turn(self) -> bool:
        """One slice of each kind; whether there is more to do now."""
        router = self.world.router
        piece = router.fanouts.slice(self.slice_max)
        if piece is not None:
            self.heard += [(session, piece[0].seq) for session in piece[1] if session.link is not None]
        replay = router.state.replays.next()
        if replay is not None:
            for _ in range(self.slice_max):
                message = replay.next()
                if message is None:
                    break
                if not self.accepts(replay.session):
                    self.given_up += replay.refused(message)
                    break
                self.heard.append((replay.session, message.seq))
                replay.took(message)
            router.state.replays.put(replay)
        router.check()
        return bool(len(router.fanouts) or router.state.replays.ready)

    def all(self) -> Ears:
        while self.turn():
            pass
        return self

    def of(self, session: Session) -> list[int | None]:
        return [seq for to, seq in self.heard if to is session]


# ---------------------------------------------------------------- since


@pytest.mark.parametrize("topic", [None, "t"])
def test_since_brings_what_is_kept_and_then_what_comes(topic: str | None) -> None:
    world = keeping()
    publisher, late = world.attach(), world.attach()
    publish(world, publisher, 5, topic)
    ears = Ears(world).all()
    world.ask(late, 1, "broker.subscribe", json.dumps({"endpoint": "e", "topic": topic, "since": 2}).encode())
    answer, start = world.take()
    assert isinstance(answer, Deliver) and isinstance(start, StartFanout), "the answer comes first"
    ears.all()
    publish(world, publisher, 2, topic)
    assert ears.all().of(late) == [3, 4, 5, 6, 7]
    assert world.router.counters.replays == 1


@pytest.mark.parametrize("slice_max", [1, 2, 1000])
def test_what_is_published_meanwhile_comes_once_and_in_order(slice_max: int) -> None:
    world = keeping()
    publisher, always, late = world.attach(), world.attach(), world.attach()
    since(world, always, 0)
    publish(world, publisher, 10)
    ears = Ears(world, slice_max=slice_max)
    ears.turn()
    since(world, late, 3)
    for _ in range(8):
        publish(world, publisher, 1)
        ears.turn()
    ears.all()
    publish(world, publisher, 1)
    ears.all()
    assert ears.of(late) == list(range(4, 20))
    assert ears.of(always) == list(range(1, 20))


def test_who_hears_again_counts_as_listener_and_holds_nobody_up() -> None:
    world = keeping(1000)
    publisher, always, late = world.attach(), world.attach(), world.attach()
    since(world, always, 0)
    publish(world, publisher, 50)
    ears = Ears(world, slice_max=10).all()
    since(world, late, 0)
    told = result(world, publisher, "broker.publish", endpoint="e", topic="t")
    assert told == {"seq": 51, "listeners": 2}
    ears.turn()
    assert ears.of(always)[-1] == 51 and ears.of(late) == list(range(1, 11))
    assert ears.all().of(late) == list(range(1, 52))


def test_who_hears_it_already_hears_it_again_and_nothing_twice_after_that() -> None:
    world = keeping()
    publisher, one = world.attach(), world.attach()
    since(world, one, 0)
    publish(world, publisher, 4)
    ears = Ears(world, slice_max=1)
    ears.turn()
    ears.turn()
    assert ears.of(one) == [1, 2], "3 and 4 are under way"
    ears.heard.clear()
    since(world, one, 1)
    publish(world, publisher, 1)
    assert ears.all().of(one) == [2, 3, 4, 5]


def test_who_leaves_is_told_nothing_more_not_even_what_is_under_way() -> None:
    world = keeping()
    publisher, one, two = world.attach(), world.attach(), world.attach()
    since(world, one, 0)
    since(world, two, 0)
    publish(world, publisher, 3)
    result(world, one, "broker.unsubscribe", endpoint="e", topic="t")
    ears = Ears(world)
    ears.turn()
    assert ears.of(one) == [] and ears.of(two) == [1]
    since(world, one, 1)
    publish(world, publisher, 1)
    ears.all()
    assert (ears.of(one), ears.of(two)) == ([2, 3, 4], [1, 2, 3, 4])
    publish(world, publisher, 1)
    assert ears.all().of(one)[-1] == 5


def test_who_leaves_while_hearing_again_is_told_nothing_more() -> None:
    world = keeping()
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 5)
    since(world, one, 0)
    ears = Ears(world, slice_max=2)
    ears.turn()
    result(world, one, "broker.unsubscribe", endpoint="e", topic="t")
    publish(world, publisher, 1)
    assert ears.all().of(one) == [1, 2]
    assert not len(world.router.state.replays)


def test_who_goes_while_hearing_again_leaves_nothing_behind() -> None:
    world = keeping()
    publisher, one, two = world.attach(), world.attach(), world.attach()
    publish(world, publisher, 5)
    since(world, one, 0)
    since(world, two, 0)
    world.congested(two, True)
    Ears(world, slice_max=1).turn()
    Ears(world, slice_max=1).turn()
    world.detach(one)
    world.detach(two)
    assert Ears(world).all().heard == [] and not len(world.router.state.replays)
    assert world.router.registry.by_name["e"].listeners == 0


def test_without_since_nothing_old_comes() -> None:
    world = keeping()
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 3)
    told = result(world, one, "broker.subscribe", endpoint="e", topic="t")
    assert (told["seq"], told["first"]) == (3, 1)
    publish(world, publisher, 1)
    assert Ears(world).all().of(one) == [4]


def test_an_endpoint_without_history_says_that_nothing_is_there() -> None:
    world = World()
    publisher, one = world.attach(), world.attach()
    result(world, one, "broker.subscribe", endpoint="e", topic="t")
    publish(world, publisher, 3)
    ears = Ears(world).all()
    assert since(world, one, 1) == (3, 4)
    publish(world, publisher, 1)
    assert ears.all().of(one) == [1, 2, 3, 4]


# ---------------------------------------------------------------- another life


def test_since_of_another_life_is_void_and_everything_comes() -> None:
    world = keeping()
    publisher = world.attach()
    publish(world, publisher, 5)
    ears = Ears(world).all()
    ahead, stranger, known = world.attach(), world.attach(), world.attach()
    epoch = result(world, publisher, "broker.subscribe", endpoint="e", topic="t")["epoch"]
    assert since(world, ahead, 6) == (5, 1)
    assert since(world, stranger, 3, epoch="another-node") == (5, 1)
    assert since(world, known, 3, epoch=epoch) == (5, 1)
    ears.all()
    assert ears.of(ahead) == ears.of(stranger) == [1, 2, 3, 4, 5]
    assert ears.of(known) == [4, 5]


def test_the_last_number_of_this_life_brings_nothing() -> None:
    world = keeping()
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 5)
    assert since(world, one, 5) == (5, 1)
    assert Ears(world).all().of(one) == []


def test_a_topic_that_was_forgotten_and_made_anew_has_another_epoch() -> None:
    world = keeping(limits=Limits(topics_per_endpoint_max=1), history_s=10.0)
    one = world.attach()
    first = result(world, one, "broker.subscribe", endpoint="e", topic="t")["epoch"]
    publish(world, one, 1)
    result(world, one, "broker.unsubscribe", endpoint="e", topic="t")
    assert result(world, one, "broker.subscribe", endpoint="e", topic="t")["epoch"] == first
    result(world, one, "broker.unsubscribe", endpoint="e", topic="t")
    world.sleep(20)
    result(world, one, "broker.subscribe", endpoint="e", topic="u")
    result(world, one, "broker.unsubscribe", endpoint="e", topic="u")
    assert result(world, one, "broker.subscribe", endpoint="e", topic="t")["epoch"] != first


# ---------------------------------------------------------------- bounds


def test_no_more_are_kept_than_the_count_allows_and_a_cut_is_told() -> None:
    world = keeping(3)
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 10)
    assert since(world, one, 2) == (10, 8)
    assert Ears(world).all().of(one) == [8, 9, 10]


def test_no_more_bytes_are_kept_than_allowed() -> None:
    world = keeping(history_max_bytes=1000)
    publisher, one, two = world.attach(), world.attach(), world.attach()
    publish(world, publisher, 5, data="x" * 398)  # 400 with the quotes
    Ears(world).all()
    assert world.router.state.budget.used == 800
    assert since(world, one, 0) == (5, 4)
    publish(world, publisher, 1, data="x" * 2000)
    assert since(world, two, 0) == (6, 6), "larger than all that may be kept, it stands alone"
    ears = Ears(world).all()
    assert ears.of(one) == ears.of(two) == [6]
    publish(world, publisher, 1, data="x" * 98)
    assert since(world, two, 0) == (7, 7)


def test_all_histories_together_leave_most_of_the_memory_to_requests() -> None:
    world = keeping(limits=Limits(memory_soft_bytes=4000))
    one = world.attach()
    publish(world, one, 8, "t0", data="x" * 98)
    publish(world, one, 8, "t1", data="x" * 98)
    Ears(world).all()
    assert [len(world.router.registry.by_name["e"].topics[name].history) for name in ("t0", "t1")] == [8, 2]
    publish(world, one, 1, "t2", data="x" * 2000)
    Ears(world).all()
    assert world.router.state.budget.used == world.router.state.history_bytes == 1000, "not even the last is kept"
    publish(world, one, 1, "t0", data="x" * 498)
    Ears(world).all()
    assert [len(world.router.registry.by_name["e"].topics[name].history) for name in ("t0", "t1")] == [4, 2]


def test_what_is_too_old_is_let_go_though_nothing_happens() -> None:
    world = keeping(history_s=60.0)
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 2, data="x" * 98)
    world.sleep(30)
    publish(world, publisher, 1, data="x" * 98)
    Ears(world).all()
    assert world.router.state.budget.used == 300
    world.sleep(32)
    assert world.router.state.budget.used == 100
    assert since(world, one, 0) == (3, 3)
    world.sleep(40)
    assert world.router.state.budget.used == 0
    assert world.router.next_deadline() > world.now + 1e9, "nothing is left to wait for"


def test_nothing_too_old_is_given_out() -> None:
    world = keeping(history_s=60.0)
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 2)
    world.now += 61  # and no tick yet
    assert since(world, one, 0) == (2, 3)


def test_a_topic_nobody_hears_is_kept_as_long_as_it_keeps_something() -> None:
    world = keeping(limits=Limits(topics_per_endpoint_max=2), history_s=60.0)
    one = world.attach()
    publish(world, one, 1, "t0")
    publish(world, one, 1, "t1")
    Ears(world).all()
    outcome = world.command(one, "broker.publish", endpoint="e", topic="t2").outcome
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "topics"
    outcome = world.command(one, "broker.subscribe", endpoint="e", topic="t2").outcome
    assert outcome.kind is errors.OVERLOADED and outcome.bound == "topics"
    world.sleep(62)
    publish(world, one, 1, "t2")
    assert sorted(filter(None, world.router.registry.by_name["e"].topics)) == ["t1", "t2"]


def test_an_endpoint_without_history_keeps_no_topic_nobody_hears() -> None:
    world = keeping()
    one = world.attach()
    result(world, one, "broker.subscribe", endpoint="f")
    assert result(world, one, "broker.publish", endpoint="f", topic="t") == {"seq": None, "listeners": 0}
    assert result(world, one, "broker.publish", endpoint="e", topic="t") == {"seq": 1, "listeners": 0}


def test_other_bounds_hold_from_the_reload_on() -> None:
    world = keeping(10)
    one, two = world.attach(), world.attach()
    publish(world, one, 10, data="x" * 98)
    Ears(world).all()
    assert world.router.state.budget.used == 1000
    world.reconfigure(Limits(), {"e": EndpointLimits(history=4)})
    assert world.router.state.budget.used == 400
    world.reconfigure(Limits(), {"e": EndpointLimits()})
    assert world.router.state.budget.used == 0
    assert since(world, two, 0) == (10, 11)


def test_comings_and_goings_are_kept_too() -> None:
    world = keeping()
    watcher, late = world.attach(), world.attach()
    result(world, watcher, "broker.subscribe", endpoint="e", topic="broker.peers")
    world.worker("e")
    world.attach(Role.CALLER, "e")
    assert since(world, late, 0, "broker.peers") == (2, 1)
    assert Ears(world).all().of(late) == [1, 2]


# ---------------------------------------------------------------- slow readers


def test_who_does_not_read_hears_on_when_he_reads_again() -> None:
    world = keeping(10)
    publisher, slow, other = world.attach(), world.attach(), world.attach()
    publish(world, publisher, 6)
    since(world, slow, 0)
    since(world, other, 0)
    ears = Ears(world, slice_max=2)
    ears.turn()
    world.congested(slow, True)
    ears.all()
    assert (ears.of(slow), ears.of(other)) == ([1, 2], [1, 2, 3, 4, 5, 6])
    assert not ears.turn(), "nobody turns round in vain"
    publish(world, publisher, 7)
    ears.all()
    world.take()
    world.congested(slow, False)
    assert any(isinstance(effect, StartFanout) for effect in world.take())
    assert ears.all().of(slow) == [1, 2, *range(4, 14)], "3 had to go for 13"


def test_a_copy_that_was_not_taken_comes_again() -> None:
    world = keeping()
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 4)
    since(world, one, 0)
    turns = iter([True, False, False, True, True, False, True])
    ears = Ears(world, accepts=lambda _: next(turns))
    assert ears.all().of(one) == [1, 2, 3, 4] and ears.given_up == 0


def test_a_copy_that_is_never_taken_is_given_up() -> None:
    world = keeping()
    publisher, one = world.attach(), world.attach()
    publish(world, publisher, 2)
    since(world, one, 0)
    tries = iter(range(1000))
    ears = Ears(world, accepts=lambda _: next(tries) >= TURNS_MAX)
    assert ears.all().of(one) == [2] and ears.given_up == 1


# ---------------------------------------------------------------- in any order


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_in_whatever_order_each_comes_once(seed: int) -> None:
    """Who subscribed from a number on hears every number above it, one after the other, until it leaves."""
    chance = random.Random(seed)
    world = keeping(10_000)
    publisher, readers = world.attach(), [world.attach() for _ in range(4)]
    accepting: dict[Session, bool] = {}
    ears = Ears(world, accepts=lambda session: accepting.get(session, True), slice_max=chance.choice([1, 2, 7]))
    wanted: dict[Session, int] = {}  # the next number, for those who listen
    published = checked = 0

    def hear() -> None:
        nonlocal checked
        for session, seq in ears.heard[checked:]:
            assert seq == wanted[session]
            wanted[session] += 1
        checked = len(ears.heard)

    for _ in range(300):
        reader = chance.choice(readers)
        match chance.choice(["publish", "publish", "turn", "turn", "turn", "since", "leave", "congested", "refuses"]):
            case "publish":
                publish(world, publisher, 1)
                published += 1
            case "turn":
                ears.turn()
                hear()
            case "since":
                number = chance.randint(0, published)
                since(world, reader, number)
                wanted[reader] = number + 1
            case "leave":
                result(world, reader, "broker.unsubscribe", endpoint="e", topic="t")
                wanted.pop(reader, None)
            case "congested":
                world.congested(reader, not reader.congested)
            case "refuses":
                accepting[reader] = not accepting.get(reader, True)
    accepting.clear()
    for reader in readers:
        world.congested(reader, False)
    ears.all()
    hear()
    assert wanted == dict.fromkeys(wanted, published + 1)
