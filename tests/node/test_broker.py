"""The broker as an object in any process: start, stop, side by side, reload."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref

import msgspec
import pytest
from tornado.httpclient import AsyncHTTPClient

from broker.config.errors import ConfigError
from broker.config.model import Config
from broker.node.broker import FIXED_LIMITS, Broker, ReloadError
from tests.transports.websocket.harness import ADMIN, PRINCIPALS, config, run, serving, until


def changed(settings: Config, section: str, **values: object) -> Config:
    part = msgspec.structs.replace(getattr(settings, section), **values)
    return msgspec.structs.replace(settings, **{section: part})


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_stop_leaves_nothing_behind(loop: str) -> None:
    async def main() -> None:
        broker = Broker(config(), fixed=PRINCIPALS)
        await broker.start()
        url = await broker.listen()
        assert url == f"http://127.0.0.1:{broker.port}"
        await broker.stop()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", broker.port)
        with socket.socket() as again:  # the port is free at once
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", broker.port))
        gone = weakref.ref(broker)
        del broker
        await asyncio.sleep(0.01)
        gc.collect()
        assert gone() is None, "no timer, callback or table holds it"

    run(main, loop)


def test_stop_ends_what_is_in_flight_and_tells_everybody() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            wire_id = await caller.ask("m")
            await worker.taken()
            stopping = asyncio.create_task(world.broker.stop())
            reply = await caller.reply(wire_id)
            assert reply["error"]["data"]["outcome"] == "shutting_down"
            assert (await caller.closed())[0] == 4412
            assert (await worker.closed())[0] == 4412
            await stopping
            assert world.books_balance()

    run(main)


def test_it_can_be_used_without_listening() -> None:
    async def main() -> None:
        async with Broker() as broker:
            assert {"/ws", "/metrics"} <= {route.matcher._path for route in broker.routes()}  # type: ignore[attr-defined]
            prefixed = {route.matcher._path for route in broker.routes("/lab")}  # type: ignore[attr-defined]
            assert "/lab/ws" in prefixed
            assert all(path.startswith("/lab") for path in prefixed)

    run(main)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tornado leaves the socket unclosed
def test_an_address_that_cannot_be_had_is_an_os_error() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            async with Broker(config(server={"port": taken.getsockname()[1]})) as broker:
                with pytest.raises(OSError, match="in use"):
                    await broker.listen()

    run(main)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("server", {"port": 1}, "server.port"),
        ("server", {"host": "localhost"}, "server.host"),
        ("auth", {"ticket_s": 5.0}, "auth"),
        ("log", {"format": "json"}, "log.format"),
        ("server", {"tls_certificate": "x.pem", "tls_key": "x.key"}, "server.tls_certificate"),
        *[("limits", {key: getattr(Config().limits, key) + 1}, f"limits.{key}") for key in FIXED_LIMITS],
    ],
)
def test_what_needs_a_restart_is_refused_whole(section: str, values: dict[str, object], named: str) -> None:
    async def main() -> None:
        async with serving() as world:
            broker = world.broker
            before = broker.config
            wanted = changed(changed(before, section, **values), "limits", **(
                {"queue_max": 7} | (values if section == "limits" else {})
            ))  # fmt: skip
            with pytest.raises(ReloadError, match=named):
                broker.reload(wanted)
            assert broker.config is before
            assert broker.router.limits.queue_max == 1000

    run(main)


def test_a_bound_no_link_could_work_with_is_refused_whole() -> None:
    async def main() -> None:
        async with serving() as world:
            wanted = changed(world.broker.config, "limits", write_turn_bytes=4096, queue_max=7)
            with pytest.raises(ConfigError, match="write_turn_bytes"):
                world.broker.reload(wanted)
            assert world.broker.router.limits.queue_max == 1000

    run(main)


def test_a_reload_holds_for_what_comes_from_now_on() -> None:
    async def main() -> None:
        async with serving() as world:
            old = await world.peer("/ws/lab")
            wanted = changed(
                world.broker.config, "limits", sessions_max=2, batch_max=1, message_max_bytes=65_536, queue_max=0
            )
            wanted = changed(wanted, "server", allowed_origins=("http://page.example",))
            wanted = msgspec.structs.replace(wanted, endpoints=msgspec.convert({"shut": {"closed": "x"}}, dict))
            wanted = msgspec.convert(msgspec.to_builtins(wanted), Config)
            world.broker.reload(wanted)
            new = await world.peer("/ws/lab", headers={"Origin": "http://page.example"})
            await new.send([{"jsonrpc": "2.0", "id": n, "method": "broker.ping"} for n in range(2)])
            assert "at most 1" in (await new.read())["error"]["data"]["detail"]
            reply = await new.call("m", meta={"wait": True})
            assert reply["error"]["data"]["bound"] == "queue"
            from websockets.exceptions import InvalidStatus

            with pytest.raises(InvalidStatus) as refused:
                await world.peer("/ws")
            assert refused.value.response.status_code == 503
            assert (await world.http("/call/lab/m", method="POST")).code == 503
            await old.sync()
            await old.socket.close()
            await until(lambda: len(world.broker.router.sessions) == 1, "one has left")
            shut = await world.peer("/ws/shut")
            assert (await shut.closed())[0] == 4404
            await until(lambda: len(world.broker.router.sessions) == 1, "it has left")
            large = AsyncHTTPClient(force_instance=True)
            headers = {"Authorization": f"Bearer {ADMIN}"}
            url = world.broker.url + "/call/lab/m"
            answer = await large.fetch(url, method="POST", body=b"1" * 65_537, headers=headers, raise_error=False)
            large.close()
            assert answer.code == 413

    run(main)


def test_the_admin_token_of_the_configuration_opens_everything() -> None:
    async def main() -> None:
        token = "configured-admin-token-0123456789abcdef"
        async with serving(config(auth={"admin_token": token})) as world:
            peer = await world.peer("/ws", token)
            assert "result" in await peer.call("broker.admin.peers")
            assert token not in repr(await peer.call("broker.admin.peers"))
            assert token != ADMIN

    run(main)


def test_turning_peers_away_is_an_error_in_the_log_only_if_the_broker_does_not_drain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with serving() as world:
            client = AsyncHTTPClient(force_instance=True)
            worker, caller = await world.worker(), await world.caller()
            await caller.ask("m")
            await worker.taken()
            draining = asyncio.create_task(world.broker.drain(30))
            await until(lambda: world.broker.router.draining, "it drains")
            answer = await client.fetch(f"{world.broker.url}/readyz", raise_error=False)
            assert answer.code == 503
            draining.cancel()
            client.close()

    with caplog.at_level("INFO", "tornado.access"):
        run(main)
    (line,) = [record for record in caplog.records if "/readyz" in record.getMessage()]
    assert (line.levelname, line.getMessage()[:18]) == ("INFO", "503 GET /readyz (1")
