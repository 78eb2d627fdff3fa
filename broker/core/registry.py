"""The registry: which sessions serve which endpoint, and what is known of endpoints nobody serves now."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from broker.core.classes import Classes
from broker.core.dispatch import POLICIES, Informed, Policy
from broker.core.limits import EndpointLimits, Limits
from broker.core.lines import Line, Lines
from broker.core.messages import EMPTY, Body
from broker.core.queue import Queue

if TYPE_CHECKING:
    from broker.core.pending import Request
    from broker.core.sessions import Session
    from broker.core.topics import Topic


FORGET_LOOKS = 64
"""how many endpoints are looked at for one to forget, so that a full registry costs no more than that per request"""


Times: TypeAlias = tuple[float | None, float | None]
NO_TIMES: Times = (None, None)


class Registration:
    """One session serving one endpoint. `methods` None means all; `load` counts the attempts it has now.

    `number` is higher for those that came later. `times` are the deadline and the idle deadline it sets, in seconds;
    None where it sets none.
    """

    __slots__ = ("capacity", "endpoint", "free", "gone", "info", "load", "methods", "number", "session", "times")

    def __init__(self, session: Session, endpoint: Endpoint) -> None:
        self.session = session
        self.endpoint = endpoint
        self.number = 0
        self.methods: frozenset[str] | None = None
        self.capacity = 0
        self.info = EMPTY
        self.times = NO_TIMES
        self.load = 0
        self.free = False
        self.gone = False

    @property
    def willing(self) -> bool:
        """Whether it can be given one more request."""
        session = self.session
        return self.load < self.capacity and not (self.gone or session.congested or session.draining)


class Endpoint:
    """A name under which workers answer: its registrations, those that are free (`free`), and the queue.

    `leaving` are registrations that have ended and still have requests in their hands. `classes` is what was learned
    of the workers, if there was anything to learn.
    """

    __slots__ = (
        "bounds", "classes", "configured", "deadline_max_s", "deadline_s", "free", "idle_s", "leaving", "limits",
        "lines", "listeners", "name", "queue", "queue_max", "registrations", "served", "topics",
    )  # fmt: skip

    def __init__(self, name: str, limits: Limits, own: EndpointLimits | None) -> None:
        self.name = name
        self.served = False
        self.registrations: dict[Session, Registration] = {}
        self.configure(limits, own)
        self.free: Policy = POLICIES[self.limits.policy](self.registrations.values())
        self.classes: Classes | None = None
        self.lines = Lines()
        self.leaving: dict[Session, Registration] = {}
        self.queue = Queue()
        self.topics: dict[str | None, Topic] = {}
        self.listeners = 0

    def configure(self, limits: Limits, own: EndpointLimits | None) -> None:
        """Take over bounds; what is configured of the endpoint goes before what holds for all."""
        self.configured = own is not None
        self.served = self.served or self.configured
        self.limits = own or EndpointLimits()
        self.queue_max = limits.queue_max if self.limits.queue_max is None else self.limits.queue_max
        self.bounds = limits
        self.set_times()

    def set_times(self) -> None:
        """Its deadlines: as configured for it, else the longest its workers set, else as for all."""
        own, bounds = self.limits, self.bounds
        served = [each.times for each in self.registrations.values()]
        most_s = bounds.deadline_served_max_s
        deadline_s = min(max((deadline or 0.0 for deadline, _ in served), default=0.0), most_s)
        idle_s = min(max((idle or 0.0 for _, idle in served), default=0.0), most_s)
        self.deadline_max_s = own.deadline_max_s or max(bounds.deadline_max_s, deadline_s)
        self.deadline_s = min(own.deadline_s or deadline_s or bounds.deadline_s, self.deadline_max_s)
        self.idle_s = own.idle_s or idle_s or bounds.idle_s

    @property
    def in_use(self) -> bool:
        """Whether anything hangs on it, so that it must not be forgotten."""
        return bool(self.configured or self.registrations or self.leaving or self.listeners or self.queue)

    @property
    def why_closed(self) -> str:
        """What is said of an endpoint that the configuration has closed."""
        return f"{self.name} is closed: {self.limits.closed}"

    def has_method(self, method: str) -> bool:
        """Whether some worker serves the method, busy or not."""
        return any(r.methods is None or method in r.methods for r in self.registrations.values())

    def line_of(self, request: Request) -> Line:
        """Where a request waits: with all that the same workers can do."""
        group = request.options.group
        if group is not None and self.free.binds:
            target = self.free.target(request.method, group)
            if target is not None:
                return self.lines.bound(target)
        return self.lines.of(request.method)

    def sort_queue(self) -> None:
        """Workers have come or gone, or have other methods: what waits may stand in another line now."""
        if self.queue and (self.lines.changed or self.free.binds):
            self.queue.sort(self.line_of)
        self.lines.changed = False

    def begin_policy(self) -> None:
        """Choose by the policy that is configured now, among the workers that are free now."""
        self.free = POLICIES[self.limits.policy](self.registrations.values())
        for registration in self.registrations.values():
            if registration.free:
                self.free.add(registration)
        if self.classes is not None:
            self.inform(self.classes)
        self.queue.sort(self.line_of)

    def inform(self, classes: Classes) -> None:
        """Choose by what is learned there from now on, too."""
        self.classes = classes
        self.free = Informed(self.free, classes)

    def __repr__(self) -> str:
        return f"<endpoint {self.name} workers={len(self.registrations)} queued={len(self.queue)}>"


class Registry:
    """Endpoints by name, within a bound; those not in use are forgotten first, the longest unused before others."""

    __slots__ = ("_limits", "_made", "by_name", "configured")

    def __init__(self, limits: Limits, configured: Mapping[str, EndpointLimits]) -> None:
        self._limits = limits
        self._made = 0
        self.configured = dict(configured)
        self.by_name: OrderedDict[str, Endpoint] = OrderedDict()
        for name in self.configured:
            self.by_name[name] = Endpoint(name, limits, self.configured[name])

    def get_or_make(self, name: str) -> Endpoint | None:
        """The endpoint of that name; None if the bound is reached and all are in use."""
        endpoint = self.by_name.get(name)
        if endpoint is None:
            if len(self.by_name) >= self._limits.endpoints_known_max and not self._forget_one():
                return None
            endpoint = self.by_name[name] = Endpoint(name, self._limits, self.configured.get(name))
        return endpoint

    def reconfigure(self, limits: Limits, configured: Mapping[str, EndpointLimits]) -> None:
        """Take over bounds for all endpoints; a changed policy starts with the workers that are free now."""
        self._limits = limits
        self.configured = dict(configured)
        for name in self.configured:
            self.by_name.setdefault(name, Endpoint(name, limits, self.configured[name]))
        for name, endpoint in self.by_name.items():
            policy = endpoint.limits.policy
            endpoint.configure(limits, self.configured.get(name))
            if endpoint.limits.policy != policy:
                endpoint.begin_policy()

    def closed(self, name: str) -> str:
        """Why an endpoint is closed; empty if it is open."""
        endpoint = self.by_name.get(name)
        return "" if endpoint is None else endpoint.limits.closed

    def register(
        self, session: Session, endpoint: Endpoint, methods: frozenset[str] | None, capacity: int, info: Body = EMPTY,
        times: Times = NO_TIMES,
    ) -> Registration:  # fmt: skip
        """Let a session serve an endpoint; a second time replaces what it said the first time.

        What it still has from serving it before counts towards its capacity.
        """
        registration = endpoint.registrations.get(session)
        if registration is None:
            self._made += 1
            registration = endpoint.leaving.pop(session, None) or Registration(session, endpoint)
            registration.number, registration.gone = self._made, False
            endpoint.registrations[session] = session.registrations[endpoint] = registration
            endpoint.served = True
            self.by_name.move_to_end(endpoint.name)
            endpoint.lines.declare(methods)
        else:
            self.set_free(registration, False)
            endpoint.free.left(registration)
            endpoint.lines.declare(methods)  # first, so that one who says the same again changes nothing
            endpoint.lines.withdraw(registration.methods)
        registration.methods, registration.capacity, registration.info = methods, capacity, info
        if registration.times != times:
            registration.times = times
            endpoint.set_times()
        endpoint.free.came(registration)
        endpoint.sort_queue()
        self.refresh(registration)
        return registration

    def unregister(self, registration: Registration) -> None:
        """End it; attempts it still has may finish."""
        self.set_free(registration, False)
        registration.gone = True
        if registration.load:
            registration.endpoint.leaving[registration.session] = registration
        endpoint = registration.endpoint
        del endpoint.registrations[registration.session]
        del registration.session.registrations[endpoint]
        if registration.times != NO_TIMES:
            endpoint.set_times()
        endpoint.free.left(registration)
        endpoint.lines.withdraw(registration.methods)
        endpoint.lines.forget(registration)
        endpoint.sort_queue()

    def refresh(self, registration: Registration) -> None:
        """Look again whether it can take requests."""
        self.set_free(registration, registration.willing)

    @staticmethod
    def set_free(registration: Registration, free: bool) -> None:
        """Have it among the free ones of its endpoint, or not."""
        if registration.free != free:
            registration.free = free
            if free:
                registration.endpoint.free.add(registration)
            else:
                registration.endpoint.free.remove(registration)

    @staticmethod
    def unload(registration: Registration) -> None:
        """It has one request less."""
        load = registration.load
        registration.load = load - 1
        if registration.free:
            registration.endpoint.free.changed(registration, load)
        elif registration.willing:
            registration.free = True
            registration.endpoint.free.add(registration)
        elif registration.gone and not registration.load:  # the last of what it still had
            del registration.endpoint.leaving[registration.session]

    def _forget_one(self) -> bool:
        for _ in range(min(len(self.by_name), FORGET_LOOKS)):
            name, endpoint = self.by_name.popitem(last=False)
            if not endpoint.in_use:
                return True
            self.by_name[name] = endpoint
        return False
