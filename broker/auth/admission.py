"""A door whose requests become sessions of the router: is there room, and with what credential do they come in?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from broker.auth.door import Door
from broker.auth.facts import Refused
from broker.config.model import Limits
from broker.core.access import Grant, Principal
from broker.core.errors import Close
from broker.engine.engine import Engine
from broker.links.end import Nobody
from broker.links.pair import AnyLink


class Credential(TypedDict):
    """What a session has of its principal, as members of `Attached` and `Resumed`; `expires_at` on the loop's clock."""

    grants: tuple[Grant, ...]
    expires_at: float | None
    token_id: str
    login_id: str


class Admission(Door):
    """The base of the handlers that attach somebody."""

    engine: Engine
    limits: Callable[[], Limits]
    """the bounds as they are now: a reload changes them"""

    def check_room(self) -> None:
        """Raises Refused 503 if the broker takes nobody any more, or there are too many."""
        check_room(self.engine, self.limits())

    def check_sessions(self) -> None:
        """Raises Refused 503 if there are too many sessions."""
        check_sessions(self.engine, self.limits())

    def credential(self, principal: Principal) -> Credential:
        """What its session has of a principal."""
        return credential_of(self.engine, principal)

    @staticmethod
    def turn_away(link: AnyLink, close: Close, reason: str) -> None:
        """Say why and end."""
        turn_away(link, close, reason)


# The same for doors without HTTP.


def check_room(engine: Engine, limits: Limits) -> None:
    """Raises Refused 503 if the broker takes nobody any more, or there are too many."""
    if engine.router.draining:
        raise Refused(503, "the broker is shutting down", (("Retry-After", "1"),))
    check_sessions(engine, limits)


def check_sessions(engine: Engine, limits: Limits) -> None:
    """Raises Refused 503 if there are too many sessions."""
    if len(engine.router.sessions) >= limits.sessions_max:
        raise Refused(503, f"{limits.sessions_max} sessions are connected", (("Retry-After", "5"),))


def credential_of(engine: Engine, principal: Principal) -> Credential:
    """What its session has of a principal."""
    return Credential(
        grants=principal.grants,
        expires_at=engine.moment(principal.expires_at),
        token_id=principal.token_id,
        login_id=principal.login_id,
    )


def turn_away(link: AnyLink, close: Close, reason: str) -> None:
    """Say why and end. Without a start the other side's part of the close handshake would not be read."""
    link.start(Nobody())
    link.close(close.code, reason)
