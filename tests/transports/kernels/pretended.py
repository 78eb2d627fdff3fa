"""A worker that pretends to be a kernel: it says what a test wants, when a test wants it."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from broker.client.async_client import AsyncClient
from broker.peer.session import Options
from broker.worker.worker import Worker
from tests.transports.kernels.harness import WORKER, House

DATE = "2026-01-02T03:04:05.000006Z"
_numbers = itertools.count()


def header(msg_type: str) -> dict[str, Any]:
    return {
        "msg_id": f"k_{next(_numbers)}", "msg_type": msg_type, "session": "k", "username": "kernel", "date": DATE,
        "version": "5.4",
    }  # fmt: skip


class Pretended:
    """Answers every request at once, but those whose type stands in `silent`. `asked` are the types of all."""

    def __init__(self, house: House, number: str) -> None:
        self.house = house
        self.silent: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self._released = asyncio.Event()
        self.worker = house.work(lambda: self._make(f"kernels.{number}"))

    def _make(self, endpoint: str) -> Worker:
        worker = Worker(endpoint, self.house.url, WORKER, capacity=1000)
        worker.info = {"dialect": "jupyter", "kernel": "none"}
        self._client = AsyncClient(self.house.broker)
        worker.add(self.shell)
        worker.add(self.control)
        worker.add(self.state)
        return worker

    async def shell(self, header: dict[str, Any], content: dict[str, Any], **_: Any) -> Any:
        return await self._answer("shell", header)

    async def control(self, header: dict[str, Any], content: dict[str, Any], **_: Any) -> Any:
        return await self._answer("control", header)

    async def state(self) -> dict[str, Any]:
        if "state" in self.silent:
            await self._released.wait()
        return {"execution_state": "idle", "last_activity": DATE}

    async def _answer(self, channel: str, asked: dict[str, Any]) -> Any:
        self.asked.append((channel, asked["msg_type"]))
        if asked["msg_type"] in self.silent:
            await self._released.wait()
        kind = asked["msg_type"].replace("_request", "_reply")
        return self.message(kind, {"status": "ok"}, asked)

    def message(self, msg_type: str, content: dict[str, Any], parent: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"header": header(msg_type), "parent_header": parent or {}, "metadata": {}, "content": content}

    def release(self) -> None:
        """Whatever was kept is answered."""
        self.house.look(self._released.set)

    async def say(self, msg_type: str, content: dict[str, Any], **more: Any) -> None:
        """Something on iopub; returns when the broker has it."""
        message = self.message(msg_type, content) | more
        encoded = json.dumps({"endpoint": self.worker.endpoint, "topic": "iopub", "data": message}).encode()
        connection, done = self.worker._connection, asyncio.get_running_loop().create_future()
        assert connection is not None
        connection.ask("broker.publish", encoded, (), Options(timeout=60), done)
        await done

    def end(self) -> None:
        """Go."""
        self.release()
        self.house.do(self._client.close())
        self.house.end(self.worker)
