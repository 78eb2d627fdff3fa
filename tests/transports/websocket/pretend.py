"""Pretend transports, and peers that say over them whatever comes into their heads."""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import Callable

from broker.links.loop import RECEIVE_BYTES
from broker.links.socket import SocketLink
from broker.wire.frames import CLOSE, PING, TEXT, FrameParser, masked_frame
from tests.chaos.virtual import Pretended

ASKED = ("least/m", "least/m", "least/m", "least/k", "round/m", "sticky/q", "fresh/m", "nowhere/m")
CALM_ASKED = ("least/m", "least/m", "least/m", "least/m", "least/m", "least/k", "fresh/m")
METAS: tuple[dict[str, object], ...] = (
    {"timeout": 0.5}, {"timeout": 3}, {"timeout": 1e9}, {"key": "k"}, {"group": "h"}, {"idempotent": True},
    {"wait": True}, {"timing": True}, {"stream": "in"}, {"stream": "out"}, {"progress": True}, {"trace": "t"},
    {"idle": 1.0},
)  # fmt: skip
METHODS = (
    "broker.publish", "broker.serve", "broker.unserve", "broker.subscribe", "broker.ping", "broker.pending",
    "broker.endpoints", "broker.admin.pending", "broker.admin.peers", "broker.admin.memory", "broker.call",
    "broker.describe",
)  # fmt: skip
"""the broker's own"""
PARAMS: tuple[dict[str, object], ...] = ({}, {"endpoint": "least"}, {"topic": "t", "data": 1})


class Transport(Pretended, asyncio.Transport):
    """What a link writes to: takes everything, or, while it is stuck, some of it."""

    def __init__(
        self, number: int, say: Callable[[int, str], None], kernel: random.Random, *, one_by_one: bool
    ) -> None:
        """`kernel` draws how much it takes; `one_by_one`: no chunk that comes holds of more than one frame."""
        super().__init__()
        self.number = number
        self.say = say
        self.kernel = kernel
        self.one_by_one = one_by_one
        self.link: SocketLink
        self.ends: deque[int] = deque()
        """of the frames that have not wholly come through"""
        self.said = self.heard = 0
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.parser = FrameParser(masked=False)
        self.messages: list[bytes] = []
        self.reading = self.stuck = self.closing = self.lost = False

    # ------------------------------------------------------------ what a link calls

    def write(self, data: bytes | bytearray | memoryview) -> None:  # type: ignore[override, unused-ignore]
        data = bytes(data)
        self.say(self.number, f"writes {data!r}")
        taken = self.kernel.randrange(len(data) + 1) if self.stuck else len(data)
        self._take(data[:taken])
        self.outgoing += data[taken:]
        if self.outgoing:
            self.link.pause_writing()

    def write_eof(self) -> None:
        self.say(self.number, "writes no more")

    def pause_reading(self) -> None:
        self.reading = False
        self.say(self.number, "pauses")

    def resume_reading(self) -> None:
        self.reading = True
        self.say(self.number, "reads")

    def close(self) -> None:
        self.say(self.number, "closes")
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.lose)

    def abort(self) -> None:
        self.close()

    # ------------------------------------------------------------ what befalls it

    def _take(self, data: bytes) -> None:
        self.messages += [event[1] for event in self.parser.feed(data) if event[0] == TEXT]

    def unstick(self) -> None:
        """It takes what it did not."""
        self.stuck = False
        if self.outgoing and not self.lost:
            data = bytes(self.outgoing)
            self.outgoing.clear()
            self._take(data)
            self.link.resume_writing()

    def lose(self) -> None:
        """The connection is gone."""
        if not self.lost:
            self.lost = self.closing = True
            self.outgoing.clear()
            self.link.connection_lost(None)

    def add(self, frame: bytes) -> None:
        """The peer says something; it does not come through yet."""
        self.incoming += frame
        self.said += len(frame)
        self.ends.append(self.said)

    def deliver(self, size: int) -> None:
        """So many bytes of what the peer has said reach the link, if it reads."""
        while size and self.incoming and self.reading and not self.closing:
            buffer = self.link.get_buffer(-1)
            count = min(size, len(buffer), RECEIVE_BYTES, self._at_once())
            buffer[:count] = self.incoming[:count]
            del self.incoming[:count]
            self.heard += count
            size -= count
            self.link.buffer_updated(count)

    def _at_once(self) -> int:
        while self.ends[0] <= self.heard:
            self.ends.popleft()
        return self.ends[0] - self.heard if self.one_by_one else len(self.incoming)


