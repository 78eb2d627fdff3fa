"""The streams of the witness: for each request with parts, what has come, what was passed on, what was granted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from broker.core.events import CreditGranted, PartSent, Progressed
from broker.core.limits import Limits
from broker.core.messages import Body, Credit, Part, Progress
from broker.core.sessions import Session
from broker.wire.pieces import PiecesError, join_reply

if TYPE_CHECKING:
    from tests.core.witness import Asking

FIRST = 4


class Way:
    """One direction, as both ends have been told it."""

    __slots__ = ("came", "ended", "passed", "told", "wanted")

    def __init__(self, wanted: int = FIRST) -> None:
        self.came: list[PartSent] = []
        self.passed = 0
        self.wanted = wanted
        self.told = FIRST
        self.ended = False

    def within(self, ahead_max: int) -> int:
        """Up to where its sender may be told: what was asked for, and no more than so many ahead of what came."""
        return min(self.wanted, len(self.came) + ahead_max)

    def lags(self, ahead_max: int) -> bool:
        """Whether its sender should have been told of more: of all that was asked for, or of half a window."""
        due = self.within(ahead_max)
        return self.told < due and (due == self.wanted or due - self.told >= ahead_max // 2)


class Flows:
    """Both directions of one request. `gathers` if the broker keeps the parts of the reply for its caller."""

    __slots__ = ("down", "gathers", "touched_at", "up")

    def __init__(self, gathers: bool, now: float) -> None:
        self.up, self.down = Way(), Way()
        self.gathers = gathers
        self.touched_at = now

    @property
    def has_flowed(self) -> bool:
        """Whether anything came that another worker would have to be told again, or the caller would see twice."""
        return self.up.passed > 0 or (not self.gathers and self.down.passed > 0)

    def joined(self, result: Body) -> Body | None:
        """The reply as its caller should have it; None if the parts make none."""
        if not self.down.came:
            return result
        parts = [part.body for part in self.down.came]
        try:
            return join_reply(parts, [part.more for part in self.down.came], result)
        except PiecesError:
            return None


def size_of(body: Body) -> int:
    """Bytes of it all."""
    return len(body.raw) + sum(map(len, body.attachments))


class StreamViolation(AssertionError):
    """The router did with a stream what it promises not to do."""


def wrong(*what: object) -> NoReturn:
    """Say so."""
    raise StreamViolation(" ".join(map(str, what)))


class Streams:
    """What the witness knows of streams. `broken` is set while a part must end its request."""

    __slots__ = ("broken", "event", "limits")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.event: object = None
        self.broken: tuple[Asking, str] | None = None
        """the request that must end in this step because of a part, and how"""

    # ------------------------------------------------------------ what came

    def begin(self, event: object) -> None:
        """A step begins."""
        self.event, self.broken = event, None

    def part_came(self, event: PartSent, asking: Asking | None, now: float) -> None:
        """A part of somebody who has the request, or asked it."""
        if asking is None:
            return
        down = event.wire_id is None
        flows = self._flows(asking, now)
        if not down and not asking.options.stream_out:
            self.broken = asking, "invalid"
            return
        way = flows.down if down else flows.up
        if way.ended or event.seq < len(way.came):
            return
        fault = event.seq > len(way.came) or event.seq >= way.told
        if fault or size_of(event.body) > self.limits.part_max_bytes:
            self.broken = asking, "bad_reply" if down else "invalid"
            return
        first = not flows.up.came and not flows.down.came
        way.came.append(event)
        way.ended = event.last
        flows.touched_at = now
        if first and asking.options.timeout is None and not asking.flowed:
            asking.deadline = asking.accepted_at + self.limits.deadline_max_s
        asking.flowed = True
        gathered = sum(size_of(part.body) for part in flows.down.came)
        if down and flows.gathers and gathered > self.limits.message_max_bytes:
            self.broken = asking, "too_large"

    def credit_came(self, event: CreditGranted, asking: Asking | None, now: float) -> None:
        """A receiver takes more."""
        if asking is None:
            return
        options = asking.options
        if not (options.stream_out if event.wire_id is None else options.stream_in):
            return
        flows = self._flows(asking, now)
        flows.touched_at = now
        way = flows.up if event.wire_id is None else flows.down
        way.wanted = max(way.wanted, event.upto)

    def progress_came(self, event: Progressed, asking: Asking | None, now: float) -> None:
        """A worker says how far it is."""
        if asking is not None and asking.flows is not None:
            asking.flows.touched_at = now

    def _flows(self, asking: Asking, now: float) -> Flows:
        if asking.flows is None:
            asking.flows = Flows(not asking.options.stream_in, now)
        return asking.flows

    # ------------------------------------------------------------ what goes out

    def given_out(self, asking: Asking) -> None:
        """A worker is given it, for the first time or again."""
        flows = asking.flows
        if flows is None or not asking.attempts:
            return
        if flows.has_flowed:
            wrong(asking, "was given to another worker though parts had been passed on")
        flows.down = Way(flows.down.wanted)

    def delivered(self, session: Session, message: Part | Credit | Progress, asking: Asking | None) -> None:
        """Something of a stream goes to somebody, who asked `asking` or has it."""
        if asking is None:
            wrong("to one who has no such request open:", message)
        if isinstance(message, Progress):
            self._progress(session, message, asking)
            return
        to_caller = message.wire_id is not None
        if asking.flows is None or (to_caller and session is not asking.session):
            wrong("of a stream that is none:", message)
        if isinstance(message, Part):
            way = asking.flows.down if to_caller else asking.flows.up
            self._part(message, way, asking, to_caller)
        else:
            way = asking.flows.up if to_caller else asking.flows.down
            self._credit(message, way, asking, to_caller)

    def _part(self, part: Part, way: Way, asking: Asking, to_caller: bool) -> None:
        if to_caller and not asking.options.stream_in:
            wrong(asking, "takes no parts and got", part.seq)
        if part.seq != way.passed or part.seq >= len(way.came):
            wrong(asking, "got part", part.seq, "where", way.passed, "was due;", len(way.came), "came")
        if part.seq >= way.wanted:
            wrong(asking, "got part", part.seq, "and had asked for those below", way.wanted)
        came = way.came[part.seq]
        if part.body is not came.body or (part.more, part.last) != (came.more, came.last):
            wrong(asking, "got a part that is not what was sent:", part)
        way.passed += 1

    def _credit(self, credit: Credit, way: Way, asking: Asking, to_caller: bool) -> None:
        gathers = asking.flows is not None and asking.flows.gathers and not to_caller
        limit = len(way.came) + FIRST if gathers else way.within(self.limits.parts_ahead_max)
        if not way.told < credit.upto <= limit:
            wrong(asking, "credit", credit.upto, "after", way.told, "where", limit, "was granted")
        way.told = credit.upto
        way.wanted = max(way.wanted, credit.upto)

    def _progress(self, session: Session, message: Progress, asking: Asking) -> None:
        event = self.event
        if not isinstance(event, Progressed) or message.body is not event.body:
            wrong("progress nobody told:", message)
        if asking.options.progress is None or asking.worker is not event.session:
            wrong(asking, "was told progress it did not want, or of another")

    # ------------------------------------------------------------ after every step

    def check(self, openly: Iterable[Asking], congested: dict[Session, None]) -> None:
        """Nothing is held back that should have been passed on."""
        if self.broken is not None:
            wrong(self.broken[0], "goes on though it had to end as", self.broken[1])
        for asking in openly:
            flows, worker = asking.flows, asking.worker
            if flows is None:
                continue
            if not flows.gathers and flows.down.passed < len(flows.down.came) and worker is not None:
                wrong(asking, "misses parts:", flows.down.passed, "of", len(flows.down.came))
            if worker is None:
                continue
            if flows.up.passed < len(flows.up.came):
                wrong(asking, "its worker misses parts:", flows.up.passed, "of", len(flows.up.came))
            ahead_max = self.limits.parts_ahead_max
            if worker not in congested and flows.up.lags(ahead_max):
                wrong(asking, "its caller was not told of credit", flows.up.wanted, "but", flows.up.told)
            if asking.session not in congested and not flows.gathers and flows.down.lags(ahead_max):
                wrong(asking, "its worker was not told of credit", flows.down.wanted, "but", flows.down.told)
