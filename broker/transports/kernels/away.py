"""Front ends without a link: how many of one principal, and what waits for them together."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Protocol

from broker.core.allowances import away_max, bytes_max
from broker.engine.engine import Engine


class Leaver(Protocol):
    """Who is away."""

    principal: str

    def give_up(self) -> None:
        """Nothing waits for it any more; it calls `drop`."""
        ...


class Away:
    """Keeps one principal's within its share of sessions and of memory, as sessions with grace are: whoever is away
    longest gives up first, counted in `over_share`. Otherwise one page that comes and goes under ever new names would
    fill the broker for everybody.
    """

    __slots__ = ("_by_principal", "_bytes", "_engine")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._by_principal: dict[str, OrderedDict[Leaver, int]] = {}
        self._bytes: Counter[str] = Counter()

    def keep(self, leaver: Leaver, size: int) -> None:
        """It has no link, and so many bytes wait for it."""
        principal, state = leaver.principal, self._engine.router.state
        own = self._by_principal.setdefault(principal, OrderedDict())
        self._bytes[principal] += size - own.get(leaver, 0)
        own[leaver] = size
        while len(own) > away_max(state.limits) or (own and self._bytes[principal] > bytes_max(state.limits)):
            state.counters.over_share["sessions"] += 1
            next(iter(own)).give_up()

    def drop(self, leaver: Leaver) -> None:
        """It has a link again, or is gone."""
        own = self._by_principal.get(leaver.principal)
        if own is None:
            return
        self._bytes[leaver.principal] -= own.pop(leaver, 0)
        if not own:
            del self._by_principal[leaver.principal], self._bytes[leaver.principal]
