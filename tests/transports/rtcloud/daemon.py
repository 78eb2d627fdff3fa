"""A daemon of rt-cloud, made from what is known of its wire and no line of its own code."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import pickle
import ssl
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

PART_BYTES = 10 * 1024 * 1024
COMPRESS_ABOVE_BYTES = 1024 * 1024
PING_EVERY_S, PONG_WITHIN_S = 5.0, 1.0


class LoginFailed(Exception):
    """No cookie `login` stood in the jar afterwards."""


async def log_in(url: str, user: str, password: str, context: ssl.SSLContext | None = None) -> str:
    """Fetch the form, send it, follow where that leads; the cookie as it stands in the jar."""
    jar = aiohttp.CookieJar(unsafe=True)  # also for hosts that are addresses
    async with aiohttp.ClientSession(cookie_jar=jar, connector=aiohttp.TCPConnector(ssl=context or True)) as session:
        async with session.get(f"{url}/login") as answer:
            assert answer.status == 200
        xsrf = {cookie.key: cookie.value for cookie in jar}["_xsrf"]
        form = {"name": user, "password": password, "_xsrf": xsrf}
        async with session.post(f"{url}/login", data=form) as answer:
            status = answer.status
        cookies = {cookie.key: cookie.value for cookie in jar}
    if "login" not in cookies:
        raise LoginFailed(status)
    assert status == 200
    return cookies["login"]


def encode(request: Mapping[str, Any], value: object, part_bytes: int = PART_BYTES) -> Iterator[str]:
    """The messages that answer a request with a value: none at all for empty bytes."""
    if isinstance(value, bytes):
        kind, whole = "bytes", value
    elif isinstance(value, (int, float, str, list, dict, set, tuple)) and not isinstance(value, bool):
        kind, whole = "json", json.dumps(sorted(value) if isinstance(value, set) else value).encode()
    else:
        kind, whole = "pickle", pickle.dumps(value)
    cut = [whole[at : at + part_bytes] for at in range(0, len(whole), part_bytes)]
    for number, part in enumerate(cut, 1):
        message = echoed(request) | {
            "dataSerialization": kind, "status": 200, "fileSize": len(whole), "fileHash": md5(whole),
            "numParts": len(cut), "partId": number, "hash": md5(part), "dataSize": len(part),
        }  # fmt: skip
        if len(cut) > 1:
            message["multipart"] = True
        if len(whole) > COMPRESS_ABOVE_BYTES:
            message["compressed"] = True
            part = zlib.compress(part, 1)
        yield json.dumps(message | {"data": base64.b64encode(part).decode()})


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def echoed(request: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("data", "args", "kwargs")
    return {
        name: value
        for name, value in request.items()
        if name not in left_out and not (isinstance(value, str) and len(value) > 64)
    }


def arguments(request: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    args = list(request.get("args") or [])
    for at in request.get("encodedByteArgs") or []:
        args[at] = base64.b64decode(request[args[at]])
    return args, request.get("kwargs") or {}


class Daemon:
    """Dials out for ever, each time with a fresh login, and answers what it is asked in threads.

    `objects` are its classes by name. It pings every `ping_every_s` and leaves a server whose pong takes over 1 s.
    """

    def __init__(
        self, url: str, objects: Mapping[str, object], *, path: str = "/wsData", user: str = "test",
        password: str = "test", context: ssl.SSLContext | None = None, again_s: float = 0.05,
        ping_every_s: float = PING_EVERY_S, part_bytes: int = PART_BYTES,
    ) -> None:  # fmt: skip
        self.url, self.path, self.user, self.password, self.context = url, path, user, password, context
        self.objects = objects
        self.origin = url
        self.again_s, self.ping_every_s, self.part_bytes = again_s, ping_every_s, part_bytes
        self.socket: ClientConnection | None = None
        self.connections = 0
        self.answered = 0
        self.closes: list[tuple[int, str]] = []
        self.seen: list[dict[str, Any]] = []
        self._task: asyncio.Task[None] | None = None
        self._answers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Daemon:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        for task in [self._task, *self._answers]:
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass

    async def _run(self) -> None:
        while True:
            try:
                await self._connect_once()
            except (OSError, ConnectionClosed):
                pass
            await asyncio.sleep(self.again_s)

    async def _connect_once(self) -> None:
        cookie = await log_in(self.url, self.user, self.password, self.context)
        socket = await connect(
            self.url.replace("http", "ws", 1) + self.path, additional_headers={"Cookie": f"login={cookie}"},
            origin=self.origin, ssl=self.context, max_size=None, compression=None, proxy=None,  # type: ignore[arg-type]
            ping_interval=self.ping_every_s, ping_timeout=PONG_WITHIN_S, close_timeout=1,
        )  # fmt: skip
        self.connections += 1
        self.socket = socket
        try:
            async for text in socket:
                request = json.loads(text)
                assert request["cmd"] == "rpc"
                self.seen.append(request)
                task = asyncio.create_task(self._answer(socket, request))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
        finally:
            self.socket = None
            await socket.close()
            self.closes.append((socket.close_code or 1006, socket.close_reason or ""))

    async def _answer(self, socket: ClientConnection, request: dict[str, Any]) -> None:
        try:
            value = await asyncio.to_thread(self._call, request)
            messages = await asyncio.to_thread(lambda: list(encode(request, value, self.part_bytes)))
        except Exception as error:
            messages = [json.dumps(echoed(request) | {"status": 400, "error": f"RPC Exception: rpc: {error}"})]
        for message in messages:
            try:
                await socket.send(message)
            except ConnectionClosed:
                return
        self.answered += 1

    def _call(self, request: dict[str, Any]) -> object:
        found = self.objects.get(request["class"])
        if found is None:
            raise LookupError(f"class {request['class']} is not registered")
        attribute = getattr(found, request["attribute"])
        args, kwargs = arguments(request)
        return attribute(*args, **kwargs) if callable(attribute) else attribute
