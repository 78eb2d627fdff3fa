"""Options of a request as callers write them, checked once and turned into `Options`."""

from __future__ import annotations

import math

import msgspec

from broker.core.messages import DEFAULT_OPTIONS, Options, Raw
from broker.core.wrong import what_is_wrong

TRACE_MAX = 256
RETRIES_MAX = 10
PRIORITY_MAX = 9
"""priorities go from minus this to this; higher goes first"""
KEY_MAX = 256
"""bytes of a key or a group"""
TOKEN_MAX = 128
"""bytes of a progress token as JSON text"""
STREAMS = {"in": (True, False), "out": (False, True), "both": (True, True), "none": (False, False)}
"""`stream` as its caller sees it: whether parts come in, whether parts go out"""


class OptionError(ValueError):
    """An option that cannot be honoured; the text names it and says what would be right."""


class Written(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The member `meta` of a request, and the options of `broker.call`."""

    timeout: float | None = None
    idle: float | None = None
    priority: int | None = None
    group: str | None = None
    idempotent: bool | None = None
    retries: int | None = None
    key: str | None = None
    stream: str | None = None
    progress: bool | int | str | None = None
    wait: bool | None = None
    timing: bool | None = None
    trace: str | None = None


_decoder = msgspec.json.Decoder(Written)


def read_options(raw: Raw, defaults: Options = DEFAULT_OPTIONS) -> Options:
    """What `meta` says, on top of the link's defaults. Raises OptionError."""
    try:
        written = _decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise OptionError(what_is_wrong(error, Written.__struct_fields__, whole="meta")) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise OptionError(f"meta is not to be read: {error}") from None
    return merge(written, defaults)


def merge(written: Written, defaults: Options) -> Options:
    """Check what was written and lay it over the defaults. Raises OptionError."""
    timeout = defaults.timeout if written.timeout is None else _seconds("timeout", written.timeout)
    idle = defaults.idle if written.idle is None else _seconds("idle", written.idle)
    idempotent = defaults.idempotent if written.idempotent is None else written.idempotent
    retries = 1 if idempotent else 0
    if written.retries is not None:
        retries = written.retries
        if not idempotent and retries:
            raise OptionError("retries needs idempotent: true; what is not idempotent runs at most once")
        if not 0 <= retries <= RETRIES_MAX:
            raise OptionError(f"retries {retries} is not between 0 and {RETRIES_MAX}")
    if written.trace is not None and len(written.trace) > TRACE_MAX:
        raise OptionError(f"trace is longer than {TRACE_MAX} characters")
    priority = defaults.priority if written.priority is None else written.priority
    if not -PRIORITY_MAX <= priority <= PRIORITY_MAX:
        raise OptionError(f"priority {priority} is not between {-PRIORITY_MAX} and {PRIORITY_MAX}")
    stream = defaults.stream_in, defaults.stream_out
    if written.stream is not None:
        if written.stream not in STREAMS:
            raise OptionError(f"stream {written.stream[:40]!r} is none of {', '.join(STREAMS)}")
        stream = STREAMS[written.stream]
    key = defaults.key if written.key is None else _label("key", written.key)
    if key is not None:
        if written.stream is not None and stream[1]:
            raise OptionError(f"stream {written.stream} does not go with key: what is repeated is one message")
        stream = False, False
    return Options(
        timeout=timeout,
        idle=idle,
        priority=priority,
        key=key,
        group=defaults.group if written.group is None else _label("group", written.group),
        stream_in=stream[0],
        stream_out=stream[1],
        progress=defaults.progress if written.progress is None else _token(written.progress),
        timing=defaults.timing if written.timing is None else written.timing,
        idempotent=idempotent,
        retries=retries,
        wait=defaults.wait if written.wait is None else written.wait,
        trace=defaults.trace if written.trace is None else written.trace,
        meta=True,
    )


def _seconds(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise OptionError(f"{name} {value} is not a positive number of seconds")
    return value


def _label(name: str, text: str) -> str:
    """A key or a group. It is only compared."""
    if not text or len(text.encode()) > KEY_MAX:
        raise OptionError(f"{name} has {len(text.encode())} bytes, not 1 to {KEY_MAX}")
    return text


def _token(written: bool | int | str) -> bytes | None:
    """A progress token as JSON text; empty where the id is to be the token, None where no progress is wanted."""
    if isinstance(written, bool):
        return b"" if written else None
    token = msgspec.json.encode(written)
    if len(token) > TOKEN_MAX:
        raise OptionError(f"a progress token of {len(token)} bytes is longer than {TOKEN_MAX}")
    return token
