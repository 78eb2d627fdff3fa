"""All events in all orders: a hypothesis state machine over the router, judged by the witness after every step."""

from __future__ import annotations

import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

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

    @initialize()
    def first_peers(self) -> None:
        self.attach(Role.CALLER, "all", None, False, None, None)
        self.attach(Role.WORKER, "all", "least", False, 1, None)
        self.attach(Role.WORKER, "all", "round", True, 2, None)

    @rule(
        role=st.sampled_from([Role.CALLER, Role.WORKER, Role.LISTENER]),
        grants=st.sampled_from(["all", "all", "all", *GRANTS]),
        endpoint=st.none() | names.filter(lambda name: name != "shut"),
        listen=st.booleans(),
        capacity=st.none() | st.integers(1, 3),
        lives_s=st.none() | st.sampled_from([0.0, 0.3, 40.0]),
    )
    def attach(
        self, role: Role, grants: str, endpoint: str | None, listen: bool, capacity: int | None, lives_s: float | None
    ) -> None:
        if len(self.witness.sessions) >= 12:
            return
        self.made += 1
        self.feed(
            Attached(
                session=self.made, link=NoLink(), principal=grants, grants=GRANTS[grants], role=role, endpoint=endpoint,
                listen=listen, capacity=capacity, expires_at=None if lives_s is None else self.witness.now + lives_s,
            )
        )  # fmt: skip

    @precondition(lambda self: len(self.witness.sessions) > 2)
    @rule(number=numbers, flushed=st.integers(0, 1))
    def leave(self, number: int, flushed: int) -> None:
        session = self.peer(number)
        self.gone.append(session)
        self.feed(Detached(session, 1006, "", flushed))

    @precondition(lambda self: self.gone)
    @rule(number=numbers, what=st.sampled_from(["ask", "serve", "answer", "cancel", "detach", "stray", "congested"]))
    def echo_of_one_that_left(self, number: int, what: str) -> None:
        session = self.gone[number % len(self.gone)]
        match what:
            case "ask":
                self.feed(Asked(session, number, "least", "a", Body(b"")))
            case "serve":
                self.feed(Asked(session, number, "", "broker.serve", Body(b'{"endpoint":"least"}')))
            case "answer":
                self.feed(Answered(session, number, Body(b"1")))
            case "cancel":
                self.feed(Cancel(session, number))
            case "detach":
                self.feed(Detached(session, 1006, "", 0))
            case "stray":
                self.feed(Stray(session, foreign=True))
            case _:
                self.feed(Congested(session, True))

    # ------------------------------------------------------------ asking

    @rule(
        number=numbers,
        wire_id=wire_ids,
        endpoint=names,
        method=methods,
        timeout=st.none() | st.sampled_from([0.01, 0.2, 1.0, 5.0, 3600.0]),
        wait=st.booleans(),
        retries=st.sampled_from([0, 0, 1, 3]),
        meta=st.booleans(),
    )
    def ask(
        self, number: int, wire_id: int | str, endpoint: str, method: str, timeout: float | None, wait: bool,
        retries: int, meta: bool,
    ) -> None:  # fmt: skip
        options = Options(timeout=timeout, wait=wait, idempotent=retries > 0, retries=retries, meta=meta)
        self.feed(Asked(self.peer(number), wire_id, endpoint, method, Body(b"[]"), options))

    @rule(number=numbers, endpoint=names, method=methods)
    def notify(self, number: int, endpoint: str, method: str) -> None:
        self.feed(Asked(self.peer(number), None, endpoint, method, Body(b"[]")))

    @rule(number=numbers, wire_id=wire_ids)
    def cancel(self, number: int, wire_id: int | str) -> None:
        self.feed(Cancel(self.peer(number), wire_id))

    @rule(number=numbers, wire_id=wire_ids, kind=st.sampled_from([errors.INVALID_PARAMS, errors.INVALID_REQUEST]))
    def refused_by_the_codec(self, number: int, wire_id: int | str, kind: errors.Kind) -> None:
        self.feed(Refused(self.peer(number), wire_id, kind, "no"))

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
    )
    def serve(
        self, number: int, wire_id: int | str, endpoint: str, capacity: int | None, declared: list[str] | None
    ) -> None:
        self.command(number, wire_id, "broker.serve", endpoint=endpoint, capacity=capacity, methods=declared)

    @rule(number=numbers, wire_id=wire_ids, endpoint=names)
    def unserve(self, number: int, wire_id: int | str, endpoint: str) -> None:
        self.command(number, wire_id, "broker.unserve", endpoint=endpoint)

    @rule(
        number=numbers,
        wire_id=wire_ids,
        endpoint=names,
        topic=st.sampled_from([None, "t", "broker.peers"]),
        method=st.sampled_from(["broker.subscribe", "broker.subscribe", "broker.unsubscribe"]),
    )
    def subscribe(self, number: int, wire_id: int | str, endpoint: str, topic: str | None, method: str) -> None:
        self.command(number, wire_id, method, endpoint=endpoint, topic=topic)

    @rule(
        number=numbers,
        wire_id=wire_ids,
        endpoint=st.none() | names,
        topic=st.sampled_from([None, "t"]),
        to=st.none() | st.integers(1, 5),
    )
    def publish(self, number: int, wire_id: int | str, endpoint: str | None, topic: str | None, to: int | None) -> None:
        peer = None if to is None else f"n-{to}"
        self.command(number, wire_id, "broker.publish", endpoint=endpoint, topic=topic, to=peer, data=1)

    @rule(
        number=numbers,
        wire_id=wire_ids,
        method=st.sampled_from(["endpoints", "ping", "admin.peers", "admin.pending", "nonsense", "describe", "call"]),
    )
    def look_around(self, number: int, wire_id: int | str, method: str) -> None:
        self.command(number, wire_id, f"broker.{method}")

    @rule(number=numbers, wire_id=wire_ids, request=st.integers(1, 20))
    def admin_cancel(self, number: int, wire_id: int | str, request: int) -> None:
        self.command(number, wire_id, "broker.admin.cancel", request=request)

    # ------------------------------------------------------------ answering

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
    @rule(number=numbers, which=numbers)
    def answer_badly(self, number: int, which: int) -> None:
        worker = self.busy_worker(number)
        attempts = list(self.witness.assigned[worker])
        self.feed(BadReply(worker, attempts[which % len(attempts)], "no md5"))

    @rule(number=numbers, attempt=st.integers(0, 30))
    def answer_anything(self, number: int, attempt: int) -> None:
        self.feed(Answered(self.peer(number), attempt, Body(b"1")))

    @rule(number=numbers, foreign=st.booleans(), code=st.none() | st.sampled_from([-32600, -32700, -1]))
    def answer_nothing(self, number: int, foreign: bool, code: int | None) -> None:
        error = None if code is None else ErrorReply(code)
        self.feed(Stray(self.peer(number), foreign=foreign, nameless=not foreign, body=Body(b"2"), error=error))

    # ------------------------------------------------------------ links, time, the end

    @rule(number=numbers, congested=st.booleans())
    def outbox(self, number: int, congested: bool) -> None:
        self.feed(Congested(self.peer(number), congested))

    @rule(number=numbers, strike=st.booleans())
    def malformed(self, number: int, strike: bool) -> None:
        self.feed(Malformed(self.peer(number), "what", strike))

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.04, 0.06, 0.5, 3.0, 31.0, 4000.0]), limit=st.integers(1, 5))
    def time_passes(self, seconds: float, limit: int) -> None:
        self.witness.now += seconds
        while self.witness.tick(limit)[0]:
            pass

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.06, 1.0, 31.0]))
    def time_passes_and_the_loop_is_late(self, seconds: float) -> None:
        self.witness.now += seconds
        self.witness.tick(1)

    @rule(limit=st.integers(1, 3))
    def deliver_broadcasts(self, limit: int) -> None:
        self.witness.fan_out(limit)

    @precondition(lambda self: self.made > 10)
    @rule(now=st.booleans())
    def drain(self, now: bool) -> None:
        self.feed(Drain(now))

    def teardown(self) -> None:
        while self.witness.tick(3)[0]:
            pass
        self.witness.leave_all()


RouterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRouterMachine = RouterMachine.TestCase
