"""One line on standard error that says how far something is."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import unicodedata
from types import TracebackType
from typing import Self

from broker.cli.connection import clean_line

TICK_S = 0.2
"""how often the line is drawn anew"""
LINE_S = 1.0
"""how often there is a new line where nothing can be drawn over"""
BAR_MAX = 40
"""characters of the bar itself"""
BYTES = "bytes"
"""the text by which a worker says that it counts bytes"""
WIDTH = 80
"""columns where nobody knows how many there are"""


class Bar:
    """Drawn while it is open and something was told: the share of the whole or the count, the rate, the text.

    `after_s`: what is quicker shows nothing. `shown` None shows it on a terminal only; True elsewhere too, as lines.
    What a worker tells has precedence over the bytes counted here; its text `bytes` is the unit. Belongs to the running
    event loop, but for `count`.
    """

    def __init__(self, label: str, *, shown: bool | None, after_s: float) -> None:
        self.label = clean_line(label)
        self._is_terminal = sys.stderr.isatty()
        self.is_shown = self._is_terminal if shown is None else shown
        self._after_s = after_s
        self._began = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._is_drawn = False
        self._done = 0.0
        self._total: float | None = None
        self._text = ""
        self._is_bytes = True
        self._is_counted_here = True
        self._first = (0.0, self._began)
        self._is_told = False

    def tell(self, done: float, total: float | None, text: str | None) -> None:
        """What the worker says."""
        if self._is_counted_here:
            self._is_counted_here = False
            self._first = (done, time.monotonic())
        self._is_bytes = text == BYTES
        self._done, self._total, self._text = done, total, "" if self._is_bytes else clean_line(text or "")
        self._is_told = True

    def count(self, done: int, total: int | None = None) -> None:
        """Bytes that have been moved here; from any thread."""
        if self._is_counted_here:
            self._done, self._total = done, total
            self._is_told = True

    def hide(self) -> None:
        """Make room for other output on the terminal."""
        if self._is_drawn and self._is_terminal:
            self._write("\r\x1b[K")
            self._is_drawn = False

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self.is_shown:
            self._timer = asyncio.get_running_loop().call_later(self._after_s, self._tick)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        if time.monotonic() - self._began >= self._after_s and self._is_told:
            self._draw()
            if self._is_terminal:
                self._write("\n")

    def _tick(self) -> None:
        if self._is_told:
            self._draw()
        step_s = TICK_S if self._is_terminal else LINE_S
        self._timer = asyncio.get_running_loop().call_later(step_s, self._tick)

    def _draw(self) -> None:
        line = self.line(_columns() - 1 if self._is_terminal else WIDTH)
        self._write(f"\r{line}\x1b[K" if self._is_terminal else f"{line}\n")
        self._is_drawn = True

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):
            self.is_shown = False  # nobody looks any more

    # ------------------------------------------------------------ the line

    def line(self, width: int) -> str:
        """The line, in at most so many columns; the text and the bar give way first."""
        share = min(1.0, max(0.0, self._done / self._total)) if self._total and self._total > 0 else None
        facts = [self._amount(), *self._speed()]
        if share is not None:
            facts.insert(0, f"{share:4.0%}")
        rest = "  ".join(fact for fact in facts if fact)
        line = f"{self.label}  {rest}" if self.label else rest
        room = width - columns_of(line)
        if share is not None and room >= 9:
            size = min(BAR_MAX, room - 4 - (min(columns_of(self._text) + 2, room // 2) if self._text else 0))
            full = round(share * size)
            line = f"{self.label}  [{'#' * full}{'-' * (size - full)}]  {rest}".lstrip()
            room = width - columns_of(line)
        if self._text and room > 4:
            line += f"  {cut(self._text, room - 2)}"
        return cut(line, width)

    def _amount(self) -> str:
        if self._is_bytes:
            return _bytes(self._done) if self._total is None else f"{_bytes(self._done)} of {_bytes(self._total)}"
        return _count(self._done) if self._total is None else f"{_count(self._done)}/{_count(self._total)}"

    def _speed(self) -> tuple[str, ...]:
        """The rate, and how long it will still take if it goes on like this."""
        first, since = self._first
        spent_s = time.monotonic() - since
        if spent_s < TICK_S or self._done <= first:
            return ()
        rate = (self._done - first) / spent_s
        shown = f"{_bytes(rate) if self._is_bytes else _count(rate)}/s"
        if self._total is None or self._total <= self._done:
            return (shown,)
        return shown, f"{_time((self._total - self._done) / rate)} left"


def _bytes(number: float) -> str:
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def _count(number: float) -> str:
    """At most four digits."""
    return f"{number:.4g}" if abs(number) < 9999.5 else _scaled(number, ("", "k", "M", "G", "T"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if abs(number) < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {largest}"


def _time(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.3g} h"


def _columns() -> int:
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns or WIDTH)
    except (OSError, ValueError):
        return WIDTH


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return len(text) if text.isascii() else sum(map(_columns_of_letter, text))


def _columns_of_letter(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def cut(text: str, width: int) -> str:
    """The text in at most so many columns; an ellipsis says where it was cut."""
    if columns_of(text) <= width:
        return text
    kept = ""
    for letter in text:
        if columns_of(kept) + _columns_of_letter(letter) > width - 1:
            break
        kept += letter
    return kept + "…"
