"""Topics, broadcasts in slices, comings and goings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.events import StartFanout
from broker.core.limits import Limits
from broker.core.messages import Body, Broadcast
from broker.core.sessions import Session
from tests.core.harness import EVERYTHING, World


def listener(world: World, endpoint: str = "e", **more: Any) -> Session:
    """One who listens, and may publish."""
    return world.attach(Role.CALLER, endpoint, listen=True, **more)


def result(world: World, session: Session, method: str, **params: Any) -> Any:
    end = world.command(session, method, **params)
    assert end.outcome.kind is errors.OK, end.outcome.detail
    assert end.body is not None
    return json.loads(bytes(end.body.raw))


# ---------------------------------------------------------------- to an endpoint, a topic


def test_a_broadcast_reaches_every_listener_and_the_publisher_itself() -> None:
    world = World()
    one, two = listener(world), listener(world)
    deaf = world.attach(Role.CALLER, "e", listen=False)
    elsewhere = listener(world, "f")
    publisher = world.attach(Role.CALLER, "e", listen=True)
    world.take()
    assert result(world, publisher, "broker.publish", data={"a": 1}) == {"seq": None, "listeners": 4}
    world.broadcasts()
    assert result(world, publisher, "broker.publish", endpoint="e", data={"a": 1}) == {"seq": 1, "listeners": 3}
    message = Broadcast("e", None, 1, Body(b'{"a": 1}'))
    assert world.broadcasts() == [(one, message), (two, message), (publisher, message)]
    assert deaf not in [one, two] and elsewhere.link is not None


def test_data_and_attachments_pass_untouched() -> None:
    world = World()
    one = listener(world)
    world.ask(one, 1, "broker.publish", b'{"endpoint":"e","data": [ 1.0,"\xc3\xa9" ] }')
    ((_, message),) = world.broadcasts()
    assert bytes(message.body.raw) == b'[ 1.0,"\xc3\xa9" ]'


def test_a_topic_reaches_its_subscribers_only() -> None:
    world = World()
    one, two = listener(world), listener(world)
    told = result(world, two, "broker.subscribe", endpoint="e", topic="t")
    assert told == {"endpoint": "e", "topic": "t", "seq": 0, "first": 1, "epoch": "n.1"}
    world.ask(one, 1, "broker.publish", b'{"endpoint":"e","topic":"t","data":5}')
    assert world.broadcasts() == [(two, Broadcast("e", "t", 1, Body(b"5")))]
    assert result(world, two, "broker.unsubscribe", endpoint="e", topic="t")["subscribed"] is True
    assert result(world, two, "broker.unsubscribe", endpoint="e", topic="t")["subscribed"] is False
    assert result(world, one, "broker.publish", endpoint="e", topic="t", data=6)["listeners"] == 0
    assert world.broadcasts() == []


def test_a_topic_nobody_ever_heard_takes_no_memory() -> None:
    world = World()
    one = listener(world)
    for number in range(50):
        assert result(world, one, "broker.publish", endpoint="e", topic=f"t{number}") == {"seq": None, "listeners": 0}
    assert len(world.router.registry.by_name["e"].topics) == 1


def test_seq_counts_per_endpoint_and_topic_without_gaps() -> None:
    world = World()
    one = world.attach()
    for endpoint in ("e", "f"):
        result(world, one, "broker.subscribe", endpoint=endpoint)
        result(world, one, "broker.subscribe", endpoint=endpoint, topic="t")
    for _ in range(3):
        for params in ({"endpoint": "e"}, {"endpoint": "e", "topic": "t"}, {"endpoint": "f"}):
            result(world, one, "broker.publish", data=1, **params)
    got = world.broadcasts()
    for endpoint, topic in (("e", None), ("e", "t"), ("f", None)):
        assert [m.seq for _, m in got if (m.endpoint, m.topic) == (endpoint, topic)] == [1, 2, 3]


def test_seq_goes_on_while_nobody_listens() -> None:
    world = World()
    one, publisher = listener(world), world.attach()
    for _ in range(2):
        result(world, publisher, "broker.publish", endpoint="e")
    world.detach(one)
    result(world, publisher, "broker.publish", endpoint="e")
    two = world.attach()
    assert result(world, two, "broker.subscribe", endpoint="e")["seq"] == 3
    result(world, publisher, "broker.publish", endpoint="e")
    assert [(to, m.seq) for to, m in world.broadcasts() if to is two] == [(two, 4)]


def test_subscribing_twice_is_once() -> None:
    world = World()
    one = listener(world)
    result(world, one, "broker.subscribe", endpoint="e")
    result(world, one, "broker.publish", endpoint="e")
    assert len(world.broadcasts()) == 1
    assert world.router.registry.by_name["e"].listeners == 1


# ---------------------------------------------------------------- to one, to all


def test_to_one_peer_carries_no_seq() -> None:
    world = World()
    one, two = listener(world), listener(world)
    result(world, one, "broker.publish", to=f"n-{two.id}", data=1, endpoint="e", topic="t")
    assert world.broadcasts() == [(two, Broadcast("e", "t", None, Body(b"1")))]


@pytest.mark.parametrize("peer", ["n-99", "m-1", "n-", "n", "n--1", "n-1x", "n-²", "n-" + "9" * 30, ""])
def test_to_a_peer_that_is_none_is_invalid(peer: str) -> None:
    world = World()
    one = listener(world)
    outcome = world.command(one, "broker.publish", to=peer).outcome
    assert outcome.kind is errors.INVALID_PARAMS and repr(peer) in outcome.detail


def test_a_peer_out_of_reach_looks_like_none() -> None:
    world = World()
    mine = world.caller(grants=(Grant(Role.CALLER, ("a*",)),))
    near, far = listener(world, "a1"), listener(world, "b1")
    assert result(world, mine, "broker.publish", to=f"n-{near.id}") == {"seq": None, "listeners": 1}
    out_of_reach = world.command(mine, "broker.publish", to=f"n-{far.id}").outcome
    missing = world.command(mine, "broker.publish", to="n-99").outcome
    assert out_of_reach.kind is missing.kind is errors.INVALID_PARAMS
    assert out_of_reach.detail.replace(f"n-{far.id}", "X") == missing.detail.replace("n-99", "X")


def test_to_all_goes_once_to_every_session_the_grants_cover() -> None:
    world = World()
    publisher = world.attach(Role.CALLER, "a1", grants=(Grant(Role.CALLER, ("a*",)),), listen=True)
    near, far, deaf = listener(world, "a2"), listener(world, "b2"), world.attach(Role.CALLER, "a3", listen=False)
    worker = world.worker("a4")
    both = listener(world, "a5")
    result(world, both, "broker.subscribe", endpoint="a6")
    result(world, publisher, "broker.publish", data=1)
    got = world.broadcasts()
    assert [to for to, _ in got] == [publisher, near, both]
    assert {m for _, m in got} == {Broadcast(None, None, None, Body(b"1"))}
    assert far.listen and not deaf.listen and not worker.listen


def test_to_all_of_one_who_may_only_listen_is_denied() -> None:
    world = World()
    one = listener(world, grants=(Grant(Role.LISTENER),))
    assert world.command(one, "broker.publish", data=1).outcome.kind is errors.DENIED
    assert world.command(one, "broker.publish", endpoint="e", data=1).outcome.kind is errors.DENIED
    assert world.broadcasts() == []


@pytest.mark.parametrize("grants", [EVERYTHING, (Grant(Role.ADMIN),), (Grant(Role.LISTENER),)])
@pytest.mark.parametrize("endpoint", [None, "e"])
def test_who_attached_as_listener_hears_only(grants: tuple[Grant, ...], endpoint: str | None) -> None:
    world = World()
    publisher, worker = world.attach(), world.worker("e")
    one = world.attach(Role.LISTENER, endpoint, grants=grants, listen=True)
    me = f"n-{one.id}"
    for method, params in (
        ("serve", {"endpoint": "e"}), ("publish", {"endpoint": "e"}), ("publish", {"endpoint": "e", "topic": "t"}),
        ("publish", {"to": me}), ("publish", {}), ("admin.peers", {}), ("admin.close", {"peer": me}),
    ):  # fmt: skip
        outcome = world.command(one, f"broker.{method}", **params).outcome
        assert outcome.kind is errors.DENIED and "role=listener" in outcome.detail, (method, params)
    world.ask(one, 1, "broker.call", b'{"endpoint":"e","method":"m"}')
    world.ask(one, 2)
    world.ask(one, None)
    assert [end.outcome.kind for end in world.ends(one)] == [errors.DENIED] * 2
    assert not world.calls(worker) and not world.notified(worker) and not world.broadcasts()
    assert result(world, one, "broker.subscribe", endpoint="e")["seq"] == 0
    assert result(world, one, "broker.describe", endpoint="e")["workers"]
    result(world, publisher, "broker.publish", endpoint="e", data=1)
    result(world, publisher, "broker.publish", to=me, data=2)
    assert [(to, bytes(m.body.raw)) for to, m in world.broadcasts()] == [(one, b"1"), (one, b"2")]


def test_who_attached_as_listener_hears_no_more_than_the_grants_allow() -> None:
    world = World()
    one = world.attach(Role.LISTENER, grants=(Grant(Role.CALLER, ("a*",)), Grant(Role.NONE)), listen=True)
    assert result(world, one, "broker.subscribe", endpoint="a1")["seq"] == 0
    assert world.command(one, "broker.subscribe", endpoint="b1").outcome.kind is errors.DENIED


@pytest.mark.parametrize("topic", ["broker.peers", "broker.x"])
def test_the_brokers_own_topics_are_not_for_publishing(topic: str) -> None:
    world = World()
    outcome = world.command(world.attach(), "broker.publish", endpoint="e", topic=topic).outcome
    assert outcome.kind is errors.INVALID_PARAMS and topic in outcome.detail


# ---------------------------------------------------------------- slices


def test_broadcasts_go_in_slices_one_after_the_other() -> None:
    world = World()
    publisher = world.attach()
    listeners = [listener(world) for _ in range(10)]
    world.take()
    for number in range(3):
        world.ask(publisher, number, "broker.publish", b'{"endpoint":"e","data":%d}' % number)
    assert sum(isinstance(effect, StartFanout) for effect in world.take()) == 3
    got: list[tuple[Session, int | None]] = []
    sizes = []
    frames = []
    while (part := world.router.fanouts.slice(4)) is not None:
        message, some, shared = part
        sizes.append(len(some))
        got += [(to, message.seq) for to in some]
        if shared not in frames:
            shared["built"] = b"%d" % (message.seq or 0)
            frames.append(shared)
        assert shared["built"] == b"%d" % (message.seq or 0), "what was built is shared by the slices of one broadcast"
    assert sizes == [4, 4, 2] * 3
    assert got == [(to, seq) for seq in (1, 2, 3) for to in listeners]
    assert len(world.router.fanouts) == 0


def test_who_comes_or_goes_during_a_broadcast() -> None:
    world = World()
    publisher = world.attach()
    one, two = listener(world), listener(world)
    world.ask(publisher, 1, "broker.publish", b'{"endpoint":"e"}')
    world.detach(two)
    three = listener(world)
    assert [to for to, _ in world.broadcasts()] == [one]
    world.ask(publisher, 2, "broker.publish", b'{"endpoint":"e"}')
    assert [to for to, _ in world.broadcasts()] == [one, three]


# ---------------------------------------------------------------- comings and goings


def heard(world: World, who: Session) -> list[tuple[str, str, str, int]]:
    views = [json.loads(bytes(m.body.raw)) for to, m in world.broadcasts() if to is who and m.topic == "broker.peers"]
    return [(view["event"], view["peer"], view["role"], view["workers"]) for view in views]


def test_comings_and_goings_are_published() -> None:
    world = World()
    watcher = world.attach()
    result(world, watcher, "broker.subscribe", endpoint="e", topic="broker.peers")
    worker = world.worker("e")
    caller = world.attach(Role.CALLER, "e", listen=True)
    quiet = world.attach(Role.CALLER, "e", listen=False)
    world.worker("other")
    second = world.attach()
    world.serve(second, "e")
    result(world, second, "broker.unserve", endpoint="e")
    world.detach(caller)
    world.detach(quiet)
    world.detach(worker)
    assert heard(world, watcher) == [
        ("serving", f"n-{worker.id}", "worker", 1),
        ("attached", f"n-{caller.id}", "caller", 1),
        ("attached", f"n-{quiet.id}", "caller", 1),
        ("serving", f"n-{second.id}", "worker", 2),
        ("unserved", f"n-{second.id}", "worker", 1),
        ("detached", f"n-{caller.id}", "caller", 1),
        ("detached", f"n-{quiet.id}", "caller", 1),
        ("unserved", f"n-{worker.id}", "worker", 0),
    ]


def test_comings_and_goings_are_for_those_granted_the_endpoint() -> None:
    world = World()
    stranger = world.attach(grants=(Grant(Role.CALLER, ("f",)),))
    assert world.command(stranger, "broker.subscribe", endpoint="e", topic="broker.peers").outcome.kind is errors.DENIED


def test_comings_and_goings_mind_the_bound_on_broadcasts() -> None:
    world = World(Limits(fanouts_max=2))
    watcher = world.attach()
    result(world, watcher, "broker.subscribe", endpoint="e", topic="broker.peers")
    for _ in range(5):
        world.worker("e")
    assert len(world.router.fanouts) == 2 and world.router.counters.broadcasts_refused == 3
    assert [message.seq for _, message in world.broadcasts()] == [1, 2]
    world.worker("e")
    assert [message.seq for _, message in world.broadcasts()] == [6], "the gap tells that something was missed"
    assert world.router.counters.broadcasts == 3 and world.router.counters.broadcasts_refused == 3


# ---------------------------------------------------------------- bounds of topics


def test_a_topic_nobody_hears_gives_way_at_the_bound() -> None:
    world = World(Limits(topics_per_endpoint_max=3))
    one = world.attach()
    for number in range(20):
        result(world, one, "broker.subscribe", endpoint="e", topic=f"t{number}")
        result(world, one, "broker.unsubscribe", endpoint="e", topic=f"t{number}")
    assert len(world.router.registry.by_name["e"].topics) <= 3
