"""The exceptions by which a request, or the connection under it, ends: one class per outcome of the table."""

from __future__ import annotations

from typing import Any

from broker.core import errors as table
from broker.core.errors import Kind

CAUSES = {
    "caller": "by its caller",
    "superseded": "superseded by a newer request",
    "admin": "by an administrator",
}
"""What a cancelled request's text says, by the `cause` that the broker told."""

MAY_HAVE_RUN = "It may have run; look before you repeat it."


class BrokerError(Exception):
    """Whatever this package raises about a request or a connection; the text is one line that says what to do.

    `outcome` is the name in the table of outcomes, `code` JSON-RPC's, `detail` what the broker or the worker said.
    `retryable` is whether repeating the request may help and cannot run it twice, `dispatched` whether a worker was
    ever given it. `worker` is the peer that had it last, `attempts` how often it was given out, `elapsed_s` seconds
    from asking to the end, on this side's clock. `data` is the member `error.data` as it came.
    """

    outcome = ""
    advice = ""

    def __init__(
        self,
        detail: str = "",
        *,
        endpoint: str = "",
        method: str = "",
        code: int = 0,
        data: Any = None,
        retryable: bool = False,
        dispatched: bool = False,
        worker: str | None = None,
        attempts: int = 0,
        elapsed_s: float = 0.0,
        advice: str = "",
    ) -> None:
        self.detail = detail
        self.endpoint = endpoint
        self.method = method
        self.code = code
        self.data = data
        self.retryable = retryable
        self.dispatched = dispatched
        self.worker = worker
        self.attempts = attempts
        self.elapsed_s = elapsed_s
        self.advice = advice or type(self).advice
        super().__init__(detail)

    @property
    def name(self) -> str:
        """`endpoint/method`, or what is known of it."""
        return f"{self.endpoint}/{self.method}" if self.endpoint else self.method

    def __str__(self) -> str:
        """Which request, how it ended, why, how far it came, what to do."""
        text = f"{self.name}: {self.outcome}: {self.detail}" if self.name else self.detail
        text = text.removesuffix(": ") or self.outcome
        facts = []
        if self.worker:
            facts.append(f"worker {self.worker}")
        if self.attempts > 1:
            facts.append(f"{self.attempts} attempts")
        if self.elapsed_s:
            facts.append(
                f"after {self.elapsed_s:.3g} s" if self.elapsed_s >= 1 else f"after {self.elapsed_s * 1e3:.3g} ms"
            )
        if facts:
            text += f" ({', '.join(facts)})"
        return f"{text.removesuffix('.')}. {self.advice}" if self.advice else text


class RemoteError(BrokerError):
    """The worker answered with an error of its own. `type` is the exception's name there, if it said one."""

    outcome = "worker_error"

    def __init__(self, detail: str = "", **facts: Any) -> None:
        super().__init__(detail, **facts)
        data = self.data if isinstance(self.data, dict) else {}
        self.type: str = _text(data, "type")
        if self.code in (-32601, -32602):
            self.detail = f"{detail}: {_text(data, 'detail')}" if _text(data, "detail") else detail
            self.advice = ""
        if data.get("traceback"):  # as a kernel's: the log would say no more
            self.advice = ""

    def __str__(self) -> str:
        """As ever, with the remote exception's name, or the code, before its message."""
        said = self.detail
        self.detail = f"{self.type or self.code}: {said}"
        try:
            return super().__str__()
        finally:
            self.detail = said


class NoEndpoint(BrokerError):
    """Nobody has served this endpoint since the broker started."""


class NoMethod(BrokerError):
    """None of the endpoint's workers has this method."""


class InvalidRequest(BrokerError, ValueError):
    """The request, one of its options or parameters of the broker's own methods are wrong."""


class NoWorker(BrokerError):
    """The endpoint is known and nobody serves it now; `wait=True` queues the request instead."""


class WorkerLost(BrokerError):
    """The worker went away before it answered: the request may have run."""


class DeadlineExceeded(BrokerError, TimeoutError):
    """The deadline passed. `phase` is `queued` (no worker had it) or `executing`; empty if the broker said nothing."""

    phase = ""


class Overloaded(BrokerError):
    """A bound was reached: `bound` names it, `retry_after_s` is how long to wait."""

    bound = ""
    retry_after_s = 0.0


class Cancelled(BrokerError):
    """The request was cancelled; `cause` says by whom (`caller`, `superseded`, `admin`)."""

    cause = ""


class Denied(BrokerError):
    """Not allowed with this credential."""


class ShuttingDown(BrokerError):
    """The broker is shutting down."""


class TooLarge(BrokerError):
    """A message is larger than the bound."""


class SlowConsumer(BrokerError):
    """The reader did not keep up."""


class DuplicateId(BrokerError):
    """The id is still in flight. This package never repeats one."""


class BadReply(BrokerError):
    """What came back broke the protocol."""


class KeyConflict(BrokerError):
    """An idempotency key was used with other content."""


class ConnectionLost(BrokerError, ConnectionError):
    """The connection to the broker broke, or was closed, before the answer came.

    `may_have_executed` is False only if the request certainly never reached the broker as a whole.
    """

    outcome = "connection_lost"

    def __init__(self, detail: str = "", *, may_have_executed: bool = False, **facts: Any) -> None:
        facts.setdefault("retryable", not may_have_executed)
        super().__init__(detail, **facts)
        self.may_have_executed = may_have_executed
        if self.name:
            self.advice = MAY_HAVE_RUN if may_have_executed else "It did not reach the broker; repeating it is safe."


