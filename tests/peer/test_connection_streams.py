"""Streams, values of any size, and links that break in the midst of them, over real sockets."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker.links.connect import connect
from broker.links.end import Nobody
from broker.links.loop import LoopLinks
from broker.peer import connection as connection_module
from broker.peer.backoff import Backoff
from broker.peer.connection import Connection, websocket_url
from broker.peer.errors import BrokerError, Cancelled, CannotConnect, ConnectionLost
from broker.peer.session import Asked, Heard, Options, Pending
from broker.peer.streams import WINDOW_MAX
from broker.peer.values import decode
from tests.links.harness import Recorder, serving
from tests.peer.harness import SECRET, broker_running, run, until
from tests.peer.proxy import Proxy, proxying

LARGE = 100_000_000

Function = Callable[["Serving", Asked], Awaitable[object]]


class Owner:
    """Tells nobody."""

    def __init__(self) -> None:
        self.ups: list[bool] = []
        self.end: list[BrokerError] = []

    def asked(self, request: Asked) -> None: ...

    def cancel_asked(self, number: int | str) -> None: ...

    def heard(self, broadcast: Heard) -> None: ...

    def item(self, number: int | str, value: Any) -> None: ...

    def items_ended(self, number: int | str) -> None: ...

    def link_changed(self, up: bool, why: str) -> None:
        self.ups.append(up)

    def standing_refused(self, key: tuple[str, ...], error: BrokerError) -> None: ...

    def gave_up(self, error: BrokerError) -> None:
        self.end.append(error)


class Serving(Owner):
    """Answers requests by functions of a test, with no more than a connection has."""

    def __init__(self, **functions: Function) -> None:
        super().__init__()
        self.functions = functions
        self.connection: Connection
        self.items: dict[int | str, asyncio.Queue[Any]] = {}
        self.tasks: dict[int | str, asyncio.Task[None]] = {}
        self.begun: list[str] = []
        self.cancelled: list[int | str] = []

    def asked(self, request: Asked) -> None:
        assert request.id is not None
        self.items[request.id] = asyncio.Queue()
        self.begun.append(request.method)
        self.tasks[request.id] = asyncio.get_running_loop().create_task(self._run(request, request.id))

    async def _run(self, request: Asked, number: int | str) -> None:
        try:
            await self.functions[request.method](self, request)
        finally:
            del self.tasks[number], self.items[number]

    def cancel_asked(self, number: int | str) -> None:
        self.cancelled.append(number)
        if number in self.tasks:
            self.tasks[number].cancel()

    def item(self, number: int | str, value: Any) -> None:
        if number in self.items:
            self.items[number].put_nowait(value)

    def items_ended(self, number: int | str) -> None:
        if number in self.items:
            self.items[number].put_nowait(StopAsyncIteration)

    async def parts(self, request: Asked) -> AsyncIterator[Any]:
        assert request.id is not None
        items = self.items[request.id]
        while (item := await items.get()) is not StopAsyncIteration:
            self.connection.consumed(request.id)
            yield item

    async def send(self, request: Asked, raw: bytes, *attachments: bytes) -> None:
        assert request.id is not None
        if self.connection.send_item(request.id, raw, attachments):
            await self.connection.room(request.id)

    def answer(self, request: Asked, raw: bytes, *attachments: bytes) -> None:
        assert request.id is not None
        self.connection.session.answer(request.id, raw, attachments)
        self.connection.flush()


class Reading:
    """Reads a stream item by item."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.call: Pending | None = None
        self.items: list[Any] = []
        self.told: list[tuple[float, float | None, str | None]] = []
        self.is_stalled = False
        self.then: dict[int, Callable[[], None]] = {}
        """what to do once so many items have come"""

    def item(self, value: Any) -> None:
        self.items.append(value)
        if len(self.items) in self.then:
            self.then[len(self.items)]()
        if self.call is not None and not self.is_stalled:
            self.connection.consumed(self.call)

    def progress(self, done: float, total: float | None, text: str | None) -> None:
        self.told.append((done, total, text))


def stream(
    connection: Connection, name: str, *, sends: bool = False, **options: Any
) -> tuple[Reading, asyncio.Future[Any]]:
    future = connection.loop.create_future()
    reading = Reading(connection)
    tell = reading.progress
    reading.call = connection.ask(name, b"", (), Options(**options), future, reader=reading, tell=tell, sends=sends)
    return reading, future


def soon() -> Backoff:
    return Backoff(first_s=0.02, most_s=0.05)


@asynccontextmanager
async def open_connection(url: str, owner: Any = None, *, grace_s: float = 30.0) -> AsyncIterator[Connection]:
    connection = Connection(lambda: (url, SECRET), owner or Owner(), grace_s=grace_s, backoff=soon())
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()
        assert not connection._rooms
        assert not connection.session._streams
        assert not connection.session.pending


