"""Callers that keep books: through the SDK, as a plain JSON-RPC program, over HTTP, and one that reads slowly."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from broker import AsyncClient
from broker.peer.errors import BrokerError
from tests.chaos.ledger import UNKNOWN, Entry, Ledger, fingerprint
from tests.chaos.proxy import Proxy
from tests.chaos.worker import item

TIMEOUT_S = 6.0
PATIENCE_S = 4.0
"""how long after its deadline a caller that has no clock of its own gives up a request on a link in trouble"""
OUTCOMES = {
    -32001: "no_worker", -32002: "worker_lost", -32003: "deadline", -32004: "overloaded", -32005: "cancelled",
    -32006: "denied", -32007: "shutting_down", -32008: "too_large", -32009: "slow_consumer", -32010: "duplicate_id",
    -32011: "bad_reply", -32012: "key_conflict", -32601: "no_endpoint",
}  # fmt: skip


class Caller:
    """Something that asks, `width` requests at a time, until it is told to stop."""

    def __init__(self, name: str, seed: str, ledger: Ledger, proxy: Proxy, *, width: int = 4) -> None:
        self.name = name
        self.random = random.Random(f"{seed} {name}")
        self.ledger = ledger
        self.proxy = proxy
        self.width = width
        self.url = ""
        self.token = ""
        self.made = 0
        self.stopping = False
        self.pause_s = 0.01

    async def run(self, url: str, token: str) -> None:
        """Ask until `stopping`; returns when all it asked has ended."""
        self.url, self.token = url, token
        await self.opened()
        try:
            await asyncio.gather(*(self._go_on_asking() for _ in range(self.width)))
        finally:
            await self.closed()

    async def _go_on_asking(self) -> None:
        while not self.stopping:
            await self.one()
            await asyncio.sleep(self.random.expovariate(1 / self.pause_s))

    def next_tag(self) -> str:
        """A name nobody else's request has."""
        self.made += 1
        return f"{self.name}-{self.made}"

    def data(self) -> bytes:
        """Something to ask with; mostly small."""
        size = self.random.choice((0, 1, 10, 10, 10, 100, 100, 5000, 5000, 200_000))
        return self.random.randbytes(size)

    def is_in_trouble(self, entry: Entry) -> bool:
        """Whether the link it was asked over was spoiled while it was in flight."""
        return self.proxy.was_spoiled(self.name, entry.asked_at)

    async def opened(self) -> None:
        """Get ready."""

    async def closed(self) -> None:
        """Leave nothing behind."""

    async def one(self) -> None:
        """One request, from the question to its end."""
        raise NotImplementedError


# ---------------------------------------------------------------- the SDK


