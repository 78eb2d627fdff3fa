"""A daemon's whole story: it logs in, connects, answers small and large, many at once, is cut off and comes back."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import ssl
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.transports.rtcloud.peer import SLICES_PER_TURN
from broker.wire.rtcloud import Result
from tests.daemon.process import self_signed
from tests.transports.http.harness import ask
from tests.transports.rtcloud.daemon import Daemon
from tests.transports.rtcloud.harness import hand, rt_config, rt_serving
from tests.transports.websocket.harness import ADMIN, World, head, run, until

LARGE = random.Random(3).randbytes(25 << 20)


class DataInterface:
    """What a scanner's daemon has."""

    allowed = ("dcm", "txt")

    def __init__(self) -> None:
        self.put: tuple[str, bytes] | None = None

    def getFile(self, path: str) -> bytes:
        return b"" if path == "empty" else b"the bytes of " + path.encode()

    def getImage(self, size: int = 25 << 20) -> bytes:
        return LARGE[:size]

    def putFile(self, path: str, data: bytes) -> None:
        self.put = path, data

    def listFiles(self, pattern: str, *, deep: bool = False) -> list[str]:
        return [pattern, str(deep)]

    def numbers(self, count: int) -> list[int]:
        return list(range(count))

    def isThere(self, path: str) -> bool:
        return path == "a"

    def what(self) -> object:
        return 1j


async def here(world: World, endpoint: str = "data", count: int = 1) -> None:
    def serve() -> bool:
        known = world.broker.router.registry.by_name.get(endpoint)
        return known is not None and len(known.registrations) == count

    await until(serve, f"{count} daemons serve {endpoint}")


def test_a_daemons_class_as_a_remote_object() -> None:
    async def main() -> None:
        data = DataInterface()
        async with (
            rt_serving() as world,
            Daemon(world.broker.url, {"DataInterface": data}) as daemon,
            AsyncClient(world.broker) as client,
        ):
            await here(world)
            remote = client.remote("data", "DataInterface", timeout=10)
            assert await remote.getFile("a.dcm") == b"the bytes of a.dcm"
            assert await remote.getFile(path="b") == b"the bytes of b"
            assert await remote.listFiles("*", deep=True) == ["*", "True"]
            assert await remote.putFile("x", b"\x00\xff") is None
            assert data.put == ("x", b"\x00\xff")
            assert daemon.seen[-1]["encodedByteArgs"] == [1]
            assert await remote.allowed() == ["dcm", "txt"]
            assert await remote.getImage(3 << 20) == LARGE[: 3 << 20], "its parts are put together"
            stream = await remote.getImage.stream()
            asked = await client.stream("data/DataInterface.getImage", [])
            assert [part async for part in stream] == [part async for part in asked]
            assert stream.result == asked.result == LARGE
            assert not hasattr(remote, "_repr_html_")
            whole = await client.remote("data")
            assert await whole.DataInterface.getFile("c") == b"the bytes of c"
            with pytest.raises(errors.RemoteError, match="class Other is not registered"):
                await whole.Other.getFile("c")

    run(main)


@pytest.mark.parametrize("tls", [False, True], ids=["http", "tls"])
def test_the_story_of_a_daemon(tls: bool, tmp_path: Path) -> None:
    async def main() -> None:
        settings, context = rt_config(), None
        if tls:
            certificate, key = self_signed(tmp_path)
            settings = rt_config(server={"tls_certificate": str(certificate), "tls_key": str(key)})
            context = ssl.create_default_context(cafile=str(certificate))
        data = DataInterface()
        async with rt_serving(settings) as world:
            url = world.broker.url.replace("127.0.0.1", "localhost") if tls else world.broker.url
            daemon = Daemon(url, {"DataInterface": data}, context=context, ping_every_s=0.3)
            async with daemon, AsyncClient(url, token=ADMIN, ssl_context=context) as client:
                await here(world)
                call = client.call
                assert await call("data/DataInterface.getFile", ["a.dcm"]) == b"the bytes of a.dcm"
                assert await call("data/DataInterface.getFile", {"args": ["b"], "kwargs": {}}) == b"the bytes of b"
                assert await call("data/DataInterface.listFiles", {"args": ["*"], "kwargs": {"deep": True}}) == [
                    "*",
                    "True",
                ]
                assert await call("data/DataInterface.getFile", {"path": "c"}) == b"the bytes of c"
                assert await call("data/DataInterface.allowed") == ["dcm", "txt"]
                assert await call("data/DataInterface.putFile", ["x", b"\x00\xff"]) is None
                assert data.put == ("x", b"\x00\xff")
                assert await call("data/DataInterface.isThere", ["a"]) is True
                assert await call("data/DataInterface.isThere", ["b"]) is False
                assert isinstance((await call("data/DataInterface.what"))["$pickle"], bytes)
                with pytest.raises(errors.RemoteError, match=r"RPC Exception: rpc: .*noMethod"):
                    await call("data/DataInterface.noMethod")
                assert bytes(await call("data/DataInterface.getImage")) == LARGE
                assert daemon.seen[-1]["attribute"] == "getImage"
                many = await asyncio.gather(*[call("data/DataInterface.getFile", [str(n)]) for n in range(50)])
                assert many == [b"the bytes of %d" % n for n in range(50)]
                assert daemon.socket is not None
                daemon.socket.transport.abort()
                await until(lambda: daemon.connections == 2, "it has come back")
                await here(world)
                assert await call("data/DataInterface.getFile", ["again"]) == b"the bytes of again"
                assert daemon.closes == [(1006, "")]
                assert not len(world.broker.call_ids)
                assert world.counters.malformed == world.counters.foreign_replies == world.counters.late_replies == 0

    run(main)


