"""What makes a peer of a link whose opening was found good, whichever door it came by."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from broker.auth.admission import Admits
from broker.auth.door import Gate
from broker.auth.facts import Refused
from broker.core.access import Principal, Role, is_name, roles_at
from broker.core.errors import DRAINED, ENDPOINT_CLOSED, NORMAL, REPLACED, UNAUTHORISED
from broker.core.events import Attached, Detached, Resumed
from broker.core.kept import NEVER_WRITTEN
from broker.core.sessions import Session
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.transports.websocket.peer import WebSocketPeer
from broker.transports.websocket.query import Attachment, QueryError, read_query
from broker.wire.jsonrpc import JsonRpc


class Attaches(Admits):
    """Judges what a peer says of itself, and attaches it."""

    links: LoopLinks
    gate: Gate

    def welcome(
        self, link: Link, principal: Principal, endpoint: str, attachment: Attachment, resumed: Session | None
    ) -> None:
        """Attach a peer to the link that was opened for it, or say why it cannot be any more."""
        if self.engine.router.draining:
            self.turn_away(link, DRAINED, "the broker is shutting down")
        elif not self.gate.authenticator.still_holds(principal):  # it ended while this waited: nobody else would notice
            self.turn_away(link, UNAUTHORISED, "the credential has ended")
        else:
            self._attach(link, principal, endpoint, attachment, resumed)

    def read_query(self, endpoint: str, given: Iterable[tuple[str, str]]) -> Attachment:
        """How a peer wants to be attached. Raises Refused 400."""
        if endpoint and not is_name(endpoint):
            raise Refused(400, f"{endpoint[:128]!r} is no name of an endpoint")
        query: dict[str, list[str]] = {}
        for name, value in given:
            query.setdefault(name, []).append(value)
        try:
            attachment = read_query(query)
        except QueryError as error:
            raise Refused(400, str(error)) from None
        if attachment.role == Role.WORKER and not endpoint:
            raise Refused(400, "role=worker goes with /ws/{endpoint}; on /ws call broker.serve")
        return attachment

    def check_role(self, principal: Principal, endpoint: str, role: Role) -> None:
        """Raises Refused 403 for a role that the grants do not allow there."""
        if endpoint and not roles_at(principal.grants, endpoint) & role:
            raise Refused(403, f"{principal.name} may not be {(role.name or '').lower()} at {endpoint}")

    def _give_up(self, session: Session) -> None:
        """Too much of it was cut: its peer cannot go on, and begins anew. A link it still has is closed."""
        kept, lost = session.kept, session.lost_link
        if kept is not None:
            flushed = NEVER_WRITTEN - 1 if lost is None else lost.flushed
            link = kept.link
            kept.close(REPLACED.code, "a newer link has begun anew")
            self.engine.feed(Detached(session, NORMAL.code, "it came back too late", flushed, link))

    def _attach(
        self, link: Link, principal: Principal, endpoint: str, attachment: Attachment, resumed: Session | None
    ) -> None:
        router = self.engine.router
        if resumed is not None and (resumed.kept is None or not resumed.kept.can_resume(attachment.received)):
            self._give_up(resumed)
            resumed = None
        session_id = self.engine.next_session() if resumed is None else resumed.id
        known = router.registry.by_name.get(endpoint)
        if known is not None and known.limits.closed:
            self.turn_away(link, ENDPOINT_CLOSED, known.limits.closed)
            return
        codec = JsonRpc(
            node=router.node,
            session_id=session_id,
            endpoint=endpoint,
            meta=attachment.meta,
            binary=attachment.binary,
            defaults=attachment.defaults,
            lsp=attachment.lsp,
        )
        peer = WebSocketPeer(self.engine, link, codec, self.links.limits.message_max_bytes, self.limits().batch_max)
        if resumed is not None:
            self.engine.feed(
                Resumed(
                    session=resumed,
                    link=peer,
                    received=attachment.received,
                    **self.credential(principal),
                    remote=link.remote,
                )
            )
            peer.start(resumed)
            return
        attached = Attached(
            session=session_id,
            link=peer,
            principal=principal.name,
            **self.credential(principal),
            role=attachment.role,
            endpoint=endpoint or None,
            listen=attachment.hears,
            capacity=attachment.capacity,
            grace_s=attachment.grace_s,
            secret=secrets.token_urlsafe(18) if attachment.grace_s else "",
            remote=link.remote,
            dialect="jsonrpc",
        )
        self.engine.feed(attached)
        peer.start(router.sessions.by_id[session_id])
