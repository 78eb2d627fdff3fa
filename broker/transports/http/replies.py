"""The parts of a reply on their way to an HTTP caller: one write at a time, credit as the socket takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tornado.iostream import StreamClosedError

from broker.core.events import CreditGranted
from broker.core.messages import Body, End, Part
from broker.core.streams import FIRST_CREDIT
from broker.wire.callparts import Form, Written

if TYPE_CHECKING:
    from broker.transports.http.calls import CallHandler

WINDOW = 8
"""parts that may be on their way to a caller, or wait here for the socket to take them"""
WRITE_BYTES = 256 << 10
"""at once to the socket, so that a caller that takes anything at all is seen to do so"""
PROGRESS_BEHIND_BYTES = 64 << 10
"""while so much waits for the socket, progress is dropped"""


class ReplyStream:
    """Writes parts in a form, and grants more when the socket has taken them. It begins with the first.

    At most WINDOW parts wait here, and what a form holds of a value in pieces. They count in the budget.
    """

    __slots__ = (
        "_counted", "_ending", "_form", "_handler", "_parts_taken", "_queue", "_queued_bytes", "_scheduled", "_stall",
        "_stopped", "_upto", "begun",
    )  # fmt: skip

    def __init__(self, handler: CallHandler, form: Form) -> None:
        self._handler = handler
        self._form = form
        self._queue: deque[tuple[Written, int]] = deque()
        self._queued_bytes = 0
        self._counted = 0
        self._parts_taken = 0
        self._upto = FIRST_CREDIT
        self._scheduled = False
        self._ending: Callable[[], None] | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._stopped = False
        self.begun = False
        """whether anything is to be written, so that the status is 200"""

    def part(self, part: Part) -> None:
        """One part came. Raises Unfit if it cannot be written in this form."""
        self._put(self._form.part(part.body, more=part.more, last=part.last), 1)

    def progress(self, body: Body) -> None:
        """Tell how far the worker is, unless the caller is behind. Raises Unfit."""
        if self._queued_bytes < PROGRESS_BEHIND_BYTES and (text := self._form.progress(body)):
            self._put((text,), 0)

    def end(self, end: End, ending: Callable[[], None]) -> None:
        """Write the end; call `ending` when everything has been taken. Raises Unfit."""
        last = self._form.end(end)
        self._ending = ending
        self._put(last, 0)
        self._watch()

    def stop(self) -> None:
        """Write nothing any more."""
        self._stopped = True
        self._queue.clear()
        self._queued_bytes = 0
        self._unwatch()
        self._count(0)

    # ------------------------------------------------------------ writing

    def _put(self, written: Written, parts: int) -> None:
        """Gather; what comes within one turn of the loop is one write."""
        self._queue.append((written, parts))
        self._queued_bytes += sum(map(len, written))
        self._count(self._queued_bytes + self._form.held_bytes)
        if written and not self.begun:
            self.begun = True
            self._handler.set_header("Content-Type", self._form.content_type)
            self._handler.set_header("X-Accel-Buffering", "no")
        if not self._scheduled:
            self._scheduled = True
            self._handler.engine.loop.call_soon(self._write)

    def _write(self) -> None:
        """Write what has gathered, and go on when the socket has taken it."""
        while self._queue and not self._stopped:
            size = parts = 0
            chunk: list[bytes | memoryview] = []
            while self._queue and size < WRITE_BYTES:
                written, count = self._queue.popleft()
                chunk += written
                size += sum(map(len, written))
                parts += count
            if not size:  # pieces that are gathered, not written
                self._taken(0, parts)
                continue
            self._handler.write(b"".join(chunk))
            flushed = self._handler.flush()
            if not flushed.done():
                flushed.add_done_callback(lambda done, size=size, parts=parts: self._flushed(done, size, parts))  # type: ignore[misc]
                return
            if flushed.exception() is not None:
                break
            self._taken(size, parts)
        self._scheduled = False
        if self._ending is not None and not self._stopped:
            ending = self._ending
            self.stop()
            ending()

    def _flushed(self, done: asyncio.Future[None], size: int, parts: int) -> None:
        if isinstance(done.exception(), StreamClosedError) or self._stopped:
            return  # the handler hears of it from tornado
        if self._stall is not None:
            self._watch()
        self._taken(size, parts)
        self._write()

    def _taken(self, size: int, parts: int) -> None:
        """The socket has taken this: as much more may come."""
        self._queued_bytes -= size
        self._count(self._queued_bytes + self._form.held_bytes)
        self._parts_taken += parts
        session = self._handler.session
        if parts and session is not None and self._upto - self._parts_taken <= WINDOW // 2:
            self._upto = self._parts_taken + WINDOW
            self._handler.engine.feed(CreditGranted(session, self._handler.wire_id, 0, self._upto))

    def _count(self, size: int) -> None:
        budget = self._handler.engine.router.state.budget
        budget.used += size - self._counted
        budget.outboxes += size - self._counted
        self._counted = size

    # ------------------------------------------------------------ a caller that takes nothing of the end

    def _watch(self) -> None:
        self._unwatch()
        stall_s = self._handler.limits().stall_s
        self._stall = self._handler.engine.loop.call_later(stall_s, self._handler.cut)

    def _unwatch(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
