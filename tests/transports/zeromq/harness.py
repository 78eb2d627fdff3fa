"""A broker with its ZeroMQ door open, and peers that speak with jupyter_client's own Session over bare sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from broker.auth.tokens import TokenStore
from broker.config.model import Config
from broker.links.zeromq_connect import Place
from broker.node.broker import Broker
from broker.wire.connection_file import ConnectionInfo
from tests.links.harness import run, until
from tests.transports.websocket.harness import PRINCIPALS

__all__ = ["run", "until"]

PATIENCE_S = 5


def config(**sections: Mapping[str, Any]) -> Config:
    zeromq = {"enabled": True, **sections.get("zeromq", {})}
    return msgspec.convert({**sections, "zeromq": zeromq, "server": {"port": 0}}, Config)


class Home:
    """A running broker and where its doors are."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        assert broker.zeromq is not None
        self.door = broker.zeromq
        self.info: ConnectionInfo = self.door.info

    @property
    def url(self) -> str:
        """The ZeroMQ door as one writes it, with the key."""
        return f"{self.info.url('shell')}/{self.info.key}"

    @property
    def place(self) -> Place:
        return Place(self.info.url("shell"), self.info.key.encode(), self.info.signature_scheme)

    def refused(self) -> dict[str, int]:
        """Causes of refusals that were counted."""
        return {cause: count for cause, count in self.door.counters.refused.items() if count}

    @property
    def counters(self) -> Any:
        return self.broker.router.counters


@asynccontextmanager
async def running(tokens: TokenStore | None = None, **sections: Mapping[str, Any]) -> AsyncIterator[Home]:
    broker = Broker(config(**sections), fixed=PRINCIPALS, tokens=tokens)
    await broker.start()
    try:
        await broker.listen()
        yield Home(broker)
    finally:
        await broker.stop()


class Raw:
    """A DEALER and jupyter_client's Session: what somebody writes who has never heard of our SDK."""

    def __init__(self, info: ConnectionInfo, *, channel: str = "shell", routing_id: bytes = b"", key: str | None = None,
                 curve: tuple[bytes, bytes, bytes] | None = None) -> None:  # fmt: skip
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        if routing_id:
            self.socket.routing_id = routing_id
        if curve is not None:
            self.socket.curve_serverkey, self.socket.curve_publickey, self.socket.curve_secretkey = curve
        self.session = Session(key=(info.key if key is None else key).encode(), signature_scheme=info.signature_scheme)
        self.socket.connect(info.url(channel))
        self.inbox: list[dict[str, Any]] = []

    async def __aenter__(self) -> Raw:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.context.destroy(linger=0)

    async def send(
        self, kind: str, content: dict[str, Any] | None = None, *, parent: str = "", buffers: tuple[bytes, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """Send one message; its id."""
        message = self.session.msg(kind, content or {}, metadata=metadata)
        if parent:
            message["parent_header"] = {"msg_id": parent}
        frames = [*self.session.serialize(message), *buffers]
        await self.socket.send_multipart(frames)
        return str(message["header"]["msg_id"])

    async def send_frames(self, *frames: bytes) -> None:
        await self.socket.send_multipart(list(frames))

    async def read(self) -> dict[str, Any]:
        """The next message."""
        async with asyncio.timeout(PATIENCE_S):
            _, frames = self.session.feed_identities(await self.socket.recv_multipart())
        return self.session.deserialize(frames)

    async def find(self, kind: str, parent: str = "") -> dict[str, Any]:
        """The next message of this type about this request; others are kept."""

        def is_it(message: dict[str, Any]) -> bool:
            return message["msg_type"] == kind and parent in ("", message["parent_header"].get("msg_id"))

        for at, message in enumerate(self.inbox):
            if is_it(message):
                return self.inbox.pop(at)
        while not is_it(message := await self.read()):
            self.inbox.append(message)
        return message

    async def ask(
        self, kind: str, content: dict[str, Any] | None = None, *, buffers: tuple[bytes, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The content of the answer."""
        msg_id = await self.send(kind, content, buffers=buffers, metadata=metadata)
        told = (await self.find(kind.replace("_request", "_reply"), msg_id))["content"]
        assert isinstance(told, dict)
        return told

    async def silence(self, seconds: float = 0.2) -> None:
        """Nothing comes."""
        assert not await self.socket.poll(int(seconds * 1000))