def test_callers_of_every_dialect_get_bytes() -> None:
    async def main() -> None:
        async with rt_serving() as world, Daemon(world.broker.url, {"DataInterface": DataInterface()}):
            await here(world)
            params = {"args": ["f"], "kwargs": {}}
            binary = await world.caller("data", "binary=1&listen=0")
            message, attachments = await binary.call("DataInterface.getFile", params)
            assert message["result"] == {"$buffer": 0} and attachments == [b"the bytes of f"]
            text = await world.caller("data")
            assert (await text.call("DataInterface.getFile", params))["result"] == {"$base64": "dGhlIGJ5dGVzIG9mIGY="}
            octets = {"Accept": "application/octet-stream"}
            answer = await ask(world, "/call/data/DataInterface.getFile", params, headers=octets)
            assert (answer.status, answer.body) == (200, b"the bytes of f")
            answer = await ask(world, "/call/data/DataInterface.getImage", {"size": 12 << 20}, headers=octets)
            assert answer.status == 200 and answer.headers["transfer-encoding"] == "chunked"
            async with AsyncClient(world.broker.url, token=ADMIN) as client:
                assert await client.call("data/DataInterface.getFile", params) == b"the bytes of f"
                large = await client.call("data/DataInterface.numbers", [2_500_000])  # 20 MB of JSON, in two parts
                assert large == list(range(2_500_000))

    run(main)


def test_a_caller_without_parts_gets_what_fits_one_message() -> None:
    async def main() -> None:
        async with rt_serving() as world, Daemon(world.broker.url, {"DataInterface": DataInterface()}):
            await here(world)
            caller = await world.caller("data", "binary=1&listen=0")
            message, attachments = await caller.call("DataInterface.getImage", [12 << 20])
            assert message["result"] == {"$buffer": 0} and attachments[0] == LARGE[: 12 << 20]
            reply = await caller.call("DataInterface.getImage", [])
            assert reply["error"]["data"]["outcome"] == "too_large" and "stream: in" in reply["error"]["data"]["detail"]

    run(main)


def test_it_is_known_as_what_it_is() -> None:
    async def main() -> None:
        async with rt_serving() as world, Daemon(world.broker.url, {}, path="/wsSubject"):
            await here(world, "subject")
            peer = await world.peer()
            (worker,) = (await peer.call("broker.describe", {"endpoint": "subject"}))["result"]["workers"]
            assert worker["info"] == {"dialect": "rtcloud"} and worker["methods"] is None
            peers = (await peer.call("broker.admin.peers"))["result"]
            assert [each["principal"] for each in peers if each["dialect"] == "rtcloud"] == ["test"]

    run(main)


