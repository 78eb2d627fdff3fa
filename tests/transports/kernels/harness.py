"""A broker with real kernels in a thread of its own, for clients that block, and bare front ends over WebSockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.request import Request, urlopen

import msgspec
from websockets.sync.client import ClientConnection, connect

from broker.config.model import Config
from broker.core.access import Grant, Principal, Role
from broker.node.broker import Broker
from broker.wire.kernel import V1, KernelMessage, Sign, read_legacy, read_v1, tell, write_legacy, write_v1
from broker.worker.kernel.offering import KernelsWorker
from broker.worker.kernel.process import Started
from broker.worker.kernel.worker import KernelWorker
from broker.worker.worker import Worker

PATIENCE_S = 40
USER = "user-secret-for-tests-0123456789abcdefgh"
OTHER = "other-secret-for-tests-0123456789abcdefg"
STRANGER = "stranger-secret-for-tests-0123456789abcde"
WORKER = "worker-secret-for-tests-0123456789abcdef"
_KERNELS = ("kernels", "kernels.*")
PRINCIPALS = {
    USER: Principal("ursula", (Grant(Role.CALLER, _KERNELS),)),
    OTHER: Principal("otto", (Grant(Role.CALLER, _KERNELS),)),
    STRANGER: Principal("sam", (Grant(Role.CALLER, ("data",)),)),
    WORKER: Principal("wanda", (Grant(Role.WORKER, _KERNELS),)),
}
T = TypeVar("T")
_NUMBERS = itertools.count()


class House:
    """A broker on a loop in a thread. `do` runs something there and waits for it."""

    def __init__(self, **sections: Any) -> None:
        self._sections = sections
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._workers: list[Worker] = []

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def do(self, doing: Coroutine[Any, Any, T]) -> T:
        """Run this on the broker's loop and wait for its end."""
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(PATIENCE_S)

    def look(self, at: Callable[[], T]) -> T:
        """What a function returns on the broker's loop."""

        async def call() -> T:
            return at()

        return self.do(call())

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something to be so on the broker's loop."""

        async def wait() -> None:
            ends_at = self._loop.time() + PATIENCE_S - 5
            while not condition():
                assert self._loop.time() < ends_at, f"never came true: {what}"
                await asyncio.sleep(0.01)

        self.do(wait())

    def __enter__(self) -> House:
        self._thread.start()
        self.do(self._open())
        return self

    async def _open(self) -> None:
        config = msgspec.convert({"server": {"port": 0}, **self._sections}, Config)
        self.broker = Broker(config, fixed=PRINCIPALS)
        await self.broker.start()
        self.url = await self.broker.listen()

    def work(self, make: Callable[[], Worker]) -> Worker:
        """Start a worker there; it ends with the house."""

        async def begin() -> Worker:
            worker = make()
            await worker.start()
            self._workers.append(worker)
            return worker

        return self.do(begin())

    def kernel(self, number: str) -> KernelWorker:
        """A real kernel, as `kernels.NUMBER`."""
        made = self.work(lambda: KernelWorker(f"kernels.{number}", Started("python3"), self.url, WORKER))
        assert isinstance(made, KernelWorker)
        return made

    def offer(self) -> Worker:
        """A worker that starts kernels."""
        return self.work(lambda: KernelsWorker("kernels", self.url, WORKER))

    def end(self, worker: Worker) -> None:
        """End a worker now."""
        self._workers.remove(worker)
        self.do(worker.stop(now=True))

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self.end(worker)
        self.do(self.broker.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def request(self, method: str, path: str, token: str = USER, body: Any = None) -> tuple[int, Any, Any]:
        """A plain HTTP request: status, headers, JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Authorization": f"token {token}"} if token else {}, method=method)
        try:
            with urlopen(request, timeout=PATIENCE_S) as answer:
                text = answer.read()
                return answer.status, answer.headers, json.loads(text) if text else None
        except OSError as error:
            if not hasattr(error, "read"):
                raise
            return error.code, error.headers, json.loads(error.read() or b"null")  # type: ignore[attr-defined]


class Front:
    """A bare front end: says what it is told, hears everything."""

    def __init__(self, socket: ClientConnection, session: str, *, v1: bool) -> None:
        self.socket = socket
        self.session = session
        self.v1 = v1
        self.inbox: list[dict[str, Any]] = []

    def say(self, channel: str, msg_type: str, content: dict[str, Any], *, buffers: tuple[bytes, ...] = ()) -> str:
        """Send a message; returns its id."""
        number = f"{self.session}_{next(_NUMBERS)}"
        message = tell(channel, msg_type, content, Sign(number, self.session, "2026-01-02T03:04:05.000006Z"))
        self.send(msgspec.structs.replace(message, buffers=buffers))
        return number

    def send(self, message: KernelMessage) -> None:
        if self.v1:
            self.socket.send(b"".join(write_v1(message)))
        else:
            pieces, binary = write_legacy(message)
            frame = b"".join(pieces)
            self.socket.send(frame if binary else frame.decode())

    def execute(self, code: str, **more: Any) -> str:
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        return self.say("shell", "execute_request", {**content, "stop_on_error": True, **more})

    def read(self) -> dict[str, Any]:
        """The next message, decoded, in the order of their coming."""
        frame = self.socket.recv(PATIENCE_S)
        if self.v1:
            assert isinstance(frame, bytes)
            message = read_v1(frame)
        else:
            message = read_legacy(frame)
        header, parent = json.loads(message.header), json.loads(message.parent_header)
        return {
            "channel": message.channel, "type": header["msg_type"], "header": header, "parent": parent.get("msg_id"),
            "content": json.loads(message.content), "buffers": [bytes(buffer) for buffer in message.buffers],
        }  # fmt: skip

    def find(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next message for which this holds; others are kept."""
        for at, message in enumerate(self.inbox):
            if wanted(message):
                return self.inbox.pop(at)
        while not wanted(message := self.read()):
            self.inbox.append(message)
        return message

    def reply(self, number: str) -> dict[str, Any]:
        """The reply to a request."""
        return self.find(lambda m: m["parent"] == number and m["channel"] in ("shell", "control"))

    def heard(self, number: str) -> list[dict[str, Any]]:
        """Everything on iopub about a request, until the kernel is idle."""
        found = []
        while True:
            message = self.find(lambda m: m["parent"] == number and m["channel"] == "iopub")
            found.append(message)
            if message["content"].get("execution_state") == "idle":
                return found

    def status(self, state: str) -> dict[str, Any]:
        """The kernel's next word that it is in this state."""
        return self.find(lambda m: m["content"].get("execution_state") == state)


@contextmanager
def front(
    house: House, kernel: str, session: str = "s1", token: str = USER, *, v1: bool = True, **more: Any
) -> Iterator[Front]:
    """A front end at a kernel."""
    url = f"{house.url.replace('http', 'ws')}/api/kernels/{kernel}/channels?session_id={session}&token={token}&1712"
    with connect(url, subprotocols=[V1] if v1 else None, max_size=None, **more) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == (V1 if v1 else None)
        yield Front(socket, session, v1=v1)
