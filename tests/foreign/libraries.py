"""The libraries the tests drive: how to start each, and what is peculiar to it."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tests.foreign.harness import HERE
from tests.foreign.worker import FAULT

PYTHON, NODE = "python", "node"


@dataclass(frozen=True)
class AsCaller:
    """`hears` broadcasts by an interface of its own; `cancels` by `$/cancelRequest`."""

    language: str
    hears: bool = True
    cancels: bool = False


@dataclass(frozen=True)
class AsWorker:
    """`fault` is what its callers see where it raises; `cancels` says that it acts on `$/cancelRequest`."""

    language: str
    fault: tuple[int, str, Any] = FAULT
    cancels: bool = False


CALLERS = {
    "jsonrpc-websocket": AsCaller(PYTHON),
    "python-lsp-jsonrpc": AsCaller(PYTHON, cancels=True),
    "jsonrpcclient": AsCaller(PYTHON),
    "rpc-websockets": AsCaller(NODE),
    "jayson": AsCaller(NODE, hears=False),  # its WebSocket client ignores notifications
    "json-rpc-2.0": AsCaller(NODE),
    "vscode-jsonrpc": AsCaller(NODE, cancels=True),
    "vscode-ws-jsonrpc": AsCaller(NODE, cancels=True),
}
WORKERS = {
    # it passes on neither code nor data
    "jsonrpc-websocket": AsWorker(PYTHON, fault=(-32000, f"Server Error: {FAULT[1]}", None)),
    "python-lsp-jsonrpc": AsWorker(PYTHON),
    "jsonrpcserver": AsWorker(PYTHON),
    "json-rpc": AsWorker(PYTHON),
    "rpc-websockets": AsWorker(NODE),
    "jayson": AsWorker(NODE),
    "json-rpc-2.0": AsWorker(NODE),
    "vscode-jsonrpc": AsWorker(NODE, cancels=True),
    "vscode-ws-jsonrpc": AsWorker(NODE, cancels=True),
}


def command(role: str, language: str, name: str) -> list[str]:
    """How to start a library. Where it is not installed the test is skipped, or fails where CI is true."""
    if language == PYTHON:
        return [sys.executable, "-m", f"tests.foreign.{role}", name]
    node = shutil.which("node")
    missing = "node is not installed" if node is None else ""
    if not (HERE / "node_modules").is_dir():
        missing = missing or "run `npm install` in tests/foreign first"
    if node is None or missing:
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return [node, str(HERE / f"{role}.mjs"), name]
