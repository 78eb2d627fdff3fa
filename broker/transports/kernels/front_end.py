"""A notebook front end as a peer: its kernel's messages in both dialects on one side, its session on the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from broker.core.errors import NORMAL, OK, REPLACED, WORKER_ERROR
from broker.core.events import Asked, CreditGranted, Detached, Malformed
from broker.core.ids import WireId
from broker.core.messages import Body, Broadcast, End, Message, Options, Part
from broker.core.sessions import Session
from broker.core.topics import PEERS_TOPIC
from broker.engine.engine import Engine
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.links.session import new_id, now
from broker.transports.kernels.away import Away
from broker.transports.kernels.pace import Pace
from broker.transports.kernels.waiting import Gap, Output, Waiting
from broker.wire.kernel import (
    Header,
    KernelMessage,
    KernelMessageError,
    Sign,
    read_header,
    read_json,
    read_legacy,
    read_v1,
    tell,
    write_legacy,
    write_v1,
)

if TYPE_CHECKING:
    from broker.config.model import Kernels

IOPUB = "iopub"
"""the topic of a kernel's endpoint on which its worker publishes what the kernel says to everybody"""
AHEAD_PARTS = 8
"""requests for input that may be on their way at once"""

HOLD_SHARE = 4
"""when this part of what may wait does, the kernel's worker is not read from, so that nothing has to be left out"""
LOOK_S = 0.1
"""how often it is looked whether the front end goes on reading meanwhile; one that does not holds up nobody longer"""
PATIENT_LOOKS = 5
"""how many looks in a row may find that one which has read until now did not: where much runs, it may not have run"""
READS_BYTES = 800 << 10
"""what it has to take within that: at 8 MB/s it keeps up with what a page can show"""

_ASKED = Options()
_ASKED_WITH_INPUT = Options(stream_in=True)


class Dialect(Protocol):
    """How messages stand in frames of a WebSocket."""

    name: str

    def read(self, payload: bytes, *, binary: bool) -> KernelMessage:
        """A message from a frame. Raises KernelMessageError."""
        ...

    def write(self, message: KernelMessage) -> bytes:
        """The payload of a frame."""
        ...

    def is_binary(self, payload: bytes) -> bool:
        """Whether such a payload goes in a binary frame."""
        ...


class V1Dialect:
    """`v1.kernel.websocket.jupyter.org`."""

    name = "jupyter v1"

    def read(self, payload: bytes, *, binary: bool) -> KernelMessage:
        """As in `Dialect`."""
        if not binary:
            raise KernelMessageError("with this subprotocol all messages are binary")
        return read_v1(payload)

    def write(self, message: KernelMessage) -> bytes:
        """As in `Dialect`."""
        return b"".join(write_v1(message))

    def is_binary(self, payload: bytes) -> bool:
        """As in `Dialect`."""
        return True


class LegacyDialect:
    """What is spoken without a subprotocol."""

    name = "jupyter"

    def read(self, payload: bytes, *, binary: bool) -> KernelMessage:
        """As in `Dialect`."""
        return read_legacy(payload if binary else payload.decode())

    def write(self, message: KernelMessage) -> bytes:
        """As in `Dialect`."""
        return b"".join(write_legacy(message)[0])

    def is_binary(self, payload: bytes) -> bool:
        """As in `Dialect`: JSON text begins with a brace, a count of parts with its highest byte, which is 0."""
        return not payload.startswith(b"{")


class Pending(msgspec.Struct, frozen=True):
    """A request of a front end that its kernel has: where its reply goes, and the header that this names."""

    channel: str
    header: bytes
    msg_type: str


class _Peers(msgspec.Struct):
    event: str = ""
    workers: int = 1


