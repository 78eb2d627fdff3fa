"""A worker process of the chaos run: `python -m tests.chaos.worker URL TOKEN JOURNAL CAPACITY GRACE`.

Before it does anything for a request it writes the request's tag into its journal, where a SIGKILL cannot take it back.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from broker import Worker
from broker.worker.requests import current
from tests.chaos.ledger import fingerprint

ITEM_BYTES = 2000


def item(tag: str, number: int) -> dict[str, Any]:
    """One item of a stream, the same at both ends."""
    return {"n": number, "print": fingerprint(tag, b"%d" % number), "pad": "x" * (number * 37 % ITEM_BYTES)}


def make(url: str, token: str, note: Callable[[str], object], capacity: int, grace: float = 0.0) -> Worker:
    """A worker whose methods note what they do, before they do it."""
    worker = Worker("data", url, token, capacity=capacity, grace=grace)

    @worker.method
    async def echo(tag: str, data: bytes, seconds: float = 0.0, size: int = 0) -> dict[str, Any]:
        note(tag)
        if seconds:
            await asyncio.sleep(seconds)
        return {"print": fingerprint(tag, data), "pad": b"y" * size}

    @worker.method
    def block(tag: str, data: bytes, seconds: float = 0.0) -> dict[str, Any]:
        note(tag)
        request, ends_at = current(), time.monotonic() + seconds
        while time.monotonic() < ends_at and not request.cancelled:
            time.sleep(0.01)
        return {"print": fingerprint(tag, data)}

    @worker.method
    async def fail(tag: str, data: bytes) -> None:
        note(tag)
        raise ValueError(f"{fingerprint(tag, data)}")

    @worker.method
    async def hang(tag: str, data: bytes) -> None:
        note(tag)
        await asyncio.sleep(random.uniform(5, 60))

    @worker.method
    async def items(tag: str, count: int, pause_s: float = 0.0) -> AsyncIterator[Any]:
        note(tag)
        for number in range(count):
            yield item(tag, number)
            if pause_s:
                await asyncio.sleep(pause_s)

    @worker.method
    async def take(tag: str) -> dict[str, Any]:
        note(tag)
        return await _taken(tag)

    @worker.method
    async def both(tag: str) -> AsyncIterator[Any]:
        note(tag)
        async for got in current().parts():
            yield got

    return worker


async def _taken(tag: str) -> dict[str, Any]:
    """How many items came, or what was wrong with them."""
    count = 0
    async for got in current().parts():
        if got != item(tag, count):
            return {"count": count, "wrong": got}
        count += 1
    return {"count": count}


def main() -> None:
    url, token, path, capacity, grace = sys.argv[1:6]
    journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    make(url, token, lambda tag: os.write(journal, f"{tag}\n".encode()), int(capacity), float(grace)).run()


if __name__ == "__main__":
    main()
