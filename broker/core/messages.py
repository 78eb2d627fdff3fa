"""What the broker says to a peer: values a codec turns into bytes."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from broker.core.errors import Outcome
from broker.core.ids import AttemptId, WireId

if TYPE_CHECKING:
    from broker.core.pending import Attempt
    from broker.core.sessions import Session

Raw: TypeAlias = bytes | msgspec.Raw
"""JSON text nobody has looked into; empty when absent."""


REFERENCE = re.compile(rb'\{\s*"\$buffer"\s*:\s*(\d{1,6})\s*\}')
"""How JSON text refers to an attachment by its index."""


class Body(msgspec.Struct, frozen=True, gc=False):
    """A payload as it came: JSON text and attachments. Never looked into, never changed."""

    raw: Raw
    attachments: tuple[bytes | memoryview, ...] = ()

    def expanded_size(self) -> int:
        """Bytes of it all for a peer that takes no binary frames: base64 in the place of each reference.

        An attachment counts once, and once more for each further reference: few bytes can refer to many a thousand
        times.
        """
        sizes = [16 + 4 * ((len(attachment) + 2) // 3) for attachment in self.attachments]
        references = Counter(int(match[1]) for match in REFERENCE.finditer(self.raw))
        return len(self.raw) + sum(size * max(1, references[index]) for index, size in enumerate(sizes))


EMPTY = Body(b"")


class Options(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a caller asked beyond the method: times in seconds, None where the defaults count.

    `stream_in`: parts of the reply come to the caller one by one; `stream_out`: the caller sends parts. `progress` is
    the token as JSON text, empty where the id is the token, None where no progress is wanted. `key` makes repeats one
    request, `group` keeps requests together (sticky dispatch, newest wins).
    """

    timeout: float | None = None
    idle: float | None = None
    priority: int = 0
    idempotent: bool = False
    retries: int = 0
    key: str | None = None
    group: str | None = None
    stream_in: bool = False
    stream_out: bool = False
    progress: bytes | None = None
    trace: str | None = None
    wait: bool = False
    timing: bool = False
    meta: bool = False
    """whether the reply shall say how it came about (`ReplyMeta`)"""


DEFAULT_OPTIONS = Options()


class Timing(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """When what happened to a request, in milliseconds since it was accepted; None for what never did.

    `queued_ms` is how long it waited for a worker in all, `dispatched_ms` when the last worker was given it,
    `first_part_ms` when the first part came of its stream, in either direction, `ended_ms` when it ended.
    """

    queued_ms: float
    dispatched_ms: float | None
    first_part_ms: float | None
    ended_ms: float


class ReplyMeta(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How a reply came about, for who asked: the worker's peer name, attempts, milliseconds, the trace id.

    `repeated` says that an earlier request with the same key was the one that was executed.
    """

    worker: str | None = None
    attempts: int = 0
    elapsed_ms: float = 0.0
    retryable: bool = False
    trace: str | None = None
    timing: Timing | None = None
    repeated: bool = False


class Call(msgspec.Struct, frozen=True, gc=False):
    """To a worker: do this. `left_s` is what is left of the deadline, in seconds."""

    attempt: Attempt
    endpoint: str
    method: str
    body: Body
    left_s: float


class Notify(msgspec.Struct, frozen=True, gc=False):
    """To a worker: a call nobody waits for, from the session `by`."""

    endpoint: str
    method: str
    body: Body
    by: Session


class End(msgspec.Struct, frozen=True, gc=False):
    """To a caller: its request has ended. `body` is the result, or the worker's error as it came."""

    wire_id: WireId
    outcome: Outcome
    body: Body | None = None
    meta: ReplyMeta | None = None


class CancelAttempt(msgspec.Struct, frozen=True, gc=False):
    """To a worker: nobody waits for this attempt any more."""

    attempt_id: AttemptId


class Part(msgspec.Struct, frozen=True, gc=False):
    """One part of a stream. To a caller it goes by `wire_id`; to a worker by `attempt_id`, which is 0 otherwise.

    `seq` counts from 0 in each direction; `more` marks a piece of a value that goes on in the next part; `last` is the
    end of this direction.
    """

    wire_id: WireId | None
    attempt_id: AttemptId
    seq: int
    body: Body
    more: bool = False
    last: bool = False


class Credit(msgspec.Struct, frozen=True, gc=False):
    """How many parts may be sent in all: those whose `seq` is below `upto`. Addressed as a `Part` is."""

    wire_id: WireId | None
    attempt_id: AttemptId
    upto: int


class Progress(msgspec.Struct, frozen=True, gc=False):
    """To a caller: how far the worker is. `token` is JSON text, empty where the id is the token."""

    wire_id: WireId
    token: bytes
    body: Body


class SessionTold(msgspec.Struct, frozen=True, gc=False):
    """To a session with grace, first on each of its links: how to come back, and how much of it has arrived here.

    `received` counts the messages it has sent over all its links; `cut` is the number of the last message that a
    bound dropped before it was acknowledged, 0 for none; `grace_s` is in seconds.
    """

    session_id: str
    secret: str
    grace_s: float
    resumed: bool
    received: int
    cut: int


class Ack(msgspec.Struct, frozen=True, gc=False):
    """To a session with grace: so many of the messages it has sent over all its links have arrived."""

    n: int


class Broadcast(msgspec.Struct, frozen=True, gc=False):
    """To a listener. `seq` counts per endpoint and topic without gaps; None where nothing is counted."""

    endpoint: str | None
    topic: str | None
    seq: int | None
    body: Body


Message: TypeAlias = (
    Call | Notify | End | CancelAttempt | Part | Credit | Progress | SessionTold | Ack | Broadcast
)  # fmt: skip