def test_pongs_come_in_time_however_busy_the_broker() -> None:
    """Four daemons that ping ten times a second and leave after one second without a pong, beside a flood of images."""

    async def main() -> None:
        async with rt_serving() as world:
            daemons = [Daemon(world.broker.url, {"D": DataInterface()}, ping_every_s=0.1) for _ in range(4)]
            for daemon in daemons:
                await daemon.__aenter__()
            await here(world, count=4)
            async with AsyncClient(world.broker.url, token=ADMIN) as client:
                ends_at = time.monotonic() + 3

                async def flood() -> int:
                    count = 0
                    while time.monotonic() < ends_at:
                        image = await client.call("data/D.getImage", [11 << 20], timeout=30)
                        assert len(image) == 11 << 20
                        count += 1
                    return count

                async def small() -> int:
                    count = 0
                    while time.monotonic() < ends_at:
                        await asyncio.gather(*[client.call("data/D.getFile", ["x"]) for _ in range(100)])
                        count += 100
                    return count

                images, files = sum(await asyncio.gather(flood(), flood())), await small()
                assert images >= 2 and files >= 0
            assert [daemon.connections for daemon in daemons] == [1] * 4, [daemon.closes for daemon in daemons]
            for daemon in daemons:
                await daemon.__aexit__()

    run(main)


def test_a_large_request_does_not_cost_the_daemon_its_pong() -> None:
    async def main() -> None:
        data = DataInterface()
        async with rt_serving() as world:
            daemon = Daemon(world.broker.url, {"D": data}, ping_every_s=0.05)
            async with daemon, AsyncClient(world.broker.url, token=ADMIN) as client:
                await here(world)
                for _ in range(5):
                    await client.call("data/D.putFile", ["x", LARGE[: 11 << 20]])
                assert data.put == ("x", LARGE[: 11 << 20])
                assert daemon.connections == 1
                assert world.broker.links.counters.pongs_dropped == 0

    run(main)