class FrontEnd:
    """Receives for its links, one after the other, and is what the core knows as the session's link, all the time.

    What it does not take at once waits for it, within a bound. While it reads, its kernel's worker is held back before
    that is reached; one that is stuck holds up nobody, and what finds no room is left out.

    Without a link it is away: what comes waits for it, within the bound, until it is back or `away_s` have passed. Its
    requests go on in any case, as in every notebook; it ends when it stays away and the last of them has ended.
    """

    __slots__ = (
        "_absent", "_away", "_counted", "_dialect", "_engine", "_gone", "_held_at", "_hold_again_at", "_link", "_links",
        "_looking", "_nudge", "_nudged", "_numbers", "_pace", "_patience", "_pending", "_sent", "_session", "_settings",
        "_waiting", "ended", "endpoint", "principal",
    )  # fmt: skip

    takes_binary = True

    def __init__(
        self, engine: Engine, links: LoopLinks, settings: Kernels, pace: Pace, absent: Away, principal: str,
        endpoint: str, ended: Callable[[FrontEnd], None],
    ) -> None:  # fmt: skip
        self.principal = principal
        self.endpoint = endpoint
        self.ended = ended
        """told when it has"""
        self._engine = engine
        self._links = links
        self._settings = settings
        self._pace = pace
        self._patience = PATIENT_LOOKS
        self._absent = absent
        self._session: Session | None = None
        self._link: Link | None = None
        self._dialect: Dialect = V1Dialect()
        self._waiting = Waiting(settings.waiting_max_bytes)
        self._counted = 0  # bytes of it that stand in the budget
        # Frames this machine's system has not taken yet; the frames, because these stand in the outbox anyway.
        self._sent: deque[tuple[int, bytes]] = deque()
        self._looking: asyncio.TimerHandle | None = None  # stands while the worker is held back
        self._held_at = 0  # how far the link had been flushed when that began, or when it was looked at last
        self._hold_again_at = 0  # how far the link has to be flushed before it may be again
        self._pending: dict[WireId, Pending] = {}
        self._numbers = 0
        self._nudged = False
        self._nudge: asyncio.TimerHandle | None = None
        self._away: asyncio.TimerHandle | None = None
        self._gone = False  # away for so long that nothing waits for it any more

    # ------------------------------------------------------------ coming and going

    @property
    def is_connected(self) -> bool:
        """Whether it has a link now."""
        return self._link is not None

    def start(self, session: Session) -> None:
        """It is a session now: hear the kernel, and see whether it answers."""
        self._session = session
        for topic in (IOPUB, PEERS_TOPIC):
            params = msgspec.json.encode({"endpoint": self.endpoint, "topic": topic})
            self._ask(b'"subscribe"', "broker.subscribe", Body(params), endpoint="")
            self._numbers += 1
        self._nudge = self._engine.loop.call_later(self._settings.nudge_s, self._let_through)
        # Over both: a busy kernel answers on control only, an old one on shell only.
        for channel in ("control", "shell"):
            message = tell(channel, "kernel_info_request", {}, _sign())
            self._ask(b'"nudge-%b"' % channel.encode(), channel, Body(message.json()))

    def connect(self, link: Link, dialect: Dialect) -> None:
        """It talks over this link from now on; one that it has is closed, as replaced."""
        old, self._link = self._link, link
        if old is not None:
            old.close(REPLACED.code, "a newer link of this session has taken over")
            self._take_back(old)
        self._dialect = dialect
        if self._away is not None:
            self._away.cancel()
            self._away = None
        self._gone = False
        self._absent.drop(self)
        link.start(_Receiver(self, link))
        if not self._nudged:
            link.pause_reading()
        self._flush()

    def lost(self, link: Link, code: int) -> None:
        """A link is no more."""
        if link is not self._link:
            return  # another has taken over
        self._link = None
        self._take_back(link)
        if self._session is None:
            return
        if code == NORMAL.code:
            self.give_up()
        else:
            self._away = self._engine.loop.call_later(self._settings.away_s, self.give_up)
            self._absent.keep(self, self._waiting.bytes)

    def _take_back(self, link: Link) -> None:
        """What was given to a link and never left this machine waits again."""
        flushed = link.flushed_at_last
        back = (self._dialect.read(f, binary=self._dialect.is_binary(f)) for mark, f in self._sent if mark > flushed)
        self._waiting.put_back(Output(each.channel, Body(each.json(), each.buffers)) for each in back)
        self._sent.clear()
        self._let_go()
        self._hold_again_at = 0
        self._count()

    def give_up(self) -> None:
        """It stays away: nothing waits for it any more."""
        if self._away is not None:
            self._away.cancel()
            self._away = None
        self._gone = True
        self._absent.drop(self)
        self._waiting.clear()
        self._count()
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._gone and not self._pending:
            self._leave(NORMAL.code, "")

    def _leave(self, code: int, reason: str) -> None:
        session, self._session = self._session, None
        for timer in (self._nudge, self._away):
            if timer is not None:
                timer.cancel()
        self._nudge = self._away = None
        self._absent.drop(self)
        self._waiting.clear()
        self._sent.clear()
        self._let_go()
        self._count()
        if session is not None:
            self.ended(self)
            self._engine.feed(Detached(session, code, reason, 0))

    # ------------------------------------------------------------ from the front end

    def message(self, payload: bytes, *, binary: bool) -> None:
        """One message of it, for one channel of its kernel."""
        try:
            message = self._dialect.read(payload, binary=binary)
            header = read_header(message.header)
            if len(message.header) > self._settings.header_max_bytes:  # kept until its request has ended
                most = self._settings.header_max_bytes
                raise KernelMessageError(f"a header of {len(message.header)} bytes is above the bound of {most}")
            if message.channel == "iopub":
                raise KernelMessageError("a front end says nothing on iopub")
        except KernelMessageError as error:
            if self._session is not None:
                self._engine.feed(Malformed(self._session, str(error), strike=True))
            return
        self._numbers += 1
        wire_id = b'"%d"' % self._numbers
        self._pending[wire_id] = Pending(message.channel, message.header, header.msg_type)
        takes_input = message.channel == "shell" and header.msg_type == "execute_request"
        self._ask(wire_id, message.channel, _params(message), _ASKED_WITH_INPUT if takes_input else _ASKED)

    def _ask(
        self, wire_id: bytes, method: str, body: Body, options: Options = _ASKED, endpoint: str | None = None
    ) -> None:
        if self._session is not None:
            name = self.endpoint if endpoint is None else endpoint
            self._engine.feed(Asked(self._session, wire_id, name, method, body, options))

    def _let_through(self) -> None:
        """The kernel answers, or is not waited for any longer."""
        if self._nudge is not None:
            self._nudge.cancel()
            self._nudge = None
        if not self._nudged:
            self._nudged = True
            if self._link is not None:
                self._link.resume_reading()

    # ------------------------------------------------------------ from the router, by the engine

    def deliver(self, message: Message) -> None:
        """A reply, or what the kernel wants to know meanwhile."""
        if type(message) is End:
            self._end(message)
        elif type(message) is Part and message.wire_id is not None and self._session is not None:
            self._engine.feed(CreditGranted(self._session, message.wire_id, 0, message.seq + 1 + AHEAD_PARTS))
            self._put(Output("stdin", message.body))

    def _end(self, end: End) -> None:
        pending = self._pending.pop(end.wire_id, None)
        if pending is None:
            if end.wire_id != b'"subscribe"':
                self._let_through()
            return
        if end.outcome.kind is not OK:
            self._tell_failure(pending, end)
        elif end.body is not None and bytes(end.body.raw) != b"null" and pending.channel != "stdin":
            self._put(Output(pending.channel, end.body))
        self._leave_if_done()

    def _tell_failure(self, pending: Pending, end: End) -> None:
        """No reply has come. Who waits for one, and for the kernel's word that it is idle, is told why."""
        name, text = _why(end)
        if pending.msg_type == "execute_request":
            shown = [f"{name}: {text}"]
            self._tell(IOPUB, "error", {"ename": name, "evalue": text, "traceback": shown}, pending.header)
        if pending.msg_type.endswith("_request"):
            content = {"status": "error", "ename": name, "evalue": text, "traceback": []}
            kind = pending.msg_type.removesuffix("_request") + "_reply"
            self._tell(pending.channel, kind, content, pending.header)
        if pending.channel != "stdin":
            self._tell(IOPUB, "status", {"execution_state": "idle"}, pending.header)

    def _tell(self, channel: str, msg_type: str, content: dict[str, Any], parent_header: bytes = b"{}") -> None:
        self._put(Output(channel, Body(tell(channel, msg_type, content, _sign(), parent_header).json())))

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """What the kernel says to everybody; False if it was left out."""
        if type(message) is not Broadcast or self._gone:
            return True
        if message.topic == PEERS_TOPIC:
            self._hear_of_peers(message.body)
            return True
        output = Output(IOPUB, message.body)
        link = self._link
        if link is None or self._waiting or link.is_crowded():
            return self._wait(output)
        kind = self._dialect.name
        frame = frames.get(kind)
        if frame is None:
            frame = frames[kind] = self._written(output)
        if not frame:
            return False
        self._send(link, frame)
        return True

    def _hear_of_peers(self, body: Body) -> None:
        told = msgspec.json.decode(body.raw, type=_Peers)
        if told.event == "unserved" and not told.workers:
            self._tell(IOPUB, "status", {"execution_state": "dead"})

    def close(self, code: int, reason: str) -> None:
        """Say why and end: its credential has ended, an administrator wants it, the broker leaves."""
        if self._link is not None:
            self._link.close(code, reason)
        self._engine.loop.call_soon(self._leave, code, reason)

    def pause_reading(self) -> None:
        """Read no more until `resume_reading`."""
        if self._link is not None:
            self._link.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if self._link is not None and self._nudged:
            self._link.resume_reading()

    # ------------------------------------------------------------ to the front end

    def _put(self, output: Output) -> None:
        """Send it, or let it wait behind what waits."""
        link = self._link
        if self._gone:
            return
        if link is None or self._waiting or link.is_crowded():
            self._wait(output)
        elif frame := self._written(output):
            self._send(link, frame)

    def _wait(self, output: Output) -> bool:
        try:
            kept = self._waiting.put(output)
        except (ValueError, RecursionError):  # a worker that publishes what is no message
            return False
        self._count()
        if self._link is not None:
            self._hold(self._link)
        elif self._away is not None:
            self._absent.keep(self, self._waiting.bytes)
        return kept

    def _hold(self, link: Link) -> None:
        """More waits than should: read nothing from the kernel's worker while the front end catches up."""
        too_much = self._waiting.bytes > self._waiting.max_bytes // HOLD_SHARE
        if too_much and self._looking is None and self._hold_again_at <= link.flushed:
            self._held_at = link.flushed
            self._pace.hold(self.endpoint)
            self._looking = self._engine.loop.call_later(LOOK_S, self._look, link)

    def _look(self, link: Link) -> None:
        """Go on holding the worker back only if the front end has read enough for that."""
        if link.flushed - self._held_at < READS_BYTES:
            self._patience -= 1
        else:
            self._held_at = link.flushed
            self._patience = PATIENT_LOOKS
        if self._patience <= 0:
            self._let_go()
            self._hold_again_at = link.flushed + READS_BYTES
            self._patience = 1
        else:
            self._looking = self._engine.loop.call_later(LOOK_S, self._look, link)

    def _let_go(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
            self._held_at = -1
            self._pace.let_go(self.endpoint)

    def _written(self, output: Output) -> bytes:
        """Its frame's payload; empty for what is no message: a worker's fault, which no front end would understand."""
        try:
            message = read_json(bytes(output.body.raw), output.channel, output.body.attachments)
        except KernelMessageError:
            return b""
        return self._dialect.write(message)

    def _send(self, link: Link, frame: bytes) -> None:
        link.send(frame, self._dialect.is_binary(frame))
        sent = self._sent
        while sent and sent[0][0] <= link.flushed:
            sent.popleft()
        sent.append((link.enqueued, frame))

    def room(self, link: Link) -> None:
        """A link takes more again."""
        if link is self._link:
            self._flush()

    def _flush(self) -> None:
        """Send what waits, as far as the link takes it."""
        link = self._link
        while self._waiting and link is not None and not link.is_crowded():
            item = self._waiting.pop()
            output = self._notice(item) if isinstance(item, Gap) else item
            if frame := self._written(output):
                self._send(link, frame)
        if self._waiting.bytes <= self._waiting.max_bytes // (2 * HOLD_SHARE):
            self._let_go()
        self._count()

    @staticmethod
    def _notice(gap: Gap) -> Output:
        text = f"\n[{gap.count} messages of the kernel, {gap.bytes} bytes, were left out: they came faster than this "
        text += "page reads, or while it was away]\n"
        content = {"name": "stderr", "text": text}
        return Output(IOPUB, Body(tell(IOPUB, "stream", content, _sign(), gap.parent_header).json()))

    def _count(self) -> None:
        if self._waiting.bytes != self._counted:
            self._links.count(self._waiting.bytes - self._counted)
            self._counted = self._waiting.bytes

    @property
    def left_out(self) -> int:
        """Messages that found no room."""
        return self._waiting.left_out


class _Receiver:
    """Hears one link for its front end."""

    __slots__ = ("_front_end", "_link")

    def __init__(self, front_end: FrontEnd, link: Link) -> None:
        self._front_end = front_end
        self._link = link

    def message(self, payload: bytes, binary: bool) -> None:
        """One whole message."""
        self._front_end.message(payload, binary=binary)

    def congested(self, congested: bool) -> None:
        """The outbox rose above its soft bound, or fell again."""
        if not congested:
            self._front_end.room(self._link)

    def closed(self, code: int, reason: str) -> None:
        """The link is no more."""
        self._front_end.lost(self._link, code)


def _sign() -> Sign:
    number = new_id()
    return Sign(number, number, now())


def _params(message: KernelMessage) -> Body:
    """A message as the kernel's worker takes it."""
    text = message.json()
    if message.buffers:
        references = b",".join(b'{"$buffer":%d}' % index for index in range(len(message.buffers)))
        text = b'%b,"buffers":[%b]}' % (text[:-1], references)
    return Body(text, message.buffers)


class _WorkersError(msgspec.Struct):
    type: str = ""
    message: str = ""


class _Error(msgspec.Struct):
    message: str = ""
    data: msgspec.Raw = msgspec.Raw(b"{}")


def _why(end: End) -> tuple[str, str]:
    """A name and a text for how a request ended."""
    outcome = end.outcome
    if outcome.kind is WORKER_ERROR and end.body is not None:
        try:
            error = msgspec.json.decode(end.body.raw, type=_Error)
            own = msgspec.json.decode(error.data, type=_WorkersError)
        except (ValueError, RecursionError):
            pass
        else:
            return own.type or outcome.kind.name, own.message or error.message
    return outcome.kind.name, f"{outcome.kind.text}. {outcome.detail or outcome.kind.advice}"


__all__ = ["Dialect", "FrontEnd", "Header", "LegacyDialect", "V1Dialect"]
