"""A router with names for its peers and a clock that stands still, for tests of the core."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from broker.core import errors
from broker.core.access import Grant, Role
from broker.core.errors import Kind, Outcome
from broker.core.events import (
    Answered,
    Asked,
    Attached,
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
    TakeOver,
)
from broker.core.ids import AttemptId, WireId
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import (
    Ack,
    Body,
    Broadcast,
    Call,
    CancelAttempt,
    Credit,
    End,
    Message,
    Notify,
    Options,
    Part,
    Progress,
    SessionTold,
)
from broker.core.pending import Attempt
from broker.core.requests import Requests
from broker.core.router import Router
from broker.core.sessions import Session
from broker.wire.pieces import join_reply

EVERYTHING = (Grant(Role.CALLER | Role.WORKER),)
SLICE = 1000


def calls_of_python(patch: pytest.MonkeyPatch) -> Counter[str]:
    """How often `Requests.asked` and `Requests.answered` are called from now on: what was not taken in in C."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[[Requests, Any, float], None]:
        method = getattr(Requests, name)

        def counted(requests: Requests, event: Any, now: float) -> None:
            calls[name] += 1
            method(requests, event, now)

        return counted

    for name in ("asked", "answered"):
        patch.setattr(Requests, name, counting(name))
    return calls


class NoLink:
    """A link that takes everything: nothing in the core calls it."""

    __slots__ = ("flushed", "takes_binary")

    def __init__(self, *, takes_binary: bool = True) -> None:
        self.flushed = 0
        self.takes_binary = takes_binary

    def deliver(self, message: Message) -> None:
        raise AssertionError("the core does no I/O")

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        raise AssertionError("the core does no I/O")

    def close(self, code: int, reason: str) -> None:
        raise AssertionError("the core does no I/O")

    def pause_reading(self) -> None:
        raise AssertionError("the core does no I/O")

    def resume_reading(self) -> None:
        raise AssertionError("the core does no I/O")


class World:
    """A router, `now`, and short words for what peers do. Every step ends with `router.check()`.

    What the router wants done gathers in `effects`, in order, until `take` fetches it.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        endpoints: Mapping[str, EndpointLimits] | None = None,
        *,
        started_at: float = 0.0,
        now: float = 1000.0,
    ) -> None:
        self.router = Router(limits or Limits(), endpoints, join=join_reply, node="n", now=started_at)
        self.now = now
        self.effects: list[Effect] = []
        self.sessions_made = 0

    # ------------------------------------------------------------ what peers do

    def feed(self, event: Event) -> None:
        """One event into the router."""
        effects = self.router.handle(event, self.now)
        self.effects += effects
        effects.clear()
        self.router.check()

    def attach(
        self,
        role: Role = Role.CALLER,
        endpoint: str | None = None,
        *,
        grants: tuple[Grant, ...] = EVERYTHING,
        listen: bool = False,
        capacity: int | None = None,
        expires_at: float | None = None,
        principal: str = "somebody",
        takes_binary: bool = True,
        methods: frozenset[str] | None = None,
    ) -> Session:
        self.sessions_made += 1
        self.feed(
            Attached(
                session=self.sessions_made, link=NoLink(takes_binary=takes_binary), principal=principal,
                grants=grants, role=role, endpoint=endpoint, listen=listen, capacity=capacity, expires_at=expires_at,
                methods=methods,
            )
        )  # fmt: skip
        return self.router.sessions.by_id[self.sessions_made]

    def caller(self, **more: Any) -> Session:
        return self.attach(Role.CALLER, **more)

    def worker(self, endpoint: str = "e", **more: Any) -> Session:
        return self.attach(Role.WORKER, endpoint, **more)

    def detach(self, session: Session, *, flushed: int = 0, code: int = 1006, reason: str = "") -> None:
        self.feed(Detached(session, code, reason, flushed))

    def ask(
        self, session: Session, wire_id: WireId | None, target: str = "e/m", raw: bytes = b"[]", **options: Any
    ) -> None:
        """A request for `endpoint/method`; a method of the broker's own stands without a slash."""
        endpoint, _, method = target.rpartition("/")
        self.feed(Asked(session, wire_id, endpoint, method, Body(raw), Options(**options)))

    def command(self, session: Session, method: str, **params: Any) -> End:
        """One of the broker's own methods; how it ended."""
        self.take()
        self.ask(session, f"c{self.now}", method, json.dumps(params).encode())
        return self.one_end(session)

    def serve(self, session: Session, endpoint: str, **more: Any) -> None:
        assert self.command(session, "broker.serve", endpoint=endpoint, **more).outcome.kind is errors.OK

    def answer(self, session: Session, attempt: Attempt | AttemptId, raw: bytes = b"1") -> None:
        number = attempt if isinstance(attempt, int) else attempt.id
        self.feed(Answered(session, number, Body(raw)))

    def fail(self, session: Session, attempt: Attempt, code: int = -32000, *, retryable: bool = False) -> None:
        self.feed(Answered(session, attempt.id, Body(b'{"code":%d}' % code), ErrorReply(code, retryable)))

    def cancel(self, session: Session, wire_id: WireId) -> None:
        self.feed(Cancel(session, wire_id))

    def malformed(self, session: Session, *, strike: bool = True) -> None:
        self.feed(Malformed(session, "no message", strike))

    def refused(self, session: Session, wire_id: WireId, kind: Kind = errors.INVALID_PARAMS) -> None:
        self.feed(Refused(session, wire_id, kind, "an option nobody knows", "e", "m"))

    def congested(self, session: Session, congested: bool) -> None:
        self.feed(Congested(session, congested))

    def drain(self, *, now: bool = False) -> None:
        self.feed(Drain(now))

    def reconfigure(self, limits: Limits, endpoints: Mapping[str, EndpointLimits]) -> None:
        self.router.reconfigure(limits, endpoints, self.now)
        self.effects += self.router.effects
        self.router.effects.clear()
        self.router.check()

    def tick(self, limit: int = SLICE) -> bool:
        more = self.router.tick(self.now, limit)
        self.effects += self.router.effects
        self.router.effects.clear()
        self.router.check()
        return more

    def sleep(self, seconds: float) -> None:
        """Let time pass, with the ticks the router asks for, each in its time."""
        until = self.now + seconds
        while self.router.next_deadline() <= until:
            self.now = max(self.now, self.router.next_deadline())
            while self.tick():
                pass
        self.now = until

    # ------------------------------------------------------------ what came of it

    def take(self) -> list[Effect]:
        """All effects since the last time."""
        taken, self.effects = self.effects, []
        return taken

    def messages(self, session: Session) -> list[Message]:
        """What a session has been sent since the last `take`."""
        return [e.message for e in self.effects if isinstance(e, Deliver) and e.session is session]

    def calls(self, session: Session) -> list[Call]:
        return [message for message in self.messages(session) if isinstance(message, Call)]

    def one_call(self, session: Session) -> Call:
        (call,) = self.calls(session)
        self.effects = [e for e in self.effects if not (isinstance(e, Deliver) and e.message is call)]
        return call

    def ends(self, session: Session) -> list[End]:
        return [message for message in self.messages(session) if isinstance(message, End)]

    def one_end(self, session: Session) -> End:
        """The only end the session was told of since the last time; it is taken."""
        (end,) = self.ends(session)
        self.effects = [e for e in self.effects if not (isinstance(e, Deliver) and e.message is end)]
        return end

    def outcome(self, session: Session) -> Outcome:
        return self.one_end(session).outcome

    def cancelled(self, session: Session) -> list[AttemptId]:
        """The attempts a worker was told to drop."""
        return [m.attempt_id for m in self.messages(session) if isinstance(m, CancelAttempt)]

    def notified(self, session: Session) -> list[str]:
        return [message.method for message in self.messages(session) if isinstance(message, Notify)]

    def closed(self, session: Session) -> list[int]:
        """The codes with which the router wants a link ended."""
        return [e.close.code for e in self.effects if isinstance(e, CloseLink) and e.session is session]

    def broadcasts(self, slice_max: int = SLICE) -> list[tuple[Session, Broadcast]]:
        """Deliver all broadcasts under way; who got what, in order."""
        got = []
        while (part := self.router.fanouts.slice(slice_max)) is not None:
            message, listeners, _ = part
            message = msgspec.structs.replace(message, body=Body(bytes(message.body.raw), message.body.attachments))
            got += [(listener, message) for listener in listeners if listener.link is not None]
        return got

    def busy(self, worker: Session, caller: Session, wire_id: WireId = "busy") -> Attempt:
        """Give a worker something to do; the attempt it has now."""
        self.ask(caller, wire_id, timeout=1000.0)
        return self.one_call(worker).attempt


