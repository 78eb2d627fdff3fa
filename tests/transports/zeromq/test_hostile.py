"""What is thrown at the ZeroMQ door, over real sockets: refused or bounded, counted, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from tornado.httpclient import AsyncHTTPClient

from broker.auth.connection_files import write_connection_file
from broker.auth.tokens import TokenStore
from broker.client.async_client import AsyncClient
from broker.config.errors import ConfigError
from broker.peer import errors
from broker.wire.connection_file import ConnectionInfo
from broker.worker.worker import Worker
from tests.transports.websocket.harness import ADMIN, CALLER
from tests.transports.zeromq.harness import Home, Raw, run, running, until

DELIMITER = b"<IDS|MSG>"


async def is_well(home: Home) -> None:
    """Somebody else is served as if nothing were."""
    async with Raw(home.info) as other:
        assert (await other.ask("ping_request"))["status"] == "ok"


def forge(raw: Raw, what: str) -> list[bytes]:
    """The frames of a message with one thing wrong."""
    frames = raw.session.serialize(raw.session.msg("ping_request", {}))
    delimiter, signature, *dicts = frames
    match what:
        case "wrong":
            return [delimiter, b"0" * 64, *dicts]
        case "missing":
            return [delimiter, b"", *dicts]
        case "upper case":
            return [delimiter, signature.upper(), *dicts]
        case "changed":
            return [delimiter, signature, *dicts[:3], b'{"more":1}']
        case "no delimiter":
            return frames[1:]
        case "five frames":
            return frames[:5]
        case "too many identities":
            return [b"x"] * 9 + frames
    raise AssertionError(what)


FORGED = {
    "wrong": "invalid_signature", "missing": "unsigned", "upper case": "invalid_signature",
    "changed": "invalid_signature", "no delimiter": "no_delimiter", "five frames": "malformed",
    "too many identities": "malformed",
}  # fmt: skip


@pytest.mark.parametrize("channel", ["shell", "control", "stdin"])
@pytest.mark.parametrize("what", FORGED)
def test_what_is_not_right_is_counted_and_never_answered(what: str, channel: str) -> None:
    if channel == "stdin" and what == "too many identities":
        pytest.skip("it takes any number there")

    async def main() -> None:
        async with running() as home, Raw(home.info, channel=channel) as raw:
            await raw.send_frames(*forge(raw, what))
            await until(lambda: home.refused() == {FORGED[what]: 1}, "it is counted")
            await raw.silence()
            await is_well(home)
            assert len(home.door.shell.peers) <= 1  # the one that asked just now

    run(main)


def test_row_08_a_message_that_is_said_again_is_refused() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw, Raw(home.info) as other:
            frames = raw.session.serialize(raw.session.msg("ping_request", {}))
            await raw.send_frames(*frames)
            assert (await raw.read())["content"]["status"] == "ok"
            await raw.send_frames(*frames)
            await other.send_frames(*frames)  # by whomever
            await until(lambda: home.refused() == {"duplicate_signature": 2}, "both are counted")
            await raw.silence()
            # A forgery that bears the signature of a genuine message does not block it.
            genuine = raw.session.serialize(raw.session.msg("ping_request", {}))
            await other.send_frames(*genuine[:5], b'{"forged":1}')
            await until(lambda: home.refused().get("invalid_signature") == 1, "the forgery is counted")
            await raw.send_frames(*genuine)
            assert (await raw.read())["content"]["status"] == "ok"

    run(main)


@pytest.mark.parametrize(
    "dicts",
    [(b"[]", b"{}", b"{}", b"{}"), (b'{"msg_id":1,"msg_type":"ping_request"}', b"{}", b"{}", b"{}"),
     (b"\xff", b"{}", b"{}", b"{}"), (b"[" * 100_000, b"{}", b"{}", b"{}")],
)  # fmt: skip
def test_well_signed_nonsense_ends_after_three_strikes(dicts: tuple[bytes, ...]) -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            assert (await raw.ask("attach_request"))["status"] == "ok"
            for at in range(3):
                frames = (*dicts[:2], b'{"at":%d}' % at, dicts[3])
                signature = hmac.new(home.info.key.encode(), b"".join(frames), hashlib.sha256).hexdigest()
                await raw.send_frames(DELIMITER, signature.encode(), *frames)
            assert (await raw.find("detach"))["content"]["code"] == 4400
            assert home.refused() == {"malformed": 3}
            await is_well(home)

    run(main)


def test_an_unknown_type_is_answered_and_counted() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            msg_id = await raw.send("comm_open", {"comm_id": "x"})
            content = (await raw.find("comm_open_reply", msg_id))["content"]
            assert content["data"]["outcome"] == "invalid"
            assert "comm_open" in content["data"]["detail"]
            assert home.refused() == {"unknown_type": 1}
            assert (await raw.ask("ping_request"))["status"] == "ok"

    run(main)


# ------------------------------------------------------------ who it is


def test_row_15_a_routing_id_stays_whose_it_is() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info, routing_id=b"worker-1") as victim:
            assert (await victim.ask("attach_request", {"endpoint": "data", "role": "worker"}))["status"] == "ok"
            async with Raw(home.info, routing_id=b"worker-1") as squatter, AsyncClient(home.url) as client:
                await squatter.send("attach_request", {"endpoint": "data", "role": "worker"})
                call = asyncio.create_task(client.call("data/read"))
                asked = await victim.find("call_request")
                await squatter.silence()
                await victim.send("call_reply", {"status": "ok", "result": "mine"}, parent=asked["msg_id"])
                assert await call == "mine"
                await squatter.silence()

    run(main)


class Curve:
    """A broker's keys, and those of people."""

    def __init__(self, folder: Path) -> None:
        self.store = TokenStore(folder / "tokens.json")
        self.section: dict[str, Any] = {"curve": True, "curve_key_file": str(folder / "curve.key")}
        self.folder = folder

    def pair(self, name: str = "", *roles: str) -> tuple[bytes, bytes]:
        """A new pair; allowed if it has a name."""
        public, secret = zmq.curve_keypair()
        if name:
            self.store.create(name, roles or ("caller", "worker"), ("data",), curve_key=public)
        return public, secret

    def file(self, home: Home, pair: tuple[bytes, bytes], server_key: str = "") -> str:
        """A client's connection file."""
        info = msgspec.structs.replace(
            home.info,
            curve_serverkey=server_key or home.info.curve_publickey,
            curve_publickey=pair[0].decode(), curve_secretkey=pair[1].decode(),
        )  # fmt: skip
        path = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        write_connection_file(path, info)
        return str(path)


