"""One request to a kernel: what it is answered, what it says meanwhile, and when all of that has come."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from broker.links.kernel_channel import Header, Received
from broker.worker.faults import Fault
from broker.worker.kernel.outputs import Form, Outputs, as_part

if TYPE_CHECKING:
    from broker.wire.kernel import KernelMessage

TRAILS_S = 10.0
"""how long after a reply the kernel's word that it is idle is waited for, and the other way round: they come over
different sockets, and one of them may have been lost or never be sent"""


class Asking:
    """A request that has been sent to a kernel. It has ended once `replied` has, and `outputs` with it.

    `is_followed`: its caller gets the kernel's messages about it, of the kinds in `shows` or all, so that it ends with
    the last of them. Requests for input it gets in any case.
    """

    __slots__ = (
        "_idle", "_reply", "_timer", "channel", "header", "is_cancelled", "is_followed", "message", "msg_id",
        "msg_type", "outputs", "replied", "shows", "size",
    )  # fmt: skip

    def __init__(
        self, message: KernelMessage, header: Header, *, is_followed: bool = False, form: Form = as_part,
        shows: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        self.message: KernelMessage | None = message
        """what is to be sent; None once it is"""
        self.header = message.header
        self.channel = message.channel
        self.size = sum(map(len, (message.header, message.parent_header, message.metadata, message.content)))
        self.size += sum(map(len, message.buffers))
        self.msg_id = header.msg_id
        self.msg_type = header.msg_type
        self.is_followed = is_followed
        self.shows = shows
        self.outputs = Outputs(form)
        self.replied: asyncio.Future[Received | None] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False
        self._reply: Received | None = None
        self._idle = False
        self._timer: asyncio.TimerHandle | None = None

    def reply(self, received: Received) -> None:
        """The kernel's reply. Who follows a message gets it as an item too, as soon as it is there.

        Often it is there before the last word on IOPub, which the request ends with, and it is what most wait for.
        """
        self._reply = received
        if self.is_followed and not self.is_cancelled and self.shows is None:
            self.outputs.put(received)
        if self._idle or not self.is_followed:
            self._end()
        else:
            self._end_in(TRAILS_S)

    def idle(self) -> None:
        """The kernel has said everything about it, but perhaps its reply."""
        self._idle = True
        if self._reply is not None or not self.msg_type.endswith("_request"):
            self._end()
        else:
            self._end_in(TRAILS_S)

    def lost_iopub(self) -> None:
        """What the kernel said last may be lost: if it has replied, nothing more is waited for."""
        if self._reply is not None:
            self._end()

    def show(self, received: Received, number: int) -> None:
        """A message of the kernel about it, for its caller."""
        if (
            self.is_followed
            and not self.is_cancelled
            and (self.shows is None or received.header.msg_type in self.shows)
        ):
            self.outputs.put(received, number)

    def ask_input(self, received: Received) -> None:
        """The kernel wants input of its caller, also of one that gets nothing else."""
        self.outputs.put(received)

    def fail(self, error: Fault) -> None:
        """It ends without an answer."""
        if not self.replied.done():
            self.replied.set_exception(error)
            self.replied.exception()  # its caller may have gone
        self._end()

    @property
    def has_run(self) -> bool:
        """Whether the kernel has replied: what it runs now is another's."""
        return self._reply is not None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more can come."""
        return self.replied.done()

    def _end_in(self, delay_s: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._trailed)

    def _trailed(self) -> None:
        if self._reply is None and not self.replied.done():
            text = f"the kernel was done with {self.msg_type[:64]} and sent no reply within {TRAILS_S:g} s"
            self.fail(Fault(text, data={"type": "NoReply", "message": text}))
        self._end()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.replied.done():
            self.replied.set_result(self._reply)
        self.outputs.end()