class SdkCaller(Caller):
    """Asks through `AsyncClient`: all kinds of requests, streams both ways, keys, progress, cancelling."""

    threads = True
    """whether threads may take part, at either end"""
    timeout_s = TIMEOUT_S
    """of what is to be answered"""

    async def opened(self) -> None:
        self.client = AsyncClient(self.url, self.token)
        while True:
            try:
                await self.client.connect()
                return
            except BrokerError:
                await asyncio.sleep(0.1)

    async def closed(self) -> None:
        await self.client.close()

    async def one(self) -> None:
        kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.echo, 10), (self.slow, 5), (self.fail, 2), (self.hang, 1), (self.taken_back, 3), (self.retried, 4),
            (self.keyed, 3), (self.streamed, 4), (self.sent, 3), (self.both, 2), (self.left_early, 2),
        ]  # fmt: skip
        await self.random.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]()

    async def ask(
        self, kind: str, method: str, params: dict[str, Any], *, timeout: float = 0.0, **options: Any
    ) -> None:
        """One call whose answer is a fingerprint."""
        data = self.data()
        tag = self.next_tag()
        timeout = timeout or self.timeout_s
        key = options.get("key")
        entry = self.ledger.open(tag, self.name, kind, timeout, idempotent=options.get("idempotent", False), key=key)
        try:
            params = {"tag": key or tag, "data": data, **params}
            value = await self.client.call(f"data/{method}", params, timeout=timeout, **options)
        except BrokerError as error:
            if kind == "fail" and error.outcome == "worker_error":
                self.ledger.matches(entry, {"print": int(error.detail)}, data)
            self.ledger.raised(entry, error)
        except asyncio.CancelledError:
            self.ledger.end(entry, UNKNOWN, detail="taken back")
            raise
        else:
            self.ledger.matches(entry, value, data)
            self.ledger.end(entry, "ok")

    async def echo(self) -> None:
        size = self.random.choice((0, 0, 0, 1000, 300_000))
        await self.ask("echo", "echo", {"size": size})

    async def slow(self) -> None:
        method = self.random.choice(("echo", "block" if self.threads else "echo"))
        await self.ask("slow", method, {"seconds": self.random.uniform(0.01, 1.0)})

    async def fail(self) -> None:
        await self.ask("fail", "fail", {})

    async def hang(self) -> None:
        await self.ask("hang", "hang", {}, timeout=self.random.uniform(0.1, 1.5))

    async def taken_back(self) -> None:
        asking = asyncio.ensure_future(self.ask("taken back", "echo", {"seconds": 3.0}))
        await asyncio.wait((asking,), timeout=self.random.uniform(0.0, 0.3))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def retried(self) -> None:
        params = {"seconds": self.random.uniform(0.05, 0.5)}
        await self.ask("retried", "echo", params, idempotent=True, retries=3, wait=True)

    async def keyed(self) -> None:
        """The same twice at once: it runs once, and both have the answer."""
        key, data = f"key-{self.next_tag()}", self.data()
        params = {"tag": key, "data": data, "seconds": self.random.uniform(0.0, 0.2)}

        async def ask() -> None:
            entry = self.ledger.open(self.next_tag(), self.name, "keyed", self.timeout_s, key=key)
            try:
                value = await self.client.call("data/echo", params, timeout=self.timeout_s, key=key)
            except BrokerError as error:
                self.ledger.raised(entry, error)
            else:
                self.ledger.matches(entry, value, data)
                self.ledger.end(entry, "ok")

        await asyncio.gather(ask(), ask())

    async def stream(self, kind: str, method: str, params: dict[str, Any], count: int, **options: Any) -> None:
        """A call whose answer is `count` items; `stop_at` leaves it before the end."""
        stop_at = options.pop("stop_at", None)
        tag = self.next_tag()
        entry = self.ledger.open(tag, self.name, kind, self.timeout_s * 2)
        got = 0
        if "parts" in options:
            options["parts"] = self.parts(tag, count)
        try:
            params = {"tag": tag, **params}
            stream = await self.client.stream(f"data/{method}", params, timeout=self.timeout_s * 2, **options)
            try:
                async for value in stream:
                    if value != item(tag, got):
                        self.ledger.fault(entry, f"item {got} is {value!r:.100}")
                    got += 1
                    if got == stop_at:
                        break
                    if self.random.random() < 0.02:
                        await asyncio.sleep(0.05)
            finally:
                await stream.aclose()
        except BrokerError as error:
            self.ledger.raised(entry, error)
            return
        if stop_at is not None:
            self.ledger.end(entry, UNKNOWN, detail=f"left after {got} items")
            return
        if got != count:
            self.ledger.fault(entry, f"had {got} items of {count}")
        self.ledger.end(entry, "ok")

    async def streamed(self) -> None:
        count = self.random.choice((0, 1, 5, 50, 300))
        await self.stream("stream in", "items", {"count": count, "pause_s": self.random.choice((0, 0.005))}, count)

    async def left_early(self) -> None:
        await self.stream("left early", "items", {"count": 5000, "pause_s": 0.001}, 5000, stop_at=3)

    async def both(self) -> None:
        await self.stream("both", "both", {}, self.random.choice((0, 1, 20, 100)), parts=True)

    def parts(self, tag: str, count: int) -> Any:
        """Items to send: a generator, which is read in a thread, or one that is read on the loop."""
        if self.threads and self.random.random() < 0.5:
            return (item(tag, number) for number in range(count))
        return self._parts(tag, count)

    async def _parts(self, tag: str, count: int) -> AsyncIterator[Any]:
        for number in range(count):
            yield item(tag, number)
            if number % 10 == 9:
                await asyncio.sleep(0.001)

    async def sent(self) -> None:
        count, tag = self.random.choice((0, 1, 5, 50, 300)), self.next_tag()
        entry = self.ledger.open(tag, self.name, "stream out", self.timeout_s * 2)
        parts = self.parts(tag, count)
        try:
            value = await self.client.call("data/take", {"tag": tag}, timeout=self.timeout_s * 2, parts=parts)
        except BrokerError as error:
            self.ledger.raised(entry, error)
            return
        if value != {"count": count}:
            self.ledger.fault(entry, f"the worker had {value!r:.100} of {count} items")
        self.ledger.end(entry, "ok")


# ---------------------------------------------------------------- a plain JSON-RPC program