class CannotConnect(BrokerError, ConnectionError):
    """There is no broker at the URL, or it does not speak as one. `url` is where it was looked for."""

    outcome = "cannot_connect"
    url = ""


class Refused(BrokerError, ConnectionError):
    """The broker is there and does not let us in. `status` is its HTTP status: 401 for a bad token, 403 for a role.

    `come_back` is whether the same may work later.
    """

    outcome = "refused"
    status = 0
    come_back = False


CLASSES: dict[str, type[BrokerError]] = {
    "worker_error": RemoteError,
    "no_endpoint": NoEndpoint,
    "no_method": NoMethod,
    "invalid": InvalidRequest,
    "no_worker": NoWorker,
    "worker_lost": WorkerLost,
    "deadline": DeadlineExceeded,
    "overloaded": Overloaded,
    "cancelled": Cancelled,
    "denied": Denied,
    "shutting_down": ShuttingDown,
    "too_large": TooLarge,
    "slow_consumer": SlowConsumer,
    "duplicate_id": DuplicateId,
    "bad_reply": BadReply,
    "key_conflict": KeyConflict,
}
"""Which exception tells which outcome; a test compares the names with the table of outcomes."""

KINDS_BY_CODE: dict[int, Kind] = {kind.code: kind for kind in table.KINDS if kind.code not in (0, -32601)}
KINDS_BY_NAME: dict[str, Kind] = {
    kind.name: kind for kind in table.KINDS if kind.name not in ("ok", "invalid")
} | {"invalid": table.INVALID_PARAMS}  # fmt: skip

_ADVICE = {name: KINDS_BY_NAME[name].advice for name in CLASSES} | {
    "no_endpoint": "Check the name, or start its worker.",
    "no_method": "Check the name; `broker describe` lists the methods.",
    "no_worker": "Start a worker, or ask with wait to queue until one comes.",
    "worker_error": "The worker's log says more.",
    "deadline": "Give it a longer timeout, or look whether the worker hangs.",
    "overloaded": "Wait a moment and repeat, or raise the bound in the broker's configuration.",
    "denied": "Ask whoever runs the broker for a token with the role at this endpoint.",
    "shutting_down": "Connect again in a moment and repeat.",
    "cancelled": "",
    "invalid": "",
    "bad_reply": "Look at the worker.",
}
for outcome, error_class in CLASSES.items():
    error_class.outcome = outcome
    error_class.advice = _ADVICE[outcome]
del outcome, error_class


def _worker_error(code: int, message: str, data: Any, facts: dict[str, Any]) -> BrokerError:
    return RemoteError(message, code=code, data=data, dispatched=True, **facts)


def from_reply(
    code: int, message: str, data: Any, *, endpoint: str, method: str, worker: str | None, attempts: int,
    retryable: bool, elapsed_s: float,
) -> BrokerError:  # fmt: skip
    """The exception for a JSON-RPC error as it came, with what the reply's `meta` said.

    The broker's own codes never come from a worker (it wraps them); of the specification's codes the broker's own
    are known by a reply that names no worker.
    """
    facts: dict[str, Any] = {"endpoint": endpoint, "method": method, "elapsed_s": elapsed_s}
    told = data if isinstance(data, dict) else {}
    own = code in range(-32019, -32000) or (code in (-32601, -32600, -32602, -32700) and worker is None)
    if not own:
        return _worker_error(code, message, data, facts | _attempted(worker, attempts, retryable))
    outcome = told.get("outcome")
    kind = KINDS_BY_NAME.get(outcome) if isinstance(outcome, str) else None
    if kind is None or (kind.code != code and kind.name != "invalid"):
        kind = KINDS_BY_CODE.get(code, table.NO_METHOD if code == -32601 else table.WORKER_ERROR)
    if kind is table.WORKER_ERROR:
        return _worker_error(code, message, data, facts | _attempted(worker, attempts, retryable))
    error = CLASSES[kind.name](
        _text(told, "detail") or CAUSES.get(_text(told, "cause"), message),
        code=code,
        data=data,
        dispatched=told.get("dispatched") is True,
        **facts,
        **_attempted(worker, _number(told, "attempts") or attempts, told.get("retryable") is True or retryable),
    )
    if isinstance(error, DeadlineExceeded):
        error.phase = _text(told, "phase")
        if error.phase == "queued":
            error.advice = "No worker was free for it: start more workers, or give it a longer timeout."
    elif isinstance(error, Overloaded):
        error.bound = _text(told, "bound")
        error.retry_after_s = _number(told, "retry_after_ms") / 1000
    elif isinstance(error, Cancelled):
        error.cause = _text(told, "cause")
    elif isinstance(error, ShuttingDown):
        if error.dispatched and not error.retryable:
            error.advice = MAY_HAVE_RUN
    elif isinstance(error, Denied) and not endpoint and method.startswith("broker.admin."):
        error.advice = "Ask whoever runs the broker for a token with the role admin."
    return error


def _attempted(worker: str | None, attempts: int, retryable: bool) -> dict[str, Any]:
    return {"worker": worker, "attempts": attempts, "retryable": retryable}


def _text(told: dict[str, Any], name: str) -> str:
    value = told.get(name)
    return value if isinstance(value, str) else ""


def _number(told: dict[str, Any], name: str) -> int:
    value = told.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
