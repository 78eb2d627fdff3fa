"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import os

KEPT_MAX_BYTES = 32 << 20
"""freed memory at the end of the heap that is kept to be used again: two of the largest messages"""
_TRIM_THRESHOLD, _MAP_THRESHOLD = -1, -3  # of mallopt(3)
_SET_OUTSIDE = "MALLOC_TRIM_THRESHOLD_"


def keep_freed_memory() -> bool:
    """Have up to `KEPT_MAX_BYTES` kept instead of given back after each large message; whether that is so.

    By itself glibc returns what a large message took and has the kernel clear new pages for the next: 2.0 ms per MiB
    for messages of 10 MiB, 1.3 with this; 16 MiB to keep gain nothing there, 64 little more. Other C libraries have no
    mallopt(3), and whoever has set MALLOC_TRIM_THRESHOLD_ in the environment has decided it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _SET_OUTSIDE in os.environ:
        return False
    # Setting one of them ends glibc's own adjusting of both, which would have come to 32 MiB for the first.
    return bool(mallopt(_MAP_THRESHOLD, KEPT_MAX_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_MAX_BYTES))
