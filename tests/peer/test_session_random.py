"""The session under random weather, by seed: whatever happens, every call ends exactly once, and nothing is left."""

import json
import random
from typing import Any

import pytest

from broker.peer.errors import BrokerError, ConnectionLost
from broker.peer.session import GUARD_S, Ended, Frame, Options, Pending, Session

STEPS = 400


class Weather:
    """A session, a link that may break after any byte, and a broker that answers some of what reaches it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.session = Session()
        self.now = 0.0
        self.asked: list[Pending] = []
        self.ended: dict[int, BrokerError | None] = {}
        self.sent: list[tuple[int, Frame]] = []
        self.enqueued = 0
        self.reached: set[int] = set()
        self.answered: set[int] = set()
        self.trace: list[str] = []

    def perform(self, results: list[Any]) -> None:
        for result in results:
            if isinstance(result, Ended):
                assert result.call.id not in self.ended, "it ended twice"
                self.ended[result.call.id] = result.error
                self.trace.append(f"{self.now:.3f} {result.call.id} {type(result.error).__name__}")

    def ask(self) -> None:
        options = Options(
            timeout=self.random.choice([None, 0.5, 3.0, 30.0]), idempotent=self.random.random() < 0.4,
            wait=self.random.random() < 0.2,
        )  # fmt: skip
        self.asked.append(self.session.ask("data/read", b"[1]", (), options, None, self.now))

    def write(self) -> None:
        if not self.session.linked:
            return
        while (frame := self.session.take(self.now)) is not None:
            self.enqueued += len(b"".join(frame.pieces))
            if frame.call is not None:
                frame.call.mark = self.enqueued
            self.sent.append((self.enqueued, frame))

    def answer(self) -> None:
        if not self.sent or not self.session.linked:
            return
        _, frame = self.random.choice(self.sent)
        message = json.loads(b"".join(frame.pieces))
        if "id" not in message:
            return
        self.reached.add(message["id"])
        self.answered.add(message["id"])
        error = {"error": {"code": -32000, "message": "bad"}} if self.random.random() < 0.3 else {"result": 1}
        text = json.dumps({"jsonrpc": "2.0", "id": message["id"]} | error).encode()
        self.perform(list(self.session.receive(text, False, self.now)))

    def breaks(self) -> None:
        if not self.session.linked:
            self.session.attached(self.now)
            self.enqueued, self.sent = 0, []
            return
        flushed = self.random.randint(0, self.enqueued)
        self.reached.update(f.call.id for mark, f in self.sent if f.call is not None and mark <= flushed)
        self.perform(self.session.detached(flushed, "broke", come_back=self.random.random() < 0.95))

    def cancel(self) -> None:
        if self.asked:
            ended = self.session.cancel(self.random.choice(self.asked))
            self.perform([ended] if ended else [])

    def wait(self) -> None:
        self.now += self.random.choice([0.01, 0.1, 1.0])
        if self.session.next_deadline() <= self.now:
            self.perform(self.session.expire(self.now))

    def step(self) -> None:
        actions = [self.ask, self.ask, self.write, self.write, self.answer, self.answer, self.breaks, self.cancel]
        self.random.choice([*actions, self.wait])()
        for call in self.session.pending.values():
            assert call.id not in self.ended
            if call.deadline is not None:
                assert self.now <= call.deadline + GUARD_S + 1.1, "it hangs beyond its deadline"

    def run(self) -> None:
        for _ in range(STEPS):
            self.step()
        self.perform(self.session.detached(self.enqueued, "the end", come_back=False))


@pytest.mark.parametrize("seed", range(40))
def test_every_call_ends_once_and_in_time(seed: int) -> None:
    weather = Weather(seed)
    weather.run()
    assert sorted(weather.ended) == sorted(call.id for call in weather.asked)
    assert not weather.session.pending
    assert not weather.session.outbox
    assert len(weather.session._deadlines) == 0
    for call in weather.asked:
        error = weather.ended[call.id]
        if isinstance(error, ConnectionLost) and not error.may_have_executed:
            assert call.id not in weather.reached, "it said that it had not reached the broker"


def test_the_same_seed_gives_the_same_trace() -> None:
    traces = []
    for _ in range(2):
        weather = Weather(7)
        weather.run()
        traces.append(weather.trace)
    assert traces[0] == traces[1]
    assert traces[0]
