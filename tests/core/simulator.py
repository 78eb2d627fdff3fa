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
from collections.abc import Callable

import msgspec

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.events import (
    Answered,
    Asked,
    Attached,
    BadReply,
    Cancel,
    CloseLink,
    Congested,
    Deliver,
    Detached,
    Drain,
    Effect,
    ErrorReply,
    Event,
    Malformed,
    PauseReading,
    Refused,
    ResumeReading,
    StartFanout,
    Stray,
)
from broker.core.ids import AttemptId
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, Call, CancelAttempt, Options
from broker.core.sessions import Session
from tests.core.harness import NoLink, describe
from tests.core.witness import Witness

KEPT_LINES = 60
LAG_MAX_S = 0.02
ENDPOINTS = {
    "round": EndpointLimits(policy="round_robin", queue_max=3),
    "newest": EndpointLimits(policy="newest"),
    "shut": EndpointLimits(closed="moved"),
}
NAMES = ("least", "round", "newest", "plain", "shut")
ASKED = ("least", "least", "least", "round", "round", "newest", "newest", "plain", "plain", "shut")
ATTACHED: tuple[tuple[bytes, ...], ...] = ((), (), (), (b"",), (b"x" * 200,))
METHODS = ("a", "b", "c")
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

    __slots__ = ("attempts", "delay_s", "double", "hang", "id", "kind", "last_line_at", "lose", "paused", "session")

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
        self.paused = False


