"""`broker.pending` and `broker.admin.pending`: where each live request is, how far, and whose it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.core import errors, own_methods
from broker.core.access import Grant, Role
from broker.core.events import CreditGranted, PartSent
from broker.core.limits import EndpointLimits
from broker.core.messages import Body
from broker.core.sessions import Session
from tests.core.harness import World

ADMIN = (Grant(Role.ADMIN),)
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACE = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


def listed(world: World, session: Session, method: str = "broker.admin.pending", **params: Any) -> list[dict[str, Any]]:
    end = world.command(session, method, **params)
    assert end.outcome.kind is errors.OK, end.outcome.detail
    assert end.body is not None
    rows: list[dict[str, Any]] = json.loads(bytes(end.body.raw))
    return rows


def test_those_that_wait_have_a_place() -> None:
    world = World()
    admin, caller = world.attach(grants=ADMIN), world.caller()
    for endpoint in ("e", "f"):
        for number in range(3):
            world.ask(caller, f"{endpoint}{number}", f"{endpoint}/m", wait=True)
    world.cancel(caller, "e0")
    rows = listed(world, admin)
    assert [(row["endpoint"], row["state"], row["place"]) for row in rows] == [
        ("e", "queued", 1), ("e", "queued", 2), ("f", "queued", 1), ("f", "queued", 2), ("f", "queued", 3),
    ]  # fmt: skip


def test_a_stream_says_how_far_it_is_in_each_direction() -> None:
    world = World(endpoints={"e": EndpointLimits(idle_s=5.0)})
    admin, caller, worker = world.attach(grants=ADMIN), world.caller(), world.worker()
    world.ask(caller, 1, timeout=60.0, stream_in=True, stream_out=True, priority=3, group="g", trace="mine")
    attempt = world.one_call(worker).attempt
    world.feed(PartSent(caller, 1, 0, 0, Body(b"12345", (b"67890",))))
    world.feed(PartSent(worker, None, attempt.id, 0, Body(b"1")))
    world.feed(PartSent(worker, None, attempt.id, 1, Body(b"2"), last=True))
    world.feed(CreditGranted(caller, 1, 0, 10))
    world.now += 2
    (row,) = listed(world, admin)
    assert (row["state"], row["worker"], row["place"]) == ("streaming", f"n-{worker.id}", None)
    assert row["up"] == {"parts": 1, "bytes": 10, "credit": 3, "ended": False}
    assert row["down"] == {"parts": 2, "bytes": 2, "credit": 8, "ended": True}
    assert (row["idle_left_s"], row["left_s"]) == (3.0, 58.0)
    assert (row["priority"], row["group"], row["trace"]) == (3, "g", "mine")


def test_who_has_joined_by_a_key_says_whom() -> None:
    world = World()
    admin, caller, worker = world.attach(grants=ADMIN), world.caller(), world.worker()
    world.ask(caller, 1, key="k")
    world.ask(caller, 2, key="k")
    first, second = listed(world, admin)
    assert (first["state"], first["leader"], first["joined"], first["key"]) == ("executing", None, 1, "k")
    assert (second["state"], second["leader"], second["joined"]) == ("joined", first["request"], 0)
    assert first["worker"] == second["worker"] == f"n-{worker.id}"


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({}, [1, 2, 3]),
        ({"endpoint": "f"}, [2]),
        ({"request": 3}, [3]),
        ({"request": 9}, []),
        ({"trace": TRACE}, [1]),
        ({"trace": TRACE_ID}, [1, 2]),
        ({"trace": TRACE_ID, "endpoint": "f"}, [2]),
        ({"trace": "run-12"}, [3]),
        ({"trace": "00"}, []),
        ({"trace": "00f067aa0ba902b7"}, []),
        ({"trace": ""}, []),
    ],
)
def test_they_are_found_by_endpoint_trace_and_number(params: dict[str, Any], found: list[int]) -> None:
    world = World()
    admin, caller = world.attach(grants=ADMIN), world.caller()
    world.ask(caller, 1, "e/m", wait=True, trace=TRACE)
    world.ask(caller, 2, "f/m", wait=True, trace=TRACE.replace("00f067aa0ba902b7", "b7ad6b7169203331"))
    world.ask(caller, 3, "g/m", wait=True, trace="run-12")
    assert [row["request"] for row in listed(world, admin, "broker.admin.pending", **params)] == found
    assert [row["request"] for row in listed(world, caller, "broker.pending", **params)] == found


@pytest.mark.parametrize("params", [{"trace": 1}, {"request": "1"}, {"endpoint": "a b"}, {"peer": "n-1"}])
@pytest.mark.parametrize("method", ["broker.pending", "broker.admin.pending"])
def test_wrong_filters_are_invalid(method: str, params: dict[str, Any]) -> None:
    world = World()
    admin = world.attach(grants=ADMIN)
    outcome = world.command(admin, method, **params).outcome
    assert outcome.kind is errors.INVALID_PARAMS and next(iter(params)) in outcome.detail


def test_row_29_who_is_no_administrator_sees_the_requests_of_his_own_principal_only() -> None:
    world = World()
    alice, again = world.caller(principal="alice"), world.caller(principal="alice")
    bob, admin = world.caller(principal="bob"), world.attach(grants=ADMIN, principal="root")
    world.ask(alice, 1, wait=True, trace=TRACE)
    world.ask(again, 1, wait=True)
    world.ask(bob, 1, wait=True, trace=TRACE)
    assert [row["request"] for row in listed(world, alice, "broker.pending")] == [1, 2]
    assert [row["request"] for row in listed(world, bob, "broker.pending")] == [3]
    assert [row["request"] for row in listed(world, bob, "broker.pending", trace=TRACE)] == [3]
    assert listed(world, bob, "broker.pending", request=1) == []
    assert listed(world, admin, "broker.pending") == []
    assert len(listed(world, admin)) == 3
    assert world.command(bob, "broker.admin.pending").outcome.kind is errors.DENIED


def test_the_list_of_ones_own_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_methods, "OWN_LIST_MAX", 3)
    world = World()
    caller = world.caller()
    for number in range(5):
        world.ask(caller, number, wait=True)
    assert [row["request"] for row in listed(world, caller, "broker.pending")] == [1, 2, 3]
