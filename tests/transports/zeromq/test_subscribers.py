"""Plain SUB sockets on the XPUB: who may listen to what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from broker.auth.tokens import TokenStore
from broker.wire.connection_file import ConnectionInfo
from tests.transports.zeromq.harness import PATIENCE_S, Raw, run, running, until


@asynccontextmanager
async def subscriber(info: ConnectionInfo, topic: bytes, *curve: bytes) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    if curve:
        socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = curve
    socket.connect(info.url("iopub"))
    socket.subscribe(topic)
    try:
        yield socket
    finally:
        context.destroy(linger=0)


def test_a_topic_is_heard_with_the_key_that_the_door_gave_and_not_without() -> None:
    async def main() -> None:
        async with running(zeromq={"roles": ["caller", "worker", "listener"]}) as home, Raw(home.info) as raw:
            answer = await raw.ask("topic_key_request", {"endpoint": "data", "topic": "news"})
            topic = answer["result"]["topic"].encode()
            async with subscriber(home.info, b"data/news\0") as without:
                await until(lambda: home.door.counters.subscriptions_refused == 1, "it is refused")
                async with subscriber(home.info, topic) as listener:
                    await until(lambda: home.door.topics == 1, "it listens")
                    told = {"endpoint": "data", "topic": "news", "data": {"at": 1}}
                    assert (await raw.ask("publish_request", told))["status"] == "ok"
                    assert await listener.poll(PATIENCE_S * 1000)
                    prefix, *frames = await listener.recv_multipart()
                    assert prefix == topic
                    message = raw.session.deserialize(raw.session.feed_identities(frames)[1])
                    assert message["msg_type"] == "broadcast"
                    assert message["content"]["data"] == {"at": 1}
                    assert home.door.counters.published == 1
                await until(lambda: home.door.topics == 0, "nobody listens any more")
                assert not await without.poll(100)
            wrong = await raw.ask("topic_key_request", {"endpoint": "no such name"})
            assert wrong["ename"] == "invalid"

    run(main)


def test_with_curve_the_keys_grants_decide(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    section: dict[str, Any] = {"curve": True, "curve_key_file": str(tmp_path / "curve.key")}
    pair = zmq.curve_keypair()
    store.create("liam", ("listener",), ("data",), curve_key=pair[0])

    async def main() -> None:
        async with running(store, zeromq=section) as home:
            server_key = (home.info.curve_publickey or "").encode()
            async with (
                subscriber(home.info, b"data/news\0", server_key, *pair),
                subscriber(home.info, b"elsewhere/news\0", server_key, *pair),
            ):
                await until(lambda: home.door.counters.subscriptions_refused == 1, "what is not granted is refused")
                await until(lambda: home.door.topics == 1, "what is granted is taken")

    run(main)
