"""What answers tell about workers whose dialect does not say what they serve."""

from __future__ import annotations

from broker.core.classes import Classes, class_of
from broker.core.events import ClassAnswered
from broker.core.state import State


class Learning:
    """Notes who has which class, and has the endpoint's policy mind it."""

    __slots__ = ("state",)

    def __init__(self, state: State) -> None:
        self.state = state

    def answered(self, event: ClassAnswered, now: float) -> None:
        """A worker is about to answer a method of a class, well or with an error; it counts only for its own calls."""
        attempt = event.session.attempts.get(event.attempt)
        if attempt is None or attempt.registration.gone:
            return
        name, registration, endpoint = class_of(attempt.request.method), attempt.registration, attempt.request.endpoint
        if endpoint.classes is None:
            endpoint.inform(Classes())
        classes, pass_over_s = endpoint.classes, self.state.limits.pass_over_s
        assert classes is not None
        if event.well:
            classes.has(name, registration)
        elif pass_over_s and (doubt := classes.doubt(name, registration)) is not None:
            self.state.counters.doubts += 1
            doubt.slot = self.state.sessions.expiry.add(doubt, now + pass_over_s)