def with_server(info: ConnectionInfo, pair: tuple[bytes, bytes]) -> tuple[bytes, bytes, bytes]:
    assert info.curve_publickey
    return info.curve_publickey.encode(), *pair


def test_row_15_identity_is_the_curve_key(tmp_path: Path) -> None:
    curve = Curve(tmp_path)

    async def main() -> None:
        async with running(curve.store, zeromq=curve.section) as home:
            anna, bert = (with_server(home.info, curve.pair(name)) for name in ("anna", "bert"))
            async with Raw(home.info, routing_id=b"w", curve=anna) as victim:
                assert (await victim.ask("attach_request", {"endpoint": "data", "role": "worker"}))["status"] == "ok"
                async with Raw(home.info, routing_id=b"w", curve=bert) as squatter:
                    await squatter.send("attach_request", {"endpoint": "data", "role": "worker"})
                    await until(lambda: home.door.counters.handshakes["curve"] == 2, "bert is in")
                    async with AsyncClient(curve.file(home, curve.pair("carl"))) as client:
                        call = asyncio.create_task(client.call("data/read"))
                        asked = await victim.find("call_request")
                        await squatter.silence()
                        await victim.send("call_reply", {"status": "ok", "result": 1}, parent=asked["msg_id"])
                        assert await call == 1
                names = {session.principal for session in home.broker.router.sessions.by_id.values()}
                assert "anna" in names
                assert "bert" not in names

    run(main)


def test_row_15_keys_nobody_knows_and_peers_without_one_stay_outside(tmp_path: Path) -> None:
    curve = Curve(tmp_path)

    async def main() -> None:
        async with running(curve.store, zeromq=curve.section) as home:
            with pytest.raises(errors.Refused, match="unknown key"):
                await AsyncClient(curve.file(home, curve.pair()), reconnect=False).connect()
            assert home.door.counters.handshakes["unknown_key"] == 1
            async with Raw(home.info) as plain:
                await plain.send("attach_request")
                handshakes = home.door.counters.handshakes
                await until(lambda: handshakes["failed"] + handshakes["timeout_or_garbage"] > 0, "NULL is refused")
                await plain.silence()
            with pytest.raises(errors.CannotConnect, match="CURVE on one side only"):
                await AsyncClient(home.url, reconnect=False).connect()
            elsewhere = zmq.curve_keypair()[0].decode()
            with pytest.raises(errors.CannotConnect):
                await AsyncClient(curve.file(home, curve.pair("dora"), elsewhere), reconnect=False).connect()
            assert home.door.counters.handshakes["null"] == 0
            assert home.door.peers == 0
            assert home.refused() == {}
            async with AsyncClient(curve.file(home, curve.pair("emil"))) as client:
                with pytest.raises(errors.Denied):
                    await client.call("elsewhere/read")

    run(main)


