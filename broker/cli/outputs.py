"""What `broker call ENDPOINT/execute` shows of a kernel: what its code prints goes where it would go if it ran here."""

from __future__ import annotations

import asyncio
import getpass
import re
import sys
from typing import Any, TextIO

from broker.cli.bar import Bar
from broker.client.async_client import AsyncClient
from broker.peer.errors import BrokerError

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Outputs:
    """Prints streams, results as text and tracebacks, and asks for input where the code does."""

    def __init__(self, client: AsyncClient, endpoint: str, bar: Bar) -> None:
        self._client = client
        self._endpoint = endpoint
        self._bar = bar

    async def item(self, value: Any) -> None:
        """Show one output. In a thread, as who reads it may stall."""
        self._bar.hide()
        if isinstance(value, dict) and value.get("type") == "input_request":
            await self._ask(value)
        elif isinstance(value, dict):
            await asyncio.to_thread(_show, value)

    async def result(self, value: Any) -> None:
        """The kernel's reply says nothing that has not been shown."""

    async def _ask(self, value: dict[str, Any]) -> None:
        read = getpass.getpass if value.get("password") and sys.stdin.isatty() else _read
        text = await asyncio.to_thread(read, str(value.get("prompt", "")))
        await self._client.call(f"{self._endpoint}/stdin", {"content": {"value": text}})


async def is_kernel(client: AsyncClient, endpoint: str) -> bool:
    """Whether a kernel serves the endpoint, as far as one may know."""
    try:
        told = await client.describe(endpoint)
    except BrokerError:
        return False
    infos = (worker["info"] for worker in told["workers"])
    return any(isinstance(info, dict) and info.get("dialect") == "jupyter" for info in infos)


def _read(prompt: str) -> str:
    """A line of standard input, empty at its end."""
    _write(sys.stdout, prompt)
    return sys.stdin.readline().removesuffix("\n")


def _show(value: dict[str, Any]) -> None:
    kind = value.get("type")
    if kind == "stream":
        _write(sys.stderr if value.get("name") == "stderr" else sys.stdout, str(value.get("text", "")))
    elif kind == "error":
        text = "\n".join(map(str, value.get("traceback") or [f"{value.get('ename')}: {value.get('evalue')}"]))
        _write(sys.stderr, f"{text if sys.stderr.isatty() else _COLOURS.sub('', text)}\n")
    elif kind in ("execute_result", "display_data", "update_display_data"):
        data = value.get("data") or {}
        kinds = ", ".join(data) or "nothing"
        _write(sys.stdout, f"{data.get('text/plain', f'<{kinds}; --json shows it>')}\n")


def _write(file: TextIO, text: str) -> None:
    file.write(text.encode(file.encoding or "utf-8", "replace").decode(file.encoding or "utf-8"))
    file.flush()
