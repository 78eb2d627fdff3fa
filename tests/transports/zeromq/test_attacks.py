"""What ZeroMQ itself does not bound: memory before anybody is known, subscriptions, routes, what outlives its peer."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from broker.auth.connection_files import write_connection_file
from broker.auth.tokens import TokenStore
from broker.client.async_client import AsyncClient
from broker.links.zeromq_connect import Place
from broker.peer import errors
from broker.transports.zeromq import publishing
from broker.transports.zeromq.connections import UNREAD_MAX_BYTES
from broker.wire.connection_file import ConnectionInfo
from broker.wire.multipart import Multipart, MultipartError
from tests.transports.zeromq.harness import Home, Raw, run, running, until
from tests.transports.zeromq.test_subscribers import subscriber
from tests.transports.zeromq.zmtp import MORE, frame, speak

MIB = 1 << 20
LISTENER = {"roles": ["caller", "worker", "listener"]}
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a connection has received")


async def is_well(home: Home) -> None:
    async with Raw(home.info) as other:
        assert (await other.ask("ping_request"))["status"] == "ok"


# ------------------------------------------------------------ memory


@needs_linux
@pytest.mark.parametrize("channel", ["shell", "control", "stdin", "iopub", "hb"])
def test_a_message_without_end_is_not_gathered(channel: str) -> None:
    """libzmq keeps the frames of a message until its last, and bounds only each one's size."""

    async def main() -> None:
        async with running(limits={"message_max_bytes": MIB}) as home:
            wire = await speak(home.info.url(channel), b"SUB" if channel == "iopub" else b"DEALER")
            most = 40 * (MIB + UNREAD_MAX_BYTES)
            assert await wire.push(frame(bytes(1000), MORE) * 60, most) < most
            wire.close()
            await until(lambda: home.door.counters.evicted == 1, "it was put out")
            await until(lambda: home.door.connections == 0, "nothing is left of it")
            await is_well(home)

    run(main)


@needs_linux
def test_who_has_the_key_may_not_send_a_message_without_end_either() -> None:
    async def main() -> None:
        async with running(limits={"message_max_bytes": MIB}) as home, Raw(home.info) as raw:
            wire = await speak(home.info.url("shell"))
            first = raw.session.serialize(raw.session.msg("attach_request", {}))
            *more, last = (bytes(each) for each in first)
            wire.writer.write(b"".join(frame(each, MORE) for each in more) + frame(last))
            await until(lambda: home.door.peers == 1, "it is in")
            most = 40 * (MIB + UNREAD_MAX_BYTES)
            assert await wire.push(frame(bytes(60_000), MORE), most) < most
            wire.close()
            await until(lambda: home.door.peers == 0, "its session has no link any more")

    run(main)


def test_a_large_first_message_within_the_bound_is_taken() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            msg_id = await raw.send("call_request", {"method": "broker.ping"}, buffers=(bytes(12 * MIB),))
            await raw.find("call_reply", msg_id)
            assert home.door.counters.evicted == 0

    run(main)


def test_who_squats_on_a_routing_id_is_put_out() -> None:
    async def main() -> None:
        async with running(limits={"header_timeout_s": 0.5}) as home, Raw(home.info, routing_id=b"victim") as victim:
            assert (await victim.ask("attach_request"))["status"] == "ok"
            wire = await speak(home.info.url("shell"), identity=b"victim")
            wire.writer.write(frame(b"x"))
            await wire.ended()
            assert (await victim.ask("ping_request"))["status"] == "ok"

    run(main)


def test_who_says_nothing_is_put_out_and_may_come_back() -> None:
    async def main() -> None:
        async with running(limits={"header_timeout_s": 0.5}) as home, Raw(home.info) as raw:
            await until(lambda: home.door.counters.evicted > 0, "it is put out")
            assert (await raw.ask("ping_request"))["status"] == "ok"
            evicted = home.door.counters.evicted
            await asyncio.sleep(0.8)
            assert home.door.counters.evicted == evicted  # who is known may be silent

    run(main)


