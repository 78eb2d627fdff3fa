"""Kernels at the pace of their readers: their workers are not read from while a front end catches up."""

from __future__ import annotations

from collections import Counter

from broker.core.sessions import Session
from broker.engine.engine import Engine


class Pace:
    """Which kernels are held back, and by how many front ends."""

    __slots__ = ("_engine", "_held", "_paused")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: Counter[str] = Counter()
        self._paused: dict[str, list[Session]] = {}

    def hold(self, endpoint: str) -> None:
        """Read nothing more from the workers of an endpoint until `let_go` was called as often."""
        self._held[endpoint] += 1
        if self._held[endpoint] > 1:
            return
        known = self._engine.router.registry.by_name.get(endpoint)
        workers = self._paused[endpoint] = list(known.registrations) if known is not None else []
        for session in workers:
            if session.link is not None:
                session.link.pause_reading()

    def let_go(self, endpoint: str) -> None:
        """One front end less that needs it."""
        self._held[endpoint] -= 1
        if self._held[endpoint]:
            return
        del self._held[endpoint]
        for session in self._paused.pop(endpoint):
            if session.link is not None:
                session.link.resume_reading()
