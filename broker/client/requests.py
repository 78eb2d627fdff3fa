"""What both clients make of the arguments of a call."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from broker.client.progress import ProgressFunction, check_progress
from broker.core.wrong import hint_for
from broker.peer.errors import InvalidRequest
from broker.peer.session import Options, split_method
from broker.peer.values import Encoded, ValueUnfit, encode

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_GRACE_S = 30.0
"""how long the broker keeps a client's session when its connection breaks"""


class Unset(enum.Enum):
    """Stands for an argument that was not given, where None says something."""

    UNSET = 0


UNSET = Unset.UNSET


def encode_params(method: str, params: Any) -> tuple[bytes, list[bytes | memoryview]]:
    """`params` as JSON text (empty for None) and attachments. Raises TypeError, ValueUnfit, InvalidRequest."""
    if params is None:
        return b"", []
    if not isinstance(params, (dict, list, tuple, Encoded)):
        split_method(method)
        kind = type(params).__name__
        raise TypeError(f"{method}: params is of type {kind}; give a dict (by name) or a list (by position)")
    try:
        return encode(params)
    except ValueUnfit as error:
        raise ValueUnfit(f"{method}: params cannot be sent: {error}") from None


LEFT_TO_BROKER = Options()
"""no deadline of the caller's own"""


@lru_cache(maxsize=256)
def options_for(timeout: float | None) -> Options:
    """Options that say nothing but the deadline, made once for equal ones. `timeout` in seconds. Raises TypeError."""
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is a {type(timeout).__name__}; give seconds, or None")
    return Options(timeout=timeout)


COMMON = ("timeout", "idle", "idempotent", "retries", "key", "priority", "group", "wait", "trace")
"""options of every request; `progress` and `parts` are arguments of their own where they are taken"""


def check_names(function: str, given: Iterable[str], more: tuple[str, ...] = ()) -> None:
    """Raises TypeError, which names the function that was called, for an option that there is not."""
    known = (*COMMON, *more)
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() has no argument {name!r}; {hint_for(name, known)}")


def all_options(
    timeout: float | None, *, idle: float | None = None, idempotent: bool = False, retries: int | None = None,
    key: str | None = None, priority: int = 0, group: str | None = None, wait: bool = False, trace: str | None = None,
    timing: bool = False, progress: ProgressFunction | None = None,
) -> Options:  # fmt: skip
    """Options of every kind. Raises TypeError."""
    check_progress(progress)
    return Options(
        timeout=options_for(timeout).timeout, idle=idle, idempotent=idempotent, retries=retries, key=key,
        priority=priority, group=group, wait=wait, trace=trace, timing=timing, progress=progress is not None,
    )  # fmt: skip


def stream_options(options: dict[str, Any], progress: ProgressFunction | None) -> Options:
    """Options of a stream. Raises TypeError, and InvalidRequest for a key."""
    check_names("stream", options, ("timing", "progress", "parts"))
    given = all_options(**({"timeout": None} | options), progress=progress)
    if given.key is not None:
        raise InvalidRequest("a request with a key is answered as a whole: take call, not stream")
    return given


def check_grace(grace: float) -> float:
    """Seconds of grace. Raises TypeError and ValueError."""
    if not isinstance(grace, (int, float)):
        raise TypeError(f"grace is a {type(grace).__name__}; give seconds, 0 for none")
    if not 0 <= grace < float("inf"):
        raise ValueError(f"grace {grace} is no number of seconds; 0 is none")
    return grace


def publish_params(endpoint: str | None, data: Any, topic: str | None, to: str | None) -> dict[str, Any]:
    """The parameters of `broker.publish`."""
    if endpoint is None and topic is not None:
        raise ValueError("a topic belongs to an endpoint; name it")
    places = {"endpoint": endpoint, "topic": topic, "to": to}
    return {name: value for name, value in places.items() if value is not None} | {"data": data}
