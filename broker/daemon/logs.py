"""The daemon's log: lines free of credentials and control characters, written by a thread so that the loop never waits.

A record is formatted where it is logged, then waits in a bounded queue. If standard error stands still (a blocked pipe,
a full disk), the queue fills, what does not fit is counted, and one line tells the number when writing works again.
"""

import collections
import logging
import os
import re
import select
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

import msgspec

LINES_MAX = 4096
"""lines that may wait to be written"""
MESSAGE_MAX = 2048
"""characters of a message"""
EXCEPTION_MAX = 8192
"""characters of a traceback; the middle is cut, its end says most"""
LOOKED_AT_MAX = 32_768
"""characters that are searched for credentials; the rest can only be among what is cut"""

HIDDEN = "[redacted]"

_QUOTED = r"""(?:"(?:[^"\\\r\n]|\\.)*"|'(?:[^'\\\r\n]|\\.)*')"""
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A header with its whole value: in a dict or a list of pairs, then as on the wire, to the end of its line.
    (
        re.compile(rf"""(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)(["']\s*[:=,]\s*b?)(?:{_QUOTED}|[^\r\n]*)"""),
        rf"\1\2{HIDDEN}",
    ),
    (re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)(\s*[:=]\s*)[^\r\n\\]*"), rf"\1\2{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer)(\s+)[^\s\"',;]+"), rf"\1\2{HIDDEN}"),
    # Subprotocols: bearer.<base64url> and resume.<id>.<secret>. Shorter ones (resume.py) are no credentials.
    (re.compile(r"(?i)\b(bearer|resume)\.[A-Za-z0-9_.~=+/%-]{8,}"), rf"\1.{HIDDEN}"),
    # Members of a query, of JSON, of JSON within a string.
    (
        re.compile(
            rf"""(?i)\b(ticket|(?:access_|admin_)?token|secret|password)(\\*["']?\s*[=:]\s*b?\\*)"""
            rf"""(?:{_QUOTED}|["']?[^\s&"'#;,}}\\]+)"""
        ),
        rf"\1\2{HIDDEN}",
    ),
)
_QUERY = re.compile(r"(?<=[\w/.%~-])\?(?=[\w%])[^\s\"']*")
"""What follows the path in an address. It may hold credentials under any name, percent-encoded too."""

