"""`/metrics`: that the figures are there, are right, and come from one place."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from broker._version import VERSION
from broker.admin.metrics import Collector, Lag, Sources, may_see_metrics
from broker.auth.authenticate import AuthCounters
from broker.core.access import Grant, Principal, Role
from broker.core.counters import Counters
from broker.core.errors import KINDS
from broker.core.limits import Limits
from broker.core.router import Router
from broker.links.limits import LinkCounters
from broker.wire.pieces import join_reply
from tests.transports.websocket.harness import ADMIN, CALLER, config, run, serving


def test_every_family_is_well_formed_and_there_once() -> None:
    async def main() -> None:
        async with serving() as world:
            await world.worker()
            answer = await world.http("/metrics")
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            families = list(text_string_to_metric_families(answer.body.decode()))
            names = [family.name for family in families]
            assert len(set(names)) == len(names)
            assert all(name.startswith("broker_") for name in names)
            assert all(family.documentation for family in families)
            (ended,) = [family for family in families if family.name == "broker_requests_ended"]
            assert {s.labels["outcome"] for s in ended.samples} == {kind.name for kind in KINDS}
            (build,) = [family for family in families if family.name == "broker_build_info"]
            native = world.broker.links.native
            assert build.samples[0].labels == {"version": VERSION, "core": "compiled" if native else "python"}
            for wanted in ("requests_pending", "sessions", "endpoint_queued", "outbox_bytes", "loop_lag_seconds"):
                assert f"broker_{wanted}" in names

    run(main)


def test_the_figures_are_right() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab", "&capacity=1"), await world.caller()
            await caller.ask("m")
            call = await worker.taken()
            await caller.ask("m")
            await caller.sync()
            expected = {
                "broker_requests_accepted_total": 3, "broker_requests_pending": 2, "broker_sessions": 2,
                "broker_links": 2, "broker_attempts_total": 1,
            }  # fmt: skip
            for name, value in expected.items():
                assert await world.metric(name) == value, name
            for name in ("workers", "queued", "executing"):
                assert await world.metric(f"broker_endpoint_{name}", endpoint="lab") == 1
            await worker.answer(call, result=1)
            await worker.answer(await worker.taken(), result=1)
            await caller.reply(1)
            await caller.reply(2)
            assert await world.metric("broker_requests_ended_total", outcome="ok") == 3
            assert await world.metric("broker_request_seconds_count") == 2
            assert await world.metric("broker_request_seconds_bucket", le="+Inf") == 2
            assert await world.metric("broker_link_frames_in_total") >= 5

    run(main)


def test_loop_lag_is_sampled() -> None:
    lag = Lag()
    for late_s in (0.1, 0.5, 0.2):
        lag.add(late_s)
    assert (lag.last_s, lag.max_s) == (0.2, 0.5)


def test_a_loop_that_is_held_shows_in_the_metrics() -> None:
    async def main() -> None:
        import time

        async with serving() as world:
            for _ in range(3):
                await asyncio.sleep(0.2)
                time.sleep(0.6)
            assert await world.metric("broker_loop_lag_max_seconds") > 0.1

    run(main)


def test_metrics_are_for_who_may_see_every_endpoint() -> None:
    everywhere, somewhere = Grant(Role.LISTENER, ("*",)), Grant(Role.CALLER, ("lab*",))
    assert may_see_metrics(Principal("a", (Grant(Role.ADMIN, ("lab",)),)))
    assert may_see_metrics(Principal("a", (somewhere, everywhere)))
    assert not may_see_metrics(Principal("a", (somewhere,)))
    assert not may_see_metrics(Principal("a", ()))

    async def main() -> None:
        async with serving(config()) as world:
            for secret, status in ((None, 401), (CALLER, 403), (ADMIN, 200)):
                assert (await world.http("/metrics", secret)).code == status

    run(main)


def test_whatever_the_router_counts_is_exported() -> None:
    """A counter that nobody can see is forgotten: each is given a value of its own, which must be found."""

    class Links:
        links: tuple[()] = ()
        counters = LinkCounters()
        native = False

    router = Router(Limits(), join=join_reply)
    expected: dict[str, set[float]] = {}
    for number, name in enumerate(Counters.__slots__):
        base = 100_000 * (number + 1)
        before = getattr(router.counters, name)
        if isinstance(before, dict):
            setattr(router.counters, name, {key: base + at for at, key in enumerate(before)})
            expected[name] = {float(base + at) for at in range(len(before))}
        elif isinstance(before, list):
            setattr(router.counters, name, [base, *before[1:]])
            expected[name] = {float(base)}
        else:
            setattr(router.counters, name, base)
            expected[name] = {float(base)}
    sources = Sources(router, Links(), AuthCounters(), Lag(), lambda: None)  # type: ignore[arg-type]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(sources))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    values = {sample.value for family in families for sample in family.samples}
    missing = {name: there - values for name, there in expected.items() if there - values}
    assert not missing
