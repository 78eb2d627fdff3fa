"""Sessions: who talks, what they may do, and everything that is theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.access import Grant, Role, is_admin, only_listening, role_bits
from broker.core.deadlines import Deadlines
from broker.core.events import Attached, Link
from broker.core.ids import AttemptId, SessionId, WireId
from broker.core.limits import Limits

if TYPE_CHECKING:
    from broker.core.classes import Doubt
    from broker.core.events import Detached
    from broker.core.kept import Kept
    from broker.core.pending import Attempt, Request
    from broker.core.registry import Endpoint, Registration
    from broker.core.topics import Topic

ROLES_REMEMBERED = 1000
"""endpoints for which a session's roles are kept at hand"""


class Session:
    """Who is talking, over which link just now, and what belongs to them.

    `requests` maps wire ids to requests asked here that have not ended; `attempts` are those given to this session as
    a worker. With `grace_s` it outlives its link: then `kept` is its `link` as long as it is there, `secret` what its
    peer comes back with, and `lost_link` says how the last socket ended while it has none.
    """

    __slots__ = (
        "attached_at", "attempts", "capacity", "congested", "dialect", "draining", "endpoint", "expires_at",
        "expiry_slot", "grace_s", "grants", "id", "info", "kept", "link", "listen", "login_id", "lost_link",
        "nameless_replies", "principal", "registrations", "remote", "requests", "role", "roles", "secret", "strikes",
        "subscriptions", "token_id", "withheld",
    )  # fmt: skip

    def __init__(self, event: Attached, now: float, capacity: int) -> None:
        self.id: SessionId = event.session
        self.link: Link | None = event.link
        self.kept: Kept | None = None
        self.lost_link: Detached | None = None
        self.principal = event.principal
        self.role = event.role
        self.grants: tuple[Grant, ...]
        self.roles: dict[str, int]
        self.grant(event.grants)
        self.endpoint = event.endpoint
        self.listen = event.listen
        self.capacity = event.capacity or capacity
        self.grace_s = event.grace_s
        self.expires_at = event.expires_at
        self.expiry_slot: dict[Session | Doubt, None] | None = None
        self.token_id = event.token_id
        self.login_id = event.login_id
        self.remote = event.remote
        self.dialect = event.dialect
        self.info = event.info
        self.attached_at = now
        self.secret = event.secret
        self.draining = False
        self.congested = False
        self.requests: dict[WireId, Request] = {}
        self.attempts: dict[AttemptId, Attempt] = {}
        self.registrations: dict[Endpoint, Registration] = {}
        self.subscriptions: dict[Topic, None] = {}
        self.strikes: tuple[float, ...] = ()
        self.nameless_replies = 0
        self.withheld: dict[Request, None] = {}  # whose credit is passed on when it reads again

    def grant(self, grants: tuple[Grant, ...]) -> None:
        """From now on it may do what these allow. A listener hears only, whatever its credential allows."""
        self.grants = only_listening(grants) if self.role == Role.LISTENER else grants
        self.roles = {}

    def may(self, role: int, endpoint: str) -> bool:
        """Whether the grants allow one of these roles at the endpoint.

        On the way of a request `role` is a plain integer: `&` of two flags costs 0.5 µs, of two integers nothing.
        """
        roles = self.roles.get(endpoint)
        if roles is None:
            if len(self.roles) >= ROLES_REMEMBERED:
                self.roles.clear()
            roles = self.roles[endpoint] = role_bits(self.grants, endpoint)
        return roles & role != 0

    @property
    def is_behind(self) -> bool:
        """Whether it reads, or acknowledges, less than it is sent: nobody is told to send it more."""
        return self.congested or (self.kept is not None and self.kept.is_half_full)

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
    """All sessions by id, and when their credentials expire, or their grace, or what is held against them."""

    __slots__ = ("by_id", "expiry", "suspended")

    def __init__(self, limits: Limits) -> None:
        self.by_id: dict[SessionId, Session] = {}
        self.expiry: Deadlines[Session | Doubt] = Deadlines(limits.slot_s)
        self.suspended = 0

    def open(self, session: Session) -> None:
        """Remember a session."""
        self.by_id[session.id] = session
        self._await(session, session.expires_at)

    def suspend(self, session: Session, how: Detached, until: float) -> None:
        """It has no link, and is kept until then; it comes back with a credential of that day."""
        session.lost_link = how
        self.suspended += 1
        self._await(session, until)

    def resume(self, session: Session) -> None:
        """It has a link again, or another."""
        self.suspended -= session.lost_link is not None
        session.lost_link = None
        self._await(session, session.expires_at)

    def _await(self, session: Session, due_at: float | None) -> None:
        if session.expiry_slot is not None:
            session.expiry_slot.pop(session, None)
        session.expiry_slot = None if due_at is None else self.expiry.add(session, due_at)

    def close(self, session: Session) -> None:
        """Forget a session."""
        del self.by_id[session.id]
        self.suspended -= session.lost_link is not None
        if session.expiry_slot is not None:
            session.expiry_slot.pop(session, None)
            session.expiry_slot = None

    def __len__(self) -> int:
        return len(self.by_id)
