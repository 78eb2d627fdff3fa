"""A connection against real brokers: how it comes back, when it does not, and what it leaves behind: nothing."""

import asyncio
import gc
import ssl
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.echo import self_signed
from broker.links.loop import LoopLinks
from broker.peer.connection import Connection, websocket_url
from broker.peer.errors import BrokerError, CannotConnect, ConnectionLost, DeadlineExceeded, InvalidRequest, Refused
from broker.peer.session import Asked, Heard, Options
from tests.links.harness import Recorder, serving
from tests.peer.harness import SECRET, broker_running, run, until


class Owner:
    def __init__(self) -> None:
        self.ups: list[bool] = []
        self.end: list[BrokerError] = []
        self.refused: list[tuple[tuple[str, ...], BrokerError]] = []

    def asked(self, request: Asked) -> None: ...

    def cancel_asked(self, number: int | str) -> None: ...

    def heard(self, broadcast: Heard) -> None: ...

    def item(self, number: int | str, value: Any) -> None: ...

    def items_ended(self, number: int | str) -> None: ...

    def link_changed(self, up: bool, why: str) -> None:
        self.ups.append(up)

    def standing_refused(self, key: tuple[str, ...], error: BrokerError) -> None:
        self.refused.append((key, error))

    def gave_up(self, error: BrokerError) -> None:
        self.end.append(error)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:1", "ws://127.0.0.1:1/ws?binary=1&meta=1&stream=in"),
        ("https://host/", "wss://host/ws?binary=1&meta=1&stream=in"),
        ("wss://host/prefix", "wss://host/prefix/ws?binary=1&meta=1&stream=in"),
        ("ws://host/prefix/ws", "ws://host/prefix/ws?binary=1&meta=1&stream=in"),
        ("host:80", "ws://host:80/ws?binary=1&meta=1&stream=in"),
        ("[::1]:80", "ws://[::1]:80/ws?binary=1&meta=1&stream=in"),
    ],
)
def test_the_websocket_of_a_url(url: str, expected: str) -> None:
    assert websocket_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "", "ftp://x", "http://", "http://x/?token=secret", "http://name:secret@x/", "http://[", "http://[::1",
        "http://x:99999", "http://x:0", "http://x:port", "ftp://name:secret@x", "http://[?token=secret",
    ],
)  # fmt: skip
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="URL of a broker") as caught:
        websocket_url(url)
    assert "secret" not in str(caught.value)


def test_a_token_that_no_header_may_hold_is_named() -> None:
    async def main() -> None:
        connection = Connection(lambda: ("http://127.0.0.1:1", "from a file\r"), Owner())
        with pytest.raises(InvalidRequest, match="the token holds line breaks"):
            await connection.open()
        await connection.close()

    run(main)


def test_a_new_token_is_taken_when_the_broker_has_a_new_one() -> None:
    async def main() -> None:
        owner, token = Owner(), SECRET
        async with broker_running() as broker:
            port, url = broker.port, broker.url
            connection = Connection(lambda: (url, token), owner)
            await connection.open()
        token = "n" * 43
        async with broker_running(port) as broker:
            broker.authenticator._fixed.clear()
            refused = asyncio.create_task(until(lambda: owner.end, "it gave up"))
            await refused
            assert isinstance(owner.end[0], Refused)
            with pytest.raises(ConnectionLost, match="does not let us in"):
                connection.ask("data/read")
        await connection.close()

    run(main)


def test_a_place_that_is_not_known_yet_is_asked_for_again() -> None:
    async def main() -> None:
        owner, places = Owner(), []
        async with broker_running() as broker:

            def target() -> tuple[str, str]:
                places.append(1)
                if len(places) < 4:
                    raise ConnectionError("no broker of yours runs here")
                return broker.url, SECRET

            connection = Connection(target, owner)
            with pytest.raises(CannotConnect, match="no broker of yours"):
                await connection.open()
            await connection.open(patient=True)
            assert (await connection.request("broker.ping"))["node"] == broker.node
            await connection.close()
            assert owner.ups == [True, False]

    run(main)


