"""What a WebSocket peer says of itself in the query of its URL."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import msgspec

from broker.core.access import Role
from broker.core.messages import DEFAULT_OPTIONS, Options
from broker.core.options import OptionError, Written, merge

ROLES = {"caller": Role.CALLER, "worker": Role.WORKER, "listener": Role.LISTENER}
LATER = {"grace": "sessions that outlive their link", "received": "sessions that outlive their link", "lsp": "progress"}
"""Parameters the protocol names and this broker does not act on yet."""


class QueryError(ValueError):
    """A parameter that is unknown or wrong; the text names it and what would be right."""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """How a peer wants to be attached. `listen` None: as is usual for its role."""

    role: Role = Role.CALLER
    listen: bool | None = None
    meta: bool = False
    binary: bool = False
    capacity: int | None = None
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


def read_query(query: Mapping[str, Sequence[str]]) -> Attachment:
    """The parameters, each given once; the ticket is not looked at. Raises QueryError."""
    given: dict[str, str] = {}
    for name, values in query.items():
        if name == "ticket":
            continue
        if name in LATER:
            raise QueryError(f"{name}= is not supported by this broker yet ({LATER[name]}); leave it out")
        if name not in _Query.__struct_fields__:
            near = difflib.get_close_matches(name, _Query.__struct_fields__, 1)
            hint = f"; did you mean {near[0]}=?" if near else f"; there are {', '.join(_Query.__struct_fields__)}"
            raise QueryError(f"unknown parameter {name[:40]!r}{hint}")
        if len(values) != 1:
            raise QueryError(f"{name}= is given {len(values)} times")
        given[name] = values[0]
    try:
        read = msgspec.convert(given, _Query, strict=False)
    except msgspec.ValidationError as error:
        raise QueryError(str(error).replace("`$.", "`")) from None
    role = ROLES.get(read.role)
    if role is None:
        raise QueryError(f"role={read.role[:40]!r} is none of {', '.join(ROLES)}")
    if read.capacity is not None and not 1 <= read.capacity <= 1_000_000:
        raise QueryError(f"capacity={read.capacity} is not between 1 and 1000000")
    if read.capacity is not None and role != Role.WORKER:
        raise QueryError("capacity= is a worker's: give role=worker with it")
    written = Written(
        timeout=read.timeout, idempotent=read.idempotent, retries=read.retries, wait=read.wait, trace=read.trace,
        priority=read.priority, idle=read.idle,
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
        defaults=msgspec.structs.replace(defaults, meta=read.meta),
    )
