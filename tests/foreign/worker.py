"""A worker made of one of the libraries: `python -m tests.foreign.worker LIBRARY`, then orders on stdin.

It dials out, attaches with `role=worker` and serves the methods of `Service`; nothing in it knows the broker.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from tests.foreign.orders import obey

METHODS = ("subtract", "echo", "nothing", "fail", "log", "logged", "hold", "held", "release")
FAULT = (1234, "no film", {"tray": [1, None, "é"]})


class Service:
    """The methods, with futures for what is held back. `fault` makes the library's own error."""

    def __init__(self, fault: Callable[[int, str, Any], Exception]) -> None:
        self._fault = fault
        self._held: dict[Any, Future[Any]] = {}
        self._logged: list[Any] = []

    def subtract(self, minuend: Any, subtrahend: Any) -> Any:
        return minuend - subtrahend

    def echo(self, value: Any) -> Any:
        return value

    def nothing(self) -> None:
        return None

    def fail(self) -> None:
        raise self._fault(*FAULT)

    def log(self, line: str) -> None:
        self._logged.append(line)

    def logged(self) -> list[Any]:
        return self._logged

    def hold(self, key: Any) -> Future[Any]:
        self._held[key] = Future()
        return self._held[key]

    def held(self) -> int:
        return len(self._held)

    def release(self, key: Any) -> None:
        held = self._held.pop(key)
        if not held.cancelled():  # python-lsp-jsonrpc cancels the future
            held.set_result(key)


def asynchronous(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return await asyncio.wrap_future(result) if isinstance(result, Future) else result

    return run


class JsonrpcWebsocket:
    """Its client answers requests, too."""

    async def attach(self, url: str, token: str) -> None:
        from jsonrpc_websocket import Server

        self._server = Server(url, headers={"Authorization": f"Bearer {token}"}, max_msg_size=0)
        service = Service(lambda code, message, data: ValueError(message))
        for name in METHODS:
            setattr(self._server, name, asynchronous(getattr(service, name)))
        self._loop = await self._server.ws_connect()

    async def detach(self) -> None:
        await self._server.close()
        await self._loop


class PythonLsp:
    async def attach(self, url: str, token: str) -> None:
        from pylsp_jsonrpc.exceptions import JsonRpcException

        from tests.foreign.lsp_streams import open_endpoint

        service = Service(lambda code, message, data: JsonRpcException(message, code, data))
        dispatcher = {name: partial(self._run, getattr(service, name)) for name in METHODS}
        self._socket, self._endpoint = await asyncio.to_thread(open_endpoint, url, token, dispatcher)

    def _run(self, function: Callable[..., Any], params: Any) -> Any:
        return function(*params) if isinstance(params, list) else function(**(params or {}))

    async def detach(self) -> None:
        await asyncio.to_thread(self._socket.close)
        self._endpoint.shutdown()


class Dispatched:
    """A dispatcher from text to text behind a bare socket, every message in a task of its own."""

    async def attach(self, url: str, token: str) -> None:
        from websockets.asyncio.client import connect

        headers = {"Authorization": f"Bearer {token}"}
        self._socket = await connect(url, additional_headers=headers, max_size=None)
        self._tasks: set[asyncio.Task[None]] = set()
        self._make()
        self._reading = asyncio.create_task(self._read())

    def _make(self) -> None:
        raise NotImplementedError

    async def _dispatch(self, text: str) -> str:
        raise NotImplementedError

    async def _read(self) -> None:
        async for text in self._socket:
            assert isinstance(text, str)
            task = asyncio.create_task(self._answer(text))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, text: str) -> None:
        if reply := await self._dispatch(text):
            await self._socket.send(reply)

    async def detach(self) -> None:
        await self._socket.close()
        await self._reading


class Jsonrpcserver(Dispatched):
    def _make(self) -> None:
        from jsonrpcserver import Error

        class Fault(Exception):
            pass

        service = Service(lambda *fault: Fault(*fault))

        def method(function: Callable[..., Any]) -> Callable[..., Any]:
            import functools

            from jsonrpcserver import Success

            @functools.wraps(function)  # it looks at the signature
            async def run(*args: Any, **kwargs: Any) -> Any:
                try:
                    return Success(await asynchronous(function)(*args, **kwargs))
                except Fault as fault:
                    return Error(*fault.args)

            return run

        self._methods = {name: method(getattr(service, name)) for name in METHODS}

    async def _dispatch(self, text: str) -> str:
        from jsonrpcserver import async_dispatch

        return str(await async_dispatch(text, methods=self._methods))


class JsonRpc(Dispatched):
    """It knows no asyncio: a thread for each message."""

    def _make(self) -> None:
        from jsonrpc.exceptions import JSONRPCDispatchException

        service = Service(lambda code, message, data: JSONRPCDispatchException(code, message, data))
        self._methods = {name: self._waiting(getattr(service, name)) for name in METHODS}
        self._threads = ThreadPoolExecutor(32)

    def _waiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return result.result() if isinstance(result, Future) else result

        return run

    async def _dispatch(self, text: str) -> str:
        from jsonrpc import JSONRPCResponseManager

        loop = asyncio.get_running_loop()
        reply = await loop.run_in_executor(self._threads, JSONRPCResponseManager.handle, text, self._methods)
        return "" if reply is None else str(reply.json)


LIBRARIES: dict[str, Callable[[], Any]] = {
    "jsonrpc-websocket": JsonrpcWebsocket,
    "python-lsp-jsonrpc": PythonLsp,
    "jsonrpcserver": Jsonrpcserver,
    "json-rpc": JsonRpc,
}


class Orders:
    """What a test may order."""

    def __init__(self, library: Callable[[], Any]) -> None:
        self._library = library
        self._workers: dict[str, Any] = {}

    async def attach(self, n: int, on: str, url: str, token: str) -> None:
        worker = self._library()
        await worker.attach(url, token)
        self._workers[on] = worker

    async def detach(self, n: int, on: str) -> None:
        await self._workers.pop(on).detach()


if __name__ == "__main__":
    orders = Orders(LIBRARIES[sys.argv[1]])
    obey({"attach": orders.attach, "detach": orders.detach})