def describe(effect: Effect, names: Mapping[Session, str], *, worker_ids: bool = True) -> str:
    """One line about one effect, for transcripts and traces."""
    if isinstance(effect, StartFanout):
        return "broadcasts to deliver"
    name = names.get(effect.session, f"session {effect.session.id}")
    if isinstance(effect, CloseLink):
        return f"{name} < close {effect.close.code} {effect.reason}"
    if isinstance(effect, TakeOver):
        return f"{name} < goes on over a new link"
    if isinstance(effect, PauseReading):
        return f"{name} < pause"
    if isinstance(effect, ResumeReading):
        return f"{name} < resume"
    return f"{name} < {describe_message(effect.message)}"


def describe_message(message: Message) -> str:
    """One line about one message."""
    if isinstance(message, End):
        return " ".join(["end", str(message.wire_id), *describe_outcome(message)])
    if isinstance(message, Call):
        attempt = message.attempt
        return f"call a{attempt.id} {message.endpoint}/{message.method} left={message.left_s:g}"
    if isinstance(message, CancelAttempt):
        return f"cancel a{message.attempt_id}"
    if isinstance(message, Notify):
        return f"notify {message.endpoint}/{message.method}"
    if isinstance(message, (Part, Credit, Progress)):
        name = f"a{message.attempt_id}" if getattr(message, "attempt_id", 0) else str(message.wire_id)
        if isinstance(message, Credit):
            return f"credit {name} upto={message.upto}"
        if isinstance(message, Progress):
            return f"progress {name} {bytes(message.body.raw).decode()}"
        return f"part {name} seq={message.seq} {bytes(message.body.raw).decode()}"
    if isinstance(message, (SessionTold, Ack)):
        return str(message)
    where = "/".join(part for part in (message.endpoint, message.topic) if part) or "all"
    number = "" if message.seq is None else f" seq={message.seq}"
    return f"broadcast {where}{number} {bytes(message.body.raw).decode()}"


def describe_outcome(end: End) -> list[str]:
    """The words of an outcome that say something."""
    outcome = end.outcome
    words = [outcome.kind.name]
    words += [f"{name}={getattr(outcome, name)}" for name in ("phase", "cause", "bound") if getattr(outcome, name)]
    if outcome.retryable:
        words.append("retryable")
    if outcome.attempts > 1:
        words.append(f"attempts={outcome.attempts}")
    if end.body is not None:
        words.append(bytes(end.body.raw).decode())
    if end.meta is not None:
        words.append(f"(by {end.meta.worker}, attempts {end.meta.attempts}, {end.meta.elapsed_ms:g} ms)")
    return words
