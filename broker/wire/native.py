"""The wire's hot path in C, where it was built: plain frames to events, plain messages to frames.

All of them are None where there is no compiled module. `Reader` and `Writer` take over only what is common and right;
whatever else comes goes by `frames` and `jsonrpc` as if they were not there. `spread` queues a broadcast for many
sessions, `flush` writes what has gathered on a socket's link. A request with its reply costs 4.3 µs between the
bytes read and the bytes written, without them 11.2.
"""

from __future__ import annotations

from broker.core.errors import ENDED_OK
from broker.core.events import Answered, Asked
from broker.core.messages import Body, Call, End, Options, ReplyMeta
from broker.core.pending import Attempt, Request

try:
    from broker.wire._native import Reader, Writer, flush, know, know_outbox, know_peer, know_socket, spread

    know(Asked, Answered, Body, Call, End, Attempt, Request, Options, ReplyMeta, ENDED_OK)
except ImportError:  # not built, or for another layout of the objects than they have here
    Reader = Writer = flush = spread = know_outbox = know_peer = know_socket = None  # type: ignore[assignment, misc]

__all__ = ["Reader", "Writer", "flush", "know_outbox", "know_peer", "know_socket", "spread"]