@asynccontextmanager
async def serving_at(url: str, *, grace_s: float = 0.0, **functions: Function) -> AsyncIterator[Serving]:
    owner = Serving(**functions)
    async with open_connection(url, owner, grace_s=grace_s) as connection:
        owner.connection = connection
        await connection.request("broker.serve", b'{"endpoint":"data"}')
        connection.session.stand(("serve", "data"), "broker.serve", b'{"endpoint":"data"}')
        yield owner
    await until(lambda: not owner.tasks, "all functions have ended")


@asynccontextmanager
async def through_proxies() -> AsyncIterator[tuple[Proxy, Proxy]]:
    """A proxy each for a broker's callers and its workers."""
    async with proxying() as callers, proxying() as workers:
        hosts = [callers.host, workers.host]
        async with broker_running(server={"allowed_hosts": hosts}) as broker:
            callers.port = workers.port = broker.port
            yield callers, workers


async def count_to(owner: Serving, request: Asked, most: int = 200) -> None:
    for number in range(most):
        await owner.send(request, b"%d" % number)
    owner.answer(request, b'"end"')


async def add(owner: Serving, request: Asked) -> None:
    total = 0
    async for item in owner.parts(request):
        total += item
    owner.answer(request, b"%d" % total)


# ---------------------------------------------------------------- any size, both ways


