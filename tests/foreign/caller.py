"""A caller made of one of the libraries: `python -m tests.foreign.caller LIBRARY`, then orders on stdin."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tests.foreign.orders import RemoteFault, obey

BROADCAST = "broker.message"
Hear = Callable[[Any], None]


class JsonrpcWebsocket:
    async def connect(self, url: str, token: str, hear: Hear) -> None:
        from jsonrpc_websocket import Server

        self._server = Server(url, headers={"Authorization": f"Bearer {token}"}, max_msg_size=0)
        self._server.broker.message = lambda **params: hear(params)
        self._loop = await self._server.ws_connect()

    async def call(self, n: int, method: str, params: Any = None, **options: Any) -> Any:
        from jsonrpc_base import ProtocolError

        args, kwargs = (params, {}) if isinstance(params, list) else ([], params or {})
        try:
            return await getattr(self._server, method)(*args, **kwargs, **options)
        except ProtocolError as error:
            if len(error.args) != 3:
                raise
            code, message, reply = error.args
            raise RemoteFault(code, message, reply["error"].get("data")) from None

    async def notify(self, method: str, params: Any = None) -> None:
        await self.call(0, method, params, _notification=True)

    async def close(self) -> None:
        await self._server.close()
        await self._loop


class PythonLsp:
    async def connect(self, url: str, token: str, hear: Hear) -> None:
        from tests.foreign.lsp_streams import open_endpoint

        loop = asyncio.get_running_loop()
        dispatcher = {BROADCAST: lambda params: loop.call_soon_threadsafe(hear, params)}
        self._socket, self._endpoint = await asyncio.to_thread(open_endpoint, url, token, dispatcher)
        self._requests: dict[int, Future[Any]] = {}

    async def call(self, n: int, method: str, params: Any = None) -> Any:
        from pylsp_jsonrpc.exceptions import JsonRpcException

        request = self._requests[n] = self._endpoint.request(method, params)
        try:
            return await asyncio.wrap_future(request)
        except JsonRpcException as error:
            raise RemoteFault(error.code, error.message, error.data) from None
        except asyncio.CancelledError:
            raise RemoteFault(None, "cancelled here") from None

    async def cancel(self, n: int) -> None:
        self._requests[n].cancel()

    async def notify(self, method: str, params: Any = None) -> None:
        self._endpoint.notify(method, params)

    async def close(self) -> None:
        await asyncio.to_thread(self._socket.close)
        self._endpoint.shutdown()


class Jsonrpcclient:
    """It makes and reads messages; the socket is its user's."""

    async def connect(self, url: str, token: str, hear: Hear) -> None:
        from websockets.asyncio.client import connect

        headers = {"Authorization": f"Bearer {token}"}
        self._socket = await connect(url, additional_headers=headers, max_size=None)
        self._waiting: dict[Any, asyncio.Future[Any]] = {}
        self._ids = itertools.count()  # from 0, which is an id like any other
        self._reading = asyncio.create_task(self._read(hear))

    async def _read(self, hear: Hear) -> None:
        import json

        from jsonrpcclient import Error, Ok, parse

        async for text in self._socket:
            message = json.loads(text)
            if "method" in message:
                hear(message["params"])
            else:
                reply = parse(message)
                assert isinstance(reply, (Ok, Error))
                self._waiting.pop(reply.id).set_result(reply)

    async def call(self, n: int, method: str, params: Any = None) -> Any:
        from jsonrpcclient import Ok, request_json

        id_ = next(self._ids)
        waiting = self._waiting[id_] = asyncio.get_running_loop().create_future()
        await self._socket.send(request_json(method, self._params(params), id=id_))
        reply = await waiting
        if isinstance(reply, Ok):
            return reply.result
        raise RemoteFault(reply.code, reply.message, reply.data)

    async def notify(self, method: str, params: Any = None) -> None:
        from jsonrpcclient import notification_json

        await self._socket.send(notification_json(method, self._params(params)))

    def _params(self, params: Any) -> Any:
        return tuple(params) if isinstance(params, list) else params

    async def close(self) -> None:
        await self._socket.close()
        await self._reading


LIBRARIES: dict[str, Callable[[], Any]] = {
    "jsonrpc-websocket": JsonrpcWebsocket,
    "python-lsp-jsonrpc": PythonLsp,
    "jsonrpcclient": Jsonrpcclient,
}


class Orders:
    """What a test may order."""

    def __init__(self, library: Callable[[], Any]) -> None:
        self._library = library
        self._connections: dict[str, Any] = {}
        self._heard: dict[str, list[Any]] = {}
        self._hearing: dict[str, asyncio.Event] = {}

    async def connect(self, n: int, on: str, url: str, token: str) -> None:
        heard = self._heard[on] = []
        hearing = self._hearing[on] = asyncio.Event()

        def hear(params: Any) -> None:
            heard.append(params)
            hearing.set()

        connection = self._library()
        await connection.connect(url, token, hear)
        self._connections[on] = connection

    async def call(self, n: int, on: str, method: str, params: Any = None) -> Any:
        return await self._connections[on].call(n, method, params)

    async def notify(self, n: int, on: str, method: str, params: Any = None) -> None:
        await self._connections[on].notify(method, params)

    async def cancel(self, n: int, on: str, call: int) -> None:
        await self._connections[on].cancel(call)

    async def heard(self, n: int, on: str, count: int) -> list[Any]:
        while len(self._heard[on]) < count:
            self._hearing[on].clear()
            await self._hearing[on].wait()
        return self._heard[on]

    async def close(self, n: int, on: str) -> None:
        await self._connections.pop(on).close()

    def by_name(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("connect", "call", "notify", "cancel", "heard", "close")}


if __name__ == "__main__":
    obey(Orders(LIBRARIES[sys.argv[1]]).by_name())
