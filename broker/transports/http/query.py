"""What may stand in the query of an HTTP route."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from broker.auth.facts import Refused, RequestFacts
from broker.core.messages import DEFAULT_OPTIONS, Options
from broker.core.options import OptionError, Written, merge
from broker.core.wrong import hint_for, what_is_wrong

OPTIONS = ("timeout", "idle", "wait", "idempotent", "retries", "priority", "group")
"""options of a request that a query may set; `progress` too where something can be told before the end"""


class QueryError(Refused):
    """400: a parameter that is unknown or wrong; the reason names it and what would be right."""

    def __init__(self, reason: str) -> None:
        super().__init__(400, reason)


class _Query(msgspec.Struct, kw_only=True):
    timeout: float | None = None
    idle: float | None = None
    wait: bool | None = None
    idempotent: bool | None = None
    retries: int | None = None
    priority: int | None = None
    group: str | None = None
    progress: bool | None = None


def check_names(facts: RequestFacts, names: Sequence[str]) -> dict[str, str]:
    """The parameters of the query, the ticket left out. Raises QueryError for an unknown one and for one given twice.

    A misspelt option that was passed over would be an option that silently does not hold.
    """
    given: dict[str, str] = {}
    for name, value in facts.query:
        if name == "ticket":
            continue
        if name not in names:
            raise QueryError(f"unknown parameter {name[:40]!r}; {hint_for(name, names, '{}=')}")
        if name in given:
            raise QueryError(f"{name}= is given twice")
        given[name] = value
    return given


def read_options(
    given: dict[str, str], *, trace: str | None = None, key: str | None = None, stream: str | None = None
) -> Options:
    """The options among the parameters, with what the reply is to tell. Raises QueryError naming a wrong one."""
    named = {name: given[name] for name in (*OPTIONS, "progress") if name in given}
    try:
        read = msgspec.convert(named, _Query, strict=False)
        written = Written(
            timeout=read.timeout, idle=read.idle, wait=read.wait, idempotent=read.idempotent, retries=read.retries,
            priority=read.priority, group=read.group, trace=trace, key=key, stream=stream, progress=read.progress,
        )  # fmt: skip
        return merge(written, DEFAULT_OPTIONS)
    except msgspec.ValidationError as error:
        raise QueryError(what_is_wrong(error, given=named)) from None
    except OptionError as error:
        raise QueryError(str(error)) from None
