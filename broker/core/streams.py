"""Streams of a request: what has been passed on in each direction, and up to where more may come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from broker.core.budget import size_of
from broker.core.events import Deliver, Effect
from broker.core.messages import Body, Credit, Part

if TYPE_CHECKING:
    from broker.core.pending import Attempt, Request

FIRST_CREDIT = 4
"""parts each side may send before it has been granted any"""


class Flow(msgspec.Struct, eq=False):
    """One direction of a stream.

    `next_seq` is what the next part must be numbered. Its receiver has asked for parts below `wanted`, of which those
    below `granted` are within the bound, of which its sender has been told `told`: that difference is withheld while
    the receiver does not read what it is sent.
    """

    next_seq: int = 0
    wanted: int = FIRST_CREDIT
    granted: int = FIRST_CREDIT
    told: int = FIRST_CREDIT
    bytes: int = 0
    ended: bool = False

    def fault(self, seq: int, size: int, size_max: int) -> str:
        """Why this part must not come now; empty if it may. One below `next_seq` has come before."""
        if seq != self.next_seq:
            return f"part {seq} came where part {self.next_seq} was due"
        if seq >= self.told:
            return f"part {seq} is beyond the credit: parts below {self.told} may be sent"
        if size > size_max:
            return f"part {seq} of {size} bytes is above the bound of {size_max} bytes for a part"
        return ""

    def take(self, size: int, last: bool) -> None:
        """The part that was due has come."""
        self.next_seq += 1
        self.bytes += size
        self.ended = last

    def grant(self, upto: int, ahead_max: int) -> bool:
        """Its receiver takes parts below `upto`; whether its sender may be told of more now."""
        self.wanted = max(self.wanted, upto)
        return self.renew(ahead_max)

    def renew(self, ahead_max: int) -> bool:
        """Of what was asked for beyond the bound, more is within it as parts come: whether it is worth telling."""
        granted = min(self.wanted, self.next_seq + ahead_max)
        if granted <= self.granted or (granted < self.wanted and granted - self.granted < ahead_max // 2):
            return False
        self.granted = granted
        return True


class Stream(msgspec.Struct, eq=False):
    """Both directions of one request: `down` from its worker to its caller, `up` from its caller to its worker.

    `early` are parts of the caller that came before a worker had the request, no more than the first credit allows.
    `gathered` are parts of the reply for a caller who takes none, with `more` of each. `idle_s` is how long the stream
    may stand still since `touched_at`.
    """

    idle_s: float
    touched_at: float
    down: Flow
    up: Flow
    early: list[Part]
    gathered: list[Body]
    more: list[bool]
    first_part_at: float | None = None

    def is_fresh(self, request: Request) -> bool:
        """Whether nothing has been passed on yet, so that another worker may begin anew."""
        up = self.up.next_seq - len(self.early)
        return not up and not (request.options.stream_in and self.down.next_seq)

    def kept_bytes(self) -> int:
        """What it holds here: parts that came early, parts gathered."""
        return sum(size_of(part.body) for part in self.early) + sum(map(size_of, self.gathered))

    def begin_anew(self) -> None:
        """Forget what the worker that was lost has sent; what its caller has granted still counts."""
        self.down = Flow() if self.gathered else Flow(wanted=self.down.wanted, granted=self.down.granted)
        self.gathered.clear()
        self.more.clear()

    def due(self, request: Request) -> float:
        """When it ends if nothing comes."""
        return min(request.deadline, self.touched_at + self.idle_s)


def new_stream(request: Request, now: float) -> Stream:
    """The stream of a request of which nothing has come yet."""
    idle_s = request.options.idle or request.endpoint.idle_s
    return Stream(idle_s, now, Flow(), Flow(), [], [], [])


def begin(request: Request, attempt: Attempt, effects: list[Effect]) -> None:
    """A worker has been given a request with a stream: what came before is for it."""
    stream = request.stream
    assert stream is not None
    for part in stream.early:
        effects.append(Deliver(attempt.session, msgspec.structs.replace(part, attempt_id=attempt.id)))
    stream.early.clear()
    tell_worker(request, effects)
    tell_caller(request, effects)  # it was withheld when an earlier worker was lost


def tell_worker(request: Request, effects: list[Effect]) -> None:
    """Pass the caller's credit on, unless the caller does not read just now."""
    stream, attempt = request.stream, request.attempt
    if stream is None or attempt is None:
        return
    down = stream.down
    if down.granted <= down.told:
        return
    if request.options.stream_in and request.session.is_behind:  # what is gathered does not go to it
        request.session.withheld[request] = None
        return
    down.told = down.granted
    effects.append(Deliver(attempt.session, Credit(None, attempt.id, down.told)))


def tell_caller(request: Request, effects: list[Effect]) -> None:
    """Pass the worker's credit on, unless the worker does not read just now."""
    stream, attempt = request.stream, request.attempt
    if stream is None or attempt is None:
        return
    up = stream.up
    if up.granted <= up.told:
        return
    if attempt.session.congested:
        attempt.session.withheld[request] = None
        return
    up.told = up.granted
    effects.append(Deliver(request.session, Credit(request.wire_id, 0, up.told)))
