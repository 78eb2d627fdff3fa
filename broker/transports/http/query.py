"""What may stand in the query of an HTTP route."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import msgspec

from broker.auth.facts import Refused, RequestFacts
from broker.core.messages import DEFAULT_OPTIONS, Options
from broker.core.options import OptionError, Written, merge

OPTIONS = ("timeout", "wait", "idempotent", "retries")
"""options of a request that a query may set"""


class QueryError(Refused):
    """400: a parameter that is unknown or wrong; the reason names it and what would be right."""

    def __init__(self, reason: str) -> None:
        super().__init__(400, reason)


class _Query(msgspec.Struct, kw_only=True):
    timeout: float | None = None
    wait: bool | None = None
    idempotent: bool | None = None
    retries: int | None = None


def check_names(facts: RequestFacts, names: Sequence[str]) -> dict[str, str]:
    """The parameters of the query, the ticket left out. Raises QueryError for an unknown one and for one given twice.

    A misspelt option that was passed over would be an option that silently does not hold.
    """
    given: dict[str, str] = {}
    for name, value in facts.query:
        if name == "ticket":
            continue
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            there_are = f"there are {', '.join(names)}" if names else "this path takes none"
            hint = f"did you mean {near[0]}=?" if near else there_are
            raise QueryError(f"unknown parameter {name[:40]!r}; {hint}")
        if name in given:
            raise QueryError(f"{name}= is given twice")
        given[name] = value
    return given


def read_options(given: dict[str, str], *, trace: str | None = None) -> Options:
    """The options among the parameters, with what the reply is to tell. Raises QueryError naming a wrong one."""
    try:
        read = msgspec.convert({name: given[name] for name in OPTIONS if name in given}, _Query, strict=False)
        written = Written(
            timeout=read.timeout, wait=read.wait, idempotent=read.idempotent, retries=read.retries, trace=trace
        )
        return merge(written, DEFAULT_OPTIONS)
    except (msgspec.ValidationError, OptionError) as error:
        raise QueryError(str(error).replace("`$.", "`")) from None
