"""Asking, serving, hooks and broadcasts of a program that has a broker in it, in coroutines and in threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import pytest
from tornado.ioloop import IOLoop
from tornado.web import Application
from websockets.exceptions import ConnectionClosed

from broker import AsyncClient, Broker, Client, Grant, Principal, Role, Worker, errors
from broker.node.presence import Peer
from broker.worker import current
from tests.links.harness import LOOPS
from tests.node.hosting import descriptors, embedded, hosting, in_thread, in_threads, nothing_left
from tests.transports.websocket.harness import CALLER, config, run, until

loops = pytest.mark.parametrize("loop", LOOPS)


def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


def count(upto: int) -> Iterator[int]:
    for number in range(upto):
        current().progress(number, upto)
        yield number
    return "counted"


async def sleep() -> None:
    await asyncio.get_running_loop().create_future()


# ── the program asks ──


@loops
def test_local_functions_answer_coroutines_and_threads(loop: str) -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", {"add": add, "count": count})
        assert await broker.request("sum/add", {"a": 1, "b": 2}) == 3  # at once: nothing is to be waited for
        stream = broker.stream("sum/count", {"upto": 3})
        assert ([item async for item in stream], stream.result) == ([0, 1, 2], "counted")
        told: list[float] = []
        assert await broker.request("sum/count", [2], progress=lambda done, *_: told.append(done)) == [0, 1, "counted"]
        assert told[-1] == 1

        def ask() -> Any:
            with broker.stream_from_thread("sum/count", [3]) as items:
                return broker.request_from_thread("sum/add", [3, 4], timeout=20), list(items)

        assert await in_thread(ask) == (7, [0, 1, 2])
        with pytest.raises(errors.NoMethod):
            await broker.request("sum/nothing")
        with pytest.raises(errors.RemoteError, match="unsupported operand"):
            await in_thread(lambda: broker.request_from_thread("sum/add", [1, None]))
        await broker.stop()
        assert nothing_left(broker)

    run(main, loop)


def test_every_outcome_of_a_request_reaches_who_asked_in_process() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("slow", [sleep])
        with pytest.raises(errors.NoEndpoint):
            await broker.request("nobody/m")
        with pytest.raises(errors.DeadlineExceeded):
            await broker.request("slow/sleep", timeout=0.05)
        asking = asyncio.create_task(broker.request("slow/sleep"))
        await until(lambda: broker.router.pending.count == 1, "asked")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: broker.router.pending.count == 0, "taken back at the broker")
        with pytest.raises(errors.DeadlineExceeded):
            await in_thread(lambda: broker.request_from_thread("slow/sleep", timeout=0.05))
        with pytest.raises(errors.InvalidRequest):
            await in_thread(lambda: broker.request_from_thread("no endpoint"))
        await broker.stop()

    run(main)


@loops
def test_parts_go_both_ways_and_large_values_too(loop: str) -> None:
    def join() -> bytes:
        return b"".join(current().parts())

    def echo(data: bytes) -> bytes:
        return data

    async def main() -> None:
        broker = await embedded()
        broker.serve("data", [join, echo])
        assert await broker.request("data/join", parts=[b"a", b"b" * 300_000]) == b"a" + b"b" * 300_000
        large = bytes(20 << 20)  # larger than a message
        assert await broker.request("data/echo", {"data": large}) == large
        assert await in_thread(lambda: broker.request_from_thread("data/echo", {"data": large})) == large
        await broker.stop()

    run(main, loop)


@loops
def test_many_threads_at_once_wake_the_loop_once_a_burst(loop: str) -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", [add])
        await in_thread(lambda: broker.request_from_thread("sum/add", [0, 0]))
        runs: list[int] = []
        client = broker._threads
        perform = client._run_errands

        def counted() -> None:
            runs.append(len(client._errands))
            perform()

        client._run_errands = counted  # type: ignore[method-assign]
        together = threading.Barrier(33)

        def ask(number: int) -> float:
            together.wait()
            return broker.request_from_thread("sum/add", [number, 1])

        asking = asyncio.create_task(in_threads(32, ask))
        await asyncio.sleep(0)
        together.wait()  # the loop stands still
        for _ in range(1000):
            if len(client._errands) == 32:
                break
            time.sleep(0.01)
        assert await asking == [number + 1 for number in range(32)]
        assert runs[0] == 32
        assert len(runs) == 1
        await broker.stop()

    run(main, loop)


def test_futures_and_callbacks_from_any_thread() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", [add, sleep])
        loop_thread = threading.get_ident()
        told: list[tuple[Any, Any, bool]] = []

        def callback(value: Any, error: Any) -> None:
            told.append((value, type(error), threading.get_ident() == loop_thread))
            raise RuntimeError("what a callback raises is logged")

        here = broker.submit("sum/add", [1, 2])  # on the loop too: nobody waits there
        assert await asyncio.wrap_future(here) == 3
        there = await in_thread(lambda: [broker.submit("sum/add", [number, 0]) for number in range(5)])
        await in_thread(lambda: wait_for(there))
        assert [future.result() for future in there] == [0, 1, 2, 3, 4]
        broker.call_back("sum/add", [1, 2], callback)
        await in_thread(lambda: broker.call_back("sum/add", [1, None], callback))
        await until(lambda: len(told) == 2, "both were called")
        assert sorted(told, key=str) == [(3, type(None), True), (None, errors.RemoteError, True)]
        slow = broker.call_back("sum/sleep", None, callback)
        await until(lambda: len(broker.pending()) == 1, "asked")
        await in_thread(slow.cancel)
        await until(lambda: len(told) == 3, "told of the cancelling")
        assert told[2] == (None, errors.Cancelled, True)
        await until(lambda: broker.pending() == [], "taken back")
        assert slow.cancelled()
        with pytest.raises(CancelledError):
            slow.result()
        await broker.stop()

    logging.getLogger("broker").disabled = True
    try:
        run(main)
    finally:
        logging.getLogger("broker").disabled = False


def test_leaving_a_stream_in_a_thread_cancels_it() -> None:
    async def main() -> None:
        broker = await embedded()
        ended = threading.Event()

        async def endless() -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                ended.set()

        broker.serve("e", [endless])

        def first() -> int:
            for item in broker.stream_from_thread("e/endless"):
                return item
            raise AssertionError

        assert await in_thread(first) == 1
        await until(ended.is_set, "the generator was closed")
        stream = broker.stream("e/endless")
        assert await anext(stream) == 1
        ended.clear()
        await stream.aclose()
        await until(ended.is_set, "this one too")
        await broker.stop()

    run(main)


def test_waiting_on_the_loop_is_refused_not_waited_for() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", [add])
        with pytest.raises(RuntimeError, match=r"use await broker\.request\(…\)"):
            broker.request_from_thread("sum/add", [1, 2])
        assert broker.router.pending.count == 0
        stream = broker.stream_from_thread("sum/add", [1, 2])
        with pytest.raises(RuntimeError, match="cannot wait"):
            next(iter(stream))
        stream.close()
        await broker.stop()

    run(main)


# ── endpoints and hooks ──


@loops
def test_an_endpoint_gets_calls_and_notifications_with_who_sent_them(loop: str) -> None:
    async def main() -> None:
        broker = await embedded()
        seen: list[tuple[Peer, str, Any]] = []

        def on_message(peer: Peer, method: str, params: Any) -> Any:
            seen.append((peer, method, params))
            return [peer.principal, method, params]

        broker.endpoint("lab", on_message)
        async with hosting(broker=broker) as host:
            carol = await host.peer("/broker/ws/lab", CALLER)
            assert (await carol.call("do", {"x": 1}))["result"] == ["carol", "do", {"x": 1}]
            await carol.send({"jsonrpc": "2.0", "method": "tell", "params": [1, 2]})
            await until(lambda: len(seen) == 2, "the notification came")
            assert [(peer.principal, peer.remote[:10]) for peer, _, _ in seen] == [("carol", "127.0.0.1:")] * 2
            assert seen[1][1:] == ("tell", [1, 2])
            assert [seen[0][0]] == broker.peers("lab")
            broker.broadcast("lab", "only you", only=seen[0][0])
            assert (await carol.told("broker.message"))["params"]["data"] == "only you"
            assert await broker.request("lab/any") == ["local", "any", None]

    run(main, loop)


@pytest.mark.parametrize("kind", ["coroutine", "generator", "asynchronous generator", "object"])
def test_on_message_may_be_of_any_kind(kind: str) -> None:
    async def coroutine(peer: Peer, method: str, params: Any) -> Any:
        await asyncio.sleep(0)
        return [peer.principal, *params]

    def generator(peer: Peer, method: str, params: Any) -> Any:
        yield peer.principal
        yield from params

    async def generating(peer: Peer, method: str, params: Any) -> Any:
        yield peer.principal
        for param in params:
            yield param

    class Object:
        async def __call__(self, peer: Peer, method: str, params: Any) -> Any:
            return [peer.principal, *params]

    async def main() -> None:
        broker = await embedded()
        kinds: dict[str, Any] = {
            "coroutine": coroutine,
            "generator": generator,
            "asynchronous generator": generating,
            "object": Object(),
        }
        broker.endpoint("lab", kinds[kind])
        assert await broker.request("lab/m", [1, 2]) == ["local", 1, 2]
        await broker.stop()

    run(main)


def test_hooks_fire_once_for_whoever_comes_and_goes() -> None:
    async def main() -> None:
        events: list[tuple[str, str]] = []

        async def on_connect(peer: Peer) -> None:
            await asyncio.sleep(0)
            events.append(("came", peer.principal))

        def on_disconnect(peer: Peer) -> None:
            events.append(("left", peer.principal))
            raise RuntimeError("what a hook raises is logged")

        broker = await embedded()
        broker.endpoint("lab", None, on_connect, on_disconnect)
        with pytest.raises(ValueError, match="hooks already"):
            broker.endpoint("lab", on_connect=on_connect)
        async with hosting(broker=broker) as host:
            carol = await host.peer("/broker/ws/lab", CALLER)
            await until(lambda: events == [("came", "carol")], "attached")
            admin = await host.peer("/broker/ws")
            await admin.call("broker.serve", {"endpoint": "elsewhere"})
            await admin.call("broker.serve", {"endpoint": "lab"})
            await until(lambda: events[1:] == [("came", "admin")], "serves")
            await admin.call("broker.subscribe", {"endpoint": "lab"})
            await admin.call("broker.unserve", {"endpoint": "lab"})
            await admin.sync()
            assert len(events) == 2, "it listens still"
            assert [peer.principal for peer in broker.peers("lab")] == ["carol", "admin"]
            await admin.call("broker.unsubscribe", {"endpoint": "lab"})
            await until(lambda: events[2:] == [("left", "admin")], "left")
            await carol.socket.close()
            await until(lambda: events[3:] == [("left", "carol")], "gone")
            await admin.socket.close()
            await until(lambda: len(broker.router.sessions) == 0, "all gone")
            broker.serve("lab", [add])
            assert await broker.request("lab/add", [1, 2]) == 3
            assert len(events) == 4, "the broker's own asking and serving is nobody's coming"

    logging.getLogger("broker").disabled = True
    try:
        run(main)
    finally:
        logging.getLogger("broker").disabled = False


def test_who_is_turned_away_never_came() -> None:
    async def main() -> None:
        events: list[str] = []
        broker = await embedded()
        broker.endpoint("lab", None, lambda peer: events.append("came"), lambda peer: events.append("left"))
        broker.reject("lab", "under repair")
        async with hosting(broker=broker) as host:
            refused = await host.peer("/broker/ws/lab")
            with contextlib.suppress(ConnectionClosed):
                await refused.send({"jsonrpc": "2.0", "id": 1, "method": "broker.ping"})
            assert await refused.closed() == (4404, "under repair")
            assert refused.inbox == [], "nothing it said was looked at"
            assert broker.peers("lab") == []
            await until(lambda: not broker.links.links, "gone")
            await asyncio.sleep(0)
        assert events == []

    run(main)


def test_an_endpoint_is_closed_and_opened_again_while_it_runs() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", [add])
        async with hosting(broker=broker) as host:
            there = await host.peer("/broker/ws/sum")
            await in_thread(lambda: broker.reject("sum", "later"))
            assert await there.closed() == (4404, "later")
            with pytest.raises(errors.Denied, match="sum is closed: later"):
                await broker.request("sum/add", [1, 2])
            broker.reload(broker.config)
            with pytest.raises(errors.Denied):
                await broker.request("sum/add", [1, 2])
            broker.reject("sum", None)
            assert await broker.request("sum/add", [1, 2]) == 3
            again = await host.peer("/broker/ws/sum")
            assert (await again.call("add", [2, 2]))["result"] == 4
            for reason in ("", "x" * 124):
                with pytest.raises(ValueError, match="1 to 123 bytes"):
                    broker.reject("sum", reason)
            with pytest.raises(ValueError, match="no name"):
                broker.reject("a/b", "x")

    run(main)


def test_what_cannot_be_served_is_refused_at_once() -> None:
    broker = Broker()
    for name, functions, text in (
        ("a/b", [add], "no name of an endpoint"),
        ("lab", [], "no functions"),
        ("lab", {}, "no functions"),
        ("lab", {"not a name": add}, "no name of a method"),
        ("lab", [add, add], "has a method add already"),
    ):
        with pytest.raises(ValueError, match=text):
            broker.serve(name, functions)
    with pytest.raises(TypeError, match="cannot be called"):
        broker.serve("lab", [3])
    with pytest.raises(ValueError, match="no name of an endpoint"):
        broker.endpoint("a/b", lambda *_: None)
    assert broker._served == []


def test_what_is_said_before_the_start_holds_from_the_start() -> None:
    async def main() -> None:
        broker = Broker(config())
        events: list[str] = []
        broker.serve("sum", add)
        broker.endpoint("lab", lambda peer, method, params: method, lambda peer: events.append("came"))
        broker.reject("shut", "for now")
        with pytest.raises(RuntimeError, match=r"await broker.start\(\)"):
            broker.routes("/broker")
        with pytest.raises(RuntimeError, match=r"await broker.start\(\)"):
            await broker.request("sum/add")
        await broker.start()
        assert await broker.request("sum/add", [1, 2]) == 3
        assert await broker.request("lab/any") == "any"
        with pytest.raises(errors.Denied):
            await broker.request("shut/any")
        async with AsyncClient(broker) as client, await client.subscribe("lab"):
            await until(lambda: events == ["came"], "a client of this process is a peer")
        await broker.stop()
        for call in (broker.pending, lambda: broker.peers("lab"), lambda: broker.broadcast("lab", 1)):
            with pytest.raises(RuntimeError, match="does not run"):
                call()

    run(main)


def test_a_set_of_functions_can_be_closed() -> None:
    async def main() -> None:
        broker = await embedded()
        events: list[str] = []
        first = broker.serve("sum", [add])
        hooks = broker.endpoint("sum", None, lambda peer: events.append("came"))
        assert await broker.request("sum/add", [1, 2]) == 3
        await first.close()
        with pytest.raises(errors.NoWorker):
            await broker.request("sum/add", [1, 2])
        await first.close()
        async with AsyncClient(broker) as client, await client.subscribe("sum"):
            await until(lambda: events == ["came"], "the hooks hold")
        await hooks.close()
        assert not broker.router.state.tells_places
        broker.serve("sum", [add])
        broker.endpoint("sum", None, lambda peer: events.append("again"))
        assert await broker.request("sum/add", [1, 2]) == 3
        await broker.stop()

    run(main)


# ── broadcasts and looking ──


def test_broadcasts_reach_all_but_the_dead_from_any_thread() -> None:
    async def main() -> None:
        broker = await embedded()
        async with hosting(broker=broker) as host:
            first, dead, last = [await host.peer("/broker/ws/plots") for _ in range(3)]
            dead.socket.transport.abort()
            broker.broadcast("plots", {"n": 1})
            await in_thread(lambda: broker.broadcast("plots", b"bytes"))
            broker.broadcast("plots", "topic", "other")
            broker.broadcast(None, "everybody")
            for peer in (first, last):
                heard = [await peer.told("broker.message") for _ in range(3)]
                told = [message["params"]["data"] for message in heard]
                assert told == [{"n": 1}, {"$base64": "Ynl0ZXM="}, "everybody"]
            broker.broadcast("plots", 1, only="nobody-1")  # who has gone is no error
            assert await first.silent()
            with pytest.raises(errors.TooLarge):
                broker.broadcast("plots", bytes(17 << 20))
            with pytest.raises(ValueError, match="is no JSON"):
                broker.broadcast("plots", object())

    run(main)


def test_live_requests_are_listed_and_cancelled_from_any_thread() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("slow", [sleep])
        asking = [asyncio.create_task(broker.request("slow/sleep")) for _ in range(3)]
        await until(lambda: len(broker.pending()) == 3, "asked")
        first, second, _ = await in_thread(broker.pending)
        assert (first.endpoint, first.method, first.principal, first.state) == ("slow", "sleep", "local", "executing")
        assert broker.cancel(first.request)
        assert await in_thread(lambda: broker.cancel(second.request))
        assert not broker.cancel(first.request)
        for task in asking[:2]:
            with pytest.raises(errors.Cancelled):
                await task
        await broker.stop()
        with pytest.raises(errors.ShuttingDown):
            await asking[2]

    run(main)


def test_all_connections_are_closed_and_the_broker_goes_on() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", [add])
        async with hosting(broker=broker) as host:
            peers = [await host.peer(f"/broker/ws/lab?grace={grace}") for grace in (0, 0, 5)]
            away = await host.peer("/broker/ws?grace=30")
            away.socket.transport.abort()
            await until(lambda: broker.router.sessions.suspended == 1, "one is away")
            async with AsyncClient(broker) as client:
                assert await client.call("sum/add", [1, 2]) == 3
                assert await broker.close_all("back in a minute") == 4
                for peer in peers:
                    assert await peer.closed() == (1001, "back in a minute")
                assert not broker.links.links
                assert broker.router.sessions.suspended == 0
                assert await client.call("sum/add", [1, 2]) == 3
                assert await broker.request("sum/add", [1, 2]) == 3
            again = await host.peer("/broker/ws/sum")
            assert (await again.call("add", [1, 1]))["result"] == 2
            with pytest.raises(ValueError, match="123 bytes"):
                await broker.close_all("x" * 124)

    run(main)


# ── the SDK in the broker's process ──


@loops
def test_the_sdk_takes_a_broker_in_place_of_a_url(loop: str) -> None:
    async def main() -> None:
        broker = await embedded()
        async with _worker(broker) as worker, AsyncClient(broker) as client:
            assert worker.peer
            assert client.url == "this process"
            assert await client.call("sum/add", [1, 2]) == 3
            async with await client.subscribe("sum") as messages:
                worker.publish("news")
                assert (await messages.get(20)).data == "news"

            def blocking() -> Any:
                before = threading.active_count()
                with Client(broker) as own:
                    assert threading.active_count() == before, "it needs no thread"
                    return own.call("sum/add", [3, 4]), list(own.map("sum/add", [[1, 1], [2, 2]])), own.ping()["node"]

            assert await in_thread(blocking) == (7, [2, 4], broker.node)
            assert [peer.principal for peer in broker.peers("sum")] == ["local"]
        await until(lambda: len(broker.router.sessions) == 0, "all left")
        await broker.stop()

    run(main, loop)


def _worker(broker: Broker) -> Worker:
    worker = Worker("sum", broker)
    worker.add(add)
    return worker


def test_rights_can_be_given_up() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", [add])
        broker.serve("secret", [add])
        some = broker.local(Principal("guest", (Grant(Role.CALLER, ("sum",)),)))
        async with AsyncClient(some) as client:
            assert await client.call("sum/add", [1, 2]) == 3
            with pytest.raises(errors.Denied):
                await client.call("secret/add", [1, 2])
            with pytest.raises(errors.Denied):
                await client.call("broker.admin.peers")
        worker = Worker("sum", some)
        worker.add(add)
        with pytest.raises(errors.Denied):
            await worker.start()
        await broker.stop()

    run(main)


def test_what_cannot_work_in_process_is_said() -> None:
    async def main() -> None:
        broker = Broker(config())
        client = AsyncClient(broker)
        with pytest.raises(RuntimeError, match="does not run"):
            await client.connect()
        with pytest.raises(RuntimeError, match="does not run"):
            await in_thread(lambda: Client(broker).call("sum/add"))
        await broker.start()

        async def elsewhere() -> None:
            await AsyncClient(broker).connect()

        with pytest.raises(RuntimeError, match=r"Client\(broker\)"):
            await in_thread(lambda: asyncio.run(elsewhere()))
        with pytest.raises(TypeError, match="takes no token"):
            AsyncClient(broker, "a token")
        with pytest.raises(TypeError, match="neither the URL"):
            Worker("sum", 3)  # type: ignore[arg-type]
        late = AsyncClient(broker)
        gone = await AsyncClient(broker).connect()
        await broker.stop()
        with pytest.raises(RuntimeError, match="does not run"):
            await late.connect()
        with pytest.raises(errors.ConnectionLost):
            await gone.call("sum/add", [1, 2])
        await gone.close()

    run(main)


# ── life ──


@loops
def test_stop_ends_what_threads_wait_for_and_leaves_nothing(loop: str) -> None:
    async def main() -> weakref.ref[Broker]:
        before, files = set(threading.enumerate()), descriptors()
        broker = await embedded()
        broker.serve("slow", [sleep, add])
        broker.endpoint("lab", lambda peer, method, params: current().wait_cancelled(30), lambda peer: asyncio.sleep(0))
        streams = broker.stream("slow/sleep")
        waiting = asyncio.create_task(
            in_threads(8, lambda number: broker.request_from_thread("lab/x" if number % 2 else "slow/sleep"))
        )
        await until(lambda: len(broker.pending()) == 9, "all wait")
        await broker.stop()
        assert [type(ended) for ended in await waiting] == [errors.ShuttingDown] * 8
        with pytest.raises(errors.ShuttingDown):
            await anext(streams)
        assert nothing_left(broker)
        await until(lambda: set(threading.enumerate()) <= before, "no thread is left")
        assert descriptors() <= files, "no file is left"
        assert asyncio.all_tasks() == {asyncio.current_task()}
        scheduled = getattr(asyncio.get_running_loop(), "_scheduled", [])
        assert [timer for timer in scheduled if not timer.cancelled() and "broker" in repr(timer)] == []
        return weakref.ref(broker)

    async def forgotten() -> None:
        gone = await main()
        await asyncio.sleep(0.01)
        gc.collect()
        assert gone() is None, "no timer, callback or table holds it"

    run(forgotten, loop)


def test_several_brokers_live_side_by_side_and_one_after_the_other() -> None:
    async def main() -> None:
        brokers = [await embedded() for _ in range(3)]
        for number, broker in enumerate(brokers):
            broker.serve("which", {"am_i": lambda number=number: number})
        assert [await broker.request("which/am_i") for broker in brokers] == [0, 1, 2]
        await brokers[1].stop()
        assert [await broker.request("which/am_i") for broker in brokers[::2]] == [0, 2]
        with pytest.raises(RuntimeError, match="does not run"):
            await brokers[1].request("which/am_i")
        await brokers[0].stop()
        await brokers[2].stop()

    run(main)


def test_it_runs_on_tornados_loop_started_before_the_loop_is() -> None:
    """As programs do that build their application first and start the loop last."""

    def ask(broker: Broker, told: list[Any], loop: IOLoop) -> None:
        try:
            told.append(broker.request_from_thread("sum/add", [1, 2], timeout=20))
            told.append([peer.principal for peer in broker.peers("sum")])
        finally:
            loop.add_callback(loop.stop)

    asyncio.set_event_loop(asyncio.new_event_loop())
    loop = IOLoop.current()
    try:
        broker = Broker(config())
        loop.run_sync(broker.start)
        Application(broker.routes("/broker"))
        broker.serve("sum", [add])
        broker.reject("shut", "x")
        assert broker.pending() == []
        told: list[Any] = []
        thread = threading.Thread(target=ask, args=(broker, told, loop))
        thread.start()
        loop.start()
        thread.join()
        assert told == [3, []]
        loop.run_sync(broker.stop)
        assert nothing_left(broker)
    finally:
        loop.close(all_fds=True)
        asyncio.set_event_loop(None)


def test_who_asks_is_told_in_this_process_only() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("who", {"asks": lambda: current().caller})
        async with hosting(broker=broker) as host:
            worker = await host.peer("/broker/ws/far?role=worker&meta=1")
            asking = asyncio.create_task(broker.request("far/m"))
            call = await worker.taken()
            assert "caller" not in call["meta"]
            await worker.answer(call, result=1)
            assert await asking == 1
            name, principal = await broker.request("who/asks")
            assert principal == "local" and name.startswith(broker.node)

    run(main)


def test_the_page_has_a_table_of_all_names() -> None:
    text = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text().split("## All names", 1)[1]
    named = set(re.findall(r"[`, ](\w+)\(", text)) | {"loop", "url", "open_link", "abort"}
    public = {name for name in dir(Broker) if not name.startswith("_")}
    assert public <= named, public - named


# ── what cannot be meant ──


def test_secrets_and_principals_are_judged_at_once() -> None:
    with pytest.raises(ValueError, match="at least 32 characters"):
        Broker(fixed={"short": Principal("a", ())})
    with pytest.raises(TypeError, match="stands for a str; expected a Principal"):
        Broker(fixed={"x" * 32: "alice"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="is a bytes; expected a text"):
        Broker(fixed={b"x" * 32: Principal("a", ())})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="authenticate is a int; give a function"):
        Broker(authenticate=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the principal is a str; expected a Principal"):
        Broker().local("alice")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"on_message": 3}, {"on_connect": "x"}, {"on_disconnect": []}])
def test_hooks_are_functions(given: Any) -> None:
    (what,) = given
    with pytest.raises(TypeError, match=f"{what} is of type .*; give a function"):
        Broker().endpoint("z", **given)


def test_a_name_served_twice_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("magnet", {"add": add})
        broker.endpoint("magnet", None, lambda peer: None)  # hooks alone answer nothing
        assert not caplog.records
        broker.endpoint("magnet", lambda peer, method, params: method)
        assert [record.getMessage() for record in caplog.records] == [
            "magnet is served twice in this process: its calls are shared, each goes to one of the two"
        ]
        await broker.stop()

    with caplog.at_level(logging.WARNING, "broker"):
        run(main)


def test_wrong_calls_name_the_function_that_was_called() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", {"add": add})
        for function, call in (
            ("submit", lambda: broker.submit("sum/add", [1, 2], tmeout=5)),
            ("call_back", lambda: broker.call_back("sum/add", [1, 2], print, tmeout=5)),
            ("stream", lambda: broker.stream("sum/add", [1, 2], tmeout=5)),
        ):
            with pytest.raises(TypeError, match=rf"^{function}\(\) has no argument 'tmeout'; did you mean timeout\?"):
                call()
        with pytest.raises(TypeError, match=r"^request\(\) has no argument 'tmeout'"):
            await broker.request("sum/add", [1, 2], tmeout=5)
        with pytest.raises(TypeError, match=r"^request_from_thread\(\) has no argument 'tmeout'"):
            await asyncio.to_thread(broker.request_from_thread, "sum/add", [1, 2], tmeout=5)
        with pytest.raises(TypeError, match=r"^stream_from_thread\(\) has no argument 'tmeout'"):
            await asyncio.to_thread(broker.stream_from_thread, "sum/add", [1, 2], tmeout=5)
        with pytest.raises(TypeError, match="the callback is of type NoneType; give a function"):
            broker.call_back("sum/add", [1, 2], None)  # type: ignore[arg-type]
        assert not broker.pending()
        await broker.stop()

    run(main)
