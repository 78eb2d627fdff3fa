"""What a WebSocket peer says of itself in the query of its URL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from broker.auth.facts import Refused
from broker.core.access import Role, is_name
from broker.core.messages import DEFAULT_OPTIONS, Options
from broker.core.options import OptionError, Written, merge
from broker.core.wrong import hint_for, what_is_wrong

ROLES = {"caller": Role.CALLER, "worker": Role.WORKER, "listener": Role.LISTENER}


class QueryError(ValueError):
    """A parameter that is unknown or wrong; the text names it and what would be right."""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """How a peer wants to be attached. `listen` None: as is usual for its role.

    `grace_s` is how long its session shall outlive its link, `received` the last message it got of the one it resumes;
    with `lsp` a token in its params asks for progress.
    """

    role: Role = Role.CALLER
    listen: bool | None = None
    meta: bool = False
    binary: bool = False
    capacity: int | None = None
    grace_s: float = 0.0
    received: int = 0
    lsp: bool = False
    defaults: Options = DEFAULT_OPTIONS

    @property
    def hears(self) -> bool:
        """Whether broadcasts reach it: workers only if they ask, others unless they decline."""
        return self.role != Role.WORKER if self.listen is None else self.listen


class _Query(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: str = "caller"
    listen: bool | None = None
    meta: bool = False
    binary: bool = False
    capacity: int | None = None
    timeout: float | None = None
    idempotent: bool | None = None
    retries: int | None = None
    wait: bool | None = None
    trace: str | None = None
    priority: int | None = None
    idle: float | None = None
    group: str | None = None
    stream: str | None = None
    progress: bool | None = None
    timing: bool | None = None
    grace: float = 0.0
    received: int = 0
    lsp: bool = False


def read_attachment(endpoint: str, pairs: Iterable[tuple[str, str]]) -> Attachment:
    """How a peer wants to be attached to an endpoint ("" for none), from names and values. Raises Refused 400."""
    if endpoint and not is_name(endpoint):
        raise Refused(400, f"{endpoint[:128]!r} is no name of an endpoint")
    query: dict[str, list[str]] = {}
    for name, value in pairs:
        query.setdefault(name, []).append(value)
    try:
        attachment = read_query(query)
    except QueryError as error:
        raise Refused(400, str(error)) from None
    if attachment.role == Role.WORKER and not endpoint:
        raise Refused(400, "role=worker goes with an endpoint, as in /ws/{endpoint}; without one call broker.serve")
    return attachment


def read_query(query: Mapping[str, Sequence[str]]) -> Attachment:
    """The parameters, each given once; the ticket is not looked at. Raises QueryError."""
    given: dict[str, str] = {}
    for name, values in query.items():
        if name == "ticket":
            continue
        if name not in _Query.__struct_fields__:
            hint = hint_for(name, _Query.__struct_fields__, "{}=")
            raise QueryError(f"unknown parameter {name[:40]!r}; {hint}")
        if len(values) != 1:
            raise QueryError(f"{name}= is given {len(values)} times")
        given[name] = values[0]
    try:
        read = msgspec.convert(given, _Query, strict=False)
    except msgspec.ValidationError as error:
        raise QueryError(what_is_wrong(error, given=given)) from None
    role = ROLES.get(read.role)
    if role is None:
        raise QueryError(f"role={read.role[:40]!r} is none of {', '.join(ROLES)}")
    if read.capacity is not None and not 1 <= read.capacity <= 1_000_000:
        raise QueryError(f"capacity={read.capacity} is not between 1 and 1000000")
    if read.capacity is not None and role != Role.WORKER:
        raise QueryError("capacity= is a worker's: give role=worker with it")
    if not 0 <= read.grace < float("inf"):
        raise QueryError(f"grace={read.grace} is no number of seconds")
    if read.received < 0:
        raise QueryError(f"received={read.received} is no number of a message")
    written = Written(
        timeout=read.timeout, idempotent=read.idempotent, retries=read.retries, wait=read.wait, trace=read.trace,
        priority=read.priority, idle=read.idle, group=read.group, stream=read.stream, progress=read.progress,
        timing=read.timing,
    )  # fmt: skip
    try:
        defaults = merge(written, DEFAULT_OPTIONS)
    except OptionError as error:
        raise QueryError(str(error)) from None
    return Attachment(
        role=role,
        listen=read.listen,
        meta=read.meta,
        binary=read.binary,
        capacity=read.capacity,
        grace_s=read.grace,
        received=read.received,
        lsp=read.lsp,
        defaults=msgspec.structs.replace(defaults, meta=read.meta or bool(read.timing)),
    )
