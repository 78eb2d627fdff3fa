"""The bases of the HTTP routes that ask the router: a session per request, and a body read once its sender is known."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import cast

from tornado.http1connection import HTTP1Connection
from tornado.web import stream_request_body

from broker.auth.admission import Admission
from broker.auth.facts import Refused
from broker.core.access import Principal, Role
from broker.core.events import Attached, Detached, Link
from broker.core.sessions import Session
from broker.wire.calls import Reply

LINGER = 4
"""times the bound of a body that are read and dropped, so that the sender gets to read the refusal"""

STREAM_BODY_S = 1e9
"""A body that is taken as it comes has the deadlines of its request instead of the one for bodies."""

_STATUS_OF_CLOSE = {4400: 400, 4401: 401, 4403: 403, 4404: 403, 4409: 409, 4412: 503, 4429: 429}


class SessionDoor(Admission):
    """A route whose requests are sessions of the router. Whoever hangs up has left: what they asked is cancelled.

    `post` or `get` returns `ended`, which is done when the answer has been written; the answer itself is written by
    the link's callbacks.
    """

    ended: asyncio.Future[None]
    session: Session | None = None
    _closed_early: Refused | None = None

    def attach(
        self, peer: Link, principal: Principal, *, dialect: str, role: Role = Role.CALLER, endpoint: str | None = None,
        listen: bool = False,
    ) -> Session:  # fmt: skip
        """Make this request a session. Raises Refused 503 if there are too many, or what the router says."""
        engine, router = self.engine, self.engine.router
        self.check_sessions()
        self.ended = engine.loop.create_future()
        number = engine.next_session()
        attached = Attached(
            session=number,
            link=peer,
            principal=principal.name,
            **self.credential(principal),
            role=role,
            endpoint=endpoint,
            listen=listen,
            remote=self.facts.remote,
            dialect=dialect,
        )
        engine.feed(attached)
        self.session = session = router.sessions.by_id[number]
        if self._closed_early is not None:
            self.leave()
            raise self._closed_early
        return session

    def leave(self) -> None:
        """The session is no more."""
        session, self.session = self.session, None
        if session is not None:
            self.engine.feed(Detached(session, 1000, "", 0))
            if not self.ended.done():
                self.ended.set_result(None)

    def on_finish(self) -> None:
        """The answer has been written."""
        self.leave()

    def on_connection_close(self) -> None:
        """The caller hung up."""
        super().on_connection_close()
        self.leave()

    def closed(self, code: int, reason: str) -> None:
        """The session has to end before its request has."""
        status = _STATUS_OF_CLOSE.get(code, 500)
        if self.session is None:
            self._closed_early = Refused(status, reason)
        elif not self._headers_written:
            self.refuse(status, reason)

    def reply(self, reply: Reply) -> None:
        """Answer a request that has ended."""
        if self.session is None:
            return
        self.set_status(reply.status, "Client Closed Request" if reply.status == 499 else None)
        self.set_header("Content-Type", reply.content_type)
        for name, value in reply.headers:
            self.set_header(name, value)
        self.complete(reply.body)

    def complete(self, last: bytes = b"") -> None:
        """Write the last of an answer."""
        self.finish(last)


@stream_request_body
class Receiver(SessionDoor):
    """A POST whose sender is authenticated before more than `unauthenticated_max_bytes` of the body are read."""

    body_max_bytes: int
    principal: Principal
    _refusal: Refused | None = None

    def prepare(self) -> None:
        """The header is complete. A refusal waits for a short body, so that the connection can be used again."""
        super().prepare()
        self._content = bytearray()
        self._taken = 0
        self.body_max_bytes = self.limits().message_max_bytes
        if self.request.method != "POST":
            return
        size = self.request.headers.get("Content-Length", "")
        declared = int(size) if size.isascii() and size.isdigit() and len(size) < 20 else 0
        try:
            self.principal = self.authenticate()
        except Refused as refused:
            if declared > self.limits().unauthenticated_max_bytes:
                raise
            self._refusal = refused
            return
        if self.streams_body(declared):
            connection = cast("HTTP1Connection", self.request.connection)
            connection.set_max_body_size(sys.maxsize)
            connection.set_body_timeout(STREAM_BODY_S)
            return
        if declared > self.body_max_bytes:
            self._refusal = self._too_large(declared)
            if declared > LINGER * self.body_max_bytes or "Expect" in self.request.headers:
                raise self._refusal
        cast("HTTP1Connection", self.request.connection).set_max_body_size(LINGER * self.body_max_bytes)

    def streams_body(self, declared: int) -> bool:
        """Whether the body is taken as it comes, however long; `declared` is its length, 0 if that is not known."""
        return False

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """A piece of the body; what is refused already is dropped."""
        self._taken += len(chunk)
        if self._refusal is None:
            self._content += chunk
            if self._taken > self.body_max_bytes:
                self._refusal = self._too_large(self._taken)
        if self._refusal is not None:
            self._content.clear()
        return None

    def content(self) -> bytes:
        """The body. Raises what was to be refused: 401 and the like, 413."""
        if self._refusal is not None:
            raise self._refusal
        return bytes(self._content)

    def _too_large(self, size: int) -> Refused:
        return Refused(413, f"a body of {size} bytes is above the bound of {self.body_max_bytes}")
