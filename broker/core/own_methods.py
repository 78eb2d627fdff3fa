"""The broker's own methods, `broker.*`: who may use them, what they do, what they answer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import msgspec

from broker._version import VERSION
from broker.core import commands, errors
from broker.core.access import Grant, Role, may_speak, role_name
from broker.core.attaching import Attaching
from broker.core.broadcasts import Broadcasts, reaches
from broker.core.commands import CommandError, read_params
from broker.core.errors import ENDED_HERE
from broker.core.events import Asked, CloseLink
from broker.core.messages import EMPTY, Body
from broker.core.options import OptionError, merge
from broker.core.outcomes import outcome_of
from broker.core.refusals import DUPLICATE, Refusal, Refusals
from broker.core.registry import Endpoint
from broker.core.requests import Requests
from broker.core.sessions import Session
from broker.core.state import State
from broker.core.topics import Topic, topic_of

LIST_MAX = 10_000
"""rows of one listing; the oldest come first"""
OWN_LIST_MAX = 1000
"""the same, of who is no administrator: 10 ms"""
LIST_KEPT_FROM, LIST_KEPT_S_PER_ROW = 100, 0.0001
"""A listing of endpoints with at least so many rows is kept for so long, in seconds per row."""
LISTS_KEPT = 16
INFO_MAX_BYTES = 65_536
"""of the `info` of one registration → invalid"""

_ANY_ROLE: int = (Role.CALLER | Role.WORKER | Role.LISTENER).value  # asked once per row of a listing

_encode = msgspec.json.Encoder().encode


class OwnMethods:
    """Answers what is asked of the broker itself. `commands` is the table of all methods but `broker.call`."""

    __slots__ = ("_listed", "attaching", "broadcasts", "commands", "refusals", "requests", "state")

    def __init__(
        self, state: State, refusals: Refusals, requests: Requests, broadcasts: Broadcasts, attaching: Attaching
    ) -> None:
        self.state = state
        self.refusals, self.requests = refusals, requests
        self.broadcasts, self.attaching = broadcasts, attaching
        self._listed: dict[tuple[Grant, ...], tuple[float, int, Body]] = {}  # when, rows, text
        self.commands: dict[str, Callable[[Asked, float], object]] = {
            "broker.serve": self._serve,
            "broker.unserve": self._unserve,
            "broker.subscribe": self._subscribe,
            "broker.unsubscribe": self._unsubscribe,
            "broker.publish": self._publish,
            "broker.endpoints": self._list_endpoints,
            "broker.describe": self._describe,
            "broker.ping": self._ping,
            "broker.pending": self._list_own,
            "broker.admin.peers": self._list_peers,
            "broker.admin.pending": self._list_pending,
            "broker.admin.memory": self._memory,
            "broker.admin.cancel": self._admin_cancel,
            "broker.admin.close": self._admin_close,
        }

    def asked(self, event: Asked, now: float) -> None:
        """Do one of them and end the request; `broker.call` goes the way of what it asks for."""
        session, wire_id = event.session, event.wire_id
        if session.link is None:  # said before it left, heard after
            return
        if wire_id is None:
            self.state.counters.notifications += 1
        elif wire_id in session.requests:
            self.refusals.refuse(event, errors.DUPLICATE_ID, DUPLICATE)
            return
        try:
            if event.method == "broker.call":
                self._call(event, now)
                return
            result = self._find(event)(event, now)
        except CommandError as error:
            self.refusals.refuse(event, errors.INVALID_PARAMS, f"{event.method}: {error}")
        except Refusal as refusal:
            self.refusals.refuse(event, refusal.kind, str(refusal), bound=refusal.bound)
        else:
            if wire_id is not None:
                body = result if isinstance(result, Body) else Body(_encode(result))
                self.refusals.end(session, wire_id, ENDED_HERE, body)
            self.broadcasts.go_on()  # behind the answer of who asked for it

    def _find(self, event: Asked) -> Callable[[Asked, float], object]:
        if event.method.startswith("broker.admin.") and not event.session.is_admin:
            raise Refusal(errors.DENIED, f"{event.session.who} is no administrator")
        command = self.commands.get(event.method)
        if command is None:
            raise Refusal(errors.NO_METHOD, f"the broker's own methods are broker.call, {', '.join(self.commands)}")
        return command

    def _call(self, event: Asked, now: float) -> None:
        params = read_params(event.body.raw, commands.CallParams)
        name = _named(event, params.endpoint)
        if params.method.startswith("broker."):
            raise CommandError("methods that begin with broker. are called directly")
        try:
            options = merge(params, event.options)
        except OptionError as error:
            raise CommandError(str(error)) from None
        options = msgspec.structs.replace(options, meta=event.options.meta or options.timing)
        body = Body(params.params, event.body.attachments)
        asked = Asked(event.session, event.wire_id, name, params.method, body, options)
        if event.wire_id is None:
            self.requests.notify(asked, now)
        else:
            self.requests.asked(asked, now)

    # ------------------------------------------------------------ serving

    def _serve(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.ServeParams)
        declared_max = self.state.limits.methods_declared_max
        if params.methods is not None and len(params.methods) > declared_max:
            raise CommandError(f"more than {declared_max} methods")
        if len(params.info) > INFO_MAX_BYTES:
            raise CommandError(f"info of {len(params.info)} bytes is above the bound of {INFO_MAX_BYTES}")
        endpoint = self._endpoint(event, params.endpoint, Role.WORKER)
        session = event.session
        if endpoint not in session.registrations:
            self._one_more_name(session)
        methods = None if params.methods is None else frozenset(params.methods)
        capacity = params.capacity or session.capacity
        times = params.deadline, params.idle
        self.attaching.serve(session, endpoint, methods, capacity, Body(params.info), now, times)
        return {"endpoint": endpoint.name, "peer": self.state.peer_name(session)}

    def _unserve(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.UnserveParams)
        name, endpoint = self._known(event, params.endpoint, Role.WORKER)
        served = endpoint is not None and self.attaching.unserve(event.session, endpoint, now)
        return {"endpoint": name, "served": served}

    def _known(self, event: Asked, name: str | None, role: Role) -> tuple[str, Endpoint | None]:
        """The endpoint a method is about, by name and, if it is known, itself, if the session has the role there."""
        session, name = event.session, _named(event, name)
        if not session.may(role, name):
            raise Refusal(errors.DENIED, f"{session.who} may not be {role_name(role)} at {name}")
        endpoint = self.state.registry.by_name.get(name)
        if endpoint is not None and endpoint.limits.closed:
            raise Refusal(errors.DENIED, endpoint.why_closed)
        return name, endpoint

    def _endpoint(self, event: Asked, name: str | None, role: Role) -> Endpoint:
        """The same, made known if it was not: for methods after which something hangs on it."""
        name, known = self._known(event, name, role)
        endpoint = known or self.state.registry.get_or_make(name)
        if endpoint is None:
            raise _overloaded("endpoints", f"{self.state.limits.endpoints_known_max} endpoints are in use")
        return endpoint

    def _one_more_name(self, session: Session) -> None:
        names_max = self.state.limits.names_per_session_max
        if len(session.registrations) + len(session.subscriptions) >= names_max:
            raise _overloaded("names", f"{names_max} endpoints and topics of this session")

    # ------------------------------------------------------------ listening, publishing

    def _subscribe(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.SubscribeParams)
        endpoint = self._endpoint(event, params.endpoint, Role.LISTENER)
        known = endpoint.topics.get(params.topic)
        if known is None or event.session not in known.subscribers:
            self._one_more_name(event.session)
        topic = self._topic(endpoint, params.topic)
        self.broadcasts.prune(topic, now)
        epoch = self._epoch(topic)
        if params.since is None:
            topic.subscribe(event.session)
        else:
            void = params.since > topic.seq or params.epoch not in (None, epoch)
            self.broadcasts.hear_again(event.session, topic, 0 if void else params.since)
        self.state.moved(event.session)
        first = topic.history.first or topic.seq + 1
        return {"endpoint": endpoint.name, "topic": topic.name, "seq": topic.seq, "first": first, "epoch": epoch}

    def _epoch(self, topic: Topic) -> str:
        """Names the life of a topic, within which its numbers count."""
        return f"{self.state.node}.{topic.number}" if topic.number else self.state.node

    def _unsubscribe(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.SubscribeParams)
        name, endpoint = self._known(event, params.endpoint, Role.LISTENER)
        topic = endpoint.topics.get(params.topic) if endpoint else None
        subscribed = topic is not None and self.broadcasts.leave(event.session, topic)
        self.state.moved(event.session)
        return {"endpoint": name, "topic": params.topic, "subscribed": subscribed}

    def _topic(self, endpoint: Endpoint, name: str | None) -> Topic:
        topics_max = self.state.limits.topics_per_endpoint_max
        topic = endpoint.topics.get(name)
        if topic is None:
            self.state.topics_made += 1
            topic = topic_of(endpoint, name, topics_max, self.state.topics_made)
        if topic is None:
            raise _overloaded("topics", f"{topics_max} topics of {endpoint.name} are in use")
        return topic

    def _publish(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.PublishParams)
        body = Body(params.data, event.body.attachments)
        bound = self.broadcasts.bound_reached()
        if bound:
            limits = self.state.limits
            memory = f"{self.state.budget.used} bytes wait here, more than {limits.memory_hard_bytes}"
            raise _overloaded(bound, memory if bound == "memory" else f"{limits.fanouts_max} broadcasts are under way")
        if params.topic is not None and params.topic.startswith("broker."):
            raise CommandError(f"topic {params.topic}: names that begin with broker. are the broker's own")
        session = event.session
        if params.to is not None:
            return self._publish_to(session, params.to, params, body)
        if params.endpoint is None and params.topic is None:
            _speaks(session)
            return {"seq": None, "listeners": self.broadcasts.to_all(session, body)}
        _, endpoint = self._known(event, params.endpoint, Role.CALLER | Role.WORKER)
        topic = endpoint.topics.get(params.topic) if endpoint else None
        if endpoint is not None and topic is None and (params.topic is None or endpoint.limits.history):
            topic = self._topic(endpoint, params.topic)
        if topic is None:
            return {"seq": None, "listeners": 0}
        self.broadcasts.to_topic(topic, body, now)
        return {"seq": topic.seq, "listeners": len(topic.subscribers)}

    def _publish_to(self, session: Session, to: str, params: commands.PublishParams, body: Body) -> object:
        _speaks(session)
        target = self.state.peer(to)
        if target is None or not reaches(session, target):
            raise CommandError(f"no peer {to!r} within reach")
        self.broadcasts.to_one(target, params.endpoint, params.topic, body)
        return {"seq": None, "listeners": 1}

    # ------------------------------------------------------------ looking

    def _list_endpoints(self, event: Asked, now: float) -> object:
        """What the grants let one see. A long listing is kept for a while, so that making them takes a tenth of the
        time at most: 10,000 rows cost 80 ms and are kept for a second.
        """
        read_params(event.body.raw, commands.NoParams)
        grants = event.session.grants
        made_at, rows, body = self._listed.get(grants, (0.0, 0, EMPTY))
        if rows < LIST_KEPT_FROM or now - made_at > rows * LIST_KEPT_S_PER_ROW:
            endpoints = islice(self.state.registry.by_name.values(), LIST_MAX)
            listed = [commands.view_endpoint(each) for each in endpoints if _sees(event.session, each.name)]
            body, rows = Body(_encode(listed)), len(listed)
            if len(self._listed) >= LISTS_KEPT:
                self._listed.clear()
            self._listed[grants] = now, rows, body
        return body

    def _describe(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.EndpointParams)
        name = _named(event, params.endpoint)
        if not _sees(event.session, name):
            raise Refusal(errors.DENIED, f"{event.session.principal} has no role at {name}")
        endpoint = self.state.registry.by_name.get(name)
        if endpoint is None:
            raise Refusal(errors.NO_ENDPOINT, f"no worker has served {name} since the broker started")
        view = msgspec.structs.asdict(commands.view_endpoint(endpoint))
        return view | {"workers": commands.view_workers(endpoint, self.state.peer_name)}

    def _ping(self, event: Asked, now: float) -> object:
        state = self.state
        uptime_s = round(now - state.started_at, 3)
        return {"node": state.node, "peer": state.peer_name(event.session), "uptime_s": uptime_s, "version": VERSION}

    def _list_own(self, event: Asked, now: float) -> object:
        """The live requests of this session's principal, over all its sessions, and nobody else's."""
        params = read_params(event.body.raw, commands.PendingParams)
        principal = event.session.principal
        found = (
            request
            for session in self.state.sessions.by_id.values()
            if session.principal == principal
            for request in session.requests.values()
            if params.fits(request)
        )
        return commands.view_pending(islice(found, OWN_LIST_MAX), self.state.peer_name, now)

    # ------------------------------------------------------------ administration

    def _list_peers(self, event: Asked, now: float) -> object:
        read_params(event.body.raw, commands.NoParams)
        sessions = islice(self.state.sessions.by_id.values(), LIST_MAX)
        return commands.view_peers(sessions, self.state.peer_name, now)

    def _list_pending(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.PendingParams)
        found = (request for request in self.state.requests() if params.fits(request))
        return commands.view_pending(islice(found, LIST_MAX), self.state.peer_name, now)

    def _memory(self, event: Asked, now: float) -> object:
        read_params(event.body.raw, commands.NoParams)
        state, limits = self.state, self.state.limits
        held = state.held() | {"outboxes": state.budget.outboxes}
        held = {"requests": state.budget.used - sum(held.values())} | held
        return {"used": state.budget.used, **held, "soft": limits.memory_soft_bytes, "hard": limits.memory_hard_bytes}

    def _admin_cancel(self, event: Asked, now: float) -> object:
        number = read_params(event.body.raw, commands.CancelParams).request
        request = next((each for each in self.state.requests() if each.id == number), None)
        if request is not None:
            self.requests.stop(request, outcome_of(errors.CANCELLED, request, now, cause="admin"), now)
        return {"request": number, "cancelled": request is not None}

    def _admin_close(self, event: Asked, now: float) -> object:
        params = read_params(event.body.raw, commands.CloseParams)
        target = self.state.peer(params.peer)
        if target is not None and not self.attaching.forget(target, now):
            self.state.effects.append(CloseLink(target, errors.FORBIDDEN, params.reason))
        return {"peer": params.peer, "closed": target is not None}


def _named(event: Asked, name: str | None) -> str:
    """The endpoint named, or else the link's own."""
    name = name or event.session.endpoint
    if name is None:
        raise CommandError("endpoint is missing, and this link is attached to none")
    return name


def _speaks(session: Session) -> None:
    if not may_speak(session.grants):
        raise Refusal(errors.DENIED, f"{session.who} may only listen")


def _sees(session: Session, name: str) -> bool:
    return session.may(_ANY_ROLE, name)


def _overloaded(bound: str, detail: str) -> Refusal:
    return Refusal(errors.OVERLOADED, detail, bound=bound)