def test_what_stood_and_is_refused_is_told() -> None:
    async def main() -> None:
        owner = Owner()
        async with broker_running() as broker:
            connection = Connection(lambda: (broker.url, SECRET), owner)
            connection.session.stand(("serve", "x"), "broker.serve", b'{"endpoint":"no name"}')
            await connection.open()
            await until(lambda: owner.refused, "it is told")
            assert owner.refused[0][0] == ("serve", "x")
            broker.links.links[0].abort()
            await until(lambda: owner.ups == [True, False, True], "it is back")
            await connection.request("broker.ping")
            assert len(owner.refused) == 1, "it is not said again"
            await connection.close()

    run(main)


def test_a_broker_that_falls_silent_does_not_hold_a_call_beyond_its_deadline() -> None:
    async def main() -> None:
        async with serving() as server:
            connection = Connection(lambda: (server.url, ""), Owner())
            await connection.open()
            with pytest.raises(DeadlineExceeded, match="has not answered in time"):
                await connection.request("data/read", options=Options(timeout=0.1))
            await connection.close()

    run(main)


class Babbling(Recorder):
    """Answers with something that is none."""

    def message(self, payload: bytes, binary: bool) -> None:
        super().message(payload, binary)
        self.link.send(b"what?")


def test_a_broker_that_talks_nonsense_is_left_and_named() -> None:
    async def main() -> None:
        async with serving(receiver=Babbling) as server:
            connection = Connection(lambda: (server.url, ""), Owner(), reconnect=False)
            await connection.open()
            with pytest.raises(ConnectionLost, match=r"sent what is no JSON-RPC 2.0.*It may have run"):
                await connection.request("data/read")
            await connection.close()

    run(main)


def test_a_certificate_that_is_not_trusted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            self_signed(Path(folder))
            files = {"tls_certificate": f"{folder}/cert.pem", "tls_key": f"{folder}/key.pem"}
            async with broker_running(server=files) as broker:
                assert broker.url.startswith("https://")
                url = broker.url.replace("127.0.0.1", "localhost")
                with pytest.raises(CannotConnect, match="its certificate is not trusted: self-signed"):
                    await Connection(lambda: (url, SECRET), Owner()).open()
                with pytest.raises(CannotConnect, match="no broker at"):
                    await Connection(lambda: (url.replace("https", "http"), SECRET), Owner()).open()
                context = ssl.create_default_context(cafile=f"{folder}/cert.pem")
                connection = Connection(lambda: (url, SECRET), Owner(), ssl_context=context)
                await connection.open()
                assert (await connection.request("broker.ping"))["node"] == broker.node
                await connection.close()

    run(main)


def test_closing_while_it_opens_and_while_it_comes_back() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            for pause in range(12):
                connection = Connection(lambda: (broker.url, SECRET), Owner())
                opening = asyncio.create_task(connection.open())
                for _ in range(pause):
                    await asyncio.sleep(0)
                await connection.close()
                await asyncio.wait((opening,))
                assert opening.exception() is None or isinstance(opening.exception(), ConnectionLost)
                with pytest.raises(ConnectionLost):
                    await connection.open()
            connection = Connection(lambda: (broker.url, SECRET), Owner())
            await connection.open()
        await until(lambda: not connection.is_up, "it is lost")
        await connection.close()

    run(main)


def test_nothing_is_kept_of_many_calls() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            connection = Connection(lambda: (broker.url, SECRET), Owner())
            await connection.open()

            async def many(count: int) -> int:
                for _ in range(count):
                    await asyncio.gather(*(connection.request("broker.ping") for _ in range(10)))
                gc.collect()
                return len(gc.get_objects())

            before = await many(50)
            after = await many(500)
            assert after - before < 500, "5,000 calls more"
            assert not connection.session.pending
            assert not connection.session.outbox
            await connection.close()
            assert not connection._links.links

    run(main)


def test_one_loop_holds_any_number_of_connections() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            connections = [Connection(lambda: (broker.url, SECRET), Owner()) for _ in range(20)]
            await asyncio.gather(*(connection.open() for connection in connections))
            told = await asyncio.gather(*(connection.request("broker.ping") for connection in connections))
            assert len({one["peer"] for one in told}) == 20
            await asyncio.gather(*(connection.close() for connection in connections))
            assert isinstance(LoopLinks().links, list)

    run(main)


def test_the_types_fit(value: Any = None) -> None:
    """`Owner` here is what `broker.peer.connection.Owner` asks for."""
    owner: Any = Owner()
    for name in ("asked", "cancel_asked", "heard", "link_changed", "standing_refused", "gave_up"):
        assert callable(getattr(owner, name))