def test_a_revoked_key_ends_its_sessions(tmp_path: Path) -> None:
    curve = Curve(tmp_path)

    async def main() -> None:
        async with running(curve.store, zeromq=curve.section) as home:
            pair = curve.pair("anna")
            async with Raw(home.info, curve=with_server(home.info, pair)) as raw:
                assert (await raw.ask("attach_request"))["status"] == "ok"
                curve.store.revoke("anna")
                assert (await raw.find("detach"))["content"]["code"] == 4401
            with pytest.raises(errors.Refused):
                await AsyncClient(curve.file(home, pair), reconnect=False).connect()

    run(main)


def test_without_curve_the_door_opens_on_loopback_only() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match=r"zeromq\.curve = true"):
            async with running(zeromq={"host": "0.0.0.0"}):
                pass

    run(main)


def test_another_key_and_wrong_tokens_are_refused() -> None:
    async def main() -> None:
        async with running() as home:
            other = home.url.rpartition("/")[0] + "/another-key"
            client = AsyncClient(other, reconnect=False)
            connecting = asyncio.create_task(client.connect())
            await until(lambda: home.refused() == {"invalid_signature": 1}, "it is counted")
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await client.close()
            with pytest.raises(errors.Refused, match="not valid"):
                await AsyncClient(home.url, "no-such-token-0123456789abcdef0123456789", reconnect=False).connect()
            assert home.refused()["unauthorised"] == 1
            await is_well(home)

    run(main)


# ------------------------------------------------------------ what is no ZeroMQ, or too much of it


@pytest.mark.parametrize("channel", ["shell", "iopub", "stdin", "control", "hb"])
@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(range(256)) * 64,
        b"\xff" + b"\xff" * 8 + b"\x7f" + b"\x03" + b"\0" * 53,
    ],
    ids=["http", "garbage", "half a greeting"],
)
def test_what_is_no_zeromq_is_put_out(channel: str, said: bytes) -> None:
    async def main() -> None:
        async with running(limits={"header_timeout_s": 0.5}) as home:
            host, _, port = home.info.url(channel).removeprefix("tcp://").rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            try:
                async with asyncio.timeout(10):
                    while await reader.read(4096):
                        pass
            except ConnectionError:
                pass
            writer.close()
            await until(lambda: home.door.connections == 0, "nothing is left of it")
            await is_well(home)

    run(main)


def test_row_16_a_message_above_the_bound_ends_its_connection() -> None:
    async def main() -> None:
        async with running(limits={"message_max_bytes": 100_000}) as home, Raw(home.info) as raw:
            assert (await raw.ask("attach_request"))["status"] == "ok"
            sessions = home.broker.router.sessions.by_id
            before = len(sessions)
            await raw.send("call_request", {"method": "data/read"}, buffers=(bytes(200_000),))
            await until(lambda: len(sessions) == before - 1, "its session is gone")
            await is_well(home)

    run(main)


def test_row_21_a_peer_that_never_reads_loses_broadcasts_then_its_link() -> None:
    limits = {"outbox_soft_bytes": 262_144, "outbox_hard_bytes": 1_048_576, "stall_s": 1.0}

    async def main() -> None:
        async with running(limits=limits) as home:
            stuck = Raw(home.info)
            stuck.socket.rcvhwm = 1
            stuck.socket.rcvbuf = 4096
            stuck.socket.disconnect(home.info.url("shell"))
            stuck.socket.connect(home.info.url("shell"))
            async with AsyncClient(home.url) as speaker, AsyncClient(home.url) as hearer:
                heard = await hearer.subscribe("data", topic="news")
                await stuck.send("subscribe_request", {"endpoint": "data", "topic": "news"})
                await until(lambda: len(home.door.shell.peers) == 3, "it is in")
                links = home.broker.links.counters
                async with asyncio.timeout(20):
                    while not links.slow_closes:
                        await speaker.publish("data", b"x" * 200_000, topic="news")
                        assert (await heard.get(10)).data == b"x" * 200_000
                assert links.broadcasts_dropped
                assert (await speaker.call("broker.ping")) is not None
            stuck.close()
            await until(lambda: home.door.peers == 0, "nobody is left")

    run(main)


def test_peers_beyond_the_bound_are_told_so() -> None:
    async def main() -> None:
        async with running(zeromq={"peers_max": 2}) as home, Raw(home.info) as one, Raw(home.info) as two:
            for each in (one, two):
                assert (await each.ask("attach_request"))["status"] == "ok"
            async with Raw(home.info) as third:
                await third.send("attach_request")
                refused = home.door.counters
                await until(lambda: refused.refused["busy"] + refused.handshakes["full"] > 0, "it is counted")
            assert (await one.ask("ping_request"))["status"] == "ok"

    run(main)