class PlainLink:
    """One WebSocket, and who waits for which id on it; a future is told None when the link ends."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.waiting: dict[int, asyncio.Future[dict[str, Any] | None]] = {}
        self.answered: set[int] = set()
        self.reading: asyncio.Task[None]

    @property
    def why(self) -> str:
        """How it ended."""
        return f"{self.socket.close_code} {self.socket.close_reason}"


class PlainCaller(Caller):
    """A WebSocket and JSON, no SDK: when its link breaks, it knows nothing of what was in flight, and opens another."""

    def __init__(self, *more: Any, **named: Any) -> None:
        super().__init__(*more, **named)
        self.link: PlainLink | None = None
        self.links: list[PlainLink] = []
        self.ids = 0
        self.read_pause_s = 0.0
        self.opening = asyncio.Lock()

    async def closed(self) -> None:
        for link in self.links:
            await link.socket.close()
            await link.reading

    async def linked(self) -> PlainLink | None:
        """The link there is, or a new one; None if none can be had now."""
        async with self.opening:
            if self.link is None:
                try:
                    socket = await connect(
                        self.url.replace("http", "ws", 1) + "/ws/data?listen=0", max_size=None, compression=None,
                        additional_headers={"Authorization": f"Bearer {self.token}"}, ping_interval=None,
                        close_timeout=1, open_timeout=5, proxy=None, max_queue=4,
                    )  # fmt: skip
                except (OSError, TimeoutError, InvalidHandshake):
                    return None
                link = self.link = PlainLink(socket)
                link.reading = asyncio.ensure_future(self._read(link))
                self.links = [old for old in self.links if not old.reading.done()] + [link]
            return self.link

    def _left(self, link: PlainLink) -> None:
        if self.link is link:
            self.link = None

    async def _read(self, link: PlainLink) -> None:
        try:
            async for text in link.socket:
                self._heard(link, json.loads(text))
                if self.read_pause_s:
                    await asyncio.sleep(self.read_pause_s)
        except WebSocketException:
            pass
        self.ledger.happened(f"{self.name}: link ended {link.why}")
        self._left(link)
        for future in link.waiting.values():
            if not future.done():
                future.set_result(None)

    def _heard(self, link: PlainLink, message: dict[str, Any]) -> None:
        number = message.get("id")
        if not isinstance(number, int):
            self.ledger.fault(None, f"{self.name} was told {message!r:.300}")
            return
        future = link.waiting.pop(number, None)
        if future is None:
            known = "a second time" if number in link.answered else "and never asked"
            self.ledger.fault(None, f"{self.name} was answered {number} {known}: {message!r:.300}")
        elif not future.done():
            future.set_result(message)
        link.answered.add(number)

    async def one(self) -> None:
        link = await self.linked()
        if link is None:
            await asyncio.sleep(0.1)
            return
        kind, method, params, timeout = self.question()
        data, tag = self.data(), self.next_tag()
        params |= {"tag": tag, "data": {"$base64": base64.b64encode(data).decode()}}
        self.ids += 1
        number = self.ids
        future = link.waiting[number] = asyncio.get_running_loop().create_future()
        entry = self.ledger.open(tag, self.name, kind, timeout)
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params, "meta": {"timeout": timeout}}
        cancel = {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": number}}
        try:
            await link.socket.send(json.dumps(message))
            if kind == "taken back":
                await asyncio.sleep(self.random.uniform(0.0, 0.3))
                await link.socket.send(json.dumps(cancel))
        except WebSocketException:
            self._left(link)
            self.lost(entry, link.why)
            return
        left_s = max(0.0, entry.due_at + PATIENCE_S - time.monotonic())
        await asyncio.wait((future,), timeout=left_s)
        if not future.done():
            if self.is_in_trouble(entry):
                self.ledger.end(entry, UNKNOWN, detail="no answer over a link in trouble")
                link.socket.transport.abort()
        elif (reply := future.result()) is None:
            self.lost(entry, link.why)
        else:
            self.ended(entry, reply, data)

    def question(self) -> tuple[str, str, dict[str, Any], float]:
        """Kind, method, parameters, timeout."""
        choice = self.random.random()
        if choice < 0.5:
            return "plain", "echo", {}, TIMEOUT_S
        if choice < 0.75:
            return "plain slow", "echo", {"seconds": self.random.uniform(0.01, 0.6)}, TIMEOUT_S
        if choice < 0.85:
            return "taken back", "echo", {"seconds": 2.0}, TIMEOUT_S
        if choice < 0.95:
            return "plain fail", "fail", {}, TIMEOUT_S
        return "plain hang", "hang", {}, self.random.uniform(0.1, 1.0)

    def lost(self, entry: Entry, why: str) -> None:
        """The link broke under it: only trouble of ours may do that."""
        if not self.is_in_trouble(entry):
            self.ledger.fault(entry, f"lost its link, and nobody had touched it: {why}")
        self.ledger.end(entry, UNKNOWN, detail=f"link lost: {why}")

    def ended(self, entry: Entry, reply: dict[str, Any], data: bytes) -> None:
        """The broker's answer."""
        error = reply.get("error")
        if error is None:
            self.ledger.matches(entry, reply["result"], data)
            self.ledger.end(entry, "ok")
        elif error["code"] in OUTCOMES:
            told = error.get("data", {})
            never = told.get("dispatched") is False
            self.ledger.end(entry, told.get("outcome", OUTCOMES[error["code"]]), never_ran=never)
        else:
            if error["message"] != str(fingerprint(entry.tag, data)):
                self.ledger.fault(entry, f"has the error of another: {error}")
            self.ledger.end(entry, "worker_error")


