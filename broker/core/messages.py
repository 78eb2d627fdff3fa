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

    Streams, progress, priority, retries and keys have their place here; until the broker acts on one, the codecs
    refuse it by name.
    """

    timeout: float | None = None
    idle: float | None = None
    priority: int = 0
    idempotent: bool = False
    retries: int = 0
    key: str | None = None
    stream_in: bool = False
    stream_out: bool = False
    progress: bool = False
    trace: str | None = None
    wait: bool = False
    timing: bool = False
    meta: bool = False
    """whether the reply shall say how it came about (`ReplyMeta`)"""


DEFAULT_OPTIONS = Options()


class ReplyMeta(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How a reply came about, for who asked: the worker's peer name, attempts, milliseconds, the trace id."""

    worker: str | None = None
    attempts: int = 0
    elapsed_ms: float = 0.0
    retryable: bool = False
    trace: str | None = None


class Call(msgspec.Struct, frozen=True, gc=False):
    """To a worker: do this. `left_s` is what is left of the deadline, in seconds."""

    attempt: Attempt
    endpoint: str
    method: str
    body: Body
    left_s: float


class Notify(msgspec.Struct, frozen=True, gc=False):
    """To a worker: a call nobody waits for."""

    endpoint: str
    method: str
    body: Body


class End(msgspec.Struct, frozen=True, gc=False):
    """To a caller: its request has ended. `body` is the result, or the worker's error as it came."""

    wire_id: WireId
    outcome: Outcome
    body: Body | None = None
    meta: ReplyMeta | None = None


class CancelAttempt(msgspec.Struct, frozen=True, gc=False):
    """To a worker: nobody waits for this attempt any more."""

    attempt_id: AttemptId


class Broadcast(msgspec.Struct, frozen=True, gc=False):
    """To a listener. `seq` counts per endpoint and topic without gaps; None where nothing is counted."""

    endpoint: str | None
    topic: str | None
    seq: int | None
    body: Body


Message: TypeAlias = Call | Notify | End | CancelAttempt | Broadcast
