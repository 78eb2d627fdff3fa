"""An rt-cloud daemon: its link on one side, its session in the router on the other, the codec between."""

from __future__ import annotations

import asyncio

from broker.core.events import (
    Answered,
    BadReply,
    ClassAnswered,
    Congested,
    Detached,
    Malformed,
    Overrun,
    PartSent,
    Stray,
)
from broker.core.kept import NEVER_WRITTEN
from broker.core.messages import Call, CancelAttempt, Credit, Message, Notify
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links.held import HeldCalls
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.wire.rtcloud import INVALID_PARAMS, NoReply, Result, RtCloud, Unfit, error_reply

SLICES_PER_TURN = 4
"""slices of work on results, some 256 KiB each, before the loop has its turn: 5 ms with MD5, CRC-32 and unpacking"""
INLINE_BYTES = 256 << 10
"""results up to this size are begun at once, which is the end of them unless they were packed"""
HELD_SOFT_BYTES = 16 << 20
"""parts held for one daemon above which nothing more is read from it, as far as that does no harm"""
HELD_MAX_BYTES = 64 << 20
"""parts held for one daemon above which the call that holds most ends"""
READ_ON_S = 4.75
"""so long after a daemon's last ping its socket may stay unread: the next ping comes after 5 s, and wants its pong
within 1 s"""


