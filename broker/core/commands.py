"""The broker's own methods: their parameters, checked, and what the listings say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from broker.core.access import NAME, Role
from broker.core.messages import Raw
from broker.core.options import Written
from broker.core.pending import ASSIGNED, QUEUED
from broker.core.wrong import what_is_wrong

if TYPE_CHECKING:
    from broker.core.pending import Request
    from broker.core.registry import Endpoint
    from broker.core.sessions import Session
    from broker.core.streams import Flow

INFO_SHOWN_MAX_BYTES = 1 << 20
"""of `info` in one `broker.describe`"""

Name = Annotated[str, msgspec.Meta(pattern=f"^(?:{NAME.pattern})\\Z")]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_622_400)]


class CommandError(ValueError):
    """Parameters that are wrong; the text says which and what would be right."""


class CallParams(Written, forbid_unknown_fields=True, kw_only=True):
    """`broker.call`: ask an endpoint from a library that can add no member to its messages."""

    endpoint: Name | None = None
    method: Name
    params: msgspec.Raw = msgspec.Raw(b"")


class ServeParams(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`broker.serve`: become a worker of an endpoint. `info` is shown to who asks `broker.describe`.

    `deadline` and `idle`, in seconds, hold for requests whose callers name none.
    """

    endpoint: Name | None = None
    methods: list[Name] | None = None
    capacity: Count | None = None
    deadline: Seconds | None = None
    idle: Seconds | None = None
    info: msgspec.Raw = msgspec.Raw(b"")


class UnserveParams(msgspec.Struct, forbid_unknown_fields=True):
    """`broker.unserve`: be no worker of it any more."""

    endpoint: Name | None = None


class SubscribeParams(msgspec.Struct, forbid_unknown_fields=True):
    """`broker.subscribe`, `broker.unsubscribe`: an endpoint's broadcasts, or those of one of its topics."""

    endpoint: Name | None = None
    topic: Name | None = None
    since: Annotated[int, msgspec.Meta(ge=0)] | None = None
    epoch: str | None = None


