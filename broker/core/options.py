"""Options of a request as callers write them, checked once and turned into `Options`."""

from __future__ import annotations

import math

import msgspec

from broker.core.messages import DEFAULT_OPTIONS, Options, Raw

LATER = ("idle", "priority", "key", "stream", "progress", "timing")
"""options the wire already names and this broker does not act on yet"""

TRACE_MAX = 256
RETRIES_MAX = 10


class OptionError(ValueError):
    """An option that cannot be honoured; the text names it and says what would be right."""


class Written(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The member `meta` of a request, and the options of `broker.call`."""

    timeout: float | None = None
    idle: float | None = None
    priority: int | None = None
    idempotent: bool | None = None
    retries: int | None = None
    key: str | None = None
    stream: str | None = None
    progress: object = None
    wait: bool | None = None
    timing: bool | None = None
    trace: str | None = None


_decoder = msgspec.json.Decoder(Written)


def read_options(raw: Raw, defaults: Options = DEFAULT_OPTIONS) -> Options:
    """What `meta` says, on top of the link's defaults. Raises OptionError."""
    try:
        written = _decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise OptionError(f"meta: {error}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise OptionError(f"meta is not to be read: {error}") from None
    return merge(written, defaults)


def merge(written: Written, defaults: Options) -> Options:
    """Check what was written and lay it over the defaults. Raises OptionError."""
    for name in LATER:
        if getattr(written, name) not in (None, False, 0):
            raise OptionError(f"option {name!r} is not supported by this broker yet; leave it out")
    timeout = defaults.timeout
    if written.timeout is not None:
        timeout = written.timeout
        if not (timeout > 0 and math.isfinite(timeout)):
            raise OptionError(f"timeout {timeout} is not a positive number of seconds")
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
    return Options(
        timeout=timeout,
        idempotent=idempotent,
        retries=retries,
        wait=defaults.wait if written.wait is None else written.wait,
        trace=defaults.trace if written.trace is None else written.trace,
        meta=True,
    )