def test_of_a_peer_that_was_sent_away_no_connection_stays(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    section: dict[str, Any] = {"curve": True, "curve_key_file": str(tmp_path / "curve.key")}
    pair = zmq.curve_keypair()
    store.create("anna", ("caller",), ("data",), curve_key=pair[0])

    async def main() -> None:
        async with running(store, zeromq=section, limits={"header_timeout_s": 0.5}) as home:
            keys = ((home.info.curve_publickey or "").encode(), *pair)
            async with Raw(home.info, curve=keys) as raw:
                assert (await raw.ask("attach_request"))["status"] == "ok"
                store.revoke("anna", "curve")
                assert (await raw.find("detach"))["content"]["code"] == 4401
                await until(lambda: home.door.connections == 0, "its connection goes too")

    run(main)


# ------------------------------------------------------------ plain subscribers


def test_long_prefixes_end_the_connection() -> None:
    """libzmq keeps a node for each byte of what somebody subscribes to, whether that is taken or not."""

    async def main() -> None:
        async with running() as home:
            wire = await speak(home.info.url("iopub"), b"SUB")
            wire.writer.write(frame(b"\1" + bytes(2000)))
            await wire.ended()
            await until(lambda: home.door.connections == 0, "nothing is left of it")
            assert home.door.counters.subscriptions_refused == 0

    run(main)


def test_who_asks_for_what_is_refused_again_and_again_is_put_out() -> None:
    async def main() -> None:
        async with running() as home:
            wire = await speak(home.info.url("iopub"), b"SUB")
            wire.writer.write(b"".join(frame(b"\1" + os.urandom(20)) for _ in range(publishing.REFUSED_MAX)))
            await wire.ended()
            assert home.door.counters.subscriptions_refused == publishing.REFUSED_MAX

    run(main)


def test_one_connection_cannot_use_up_all_topics() -> None:
    async def main() -> None:
        async with running(zeromq=LISTENER | {"topics_max": 3}) as home, Raw(home.info) as raw:
            wire = await speak(home.info.url("iopub"), b"SUB")
            for at in range(5):
                answer = await raw.ask("topic_key_request", {"endpoint": "data", "topic": f"news{at}"})
                wire.writer.write(frame(b"\1" + answer["result"]["topic"].encode()))
            await until(lambda: home.door.counters.subscriptions_refused == 2, "two are refused")
            assert home.door.topics == 3
            wire.close()
            await until(lambda: home.door.topics == 0, "nobody listens any more")

    run(main)


def test_subscribers_that_leave_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        async with running(zeromq=LISTENER) as home, Raw(home.info) as raw:
            answer = await raw.ask("topic_key_request", {"endpoint": "data", "topic": "news"})
            topic = answer["result"]["topic"].encode()
            async with subscriber(home.info, topic):
                await until(lambda: home.door.topics == 1, "it listens")
            for _ in range(20):
                wire = await speak(home.info.url("iopub"), b"SUB")
                wire.writer.write(frame(b"\1" + topic))
                wire.close()
            await until(lambda: home.door.connections == 1, "all have gone")
            await until(lambda: home.door.topics == 0, "nobody listens any more")
            async with subscriber(home.info, topic):
                await until(lambda: home.door.topics == 1, "somebody listens again")

    run(main)
    assert not [record for record in caplog.records if record.name == "broker.links"]


def test_a_revoked_key_ends_what_its_plain_subscriber_hears(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    section: dict[str, Any] = {"curve": True, "curve_key_file": str(tmp_path / "curve.key")}
    pair = zmq.curve_keypair()
    store.create("liam", ("listener",), ("data",), curve_key=pair[0])

    async def main() -> None:
        async with running(store, zeromq=section) as home:
            server_key = (home.info.curve_publickey or "").encode()
            async with subscriber(home.info, b"data/news\0", server_key, *pair):
                await until(lambda: home.door.topics == 1, "it listens")
                store.revoke("liam", "curve")
                await until(lambda: home.door.topics == 0, "it is put out")
                await until(lambda: home.door.counters.handshakes["unknown_key"] > 0, "and not let in again")

    run(main)


# ------------------------------------------------------------ routes and channels


def test_routes_behind_one_connection_are_bounded() -> None:
    """A proxy does not say which of its peers are gone: those that were heard last stay."""

    async def main() -> None:
        async with running(zeromq={"routes_max": 3}) as home, Raw(home.info) as proxy:

            async def ask(name: bytes, kind: str) -> None:
                await proxy.socket.send_multipart([name, *proxy.session.serialize(proxy.session.msg(kind, {}))])

            for name in (b"a", b"b", b"c", b"a", b"d"):
                await ask(name, "ping_request")
            told: dict[bytes, list[str]] = {}
            while len(told) < 4 or "detach" not in told[b"b"]:
                name, *frames = await proxy.socket.recv_multipart()
                message = proxy.session.deserialize(proxy.session.feed_identities(frames)[1])
                told.setdefault(name, []).append(message["msg_type"])
            assert told == {
                b"a": ["ping_reply"] * 2, b"b": ["ping_reply", "detach"], b"c": ["ping_reply"], b"d": ["ping_reply"],
            }  # fmt: skip
            assert home.door.peers == 3

    run(main)


def test_control_speaks_for_a_peer_of_shell_only_with_its_session() -> None:
    async def main() -> None:
        async with (
            running() as home, Raw(home.info, routing_id=b"w") as shell,
            Raw(home.info, routing_id=b"w", channel="control") as control,
        ):  # fmt: skip
            assert (await shell.ask("attach_request", {"endpoint": "data", "role": "worker"}))["status"] == "ok"
            async with AsyncClient(home.url) as client:
                call = asyncio.create_task(client.call("data/read"))
                asked = await shell.find("call_request")
                # The routing id can be guessed; what stands in the headers cannot.
                await control.send("call_reply", {"status": "ok", "result": "forged"}, parent=asked["msg_id"])
                await until(lambda: home.refused() == {"late": 1}, "it is nobody")
                control.session.session = shell.session.session
                await control.send("call_reply", {"status": "ok", "result": "mine"}, parent=asked["msg_id"])
                assert await call == "mine"

    run(main)


def test_what_is_asked_over_control_is_answered_there_however_much_else_was_said() -> None:
    async def main() -> None:
        async with (
            running(zeromq=LISTENER) as home, Raw(home.info, routing_id=b"c") as shell,
            Raw(home.info, routing_id=b"c", channel="control") as control,
        ):  # fmt: skip
            control.session.session = shell.session.session
            assert (await shell.ask("attach_request"))["status"] == "ok"
            for at in range(1100):  # more than are remembered
                await control.send("cancel_request", {}, parent=f"none-{at}")
            assert (await control.ask("ping_request"))["status"] == "ok"
            assert (await control.ask("topic_key_request", {"endpoint": "data"}))["status"] == "ok"
            assert len(home.broker.router.sessions.by_id) == 2  # the door's own, which hears broadcasts, and this one

    run(main)


@pytest.mark.parametrize("kind", ["call_reply", "part", "credit", "progress", "ack", "cancel_request"])
def test_nobody_begins_with_words_about_what_was_said_before(kind: str) -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            before = len(home.broker.router.sessions.by_id)
            await raw.send(kind, {"status": "ok", "result": 1}, parent="1")
            await until(lambda: home.refused() == {"late": 1}, "it is counted")
            await raw.silence()
            assert home.door.peers == 0
            assert len(home.broker.router.sessions.by_id) == before

    run(main)


def test_an_error_at_one_first_message_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running() as home:
            monkeypatch.setattr(home.door.shell, "_open", _failing_once(home.door.shell._open))
            peers = [Raw(home.info) for _ in range(5)]
            ids = [await raw.send("ping_request") for raw in peers]
            tasks = [
                asyncio.create_task(raw.find("ping_reply", msg_id)) for raw, msg_id in zip(peers, ids, strict=True)
            ]
            await until(lambda: sum(task.done() for task in tasks) == 4, "all others are answered")
            for raw, task in zip(peers, tasks, strict=True):
                task.cancel()
                raw.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main)


def _failing_once(real: Any) -> Any:
    failed: list[int] = []

    def fail(*arguments: Any) -> Any:
        if not failed:
            failed.append(1)
            raise OSError("a descriptor that is gone")
        return real(*arguments)

    return fail


# ------------------------------------------------------------ what is said


@pytest.mark.parametrize(
    "content", [b'{"method":"x","method":"y"}', b'{"method":"x", "method":"y"}', b'{"method":"y","method":"x","m":1}']
)
def test_a_member_that_stands_twice_is_refused_whatever_its_size(content: bytes) -> None:
    with pytest.raises(MultipartError, match="twice"):
        Multipart("s").read([b'{"msg_id":"1","msg_type":"call_request"}', b"{}", b"{}", content])


def test_a_status_that_stands_twice_is_refused() -> None:
    with pytest.raises(MultipartError, match="twice"):
        Multipart("s").read(
            [b'{"msg_id":"1","msg_type":"call_reply"}', b'{"msg_id":"2"}', b"{}", b'{"status":"x","status":"ok"}']
        )


def test_null_members_of_an_attach_request_are_as_if_they_were_not_there() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            asked = {"endpoint": None, "role": None, "grace": None, "capacity": None, "resume": None}
            assert (await raw.ask("attach_request", asked))["status"] == "ok"
            assert "null" not in home.broker.router.registry.by_name
            assert not any(session.endpoint for session in home.broker.router.sessions.by_id.values())

    run(main)


def test_another_key_is_told_at_once_and_what_to_do() -> None:
    async def main() -> None:
        async with running() as home:
            place = home.url.rpartition("/")[0]
            async with asyncio.timeout(5):  # half of the time a client waits for an answer
                with pytest.raises(errors.CannotConnect, match=r"signed with another key.*connection file"):
                    await AsyncClient(f"{place}/another-key", reconnect=False).connect()
                with pytest.raises(errors.CannotConnect, match=r"not signed; give its key, tcp://ip:port/key"):
                    await AsyncClient(place, reconnect=False).connect()
            assert home.refused() == {"invalid_signature": 1, "unsigned": 1}
            await is_well(home)

    run(main)


@needs_linux
def test_row_21_a_plain_subscriber_that_never_reads_starves_no_other() -> None:
    """What waits for one in libzmq cannot be told from what waits for another, so that all wait for the slowest."""

    async def main() -> None:
        async with running(zeromq=LISTENER) as home, Raw(home.info) as raw, AsyncClient(home.url) as speaker:
            answer = await raw.ask("topic_key_request", {"endpoint": "data", "topic": "news"})
            topic = answer["result"]["topic"].encode()
            stuck = await speak(home.info.url("iopub"), b"SUB")
            stuck.writer.write(frame(b"\1" + topic))
            transport: Any = stuck.writer.transport
            transport.pause_reading()
            async with subscriber(home.info, topic) as listener:
                await until(lambda: len(home.door._publisher._subscribers) == 2, "both listen")  # type: ignore[union-attr]
                heard = after = 0
                async with asyncio.timeout(20):
                    while after < 5:
                        await speaker.publish("data", b"x" * 300_000, topic="news")
                        while await listener.poll(20):
                            await listener.recv_multipart()
                            heard += 1
                            after += home.door.counters.evicted
                assert heard > after
                assert home.door.counters.published_dropped
            stuck.close()

    run(main)


# ------------------------------------------------------------ who decides


@pytest.mark.parametrize("curve", [False, True])
def test_a_full_door_is_no_refusal_and_tried_again(curve: bool, tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    section: dict[str, Any] = {"peers_max": 1}
    pair = zmq.curve_keypair()
    if curve:
        section |= {"curve": True, "curve_key_file": str(tmp_path / "curve.key")}
        store.create("anna", ("caller",), ("data",), curve_key=pair[0])

    async def main() -> None:
        async with running(store, zeromq=section) as home:
            server_key = (home.info.curve_publickey or "").encode()
            keys = (server_key, *pair) if curve else None
            place = Place(home.info.url("shell"), home.info.key.encode(), home.info.signature_scheme, *(keys or ()))
            write_connection_file(tmp_path / "mine.json", own_file(home, place))
            raw = Raw(home.info, curve=keys)
            assert (await raw.ask("attach_request"))["status"] == "ok"
            with pytest.raises(errors.CannotConnect, match="as many connections as it takes"):
                await AsyncClient(str(tmp_path / "mine.json"), reconnect=False).connect()
            assert home.door.counters.handshakes["full"] > 0
            raw.close()
            await until(lambda: home.door.connections == 0, "there is room")
            async with AsyncClient(str(tmp_path / "mine.json")) as client:
                await client.call("broker.ping")

    run(main)


def own_file(home: Home, place: Place) -> ConnectionInfo:
    if not place.public_key:
        return home.info
    return msgspec.structs.replace(
        home.info, curve_serverkey=place.server_key.decode(), curve_publickey=place.public_key.decode(),
        curve_secretkey=place.secret_key.decode(),
    )  # fmt: skip


def test_who_cannot_be_judged_is_answered_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ waits for an answer, and every later connection behind it."""
    store = TokenStore(tmp_path / "tokens.json")
    section: dict[str, Any] = {"curve": True, "curve_key_file": str(tmp_path / "curve.key")}
    pair = zmq.curve_keypair()
    store.create("anna", ("caller",), ("data",), curve_key=pair[0])

    async def main() -> None:
        async with running(store, zeromq=section) as home:
            place = Place(
                home.info.url("shell"), home.info.key.encode(), home.info.signature_scheme,
                (home.info.curve_publickey or "").encode(), *pair,
            )  # fmt: skip
            write_connection_file(tmp_path / "mine.json", own_file(home, place))

            def fail(_: bytes) -> None:
                raise OSError("the file of the keys cannot be read")

            with monkeypatch.context() as patched:
                patched.setattr(home.door, "_holder", fail)
                with pytest.raises(errors.CannotConnect, match="as many connections as it takes"):
                    async with asyncio.timeout(5):
                        await AsyncClient(str(tmp_path / "mine.json"), reconnect=False).connect()
            assert home.door.counters.handshakes["failed"] == 1
            async with AsyncClient(str(tmp_path / "mine.json")) as client:
                await client.call("broker.ping")

    run(main)
