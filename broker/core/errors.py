"""The table of outcomes and the table of close codes: all the ways a request or a link can end."""

import msgspec


class Kind(msgspec.Struct, frozen=True):
    """One row of the table of outcomes.

    `code` is JSON-RPC's, `http` the status. `retryable` is what the broker says unless it knows better of this one
    request. `text` is the message on the wire, `advice` what a person should do.
    """

    name: str
    code: int
    http: int
    retryable: bool
    text: str
    advice: str


OK = Kind("ok", 0, 200, False, "ok", "The reply is in `result`.")
WORKER_ERROR = Kind(
    "worker_error", -32000, 500, False, "The worker answered with an error",
    "The request reached a worker, which refused it or failed; read the error, look at the worker's log.",
)  # fmt: skip
NO_ENDPOINT = Kind(
    "no_endpoint", -32601, 404, False, "Method not found",
    "No worker has served this endpoint since the broker started; check the name, start the worker.",
)  # fmt: skip
NO_METHOD = Kind(
    "no_method", -32601, 404, False, "Method not found",
    "Every worker of this endpoint has said which methods it has, and this is none of them; check the name.",
)  # fmt: skip
INVALID_JSON = Kind("invalid", -32700, 400, False, "Parse error", "The message is no JSON; mend the caller.")
INVALID_REQUEST = Kind(
    "invalid", -32600, 400, False, "Invalid Request", "The message breaks the protocol; `detail` says where."
)
INVALID_PARAMS = Kind(
    "invalid", -32602, 400, False, "Invalid params", "A parameter or an option is wrong; `detail` says which."
)
NO_WORKER = Kind(
    "no_worker", -32001, 503, True, "No worker serves this endpoint now",
    "Its workers are gone; start one, or ask again with `wait` to queue until one comes.",
)  # fmt: skip
WORKER_LOST = Kind(
    "worker_lost", -32002, 502, False, "The worker went away before it answered",
    "The request may have run. Mark it idempotent to have it tried elsewhere.",
)  # fmt: skip
DEADLINE = Kind(
    "deadline", -32003, 504, False, "The deadline passed before an answer came",
    "`phase` says whether it still waited for a worker (`queued`) or a worker had it (`executing`).",
)  # fmt: skip
OVERLOADED = Kind(
    "overloaded", -32004, 429, True, "A bound was reached",
    "`bound` says which; wait `retry_after_ms`, or raise the bound in the configuration.",
)  # fmt: skip
CANCELLED = Kind(
    "cancelled", -32005, 499, False, "The request was cancelled",
    "`cause` says by whom: `caller`, `superseded` or `admin`.",
)  # fmt: skip
DENIED = Kind(
    "denied", -32006, 403, False, "Not allowed with this credential",
    "Ask whoever runs the broker for a token with the role at this endpoint; `broker.admin.*` need `admin`.",
)  # fmt: skip
SHUTTING_DOWN = Kind(
    "shutting_down", -32007, 503, True, "The broker is shutting down",
    "Connect again in a moment and repeat; what is not retryable may have run, look first.",
)  # fmt: skip
TOO_LARGE = Kind(
    "too_large",
    -32008,
    413,
    False,
    "The message is larger than the bound",
    "Send less at once, or raise the bound.",
)
SLOW_CONSUMER = Kind(
    "slow_consumer", -32009, 503, False, "The reader did not keep up", "Read faster, or ask for less at once."
)
DUPLICATE_ID = Kind(
    "duplicate_id", -32010, 409, False, "This id is still in flight", "Give every request an id of its own."
)
BAD_REPLY = Kind(
    "bad_reply",
    -32011,
    502,
    False,
    "The worker's answer broke its protocol",
    "Look at the worker; `detail` says where.",
)
KEY_CONFLICT = Kind(
    "key_conflict", -32012, 409, False, "This idempotency key was used with other content",
    "Make a new key for a new request.",
)  # fmt: skip

KINDS = (
    OK, WORKER_ERROR, NO_ENDPOINT, NO_METHOD, INVALID_JSON, INVALID_REQUEST, INVALID_PARAMS, NO_WORKER, WORKER_LOST,
    DEADLINE, OVERLOADED, CANCELLED, DENIED, SHUTTING_DOWN, TOO_LARGE, SLOW_CONSUMER, DUPLICATE_ID, BAD_REPLY,
    KEY_CONFLICT,
)  # fmt: skip


class Outcome(msgspec.Struct, frozen=True):
    """How one request ended. Times in milliseconds; `dispatched` says whether a worker was ever given it."""

    kind: Kind
    detail: str = ""
    retryable: bool = False
    dispatched: bool = False
    endpoint: str = ""
    method: str = ""
    attempts: int = 0
    elapsed_ms: float = 0.0
    phase: str = ""
    cause: str = ""
    bound: str = ""
    retry_after_ms: int | None = None


ENDED_OK = Outcome(kind=OK, dispatched=True, attempts=1)
"""The outcome of nearly every request, made once."""

ENDED_HERE = Outcome(kind=OK)
"""The outcome of a call to one of the broker's own methods."""


class Close(msgspec.Struct, frozen=True):
    """One row of the table of close codes. `come_back` tells a client whether connecting again makes sense."""

    code: int
    name: str
    come_back: bool
    text: str


NORMAL = Close(1000, "normal", False, "Ended by one side on purpose.")
GOING_AWAY = Close(1001, "going_away", True, "The other side is leaving.")
PROTOCOL_ERROR = Close(1002, "protocol_error", False, "A frame broke RFC 6455.")
NO_CODE = Close(1005, "no_code", True, "Closed without a code (never sent on the wire).")
ABNORMAL = Close(1006, "abnormal", True, "The connection broke (never sent on the wire).")
BAD_DATA = Close(1007, "bad_data", False, "Text that is no UTF-8.")
MESSAGE_TOO_BIG = Close(1009, "message_too_big", False, "A message above the size bound.")
INTERNAL_ERROR = Close(1011, "internal_error", True, "The broker failed; its log says why.")
BAD_MESSAGE = Close(4400, "bad_message", False, "Three malformed messages within a minute.")
UNAUTHORISED = Close(4401, "unauthorised", True, "The credential expired or was revoked; come back with a new one.")
FORBIDDEN = Close(4403, "forbidden", False, "Not allowed with this credential.")
ENDPOINT_CLOSED = Close(4404, "endpoint_closed", False, "The endpoint is closed; the reason says why.")
SLOW_READER = Close(4408, "slow_consumer", True, "The outbox was full or stood still: read faster.")
REPLACED = Close(4409, "replaced", False, "A newer link of the same session took over.")
DRAINED = Close(4412, "drained", True, "The broker is shutting down or restarting.")
TOO_MANY = Close(4429, "too_many", True, "A bound on connections or rates was reached.")

CLOSES = (
    NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_CODE, ABNORMAL, BAD_DATA, MESSAGE_TOO_BIG, INTERNAL_ERROR, BAD_MESSAGE,
    UNAUTHORISED, FORBIDDEN, ENDPOINT_CLOSED, SLOW_READER, REPLACED, DRAINED, TOO_MANY,
)  # fmt: skip
