"""The broker's own methods: what they do, who may, and what wrong parameters are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker._version import VERSION
from broker.core import errors, own_methods
from broker.core.access import Grant, Role
from broker.core.errors import Kind
from broker.core.events import CloseLink
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body
from broker.core.sessions import Session
from tests.core.harness import World

ADMIN = (Grant(Role.ADMIN),)


def result(world: World, session: Session, method: str, **params: Any) -> Any:
    end = world.command(session, method, **params)
    assert end.outcome.kind is errors.OK, end.outcome.detail
    assert end.body is not None
    return json.loads(bytes(end.body.raw))


# ---------------------------------------------------------------- wrong parameters


@pytest.mark.parametrize(
    ("method", "raw", "named"),
    [
        ("broker.serve", b'{"endpoint":5}', " endpoint: "),
        ("broker.serve", b'{"endpoint":"a b"}', " endpoint: "),
        ("broker.serve", b'{"endpoint":"e\\n"}', " endpoint: "),
        ("broker.serve", b'{"endpoint":"e","methods":["ok","no/slash"]}', " methods[1]: "),
        ("broker.serve", b'{"endpoint":"e","capacity":0}', " capacity: "),
        ("broker.serve", b'{"endpoint":"e","capacity":1.5}', " capacity: "),
        ("broker.serve", b'{"endpoint":"e","capacity":1000001}', " capacity: "),
        ("broker.serve", b'{"endpoint":"e","deadline":0}', " deadline: "),
        ("broker.serve", b'{"endpoint":"e","idle":-1}', " idle: "),
        ("broker.serve", b'{"endpoint":"e","deadline":1e300}', " deadline: "),
        ("broker.serve", b'{"endpoint":"e","capactiy":1}', "unknown member 'capactiy'; did you mean capacity?"),
        ("broker.serve", b"{}", "endpoint"),
        ("broker.unserve", b"{}", "endpoint"),
        ("broker.subscribe", b"[]", "params: expected an object, got a list"),
        ("broker.subscribe", b'{"endpoint":"e","topic":""}', " topic: "),
        ("broker.subscribe", b'{"endpoint":"e","since":-1}', "since"),
        ("broker.subscribe", b'{"endpoint":"e","since":1.5}', "since"),
        ("broker.publish", b'{"topic":"t"}', "endpoint"),
        ("broker.publish", b'{"endpoint":"e","too":1}', "too"),
        ("broker.call", b'{"endpoint":"e"}', "method"),
        ("broker.call", b'{"method":"m"}', "endpoint"),
        ("broker.call", b'{"endpoint":"e","method":"broker.ping"}', "broker."),
        ("broker.call", b'{"endpoint":"e","method":"m","timeout":0}', "timeout"),
        ("broker.call", b'{"endpoint":"e","method":"m","timeout":-1}', "timeout"),
        ("broker.call", b'{"endpoint":"e","method":"m","timeout":"1"}', " timeout: "),
        ("broker.call", b'{"endpoint":"e","method":"m","retries":1}', "retries"),
        ("broker.call", b'{"endpoint":"e","method":"m","idempotent":true,"retries":11}', "retries"),
        ("broker.call", b'{"endpoint":"e","method":"m","timeuot":1}', "timeuot"),
        ("broker.describe", b"{}", "endpoint"),
        ("broker.endpoints", b'{"x":1}', "x"),
        ("broker.admin.cancel", b"{}", "request"),
        ("broker.admin.cancel", b'{"request":"1"}', " request: "),
        ("broker.admin.close", b'{"peer":1}', " peer: "),
        ("broker.admin.pending", b"{", "truncated"),
        ("broker.serve", b"[" * 100_000, ""),
        ("broker.serve", b'{"endpoint":"\xff"}', ""),
        ("broker.serve", b'{"endpoint":"\\ud800"}', ""),
    ],
)
def test_wrong_params_are_invalid_and_named(method: str, raw: bytes, named: str) -> None:
    world = World()
    peer = world.attach(grants=(Grant(Role.ADMIN),))
    world.worker("e")
    world.ask(peer, 1, method, raw)
    outcome = world.outcome(peer)
    assert outcome.kind is errors.INVALID_PARAMS
    assert named in outcome.detail and method in outcome.detail


@pytest.mark.parametrize("name", ["broker.nonsense", "broker.", "broker.Ping", "broker.admin.nonsense"])
def test_an_unknown_method_of_the_broker_names_the_known_ones(name: str) -> None:
    world = World()
    peer = world.attach(grants=ADMIN)
    outcome = world.command(peer, name).outcome
    assert outcome.kind is errors.NO_METHOD and "broker.serve" in outcome.detail


def test_too_many_methods_at_once() -> None:
    world = World(Limits(methods_declared_max=2))
    peer = world.attach()
    world.serve(peer, "e", methods=["a", "b"])
    outcome = world.command(peer, "broker.serve", endpoint="f", methods=["a", "b", "c"]).outcome
    assert outcome.kind is errors.INVALID_PARAMS and "methods" in outcome.detail


# ---------------------------------------------------------------- broker.call


def test_call_is_a_request_like_any_other() -> None:
    world = World()
    caller, worker = world.caller(), world.worker("data")
    world.ask(caller, 7, "broker.call", b'{"endpoint":"data","method":"read","params":[1, 2],"timeout":5}')
    call = world.one_call(worker)
    assert (call.endpoint, call.method, bytes(call.body.raw), call.left_s) == ("data", "read", b"[1, 2]", 5.0)
    world.answer(worker, call.attempt)
    assert world.one_end(caller).wire_id == 7


def test_call_goes_to_the_endpoint_the_link_is_attached_to() -> None:
    world = World()
    caller, worker = world.attach(Role.CALLER, "e"), world.worker("e")
    world.ask(caller, 1, "broker.call", b'{"method":"m"}')
    assert bytes(world.one_call(worker).body.raw) == b""


def test_call_takes_options_over_the_links_defaults() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, 1, "broker.call", b'{"endpoint":"e","method":"m"}', timeout=7.0, meta=False)
    assert world.one_call(worker).left_s == 7.0
    world.ask(caller, 2, "broker.call", b'{"endpoint":"e","method":"m","idempotent":true}', timeout=7.0, meta=True)
    options = world.one_call(worker).attempt.request.options
    assert (options.timeout, options.idempotent, options.retries, options.meta) == (7.0, True, 1, True)


def test_call_as_a_notification() -> None:
    world = World()
    caller, worker = world.caller(), world.worker()
    world.ask(caller, None, "broker.call", b'{"endpoint":"e","method":"m"}')
    assert world.notified(worker) == ["m"] and not world.messages(caller)


# ---------------------------------------------------------------- broker.serve


def test_row_10_a_caller_that_registers_as_worker_is_denied() -> None:
    world = World()
    caller = world.caller(grants=(Grant(Role.CALLER),))
    outcome = world.command(caller, "broker.serve", endpoint="e").outcome
    assert outcome.kind is errors.DENIED and not caller.registrations


def test_row_10_a_worker_beyond_its_grant_is_denied() -> None:
    world = World()
    worker = world.attach(grants=(Grant(Role.WORKER, ("data.*",)), Grant(Role.CALLER)))
    world.serve(worker, "data.1")
    for name in ("data", "other", "xdata.1", "DATA.1"):
        assert world.command(worker, "broker.serve", endpoint=name).outcome.kind is errors.DENIED, name
    assert [endpoint.name for endpoint in worker.registrations] == ["data.1"]


def test_serve_at_several_endpoints() -> None:
    world = World()
    caller, worker = world.caller(), world.attach()
    for name in ("a", "b"):
        assert result(world, worker, "broker.serve", endpoint=name) == {"endpoint": name, "peer": f"n-{worker.id}"}
    world.ask(caller, 1, "a/x")
    world.ask(caller, 2, "b/y")
    assert [(call.endpoint, call.method) for call in world.calls(worker)] == [("a", "x"), ("b", "y")]


def test_capacity_defaults_to_the_sessions_then_the_brokers() -> None:
    world = World(Limits(capacity=7))
    bare, own, said = world.attach(), world.attach(capacity=3), world.attach(capacity=3)
    for session, params in ((bare, {}), (own, {}), (said, {"capacity": 5})):
        world.serve(session, "e", **params)
    assert [r.capacity for r in world.router.registry.by_name["e"].registrations.values()] == [7, 3, 5]


def test_unserve_of_what_is_not_served() -> None:
    world = World()
    peer = world.attach()
    assert result(world, peer, "broker.unserve", endpoint="e") == {"endpoint": "e", "served": False}


# ---------------------------------------------------------------- listings


def test_endpoints_lists_what_one_may_see() -> None:
    world = World(endpoints={"conf": EndpointLimits(policy="newest", closed="for good")})
    caller, worker = world.caller(), world.worker("a", capacity=1)
    world.attach(Role.LISTENER, "a", listen=True)
    world.worker("b")
    world.ask(caller, 1, "a/m")
    world.ask(caller, 2, "a/m")
    rows = {row.pop("endpoint"): row for row in result(world, caller, "broker.endpoints")}
    assert rows["a"] == {
        "workers": 1, "free": 0, "queued": 1, "executing": 1, "listeners": 1, "policy": "least_pending", "closed": "",
    }  # fmt: skip
    assert rows["conf"]["closed"] == "for good" and rows["conf"]["policy"] == "newest"
    narrow = world.caller(grants=(Grant(Role.LISTENER, ("b",)),))
    assert [row["endpoint"] for row in result(world, narrow, "broker.endpoints")] == ["b"]
    assert worker.attempts


def test_describe_shows_the_workers() -> None:
    world = World()
    caller, worker = world.caller(), world.attach()
    world.serve(worker, "e", methods=["list", "read"], capacity=4, info={"doc": "reads"})
    world.worker("e")
    world.ask(caller, 1, "e/read")
    world.take()
    found = result(world, caller, "broker.describe", endpoint="e")
    assert found["workers"] == [
        {
            "peer": f"n-{worker.id}",
            "methods": ["list", "read"],
            "capacity": 4,
            "executing": 1,
            "info": {"doc": "reads"},
        },
        {"peer": f"n-{worker.id + 1}", "methods": None, "capacity": 1024, "executing": 0, "info": None},
    ]


def test_describe_of_nothing_and_of_what_one_may_not_see() -> None:
    world = World()
    caller = world.caller(grants=(Grant(Role.CALLER, ("a",)),))
    world.worker("b")
    assert world.command(caller, "broker.describe", endpoint="a").outcome.kind is errors.NO_ENDPOINT
    for name in ("b", "c"):
        assert world.command(caller, "broker.describe", endpoint=name).outcome.kind is errors.DENIED


def test_ping() -> None:
    world = World(started_at=990.0)
    peer = world.attach(grants=())
    told = {"node": "n", "peer": "n-1", "uptime_s": 10.0, "version": VERSION}
    assert result(world, peer, "broker.ping") == told


# ---------------------------------------------------------------- administration


@pytest.mark.parametrize("method", ["peers", "pending", "cancel", "close", "nonsense"])
@pytest.mark.parametrize("roles", [Role.CALLER, Role.WORKER, Role.LISTENER, Role.CALLER | Role.WORKER])
def test_row_29_administration_needs_its_own_scope(method: str, roles: Role) -> None:
    world = World()
    peer = world.attach(grants=(Grant(roles),))
    outcome = world.command(peer, f"broker.admin.{method}").outcome
    assert outcome.kind is errors.DENIED


def test_admin_lists_peers_and_pending() -> None:
    world = World()
    admin, caller, worker = world.attach(grants=ADMIN), world.caller(principal="alice"), world.worker(capacity=1)
    world.ask(caller, 1, "e/m", timeout=10.0)
    world.ask(caller, 2, "e/n", timeout=20.0)
    world.now += 1
    peers = {row["peer"]: row for row in result(world, admin, "broker.admin.peers")}
    assert (peers["n-2"]["principal"], peers["n-2"]["requests"], peers["n-2"]["executing"]) == ("alice", 2, 0)
    assert (peers["n-3"]["role"], peers["n-3"]["serves"], peers["n-3"]["executing"]) == ("worker", ["e"], 1)
    assert peers["n-3"]["connected_s"] == 1.0
    first, second = result(world, admin, "broker.admin.pending")
    assert first == {
        "request": 1, "peer": "n-2", "principal": "alice", "endpoint": "e", "method": "m", "state": "executing",
        "place": None, "worker": f"n-{worker.id}", "attempts": 1, "age_s": 1.0, "left_s": 9.0, "idle_left_s": None,
        "up": None, "down": None, "priority": 0, "key": None, "group": None, "leader": None, "joined": 0, "trace": None,
    }  # fmt: skip
    assert (second["state"], second["worker"], second["left_s"]) == ("queued", None, 19.0)


def test_admin_lists_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_methods.LIST_MAX == 10_000
    monkeypatch.setattr(own_methods, "LIST_MAX", 3)
    world = World()
    admin, callers = world.attach(grants=ADMIN), [world.caller() for _ in range(5)]
    for caller in callers:
        world.ask(caller, "x", wait=True)
    assert [row["peer"] for row in result(world, admin, "broker.admin.peers")] == ["n-1", "n-2", "n-3"]
    assert [row["request"] for row in result(world, admin, "broker.admin.pending")] == [1, 2, 3]


def test_admin_cancel_of_nothing() -> None:
    world = World()
    admin = world.attach(grants=ADMIN)
    assert result(world, admin, "broker.admin.cancel", request=99) == {"request": 99, "cancelled": False}


def test_admin_closes_a_link_and_says_why() -> None:
    world = World()
    admin, victim = world.attach(grants=ADMIN), world.caller()
    world.ask(admin, 1, "broker.admin.close", b'{"peer":"n-2","reason":"too loud"}')
    assert CloseLink(victim, errors.FORBIDDEN, "too loud") in world.take()
    assert result(world, admin, "broker.admin.close", peer="n-9") == {"peer": "n-9", "closed": False}


def test_an_administrator_may_do_all_the_rest_too() -> None:
    world = World()
    admin = world.attach(grants=ADMIN)
    world.serve(admin, "e")
    world.ask(admin, 1, "e/m")
    assert world.calls(admin)


# ---------------------------------------------------------------- closed endpoints, draining


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("broker.serve", errors.DENIED),
        ("broker.subscribe", errors.DENIED),
        ("broker.publish", errors.DENIED),
        ("broker.describe", errors.OK),
    ],
)
def test_a_closed_endpoint_says_why(method: str, kind: Kind) -> None:
    world = World(endpoints={"e": EndpointLimits(closed="moved")})
    end = world.command(world.attach(), method, endpoint="e")
    assert end.outcome.kind is kind
    assert "moved" in end.outcome.detail or b"moved" in (end.body or Body(b"")).raw


def test_the_brokers_own_methods_work_while_draining() -> None:
    world = World()
    peer = world.attach()
    world.drain()
    assert result(world, peer, "broker.ping")["node"] == "n"
    world.ask(peer, 1, "broker.call", b'{"endpoint":"e","method":"m"}')
    assert world.outcome(peer).kind is errors.SHUTTING_DOWN


def test_info_has_a_bound() -> None:
    world = World()
    outcome = world.command(world.attach(), "broker.serve", endpoint="lab", info="x" * 65_600).outcome
    assert outcome.kind is errors.INVALID_PARAMS
    assert outcome.detail == "broker.serve: info of 65602 bytes is above the bound of 65536"


def test_describe_shows_info_up_to_a_bound() -> None:
    world = World()
    for _ in range(20):
        world.serve(world.attach(), "lab", info="x" * 60_000)
    body = world.command(world.attach(), "broker.describe", endpoint="lab").body
    assert body is not None
    workers = json.loads(bytes(body.raw))["workers"]
    assert len(workers) == 20 and 0 < sum(worker["info"] is not None for worker in workers) < 20


@pytest.mark.parametrize("method", ["broker.unserve", "broker.unsubscribe", "broker.publish"])
def test_methods_after_which_nothing_hangs_on_an_endpoint_make_none_known(method: str) -> None:
    world = World()
    assert world.command(world.attach(), method, endpoint="never-heard-of").outcome.kind is errors.OK
    assert "never-heard-of" not in world.router.registry.by_name


def test_a_long_listing_is_made_once_in_a_while() -> None:
    world = World()
    caller, worker = world.attach(), world.attach()
    for number in range(200):
        world.serve(worker, f"lab{number}")
    first = world.command(caller, "broker.endpoints").body
    assert world.command(caller, "broker.endpoints").body is first
    world.sleep(0.021)
    assert world.command(caller, "broker.endpoints").body is not first
