"""Replies that match nothing, messages that are none, and when a peer that sends them is sent away."""

from __future__ import annotations

from broker.core import errors
from broker.core.events import Answered, CloseLink, Malformed, Stray
from broker.core.requests import Requests
from broker.core.sessions import Session
from broker.core.state import State


class Strikes:
    """Counts what no well-behaved peer sends; three strikes within a minute close its link."""

    __slots__ = ("requests", "state")

    def __init__(self, state: State, requests: Requests) -> None:
        self.state = state
        self.requests = requests

    def stray(self, event: Stray, now: float) -> None:
        """A reply that names no attempt of its session."""
        session, counters = event.session, self.state.counters
        if event.foreign:
            counters.foreign_replies += 1
            self._strike(session, now, "it answered what others were asked")
        elif event.nameless:
            counters.nameless_replies += 1
            session.nameless_replies += 1
            if event.error is not None and event.error.code in (-32600, -32700) and len(session.attempts) == 1:
                # A library that could not read the call says so without an id: with one call in flight it is that one.
                (attempt,) = session.attempts
                self.requests.answered(Answered(session, attempt, event.body, event.error), now)
        else:
            counters.late_replies += 1

    def malformed(self, event: Malformed, now: float) -> None:
        """A message that is none; its sender has been told."""
        self.state.counters.malformed += 1
        if event.strike:
            self._strike(event.session, now, event.detail)

    def _strike(self, session: Session, now: float, what: str) -> None:
        if session.link is None:
            return
        limits = self.state.limits
        self.state.counters.strikes += 1
        remembered = now - limits.strike_memory_s
        session.strikes = (*(at for at in session.strikes if at > remembered), now)[-limits.strikes_max :]
        if len(session.strikes) >= limits.strikes_max:
            reason = f"{len(session.strikes)} strikes, last: {what}"
            self.state.effects.append(CloseLink(session, errors.BAD_MESSAGE, reason))
