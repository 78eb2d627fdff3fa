"""From an authenticated peer with a link to a session in the router: the same for every door of JSON-RPC."""

from __future__ import annotations

import secrets

from broker.auth.admission import credential_of, turn_away
from broker.auth.authenticate import Authenticator
from broker.auth.facts import Refused
from broker.config.model import Limits
from broker.core.access import Principal, Role, roles_at
from broker.core.errors import DRAINED, ENDPOINT_CLOSED, NORMAL, REPLACED, UNAUTHORISED
from broker.core.events import Attached, Detached, Resumed
from broker.core.kept import NEVER_WRITTEN
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links.link import Link
from broker.links.pair import AnyLink
from broker.transports.websocket.peer import WebSocketPeer
from broker.transports.websocket.query import Attachment
from broker.wire.jsonrpc import JsonRpc


def check_role(principal: Principal, endpoint: str, role: Role) -> None:
    """Raises Refused 403 if the principal may not be attached so."""
    if endpoint and not roles_at(principal.grants, endpoint) & role:
        raise Refused(403, f"{principal.name} may not be {(role.name or '').lower()} at {endpoint}")


def welcome(
    engine: Engine, authenticator: Authenticator, link: Link, principal: Principal, endpoint: str,
    attachment: Attachment, resumed: Session | None, limits: Limits,
) -> None:  # fmt: skip
    """Attach the peer for whom a link was opened, or say over it why that cannot be any more."""
    if engine.router.draining:
        turn_away(link, DRAINED, "the broker is shutting down")
    elif not authenticator.still_holds(principal):  # it ended while this waited: nobody else would notice
        turn_away(link, UNAUTHORISED, "the credential has ended")
    else:
        attach(engine, link, principal, endpoint, attachment, resumed, limits)


def attach(
    engine: Engine, link: AnyLink, principal: Principal, endpoint: str, attachment: Attachment,
    resumed: Session | None, limits: Limits, *, dialect: str = "jsonrpc",
) -> Session | None:  # fmt: skip
    """Attach the peer, or go on with the session it resumes; None if the endpoint is closed: the link is told so."""
    router = engine.router
    if resumed is not None and (resumed.kept is None or not resumed.kept.can_resume(attachment.received)):
        _give_up(engine, resumed)
        resumed = None
    session_id = engine.next_session() if resumed is None else resumed.id
    known = router.registry.by_name.get(endpoint)
    if known is not None and known.limits.closed:
        turn_away(link, ENDPOINT_CLOSED, known.limits.closed)
        return None
    codec = JsonRpc(
        node=router.node,
        session_id=session_id,
        endpoint=endpoint,
        meta=attachment.meta,
        binary=attachment.binary,
        defaults=attachment.defaults,
        lsp=attachment.lsp,
    )
    peer = WebSocketPeer(engine, link, codec, limits.message_max_bytes, limits.batch_max)
    if resumed is not None:
        engine.feed(
            Resumed(
                session=resumed,
                link=peer,
                received=attachment.received,
                **credential_of(engine, principal),
                remote=link.remote,
            )
        )
        peer.start(resumed)
        return resumed
    attached = Attached(
        session=session_id,
        link=peer,
        principal=principal.name,
        **credential_of(engine, principal),
        role=attachment.role,
        endpoint=endpoint or None,
        listen=attachment.hears,
        capacity=attachment.capacity,
        grace_s=attachment.grace_s,
        secret=secrets.token_urlsafe(18) if attachment.grace_s else "",
        remote=link.remote,
        dialect=dialect,
    )
    engine.feed(attached)
    session = router.sessions.by_id[session_id]
    peer.start(session)
    return session


def _give_up(engine: Engine, session: Session) -> None:
    """Too much of it was cut: its peer cannot go on, and begins anew. A link it still has is closed."""
    kept, lost = session.kept, session.lost_link
    if kept is not None:
        flushed = NEVER_WRITTEN - 1 if lost is None else lost.flushed
        link = kept.link
        kept.close(REPLACED.code, "a newer link has begun anew")
        engine.feed(Detached(session, NORMAL.code, "it came back too late", flushed, link))
