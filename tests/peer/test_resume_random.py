"""Resuming under any weather: links cut anywhere, messages doubled, sessions forgotten; every call still ends once.

The broker's end is played here, as the protocol has it: it counts what arrives, numbers and keeps what it says, and
answers each call with as many items as the caller sent and then their sum.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from broker.peer.errors import ConnectionLost
from broker.peer.session import CancelAsked, Ended, Heard, Item, Options, Pending, ProgressCame, Session

ITEMS = 11
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""shrinking two hundred steps takes minutes; the failing ones can be shortened by hand"""


class PlayedSession:
    """What the broker has of one session."""

    def __init__(self, number: int) -> None:
        self.name = f"n-{number}"
        self.received = 0
        self.n = 0
        self.kept: list[dict[str, Any]] = []
        self.calls: dict[int, list[int]] = {}
        """by id: the items that came, the next part to send, and up to where the caller takes them"""

    def say(self, **members: Any) -> dict[str, Any]:
        self.n += 1
        message = {"jsonrpc": "2.0", **members, "meta": {"n": self.n}}
        self.kept.append(message)
        return message


class Weather:
    """A session, the broker's end of it, and two queues of messages between them."""

    def __init__(self, *, forgets: bool) -> None:
        self.session = Session(30.0)
        self.forgets = forgets
        self.played: PlayedSession | None = None
        self.made = 0
        self.up: list[tuple[int, dict[str, Any]]] = []  # bytes written up to its end, message
        self.down: list[dict[str, Any]] = []
        self.written = 0
        self.now = 0.0
        self.asked: dict[Pending, bool] = {}
        self.given: dict[Pending, int] = {}
        self.items: dict[Pending, list[int]] = {}
        self.ended: dict[Pending, Ended] = {}
        self.executed: dict[int, int] = {}
        self.heard = 0

    # what the peer does

    def ask(self, number: int) -> None:
        sends = number % 3 == 0
        options = Options(idempotent=number % 2 == 0, timeout=[None, 40.0][number % 5 == 0])
        call = self.session.ask("data/add", b"[1]", (), options, None, self.now, reader=self, sends=sends)
        self.asked[call] = sends
        self.items[call] = []
        self.given[call] = 0

    def item(self, value: Any) -> None: ...

    def send(self, number: int) -> None:
        open_calls = [call for call, sends in self.asked.items() if sends and self.given[call] <= ITEMS]
        if not open_calls:
            return
        call = open_calls[number % len(open_calls)]
        if not self.session.has_room(call):
            return
        given = self.given[call]
        self.given[call] += 1
        self.session.send_item(call, b"%d" % given if given < ITEMS else b"", last=given == ITEMS)

    def cancel(self, number: int) -> None:
        calls = list(self.asked)
        if calls and number % 4 == 0:
            ended = self.session.cancel(calls[number % len(calls)])
            self.perform([ended] if ended else [])

    def wait(self, number: int) -> None:
        self.now += number
        self.perform(self.session.expire(self.now))

    def perform(self, results: Any) -> None:
        for result in results:
            assert not isinstance(result, (CancelAsked, ProgressCame))
            if isinstance(result, Heard):
                assert result.seq is not None
                assert result.seq > self.heard, "a broadcast twice"
                self.heard = result.seq
            elif isinstance(result, Item):
                assert isinstance(result.owner, Pending)
                assert result.owner not in self.ended, "an item after the end"
                assert result.value == len(self.items[result.owner]), "a gap, or one twice"
                self.items[result.owner].append(result.value)
                self.session.consumed(result.owner)
            elif isinstance(result, Ended):
                assert result.call not in self.ended, "it ended twice"
                self.ended[result.call] = result

    # what the link does

    def pump(self, number: int = 1000) -> None:
        if not self.session.linked:
            return
        for _ in range(number + 1):
            frame = self.session.take(self.now)
            if frame is None:
                return
            data = b"".join(frame.pieces)
            self.written += len(data)
            if frame.call is not None:
                frame.call.mark = self.written
            self.up.append((self.written, json.loads(data)))

    def arrive_up(self, number: int = 1000) -> None:
        for _ in range(number + 1):
            if not self.up:
                return
            self.broker_gets(self.up.pop(0)[1])

    def arrive_down(self, number: int = 1000) -> None:
        for _ in range(number + 1):
            if not self.down:
                return
            self.perform(self.session.receive(json.dumps(self.down.pop(0)).encode(), False, self.now))

    def double(self, number: int) -> None:
        """The broker says again what it had said."""
        if self.played is not None and self.session.ready and not self.down and self.played.kept:
            self.down.append(self.played.kept[number % len(self.played.kept)])

    def cut(self, number: int) -> None:
        """Some of what was written arrives, some of the rest was flushed, and what was on its way down is lost."""
        if not self.session.linked:
            return
        self.arrive_up(number % 4 - 1)
        flushed = self.up[number % len(self.up)][0] if self.up else self.written
        self.up.clear()
        self.down.clear()
        self.written = 0
        self.perform(self.session.detached(flushed, "broke", come_back=True))

    def link(self, number: int) -> None:
        if self.session.linked:
            return
        offer = self.session.resume
        played = self.played
        self.session.attached(self.now)
        resumed = played is not None and offer is not None and offer[0] == played.name
        if not resumed:
            self.made += 1
            played = self.played = PlayedSession(self.made)
        assert played is not None
        stands = {"id": played.name, "secret": "s", "grace": 30, "resumed": resumed, "received": played.received}
        self.down.append({"jsonrpc": "2.0", "method": "broker.session", "params": stands})
        if resumed:
            assert offer is not None
            self.down += [message for message in played.kept if message["meta"]["n"] > offer[2]]

    def forget(self, number: int) -> None:
        """The grace is over."""
        if self.forgets and not self.session.linked and number % 3 == 0:
            self.played = None

    # what the broker does

    def broker_gets(self, message: dict[str, Any]) -> None:
        played = self.played
        assert played is not None
        played.received += 1
        method, params = message["method"], message.get("params")
        if method == "data/add":
            number = message["id"]
            assert number not in played.calls, "asked twice in one session"
            self.executed[number] = self.executed.get(number, 0) + 1
            news = {"seq": sum(self.executed.values()), "data": number}
            self.down.append(played.say(method="broker.message", params=news))
            sends = message.get("meta", {}).get("stream") == "both"
            played.calls[number] = [0 if sends else ITEMS, 0, 4]
            self.go_on(number)
        elif method == "$/part":
            call = played.calls.get(params["id"])
            if call is not None:
                assert params["seq"] == call[0], "a gap, or one twice"
                if params.get("last"):
                    assert call[0] == ITEMS
                else:
                    assert params["data"] == call[0]
                    call[0] += 1
                    self.down.append(
                        played.say(method="$/credit", params={"id": params["id"], "upto": call[0] + 4})
                    )  # fmt: skip
                self.go_on(params["id"])
        elif method == "$/credit":
            call = played.calls.get(params["id"])
            if call is not None:
                call[2] = params["upto"]
                self.go_on(params["id"])
        elif method == "$/cancelRequest":
            played.calls.pop(params["id"], None)
        else:
            assert method == "$/ack"
            assert params["n"] <= played.n
            played.kept = [kept for kept in played.kept if kept["meta"]["n"] > params["n"]]
        if played.received % 5 == 0:
            self.down.append({"jsonrpc": "2.0", "method": "$/ack", "params": {"n": played.received}})

    def go_on(self, number: int) -> None:
        played = self.played
        assert played is not None
        call = played.calls[number]
        while call[1] < min(call[0], call[2]):
            params = {"id": number, "seq": call[1], "data": call[1]}
            self.down.append(played.say(method="$/part", params=params))
            call[1] += 1
        if call[1] == ITEMS:
            del played.calls[number]
            self.down.append(played.say(id=number, result="end"))

    def settle(self) -> None:
        """Fine weather: everything that can still come comes."""
        self.link(0)
        for _ in range(100):
            for number in range(len(self.asked)):
                self.send(number)
            self.pump()
            self.arrive_up()
            self.arrive_down()
            if not (self.session.pending or self.session.outbox or self.up or self.down):
                return
        self.wait(100)  # those whose time was up are passed over by `take`, and ended a little later


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "send", "send", "send", "pump", "pump", "arrive_up", "arrive_up", "arrive_down",
             "arrive_down", "double", "cut", "link", "link", "cancel", "wait", "forget"]
        ),
        st.integers(0, 15),
    ),
    min_size=80,
    max_size=200,
)  # fmt: skip


