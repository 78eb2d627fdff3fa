"""Whether links read and write in C (`broker.wire.native`); to be asked without importing what that needs."""

import os
from importlib.util import find_spec

PURE = "BROKER_PURE"
"""environment variable: set to anything, the compiled core is left alone"""


def core() -> str:
    """What reads and writes the common messages here: "compiled core", or "pure Python" where that was not built."""
    compiled = find_spec("broker.wire._native") is not None and not os.environ.get(PURE)
    return "compiled core" if compiled else "pure Python"
