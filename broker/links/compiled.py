"""Whether the compiled core (`broker.wire.native`) is used; to be asked without importing what that needs."""

import os
from importlib.util import find_spec

PURE = "BROKER_PURE"
"""environment variable: set to anything, the compiled core is left alone"""


def wanted() -> bool:
    """Whether it may be used, if it is there."""
    return not os.environ.get(PURE)


def core() -> str:
    """What does the common work here: "compiled core", or "pure Python" where that was not built, or is not wanted."""
    return "compiled core" if wanted() and find_spec("broker.wire._native") is not None else "pure Python"
