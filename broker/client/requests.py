"""What both clients make of the arguments of a call."""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Any

from broker.peer.session import Options, split_method
from broker.peer.values import ValueUnfit, encode

DEFAULT_TIMEOUT_S = 30.0


class Unset(enum.Enum):
    """Stands for an argument that was not given, where None says something."""

    UNSET = 0


UNSET = Unset.UNSET


def encode_params(method: str, params: Any) -> tuple[bytes, list[bytes | memoryview]]:
    """`params` as JSON text (empty for None) and attachments. Raises TypeError, ValueUnfit, InvalidRequest."""
    if params is None:
        return b"", []
    if not isinstance(params, (dict, list, tuple)):
        split_method(method)
        kind = type(params).__name__
        raise TypeError(f"{method}: params is of type {kind}; give a dict (by name) or a list (by position)")
    try:
        return encode(params)
    except ValueUnfit as error:
        raise ValueUnfit(f"{method}: params cannot be sent: {error}") from None


@lru_cache(maxsize=256)
def options_for(
    timeout: float | None, idempotent: bool = False, retries: int | None = None, wait: bool = False,
    trace: str | None = None,
) -> Options:  # fmt: skip
    """Options, made once for equal arguments. `timeout` in seconds."""
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is a {type(timeout).__name__}; give seconds, or None")
    return Options(timeout=timeout, idempotent=idempotent, retries=retries, wait=wait, trace=trace)


def publish_params(endpoint: str | None, data: Any, topic: str | None, to: str | None) -> dict[str, Any]:
    """The parameters of `broker.publish`."""
    if endpoint is None and topic is not None:
        raise ValueError("a topic belongs to an endpoint; name it")
    places = {"endpoint": endpoint, "topic": topic, "to": to}
    return {name: value for name, value in places.items() if value is not None} | {"data": data}