class RtCloudPeer:
    """Receives for its link, and is what the core knows as the session's link.

    A daemon sends what it was asked for, at once and all of it. What callers do not take yet is held here, up to a
    bound. While every call it has in hand waits for its caller, nothing is read, until just before its next ping; with
    any other call in hand reading goes on, so that nobody waits for a stranger's slow reader.
    """

    __slots__ = (
        "_codec", "_counted", "_engine", "_held", "_link", "_links", "_pausing", "_read_on", "_scheduled", "_session",
        "_started_at",
    )  # fmt: skip

    def __init__(self, engine: Engine, links: LoopLinks, link: Link, codec: RtCloud) -> None:
        self._engine = engine
        self._links = links
        self._link = link
        self._codec = codec
        self._session: Session | None = None
        self._held = HeldCalls()
        self._counted = 0  # bytes of results that stand in the budget
        self._scheduled = self._pausing = False
        self._read_on: asyncio.TimerHandle | None = None
        self._started_at = 0.0

    def start(self, session: Session) -> None:
        """Begin to listen to the link, on behalf of this session."""
        self._session = self._codec.session = session
        self._started_at = self._engine.loop.time()
        self._link.start(self)
        if self._held:
            self._engine.feed(Congested(session, True))

    # ------------------------------------------------------------ from the link

    def message(self, payload: bytes, binary: bool) -> None:
        """One whole message: an answer, or a part of one. Nothing is ever said in return."""
        if self._session is None:
            return
        if binary:
            self._engine.feed(Malformed(self._session, "rt-cloud's dialect has no binary messages", strike=True))
            return
        try:
            decoded = self._codec.decode(payload)
        except NoReply as error:
            self._engine.feed(Malformed(self._session, str(error), error.strike))
            return
        if isinstance(decoded, Result):
            if decoded.held_bytes <= INLINE_BYTES:
                self._finish_at_once(decoded)
            self._go_on()
        elif decoded is not None:
            self._answer(decoded)
            self._go_on()

    def _finish_at_once(self, result: Result) -> None:
        """As far as a turn's work goes: what is small may have been packed, and be large."""
        for _ in range(SLICES_PER_TURN):
            if not result.is_ready or self._codec.results.get(result.attempt) is not result:
                break
            self._step(result)

    def congested(self, congested: bool) -> None:
        """The outbox rose above its soft bound, or fell again."""
        if not congested:
            self._release()
        if self._session is not None and congested == self._link.is_crowded():
            self._engine.feed(Congested(self._session, congested))

    def closed(self, code: int, reason: str) -> None:
        """The link is no more."""
        self._leave(code, reason, self._link.flushed_at_last)

    def _leave(self, code: int, reason: str, flushed: int) -> None:
        session, self._session = self._session, None
        self._held.drop_all()
        self._codec.close()
        self._count()
        self._stop_timer()
        if session is not None:
            self._engine.feed(Detached(session, code, reason, flushed, self))

    # ------------------------------------------------------------ results

    def _go_on(self) -> None:
        """Something has changed: count what is held, work if there is work, read or do not."""
        self._count()
        if self._counted > HELD_MAX_BYTES:
            self._shed()
        working = any(result.is_ready for result in self._codec.results.values())
        if working and not self._scheduled:
            self._scheduled = True
            self._engine.loop.call_soon(self._work)
        self._pace(working)

    def _work(self) -> None:
        """One turn's slices, of each result in its turn."""
        self._scheduled = False
        results = self._codec.results
        for _ in range(SLICES_PER_TURN):
            attempt = next((each for each, result in results.items() if result.is_ready), None)
            if attempt is None:
                break
            result = results[attempt] = results.pop(attempt)
            self._step(result)
        if self._session is not None:
            self._go_on()

    def _step(self, result: Result) -> None:
        event = result.step()
        if event is None:
            return
        if not isinstance(event, PartSent):
            self._codec.forget(event.attempt)
        self._answer(event)

    def _answer(self, event: Answered | BadReply | PartSent | Stray) -> None:
        """Pass it on; the end of a call says besides whether the daemon has the class, as far as anything does."""
        if isinstance(event, Answered):
            self._engine.feed(ClassAnswered(event.session, event.attempt, event.error is None))
        self._engine.feed(event)

    def _count(self) -> None:
        held = self._codec.held_bytes
        if held != self._counted:
            self._links.count(held - self._counted)
            self._counted = held

    def _shed(self) -> None:
        """More is held than may be: the call that holds most ends, one whose caller does not read before others."""
        assert self._session is not None
        results = self._codec.results
        waiting = [attempt for attempt, result in results.items() if result.waits_for_caller]
        attempt = max(waiting or results, key=lambda each: results[each].held_bytes)
        held = f"{results[attempt].held_bytes} bytes of the answer are held"
        if waiting:
            detail = f"{held} for a caller that takes no more, and an rt-cloud daemon cannot be told to wait"
            self._codec.give_up(attempt)
            self._engine.feed(Overrun(self._session, attempt, detail))
        elif not results[attempt].is_ready:
            self._engine.feed(self._codec.broken(attempt, f"{held} for parts that should have come before them"))
        self._count()

    # ------------------------------------------------------------ reading

    def _pace(self, working: bool) -> None:
        """Read, or do not: not while there is work on what came, and not if all that comes would only be held."""
        loop = self._engine.loop
        if self._counted <= HELD_SOFT_BYTES:
            self._set_pausing(False)
        elif working:
            self._set_pausing(True)  # until `_work` has done it
        else:
            results = self._codec.results.values()
            stuck = self._codec.open_count == sum(result.waits_for_caller for result in results)
            read_on_at = max(self._link.pinged_at, self._started_at) + READ_ON_S
            pausing = stuck and loop.time() < read_on_at
            self._set_pausing(pausing)
            if pausing and self._read_on is None:
                self._read_on = loop.call_at(read_on_at, self._read)

    def _set_pausing(self, pausing: bool) -> None:
        if not pausing:
            self._stop_timer()
        if pausing != self._pausing:
            self._pausing = pausing
            if pausing:
                self._link.pause_reading()
            else:
                self._link.resume_reading()

    def _read(self) -> None:
        self._read_on = None
        self._set_pausing(False)

    def _stop_timer(self) -> None:
        if self._read_on is not None:
            self._read_on.cancel()
            self._read_on = None

    # ------------------------------------------------------------ from the router, by the engine

    @property
    def takes_binary(self) -> bool:
        """Bytes go as base64."""
        return False

    def deliver(self, message: Message) -> None:
        """Write one message, if the dialect has words for it."""
        if type(message) is Call:
            if self._held or self._link.is_crowded():
                self._hold(message)
            else:
                self._ask(message)
        elif type(message) is Credit:
            self._codec.grant(message)
            if not self._scheduled:
                self._go_on()
        elif type(message) is CancelAttempt:
            if not self._held.drop(message.attempt_id):
                self._codec.give_up(message.attempt_id)
                self._go_on()
        elif type(message) is Notify:
            self._tell(message)

    def _ask(self, call: Call) -> None:
        try:
            pieces = self._codec.encode(call)
        except Unfit as unfit:
            call.attempt.mark = NEVER_WRITTEN
            why = f"the daemon was not asked: {unfit}"
            self._engine.feed(error_reply(call.attempt.session, call.attempt.id, INVALID_PARAMS, why))
            return
        self._link.send_parts(pieces)
        call.attempt.mark = self._link.enqueued
        if self._pausing:
            self._go_on()  # somebody waits who may not be kept waiting

    def _tell(self, notify: Notify) -> None:
        """A call nobody waits for is a call whose answer is dropped."""
        try:
            pieces = self._codec.encode_notify(notify)
        except Unfit:
            pieces = []
        if pieces and not self._link.is_crowded():
            self._link.send_parts(pieces)
        else:
            self._engine.router.counters.notifications_dropped += 1

    def _hold(self, call: Call) -> None:
        self._held.hold(call)
        if self._session is not None and not self._session.congested:
            self._engine.feed(Congested(self._session, True))

    def _release(self) -> None:
        """Write calls that were held, as many as there is room for. What has expired meanwhile ends in its turn."""
        now = self._engine.now()
        while not self._link.is_crowded() and (taken := self._held.take(now)) is not None:
            self._ask(taken[0])

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Daemons hear no broadcasts."""
        return False

    def close(self, code: int, reason: str) -> None:
        """Write what is queued, say why, and end. The session ends now: nothing more would reach the daemon."""
        self._link.close(code, reason)
        self._engine.loop.call_soon(self._leave, code, reason, self._link.enqueued)

    def pause_reading(self) -> None:
        """Nothing: who owes answers is read as `_pace` says."""

    def resume_reading(self) -> None:
        """Nothing, for the same reason."""