def test_silent_connections_give_way_beyond_their_bound() -> None:
    async def main() -> None:
        async with running(limits={"unauthenticated_max": 5}) as home, Raw(home.info) as known:
            assert (await known.ask("ping_request"))["status"] == "ok"
            silent = [Raw(home.info) for _ in range(8)]
            await until(lambda: home.door.counters.evicted >= 3, "the oldest went")
            assert (await known.ask("ping_request"))["status"] == "ok"
            for each in silent:
                each.close()

    run(main)


# ------------------------------------------------------------ faults

WORKER = """
import asyncio, sys
from broker.worker.worker import Worker
async def hang(): print("begun", flush=True); await asyncio.sleep(60)
async def main():
    worker = Worker("data", sys.argv[1]); worker.add(hang)
    await worker.start(); print("ready", flush=True); await asyncio.sleep(60)
asyncio.run(main())
"""


def test_fault_01_a_killed_zeromq_worker_ends_its_requests_within_moments() -> None:
    async def main() -> None:
        async with running() as home, AsyncClient(home.url) as client:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", WORKER, home.url, stdout=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
            calls = [asyncio.create_task(client.call("data/hang")) for _ in range(10)]
            assert await process.stdout.readline() == b"begun\n"
            await until(lambda: home.counters.attempts == 10, "it has them all")
            process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(5):
                for ended in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(ended, errors.WorkerLost)
            await process.wait()
            assert home.counters.ended["worker_lost"] == 10
            assert home.broker.router.pending.count == 0

    run(main)


def test_a_broker_that_starts_again_finds_its_peers(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef")
    (tmp_path / "key").chmod(0o600)

    async def main() -> None:
        section: dict[str, Any] = {"key_file": str(tmp_path / "key")}
        async with running(zeromq=section) as home:
            info, url = home.info, home.url
            section |= {f"{name}_port": getattr(info, f"{name}_port")
                        for name in ("shell", "iopub", "stdin", "control", "hb")}  # fmt: skip
            worker = Worker("data", url)
            worker.add(lambda: "served", name="read")
            client = AsyncClient(url)
            await worker.start()
            await client.connect()
            heard = await client.subscribe("data", topic="news")
            assert await client.call("data/read") == "served"
        async with running(zeromq=section) as home:
            await until(lambda: home.door.peers == 2, "both are back")
            assert await client.call("data/read", timeout=20) == "served"
            await client.publish("data", 1, topic="news")
            assert (await heard.get(10)).data == 1
            await client.close()
            await worker.stop(now=True)

    run(main)


def test_a_session_is_taken_up_again_and_misses_nothing() -> None:
    async def main() -> None:
        async with running() as home:
            go_on = asyncio.Event()

            async def read() -> str:
                await go_on.wait()
                return "late"

            worker = Worker("data", home.url)
            worker.add(read)
            await worker.start()
            async with AsyncClient(home.url, grace=20) as client:
                call = asyncio.create_task(client.call("data/read"))
                await until(lambda: home.counters.attempts == 1, "the worker has it")
                peers = home.door.peers
                client._connection._link.abort()  # type: ignore[union-attr]
                go_on.set()
                assert await call == "late"
                assert home.counters.attempts == 1  # it was executed once
                assert home.door.peers == peers
            await worker.stop(now=True)

    run(main)


def test_nothing_is_left_of_a_door_that_closes() -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    async def once() -> None:
        async with running() as home, AsyncClient(home.url) as client, Raw(home.info):
            await client.call("broker.ping")

    async def main() -> None:
        await once()  # what is made once per process
        before, threads = held(), threading.active_count()
        for _ in range(3):
            await once()
        await until(lambda: held() <= before, f"{before} descriptors and threads again")
        assert threading.active_count() == threads

    run(main)


def test_a_broker_that_stops_tells_its_peers() -> None:
    async def main() -> None:
        async with running() as home:
            raw = Raw(home.info)
            assert (await raw.ask("attach_request"))["status"] == "ok"
        async with raw:
            assert (await raw.find("detach"))["content"]["code"] == 4412

    run(main)


def test_a_token_in_the_first_message_goes_before_the_key() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            asked = {"endpoint": "data", "role": "worker"}
            assert (await raw.ask("attach_request", asked, metadata={"token": CALLER}))["code"] == 403

    run(main)


def test_the_figures_tell_what_was_refused() -> None:
    async def main() -> None:
        async with running() as home, Raw(home.info) as raw:
            await raw.send_frames(*forge(raw, "wrong"))
            await until(lambda: home.refused() == {"invalid_signature": 1}, "it is counted")
            await is_well(home)
            got = await AsyncHTTPClient().fetch(
                f"{home.broker.url}/metrics", headers={"Authorization": f"Bearer {ADMIN}"}
            )
            said = got.body.decode()
            assert 'broker_zeromq_refused_total{cause="invalid_signature"} 1.0' in said
            assert 'broker_zeromq_handshakes_total{result="null"} 2.0' in said
            assert "broker_zeromq_connections" in said

    run(main)
