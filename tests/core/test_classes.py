"""Who has which class: told beforehand, or learned from answers, and for how long."""

from __future__ import annotations

import pytest

from broker.core import classes as core_classes
from broker.core import errors
from broker.core.classes import ClassesOf
from broker.core.dispatch import POLICIES, Informed
from broker.core.events import Answered, ClassAnswered, ErrorReply
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body
from broker.core.sessions import Session
from tests.core.harness import World

ASKING_ALL = [name for name in POLICIES if name != "newest"]
"""policies under which all workers are asked now and then, as long as nothing speaks against them"""


class Daemons(World):
    """A world whose workers' answers tell what they have."""

    asked = 0

    def take_one(self, caller: Session, method: str = "A.get", **options: object) -> tuple[Session, int]:
        """Ask once; who was given it, and under which number."""
        self.asked += 1
        self.ask(caller, f"q{self.asked}", f"e/{method}", **options)
        number = self.router.pending.attempts_made
        (worker,) = (each for each in self.router.sessions.by_id.values() if number in each.attempts)
        return worker, number

    def say(self, worker: Session, number: int, *, well: bool) -> None:
        error = None if well else ErrorReply(-32000)
        self.feed(ClassAnswered(worker, number, well))
        self.feed(Answered(worker, number, Body(b"1" if well else b'{"code":-32000,"message":"no"}'), error))
        self.take()
        self.router.check()

    def ask_one(self, caller: Session, has: dict[Session, str], method: str = "A.get", **options: object) -> Session:
        """Ask once and answer, as workers do that have these classes; who was asked."""
        worker, number = self.take_one(caller, method, **options)
        self.say(worker, number, well=method[0] in has[worker])
        return worker

    def ask_many(
        self, caller: Session, has: dict[Session, str], method: str = "A.get", count: int = 10
    ) -> list[Session]:
        return [self.ask_one(caller, has, method) for _ in range(count)]


def two(
    policy: str = "least_pending", **limits: float
) -> tuple[Daemons, Session, Session, Session, dict[Session, str]]:
    """A caller; a worker with class A and one with class B."""
    world = Daemons(limits=Limits(**limits), endpoints={"e": EndpointLimits(policy=policy)})
    caller, a, b = world.caller(), world.worker(), world.worker()
    return world, caller, a, b, {a: "A", b: "B"}


@pytest.mark.parametrize("policy", ASKING_ALL)
def test_after_one_error_requests_go_where_the_class_is(policy: str) -> None:
    world, caller, a, b, has = two(policy)
    for method, right, wrong in (("A.get", a, b), ("B.get", b, a)):
        asked = world.ask_many(caller, has, method, 12)
        assert asked.count(wrong) <= 1, "it is asked until it has failed once"
        assert right in asked
    assert world.router.counters.doubts <= 2
    assert world.router.counters.ended["worker_error"] == world.router.counters.doubts


def test_the_newest_is_passed_over_only_when_another_has_answered_well() -> None:
    world, caller, a, b, has = two("newest")
    assert world.ask_many(caller, has, count=3) == [b, b, b], "nobody is known to be better"
    held = world.take_one(caller)
    assert held[0] is b
    world.congested(b, True)
    assert world.ask_one(caller, has) is a
    world.congested(b, False)
    assert world.ask_many(caller, has, count=3) == [a, a, a]
    world.say(*held, well=False)


def test_it_is_over_after_a_while() -> None:
    world, caller, a, b, has = two("newest", pass_over_s=60)
    world.ask_one(caller, has)
    world.congested(b, True)
    world.ask_one(caller, has)
    world.congested(b, False)
    world.sleep(59)
    assert world.ask_one(caller, has) is a
    assert world.router.next_deadline() <= world.now + 1.1, "it stands in the deadlines"
    world.sleep(1.1)
    has[b] = "AB"
    assert world.ask_one(caller, has) is b, "it is tried again"
    assert world.ask_many(caller, has, count=3) == [b, b, b], "and has the class by now"
    assert world.router.counters.doubts == 1


def test_an_error_of_who_has_answered_well_is_held_against_nobody() -> None:
    world, caller, a, b, _ = two()
    for worker in (a, b):
        while world.router.registry.by_name["e"].registrations[worker].load == 0:
            world.take_one(caller)
    for worker in (a, b):
        for number in list(worker.attempts):
            world.say(worker, number, well=True)
    has = {a: "A", b: ""}
    assert set(world.ask_many(caller, has)) == {a, b}
    assert world.router.counters.doubts == 0


def test_never_is_a_request_refused_because_of_it() -> None:
    world, caller, a, b, has = two()
    world.ask_many(caller, has, count=4)
    assert world.ask_many(caller, has, count=4) == [a] * 4
    world.congested(a, True)
    assert world.ask_one(caller, has) is b, "nobody better is free"
    world.congested(a, False)
    assert world.ask_one(caller, has) is a
    world.detach(a)
    assert world.ask_one(caller, has) is b, "nobody better is there"


