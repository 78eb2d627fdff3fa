"""All events in all orders: a hypothesis state machine over the router, judged by the witness after every step."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.events import (
    Answered,
    Asked,
    Attached,
    BadReply,
    Cancel,
    Congested,
    Detached,
    Drain,
    ErrorReply,
    Event,
    Malformed,
    Refused,
    Stray,
)
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, Options
from broker.core.sessions import Session
from tests.core.harness import NoLink
from tests.core.test_simulator import MUTANTS
from tests.core.witness import Witness

ENDPOINTS = {
    "least": EndpointLimits(),
    "round": EndpointLimits(policy="round_robin", queue_max=2),
    "newest": EndpointLimits(policy="newest", queue_max=0),
    "shut": EndpointLimits(closed="moved"),
}
LIMITS = Limits(
    in_flight_max=6, queue_max=3, capacity=2, fanouts_max=4, names_per_session_max=4, topics_per_endpoint_max=50,
    endpoints_known_max=50,
)  # fmt: skip
names = st.sampled_from(["least", "least", "round", "newest", "shut", "plain", "other"])
methods = st.sampled_from(["a", "b", "c"])
wire_ids = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, "", "1", "x"])
numbers = st.integers(0, 11)
GRANTS = {
    "all": (Grant(Role.CALLER | Role.WORKER),),
    "caller": (Grant(Role.CALLER),),
    "some": (Grant(Role.CALLER | Role.WORKER, ("least", "p*")),),
    "listener": (Grant(Role.LISTENER),),
    "admin": (Grant(Role.ADMIN),),
}


class RouterMachine(RuleBasedStateMachine):
    """Peers come, ask, answer, misbehave and go, while time passes in small and large steps."""

    def __init__(self) -> None:
        super().__init__()
        self.witness = Witness(LIMITS, ENDPOINTS, now=0.0)
        self.made = 0
        self.ids = 100
        self.gone: list[Session] = []

    # ------------------------------------------------------------ who

    def peer(self, number: int) -> Session:
        peers = list(self.witness.sessions)
        return peers[number % len(peers)]

    def busy_worker(self, number: int) -> Session:
        workers = [session for session, attempts in self.witness.assigned.items() if attempts]
        return workers[number % len(workers)]

    @property
    def somebody_works(self) -> bool:
        return any(self.witness.assigned.values())

    def feed(self, event: Event) -> None:
        self.witness.feed(event)

    # ------------------------------------------------------------ comings and goings

    @initialize(workers=st.integers(1, 3), capacity=st.integers(1, 2))
    def first_peers(self, workers: int, capacity: int) -> None:
        self.come(Role.CALLER, "all", None)
        self.come(Role.LISTENER, "all", "least", listen=True)
        for _ in range(workers):
            self.come(Role.WORKER, "all", "least", capacity=capacity)
        self.come(Role.WORKER, "all", "round", capacity=1)

    def come(
        self, role: Role, grants: str, endpoint: str | None, *, listen: bool = False, capacity: int | None = None,
        lives_s: float | None = None,
    ) -> None:  # fmt: skip
        self.made += 1
        self.feed(
            Attached(
                session=self.made, link=NoLink(), principal=grants, grants=GRANTS[grants], role=role, endpoint=endpoint,
                listen=listen, capacity=capacity, expires_at=None if lives_s is None else self.witness.now + lives_s,
            )
        )  # fmt: skip

    @precondition(lambda self: len(self.witness.sessions) < 12)
    @rule(
        role=st.sampled_from([Role.WORKER, Role.WORKER, Role.CALLER, Role.LISTENER]),
        grants=st.sampled_from(["all", "all", "all", *GRANTS]),
        endpoint=st.none() | names,
        listen=st.booleans(),
        capacity=st.none() | st.integers(1, 3),
        lives_s=st.none() | st.sampled_from([0.0, 0.3, 40.0]),
    )
    def attach(
        self, role: Role, grants: str, endpoint: str | None, listen: bool, capacity: int | None, lives_s: float | None
    ) -> None:
        if endpoint is None or not self.witness.closed(endpoint):  # there a link is turned away
            self.come(role, grants, endpoint, listen=listen, capacity=capacity, lives_s=lives_s)

    @precondition(lambda self: len(self.witness.sessions) > 2)
    @rule(number=numbers, flushed=st.integers(0, 1))
    def leave(self, number: int, flushed: int) -> None:
        session = self.peer(number)
        self.gone.append(session)
        self.feed(Detached(session, 1006, "", flushed))

    # ------------------------------------------------------------ asking, answering: most of what happens

    @rule(
        number=numbers,
        endpoint=st.sampled_from(["least", "least", "round", "newest"]),
        asked=st.lists(
            st.tuples(methods, st.sampled_from([0.05, 0.2, 5.0]), st.integers(0, 2)), min_size=1, max_size=5
        ),
    )
    def ask_well(self, number: int, endpoint: str, asked: list[tuple[str, float, int]]) -> None:
        """Several at once, with ids of their own, so that places and queues fill."""
        session = self.peer(number)
        for method, timeout, retries in asked:
            self.ids += 1
            options = Options(timeout=timeout, idempotent=retries > 0, retries=retries)
            self.feed(Asked(session, self.ids, endpoint, method, Body(b"[]"), options))

    @rule(
        number=numbers,
        wire_id=wire_ids,
        endpoint=names,
        method=methods,
        timeout=st.none() | st.sampled_from([0.01, 0.2, 1.0, 5.0, 3600.0]),
        wait=st.booleans(),
        retries=st.sampled_from([0, 0, 1, 3]),
        meta=st.booleans(),
        twice=st.booleans(),
    )
    def ask(
        self, number: int, wire_id: int | str, endpoint: str, method: str, timeout: float | None, wait: bool,
        retries: int, meta: bool, twice: bool,
    ) -> None:  # fmt: skip
        options = Options(timeout=timeout, wait=wait, idempotent=retries > 0, retries=retries, meta=meta)
        for _ in range(1 + twice):
            self.feed(Asked(self.peer(number), wire_id, endpoint, method, Body(b"[]"), options))

    @precondition(lambda self: self.somebody_works)
    @rule(number=numbers, which=numbers, error=st.none() | st.sampled_from([0, -32000, -32601]), again=st.booleans())
    def answer(self, number: int, which: int, error: int | None, again: bool) -> None:
        worker = self.busy_worker(number)
        attempts = list(self.witness.assigned[worker])
        attempt = attempts[which % len(attempts)]
        for _ in range(1 + again):
            reply = None if error is None else ErrorReply(error)
            self.feed(Answered(worker, attempt, Body(b"%d" % attempt), reply))

    @precondition(lambda self: self.somebody_works)
    @rule(number=numbers, which=numbers, bystander=numbers)
    def another_answers(self, number: int, which: int, bystander: int) -> None:
        worker = self.busy_worker(number)
        attempts = list(self.witness.assigned[worker])
        self.feed(Answered(self.peer(bystander), attempts[which % len(attempts)], Body(b"not mine")))

    @precondition(lambda self: any(self.witness.open.values()))
    @rule(number=numbers, which=numbers)
    def cancel(self, number: int, which: int) -> None:
        callers = [session for session, mine in self.witness.open.items() if mine]
        caller = callers[number % len(callers)]
        wire_ids = list(self.witness.open[caller])
        self.feed(Cancel(caller, wire_ids[which % len(wire_ids)]))

    # ------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.04, 0.06, 0.2, 0.5, 5.1, 4000.0]), limit=st.integers(1, 5))
    def time_passes(self, seconds: float, limit: int) -> None:
        self.witness.now += seconds
        while self.witness.tick(limit)[0]:
            pass

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.2, 5.0]))
    def time_passes_and_the_loop_is_late(self, seconds: float) -> None:
        self.witness.now += seconds
        if seconds != 0.2:
            self.witness.tick(1)

    # ------------------------------------------------------------ the broker's own methods

    def command(self, number: int, wire_id: int | str, method: str, **params: object) -> None:
        raw = json.dumps({name: value for name, value in params.items() if value is not None}).encode()
        self.feed(Asked(self.peer(number), wire_id, "", method, Body(raw)))

    @rule(
        number=numbers,
        wire_id=wire_ids,
        endpoint=names,
        capacity=st.none() | st.integers(1, 4),
        declared=st.none() | st.lists(methods, max_size=2),
        method=st.sampled_from(["broker.serve", "broker.serve", "broker.unserve"]),
    )
    def serve(
        self, number: int, wire_id: int | str, endpoint: str, capacity: int | None, declared: list[str] | None,
        method: str,
    ) -> None:  # fmt: skip
        if method == "broker.serve":
            self.command(number, wire_id, method, endpoint=endpoint, capacity=capacity, methods=declared)
        else:
            self.command(number, wire_id, method, endpoint=endpoint)

    @rule(
        number=numbers,
        wire_id=wire_ids,
        endpoint=st.sampled_from(["least", "least", "plain", "shut", None]),
        topic=st.sampled_from([None, None, "t", "broker.peers"]),
        to=st.none() | st.integers(1, 5),
        method=st.sampled_from(["publish", "publish", "subscribe", "unsubscribe"]),
        limit=st.integers(0, 3),
    )
    def broadcasts(
        self, number: int, wire_id: int | str, endpoint: str | None, topic: str | None, to: int | None, method: str,
        limit: int,
    ) -> None:  # fmt: skip
        if method == "publish":
            peer = None if to is None else f"n-{to}"
            self.command(number, wire_id, "broker.publish", endpoint=endpoint, topic=topic, to=peer, data=1)
        else:
            self.command(number, wire_id, f"broker.{method}", endpoint=endpoint, topic=topic)
        if limit:
            while self.witness.fan_out(limit):
                pass

    # ------------------------------------------------------------ everything else, in one rule, so that it stays rare

    @rule(
        what=st.sampled_from(
            [
                "notify",
                "refused",
                "look",
                "cancel",
                "bad reply",
                "any reply",
                "stray",
                "outbox",
                "malformed",
                "echo",
                "drain",
                "close",
            ]
        ),
        number=numbers,
        wire_id=wire_ids,
        endpoint=names,
        flag=st.booleans(),
        code=st.sampled_from([-32600, -32700, -1]),
        attempt=st.integers(0, 60),
    )
    def trouble(
        self, what: str, number: int, wire_id: int | str, endpoint: str, flag: bool, code: int, attempt: int
    ) -> None:
        peer = self.peer(number)
        match what:
            case "notify":
                self.feed(Asked(peer, None, endpoint, "a", Body(b"[]")))
            case "refused":
                self.feed(Refused(peer, wire_id, errors.INVALID_PARAMS if flag else errors.INVALID_REQUEST, "no"))
            case "look":
                method = ("endpoints", "ping", "admin.peers", "admin.pending", "nonsense", "describe", "call")[
                    attempt % 7
                ]
                self.command(number, wire_id, f"broker.{method}")
            case "cancel":
                self.command(number, wire_id, "broker.admin.cancel", request=attempt)
            case "bad reply":
                self.feed(BadReply(peer, attempt, "no md5"))
            case "any reply":
                self.feed(Answered(peer, attempt, Body(b"1")))
            case "stray":
                self.feed(Stray(peer, foreign=flag, nameless=not flag, body=Body(b"2"), error=ErrorReply(code)))
            case "outbox":
                self.feed(Congested(peer, flag))
            case "malformed":
                self.feed(Malformed(peer, "what", flag))
            case "echo":
                self.echo(number, attempt)
            case "close" if endpoint in ("round", "plain"):
                closed = {endpoint: EndpointLimits(closed="moved")} if flag else {}
                self.witness.reconfigure(ENDPOINTS | closed)
            case "drain" if self.made > 9:
                self.feed(Drain(flag))

    def echo(self, number: int, which: int) -> None:
        """Something of one that has left is heard after it."""
        if self.gone:
            session = self.gone[number % len(self.gone)]
            events: tuple[Event, ...] = (
                Asked(session, number, "least", "a", Body(b"")),
                Asked(session, number, "", "broker.serve", Body(b'{"endpoint":"least"}')),
                Answered(session, which, Body(b"1")),
                Cancel(session, number),
                Detached(session, 1006, "", 0),
                Stray(session, foreign=True),
                Congested(session, True),
            )
            self.feed(events[which % len(events)])

    def teardown(self) -> None:
        while self.witness.tick(3)[0]:
            pass
        self.witness.leave_all()


SETTINGS = settings(max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
RouterMachine.TestCase.settings = SETTINGS
TestRouterMachine = RouterMachine.TestCase


@pytest.mark.parametrize("name", ["expired_work_is_given_out", "anybody_may_answer", "deadlines_come_late"])
def test_the_machine_finds_a_broken_router(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    quick = settings(SETTINGS, database=None, phases=[Phase.generate], derandomize=True, max_examples=300)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(RouterMachine, settings=quick)