@pytest.mark.parametrize("grace_s", [0.0, 30.0])
def test_a_result_of_100_mb_arrives_whole(grace_s: float) -> None:
    data = hashlib.shake_128(b"result").digest(1000) * (LARGE // 1000)

    async def large(owner: Serving, request: Asked) -> None:
        owner.answer(request, b'{"volume":{"$buffer":0},"name":"v"}', data)

    async def main() -> None:
        async with (
            broker_running() as broker,
            serving_at(broker.url, large=large),
            open_connection(broker.url, grace_s=grace_s) as caller,
        ):
            value = await caller.request("data/large")
            assert value["name"] == "v"
            assert value["volume"] == data

    run(main)


@pytest.mark.parametrize("grace_s", [0.0, 30.0])
def test_params_of_100_mb_arrive_whole(grace_s: float) -> None:
    data = hashlib.shake_128(b"params").digest(1000) * (LARGE // 1000)

    async def check(owner: Serving, request: Asked) -> None:
        value = decode(request.params, request.attachments)
        owner.answer(request, b"true" if value["volume"] == data else b"false")

    async def main() -> None:
        async with (
            broker_running() as broker,
            serving_at(broker.url, check=check),
            open_connection(broker.url, grace_s=grace_s) as caller,
        ):
            assert await caller.request("data/check", b'{"volume":{"$buffer":0}}', [data]) is True

    run(main)


def test_large_items_between_small_ones_both_ways() -> None:
    async def echo(owner: Serving, request: Asked) -> None:
        async for item in owner.parts(request):
            raw, attachments = (b'{"$buffer":0}', [item]) if isinstance(item, bytes) else (b"%d" % item, [])
            await owner.send(request, raw, *attachments)
        owner.answer(request, b"null")

    async def main() -> None:
        async with (
            broker_running() as broker,
            serving_at(broker.url, echo=echo),
            open_connection(broker.url) as caller,
        ):
            reading, end = stream(caller, "data/echo", sends=True)
            data = [bytes([number]) * (900_000 * number) for number in (1, 2, 3)]
            for number, one in enumerate(data):
                assert caller.send_item(reading.call, b"%d" % number)
                assert caller.send_item(reading.call, b'{"$buffer":0}', [one])
                assert await caller.room(reading.call)
            caller.send_item(reading.call, b"", last=True)
            assert await end is None
            assert reading.items == [0, data[0], 1, data[1], 2, data[2]]

    run(main)


# ---------------------------------------------------------------- streams


def test_a_stream_its_progress_and_its_end() -> None:
    async def work(owner: Serving, request: Asked) -> None:
        for number in range(20):
            await owner.send(request, b"%d" % number)
            owner.connection.progress(request.id, number + 1, 20, "slices")
        owner.answer(request, b'"end"')

    async def main() -> None:
        async with (
            broker_running() as broker,
            serving_at(broker.url, work=work),
            open_connection(broker.url) as caller,
        ):
            reading, end = stream(caller, "data/work", progress=True, timing=True)
            assert await end == "end"
            assert reading.items == list(range(20))
            assert reading.told[-1] == (20, 20, "slices")
            assert reading.call.timing["first_part_ms"] >= 0
            assert await caller.request("data/work") == [*range(20), "end"], "without a reader it is a list"

    run(main)


def test_a_reader_that_stalls_stops_the_worker() -> None:
    sent = 0

    async def work(owner: Serving, request: Asked) -> None:
        nonlocal sent
        for sent in range(1000):
            await owner.send(request, b"%d" % sent)
        owner.answer(request, b'"end"')

    async def main() -> None:
        async with (
            broker_running() as broker,
            serving_at(broker.url, work=work) as worker,
            open_connection(broker.url) as caller,
        ):
            reading, end = stream(caller, "data/work")
            reading.is_stalled = True
            await until(lambda: len(reading.items) == WINDOW_MAX, "the window is full")
            await caller.request("broker.ping")
            await worker.connection.request("broker.ping")
            assert len(reading.items) == WINDOW_MAX
            assert sent == WINDOW_MAX, "one more waits at the worker"
            reading.is_stalled = False
            caller.consumed(reading.call, WINDOW_MAX)
            assert await end == "end"
            assert reading.items == list(range(1000))

    run(main)


def test_a_cancelled_stream_wakes_who_waits_to_send() -> None:
    async def main() -> None:
        async with (
            broker_running() as broker,
            serving_at(broker.url, work=count_to) as worker,
            open_connection(broker.url) as caller,
        ):
            reading, end = stream(caller, "data/work", sends=True)
            reading.is_stalled = True
            for _ in range(WINDOW_MAX + 1):
                caller.send_item(reading.call, b"1")
            room = asyncio.ensure_future(caller.room(reading.call))
            await until(lambda: len(reading.items) == WINDOW_MAX, "it is under way")
            assert not room.done()
            caller.cancel(reading.call)
            assert await room is False
            with pytest.raises(Cancelled):
                await end
            await until(lambda: worker.cancelled, "the worker is told")
            await until(lambda: not worker.tasks, "its function has ended")

    run(main)


# ---------------------------------------------------------------- links that break


def test_a_link_that_breaks_in_mid_stream_is_not_noticed() -> None:
    async def main() -> None:
        async with (
            through_proxies() as (callers, workers),
            serving_at(workers.url, grace_s=30.0, work=count_to) as worker,
            open_connection(callers.url) as caller,
        ):
            reading, end = stream(caller, "data/work")
            reading.then = {20: callers.cut, 60: workers.cut, 100: callers.cut, 140: workers.cut}
            assert await end == "end"
            assert reading.items == list(range(200))
            assert worker.begun == ["work"]
            assert not worker.connection.session.attempts
            assert callers.accepted >= 3
            assert workers.accepted >= 3

    run(main)


def test_large_values_survive_links_that_break_in_the_midst_of_a_message() -> None:
    data = hashlib.shake_128(b"both").digest(1000) * 30_000

    async def echo(owner: Serving, request: Asked) -> None:
        owner.answer(request, b'{"$buffer":0}', bytes(request.attachments[0]))

    async def main() -> None:
        async with (
            through_proxies() as (callers, workers),
            serving_at(workers.url, grace_s=30.0, echo=echo) as worker,
            open_connection(callers.url) as caller,
        ):
            callers.cut_at, workers.cut_at = 10_000_000, 20_000_000
            request = asyncio.ensure_future(caller.request("data/echo", b'[{"$buffer":0}]', [data]))
            await until(lambda: callers.cut_at is None and workers.cut_at is None, "both were cut")
            callers.cut_at, workers.cut_at = callers.passed + 10_000_000, workers.passed + 15_000_000
            assert await request == data
            assert worker.begun == ["echo"], "it ran once"
            assert callers.accepted >= 2
            assert workers.accepted >= 2

    run(main)


def test_items_that_go_survive_a_broken_link() -> None:
    async def main() -> None:
        async with (
            through_proxies() as (callers, workers),
            serving_at(workers.url, grace_s=30.0, add=add),
            open_connection(callers.url) as caller,
        ):
            reading, end = stream(caller, "data/add", sends=True)
            for number in range(300):
                if number % 100 == 50:
                    (callers if number < 200 else workers).cut()
                assert caller.send_item(reading.call, b"%d" % number)
                assert await caller.room(reading.call)
            caller.send_item(reading.call, b"", last=True)
            assert await end == sum(range(300))

    run(main)


def test_calls_that_may_run_once_run_once_however_often_links_break() -> None:
    runs: dict[int, int] = {}

    async def note(owner: Serving, request: Asked) -> None:
        (number,) = decode(request.params, request.attachments)
        runs[number] = runs.get(number, 0) + 1
        await asyncio.sleep(0)
        owner.answer(request, b"%d" % number)

    async def main() -> None:
        async with (
            through_proxies() as (callers, workers),
            serving_at(workers.url, grace_s=30.0, note=note),
            open_connection(callers.url) as caller,
        ):

            async def many(first: int) -> None:
                for number in range(first, 400, 8):
                    assert await caller.request("data/note", b"[%d]" % number) == number

            lanes = [asyncio.ensure_future(many(first)) for first in range(8)]
            for at in (40, 120, 200, 280, 360):
                await until(lambda at=at: len(runs) >= at, f"{at} have run")
                callers.cut()
                workers.cut()
            await asyncio.gather(*lanes)
            assert runs == dict.fromkeys(range(400), 1)

    run(main)


def test_a_session_whose_grace_was_too_short_ends_as_if_there_was_none() -> None:
    async def silent(owner: Serving, request: Asked) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with (
            through_proxies() as (callers, workers),
            serving_at(workers.url, silent=silent, work=count_to) as worker,
            open_connection(callers.url, grace_s=0.05) as caller,
        ):
            once = asyncio.ensure_future(caller.request("data/silent"))
            await until(lambda: worker.begun, "it runs")
            callers.close()
            callers.cut()
            await until(lambda: not caller.is_up, "the link is lost")
            again = asyncio.ensure_future(caller.request("data/work", options=Options(timeout=20.0)))
            await until(lambda: worker.cancelled, "the broker has given the session up")
            assert not once.done(), "nobody knows here"
            callers.open()
            with pytest.raises(ConnectionLost, match="It may have run"):
                await once
            assert len(await again) == 201

    run(main)


def test_a_broker_that_restarts_is_come_back_to() -> None:
    async def silent(owner: Serving, request: Asked) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with (
            through_proxies() as (callers, workers),
            open_connection(callers.url) as caller,
            serving_at(workers.url, silent=silent) as worker,
            broker_running(server={"allowed_hosts": [callers.host]}) as other,
            serving_at(other.url, work=count_to),
        ):
            once = asyncio.ensure_future(caller.request("data/silent"))
            await until(lambda: worker.begun, "it runs")
            callers.port = other.port
            callers.cut()
            with pytest.raises(ConnectionLost, match="It may have run"):
                await once
            assert len(await caller.request("data/work")) == 201

    run(main)


def test_a_link_that_another_replaced_is_the_end() -> None:
    async def main() -> None:
        owner = Owner()
        async with broker_running() as broker, open_connection(broker.url, owner) as caller:
            offer = caller.session.resume
            assert offer is not None
            links = LoopLinks()
            link = await connect(
                websocket_url(broker.url, 30.0, offer[2]), links, headers=[("Authorization", f"Bearer {SECRET}")],
                subprotocols=("jsonrpc", f"resume.{offer[0]}.{offer[1]}"),
            )  # fmt: skip
            link.start(Nobody())
            await until(lambda: owner.end, "it gave up")
            assert "4409" in str(owner.end[0])
            await links.close(1000, "")

    run(main)


def test_a_secret_that_is_wrong_costs_the_session_and_no_more() -> None:
    async def main() -> None:
        owner = Owner()
        async with broker_running() as broker, open_connection(broker.url, owner) as caller:
            kept = caller.session._kept
            assert kept is not None
            kept.secret = "another"
            broker.links.links[0].abort()
            await until(lambda: owner.ups == [True, False, True], "it is back")
            assert caller.session._kept is not kept
            assert (await caller.request("broker.ping"))["node"] == broker.node

    run(main)


def test_a_broker_that_says_nothing_of_the_session_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "OPEN_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with serving(receiver=Recorder) as server:
            connection = Connection(lambda: (server.url, ""), Owner(), grace_s=30.0)
            with pytest.raises(CannotConnect, match="says nothing of the session within"):
                await connection.open()
            assert not connection.is_up
            await connection.close()

    run(main)


def test_a_link_that_breaks_before_the_first_word_is_opened_again() -> None:
    async def main() -> None:
        async with through_proxies() as (proxy, _):
            owner = Owner()
            connection = Connection(lambda: (proxy.url, SECRET), owner, grace_s=30.0, backoff=soon())
            proxy.cut_at = 300  # the handshake has come, the word is cut
            await connection.open(patient=True)
            assert (await connection.request("broker.ping"))["node"]
            assert proxy.accepted == 2
            assert owner.ups == [True]
            await connection.close()

    run(main)


def test_closing_while_it_waits_for_the_first_word() -> None:
    async def main() -> None:
        async with serving(receiver=Recorder) as server:
            connection = Connection(lambda: (server.url, ""), Owner(), grace_s=30.0)
            opening = asyncio.ensure_future(connection.open())
            await until(lambda: connection._greeted is not None, "it waits")
            await connection.close()
            with pytest.raises(ConnectionLost):
                await opening

    run(main)
