"""Every dialect as caller with every dialect as worker: the bridge between them is the router."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.worker import current
from broker.worker.worker import Worker
from tests.transports.websocket.harness import ADMIN
from tests.transports.zeromq.harness import Home, Raw, run, running, until

BLOB = bytes(range(256)) * 40

# ------------------------------------------------------------ workers


class Functions:
    """What every worker here can do."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.begun = 0
        self.heard: list[Any] = []

    def echo(self, value: Any = None) -> Any:
        return value

    async def sleep(self) -> None:
        self.begun += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def count(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    async def total(self) -> int:
        total = 0
        async for part in current().parts():
            total += part
        return total

    async def slowly(self) -> str:
        for done in range(1, 4):
            current().progress(done, 3)
        return "done"

    def fail(self) -> None:
        raise LookupError("no such scan")


@asynccontextmanager
async def sdk_worker(home: Home, functions: Functions, where: Any, token: str | None) -> AsyncIterator[Any]:
    worker = Worker("data", where, token)
    for name in ("echo", "sleep", "count", "total", "slowly", "fail"):
        worker.add(getattr(functions, name))
    await worker.start()
    try:
        yield lambda: worker._connection._link.abort()  # type: ignore[union-attr]
    finally:
        await worker.stop(now=True)


class RawWorker:
    """Answers by hand."""

    def __init__(self, raw: Raw, functions: Functions) -> None:
        self.raw, self.functions = raw, functions
        self.asleep: set[str] = set()
        self.totals: dict[str, int] = {}

    async def serve(self) -> None:
        while True:
            await self.take(await self.raw.read())

    async def reply(self, msg_id: str, result: Any, buffers: tuple[bytes, ...] = ()) -> None:
        await self.raw.send("call_reply", {"status": "ok", "result": result}, parent=msg_id, buffers=buffers)

    async def take(self, message: dict[str, Any]) -> None:
        kind, content, raw = message["msg_type"], message["content"], self.raw
        msg_id, about = message["msg_id"], message["parent_header"].get("msg_id", "")
        if kind == "cancel_request" and about in self.asleep:
            self.asleep.discard(about)
            self.functions.cancelled += 1
            # An answer to what was cancelled is dropped.
            error = {"status": "error", "ename": "Cancelled", "evalue": "it was", "traceback": []}
            await raw.send("call_reply", error, parent=about)
        elif kind == "part":
            self.totals[about] += content["data"] or 0
            if content.get("last"):
                await self.reply(about, self.totals.pop(about))
            else:
                await raw.send("credit", {"upto": content["seq"] + 5}, parent=about)
        elif kind == "call_request":
            params = content.get("params") or {}
            match content["method"]:
                case "echo":
                    value = params.get("value") if isinstance(params, dict) else params[0]
                    await self.reply(msg_id, value, tuple(map(bytes, message["buffers"])))
                case "sleep":
                    self.functions.begun += 1
                    self.asleep.add(msg_id)
                case "count":
                    for number in range(params["n"]):
                        await raw.send("part", {"seq": number, "data": number}, parent=msg_id)
                    await self.reply(msg_id, None)
                case "total":
                    self.totals[msg_id] = 0
                    await raw.send("credit", {"upto": 5}, parent=msg_id)
                case "slowly":
                    for done in range(1, 4):
                        await raw.send("progress", {"value": {"done": done, "total": 3}}, parent=msg_id)
                    await self.reply(msg_id, "done")
                case "fail":
                    error = {"status": "error", "ename": "LookupError", "evalue": "no such scan", "traceback": []}
                    await raw.send("call_reply", error, parent=msg_id)


@asynccontextmanager
async def worker_of(kind: str, home: Home, functions: Functions) -> AsyncIterator[Any]:
    if kind != "raw":
        where = {"websocket": home.broker.url, "zeromq": home.url, "process": home.broker}[kind]
        async with sdk_worker(home, functions, where, ADMIN if kind == "websocket" else None) as kill:
            yield kill
        return
    async with Raw(home.info) as raw:
        answer = await raw.ask("attach_request", {"endpoint": "data", "role": "worker", "meta": True})
        assert answer == {"status": "ok"}
        serving = asyncio.create_task(RawWorker(raw, functions).serve())
        yield raw.close
        serving.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await serving


# ------------------------------------------------------------ callers


class Ended(Exception):
    """A call ended with this outcome."""


class SdkCaller:
    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    async def call(self, method: str, params: Any = None, **options: Any) -> Any:
        try:
            return await self.client.call(f"data/{method}", params, **options)
        except errors.BrokerError as error:
            raise Ended(error.outcome) from None

    async def items(self, method: str, params: Any) -> list[Any]:
        async with await self.client.stream(f"data/{method}", params) as stream:
            return [item async for item in stream]

    async def parts(self, method: str, parts: list[int]) -> Any:
        return await self.client.call(f"data/{method}", parts=parts)

    async def progress(self, method: str) -> list[float]:
        told: list[float] = []
        await self.client.call(f"data/{method}", progress=lambda done, *_: told.append(done))
        return told

    async def cancelled(self, begun: Any) -> None:
        call = asyncio.create_task(self.client.call("data/sleep"))
        await until(begun, "the worker has it")
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call

    async def hear(self) -> Any:
        subscription = await self.client.subscribe("data", topic="news")

        async def one() -> Any:
            message = await subscription.get(10)
            await subscription.close()
            return message.data

        return one

    async def publish(self, data: Any) -> None:
        await self.client.publish("data", data, topic="news")


class RawCaller:
    def __init__(self, raw: Raw) -> None:
        self.raw = raw

    async def _asked(self, method: str, params: Any = None, meta: dict[str, Any] | None = None) -> str:
        content: dict[str, Any] = {"endpoint": "data", "method": method}
        buffers: tuple[bytes, ...] = ()
        if isinstance(params, dict) and isinstance(params.get("value"), bytes):
            params, buffers = {"value": {"$buffer": 0}}, (params["value"],)
        if params is not None:
            content["params"] = params
        if meta:
            content["meta"] = meta
        return await self.raw.send("call_request", content, buffers=buffers)

    async def call(self, method: str, params: Any = None, **options: Any) -> Any:
        msg_id = await self._asked(method, params, options)
        answer = await self.raw.find("call_reply", msg_id)
        content = answer["content"]
        if content["status"] != "ok":
            data = content.get("data") or {}
            assert content["ename"]
            raise Ended(data.get("outcome", "worker_error"))
        return bytes(answer["buffers"][0]) if answer["buffers"] else content["result"]

    async def items(self, method: str, params: Any) -> list[Any]:
        msg_id = await self._asked(method, params, {"stream": "in"})
        items: list[Any] = []
        while True:
            message = await self.raw.read()
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["msg_type"] == "call_reply":
                return items
            content = message["content"]
            items += [] if content.get("last") and content["data"] is None else [content["data"]]
            await self.raw.send("credit", {"upto": content["seq"] + 5}, parent=msg_id)

    async def parts(self, method: str, parts: list[int]) -> Any:
        msg_id = await self._asked(method, None, {"stream": "out"})
        upto = 4  # at first
        for seq, part in enumerate(parts):
            while seq >= upto:
                upto = (await self.raw.find("credit", msg_id))["content"]["upto"]
            last = {"last": True} if seq == len(parts) - 1 else {}
            await self.raw.send("part", {"seq": seq, "data": part, **last}, parent=msg_id)
        return (await self.raw.find("call_reply", msg_id))["content"]["result"]

    async def progress(self, method: str) -> list[float]:
        msg_id = await self._asked(method, None, {"progress": True})
        await self.raw.find("call_reply", msg_id)
        told = [message["content"] for message in self.raw.inbox if message["msg_type"] == "progress"]
        return [each["value"]["done"] for each in told]

    async def cancelled(self, begun: Any) -> None:
        msg_id = await self._asked("sleep")
        await until(begun, "the worker has it")
        await self.raw.send("cancel_request", parent=msg_id)
        content = (await self.raw.find("call_reply", msg_id))["content"]
        assert content["data"]["outcome"] == "cancelled"

    async def hear(self) -> Any:
        assert (await self.raw.ask("subscribe_request", {"endpoint": "data", "topic": "news"}))["status"] == "ok"

        async def one() -> Any:
            return (await self.raw.find("broadcast"))["content"]["data"]

        return one

    async def publish(self, data: Any) -> None:
        content = {"endpoint": "data", "topic": "news", "data": data}
        assert (await self.raw.ask("publish_request", content))["status"] == "ok"


class HttpCaller:
    def __init__(self, url: str) -> None:
        self.url = url

    async def call(self, method: str, params: Any = None, timeout: float | None = None) -> Any:
        if isinstance(params, dict) and isinstance(params.get("value"), bytes):
            params = {"value": {"$base64": base64.b64encode(params["value"]).decode()}}
        query = f"?timeout={timeout}" if timeout else ""
        reply = await AsyncHTTPClient().fetch(
            HTTPRequest(
                f"{self.url}/call/data/{method}{query}", "POST", {"Authorization": f"Bearer {ADMIN}"},
                json.dumps(params if params is not None else {}),
            ),
            raise_error=False,
        )  # fmt: skip
        if reply.code != 200:
            raise Ended(reply.headers["Broker-Outcome"])
        value = json.loads(reply.body)
        if isinstance(value, dict) and "$base64" in value:
            return base64.b64decode(value["$base64"])
        return value


@asynccontextmanager
async def caller_of(kind: str, home: Home) -> AsyncIterator[Any]:
    if kind == "http":
        yield HttpCaller(home.broker.url)
    elif kind == "raw":
        async with Raw(home.info) as raw:
            yield RawCaller(raw)
    else:
        where: Any = {"websocket": home.broker.url, "zeromq": home.url, "process": home.broker}[kind]
        async with AsyncClient(where, ADMIN if kind == "websocket" else None) as client:
            yield SdkCaller(client)


# ------------------------------------------------------------ the pairs

CALLERS = ["websocket", "zeromq", "process", "raw", "http"]
STREAMING = CALLERS[:-1]
WORKERS = ["websocket", "zeromq", "process", "raw"]


@pytest.mark.parametrize("worker", WORKERS)
class TestPairs:
    @pytest.mark.parametrize("caller", CALLERS)
    def test_results_attachments_and_endings(self, caller: str, worker: str) -> None:
        async def main() -> None:
            functions = Functions()
            async with running() as home, worker_of(worker, home, functions) as kill, caller_of(caller, home) as asks:
                assert await asks.call("echo", {"value": [1, {"ü": None}]}) == [1, {"ü": None}]
                assert await asks.call("echo", {"value": BLOB}) == BLOB
                with pytest.raises(Ended, match="worker_error"):
                    await asks.call("fail")
                with pytest.raises(Ended, match="deadline"):
                    await asks.call("sleep", timeout=0.2)
                await until(lambda: functions.cancelled == 1, "the worker was told")
                lost = asyncio.create_task(asks.call("sleep"))
                await until(lambda: functions.begun == 2, "the worker has it")
                kill()
                with pytest.raises(Ended, match="worker_lost"):
                    await lost
                assert home.refused() == {}
                assert home.counters.strikes == 0

        run(main)

    @pytest.mark.parametrize("caller", STREAMING)
    def test_streams_progress_cancel_and_broadcasts(self, caller: str, worker: str) -> None:
        async def main() -> None:
            functions = Functions()
            async with running() as home, worker_of(worker, home, functions), caller_of(caller, home) as asks:
                if worker != "raw":  # which here heeds no credit
                    assert await asks.items("count", {"n": 40}) == list(range(40))
                assert await asks.items("count", {"n": 3}) == [0, 1, 2]
                assert await asks.parts("total", list(range(30))) == 435
                told = await asks.progress("slowly")
                assert told == sorted(told)
                assert told[-1] == 3  # one that nobody has seen yet gives way to the next
                await asks.cancelled(lambda: functions.begun == 1)
                await until(lambda: functions.cancelled == 1, "the worker was told")
                one = await asks.hear()
                async with caller_of("raw", home) as other:
                    await other.publish({"at": 1})
                assert await one() == {"at": 1}
                async with caller_of("raw", home) as other:
                    hears = await other.hear()
                    await asks.publish([2])
                    assert await hears() == [2]
                assert home.refused() == {}
                assert home.counters.strikes == 0

        run(main)