class Simulator:
    """One run. Same seed, same trace: nothing here looks at a clock, a hash or an address."""

    def __init__(self, seed: int, *, make: Callable[[Limits, float], Witness] | None = None) -> None:
        self.rng = rng = random.Random(seed)
        self.seed = seed
        limits = Limits(
            deadline_s=5.0, in_flight_max=rng.choice((4, 20, 100)), queue_max=rng.choice((1, 4, 50)),
            capacity=rng.choice((1, 3, 64)), fanouts_max=rng.choice((1, 3, 100)), endpoints_known_max=100,
            topics_per_endpoint_max=100, message_max_bytes=100, slot_s=rng.choice((0.05, 0.05, 0.01, 0.03)),
        )  # fmt: skip
        self.witness = (make or (lambda given, now: Witness(given, ENDPOINTS, now)))(limits, 0.0)
        self.peers: list[Peer] = []
        self.left: deque[Peer] = deque(maxlen=5)
        self.names: dict[Session, str] = {}
        self.seen_attempts: deque[AttemptId] = deque(maxlen=50)
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.promised = 0
        self.made = 0
        self.ids_made = 100
        self.steps = 0
        self.fanning = False
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.hash = hashlib.sha256()
        self.trouble = rng.choice((0.0, 0.5, 1.0, 3.0))
        self.tick_limit = rng.choice((1, 3, 500))
        acts: list[tuple[Callable[[], None], int]] = [
            (self.come, 6), (self.ask, 60), (self.ask_many, 4), (self.notify, 3), (self.cancel, 8), (self.leave, 2),
            (self.command, 8), (self.publish, 4), (self.outbox, 3), (self.misbehave, 2), (self.echo, 2),
            (self.answer_foreign, 3), (self.reconfigure, 1), (self.serve_again, 3),
        ]  # fmt: skip
        self.acts = [act for act, _ in acts]
        self.weights = [weight * rng.choice((0.1, 1, 1, 3)) for _, weight in acts]
        self.pace_s = rng.choice((0.0005, 0.005, 0.05))
        self.drain_at = rng.choice((None, None, None, rng.randrange(100, 1500)))

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
        idea_at = self.witness.now + self.rng.expovariate(1 / self.pace_s)
        tick_at = self.witness.router.next_deadline() + self.rng.choice((0.0, 0.0, 0.001, LAG_MAX_S))
        agenda_at = self.agenda[0][0] if self.agenda else float("inf")
        if tick_at <= min(idea_at, agenda_at):
            self.until(tick_at)
            self.tick()
        elif agenda_at <= idea_at:
            self.until(agenda_at)
            heapq.heappop(self.agenda)[2]()
        else:
            self.until(idea_at)
            if self.drain_at is not None and self.steps >= self.drain_at:
                self.drain_at = None
                self.feed(Drain(self.rng.random() < 0.5), "the broker drains")
            elif len(self.peers) < 3:
                self.come()
            else:
                self.rng.choices(self.acts, self.weights)[0]()
        self.witness.nothing_is_overdue(self.witness.now - LAG_MAX_S - self.limits_slack())

    def limits_slack(self) -> float:
        """How late a tick that was asked for in time may be: other things may happen at the same moment."""
        return 1e-6

    def finish(self) -> None:
        """Let what is under way arrive, then let everybody leave."""
        while self.agenda:
            at, _, act = heapq.heappop(self.agenda)
            while self.witness.router.next_deadline() <= at:
                self.until(self.witness.router.next_deadline())
                self.tick()
            self.until(at)
            act()
        self.witness.leave_all()

    def until(self, at: float) -> None:
        self.witness.now = max(self.witness.now, at)

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.promised += 1
        heapq.heappush(self.agenda, (self.witness.now + seconds, self.promised, act))

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
            peer = next((peer for peer in self.peers if peer.session is effect.session), None)
            if peer is None:
                continue
            if isinstance(effect, CloseLink):
                self.later(self.rng.choice((0.0, 0.01)), lambda peer=peer: self.go(peer))  # type: ignore[misc]
            elif isinstance(effect, PauseReading | ResumeReading):
                peer.paused = isinstance(effect, PauseReading)
            elif isinstance(effect, Deliver) and isinstance(effect.message, Call | CancelAttempt):
                self.to_worker(peer, effect.message)

    def fan_out(self) -> None:
        got = self.witness.fan_out(self.rng.choice((1, 2, 100)))
        for session, message in got:
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
            self.feed(event(peer.session), line)

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
        names = [name for name in NAMES[:4] if not self.witness.closed(name)]  # elsewhere its link is turned away
        endpoint = rng.choice((None, *names)) if kind != "w" else rng.choice(names)
        lives_s = rng.choice((None, None, None, 0.0, 3.0, 60.0))
        event = Attached(
            session=peer.id, link=NoLink(takes_binary=rng.random() < 0.5), principal=f"p{peer.id}", role=role,
            endpoint=endpoint,
            grants=ALL if kind == "w" else rng.choice(GRANTS), listen=rng.random() < 0.5,
            capacity=rng.choice((None, 1, 1, 2, 5)), expires_at=None if lives_s is None else self.witness.now + lives_s,
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
            flushed = self.rng.choice((0, 1))
            self.feed(Detached(peer.session, 1006, "broken", flushed), f"{peer.kind}{peer.id} goes, flushed {flushed}")

    def wire_id(self) -> int | str:
        """Mostly a new one, sometimes one that may be in flight."""
        if self.rng.random() < 0.8:
            self.ids_made += 1
            return self.ids_made
        choices: tuple[int | str, ...] = (*range(10), "", "1", max(self.ids_made - 3, 0))
        return self.rng.choice(choices)

    def ask(self) -> None:
        rng = self.rng
        peer = rng.choice(self.peers)
        if peer.paused:
            return
        endpoint, method, wire_id = rng.choice(ASKED), rng.choice(METHODS), self.wire_id()
        retries = rng.choice((0, 0, 0, 1, 3))
        options = Options(
            timeout=rng.choice((None, 0.01, 0.05, 0.5, 2.0, 30.0, 3600.0)), wait=rng.random() < 0.2,
            idempotent=retries > 0, retries=retries, meta=rng.random() < 0.3,
        )  # fmt: skip
        body = Body(b"[]", rng.choice(ATTACHED))
        line = (
            f"{peer.kind}{peer.id} asks {wire_id!r} {endpoint}/{method} {options.timeout} r{retries} w{options.wait:d}"
        )
        self.send(peer, lambda session: Asked(session, wire_id, endpoint, method, body, options), line)
        if rng.random() < 0.05:
            self.later(rng.random(), lambda: self.take_back(peer, wire_id))

    def ask_many(self) -> None:
        for _ in range(self.rng.randrange(2, 20)):
            self.ask()

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
        peer, congested = self.rng.choice(self.peers), self.rng.random() < 0.5
        self.arrive(peer, lambda session: Congested(session, congested), f"{peer.kind}{peer.id} congested {congested}")
        if congested:
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
            Detached(session, 1006, "", 0),
        )
        event = self.rng.choice(events)
        self.feed(event, f"echo of {peer.kind}{peer.id}: {type(event).__name__} {wire_id!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description="runs the simulator over many seeds")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--digest", action="store_true", help="print one digest over all traces")
    given = parser.parse_args()
    started = time.monotonic()
    digest = hashlib.sha256()
    failed = done = 0
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        done += given.steps
        try:
            digest.update(Simulator(seed).run(given.steps).encode())
        except Failure as failure:
            failed += 1
            print(failure, file=sys.stderr)
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
