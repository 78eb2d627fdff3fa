"""The opening of a WebSocket: everything is judged before the 101, nothing after it."""

from __future__ import annotations

import secrets

from broker.auth.admission import Admission
from broker.auth.facts import Refused
from broker.core.access import Principal, Role, is_name, roles_at
from broker.core.errors import DRAINED, ENDPOINT_CLOSED, NORMAL, REPLACED, UNAUTHORISED
from broker.core.events import Attached, Detached, Resumed
from broker.core.kept import NEVER_WRITTEN
from broker.core.sessions import Session
from broker.links.handshake import Refusal, check_upgrade, choose_subprotocol, switching_protocols
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.links.take import take
from broker.transports.websocket.peer import WebSocketPeer
from broker.transports.websocket.query import Attachment, QueryError, read_query
from broker.transports.websocket.resume import find_session
from broker.wire.jsonrpc import JsonRpc


class WebSocketHandler(Admission):
    """`/ws` and `/ws/{endpoint}`. The order of refusal: request, Host, Origin, credential, query, role, bounds."""

    links: LoopLinks

    async def get(self, endpoint: str = "") -> None:
        """Attach a peer, or refuse it with 400, 401, 403, 405, 421, 426 or 503."""
        principal = self.authenticate()
        upgrade = check_upgrade(self.request.method or "", self.request.headers, self.request.version)
        if isinstance(upgrade, Refusal):
            raise Refused(upgrade.status, upgrade.reason, upgrade.headers)
        attachment = self._read_query(endpoint)
        self._check_role(principal, endpoint, attachment.role)
        resumed = find_session(
            self.engine.router, self.gate.authenticator, upgrade.subprotocols, principal, endpoint, attachment,
            self.facts.remote,
        )  # fmt: skip
        if resumed is None:
            self.check_room()
        stream = self.detach()
        response = switching_protocols(upgrade.key, choose_subprotocol(upgrade.subprotocols))
        try:
            link = await take(stream, response, self.links)
        except OSError:
            return  # gone before it was attached, or no file descriptor was left: the stream is closed already
        if self.engine.router.draining:
            self.turn_away(link, DRAINED, "the broker is shutting down")
        elif not self.gate.authenticator.still_holds(principal):  # it ended while this waited: nobody else would notice
            self.turn_away(link, UNAUTHORISED, "the credential has ended")
        else:
            self._attach(link, principal, endpoint, attachment, resumed)

    def _read_query(self, endpoint: str) -> Attachment:
        if endpoint and not is_name(endpoint):
            raise Refused(400, f"{endpoint[:128]!r} is no name of an endpoint")
        query: dict[str, list[str]] = {}
        for name, value in self.facts.query:
            query.setdefault(name, []).append(value)
        try:
            attachment = read_query(query)
        except QueryError as error:
            raise Refused(400, str(error)) from None
        if attachment.role == Role.WORKER and not endpoint:
            raise Refused(400, "role=worker goes with /ws/{endpoint}; on /ws call broker.serve")
        return attachment

    def _check_role(self, principal: Principal, endpoint: str, role: Role) -> None:
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