def test_where_nobody_has_answered_well_all_are_asked() -> None:
    world, caller, a, b, _ = two()
    has = {a: "", b: ""}
    assert set(world.ask_many(caller, has)) == {a, b}
    assert world.router.counters.doubts == 10


def test_of_several_that_have_it_the_policy_chooses() -> None:
    world, caller, a, b, has = two()
    c = world.worker()
    has[c] = "A"
    world.ask_many(caller, has, count=6)
    asked = world.ask_many(caller, has, count=10)
    assert (asked.count(a), asked.count(b), asked.count(c)) == (5, 0, 5)


def test_other_classes_are_no_matter() -> None:
    world, caller, a, b, has = two()
    world.ask_many(caller, has)
    asked = world.ask_many(caller, {a: "AC", b: "BC"}, "C.get")
    assert {a, b} == set(asked)


def test_notifications_go_the_same_way() -> None:
    world, caller, a, _, has = two()
    world.ask_many(caller, has)
    world.take()
    for _ in range(4):
        world.ask(caller, None, "e/A.get")
    effects = world.take()
    assert [effect.session for effect in effects] == [a] * 4


def test_who_comes_back_begins_anew_and_leaves_nothing() -> None:
    world, caller, a, b, has = two()
    world.ask_many(caller, has)
    for worker in (a, b):
        world.detach(worker)
    known = world.router.registry.by_name["e"].classes
    assert known is not None and not known.had and not known.doubts
    assert not len(world.router.sessions.expiry)
    c = world.worker()
    assert world.ask_one(caller, {c: ""}) is c


def test_it_can_be_turned_off() -> None:
    world, caller, a, b, has = two(pass_over_s=0)
    assert set(world.ask_many(caller, has)) == {a, b}
    assert world.router.counters.doubts == 0


def test_a_policy_that_changes_keeps_what_was_learned() -> None:
    world, caller, a, _, has = two()
    world.ask_many(caller, has)
    world.reconfigure(Limits(), {"e": EndpointLimits(policy="newest")})
    assert isinstance(world.router.registry.by_name["e"].free, Informed)
    assert world.ask_many(caller, has) == [a] * 10


def test_sticky_groups_are_bound_as_ever() -> None:
    world, caller, _, _, has = two("sticky")
    asked = [world.ask_one(caller, has, group="g") for _ in range(6)]
    assert len(set(asked)) == 1


def test_how_much_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_classes, "NAMES_MAX", 5)
    world, caller, a, b, _ = two()
    for number in range(20):
        world.ask_one(caller, {a: "", b: ""}, f"X{number}.get")
        world.ask_one(caller, {a: "Y", b: "Y"}, f"Y{number}.get")
    known = world.router.registry.by_name["e"].classes
    assert known is not None and (len(known.had), len(known.doubts)) == (5, 5)
    assert len(world.router.sessions.expiry) == 5, "what is forgotten has no deadline"
    world.router.check()


def test_an_answer_that_comes_too_late_teaches_nothing() -> None:
    world, caller, a, b, _ = two()
    worker, number = world.take_one(caller)
    world.feed(ClassAnswered(b if worker is a else a, number, True))
    world.cancel(caller, "q1")
    world.say(worker, number, well=True)
    assert world.router.registry.by_name["e"].classes is None


# ---------------------------------------------------------------- told beforehand


def test_what_is_known_beforehand_is_no_method() -> None:
    world = World()
    caller = world.caller()
    a = world.worker(methods=ClassesOf({"A.*"}))
    b = world.worker(methods=ClassesOf({"B.*", "C.*"}))
    for number, (method, worker) in enumerate((("A.x", a), ("B.x", b), ("C.y.z", b), ("A.y", a))):
        world.ask(caller, number, f"e/{method}")
        world.one_call(worker)
        world.take()
    for method in ("D.x", "A", "AB.x", "A-.x"):
        world.ask(caller, f"no {method}", f"e/{method}")
        if method == "A":
            assert world.one_call(a).method == "A", "it names the class, and the worker says what is wrong"
        else:
            assert world.outcome(caller).kind is errors.NO_METHOD
        world.take()
    end = world.command(caller, "broker.describe", endpoint="e")
    assert end.body is not None and b'"methods":["B.*","C.*"]' in bytes(end.body.raw)
    world.detach(a)
    world.take()
    world.ask(caller, "gone", "e/A.x")
    assert world.outcome(caller).kind is errors.NO_METHOD


def test_classes_are_no_methods_of_those_names() -> None:
    assert "A.x" in ClassesOf({"A.*"})
    assert "B.x" not in ClassesOf({"A.*"})
    assert 3 not in ClassesOf({"A.*"})
    assert ClassesOf({"A.*"}) != frozenset({"A"})
