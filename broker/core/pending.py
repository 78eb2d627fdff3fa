"""Requests that have not ended, and the attempts made for them."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from broker.core.budget import SMALL_BYTES, Budget, size_of
from broker.core.deadlines import Deadlines
from broker.core.ids import AttemptId, RequestId, WireId
from broker.core.limits import Limits
from broker.core.messages import Body, Options

if TYPE_CHECKING:
    from broker.core.keys import Work
    from broker.core.registry import Endpoint, Registration
    from broker.core.sessions import Session
    from broker.core.streams import Stream


class RequestState(enum.Enum):
    """QUEUED → ASSIGNED → STREAMING → ENDED; back to QUEUED by a retry; ENDED is absorbing.

    JOINED waits for the work another request with the same key leads, and may have to take it over.
    """

    QUEUED = "queued"
    ASSIGNED = "assigned"
    STREAMING = "streaming"
    JOINED = "joined"
    ENDED = "ended"


class AttemptState(enum.Enum):
    """OPEN → CANCELLING → DONE, or OPEN → DONE."""

    OPEN = "open"
    CANCELLING = "cancelling"
    DONE = "done"


# The members, fetched once: an attribute of an Enum class costs 70 ns each time it is looked up.
QUEUED, ASSIGNED, STREAMING = RequestState.QUEUED, RequestState.ASSIGNED, RequestState.STREAMING
JOINED, ENDED = RequestState.JOINED, RequestState.ENDED
OPEN, DONE = AttemptState.OPEN, AttemptState.DONE

# Requests and attempts are hidden from the garbage collector (gc=False: 0.5 µs less for each request that stays a
# while). They refer to one another and to what holds them; `Pending` cuts these ties when they end, and all end.


class Attempt(msgspec.Struct, eq=False, gc=False):
    """One try of a request at one worker.

    `mark` is how many bytes its link had taken in when the call was in: the link's `flushed` beyond it means that the
    call was handed to the operating system.
    """

    id: AttemptId
    request: Request
    registration: Registration
    sent_at: float
    mark: int = 0
    state: AttemptState = AttemptState.OPEN

    @property
    def session(self) -> Session:
        """The worker that has it."""
        return self.registration.session


class Request(msgspec.Struct, eq=False, gc=False):
    """One accepted request: addresses and times, no callback. `deadline` and `accepted_at` are on the loop's clock.

    `held` is its share of the budget. Of attempts that were lost, `sent_at` is when the last was made, and `spent_s`
    how long all had it.
    """

    id: RequestId
    session: Session
    wire_id: WireId
    endpoint: Endpoint
    method: str
    body: Body
    options: Options
    accepted_at: float
    deadline: float
    slot: dict[Request, None] | None = None
    state: RequestState = RequestState.QUEUED
    attempt: Attempt | None = None
    attempts: int = 0
    stream: Stream | None = None
    held: int = 0
    sent_at: float | None = None
    spent_s: float = 0.0
    work: Work | None = None
    repeated: bool = False


class Pending:
    """The table of requests that have not ended. The views of it change here and nowhere else.

    A request stands in its session's `requests`, in one deadline slot, and, once assigned, as an attempt in its
    worker's `attempts`.
    """

    __slots__ = ("attempts_made", "budget", "count", "deadlines", "requests_made")

    def __init__(self, limits: Limits, budget: Budget) -> None:
        self.budget = budget
        self.deadlines: Deadlines[Request] = Deadlines(limits.slot_s)
        self.count = 0
        self.requests_made = 0
        self.attempts_made = 0

    def open(
        self, session: Session, wire_id: WireId, endpoint: Endpoint, method: str, body: Body, options: Options,
        now: float, deadline: float,
    ) -> Request:  # fmt: skip
        """Take a request in. Its wire id must not be in flight at the session."""
        self.requests_made = number = self.requests_made + 1
        request = Request(number, session, wire_id, endpoint, method, body, options, now, deadline)
        request.slot = self.deadlines.add(request, deadline)
        session.requests[wire_id] = request
        self.count += 1
        if (body.attachments or len(body.raw) > SMALL_BYTES) and (size := size_of(body)) > SMALL_BYTES:
            self.budget.hold(request, size)
        return request

    def close(self, request: Request) -> None:
        """End a request, and its attempt if it has one: it stands nowhere any more."""
        request.state = ENDED
        del request.session.requests[request.wire_id]
        attempt = request.attempt
        if request.stream is not None:
            request.session.withheld.pop(request, None)
            if attempt is not None:
                attempt.session.withheld.pop(request, None)
        if attempt is not None:
            attempt.state = DONE
            request.attempt = None
            del attempt.registration.session.attempts[attempt.id]
        slot = request.slot
        if slot is not None:
            del slot[request]
            if not slot:
                slot.clear()  # an emptied dict keeps the room it had at its fullest: 55 KB at 25,000 requests a second
            request.slot = None
        self.count -= 1
        if request.held:
            self.budget.hold(request, -request.held)

    def open_attempt(self, request: Request, registration: Registration, now: float) -> Attempt:
        """Give a request to a worker."""
        self.attempts_made = number = self.attempts_made + 1
        attempt = Attempt(number, request, registration, now)
        request.attempt = attempt
        request.attempts += 1
        request.state = ASSIGNED
        registration.session.attempts[number] = attempt
        return attempt

    def close_attempt(self, attempt: Attempt) -> None:
        """Take an attempt from its worker; its request goes on."""
        attempt.state = DONE
        attempt.request.attempt = None
        del attempt.registration.session.attempts[attempt.id]

    def put_off(self, request: Request, due_at: float) -> None:
        """It is due at another moment."""
        if request.slot is not None:
            request.slot.pop(request, None)
        request.slot = self.deadlines.add(request, due_at)

    def take_due(self, now: float, limit: int) -> list[Request]:
        """At most `limit` requests whose deadline has passed, in order; they must be closed, or put off."""
        due = self.deadlines.take_due(now, limit)
        for request in due:
            request.slot = None
        return due