def test_a_large_file_flows_through_flat_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 MiB in parts of 1 MiB to a reader that takes them as they come: never more than a few parts are held."""

    async def main() -> None:
        whole = LARGE
        monkeypatch.setattr("broker.transports.rtcloud.peer.HELD_SOFT_BYTES", 4 << 20)

        class Big:
            def get(self) -> bytes:
                return whole

        async with rt_serving() as world:
            most = 0
            count = world.broker.links.count

            def counted(size: int) -> None:
                nonlocal most
                count(size)
                most = max(most, world.broker.router.state.budget.outboxes)

            monkeypatch.setattr(type(world.broker.links), "count", lambda _, size: counted(size))
            monkeypatch.setattr("tests.transports.rtcloud.daemon.COMPRESS_ABOVE_BYTES", 1 << 40)
            async with Daemon(world.broker.url, {"Big": Big()}, part_bytes=1 << 20):
                await here(world)
                from tests.transports.http.test_streams import asking, reading

                octets = {"Accept": "application/octet-stream"}
                async with asking(world, "/call/data/Big.get", b"[]", octets, ADMIN) as connection:
                    reader = await reading(connection)
                    at = 0
                    while chunk := await reader.chunk():
                        assert whole[at : at + len(chunk)] == chunk
                        at += len(chunk)
                    assert at == len(whole)
            assert 0 < most < 12 << 20

    run(main)


def test_what_was_packed_small_is_unpacked_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        turn, steps = 0, Counter[int]()
        step = Result.step

        def counted(result: Result) -> Any:
            steps[turn] += 1
            return step(result)

        async def turning() -> None:
            nonlocal turn
            while True:
                turn += 1
                await asyncio.sleep(0)

        monkeypatch.setattr(Result, "step", counted)
        async with rt_serving() as world, hand(world) as daemon, AsyncClient(world.broker.url, token=ADMIN) as client:
            counting = asyncio.create_task(turning())
            asking = asyncio.create_task(client.call("data/D.zeros"))
            call_id = (await daemon.asked())["callId"]
            size = 8 << 20
            packed = base64.b64encode(zlib.compress(bytes(size), 9)).decode()
            told = {"status": 200, "dataSerialization": "bytes", "dataSize": size, "compressed": True}
            await daemon.say(told | {"callId": call_id, "data": packed})
            assert bytes(await asking) == bytes(size)
            counting.cancel()
        assert sum(steps.values()) > 30 and max(steps.values()) <= 2 * SLICES_PER_TURN

    run(main)


def test_a_slow_reader_delays_nobody_and_ends_when_too_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """One caller takes nothing of 25 MiB and then of another; others are served, and the daemon keeps its pongs."""

    async def main() -> None:
        monkeypatch.setattr("broker.transports.rtcloud.peer.HELD_SOFT_BYTES", 2 << 20)
        monkeypatch.setattr("broker.transports.rtcloud.peer.HELD_MAX_BYTES", 12 << 20)
        monkeypatch.setattr("broker.transports.rtcloud.peer.READ_ON_S", 1000.0)
        monkeypatch.setattr("tests.transports.rtcloud.daemon.COMPRESS_ABOVE_BYTES", 1 << 40)
        async with rt_serving() as world:
            daemon = Daemon(world.broker.url, {"D": DataInterface()}, part_bytes=1 << 20)
            async with daemon, AsyncClient(world.broker.url, token=ADMIN) as client:
                await here(world)
                slow = await world.caller("data", "stream=in&binary=1&listen=0")
                wire_id = await slow.ask("D.getImage", [10 << 20])
                (link,) = [each for each in world.broker.links.links if each.remote == client_of(world)]
                await until(lambda: link.paused, "nothing more is read")
                # Somebody else asks: it is read again at once, up to the hard bound.
                assert await client.call("data/D.getFile", ["x"]) == b"the bytes of x"
                monkeypatch.setattr("broker.transports.rtcloud.peer.READ_ON_S", 0.0)  # as if the next ping were due
                await slow.ask("D.getImage", [25 << 20])
                for _ in range(5):
                    assert await client.call("data/D.getFile", ["x"]) == b"the bytes of x"
                ended = await slow.find(lambda m: "error" in head(m))
                assert ended["error"]["data"]["outcome"] == "slow_consumer"
                assert "cannot be told to wait" in ended["error"]["data"]["detail"]
                assert daemon.connections == 1
                await slow.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": wire_id}})
                await until(lambda: world.broker.router.state.budget.outboxes == 0, "nothing is held any more")
                assert world.books_balance() and not len(world.broker.call_ids)

    run(main)


def client_of(world: World) -> str:
    (session,) = [each for each in world.broker.router.sessions.by_id.values() if each.dialect == "rtcloud"]
    return str(session.remote)


def test_what_is_not_read_is_read_before_the_next_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("broker.transports.rtcloud.peer.HELD_SOFT_BYTES", 1 << 20)
        monkeypatch.setattr("broker.transports.rtcloud.peer.READ_ON_S", 0.4)
        async with rt_serving() as world:
            daemon = Daemon(world.broker.url, {"D": DataInterface()}, ping_every_s=0.5, part_bytes=1 << 20)
            async with daemon:
                await here(world)
                slow = await world.caller("data", "stream=in&binary=1&listen=0")
                wire_id = await slow.ask("D.getImage", [20 << 20])
                (link,) = [each for each in world.broker.links.links if each.remote == client_of(world)]
                pings = []
                for _ in range(4):
                    before = link.pinged_at
                    await until(lambda before=before: link.pinged_at > before, "a ping was read")
                    pings.append(link.pinged_at)
                assert daemon.connections == 1 and len(set(pings)) == 4
                upto, got, last = 4, bytearray(), None
                while last is None:
                    message = await slow.read()
                    if head(message).get("method") == "$/part":
                        got += message[1][0]
                        upto += 1
                        await slow.send(
                            {"jsonrpc": "2.0", "method": "$/credit", "params": {"id": wire_id, "upto": upto}}
                        )
                    else:
                        last = message
                assert head(last)["result"]["$joined"]["bytes"] == len(got) and got.endswith(LARGE[: 20 << 20])

    run(main)


def test_notifications_reach_a_daemon() -> None:
    async def main() -> None:
        data = DataInterface()
        async with rt_serving() as world, Daemon(world.broker.url, {"D": data}):
            await here(world)
            caller = await world.caller("data")
            await caller.send({"jsonrpc": "2.0", "method": "D.putFile", "params": ["x", {"$base64": "AP8="}]})
            await until(lambda: data.put == ("x", b"\x00\xff"), "it was done")
            await until(lambda: world.counters.late_replies == 1, "its answer is for nobody")

    run(main)


def test_a_call_that_cannot_be_said_ends_at_once() -> None:
    async def main() -> None:
        async with rt_serving() as world, Daemon(world.broker.url, {}) as daemon:
            await here(world)
            caller = await world.caller("data", "binary=1&listen=0")
            reply = await caller.call("nodot", [])
            assert reply["error"]["code"] == -32602 and "Class.attribute" in reply["error"]["message"]
            assert reply["error"]["message"].startswith("the daemon was not asked: ")
            reply = await caller.call("D.m", [], meta={"stream": "out"})
            assert "no parts" in reply["error"]["message"]
            assert daemon.seen == [] and world.books_balance()
            assert json.dumps(reply)

    run(main)
