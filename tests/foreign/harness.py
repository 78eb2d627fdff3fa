"""A broker process, foreign libraries in processes of their own, and plain peers over bare sockets."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TOKEN = "a-token-for-the-tests-of-foreign-clients-0123456789"
PATIENCE_S = 20.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, politely."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.005)


class RemoteError(Exception):
    """An error reply, with its members; `data` is None if there was none."""

    def __init__(self, code: Any, message: str, data: Any = None) -> None:
        super().__init__(code, message, data)
        self.code, self.message, self.data = code, message, data


# ---------------------------------------------------------------- the broker


class BrokerProcess:
    """`broker serve` on a port of its own, its log in a file."""

    def __init__(self, folder: Path, **environment: str) -> None:
        for name in ("run", "state"):
            (folder / name).mkdir(mode=0o700)
        self.log_file = folder / "log"
        given = {key: value for key, value in os.environ.items() if not key.startswith("BROKER_")}
        given |= {"XDG_RUNTIME_DIR": str(folder / "run"), "XDG_STATE_HOME": str(folder / "state")}
        given |= {"BROKER_AUTH__ADMIN_TOKEN": TOKEN} | environment
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "broker", "serve", "--port", "0"],
                cwd=folder, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: self._process.poll() is not None or " serves on " in self.log(), "the broker serves")
        found = re.search(r" serves on (http://[^\s\"]+)", self.log())
        assert found, self.log()
        self.url = found[1]

    def log(self) -> str:
        return self.log_file.read_text("utf-8", "replace")

    def ws(self, path: str) -> str:
        """The URL of a WebSocket."""
        return self.url.replace("http", "ws", 1) + path

    def stop(self) -> None:
        self._process.terminate()
        try:
            assert self._process.wait(10) == 0, self.log()
        finally:
            self._process.kill()


# ---------------------------------------------------------------- foreign libraries


class Library:
    """A library in a process of its own, which carries out orders (`orders.py`, `orders.mjs`)."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self._complaints = folder / "stderr"
        with self._complaints.open("wb") as complaints:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8"
            )
        self._numbers = itertools.count(1)
        self._orders: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def order(self, op: str, **given: Any) -> Future[Any]:
        """Give an order. The future raises RemoteError; its `number` is the order's."""
        future: Future[Any] = Future()
        with self._lock:
            n = future.number = next(self._numbers)  # type: ignore[attr-defined]
            self._orders[n] = future
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"n": n, "op": op, **given}) + "\n")
            self._process.stdin.flush()
        return future

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            future = self._orders.pop(answer["n"])
            if "error" in answer:
                future.set_exception(RemoteError(**answer["error"]))
            else:
                future.set_result(answer["result"])
        for future in self._orders.values():
            future.set_exception(RemoteError(None, f"{self.name} ended: {self._complaints.read_text()}"))

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()


class Caller:
    """A connection of a library that calls."""

    _names = itertools.count()

    def __init__(self, library: Library, url: str) -> None:
        self._library = library
        self._on = f"caller {next(self._names)}"
        self._library.order("connect", on=self._on, url=url, token=TOKEN).result(PATIENCE_S)

    def submit(self, method: str, params: Any = None) -> Future[Any]:
        given = {} if params is None else {"params": params}
        return self._library.order("call", on=self._on, method=method, **given)

    def call(self, method: str, params: Any = None) -> Any:
        return self.submit(method, params).result(PATIENCE_S)

    def notify(self, method: str, params: Any) -> None:
        self._library.order("notify", on=self._on, method=method, params=params).result(PATIENCE_S)

    def cancel(self, call: Future[Any]) -> None:
        self._library.order("cancel", on=self._on, call=call.number).result(PATIENCE_S)  # type: ignore[attr-defined]

    def heard(self, count: int) -> list[Any]:
        """The params of the broadcasts, once there are so many."""
        heard: list[Any] = self._library.order("heard", on=self._on, count=count).result(PATIENCE_S)
        return heard

    def close(self) -> None:
        self._library.order("close", on=self._on).result(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def attached(library: Library, url: str) -> Iterator[None]:
    """The library serves as a worker meanwhile."""
    library.order("attach", on=url, url=url, token=TOKEN).result(PATIENCE_S)
    try:
        yield
    finally:
        library.order("detach", on=url).result(PATIENCE_S)


# ---------------------------------------------------------------- plain peers


def dial(url: str) -> ClientConnection:
    """A bare socket, which its user closes."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    # entered here, since newer versions of the library warn of a connection that is not
    return connect(url, additional_headers=headers, max_size=None, compression=None).__enter__()


class PlainCaller:
    """One call after the other over a bare socket; broadcasts gather in `heard`."""

    def __init__(self, url: str) -> None:
        self.socket = dial(url)
        self.heard: list[Any] = []
        self._ids = itertools.count(1)

    def call(self, method: str, params: Any = None, **members: Any) -> Any:
        request = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, **members}
        self.socket.send(json.dumps(request if params is None else request | {"params": params}))
        while "method" in (reply := json.loads(self.socket.recv(PATIENCE_S))):
            self.heard.append(reply["params"])
        assert reply["id"] == request["id"]
        if "error" in reply:
            raise RemoteError(**reply["error"])
        return reply["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


HELD = object()
"""what a method returns that answers later"""


class PlainWorker:
    """A worker over a bare socket in a thread; `methods` get the params as they came.

    `requests` and `notifications` hold what was received; `hold {key}` answers when `release(key)` is called.
    """

    def __init__(self, url: str, methods: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
        self.socket = dial(url)
        self.requests: list[Any] = []
        self.notifications: list[Any] = []
        self.held: dict[Any, Any] = {}
        self._methods = {"hold": self._hold, **(methods or {})}
        self._id: Any = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            for message in self.socket:
                self.receive(message)
        except ConnectionClosed:
            pass

    def receive(self, message: str | bytes) -> None:
        request = json.loads(message)
        if "id" not in request:
            self.notifications.append(request)
            return
        self.requests.append(request)
        self._id = request["id"]
        try:
            answer = {"result": self._methods[request["method"]](request.get("params"))}
        except RemoteError as error:
            answer = {"error": {"code": error.code, "message": error.message, "data": error.data}}
        if answer.get("result") is not HELD:
            self.reply(request["id"], **answer)

    def reply(self, id_: Any, **members: Any) -> None:
        self.socket.send(json.dumps({"jsonrpc": "2.0", "id": id_, **members}))

    def _hold(self, params: Any) -> Any:
        key = params["key"] if isinstance(params, dict) else params[0]
        self.held[key] = self._id
        return HELD

    def release(self, key: Any) -> None:
        self.reply(self.held.pop(key), result=key)

    def close(self) -> None:
        self.socket.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