_CONTROL = re.compile(
    # C0 and C1, line separators, marks that turn the direction of text, the byte-order mark, lone surrogates
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def redact(text: str) -> str:
    """The text without the credentials that can be known by their surroundings, and without queries of addresses."""
    text = _QUERY.sub("?…", text)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def escape(text: str) -> str:
    r"""The text on one line: control characters become \n, \x1b, \u202e and so on."""
    return _CONTROL.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def cut(text: str, length_max: int) -> str:
    """The text, its middle left out if it has more than `length_max` characters."""
    if len(text) <= length_max:
        return text
    head = length_max // 4
    return f"{text[:head]}…[{len(text) - length_max} characters]…{text[head - length_max :]}"


class LineFormatter(logging.Formatter):
    """Formats a record as one human line (a traceback indented below it) or one JSON line, clean in either case."""

    def __init__(self, *, json_lines: bool) -> None:
        super().__init__()
        self._json_lines = json_lines
        self._known: tuple[str, ...] = ()

    def hide(self, secret: str) -> None:
        """From now on leaves this very text out of every line, wherever it stands."""
        if secret and secret not in self._known:
            self._known = (*self._known, secret)

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end. Never raises: a record whose arguments do not fit is told as such."""
        message = escape(self._clean(self._message(record), MESSAGE_MAX))
        if record.name == "tornado.access":
            message = message.replace("?…", "")
        trace = self._clean(self._trace(record), EXCEPTION_MAX)
        lines = [escape(line) for line in trace.split("\n")] if trace else []
        level, name = record.levelname.lower(), escape(record.name[:100])
        if not self._json_lines:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            first = f"{moment}.{int(record.msecs):03d} {level:8}{name}: {message}"
            return "\n    | ".join([first, *lines])
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": level, "logger": name, "message": message}
        if lines:
            entry["exception"] = "\n".join(lines)
        return msgspec.json.encode(entry).decode()

    def _message(self, record: logging.LogRecord) -> str:
        try:
            return record.getMessage()
        except Exception as error:  # whatever __str__ of an argument raises; the place of the mistake is still told
            place = f"{record.filename}:{record.lineno}"
            return f"a log record of {place} could not be formatted ({type(error).__name__}): {record.msg!r:.200}"

    def _trace(self, record: logging.LogRecord) -> str:
        try:
            pieces = [self.formatException(record.exc_info)] if record.exc_info else [record.exc_text or ""]
            pieces.append(self.formatStack(record.stack_info) if record.stack_info else "")
        except Exception as error:
            return f"a traceback could not be formatted ({type(error).__name__})"
        return "\n".join(filter(None, pieces))

    def _clean(self, text: str, length_max: int) -> str:
        text = cut(text, LOOKED_AT_MAX)
        for secret in self._known:
            text = text.replace(secret, HIDDEN)
        return cut(redact(text), length_max)


class LineWriter:
    """Writes lines to a file descriptor in a thread of its own. `offer` never waits; `lost` counts what was dropped."""

    def __init__(self, descriptor: int, lines_max: int = LINES_MAX) -> None:
        self.lost = 0
        self._told = 0
        self._descriptor = descriptor
        self._lines_max = lines_max
        self._lines: collections.deque[str] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._torn = False
        self._notice: Callable[[int], str] = "{} log lines were lost".format
        self._thread = threading.Thread(target=self._run, name="broker-log", daemon=True)

    def start(self, notice: Callable[[int], str]) -> None:
        """Begins to write. `notice` makes the line that tells how many were lost; the thread calls it."""
        self._notice = notice
        self._thread.start()

    def offer(self, line: str) -> None:
        """Queues a line, or counts it as lost if the queue is full or closed."""
        with self._changed:
            if self._closed or len(self._lines) >= self._lines_max:
                self.lost += 1
                return
            self._lines.append(line)
            self._changed.notify()

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after what is queued, waiting at most `timeout_s`; whether all of it was written."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    return
                line = self._lines.popleft()
                last = not self._lines
            if not self._put(line):
                with self._changed:
                    self.lost += 1
            elif last:
                self._tell_lost()

    def _tell_lost(self) -> None:
        lost = self.lost
        if lost > self._told and self._put(self._notice(lost - self._told)):
            self._told = lost

    def _put(self, line: str) -> bool:
        """Writes a line whole; False if a full disk or a vanished reader cost it."""
        # os.write, not a stream: a stream's lock, held while a pipe is blocked, would abort the interpreter's exit.
        rest = memoryview((("\n" if self._torn else "") + line + "\n").encode("utf-8", "backslashreplace"))
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # somebody who shares the terminal made it non-blocking
                select.select([], [self._descriptor], [], 1.0)
            except OSError:
                self._torn = self._torn or len(rest) < size
                return False
        self._torn = False
        return True


class _Handler(logging.Handler):
    """Hands formatted records to the writer."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Formats and queues the record."""
        self._writer.offer(self.format(record))


class Logs:
    """The process's logging while the daemon runs: `start` takes over the root logger, `stop` gives it back.

    `level` is one of debug, info, warning, error; `style` one of auto (human on a terminal), human, json.
    """

    def __init__(
        self,
        level: str = "info",
        style: Literal["auto", "human", "json"] = "auto",
        descriptor: int = 2,
        lines_max: int = LINES_MAX,
    ) -> None:
        json_lines = style == "json" or (style == "auto" and not os.isatty(descriptor))
        self._level = level
        self._formatter = LineFormatter(json_lines=json_lines)
        self._writer = LineWriter(descriptor, lines_max)
        self._handler = _Handler(self._writer)
        self._handler.setFormatter(self._formatter)
        self._before: tuple[int, list[logging.Handler]] | None = None

    def start(self) -> None:
        """Sends every logger's records (tornado's and warnings too) through here alone."""
        root = logging.getLogger()
        self._before = (root.level, root.handlers[:])
        root.handlers[:] = [self._handler]
        self.set_level(self._level)
        logging.captureWarnings(True)
        self._writer.start(self._lost_line)

    def stop(self, timeout_s: float = 1.0) -> bool:
        """Writes what is queued, waiting at most `timeout_s`, and restores the root logger; whether all was written."""
        if self._before is None:
            return True
        root = logging.getLogger()
        level, root.handlers[:] = self._before
        root.setLevel(level)
        self._before = None
        logging.captureWarnings(False)
        self._handler.close()
        return self._writer.stop(timeout_s)

    def set_level(self, level: str) -> None:
        """Changes the least important level that is written; for a reload."""
        logging.getLogger().setLevel(level.upper())

    def hide(self, secret: str) -> None:
        """Leaves this very text (a token the broker holds) out of every line from now on."""
        self._formatter.hide(secret)

    @property
    def lost(self) -> int:
        """Lines dropped since the start because they could not be written."""
        return self._writer.lost

    def _lost_line(self, count: int) -> str:
        text = f"{count} log lines were lost: they came faster than the log could be written"
        return self._formatter.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
