"""A broker that takes rt-cloud's daemons, and one of them that says exactly what it is told."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.transports.rtcloud.daemon import log_in
from tests.transports.websocket.harness import World, config, serving


def rt_config(**sections: Any) -> Any:
    rtcloud = {"enabled": True, "test_user": True} | sections.pop("rtcloud", {})
    return config(rtcloud=rtcloud, **sections)


def rt_serving(settings: Any = None, **more: Any) -> AbstractAsyncContextManager[World]:
    return serving(settings or rt_config(), **more)


class Hand:
    """A daemon's socket, led by hand."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def asked(self) -> dict[str, Any]:
        """The next request."""
        return dict(json.loads(await self.socket.recv()))

    async def say(self, message: object) -> None:
        await self.socket.send(message if isinstance(message, (str, bytes)) else json.dumps(message))


@asynccontextmanager
async def hand(
    world: World, path: str = "/wsData", context: ssl.SSLContext | None = None, **more: Any
) -> AsyncIterator[Hand]:
    cookie = more.pop("cookie", None) or await log_in(world.broker.url, "test", "test", context)
    options = {"ping_interval": None, "compression": None, "max_size": None, "close_timeout": 1, "proxy": None} | more
    async with connect(
        world.broker.url.replace("http", "ws", 1) + path, origin=world.broker.url,  # type: ignore[arg-type]
        additional_headers={"Cookie": f"login={cookie}"}, ssl=context, **options,
    ) as socket:  # fmt: skip
        yield Hand(socket)
