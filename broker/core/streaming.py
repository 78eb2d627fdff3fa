"""The way of parts, credit and progress: from one side of a request to the other, within what the receiver granted.

A part goes on at once and is kept nowhere but in the receiver's outbox: whoever does not read grants nothing, and the
sender stops. What breaks these rules ends its request; what comes for a request that has ended is dropped.
"""

from __future__ import annotations

from broker.core import errors
from broker.core.budget import size_of
from broker.core.errors import Kind, Outcome
from broker.core.events import CreditGranted, Deliver, Overrun, PartSent, Progressed
from broker.core.messages import Credit, Part, Progress
from broker.core.outcomes import outcome_of
from broker.core.pending import STREAMING, Attempt, Request
from broker.core.requests import Requests
from broker.core.sessions import Session
from broker.core.state import State
from broker.core.streams import FIRST_CREDIT, Stream, tell_caller, tell_worker


class Streaming:
    """Everything that happens to a request between its beginning and its end."""

    __slots__ = ("counters", "effects", "requests", "state")

    def __init__(self, state: State, requests: Requests) -> None:
        self.state = state
        self.requests = requests
        self.counters, self.effects = state.counters, state.effects

    # ------------------------------------------------------------ parts

    def part_sent(self, event: PartSent, now: float) -> None:
        """A part of a reply from its worker, or one of a request from its caller."""
        if event.wire_id is None:
            attempt = event.session.attempts.get(event.attempt)
            if attempt is not None:
                self._from_worker(event, attempt, now)
                return
        else:
            request = event.session.requests.get(event.wire_id)
            if request is not None:
                self._from_caller(event, request, now)
                return
        self.counters.parts_dropped += 1

    def _from_worker(self, event: PartSent, attempt: Attempt, now: float) -> None:
        request, body = attempt.request, event.body
        stream = self.requests.stream_of(request, now)
        down, size = stream.down, size_of(body)
        if down.ended or event.seq < down.next_seq:
            self.counters.parts_dropped += 1
            return
        fault = down.fault(event.seq, size, self.state.limits.part_max_bytes)
        if fault:
            self._break_off(request, errors.BAD_REPLY, fault, now)
            return
        kept = request.session.kept
        if kept is not None and kept.link is None and request.options.stream_in and not kept.has_room(size):
            self._break_off(request, errors.SLOW_CONSUMER, "its reader is away, and more came than is kept for it", now)
            return
        self._took(request, stream, now)
        down.take(size, event.last)
        self.counters.parts_down += 1
        self.counters.part_bytes_down += size
        if request.options.stream_in:
            part = Part(request.wire_id, 0, event.seq, body, event.more, event.last)
            self.effects.append(Deliver(request.session, part))
            if down.wanted > down.granted and down.renew(self.state.limits.parts_ahead_max):
                tell_worker(request, self.effects)
        else:
            self._gather(request, attempt, stream, event, now)

    def _gather(self, request: Request, attempt: Attempt, stream: Stream, event: PartSent, now: float) -> None:
        """Keep a part for a caller who takes none, up to the bound for one message."""
        down, size_max = stream.down, self.state.limits.message_max_bytes
        if down.bytes > size_max:
            detail = f"its parts together are larger than the {size_max} bytes of a message; ask with stream: in"
            self._break_off(request, errors.TOO_LARGE, detail, now)
            return
        if event.last and not event.body.attachments and bytes(event.body.raw) == b"null" and not any(stream.more[-1:]):
            return  # it carries nothing, and only ends the direction
        if self._is_full(request, size_of(event.body), now):
            return
        stream.gathered.append(event.body)
        self.state.budget.hold(request, size_of(event.body))
        stream.more.append(event.more)
        if down.told - down.next_seq <= FIRST_CREDIT // 2:
            down.granted = down.told = down.next_seq + FIRST_CREDIT
            self.effects.append(Deliver(attempt.session, Credit(None, attempt.id, down.told)))

    def _from_caller(self, event: PartSent, request: Request, now: float) -> None:
        if not request.options.stream_out:
            detail = "parts for a request that was not asked with stream: out"
            self._break_off(request, errors.INVALID_REQUEST, detail, now)
            return
        stream = self.requests.stream_of(request, now)
        up, size = stream.up, size_of(event.body)
        if up.ended or event.seq < up.next_seq:
            self.counters.parts_dropped += 1
            return
        fault = up.fault(event.seq, size, self.state.limits.part_max_bytes)
        if fault:
            self._break_off(request, errors.INVALID_REQUEST, fault, now)
            return
        if request.attempt is None and self._is_full(request, size, now):
            return
        self._took(request, stream, now)
        up.take(size, event.last)
        self.counters.parts_up += 1
        self.counters.part_bytes_up += size
        attempt = request.attempt
        part = Part(None, attempt.id if attempt else 0, event.seq, event.body, event.more, event.last)
        if attempt is None:
            stream.early.append(part)
            self.state.budget.hold(request, size)
        else:
            self.effects.append(Deliver(attempt.session, part))
            if up.wanted > up.granted and up.renew(self.state.limits.parts_ahead_max):
                tell_caller(request, self.effects)

    def _took(self, request: Request, stream: Stream, now: float) -> None:
        """A part has come that counts: from here on the stream must not stand still."""
        stream.touched_at = now
        if stream.first_part_at is None:
            stream.first_part_at = now
            self.requests.let_flow(request, stream)
        if request.attempt is not None:
            request.state = STREAMING

    def _is_full(self, request: Request, size: int, now: float) -> bool:
        """Whether a part that would stay here is too much for the memory; then its request has ended."""
        used, hard = self.state.budget.used, self.state.limits.memory_hard_bytes
        if used + size <= hard:
            return False
        retryable = request.options.idempotent or not request.attempts
        detail = f"{used} bytes wait here, of {hard}"
        self._stop(request, self.requests.overloaded(request, "memory", detail, now, retryable), now)
        return True

    def _break_off(self, request: Request, kind: Kind, detail: str, now: float) -> None:
        """One side broke the rules: the request ends and both are told."""
        retryable = kind is errors.BAD_REPLY and request.options.idempotent
        self._stop(request, outcome_of(kind, request, now, retryable, detail=detail), now)

    def _stop(self, request: Request, outcome: Outcome, now: float) -> None:
        self.counters.streams_broken += 1
        self.requests.stop(request, outcome, now)

    def overrun(self, event: Overrun, now: float) -> None:
        """More of an answer came than is held: its worker knows no credit, and its caller does not read."""
        attempt = event.session.attempts.get(event.attempt)
        if attempt is not None:
            self._break_off(attempt.request, errors.SLOW_CONSUMER, event.detail, now)

    # ------------------------------------------------------------ credit

    def credit_granted(self, event: CreditGranted, now: float) -> None:
        """A receiver takes more parts. Too much is cut; no more than before, or for nobody, is ignored."""
        if event.wire_id is None:
            attempt = event.session.attempts.get(event.attempt)
            request = attempt.request if attempt else None
        else:
            request = event.session.requests.get(event.wire_id)
        if request is None:
            return
        options = request.options
        if not (options.stream_out if event.wire_id is None else options.stream_in):
            return
        stream = self.requests.stream_of(request, now)
        stream.touched_at = now
        ahead_max = self.state.limits.parts_ahead_max
        if event.wire_id is None:
            if stream.up.grant(event.upto, ahead_max):
                tell_caller(request, self.effects)
        elif stream.down.grant(event.upto, ahead_max):
            tell_worker(request, self.effects)

    def reads_again(self, session: Session) -> None:
        """A peer reads again what it is sent: credit that was withheld is passed on."""
        withheld, session.withheld = session.withheld, {}
        for request in withheld:  # both, since a session may ask itself; where nothing is due, nothing is told
            tell_worker(request, self.effects)
            tell_caller(request, self.effects)

    # ------------------------------------------------------------ progress

    def progressed(self, event: Progressed, now: float) -> None:
        """Pass a worker's progress on, if its caller asked for that and reads."""
        attempt = event.session.attempts.get(event.attempt) if event.attempt else _named(event)
        if attempt is None:
            self.counters.progress_dropped += 1
            return
        request = attempt.request
        if request.stream is not None:
            request.stream.touched_at = now
        token = request.options.progress
        if token is None or request.session.congested:
            self.counters.progress_dropped += 1
            return
        self.counters.progress += 1
        self.effects.append(Deliver(request.session, Progress(request.wire_id, token, event.body)))


def _named(event: Progressed) -> Attempt | None:
    """The attempt whose caller named this token; None if there is none, or more than one."""
    if not event.token:
        return None
    found = [each for each in event.session.attempts.values() if each.request.options.progress == event.token]
    return found[0] if len(found) == 1 else None
