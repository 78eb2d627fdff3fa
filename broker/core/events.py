"""What goes into the router (events) and what comes out (effects)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from broker.core.access import Grant, Role
from broker.core.errors import Close, Kind
from broker.core.ids import AttemptId, SessionId, WireId
from broker.core.messages import DEFAULT_OPTIONS, EMPTY, Body, Message, Options, SessionTold

if TYPE_CHECKING:
    from broker.core.sessions import Session


class Link(Protocol):
    """What the core keeps of a socket: an address for effects. Only the engine calls it."""

    @property
    def takes_binary(self) -> bool:
        """Whether attachments reach this peer as they are; else they become base64 within the text."""
        ...

    def deliver(self, message: Message) -> None:
        """Send one message in this peer's dialect."""

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Send one of many copies; `frames` keeps what was built for others. False if a bound dropped it."""

    def close(self, code: int, reason: str) -> None:
        """Say why and end."""

    def pause_reading(self) -> None:
        """Take no more input until `resume_reading`."""

    def resume_reading(self) -> None:
        """Take input again."""


class NumberedLink(Link, Protocol):
    """A link whose dialect can number what it sends: what a session with grace needs."""

    def deliver_numbered(self, message: Message, n: int) -> None:
        """As `deliver`; the peer is told that this is message `n` of the session."""

    def broadcast_numbered(self, message: Message, frames: dict[str, bytes], n: int) -> bool:
        """As `broadcast`; the peer is told that this is message `n` of the session."""
        ...


# ---------------------------------------------------------------- events


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    """A peer has been authenticated and is there. `expires_at` is on the clock of `now`, None for never.

    With `grace_s` its session outlives the link, which must be a `NumberedLink`; `secret` is what it comes back with.
    """

    session: SessionId
    link: Link
    principal: str
    grants: tuple[Grant, ...]
    role: Role
    endpoint: str | None = None
    listen: bool = True
    capacity: int | None = None
    methods: frozenset[str] | None = None
    grace_s: float = 0.0
    secret: str = ""
    expires_at: float | None = None
    token_id: str = ""
    login_id: str = ""
    remote: str = ""
    dialect: str = ""
    info: Body = EMPTY


class Detached(msgspec.Struct, frozen=True):
    """A peer's link ended. Attempts marked beyond `flushed` were never written to it."""

    session: Session
    code: int
    reason: str
    flushed: int
    link: Link | None = None
    """whose end it was, for sessions that outlive one"""


class Resumed(msgspec.Struct, frozen=True, kw_only=True):
    """A session's peer is there again over a new link, and has shown the secret and a credential of its principal.

    `received` is the number of the last message it got.
    """

    session: Session
    link: NumberedLink
    received: int
    grants: tuple[Grant, ...]
    expires_at: float | None = None
    token_id: str = ""
    login_id: str = ""
    remote: str = ""


class Acked(msgspec.Struct, frozen=True, gc=False):
    """A peer with grace has got all messages up to number `n`."""

    session: Session
    n: int


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A peer asks. `wire_id` None is a notification; methods of `endpoint` "" are the broker's own."""

    session: Session
    wire_id: WireId | None
    endpoint: str
    method: str
    body: Body
    options: Options = DEFAULT_OPTIONS


class Answered(msgspec.Struct, frozen=True, gc=False):
    """A worker answers an attempt; `error` None means `body` is the result, else the error as it came."""

    session: Session
    attempt: AttemptId
    body: Body
    error: ErrorReply | None = None


class ClassAnswered(msgspec.Struct, frozen=True, gc=False):
    """A worker is about to answer an attempt, `well` or with an error: that tells whether it has the method's class."""

    session: Session
    attempt: AttemptId
    well: bool


class ErrorReply(msgspec.Struct, frozen=True, gc=False):
    """What kind of error a worker gave: its code, and whether it may be tried again as it says."""

    code: int
    retryable: bool = False


