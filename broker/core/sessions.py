"""Sessions: who talks, what they may do, and everything that is theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.access import Role, is_admin, only_listening, roles_at
from broker.core.deadlines import Deadlines
from broker.core.events import Attached, Link
from broker.core.ids import AttemptId, SessionId, WireId
from broker.core.limits import Limits

if TYPE_CHECKING:
    from broker.core.pending import Attempt, Request
    from broker.core.registry import Endpoint, Registration
    from broker.core.topics import Topic

ROLES_REMEMBERED = 1000
"""endpoints for which a session's roles are kept at hand"""


class Session:
    """Who is talking, over which link just now, and what belongs to them.

    `requests` maps wire ids to requests asked here that have not ended; `attempts` are those given to this session as
    a worker. `kept`, `grace_s` and `secret` are for sessions that outlive their link.
    """

    __slots__ = (
        "attached_at", "attempts", "capacity", "congested", "dialect", "draining", "endpoint", "expires_at",
        "expiry_slot", "grace_s", "grants", "id", "info", "kept", "link", "listen", "login_id", "nameless_replies",
        "principal", "registrations",
        "remote", "requests", "role", "roles", "secret", "strikes", "subscriptions", "token_id",
    )  # fmt: skip

    def __init__(self, event: Attached, now: float, capacity: int) -> None:
        self.id: SessionId = event.session
        self.link: Link | None = event.link
        self.principal = event.principal
        # Taken here, so that nothing later needs to ask: a listener hears only, whatever its credential allows.
        self.grants = only_listening(event.grants) if event.role == Role.LISTENER else event.grants
        self.role = event.role
        self.endpoint = event.endpoint
        self.listen = event.listen
        self.capacity = event.capacity or capacity
        self.grace_s = event.grace_s
        self.expires_at = event.expires_at
        self.expiry_slot: dict[Session, None] | None = None
        self.token_id = event.token_id
        self.login_id = event.login_id
        self.remote = event.remote
        self.dialect = event.dialect
        self.info = event.info
        self.attached_at = now
        self.secret = ""
        self.kept: tuple[object, ...] = ()
        self.draining = False
        self.congested = False
        self.requests: dict[WireId, Request] = {}
        self.attempts: dict[AttemptId, Attempt] = {}
        self.registrations: dict[Endpoint, Registration] = {}
        self.subscriptions: dict[Topic, None] = {}
        self.roles: dict[str, int] = {}
        self.strikes: tuple[float, ...] = ()
        self.nameless_replies = 0

    def may(self, role: int, endpoint: str) -> bool:
        """Whether the grants allow one of these roles at the endpoint.

        On the way of a request `role` is a plain integer: `&` of two flags costs 0.5 µs, of two integers nothing.
        """
        roles = self.roles.get(endpoint)
        if roles is None:
            if len(self.roles) >= ROLES_REMEMBERED:
                self.roles.clear()
            roles = self.roles[endpoint] = roles_at(self.grants, endpoint).value
        return roles & role != 0

    @property
    def is_admin(self) -> bool:
        """Whether `broker.admin.*` is open to it."""
        return is_admin(self.grants)

    @property
    def who(self) -> str:
        """What it is called where it is refused something."""
        return f"{self.principal}, attached with role=listener," if self.role == Role.LISTENER else self.principal

    def __repr__(self) -> str:
        return f"<session {self.id} {self.principal} {self.role.name} {self.endpoint or '-'}>"


class Sessions:
    """All sessions by id, and when their credentials expire."""

    __slots__ = ("by_id", "expiry")

    def __init__(self, limits: Limits) -> None:
        self.by_id: dict[SessionId, Session] = {}
        self.expiry: Deadlines[Session] = Deadlines(limits.slot_s)

    def open(self, session: Session) -> None:
        """Remember a session."""
        self.by_id[session.id] = session
        if session.expires_at is not None:
            session.expiry_slot = self.expiry.add(session, session.expires_at)

    def close(self, session: Session) -> None:
        """Forget a session."""
        del self.by_id[session.id]
        if session.expiry_slot is not None:
            session.expiry_slot.pop(session, None)
            session.expiry_slot = None

    def __len__(self) -> int:
        return len(self.by_id)
