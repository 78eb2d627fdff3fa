"""Days of trouble in seconds: pretend peers, bad links and one router under a virtual clock, all from one seed.

Between the router and every peer lies a link that delays what it carries, and now and then loses, doubles or reorders
it. Callers reuse ids, cancel, leave; workers die, hang, answer late, twice, or with somebody else's attempt. How often
each happens is drawn from the seed, so that every run is troubled in its own way. The witness judges every step.

`python -m tests.core.simulator --seeds 1000 --steps 2000` runs long; `--first-seed N --seeds 1` repeats one.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeAlias

import msgspec

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.deadlines import NEVER
from broker.core.events import (
    Acked,
    Answered,
    Asked,
    Attached,
    BadReply,
    Cancel,
    ClassAnswered,
    CloseLink,
    Congested,
    CreditGranted,
    Deliver,
    Detached,
    Drain,
    Effect,
    ErrorReply,
    Event,
    Malformed,
    PartSent,
    PauseReading,
    Progressed,
    Refused,
    Resumed,
    ResumeReading,
    StartFanout,
    Stray,
    TakeOver,
)
from broker.core.ids import AttemptId, WireId
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, Call, CancelAttempt, Credit, Message, Options, Part, SessionTold
from broker.core.sessions import Session
from broker.wire import native
from tests.core.harness import NoLink, describe
from tests.core.shrink import shrink
from tests.core.witness import Witness, expect

KEPT_LINES = 60
Owner: TypeAlias = "tuple[AttemptId, WireId | None]"
"""of a stream: the attempt, or 0 and the id of the request"""
LAG_MAX_S = 0.02
LATE_S = (0.0, 0.0, 0.001, LAG_MAX_S)
"""how late a tick comes"""
ENDPOINTS = {
    "round": EndpointLimits(policy="round_robin", queue_max=3),
    "newest": EndpointLimits(policy="newest"),
    "sticky": EndpointLimits(policy="sticky", queue_max=8),
    "fresh": EndpointLimits(newest_wins=True),
    "shut": EndpointLimits(closed="moved"),
}
NAMES = ("least", "round", "newest", "plain", "sticky", "fresh", "shut")
ASKED = ("least", "least", "least", "round", "round", "newest", "newest", "plain", "sticky", "sticky", "fresh", "shut")
ATTACHED: tuple[tuple[bytes, ...], ...] = ((), (), (), (b"",), (b"x" * 200,))
METHODS = ("a", "b", "c")
PARTS = (
    (Body(b"1"), False), (Body(b"[2]"), False), (Body(b"3", (b"",)), False), (Body(b'{"$buffer":0}', (b"ab",)), True),
    (Body(b'{"$joined":{"bytes":2,"crc32":2659403885}}'), False), (Body(b"4"), False), (Body(b"5"), False),
    (Body(b"[" + b"0," * 30 + b"0]"), False),
)  # fmt: skip
"""what parts hold, and whether it goes on in the next; the last is too large"""
PEERS_MAX = 14
ALL = (Grant(Role.CALLER | Role.WORKER),)
GRANTS = (
    ALL,
    ALL,
    ALL,
    ALL,
    ALL,
    ALL,
    (Grant(Role.CALLER, ("least", "p*")),),
    (Grant(Role.LISTENER),),
    (Grant(Role.ADMIN),),
)


class Failure(AssertionError):
    """A run went wrong: the text names the seed and the last lines of its trace."""


class Peer:
    """One pretend peer: its session, what its link does to messages, and how it behaves."""

    __slots__ = (
        "attempts",
        "delay_s",
        "double",
        "hang",
        "heard",
        "id",
        "kind",
        "last_line_at",
        "link",
        "lose",
        "paused",
        "sending",
        "session",
    )  # fmt: skip

    def __init__(self, kind: str, rng: random.Random, trouble: float) -> None:
        self.kind = kind
        self.id = 0
        self.session: Session | None = None
        self.delay_s = rng.choice((0.0, 0.001, 0.02, 0.3))
        self.lose = rng.choice((0.0, 0.0, 0.02, 0.1)) * trouble
        self.double = rng.choice((0.0, 0.0, 0.05)) * trouble
        self.hang = rng.choice((0.0, 0.05, 0.3)) * trouble
        self.attempts: list[AttemptId] = []
        self.last_line_at = 0.0
        """when what was said last arrives: parts keep their order"""
        self.sending: dict[Owner, Sending] = {}
        self.paused = False
        self.heard = 0
        """the number of the last message, of a session with grace"""
        self.link: PeerLink | None = None


class PeerLink(NoLink):
    """The link of a session with grace: its messages are numbered, and none may be missing."""

    __slots__ = ("cut", "hear", "peer")

    def __init__(self, peer: Peer, hear: Callable[[Peer, Message], None], *, takes_binary: bool) -> None:
        super().__init__(takes_binary=takes_binary)
        self.peer = peer
        self.hear = hear
        self.cut = 0

    def deliver(self, message: Message) -> None:
        expect(isinstance(message, SessionTold), "a message without a number:", message)
        assert isinstance(message, SessionTold)
        self.cut = message.cut

    def deliver_numbered(self, message: Message, n: int) -> None:
        expect(self.peer.link is self, "a message over a link that was replaced:", message)
        due = self.peer.heard + 1
        expect(n == due or due < n <= self.cut + 1, "message", n, "came where", due, "was due; cut are", self.cut)
        self.peer.heard = n
        self.hear(self.peer, message)

    def broadcast_numbered(self, message: Message, frames: dict[str, bytes], n: int) -> bool:
        self.deliver_numbered(message, n)
        return True

    def close(self, code: int, reason: str) -> None:
        """Its peer sees it in time."""


class Sending:
    """Parts somebody sends: the next number, up to where it may, and how many it wants to."""

    __slots__ = ("count", "credit", "ends", "next")

    def __init__(self, count: int, *, ends: bool) -> None:
        self.count = count
        self.ends = ends
        """whether the last is marked as such"""
        self.next = 0
        self.credit = 4


class Simulator:
    """One run. Same seed, same trace: nothing here looks at a clock, a hash or an address."""

    def __init__(
        self,
        seed: int,
        *,
        make: Callable[[Limits, float], Witness] | None = None,
        only: Collection[int] | None = None,
        compiled: bool = False,
        calm: bool = False,
    ) -> None:
        """`only`: the numbers of the ideas that are had; the others are passed over, and nothing else changes.

        `compiled`: plain requests go through the tables in C. `calm`: most of them are plain.
        """
        self.rng = rng = random.Random(seed)
        self.seed = seed
        self.only = only
        limits = Limits(
            deadline_s=5.0, in_flight_max=rng.choice((4, 20, 100)), queue_max=rng.choice((1, 4, 50)),
            capacity=rng.choice((1, 3, 64)), fanouts_max=rng.choice((1, 3, 100)), endpoints_known_max=100,
            topics_per_endpoint_max=100, message_max_bytes=100, slot_s=rng.choice((0.05, 0.05, 0.01, 0.03)),
            grace_max_s=rng.choice((1.0, 10.0)), kept_max=rng.choice((20, 10_000)), idle_s=rng.choice((0.5, 3.0, 30.0)),
            part_max_bytes=60, parts_ahead_max=rng.choice((6, 64)),
            principal_share=(2e-6, 0.25, 0.25)[seed % 3], sessions_max=1 << 30,  # 2 KB kept, 2000 away
        )  # fmt: skip
        if calm:
            limits = msgspec.structs.replace(
                limits, in_flight_max=100, queue_max=50, capacity=rng.choice((3, 64)), pass_over_s=0.0
            )
        self.calm = calm
        self.asked_at = ("least", "least", "least", "plain", "round") if calm else ASKED
        self.attached = ((), (), (), (b"",)) if calm else ATTACHED
        self.capacities = (None, None, 1, 5) if calm else (None, 1, 1, 2, 5)
        self.witness = (make or (lambda given, now: Witness(given, ENDPOINTS, now)))(limits, 0.0)
        if compiled:
            native.match_for(self.witness.router)
        self.peers: list[Peer] = []
        self.left: deque[Peer] = deque(maxlen=5)
        self.names: dict[Session, str] = {}
        self.seen_attempts: deque[AttemptId] = deque(maxlen=50)
        self.agenda: list[tuple[float, int, int, Callable[[], None]]] = []
        self.promised = 0
        self.made = 0
        self.ids_made = 100
        self.steps = 0
        self.ideas = 0
        self.fanning = False
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.hash = hashlib.sha256()
        self.trouble = rng.choice((0.0, 0.2) if calm else (0.0, 0.5, 1.0, 3.0))
        self.priorities = rng.choice(((0,), (0, 0, 0, 0, 3, -2)))
        self.streaming = rng.choice((0.0, 0.1) if calm else (0.0, 0.2, 0.6))
        self.tick_limit = rng.choice((1, 3, 500))
        acts: list[tuple[Callable[[], None], int]] = [
            (self.come, 6), (self.ask, 60), (self.ask_many, 4), (self.notify, 3), (self.cancel, 8), (self.leave, 2),
            (self.command, 8), (self.publish, 4), (self.outbox, 3), (self.misbehave, 2), (self.echo, 2),
            (self.answer_foreign, 3), (self.reconfigure, 1), (self.serve_again, 3), (self.odd_part, 2),
            (self.odd_credit, 2), (self.tell_progress, 3), (self.replace_link, 1),
        ]  # fmt: skip
        self.acts = [act for act, _ in acts]
        self.weights = [weight * rng.choice((0.1, 1, 1, 3)) for _, weight in acts]
        self.pace_s = rng.choice((0.0005, 0.005, 0.05))
        self.drain_at = rng.choice((None, None, None, rng.randrange(100, 1500)))
        self.graceful = self.drain_at is None and rng.random() < 0.5
        self.idea_at = 0.0
        self.next_idea()

    # ------------------------------------------------------------ running

    def run(self, steps: int) -> str:
        """Go that many steps and let everybody leave; the digest of the trace. Raises Failure."""
        try:
            for _ in range(3):
                self.come()
            while self.steps < steps:
                self.step()
            self.finish()
        except Exception as error:
            tail = "\n".join(self.lines)
            raise Failure(f"seed {self.seed}, step {self.steps}: {error!r}\nthe last of its trace:\n{tail}") from error
        return self.hash.hexdigest()

    def step(self) -> None:
        """The next thing that happens: something on the agenda, a tick, or somebody has an idea."""
        self.steps += 1
        due_at = self.witness.router.next_deadline()
        tick_at = due_at + LATE_S[int(due_at * 1e4) % len(LATE_S)] if due_at < NEVER else NEVER
        agenda_at = self.agenda[0][0] if self.agenda else NEVER
        if tick_at <= min(self.idea_at, agenda_at):
            self.until(tick_at)
            self.rng.seed(int(due_at * 1e6))
            self.tick()
        elif agenda_at <= self.idea_at:
            self.until(agenda_at)
            self.turn_up()
        else:
            self.until(self.idea_at)
            if self.only is None or self.ideas in self.only:
                self.have_idea()
            self.next_idea()
        self.witness.nothing_is_overdue(self.witness.now - LAG_MAX_S - self.limits_slack())

    def next_idea(self) -> None:
        """When it comes. What it will be hangs on the seed and its number alone, so that others can be left out."""
        self.ideas += 1
        self.rng.seed(self.seed << 32 | self.ideas)
        self.idea_at += self.rng.expovariate(1 / self.pace_s)

    def have_idea(self) -> None:
        """Somebody does something."""
        self.rng.seed(self.seed << 33 | self.ideas)
        if self.drain_at is not None and self.steps >= self.drain_at:
            self.drain_at = None
            self.feed(Drain(self.rng.random() < 0.5), "the broker drains")
        elif len(self.peers) < 3:
            self.come()
        else:
            self.rng.choices(self.acts, self.weights)[0]()

    def turn_up(self) -> None:
        """What comes next on the agenda."""
        _, _, seed, act = heapq.heappop(self.agenda)
        self.rng.seed(seed)
        act()

    def limits_slack(self) -> float:
        """How late a tick that was asked for in time may be: other things may happen at the same moment."""
        return 1e-6

    def finish(self) -> None:
        """Let what is under way arrive, then let everybody leave."""
        while self.agenda:
            at = self.agenda[0][0]
            while self.witness.router.next_deadline() <= at:
                self.until(self.witness.router.next_deadline())
                self.tick()
            self.until(at)
            self.turn_up()
        self.witness.leave_all()

    def until(self, at: float) -> None:
        self.witness.now = max(self.witness.now, at)

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.at(self.witness.now + seconds, act)

    def at(self, moment: float, act: Callable[[], None]) -> None:
        self.promised += 1
        heapq.heappush(self.agenda, (moment, self.promised, self.rng.getrandbits(32), act))

    def say(self, line: str) -> None:
        text = f"{self.witness.now:.4f} {line}"
        self.lines.append(text)
        self.hash.update(text.encode())

    # ------------------------------------------------------------ into the router and out of it

    def feed(self, event: Event, line: str) -> None:
        self.say(f"> {line}")
        self.perform(self.witness.feed(event))

    def tick(self) -> None:
        """Slices one after the other, as an engine does that has nothing else to do."""
        more = True
        while more:
            more, effects = self.witness.tick(self.tick_limit)
            if effects or more:
                self.say("> tick")
            self.perform(effects)

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.say(describe(effect, self.names))
            if isinstance(effect, StartFanout):
                if not self.fanning:
                    self.fanning = True
                    self.later(self.rng.choice((0.0, 0.0, 0.02)), self.fan_out)
                continue
            if isinstance(effect, TakeOver):
                kept = effect.session.kept
                if kept is not None:
                    kept.resume(effect.link, effect.told, self.witness.now)
                continue
            if isinstance(effect, Deliver) and effect.session.kept is not None:
                effect.session.kept.deliver(effect.message)  # which makes its peer hear it, now or when it is back
                continue
            peer = next((peer for peer in self.peers if peer.session is effect.session), None)
            if peer is None:
                continue
            if isinstance(effect, CloseLink):
                self.later(self.rng.choice((0.0, 0.01)), lambda peer=peer: self.go(peer))  # type: ignore[misc]
            elif isinstance(effect, PauseReading | ResumeReading):
                peer.paused = isinstance(effect, PauseReading)
            elif isinstance(effect, Deliver):
                self.hear(peer, effect.message)

    def hear(self, peer: Peer, message: Message) -> None:
        """A message reaches a peer."""
        if isinstance(message, Call | CancelAttempt):
            self.to_worker(peer, message)
        elif isinstance(message, Part | Credit):
            self.of_stream(peer, message)
        if peer.heard and self.rng.random() < 0.2:
            n = peer.heard + self.rng.choice((0, 0, 0, -2, 1000))
            self.later(self.rng.random() * 0.1, lambda: self.arrive(peer, lambda s: Acked(s, n), f"{peer.id} acks {n}"))

    def fan_out(self) -> None:
        got = self.witness.fan_out(self.rng.choice((1, 2, 100)))
        for session, message in got:
            if session.kept is not None:
                session.kept.broadcast(message, {})
            self.say(f"{self.names[session]} < broadcast {message.endpoint}/{message.topic} {message.seq}")
        self.fanning = len(self.witness.router.fanouts) > 0
        if self.fanning:
            self.later(self.rng.choice((0.0, 0.001, 0.02)), self.fan_out)

    def send(self, peer: Peer, event: Callable[[Session], Event], line: str) -> None:
        """Over the peer's link to the router: later, perhaps never, perhaps twice."""
        if self.rng.random() < peer.lose:
            self.say(f"  lost: {line}")
            return
        for _ in range(2 if self.rng.random() < peer.double else 1):
            self.later(self.rng.random() * peer.delay_s, lambda: self.arrive(peer, event, line))

    def arrive(self, peer: Peer, event: Callable[[Session], Event], line: str) -> None:
        if peer in self.peers and peer.session is not None:
            said = event(peer.session)
            tells = peer.id % 3 == 0 and not self.calm  # of some dialects the answers tell what a worker has
            if tells and isinstance(said, Answered):
                learned = ClassAnswered(said.session, said.attempt, said.error is None)
                self.feed(learned, f"{peer.kind}{peer.id} tells of its class")
            self.feed(said, line)

    # ------------------------------------------------------------ workers

    def to_worker(self, peer: Peer, message: Call | CancelAttempt) -> None:
        """The link brings a message to a worker, which does something about it, or nothing."""
        rng = self.rng
        if isinstance(message, CancelAttempt):
            if rng.random() < 0.3:  # some answer even so
                self.answer(peer, message.attempt_id, ErrorReply(-32800))
            return
        number = message.attempt.id
        message.attempt.mark = rng.choice((0, 1))
        self.seen_attempts.append(number)
        peer.attempts.append(number)
        if rng.random() < peer.lose or rng.random() < peer.hang:
            return
        asked = message.attempt.request.options
        unasked = 0.0 if not self.streaming else 0.5 if asked.retries else 0.1
        if rng.random() < (0.8 if asked.stream_in else unasked):
            self.begin_parts(peer, (number, None))
            if rng.random() < 0.1 * self.trouble and len(self.peers) > 3:
                self.later(rng.random() * 0.1, lambda: self.go(peer))
        work_s = rng.expovariate(1 / rng.choice((0.001, 0.05, 1.0, 6.0)))
        error = ErrorReply(rng.choice((-32000, 0, -32602)), rng.random() < 0.5) if rng.random() < 0.1 else None
        self.later(work_s, lambda: self.answer(peer, number, error))
        if rng.random() < 0.05 * self.trouble:
            self.later(work_s + rng.random(), lambda: self.answer(peer, number, None))

    def answer(self, peer: Peer, number: AttemptId, error: ErrorReply | None) -> None:
        if peer in self.peers:
            body = Body(b"%d" % number, self.rng.choice(ATTACHED))
            self.send(
                peer,
                lambda session: Answered(session, number, body, error),
                f"{peer.kind}{peer.id} answers a{number}{'' if error is None else f' error {error.code}'}",
            )

    def answer_foreign(self) -> None:
        """Somebody answers with an attempt that is, or was, anybody's."""
        if self.seen_attempts and self.peers:
            self.answer(self.rng.choice(self.peers), self.rng.choice(self.seen_attempts), None)

    # ------------------------------------------------------------ streams

    def begin_parts(self, peer: Peer, owner: Owner) -> None:
        """A peer sends parts from now on, as its credit allows."""
        rng = self.rng
        peer.sending[owner] = Sending(rng.choice((0, 1, 3, 4, 5, 12, 100)), ends=owner[0] == 0 or rng.random() < 0.5)
        self.go_on_sending(peer, owner)

    def go_on_sending(self, peer: Peer, owner: Owner) -> None:
        """A few parts more; the others when credit comes."""
        sending = peer.sending.get(owner)
        if sending is None:
            return
        allowed = sending.credit + (self.rng.random() < 0.03)  # some cannot wait
        for _ in range(self.rng.choice((1, 4, 20))):
            if sending.next >= min(sending.count, allowed):
                break
            last = sending.ends and sending.next == sending.count - 1
            self.send_part(peer, owner, sending.next, last=last)
            sending.next += 1
        if sending.next >= sending.count:
            del peer.sending[owner]
        elif sending.next < sending.credit:
            self.later(self.rng.random() * 0.05, lambda: self.go_on_sending(peer, owner))

    def send_part(self, peer: Peer, owner: Owner, seq: int, *, last: bool = False) -> None:
        """One part, over a link that keeps what it carries in order, if it does not lose it."""
        rng = self.rng
        attempt, wire_id = owner
        body, more = rng.choice(PARTS)
        line = f"{peer.kind}{peer.id} sends part {seq} of {attempt or wire_id!r}{' last' * last}{' more' * more}"
        if rng.random() < peer.lose * 0.1:
            self.say(f"  lost: {line}")
            return
        peer.last_line_at = max(peer.last_line_at, self.witness.now + rng.random() * peer.delay_s)
        part = partial(PartSent, wire_id=wire_id, attempt=attempt, seq=seq, body=body, more=more, last=last)
        self.at(peer.last_line_at, lambda: self.arrive(peer, part, line))

    def of_stream(self, peer: Peer, message: Part | Credit) -> None:
        """A part, or credit, reaches a peer: it grants more, sends more, or does nothing."""
        rng, owner = self.rng, (message.attempt_id, message.wire_id)
        if isinstance(message, Credit):
            if (sending := peer.sending.get(owner)) is not None:
                sending.credit = message.upto
                self.later(rng.random() * peer.delay_s, lambda: self.go_on_sending(peer, owner))
        elif rng.random() < 0.6:
            upto = message.seq + rng.choice((1, 3, 5, 9, 100))
            self.later(rng.random() * peer.delay_s, lambda: self.grant(peer, owner, upto))

    def grant(self, peer: Peer, owner: Owner, upto: int) -> None:
        """A receiver takes parts below that."""
        attempt, wire_id = owner
        line = f"{peer.kind}{peer.id} grants {attempt or wire_id!r} {upto}"
        self.arrive(peer, lambda session: CreditGranted(session, wire_id, attempt, upto), line)

    def some_owner(self, peer: Peer) -> Owner:
        """A stream that is, or was, or never was."""
        rng, session = self.rng, peer.session
        assert session is not None
        owners: list[Owner] = [(number, None) for number in session.attempts]
        owners += [(0, wire_id) for wire_id in session.requests]
        if not owners or rng.random() < 0.2:
            return rng.choice(((rng.choice(self.seen_attempts or (1,)), None), (0, self.wire_id())))
        return rng.choice(owners)

    def odd_part(self) -> None:
        """A part nobody expects: another's, out of order, beyond the credit, after the end."""
        peer, rng = self.rng.choice(self.peers), self.rng
        owner = self.some_owner(peer)
        sending = peer.sending.get(owner)
        at = sending.next if sending else 0
        self.send_part(peer, owner, max(0, at + rng.choice((-1, 0, 0, 1, 7))), last=rng.random() < 0.3)

    def odd_credit(self) -> None:
        """Credit for nobody, backwards, in millions."""
        peer = self.rng.choice(self.peers)
        self.grant(peer, self.some_owner(peer), self.rng.choice((0, 1, 4, 6, 50, 10**6)))

    def tell_progress(self) -> None:
        """A worker says how far it is, by the attempt or by the token."""
        rng, peer = self.rng, self.rng.choice(self.peers)
        attempt, _ = self.some_owner(peer)
        token = b"" if attempt else rng.choice((b"", b'"t"'))
        body = Body(b'{"done":1}')
        line = f"{peer.kind}{peer.id} tells progress of a{attempt} {token.decode()}"
        self.arrive(peer, lambda session: Progressed(session, attempt, token, body), line)

    # ------------------------------------------------------------ ideas

    def come(self) -> None:
        if len(self.peers) >= PEERS_MAX:
            return
        rng = self.rng
        kind = rng.choice("ccwwwl")
        role = {"c": Role.CALLER, "w": Role.WORKER, "l": Role.LISTENER}[kind]
        peer = Peer(kind, rng, self.trouble)
        self.made += 1
        peer.id = self.made
        names = [name for name in NAMES[:-1] if not self.witness.closed(name)]  # elsewhere its link is turned away
        if self.calm:
            names = ["least", "least", *(name for name in names if name == "plain")]
        endpoint = rng.choice((None, *names)) if kind != "w" else rng.choice(names)
        lives_s = rng.choice((None, None, None, 0.0, 3.0, 60.0))
        link = NoLink(takes_binary=rng.random() < 0.5)
        grace_s = rng.choice((0.0, 0.5, 5.0)) if self.graceful else 0.0
        if grace_s:
            link = peer.link = PeerLink(peer, self.hear, takes_binary=link.takes_binary)
        event = Attached(
            session=peer.id, link=link, grace_s=grace_s, secret="s" * (grace_s > 0),
            principal=f"p{peer.id % 4}", role=role,
            endpoint=endpoint,
            grants=ALL if kind == "w" else rng.choice(GRANTS), listen=rng.random() < 0.5,
            capacity=rng.choice(self.capacities), expires_at=None if lives_s is None else self.witness.now + lives_s,
        )  # fmt: skip
        self.say(f"> {kind}{peer.id} comes to {endpoint}, capacity {event.capacity}, lives {lives_s}")
        effects = self.witness.feed(event)
        peer.session = self.witness.router.sessions.by_id[peer.id]
        self.names[peer.session] = f"{kind}{peer.id}"
        self.peers.append(peer)
        self.perform(effects)

    def leave(self) -> None:
        if len(self.peers) > 3:
            self.go(self.rng.choice(self.peers))

    def go(self, peer: Peer) -> None:
        """A link breaks: its peer is gone at once."""
        if peer in self.peers and peer.session is not None:
            self.peers.remove(peer)
            self.left.append(peer)
            flushed, code = self.rng.choice((0, 1)), self.rng.choice((1006, 1006, 1006, 1000))
            event = Detached(peer.session, code, "broken", flushed, peer.link)
            self.feed(event, f"{peer.kind}{peer.id} goes with {code}, flushed {flushed}")
            if peer.session in self.witness.away:
                self.later(self.rng.choice((0.0, 0.1, 0.45, 3.0, 9.0)), lambda: self.come_back(peer))

    def come_back(self, peer: Peer) -> None:
        """Over a new link, while the old one may still be there; the last messages may have been lost with it."""
        rng, session, old = self.rng, peer.session, peer.link
        if session is None or old is None or session.kept is None:
            return
        first = next((n for n, _ in session.kept.since(0, 0.0)), peer.heard + 1)
        peer.heard = max(peer.heard - rng.choice((0, 0, 1, 3)), min(first - 1, peer.heard))
        if not session.kept.can_resume(peer.heard):
            self.feed(Detached(session, 1000, "too late", 0, session.kept.link), f"{peer.id} came back too late")
            if peer in self.peers:
                self.peers.remove(peer)
            return
        peer.link = PeerLink(peer, self.hear, takes_binary=old.takes_binary)
        if peer not in self.peers:
            self.peers.append(peer)
        peer.paused = False
        event = Resumed(session=session, link=peer.link, received=peer.heard, grants=session.grants)
        self.feed(event, f"{peer.kind}{peer.id} comes back, has heard {peer.heard}")
        self.feed(Detached(session, 4409, "replaced", 0, old), f"the old link of {peer.kind}{peer.id} ends")

    def replace_link(self) -> None:
        """A peer that has a link comes over another."""
        self.come_back(self.rng.choice(self.peers))

    def wire_id(self) -> int | str:
        """Mostly a new one, sometimes one that may be in flight."""
        if self.rng.random() < 0.8:
            self.ids_made += 1
            return self.ids_made
        choices: tuple[int | str, ...] = (*range(10), "", "1", max(self.ids_made - 3, 0))
        return self.rng.choice(choices)

    def ask(self, peer: Peer | None = None) -> None:
        rng = self.rng
        peer = peer or rng.choice(self.peers)
        if peer.paused:
            return
        endpoint, method, wire_id = rng.choice(self.asked_at), rng.choice(METHODS), self.wire_id()
        streams = rng.random() < self.streaming
        retries = rng.choice((0, 1, 3) if streams else (0, 0, 0, 1, 3))
        options = Options(
            timeout=rng.choice((None, 0.01, 0.05, 0.5, 2.0, 30.0, 3600.0)), wait=rng.random() < 0.2,
            idempotent=retries > 0, retries=retries, meta=rng.random() < 0.3,
            priority=rng.choice(self.priorities), group=rng.choice((None, None, "g", "h", "i")),
            stream_in=streams and rng.random() < 0.6, stream_out=streams and rng.random() < 0.6,
            progress=rng.choice((None, b"", b'"t"')) if streams else None,
            idle=rng.choice((None, None, 0.3, 4.0)) if streams else None,
        )  # fmt: skip
        body = Body(b"[]", rng.choice(self.attached))
        line = (
            f"{peer.kind}{peer.id} asks {wire_id!r} {endpoint}/{method} {options.timeout} r{retries} w{options.wait:d}"
            f"{' in' * options.stream_in}{' out' * options.stream_out}"
        )
        if options.stream_out:
            self.later(peer.delay_s, lambda: self.begin_parts(peer, (0, wire_id)))
        self.send(peer, lambda session: Asked(session, wire_id, endpoint, method, body, options), line)
        if rng.random() < 0.05:
            self.later(rng.random(), lambda: self.take_back(peer, wire_id))

    def ask_many(self) -> None:
        flooding = self.rng.choice((None, self.rng.choice(self.peers)))
        for _ in range(self.rng.randrange(2, 20)):
            self.ask(flooding)

    def take_back(self, peer: Peer, wire_id: int | str) -> None:
        self.send(peer, lambda session: Cancel(session, wire_id), f"{peer.kind}{peer.id} cancels {wire_id!r}")

    def cancel(self) -> None:
        self.take_back(self.rng.choice(self.peers), self.wire_id())

    def notify(self) -> None:
        peer, endpoint, method = self.rng.choice(self.peers), self.rng.choice(NAMES), self.rng.choice(METHODS)
        line = f"{peer.kind}{peer.id} notifies {endpoint}/{method}"
        self.send(peer, lambda session: Asked(session, None, endpoint, method, Body(b"[]")), line)

    def command(self) -> None:
        rng = self.rng
        method = rng.choice(
            ("serve", "serve", "serve", "unserve", "subscribe", "unsubscribe", "ping", "admin.cancel", "x", "call")
        )
        params: dict[str, object] = {"endpoint": rng.choice(NAMES)}
        if method == "serve":
            params["capacity"] = rng.choice((None, 1, 4))
            params["methods"] = rng.choice((None, None, None, ["a"], ["a", "b"], []))
        elif "subscribe" in method:
            params["topic"] = rng.choice((None, "t", "broker.peers"))
        elif method == "admin.cancel":
            params = {"request": self.witness.router.pending.requests_made - rng.randrange(10)}
        elif method == "ping":
            params = {}
        self.run_command(f"broker.{method}", params)

    def publish(self) -> None:
        rng = self.rng
        params: dict[str, object] = {
            "data": 1,
            "endpoint": rng.choice((None, *NAMES)),
            "topic": rng.choice((None, "t")),
        }
        if rng.random() < 0.2:
            params["to"] = f"n-{rng.choice(self.peers).id}"
        self.run_command("broker.publish", params)

    def run_command(self, method: str, params: dict[str, object], peer: Peer | None = None) -> None:
        peer, wire_id = peer or self.rng.choice(self.peers), self.wire_id()
        raw = json.dumps({name: value for name, value in params.items() if value is not None}).encode()
        line = f"{peer.kind}{peer.id} says {wire_id!r} {method} {raw.decode()}"
        self.send(peer, lambda session: Asked(session, wire_id, "", method, Body(raw)), line)

    def serve_again(self) -> None:
        """A worker leaves an endpoint, perhaps with requests in its hands, and serves it again soon after."""
        rng, peer = self.rng, self.rng.choice(self.peers)
        names = [name for name, workers in self.witness.serving.items() if peer.session in workers]
        if names:
            params: dict[str, object] = {"endpoint": rng.choice(names)}
            self.run_command("broker.unserve", params, peer)
            again = params | {"capacity": rng.choice((None, 1, 2))}
            self.later(rng.choice((0.0, 0.01, 0.5)), lambda: self.run_command("broker.serve", again, peer))

    def reconfigure(self) -> None:
        """Close some endpoints, open the others."""
        endpoints = dict(ENDPOINTS)
        for name in ("round", "plain"):
            if self.rng.random() < 0.3:
                endpoints[name] = msgspec.structs.replace(endpoints.get(name, EndpointLimits()), closed="moved")
        self.say(f"> closed are {[name for name in endpoints if endpoints[name].closed]}")
        self.perform(self.witness.reconfigure(endpoints))

    def outbox(self) -> None:
        streaming = [peer for peer in self.peers if peer.session and (peer.session.requests or peer.session.attempts)]
        peer, congested = self.rng.choice(streaming or self.peers), self.rng.random() < 0.7
        self.arrive(peer, lambda session: Congested(session, congested), f"{peer.kind}{peer.id} congested {congested}")
        if congested:
            if self.rng.random() < 0.7:  # it has room for more, if not for this
                self.later(0.001, lambda: self.grant(peer, self.some_owner(peer), self.rng.choice((6, 9, 50))))
            calm = f"{peer.kind}{peer.id} congested False"
            self.later(self.rng.random(), lambda: self.arrive(peer, lambda session: Congested(session, False), calm))

    def misbehave(self) -> None:
        rng = self.rng
        peer, wire_id = rng.choice(self.peers), self.wire_id()
        held = list(peer.session.attempts) if peer.session and rng.random() < 0.5 else []
        code, number = rng.choice((-32600, -32700, -1)), rng.choice(held or self.seen_attempts or (0,))
        what, make = rng.choice(
            (
                ("malformed", lambda session: Malformed(session, "no JSON", rng.random() < 0.3)),
                ("foreign", lambda session: Stray(session, foreign=True)),
                ("late", lambda session: Stray(session)),
                ("nameless", lambda session: Stray(session, False, True, Body(b"{}"), ErrorReply(code))),
                ("refused", lambda session: Refused(session, wire_id, errors.INVALID_PARAMS, "no")),
                ("bad reply", lambda session: BadReply(session, number, "no md5")),
            )
        )
        self.arrive(peer, make, f"{peer.kind}{peer.id} {what} {wire_id!r} a{number} {code}")

    def echo(self) -> None:
        """What was on its way when its sender's link broke is heard after it has gone."""
        if not self.left:
            return
        peer, wire_id = self.rng.choice(self.left), self.wire_id()
        session = peer.session
        assert session is not None
        events: tuple[Event, ...] = (
            Asked(session, wire_id, "least", "a", Body(b"")),
            Asked(session, wire_id, "", "broker.serve", Body(b'{"endpoint":"least"}')),
            Answered(session, self.rng.choice(self.seen_attempts or (0,)), Body(b"")),
            Cancel(session, wire_id),
            Refused(session, wire_id, errors.INVALID_REQUEST, "no"),
            Congested(session, True),
            Detached(session, 1006, "", 0, peer.link),
        )
        event = self.rng.choice(events)
        self.feed(event, f"echo of {peer.kind}{peer.id}: {type(event).__name__} {wire_id!r}")