class BadReply(msgspec.Struct, frozen=True, gc=False):
    """A worker's answer to an attempt broke its dialect."""

    session: Session
    attempt: AttemptId
    detail: str


class Overrun(msgspec.Struct, frozen=True, gc=False):
    """A worker that cannot be told to wait has sent more of an answer than is held for a caller who does not read."""

    session: Session
    attempt: AttemptId
    detail: str


class Stray(msgspec.Struct, frozen=True, gc=False):
    """A reply that names no attempt of this session.

    `foreign` if it names another's (a strike), `nameless` if its id was null; then `error` is its error.
    """

    session: Session
    foreign: bool = False
    nameless: bool = False
    body: Body = EMPTY
    error: ErrorReply | None = None


class Malformed(msgspec.Struct, frozen=True, gc=False):
    """A peer said something that is no message of its dialect, and has been told. `strike` if it looks like abuse."""

    session: Session
    detail: str
    strike: bool = False


class Refused(msgspec.Struct, frozen=True, gc=False):
    """A request its codec understood and had to refuse (an option it does not know, say): that is its outcome."""

    session: Session
    wire_id: WireId
    kind: Kind
    detail: str
    endpoint: str = ""
    method: str = ""


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """A caller takes its request back."""

    session: Session
    wire_id: WireId


class PartSent(msgspec.Struct, frozen=True, gc=False):
    """A part of a stream, of the request `wire_id` from its caller, or of the attempt from its worker (else 0)."""

    session: Session
    wire_id: WireId | None
    attempt: AttemptId
    seq: int
    body: Body
    more: bool = False
    last: bool = False


class CreditGranted(msgspec.Struct, frozen=True, gc=False):
    """The receiver of parts takes those with `seq` below `upto`; addressed as `PartSent` is."""

    session: Session
    wire_id: WireId | None
    attempt: AttemptId
    upto: int


class Progressed(msgspec.Struct, frozen=True, gc=False):
    """A worker says how far it is: by the attempt, or, where that is 0, by the token its caller named (JSON text)."""

    session: Session
    attempt: AttemptId
    token: bytes
    body: Body


class Congested(msgspec.Struct, frozen=True, gc=False):
    """A peer's outbox rose above its soft bound, or fell below half of it."""

    session: Session
    congested: bool


class Drain(msgspec.Struct, frozen=True):
    """The broker is leaving: take no new work, and with `now` end what is left."""

    now: bool = False


Event: TypeAlias = (
    Attached | Resumed | Detached | Acked | Asked | Answered | ClassAnswered | BadReply | Overrun | PartSent
    | CreditGranted | Progressed | Stray | Malformed | Refused | Cancel | Congested | Drain
)  # fmt: skip


# ---------------------------------------------------------------- effects


class Deliver(msgspec.Struct, frozen=True, gc=False):
    """Send this message to this session."""

    session: Session
    message: Message


class CloseLink(msgspec.Struct, frozen=True, gc=False):
    """End this session's link and say why."""

    session: Session
    close: Close
    reason: str


class PauseReading(msgspec.Struct, frozen=True, gc=False):
    """Read no more from this session: it does not read what it is sent."""

    session: Session


class ResumeReading(msgspec.Struct, frozen=True, gc=False):
    """Read from this session again."""

    session: Session


class TakeOver(msgspec.Struct, frozen=True, gc=False):
    """Go on with this session over a new link: say where it stands, send what is kept, close the link it had."""

    session: Session
    link: NumberedLink
    old: NumberedLink | None
    told: SessionTold


class PlaceChanged(msgspec.Struct, frozen=True, gc=False):
    """This session has come to, or left, an endpoint, or is no more; said only if `State.tells_places`."""

    session: Session


class StartFanout(msgspec.Struct, frozen=True, gc=False):
    """There are broadcasts to deliver: fetch them in slices from `Router.fanouts`."""


Effect: TypeAlias = Deliver | CloseLink | PauseReading | ResumeReading | TakeOver | PlaceChanged | StartFanout
