"""Asking a kernel's worker on behalf of an HTTP request: a session for as long as that lasts."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import msgspec

from broker.auth.admission import Admission
from broker.auth.facts import Refused
from broker.core.access import Principal, Role
from broker.core.errors import OK
from broker.core.events import Asked, Attached, Detached
from broker.core.ids import WireId
from broker.core.messages import Body, End, Message, Options
from broker.core.sessions import Session


class Failed(Exception):
    """A request that ended otherwise than well; `end` says how."""

    def __init__(self, end: End) -> None:
        super().__init__(end.outcome.kind.text)
        self.end = end

    def refused(self) -> Refused:
        """As an HTTP request is told of it."""
        outcome = self.end.outcome
        text = outcome.detail or outcome.kind.text
        if self.end.body is not None:
            text = f"{text}: {bytes(self.end.body.raw).decode('utf-8', 'replace')[:1000]}"
        return Refused(outcome.kind.http, text)


class Asker:
    """What the core knows as the link of such a session. `with Asker(door, principal) as asker: await asker.ask(…)`."""

    takes_binary = False

    def __init__(self, door: Admission, principal: Principal) -> None:
        self._door = door
        self._engine = door.engine
        self._principal = principal
        self._session: Session | None = None
        self._futures: dict[WireId, asyncio.Future[End]] = {}

    def __enter__(self) -> Self:
        """Become a session. Raises Refused 503."""
        self._door.check_room()
        number = self._engine.next_session()
        attached = Attached(
            session=number, link=self, principal=self._principal.name, **self._door.credential(self._principal),
            role=Role.CALLER, remote=self._door.facts.remote, dialect="jupyter http",
        )  # fmt: skip
        self._engine.feed(attached)
        self._session = self._engine.router.sessions.by_id[number]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(1000, "")

    def _leave(self, code: int, reason: str) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._engine.feed(Detached(session, code, reason, 0))
        for future in self._futures.values():
            if not future.done():
                future.set_exception(Refused(503, reason or "the request has ended"))
        self._futures.clear()

    async def ask(
        self, endpoint: str, method: str, params: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """The result. Raises Failed for every other outcome, Refused when the session had to end."""
        if self._session is None:
            raise Refused(503, "the session of this request has ended")
        wire_id = b"%d" % (len(self._futures) + 1)
        future = self._futures[wire_id] = self._engine.loop.create_future()
        body = Body(msgspec.json.encode(params or {}))
        self._engine.feed(Asked(self._session, wire_id, endpoint, method, body, Options(timeout=timeout_s)))
        end = await future
        if end.outcome.kind is not OK:
            raise Failed(end)
        return msgspec.json.decode(end.body.raw) if end.body is not None else None

    # ------------------------------------------------------------ from the router, by the engine

    def deliver(self, message: Message) -> None:
        """An answer has come."""
        if type(message) is End:
            future = self._futures.get(message.wire_id)
            if future is not None and not future.done():
                future.set_result(message)

    def broadcast(self, message: Message, frames: dict[str, bytes]) -> bool:
        """Nothing is listened to here."""
        return False

    def close(self, code: int, reason: str) -> None:
        """The session has to end: its credential was revoked, the broker leaves."""
        self._engine.loop.call_soon(self._leave, code, reason)

    def pause_reading(self) -> None:
        """There is nothing to read."""

    def resume_reading(self) -> None:
        """There is nothing to read."""
