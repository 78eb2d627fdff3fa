"""The version, in a file of its own so that building needs no imports."""

import os
from importlib.util import find_spec

VERSION = "0.1.0"

PURE = "BROKER_PURE"
"""environment variable: set to anything, the compiled core is left alone"""


def core() -> str:
    """What reads and writes the common messages here: "compiled core", or "pure Python" where that was not built."""
    compiled = find_spec("broker.wire._native") is not None and not os.environ.get(PURE)
    return "compiled core" if compiled else "pure Python"
