"""The router: events in, effects out. It gives every event to the part that decides about it.

`requests` decides how a request goes and how it ends, `attaching` about peers that come and go, `broadcasts` about who
hears what, `own_methods` about `broker.*`, `strikes` about those who misbehave. All work on the tables of one `State`.

The router has no clock and does no I/O: `now` is an argument, on any clock that never goes back. It is owned by one
thread. Effects gather in `effects`; whoever feeds events performs them in order and clears the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from broker.core import errors
from broker.core.attaching import Attaching
from broker.core.broadcasts import Broadcasts
from broker.core.events import (
    Acked,
    Answered,
    Asked,
    Attached,
    BadReply,
    Cancel,
    ClassAnswered,
    Congested,
    CreditGranted,
    Detached,
    Drain,
    Effect,
    Event,
    Malformed,
    Overrun,
    PartSent,
    Progressed,
    Refused,
    Resumed,
    Stray,
)
from broker.core.learning import Learning
from broker.core.limits import EndpointLimits, Limits
from broker.core.own_methods import OwnMethods
from broker.core.refusals import Refusals
from broker.core.requests import Requests
from broker.core.state import Join, State
from broker.core.streaming import Streaming
from broker.core.strikes import Strikes


class Router:
    """The machine. `node` distinguishes this broker's peers and ids from those of others; it must be new each start.

    `join` makes one reply of parts, in the form they have on the wire.
    """

    def __init__(
        self,
        limits: Limits,
        endpoints: Mapping[str, EndpointLimits] | None = None,
        *,
        join: Join,
        node: str = "n",
        now: float = 0.0,
    ) -> None:
        self.state = state = State(limits, endpoints or {}, node=node, now=now, join=join)
        self.node = node
        self.sessions, self.registry, self.pending = state.sessions, state.registry, state.pending
        self.fanouts, self.counters, self.effects = state.fanouts, state.counters, state.effects
        refusals = Refusals(state)
        self.requests = requests = Requests(state, refusals)
        self.broadcasts = broadcasts = Broadcasts(state)
        self.streaming = streaming = Streaming(state, requests)
        self.attaching = attaching = Attaching(state, requests, broadcasts, streaming)
        self.own_methods = OwnMethods(state, refusals, requests, broadcasts, attaching)
        strikes = Strikes(state, requests)
        self.handlers: dict[type, Callable[[Any, float], None]] = {
            Asked: self._asked,
            Answered: requests.answered,
            BadReply: requests.bad_reply,
            ClassAnswered: Learning(state).answered,
            Cancel: requests.cancelled,
            PartSent: streaming.part_sent,
            Overrun: streaming.overrun,
            CreditGranted: streaming.credit_granted,
            Progressed: streaming.progressed,
            Refused: refusals.refused,
            Attached: attaching.attached,
            Resumed: attaching.resumed,
            Acked: attaching.acked,
            Detached: attaching.detached,
            Congested: attaching.congested,
            Stray: strikes.stray,
            Malformed: strikes.malformed,
            Drain: self._drain,
        }

    @property
    def limits(self) -> Limits:
        """The bounds that hold now."""
        return self.state.limits

    @property
    def draining(self) -> bool:
        """Whether it takes no new work."""
        return self.state.draining

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; what it causes is appended to `effects`, which is returned.

        The engine calls `handlers[type(event)]` itself, which saves a call.
        """
        self.handlers[type(event)](event, now)
        return self.effects

    def _asked(self, event: Asked, now: float) -> None:
        if event.endpoint:
            self.requests.asked(event, now)
        else:
            self.own_methods.asked(event, now)

    def _drain(self, event: Drain, now: float) -> None:
        self.state.draining = True
        if event.now:
            self.requests.stop_all(list(self.state.requests()), errors.SHUTTING_DOWN, now)
            self.attaching.forget_suspended(now)

    def next_deadline(self) -> float:
        """When `tick` wants to be called next; `NEVER` if nothing is due ever."""
        return min(self.pending.deadlines.earliest, self.sessions.expiry.earliest, self.state.ageing.earliest)

    def tick(self, now: float, limit: int) -> bool:
        """End at most `limit` requests whose deadline has passed, and as many sessions whose credential has expired;
        let go of what as many topics have kept too long.

        Says whether more is due already.
        """
        self.requests.expire(now, limit)
        self.attaching.expire(now, limit)
        self.broadcasts.age(now, limit)
        return self.next_deadline() <= now

    def reconfigure(self, limits: Limits, endpoints: Mapping[str, EndpointLimits], now: float) -> None:
        """Take over new bounds; they hold for what comes from now on. A queue above its new bound drains by itself.

        Who is attached to an endpoint that is closed now, or serves it, is told so: effects, as of `handle`.
        """
        self.state.limits = limits
        self.registry.reconfigure(limits, endpoints)
        self.broadcasts.reconfigured(now)
        self.attaching.turn_away(now)

    def check(self) -> None:
        """Assert that all views of the tables agree. For tests and simulators; costs a walk over everything."""
        self.state.check()
