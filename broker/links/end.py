"""What each end of a link has, whatever it goes over: where it stands, its outbox in bytes, who takes what it gets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from broker.links.limits import LinkLimits
from broker.wire.frames import BROKEN

if TYPE_CHECKING:
    from broker.core.messages import Message
    from broker.links.loop import LoopLinks
    from broker.wire.multipart_plain import PlainReader
    from broker.wire.native import Reader

log = logging.getLogger(__name__)

OPEN, CLOSING, GONE = 0, 1, 2

SLOW_CONSUMER = 4408
INTERNAL_ERROR = 1011


class Receiver(Protocol):
    """Who takes what a link receives. Called on the link's event loop, never inside a call to the link's
    own `send`, `close` or `abort`.
    """

    def message(self, payload: bytes, binary: bool) -> None:
        """One whole message; text (``binary`` False) is valid UTF-8."""

    def congested(self, congested: bool) -> None:
        """The outbox is above its soft bound (True), or below half of it again (False)."""

    def closed(self, code: int, reason: str) -> None:
        """No message will come any more; exactly once, the last call. 1006: the connection broke."""


class PlainWriting(Protocol):
    """Who writes the common messages of a link without the text in between."""

    def write(self, message: Message, n: int = 0) -> bool:
        """Send a plain call or result, numbered if `n` is not 0; False if that is left to the caller."""
        ...


class Nobody:
    """Takes nothing: stands in until `Link.start` and after the end, and for links that are turned away."""

    def message(self, payload: bytes, binary: bool) -> None:
        """Drop it."""

    def congested(self, congested: bool) -> None:
        """Do nothing."""

    def closed(self, code: int, reason: str) -> None:
        """Do nothing."""


NOBODY = Nobody()


class LinkEnd:
    """One end of a link. `enqueued` counts the bytes it has been given, `flushed` those it has passed on."""

    __slots__ = (
        "_code", "_congested", "_counted", "_limits", "_links", "_loop", "_reason", "_receiver", "_reported",
        "_started", "_state", "broadcasts_dropped", "dirty", "enqueued", "flushed", "paused", "reader", "remote",
        "subprotocol",
    )  # fmt: skip

    def __init__(self, links: LoopLinks, limits: LinkLimits, remote: str) -> None:
        self._links = links
        self._loop = links.loop
        self._limits = limits
        self._receiver: Receiver = NOBODY
        self._started = self._congested = self._reported = False
        self._counted = 0  # bytes of the outbox that stand in the budget
        self._state = OPEN
        self._code, self._reason = BROKEN, ""
        self.dirty = False
        self.paused = False
        self.enqueued = 0
        self.flushed = 0
        self.broadcasts_dropped = 0
        self.remote = remote
        self.subprotocol: str | None = None
        self.reader: Reader | None = None  # what reads in C for it, if anything does

    def __repr__(self) -> str:
        state = ("open", "closing", "gone")[self._state]
        return f"<{type(self).__name__} {self.remote} {state} outbox={self.outbox_bytes}>"

    @property
    def is_open(self) -> bool:
        """Whether what is sent now still has a chance to arrive."""
        return self._state == OPEN

    @property
    def outbox_bytes(self) -> int:
        """Bytes accepted and not yet taken by the kernel, or by the other end."""
        return self.enqueued - self.flushed

    @property
    def flushed_at_last(self) -> int:
        """How far `flushed` can still come: a closing one passes on what is queued, one that is gone nothing."""
        return self.flushed if self._state == GONE else self.enqueued

    def is_crowded(self) -> bool:
        """Whether it is closing, or its outbox above the soft bound; then the receiver is told when it is not."""
        if self.enqueued - self.flushed > self._limits.outbox_soft_bytes:
            self._congested = True
        return self._congested or self._state != OPEN

    @property
    def decoder(self) -> Reader | PlainReader | None:
        """What makes events of its common messages, if anything does; its receiver then has `decoded(events)` too."""
        return self.reader

    def new_writer(self, prefix: bytes, endpoint: str, meta: bool) -> PlainWriting | None:
        """What writes plain messages to a peer attached to `endpoint`; None where nothing is read plainly either.

        `prefix` is how the envelope of a call begins, `meta` says whether calls tell what is left of their time.
        """
        return None

    def close(self, code: int, reason: str = "") -> None:
        """Pass on what is queued, say why, and end."""
        raise NotImplementedError

    def _watch_bounds(self, waiting: int) -> None:
        """Count the bytes that wait in the outbox now, and tell the receiver where they pass a bound."""
        if waiting != self._counted:  # with a peer that reads, both are 0 at the end of nearly every turn
            self._links.count(waiting - self._counted)
            self._counted = waiting
        soft = self._limits.outbox_soft_bytes
        if waiting <= soft // 2:
            if self._congested:
                self._congested = False
                self._tell_congested(False)
        elif waiting > soft and not self._congested:
            self._congested = True
            self._tell_congested(True)

    def _tell_congested(self, congested: bool) -> None:
        if self._state == OPEN:
            try:
                self._receiver.congested(congested)
            except Exception:
                self._receiver_failed()

    def _receiver_failed(self) -> None:
        log.exception("receiver of %s failed", self.remote)
        self._links.counters.receiver_errors += 1
        self.close(INTERNAL_ERROR, "internal error")

    def _report(self) -> None:
        if self._reported:
            return
        self._reported = True
        receiver, self._receiver = self._receiver, NOBODY
        try:
            receiver.closed(self._code, self._reason)
        except Exception:
            log.exception("receiver of %s failed", self.remote)
            self._links.counters.receiver_errors += 1
