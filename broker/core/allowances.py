"""What one principal's sessions may keep together, so that nobody fills the broker's memory for everybody."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from broker.core.counters import Counters
from broker.core.limits import Limits

if TYPE_CHECKING:
    from broker.core.kept import Kept
    from broker.core.sessions import Session


class Allowance:
    """One principal's: bytes of messages kept for all its sessions with grace, and which of these have no link.

    `away` has those longest without one first. Whoever keeps a message adds its size to `used`, and then calls
    `make_room`.
    """

    __slots__ = ("_counters", "_waiting", "away", "sessions", "used")

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.used = 0
        self.sessions = 0
        """sessions with grace, with a link and without"""
        self.away: OrderedDict[Session, None] = OrderedDict()
        # Of those away, the ones for which something may be kept:
        self._waiting: OrderedDict[Kept, None] = OrderedDict()

    def leave(self, session: Session) -> None:
        """A session has no link now."""
        self.away[session] = None
        if session.kept is not None:
            self._waiting[session.kept] = None

    def come_back(self, session: Session) -> None:
        """It has one again, or is gone."""
        self.away.pop(session, None)
        if session.kept is not None:
            self._waiting.pop(session.kept, None)

    def has_room(self, size: int, limits: Limits) -> bool:
        """Whether so much more can be kept for a session without taking it from one that has a link."""
        return bool(self._waiting) or self.used + size <= bytes_max(limits)

    def make_room(self, asking: Kept, limits: Limits) -> None:
        """Above the bound the oldest messages go: of those longest away first, then of who asks."""
        if asking.link is None:
            self._waiting[asking] = None
        most = bytes_max(limits)
        while self.used > most:
            victim = next(iter(self._waiting), asking)
            if len(victim):
                victim.cut_one()
                self._counters.over_share["messages"] += 1
            elif self._waiting:
                self._waiting.popitem(last=False)
            else:
                return  # others have it, who came when the bound was higher


class Allowances:
    """The allowances of all principals that have a session with grace."""

    __slots__ = ("_by_principal", "_counters")

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._by_principal: dict[str, Allowance] = {}

    def __len__(self) -> int:
        return len(self._by_principal)

    def open(self, principal: str) -> Allowance:
        """One more session; to be closed by `close`."""
        allowance = self._by_principal.get(principal)
        if allowance is None:
            allowance = self._by_principal[principal] = Allowance(self._counters)
        allowance.sessions += 1
        return allowance

    def of(self, session: Session) -> Allowance:
        """That of a session with grace."""
        return self._by_principal[session.principal]

    def close(self, session: Session) -> None:
        """The session is gone, with all that was kept for it."""
        allowance = self._by_principal[session.principal]
        allowance.come_back(session)
        allowance.sessions -= 1
        if not allowance.sessions:
            del self._by_principal[session.principal]

    def check(self, sessions: list[Session]) -> None:
        """Assert that they agree with the sessions. For tests and simulators."""
        graceful = [session for session in sessions if session.kept is not None]
        assert self._by_principal.keys() == {session.principal for session in graceful}
        for principal, allowance in self._by_principal.items():
            own = [session for session in graceful if session.principal == principal]
            assert allowance.sessions == len(own)
            assert allowance.used == sum(session.kept.size_bytes for session in own if session.kept is not None)
            assert set(allowance.away) == {session for session in own if session.lost_link is not None}


def bytes_max(limits: Limits) -> int:
    """Bytes of messages kept for all sessions of one principal."""
    return int(limits.principal_share * limits.memory_soft_bytes)


def away_max(limits: Limits) -> int:
    """Sessions of one principal that may be without a link."""
    return max(1, int(limits.principal_share * limits.sessions_max))