class SlowReader(PlainCaller):
    """Asks for large answers and reads them slowly: the broker may close its link, and nobody else may notice."""

    def question(self) -> tuple[str, str, dict[str, Any], float]:
        self.read_pause_s = self.random.choice((0.0, 0.05, 0.2))
        return "slow reader", "echo", {"size": 700_000}, TIMEOUT_S

    def lost(self, entry: Entry, why: str) -> None:
        self.ledger.end(entry, UNKNOWN, detail=f"link lost: {why}")

    def is_in_trouble(self, entry: Entry) -> bool:
        return True


# ---------------------------------------------------------------- HTTP


class HttpCaller(Caller):
    """POST /call, as curl and web pages do; sometimes it hangs up."""

    async def opened(self) -> None:
        self.http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.token}"}, timeout=aiohttp.ClientTimeout(TIMEOUT_S + PATIENCE_S)
        )

    async def closed(self) -> None:
        await self.http.close()

    async def one(self) -> None:
        if self.random.random() < 0.2:
            await self.streamed()
            return
        seconds = self.random.choice((0.0, 0.0, 0.0, 0.3))
        data, tag = self.random.randbytes(self.random.choice((0, 10, 1000))), self.next_tag()
        entry = self.ledger.open(tag, self.name, "http", TIMEOUT_S)
        params = {"tag": tag, "data": {"$base64": base64.b64encode(data).decode()}, "seconds": seconds}
        asking = asyncio.ensure_future(self._post("echo", params))
        if self.random.random() < 0.1:
            await asyncio.wait((asking,), timeout=0.1)
            asking.cancel()
        try:
            outcome, reply = await asking
        except asyncio.CancelledError:
            self.ledger.end(entry, UNKNOWN, detail="hung up")
            return
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.lost(entry, error)
            return
        if outcome == "ok":
            self.ledger.matches(entry, json.loads(reply), data)
        self.ledger.end(entry, outcome, detail=reply[:200].decode("utf-8", "replace") if outcome != "ok" else "")

    async def _post(self, method: str, params: dict[str, Any], accept: str = "application/json") -> tuple[str, bytes]:
        headers = {"Broker-Timeout": str(TIMEOUT_S), "Accept": accept}
        async with self.http.post(f"{self.url}/call/data/{method}", json=params, headers=headers) as reply:
            body = await reply.read()
            if "Broker-Outcome" in reply.headers or reply.status != 200:
                return reply.headers.get("Broker-Outcome", f"HTTP {reply.status}"), body
            return "ok", body

    async def streamed(self) -> None:
        """A stream as lines of JSON."""
        count, tag = self.random.choice((1, 5, 60)), self.next_tag()
        entry = self.ledger.open(tag, self.name, "http stream", TIMEOUT_S)
        try:
            outcome, body = await self._post("items", {"tag": tag, "count": count}, "application/x-ndjson")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.lost(entry, error)
            return
        lines = [json.loads(line) for line in body.splitlines()]
        if outcome == "ok":  # else it was refused, and the body says why
            items = [line["item"] for line in lines if "item" in line]
            ends = [line["end"]["outcome"] for line in lines if "end" in line]
            if len(ends) != 1 or "end" not in lines[-1]:
                self.ledger.fault(entry, f"ended {len(ends)} times: {lines[-2:]!r:.300}")
                ends = [UNKNOWN]
            outcome = ends[0]
            wanted = [item(tag, number) for number in range(count)]
            if items != wanted[: len(items)] or (outcome == "ok" and len(items) != count):
                self.ledger.fault(entry, f"had {len(items)} items of {count}: {items[-1:]!r:.300}")
        self.ledger.end(entry, outcome)

    def lost(self, entry: Entry, error: Exception) -> None:
        """The connection broke under it: only trouble of ours may do that."""
        if not self.is_in_trouble(entry):
            self.ledger.fault(entry, f"lost its connection, and nobody had touched it: {error!r}")
        self.ledger.end(entry, UNKNOWN, detail=repr(error))
