"""How a broker stands: its tables, counters, levels, marks and timers, as text that can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from broker.core.dispatch import LeastPending
from broker.core.pending import Request
from broker.core.registry import Endpoint
from broker.core.router import Router
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links.limits import LinkCounters
from broker.links.socket import SocketLink


def standing(
    router: Router, engine: Engine, counters_of_links: LinkCounters, links: Sequence[SocketLink]
) -> dict[str, str]:
    """All tables, counters, levels, marks and timers, as text."""
    state, pending, counters = router.state, router.pending, router.counters
    endpoints = router.registry.by_name
    found: dict[str, object] = {
        "counters": {name: getattr(counters, name) for name in counters.__slots__},
        "counters of the links": counters_of_links,
        "endpoints": {name: told_of_endpoint(endpoint) for name, endpoint in endpoints.items()},
        "sessions": [told_of_session(session) for session in router.sessions.by_id.values()],
        "requests": [told_of_request(request) for request in state.requests()],
        "links": [told_of_link(link) for link in links],
        "budget": (state.budget.used, state.budget.outboxes),
        "pending": (pending.count, pending.requests_made, pending.attempts_made),
        "timers": (pending.deadlines.earliest, router.sessions.expiry.earliest, engine.timer_at),
        "effects": router.effects,
    }
    return {name: repr(value) for name, value in found.items()}


def told_of_endpoint(endpoint: Endpoint) -> tuple[object, ...]:
    registrations = endpoint.registrations.values()
    loads = [(each.session.id, each.load, each.free, each.capacity) for each in registrations]
    free = endpoint.free
    if not isinstance(free, LeastPending):
        return loads, len(endpoint.queue)
    levels = [[each.session.id for each in level] for level in free._levels]
    return loads, len(endpoint.queue), levels, free._lowest, free._size


def told_of_session(session: Session) -> tuple[object, ...]:
    requests = [(wire_id, request.id) for wire_id, request in session.requests.items()]
    received = None if session.kept is None else session.kept.received
    return session.id, requests, list(session.attempts), session.strikes, session.congested, session.draining, received


def told_of_request(request: Request) -> tuple[object, ...]:
    attempt = request.attempt
    sent = attempt and (attempt.id, attempt.mark, attempt.sent_at, attempt.state.value, attempt.session.id)
    names = request.id, request.session.id, request.wire_id
    times = request.accepted_at, request.deadline, request.sent_at, request.spent_s
    return names, times, request.held, request.state.value, request.attempts, sent


def told_of_link(link: SocketLink) -> tuple[object, ...]:
    return link.enqueued, link.flushed, link._state, link._congested, link.blocked, link.paused, link.heard, link.dirty
