"""Coming back to a session: who asks for one by the subprotocol `resume.<id>.<secret>`, and whether it is theirs."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from broker.auth.authenticate import Authenticator
from broker.auth.facts import Refused
from broker.core.access import Principal
from broker.core.router import Router
from broker.core.sessions import Session
from broker.transports.websocket.query import Attachment

PREFIX = "resume."


def find_session(
    router: Router,
    authenticator: Authenticator,
    offered: Iterable[str],
    principal: Principal,
    endpoint: str,
    attachment: Attachment,
    remote: str,
) -> Session | None:
    """The session that is to go on over this link; None if none is asked for, or it is there no more.

    Raises Refused: 400 for two of them, or if the link is not attached as the session is; 403 (429 after too many) if
    the secret is wrong or the session another principal's.
    """
    names = [name.removeprefix(PREFIX) for name in offered if name.startswith(PREFIX)]
    if not names:
        return None
    if len(names) > 1:
        raise Refused(400, "a link resumes one session")
    session_id, _, secret = names[0].rpartition(".")
    session = router.state.peer(session_id)
    if session is None:
        return None
    kept = session.kept
    known = hmac.compare_digest(secret.encode(), session.secret.encode())
    if kept is None or not known or session.principal != principal.name:
        raise authenticator.not_yours(remote)
    if (session.endpoint or "", session.role) != (endpoint, attachment.role):
        place = f"role={(session.role.name or '').lower()} at {session.endpoint or 'no endpoint'}"
        raise Refused(400, f"the session is attached with {place}; resume it so")
    return session