def shorten(
    seed: int, steps: int, tries_max: int = 400, *, compiled: bool = False, calm: bool = False
) -> tuple[list[int], Failure]:
    """The least of a failing seed's ideas with which it still fails, and how."""

    def failure(only: Collection[int] | None) -> tuple[int, Failure | None]:
        simulator = Simulator(seed, only=only, compiled=compiled, calm=calm)
        try:
            simulator.run(steps)
        except Failure as found:
            return simulator.ideas, found
        return simulator.ideas, None

    ideas, found = failure(None)
    assert found is not None, "it does not fail"
    left = shrink(range(1, ideas + 1), lambda some: failure(frozenset(some))[1] is not None, tries_max)
    return left, failure(frozenset(left))[1] or found


def main() -> int:
    parser = argparse.ArgumentParser(description="runs the simulator over many seeds")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--whole", action="store_true", help="do not shorten what fails")
    parser.add_argument("--compiled", action="store_true", help="plain requests go through the tables in C")
    parser.add_argument("--calm", action="store_true", help="most requests are plain")
    parser.add_argument("--digest", action="store_true", help="print one digest over all traces")
    given = parser.parse_args()
    started = time.monotonic()
    digest = hashlib.sha256()
    failed = done = 0
    how: dict[str, bool] = {"compiled": given.compiled, "calm": given.calm}
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        done += given.steps
        try:
            digest.update(Simulator(seed, **how).run(given.steps).encode())
        except Failure as failure:
            failed += 1
            ideas, shortened = ([], failure) if given.whole else shorten(seed, given.steps, **how)
            print(f"{shortened}\nonly its ideas {ideas} are needed", file=sys.stderr)
            if failed >= 3:
                break
    if given.digest:
        print(digest.hexdigest())
        return min(failed, 1)
    took_s = time.monotonic() - started
    print(
        f"{done // given.steps} seeds, {done} steps in {took_s:.0f} s "
        f"({done / took_s * 60:,.0f} a minute), {failed} failed"
    )
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