def check(weather: Weather, steps: list[tuple[str, int]]) -> None:
    for name, number in steps:
        getattr(weather, name)(number)
    weather.settle()
    assert weather.ended.keys() == weather.asked.keys(), "each call ended, once"
    session = weather.session
    assert not session.pending
    assert not session._streams
    assert len(session._deadlines) == 0
    for call, ended in weather.ended.items():
        runs = weather.executed.get(call.id, 0)
        if ended.error is None:
            assert ended.value == "end"
            assert weather.items[call] == list(range(ITEMS))
        if isinstance(ended.error, ConnectionLost) and not ended.error.may_have_executed:
            assert runs == 0, "it said that it had not reached the broker"
        assert runs <= (2 if call.options.idempotent else 1)


@settings(max_examples=50, deadline=None, phases=NO_SHRINKING)
@given(STEPS)
def test_while_the_session_is_kept_nothing_is_lost(steps: list[tuple[str, int]]) -> None:
    weather = Weather(forgets=False)
    check(weather, steps)
    for call, ended in weather.ended.items():
        assert weather.executed.get(call.id, 0) <= 1
        if call.options.timeout is None:
            assert not isinstance(ended.error, ConnectionLost) or session_was_given_up(weather)


def session_was_given_up(weather: Weather) -> bool:
    """Whether link after link broke before anything arrived, so that another session was begun."""
    return weather.made > 1


def test_what_ran_in_an_earlier_session_is_not_forgotten_by_the_next() -> None:
    """It ran, was asked again in a new session, where it never arrived, and was lost with that one too."""
    steps = [
        ("ask", 6), ("link", 2), ("arrive_down", 5), ("pump", 7), ("cut", 9), ("forget", 3), ("link", 10),
        ("arrive_down", 9), ("pump", 12), ("cut", 0), ("link", 10), ("arrive_down", 11), ("cut", 9), ("forget", 9),
    ]  # fmt: skip
    check(Weather(forgets=True), steps)


@settings(max_examples=50, deadline=None, phases=NO_SHRINKING)
@given(STEPS)
def test_when_the_session_is_forgotten_each_call_still_ends_once(steps: list[tuple[str, int]]) -> None:
    check(Weather(forgets=True), steps)