class PublishParams(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`broker.publish`: to an endpoint's listeners, a topic's subscribers, one peer (`to`), or everybody."""

    endpoint: Name | None = None
    topic: Name | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")
    to: str | None = None


class EndpointParams(msgspec.Struct, forbid_unknown_fields=True):
    """`broker.describe`, `broker.endpoints`: which endpoint."""

    endpoint: Name | None = None


class PendingParams(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`broker.pending`, `broker.admin.pending`: of which endpoint, trace, or number; without any, all.

    `trace` is a whole `meta.trace`, or the trace id within a W3C traceparent.
    """

    endpoint: Name | None = None
    trace: str | None = None
    request: int | None = None

    def fits(self, request: Request) -> bool:
        """Whether it is asked about."""
        return (
            (self.request is None or request.id == self.request)
            and (self.endpoint is None or request.endpoint.name == self.endpoint)
            and (self.trace is None or _is_trace(self.trace, request.options.trace))
        )


class CancelParams(msgspec.Struct, forbid_unknown_fields=True):
    """`broker.admin.cancel`: the broker's own number of a request, as `broker.admin.pending` lists it."""

    request: int


class CloseParams(msgspec.Struct, forbid_unknown_fields=True):
    """`broker.admin.close`: end a peer's link."""

    peer: str
    reason: str = "closed by an administrator"


class NoParams(msgspec.Struct, forbid_unknown_fields=True):
    """Methods without parameters."""


Params = TypeVar("Params", bound=msgspec.Struct)


def read_params(raw: Raw, kind: type[Params]) -> Params:
    """The parameters by name. None at all is the same as an empty object. Raises CommandError."""
    if not memoryview(raw).nbytes:
        raw = b"{}"
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise CommandError(what_is_wrong(error, kind.__struct_fields__, whole="params")) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise CommandError(str(error)) from None


# ---------------------------------------------------------------- listings


class EndpointView(msgspec.Struct, kw_only=True):
    """One endpoint as `broker.endpoints` lists it."""

    endpoint: str
    workers: int
    free: int
    queued: int
    executing: int
    listeners: int
    policy: str
    closed: str


class WorkerView(msgspec.Struct, kw_only=True):
    """One worker of an endpoint as `broker.describe` shows it."""

    peer: str
    methods: list[str] | None
    capacity: int
    executing: int
    info: msgspec.Raw


class PeerView(msgspec.Struct, kw_only=True):
    """One session as `broker.admin.peers` lists it. Times in seconds."""

    peer: str
    principal: str
    role: str
    endpoint: str | None
    serves: list[str]
    dialect: str
    remote: str
    requests: int
    executing: int
    connected_s: float
    congested: bool
    suspended: bool
    strikes: int
    nameless_replies: int


class FlowView(msgspec.Struct):
    """One direction of a stream: the parts that were passed on and their bytes, the parts that may still come now."""

    parts: int
    bytes: int
    credit: int
    ended: bool


class PendingView(msgspec.Struct, kw_only=True):
    """One live request as `broker.pending` and `broker.admin.pending` list it. Times in seconds.

    `state` is `queued`, `executing`, `streaming`, or `joined` to the request `leader` by its key; `joined` is how many
    have joined this one. `place` counts those that wait at the endpoint in the order they were asked, from 1; as
    callers take turns, a later one may be given out first. `up` goes from the caller to the worker.
    """

    request: int
    peer: str
    principal: str
    endpoint: str
    method: str
    state: str
    place: int | None
    worker: str | None
    attempts: int
    age_s: float
    left_s: float
    idle_left_s: float | None
    up: FlowView | None
    down: FlowView | None
    priority: int
    key: str | None
    group: str | None
    leader: int | None
    joined: int
    trace: str | None


def view_endpoint(endpoint: Endpoint) -> EndpointView:
    """What is to be said of an endpoint."""
    workers = endpoint.registrations.values()
    return EndpointView(
        endpoint=endpoint.name,
        workers=len(workers),
        free=len(endpoint.free),
        queued=len(endpoint.queue),
        executing=sum(worker.load for worker in workers),
        listeners=endpoint.listeners,
        policy=endpoint.limits.policy,
        closed=endpoint.limits.closed,
    )


def view_workers(endpoint: Endpoint, peer_name: PeerNames) -> list[WorkerView]:
    """The workers of an endpoint, in the order they came; `info` only as long as all together are below a bound."""
    views, room = [], INFO_SHOWN_MAX_BYTES
    for worker in endpoint.registrations.values():
        info = bytes(worker.info.raw) or b"null"
        room -= len(info)
        views.append(
            WorkerView(
                peer=peer_name(worker.session),
                methods=None if worker.methods is None else sorted(worker.methods),
                capacity=worker.capacity,
                executing=worker.load,
                info=msgspec.Raw(info if room >= 0 else b"null"),
            )
        )
    return views


def view_peers(sessions: Iterable[Session], peer_name: PeerNames, now: float) -> list[PeerView]:
    """Every session, in the order they came."""
    return [
        PeerView(
            peer=peer_name(session),
            principal=session.principal,
            role=(Role(session.role).name or "").lower(),
            endpoint=session.endpoint,
            serves=[endpoint.name for endpoint in session.registrations],
            dialect=session.dialect,
            remote=session.remote,
            requests=len(session.requests),
            executing=len(session.attempts),
            connected_s=round(now - session.attached_at, 3),
            congested=session.congested,
            suspended=session.lost_link is not None,
            strikes=len(session.strikes),
            nameless_replies=session.nameless_replies,
        )
        for session in sessions
    ]


def view_pending(requests: Iterable[Request], peer_name: PeerNames, now: float) -> list[PendingView]:
    """Live requests: where each is, who has it, how far it is, how old it is."""
    places: dict[Endpoint, dict[Request, int]] = {}
    return [_view_request(request, peer_name, now, places) for request in requests]


def _view_request(
    request: Request, peer_name: PeerNames, now: float, places: dict[Endpoint, dict[Request, int]]
) -> PendingView:
    options, stream, endpoint, work = request.options, request.stream, request.endpoint, request.work
    place = None
    if request.state is QUEUED:
        if endpoint not in places:
            places[endpoint] = {each: number for number, each in enumerate(endpoint.queue, 1)}
        place = places[endpoint].get(request)
    leader = None if work is None or work.leader is request else work.leader
    attempt = (leader or request).attempt
    return PendingView(
        request=request.id,
        peer=peer_name(request.session),
        principal=request.session.principal,
        endpoint=endpoint.name,
        method=request.method,
        state="executing" if request.state is ASSIGNED else request.state.value,
        place=place,
        worker=peer_name(attempt.session) if attempt else None,
        attempts=request.attempts,
        age_s=round(now - request.accepted_at, 3),
        left_s=round(request.deadline - now, 3),
        idle_left_s=None if stream is None else round(stream.touched_at + stream.idle_s - now, 3),
        up=_view_flow(stream.up) if stream and options.stream_out else None,
        down=_view_flow(stream.down) if stream else None,
        priority=options.priority,
        key=options.key,
        group=options.group,
        leader=leader.id if leader else None,
        joined=len(work.joined) if work and leader is None else 0,
        trace=options.trace,
    )


def _view_flow(flow: Flow) -> FlowView:
    return FlowView(flow.next_seq, flow.bytes, flow.told - flow.next_seq, flow.ended)


def _is_trace(given: str, trace: str | None) -> bool:
    """Whether this is the trace, or the trace id of a traceparent (W3C Trace Context, section 3.2)."""
    return trace is not None and (trace == given or (len(given) == 32 and trace.split("-")[1:2] == [given]))


if TYPE_CHECKING:
    from collections.abc import Callable

    PeerNames = Callable[[Session], str]