class Numbers:
    """The numbers of requests, one after the other over all peers."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last


class Peer:
    """One peer, and whatever comes into its head."""

    def __init__(
        self, transport: Transport, endpoint: str, rng: random.Random, numbers: Numbers, *, calm: bool
    ) -> None:
        self.transport = transport
        self.endpoint = endpoint
        self.rng = rng
        self.numbers = numbers
        self.calm = calm
        acts: list[tuple[Callable[[], None], float]] = [
            (self.answer, 60 if calm else 45), (self.call, 40), (self.batch, 3), (self.nonsense, 1.3), (self.ping, 4),
            (self.cancel, 2), (self.ask_broker, 2), (self.leave, 0.05), (self.break_frame, 0.05),
            (self.break_text, 0.05),
        ]  # fmt: skip
        self.acts = [act for act, _ in acts]
        self.weights = [weight for _, weight in acts]

    def talk(self) -> None:
        """Say something, or much at once."""
        for _ in range(self.rng.choice((1, 1, 2, 5, 20))):
            self.rng.choices(self.acts, self.weights)[0]()

    def say(self, message: object) -> None:
        self.text(json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode())

    def text(self, payload: bytes) -> None:
        """One message, now and then in two frames, maybe with a ping between them."""
        rng, mask = self.rng, self.rng.randbytes(4)
        if rng.random() >= 0.03 or len(payload) < 3:
            self.transport.add(masked_frame(TEXT, payload, mask))
            return
        at = rng.randrange(1, len(payload))
        begin, end = (bytearray(masked_frame(TEXT, part, mask)) for part in (payload[:at], payload[at:]))
        begin[0], end[0] = TEXT, 0x80  # goes on in the next; the last
        self.transport.add(bytes(begin))
        if rng.random() < 0.5:
            self.ping()
        self.transport.add(bytes(end))

    # ------------------------------------------------------------ its ideas

    def answer(self) -> None:
        """The answer to a call that reached it, now and then twice."""
        answer = self.an_answer()
        if answer is None:
            return
        for _ in range(1 + (self.rng.random() < 0.05)):
            self.say(answer)

    def an_answer(self) -> dict[str, object] | None:
        messages, rng = self.transport.messages, self.rng
        while messages:
            said = json.loads(messages.pop(0 if rng.random() < 0.8 else -1))
            call = said[0] if isinstance(said, list) else said
            if "method" not in call or "id" not in call:
                continue
            answer: dict[str, object] = {"jsonrpc": "2.0", "id": call["id"]}
            chance = rng.random()
            if chance < 0.07:
                return answer | {"error": {"code": -1, "message": "no"}}
            answer["result"] = rng.choice((1, {"b": 2}, "y" * rng.choice((10, 5000, 18_000))))
            return answer | {"meta": {"x": 1}} if chance < 0.14 else answer
        return None

    def call(self) -> None:
        self.say(self.a_call())

    def a_call(self) -> dict[str, object]:
        rng, calm = self.rng, self.calm
        number = self.numbers.next()
        names = ("m", "m", "m", "k") if self.endpoint else CALM_ASKED if calm else ASKED
        call: dict[str, object] = {"jsonrpc": "2.0", "id": number, "method": rng.choice(names)}
        call["params"] = rng.choice(([1], [1], {"a": "é"}, ["x" * rng.choice((10, 500, 5000, 20_000))]))
        if rng.random() < (0.05 if calm else 0.3):
            call["id"] = rng.choice((f"s{number}", max(1, number - 3)))
        if rng.random() < (0.03 if calm else 0.15):
            call["meta"] = rng.choice(METAS)
        if rng.random() < 0.04:
            del call["id"]
        return call

    def batch(self) -> None:
        calls: list[object] = [self.a_call() for _ in range(self.rng.randrange(1, 4))]
        answer = self.an_answer() if self.rng.random() < 0.3 else None
        self.say(calls if answer is None else [*calls, answer])

    def nonsense(self) -> None:
        self.text(self.rng.choice((b"junk", b'{"jsonrpc":"2.0","id":1}')))

    def ping(self) -> None:
        self.transport.add(masked_frame(PING, b"p", b"abcd"))

    def cancel(self) -> None:
        number = max(1, self.numbers.last - self.rng.randrange(4))
        self.say({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": number}})

    def ask_broker(self) -> None:
        number = self.numbers.next()
        method, params = self.rng.choice(METHODS), self.rng.choice(PARAMS)
        self.say({"jsonrpc": "2.0", "id": f"o{number}", "method": method, "params": params})

    def leave(self) -> None:
        self.transport.add(masked_frame(CLOSE, b"\x03\xe8", b"abcd"))

    def break_frame(self) -> None:
        self.transport.add(b"\xff\xff\xff")

    def break_text(self) -> None:
        self.text(b"\xff\xfe")
