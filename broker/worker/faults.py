"""The error by which a function of a worker ends its request, and what other exceptions become."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.peer.values import ValueUnfit, encode

MESSAGE_MAX = 4000
"""characters of an exception's text that go to the caller"""

FAILED = -32000
NO_METHOD = -32601
BAD_PARAMS = -32602


class Fault(Exception):
    """Raised by a function to end its request with an error of its own making.

    `code` is any integer beside -32001…-32019, which are the broker's; `data` anything JSON knows; `retryable` says
    that trying again may help and cannot do harm.
    """

    def __init__(self, message: str, *, code: int = FAILED, data: Any = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.data = data
        self.retryable = retryable


class Failure(msgspec.Struct, frozen=True):
    """An error as it goes to the caller."""

    code: int
    message: str
    data: Any = None
    retryable: bool = False


def failure_of(error: BaseException) -> Failure:
    """What a caller is told of an exception: its type and its text, never a traceback."""
    if isinstance(error, Fault):
        return _checked(error)
    name = type(error).__name__
    if isinstance(error, SystemExit):
        text = f"the function called sys.exit({error.code!r}); the worker goes on"
    elif isinstance(error, ValueUnfit):
        text, name = f"the result cannot be sent: {error}", "ValueUnfit"
    else:
        text = _text(error) or name
    return Failure(FAILED, text, {"type": name, "message": text})


def _checked(fault: Fault) -> Failure:
    data = fault.data
    if data is not None:
        try:
            raw, attachments = encode(data)
            data = msgspec.Raw(raw) if not attachments else None
        except ValueUnfit:
            data = None
    message = str(fault.message)[:MESSAGE_MAX]
    if data is None:
        data = {"type": "Fault", "message": message} if fault.code == FAILED else None
    return Failure(int(fault.code), message, data, bool(fault.retryable))


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # a __str__ of somebody's that fails must not take the answer with it
        return ""
    return text.encode("utf-8", "replace").decode()[:MESSAGE_MAX]
