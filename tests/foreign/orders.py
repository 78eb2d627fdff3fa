"""Takes orders as lines of JSON on stdin and answers each on stdout, so that a test can drive a library."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

LINE_MAX = 1 << 26


class RemoteFault(Exception):
    """An error as the other side told it, out of whatever the library made of it."""

    def __init__(self, code: Any, message: Any, data: Any = None) -> None:
        super().__init__(code, message, data)
        self.error = {"code": code, "message": message, "data": data}


def obey(orders: dict[str, Callable[..., Awaitable[Any]]]) -> None:
    """Until stdin ends: each line `{n, op, …}` runs `orders[op](n, **rest)`, all at the same time."""
    asyncio.run(_obey(orders))


async def _obey(orders: dict[str, Callable[..., Awaitable[Any]]]) -> None:
    lines = asyncio.StreamReader(limit=LINE_MAX)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tasks = set()
    while line := await lines.readline():
        task = asyncio.create_task(_carry_out(orders, json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _carry_out(orders: dict[str, Callable[..., Awaitable[Any]]], order: dict[str, Any]) -> None:
    n, op = order.pop("n"), order.pop("op")
    try:
        answer = {"result": await orders[op](n, **order)}
    except RemoteFault as fault:
        answer = {"error": fault.error}
    except Exception as error:
        answer = {"error": {"code": None, "message": repr(error)}}
    sys.stdout.write(json.dumps({"n": n, **answer}) + "\n")
    sys.stdout.flush()
