"""What a worker tells of its progress, on its way to the function that wants to know."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from typing import TypeAlias

log = logging.getLogger("broker.client")

ProgressFunction: TypeAlias = Callable[[float, float | None, str | None], object]
"""told how much is done, of how much (None if nobody knows), and in words (None if the worker says none)"""


def check_progress(function: object) -> None:
    """Raises TypeError for what cannot be called, or would have to be awaited."""
    if function is None or (callable(function) and not inspect.iscoroutinefunction(function)):
        return
    raise TypeError(f"progress is a {type(function).__name__}; give a plain function of (done, total, text)")


class Teller:
    """Calls the function. What it raises is logged once and harms nobody; it is called on."""

    __slots__ = ("_failed", "_function")

    def __init__(self, function: ProgressFunction) -> None:
        self._function = function
        self._failed = False

    def __call__(self, done: float, total: float | None, text: str | None) -> None:
        """Tell it."""
        try:
            self._function(done, total, text)
        except Exception:
            if not self._failed:
                log.exception("the progress function %r failed", self._function)
            self._failed = True


class Newest:
    """The last thing told, until another thread takes it to its own function; what it is too slow for is passed over.

    `signal` is set whenever there is something new.
    """

    __slots__ = ("_teller", "_told", "signal")

    def __init__(self, function: ProgressFunction, signal: threading.Event) -> None:
        self.signal = signal
        self._teller = Teller(function)
        self._told: tuple[float, float | None, str | None] | None = None

    def __call__(self, done: float, total: float | None, text: str | None) -> None:
        """Keep it, on the loop."""
        self._told = (done, total, text)
        self.signal.set()

    def deliver(self) -> None:
        """Call the function, in the thread that waits, if there is something new."""
        told, self._told = self._told, None
        if told is not None:
            self._teller(*told)
