"""The hot path in C, where it was built: frames to events, events through the router's tables, messages to frames.

All of them are None where there is no compiled module. They take over only what is common and right; whatever else
comes goes by the Python they stand beside, as if they were not there: `get_buffer` and `buffer_updated` (of
`links.socket`), `Reader` (`frames`, `jsonrpc`), `Feeder` (`Engine.feed_all`), `Matcher` (`core.requests`), `Writer`
(`jsonrpc`, `frames`), `spread` (a broadcast for many sessions), `flush_all` and `flush` (of `links.link`). A request
with its reply costs 1.6 µs between the bytes read and the bytes written, without them 11.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.access import Role
from broker.core.budget import SMALL_BYTES, Budget
from broker.core.counters import Counters
from broker.core.deadlines import Deadlines
from broker.core.dispatch import LEVELS_MAX, LeastPending
from broker.core.errors import ENDED_OK
from broker.core.events import Answered, Asked, Deliver
from broker.core.messages import Body, Call, End, Options, ReplyMeta
from broker.core.pending import ASSIGNED, DONE, ENDED, Attempt, Pending, Request
from broker.core.queue import Queue
from broker.core.registry import Endpoint, Registration
from broker.core.sessions import Session
from broker.core.state import State

if TYPE_CHECKING:
    from broker.core.router import Router

try:
    from broker.wire._native import (
        Feeder,
        Matcher,
        Reader,
        Writer,
        buffer_updated,
        flush,
        flush_all,
        get_buffer,
        know,
        know_core,
        know_outbox,
        know_peer,
        know_socket,
        spread,
    )

    know(Asked, Answered, Body, Call, End, Attempt, Request, Options, ReplyMeta, ENDED_OK)
    tables = State, Pending, Deadlines, Counters, Budget, Registration, Endpoint, LeastPending, Queue
    know_core((Session, *tables, Deliver), LEVELS_MAX, SMALL_BYTES)
except ImportError:  # not built, or for another layout of the objects than they have here
    Feeder = Matcher = Reader = Writer = flush = spread = know_outbox = know_peer = know_socket = None  # type: ignore[assignment, misc]
    buffer_updated = flush_all = get_buffer = None  # type: ignore[assignment]

__all__ = [
    "Feeder", "Matcher", "Reader", "Writer", "buffer_updated", "flush", "flush_all", "get_buffer", "know_outbox",
    "know_peer", "know_socket", "match_for", "spread",
]  # fmt: skip


def match_for(router: Router) -> None:
    """Let a Matcher take plain requests through this router's tables; its handlers go on to judge all others."""
    handlers = router.handlers
    matcher = Matcher(
        router.requests,
        handlers[Asked],
        handlers[Answered],
        ASSIGNED,
        ENDED,
        DONE,
        Role.CALLER.value,
        ENDED_OK.kind.name,
    )
    handlers[Asked], handlers[Answered] = matcher.asked, matcher.answered
