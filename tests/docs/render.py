"""Renders docs/outcomes.md, and the errors in docs/sdk.md, from the tables in the code."""

import inspect
from collections.abc import Iterable

from broker.cli.exits import exit_for, markdown_table
from broker.core.errors import CLOSES, KINDS, Close, Kind
from broker.peer import errors

_PAGE = """\
# Outcomes, close codes, exit codes

<!-- Generated from broker/core/errors.py and broker/cli/exits.py: UPDATE_DOCS=1 pytest tests/docs -->

## Outcomes

Every accepted request ends in exactly one of these. *Code* is JSON-RPC's `error.code`. *HTTP* is the status that goes
with the outcome. *Retryable* is what holds unless `error.data.retryable` says otherwise of this one request; what is
retryable may be sent again as it is. *Exit* is how the command line ends. What `error.data` holds is in
[protocol.md](protocol.md#outcomes).

{outcomes}

¹ true in the first seconds after the broker's start (`limits.start_grace_s`).
² true if the request is idempotent, or was never handed to the worker's socket.
³ true if it was still queued, or is idempotent.
⁴ true if the request is idempotent.
⁵ its own code, message and data; the worker's `meta.retryable` says whether it may be repeated.
⁶ false if a worker was given it and it is not idempotent: it may have run.

## Close codes

How a link ends. *Come back* says whether connecting again makes sense; then with a random pause that grows. Codes
below 4000 are RFC 6455's.

{closes}

## Exit codes

{exits}"""

_NOTES = {
    "no_endpoint": "no ¹",
    "shutting_down": "yes ⁶",
    "worker_lost": "no ²",
    "deadline": "no ³",
    "bad_reply": "no ⁴",
    "worker_error": "as it says ⁵",
}


def outcomes_page() -> str:
    """The whole page."""
    return _PAGE.format(
        outcomes=_table(
            ("outcome", "code", "HTTP", "retryable", "exit", "meaning", "what to do"), map(_outcome, KINDS)
        ),
        closes=_table(("code", "name", "come back", "meaning"), map(_close, CLOSES)),
        exits=markdown_table(),
    )


def errors_table() -> str:
    """The exceptions of the SDK, one row each, with what each has beside what all have."""
    head = ("exception", "outcome", "is also a", "has", "means")
    return _table(
        head, map(_error, (*errors.CLASSES.values(), errors.ConnectionLost, errors.CannotConnect, errors.Refused))
    )


def _error(kind: type[errors.BrokerError]) -> tuple[str, ...]:
    also = [base.__name__ for base in kind.__bases__ if not issubclass(base, errors.BrokerError)]
    common = vars(errors.BrokerError()).keys() | vars(errors.BrokerError).keys()
    own = [name for name in vars(kind("")) | vars(kind) if name not in common and not name.startswith("_")]
    means = " ".join((inspect.getdoc(kind) or "").split())
    return (
        f"`{kind.__name__}`", f"`{kind.outcome}`", ", ".join(f"`{name}`" for name in also),
        ", ".join(f"`{name}`" for name in sorted(own)), means,
    )  # fmt: skip


def _outcome(kind: Kind) -> tuple[str, ...]:
    retryable = _NOTES.get(kind.name) or ("yes" if kind.retryable else "no")
    code = "result" if kind.name == "ok" else str(kind.code)
    if kind.name == "worker_error":
        code = "its own"
    if kind.name == "ok":
        retryable = ""
    return f"`{kind.name}`", code, str(kind.http), retryable, str(int(exit_for(kind.name))), kind.text, kind.advice


def _close(close: Close) -> tuple[str, ...]:
    return str(close.code), f"`{close.name}`", "yes" if close.come_back else "no", close.text


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
