"""The wire's hot path in C, where it was built: plain frames to events, plain messages to frames.

`Reader` and `Writer` are None where there is no compiled module. They take over only what is common and right; whatever
else comes goes by `frames` and `jsonrpc` as if they were not there.
"""

from __future__ import annotations

from broker.core.errors import ENDED_OK
from broker.core.events import Answered, Asked
from broker.core.messages import Body, Call, End

try:
    from broker.wire._native import Reader, Writer, know
except ImportError:
    Reader = Writer = None  # type: ignore[assignment, misc]
else:
    know(Asked, Answered, Body, Call, End, ENDED_OK)

__all__ = ["Reader", "Writer"]
