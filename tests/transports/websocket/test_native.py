"""Conversations with a broker that reads and writes in C, and with one that does not: the same word for word."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker.core.events import Answered
from broker.core.messages import Body
from broker.core.sessions import Session
from broker.links.compiled import PURE, core
from broker.links.link import Link
from broker.transports.websocket.peer import WebSocketPeer
from broker.wire import native
from broker.wire.frames import text_frame
from tests.transports.websocket.harness import Peer, World, head, run, serving, until

pytestmark = pytest.mark.skipif(core() != "compiled core", reason="there is no compiled core here")

Conversation = Callable[[World], Awaitable[list[Any]]]


def told_alike(patch: pytest.MonkeyPatch, conversation: Conversation) -> list[Any]:
    """Hold it both ways, compare, and return what was said; the broker's name and times stand for themselves."""
    said = []
    for pure in ("", "1"):
        patch.setenv(PURE, pure)

        async def main(pure: str = pure) -> None:
            async with serving() as world:
                assert world.broker.links.native == (not pure)
                found = json.dumps(await conversation(world), sort_keys=True, default=bytes.hex)
                found = found.replace(world.broker.router.node, "NODE")
                said.append(re.sub(r'"(elapsed_ms|timeout)": [\d.]+', r'"\1": 1', found))
                counters = world.counters
                books = {name: getattr(counters, name) for name in counters.__slots__ if not name.startswith("latency")}
                said[-1] += json.dumps(books, sort_keys=True)

        run(main)
    assert said[0] == said[1]
    first: list[Any] = json.JSONDecoder().raw_decode(said[0])[0]
    return first


def call(number: int, method: str = "m", **members: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": {"n": number}} | members


async def in_one_go(peer: Peer, *messages: object) -> None:
    """All of them in one write."""

    class Gathering:
        data = b""

        def write(self, data: bytes) -> None:
            self.data += data

        def __getattr__(self, name: str) -> Any:
            return getattr(transport, name)

    transport, gathering = peer.socket.transport, Gathering()
    peer.socket.transport = gathering  # type: ignore[assignment]
    try:
        for message in messages:
            await peer.send(message)
    finally:
        peer.socket.transport = transport
    transport.write(gathering.data)


@pytest.mark.parametrize("query", ["", "&meta=1", "&binary=1&meta=1", "&grace=30", "&grace=30&meta=1"])
@pytest.mark.parametrize("asks", ["listen=0", "listen=0&grace=30", "listen=0&stream=in", "listen=0&lsp=1"])
def test_calls_and_replies(monkeypatch: pytest.MonkeyPatch, query: str, asks: str) -> None:
    async def conversation(world: World) -> list[Any]:
        worker, caller = await world.worker("lab", query), await world.caller("lab", asks)
        said: list[Any] = []
        metas: list[dict[str, object]] = [
            {}, {"meta": {"timeout": 20}}, {"meta": {"timeout": 20, "trace": "t"}}, {"meta": {"idempotent": True}},
            {"meta": {"timeout": 0}}, {"meta": {"progress": True}}, {"params": {"$base64": "QUJD"}},
            {"params": ["é", "\U0001f600", "\x7f", None, 1e-3, -0.5]}, {"params": "\ud800"}, {"id": "text"},
            {"id": 10**19}, {"id": 1.5}, {"meta": {"timeout": 1e9}},
        ]  # fmt: skip
        for _ in range(2):  # the second time the methods are known
            for number, members in enumerate(metas):
                await caller.send(call(number, **members))
                message = await caller_or_worker(caller, worker)
                said.append(message)
                if head(message).get("method") == "m":
                    await worker.answer(message, result=head(message).get("params"))
                    said.append(await caller.find(lambda message: "method" not in head(message)))
        return said

    said = told_alike(monkeypatch, conversation)
    assert sum("result" in head(message) for message in said) >= 16


async def caller_or_worker(caller: Peer, worker: Peer) -> Any:
    """What comes of a request: the call at the worker, or the refusal at the caller, which a ping behind it shows."""
    await caller.send({"jsonrpc": "2.0", "id": "sync", "method": "broker.ping"})
    before = await caller.find(lambda message: "method" not in head(message))
    if head(before).get("id") != "sync":
        await caller.find(lambda message: head(message).get("id") == "sync")
        return before
    return await worker.taken()


def test_requests_replies_and_abuse_in_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    async def conversation(world: World) -> list[Any]:
        worker, caller = await world.worker(), await world.caller()
        await caller.ask("m")
        await worker.answer(await worker.taken(), result=0)
        said = [await caller.read()]
        await in_one_go(
            caller, call(2), call(3), "no JSON", call(4), call(4), [call(5), call(6)], call(7, "unknown method"),
            {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": 3}}, call(8),
        )  # fmt: skip
        for _ in range(7):
            said.append(await worker.read())
        for message in said[1:]:
            if message["method"] == "m" and message["params"]["n"] != 3:
                await worker.answer(message, result=message["params"])
        for _ in range(8):
            said.append(await caller.read())
        return said

    said = told_alike(monkeypatch, conversation)
    assert sum("error" in message for message in said if isinstance(message, dict)) == 4


def test_strikes_within_a_chunk_end_the_link_and_what_is_behind_them_is_not_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def conversation(world: World) -> list[Any]:
        worker, caller = await world.worker(), await world.caller()
        await caller.ask("m")
        await worker.answer(await worker.taken(), result=0)
        await caller.read()
        await in_one_go(caller, call(2), *["no JSON"] * 40, call(3))
        await until(lambda: world.counters.detached == 1, "the caller is gone")
        said = [await worker.read(), await worker.read()]
        assert said[1]["method"] == "$/cancelRequest"
        await worker.sync()
        assert worker.inbox == []
        return [*said, world.counters.accepted, world.counters.strikes]

    told_alike(monkeypatch, conversation)


@pytest.mark.parametrize("compiled", [True, False])
def test_what_a_session_with_grace_says_is_counted_message_by_message(compiled: bool) -> None:
    async def main() -> None:
        async with serving() as world:
            world.broker.links.native = compiled
            worker = await world.worker("lab", "&grace=30")
            caller = await world.peer("/ws/lab?listen=0&grace=30")
            await caller.read()  # broker.session
            await in_one_go(caller, *(call(number) for number in range(100)))
            for _ in range(100):
                message = await worker.find(lambda message: message.get("method") == "m")
                await worker.send({"jsonrpc": "2.0", "id": message["id"], "result": "x" * 50_000})
            numbers = []
            for _ in range(100):
                reply = await caller.find(lambda message: "result" in message)
                numbers.append(reply["meta"]["n"])
            assert numbers == list(range(1, 101))
            kept = [session.kept for session in world.broker.router.sessions.by_id.values() if session.kept]
            assert sorted(one.received for one in kept) == [100, 100]
            acks = [message["params"]["n"] for message in caller.inbox if message.get("method") == "$/ack"]
            assert acks == sorted(acks) and 32 <= acks[-1] <= 100
            for _ in range(3):  # after 32 messages or 1 MiB
                await worker.told("$/ack")

    run(main)


def test_a_request_is_the_same_whichever_way_it_was_read() -> None:
    """Said again by a session that outlives its links, first by the rules, as its method was not known, then in C."""

    async def main() -> None:
        async with serving() as world:
            worker = await world.worker("lab", "&capacity=1")
            caller = await world.peer("/ws/lab?listen=0&grace=30")
            await caller.read()
            await caller.send(call(1))
            await worker.taken()
            await caller.send(call(1))
            await caller.send(call(1, params={"n": 2}))
            reply = await caller.find(lambda message: "error" in message)
            assert reply["error"]["data"]["outcome"] == "duplicate_id"
            assert world.broker.router.pending.count == world.counters.attempts == 1
            assert caller.inbox == []

    run(main)


def test_what_is_common_goes_through_c() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = (
                await world.worker("lab", "&meta=1"),
                await world.caller("lab", "listen=0&grace=30&stream=in"),
            )
            for _ in range(2):
                await caller.ask("m", meta={"timeout": 5})
                await worker.answer(await worker.taken(), result=1)
                await caller.read()
            readers = [link.reader for link in world.broker.links.links]
            assert all(reader is not None for reader in readers)
            seen = sorted(reader.decoded_bytes for reader in readers if reader is not None)
            assert seen[-1] > 0, "the worker's replies"
            (session,) = [one for one in world.broker.router.sessions.by_id.values() if one.kept]
            assert session.kept is not None and session.kept.received == 2

    run(main)


@pytest.mark.parametrize("times", [1, 99])
def test_a_reply_that_cannot_be_queued_is_its_callers_fault_and_costs_the_worker_nothing(
    times: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        """A loop that has no room, so many times."""

        def __init__(self, loop: Any) -> None:
            self.loop = loop
            self.left = times

        def call_soon(self, *arguments: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                raise MemoryError("no room for a handle")
            return self.loop.call_soon(*arguments)

    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker("lab", "&capacity=1"), await world.caller("lab")
            for _ in range(2):
                await caller.ask("m")
                await worker.answer(await worker.taken(), result=0)
                await caller.read()
            await caller.ask("m")
            await worker.taken()
            router, writer = world.broker.router, world.broker.links.writer
            (registration,) = router.registry.by_name["lab"].registrations.values()
            (attempt,) = registration.session.attempts
            (asking,) = [one for one in router.sessions.by_id.values() if one.requests]
            loop = writer._loop
            writer._loop = Failing(loop)  # type: ignore[assignment]
            world.broker.engine.feed_all([Answered(registration.session, attempt, Body(b"1"))])
            writer._loop = loop
            assert registration.free and registration.load == 0 and not router.pending.count
            assert link_of(registration.session).is_open
            assert link_of(asking).is_open == (times == 1)
            if times == 1:
                assert head(await caller.read())["result"] == 1
            await worker.send({"jsonrpc": "2.0", "id": "still", "method": "broker.ping"})
            await worker.find(lambda message: head(message).get("id") == "still")

    with caplog.at_level(logging.CRITICAL):
        run(main)


# ---------------------------------------------------------------- broadcasts


def test_broadcasts_to_listeners_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def conversation(world: World) -> list[Any]:
        queries = ["", "binary=1", "grace=30", "stream=in", "role=worker", "", "binary=1&grace=30"]
        listeners = [await world.peer(f"/ws/lab?listen=1&{query}") for query in queries]
        publisher = await world.caller()
        said: list[Any] = []
        bodies: list[object] = [
            1,
            "é",
            {"a": [None, 1.5]},
            "x" * 10_000,
            "y" * 17_000,
            "z" * 70_000,
            {"$base64": "QUJD"},
        ]
        for data in bodies:
            await publisher.call("broker.publish", {"endpoint": "lab", "data": data})
        for peer in listeners:
            for number in range(len(bodies)):
                message = await peer.find(lambda message: head(message).get("method") == "broker.message")
                assert head(message)["params"]["seq"] == number + 1
                said.append(message)
        await listeners[0].socket.close()
        await until(lambda: world.counters.detached == 1, "one has left")
        await publisher.call("broker.publish", {"endpoint": "lab", "data": "again"})
        for peer in listeners[1:]:
            said.append(await peer.find(lambda message: head(message).get("method") == "broker.message"))
        assert world.counters.copies == 7 * 7 + 6
        return said

    assert len(told_alike(monkeypatch, conversation)) == 7 * 7 + 6


FRAME = text_frame(b'{"jsonrpc":"2.0","method":"broker.message","params":{"data":1}}')


def link_of(session: Session) -> Link:
    assert isinstance(session.link, WebSocketPeer)
    assert isinstance(session.link._link, Link)
    return session.link._link


def test_a_broadcast_is_spread_as_far_as_each_link_would_take_it_itself() -> None:
    async def main() -> None:
        async with serving() as world:
            for _ in range(3):
                await world.peer("/ws/lab")
            first, second, third = sessions = tuple(world.broker.router.sessions.by_id.values())
            soft, hard = world.broker.links.limits.outbox_soft_bytes, world.broker.links.limits.outbox_hard_bytes
            assert native.spread(FRAME, sessions) == []
            assert [link_of(session)._pieces for session in sessions] == [[FRAME]] * 3
            assert [link_of(session).outbox_bytes for session in sessions] == [len(FRAME)] * 3
            assert all(link_of(session).dirty for session in sessions)
            assert world.broker.links.writer._dirty == [link_of(session) for session in sessions]
            link, before = link_of(second), link_of(second).enqueued
            for name, value in (
                ("_state", 1), ("_state", 2), ("enqueued", before + soft), ("_hard_bytes", len(FRAME) - 1),
                ("enqueued", "much"), ("_pieces", ()), ("_state", None),
            ):  # fmt: skip
                kept = getattr(link, name)
                setattr(link, name, value)
                assert native.spread(FRAME, sessions) == [second], name
                setattr(link, name, kept)
            link.enqueued = link.flushed + soft
            assert native.spread(FRAME, (second,)) == [], "at the bound itself it is still taken, as by send_frame"
            assert native.spread(FRAME, (second,)) == [second]
            assert hard > soft
            link.enqueued = before + len(FRAME)
            assert native.spread(FRAME * 300, sessions) == list(sessions), "what is sent in pieces is left to Python"
            away, third.link = third.link, None
            strange: tuple[Any, ...] = (object(), None, third, first)
            assert native.spread(FRAME, strange) == list(strange[:3])
            third.link = away
            for wrong in ((), (FRAME,), (bytearray(FRAME), sessions), (FRAME, list(sessions))):
                with pytest.raises(TypeError):
                    native.spread(*wrong)

    run(main)


def test_spreading_leaves_no_reference_behind() -> None:
    async def main() -> None:
        async with serving() as world:
            await world.peer("/ws/lab")
            await world.peer("/ws/lab?grace=30")
            sessions = tuple(world.broker.router.sessions.by_id.values())
            frame = bytes(bytearray(FRAME))
            watched = [*sessions, frame, *(session.link for session in sessions), sessions]
            before = list(map(sys.getrefcount, watched))
            for _ in range(50):
                assert native.spread(frame, sessions) == [sessions[1]]
            link = link_of(sessions[0])
            await until(lambda: not link.outbox_bytes, "all is written")
            assert list(map(sys.getrefcount, watched)) == before

    run(main)
