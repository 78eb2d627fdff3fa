"""The daemon's log: nothing secret, nothing forged, nothing that waits."""

import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.daemon import logs
from broker.daemon.logs import LineFormatter, LineWriter, Logs, cut, escape, redact

CANARY = "canary-4f1d9c0b7a6e5d3c2b1a0f9e8d7c6b5a"


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    yield descriptor, path
    os.close(descriptor)


def _record(message: str, *arguments: object, name: str = "broker.test", **keywords: object) -> logging.LogRecord:
    record = logging.LogRecord(name, logging.WARNING, "file.py", 7, message, arguments, None)
    record.__dict__.update(keywords)
    return record


def _wait_until(condition: object, timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {CANARY}",
        f"authorization:Bearer {CANARY}, and more {CANARY}",
        f"{{'Authorization': 'Bearer {CANARY}', 'Host': 'a'}}",
        f'{{"Authorization": "token {CANARY}"}}',
        f"[('Cookie', 'login={CANARY}; other={CANARY}')]",
        f"[(b'Cookie', b'login={CANARY}')]",
        f'Cookie: a="x y"; login="{CANARY}"',
        f"Set-Cookie: broker={CANARY}; HttpOnly",
        f"b'GET /ws HTTP/1.1\\r\\nAuthorization: Bearer {CANARY}\\r\\nHost: a\\r\\n'",
        f"Proxy-Authorization: Basic {CANARY}",
        f"the header Bearer {CANARY} was refused",
        f"BEARER\t{CANARY}",
        f"offered jsonrpc, bearer.{CANARY}",
        f"Sec-WebSocket-Protocol: jsonrpc, resume.17.{CANARY}",
        f"GET /ws/data?ticket={CANARY}",
        f"GET /ws/data?a=1&ticket={CANARY}&b=2 (127.0.0.1)",
        f"HTTPServerRequest(method='GET', uri='/ws?x={CANARY}', version='HTTP/1.1')",
        f"/api/kernels/7/channels?%74oken={CANARY}",
        f"http://127.0.0.1:8787/ws?{CANARY}",
        f"ticket={CANARY}",
        f"token = {CANARY}",
        f'{{"ticket": "{CANARY}"}}',
        f'{{"ticket":"a\\"{CANARY}"}}',
        f'"{{\\"token\\": \\"{CANARY}\\"}}"',
        f"{{'secret': '{CANARY}'}}",
        f"auth.admin_token = '{CANARY}'",
        f"access_token={CANARY}",
        f"password: {CANARY}",
    ],
)
def test_row_06_credentials_are_known_by_their_surroundings(text: str) -> None:
    assert CANARY not in redact(text)
    for json_lines in (False, True):
        assert CANARY not in LineFormatter(json_lines=json_lines).format(_record("%s", text))


@pytest.mark.parametrize(
    "text",
    [
        "did you mean server.port?",
        "broker/core/resume.py line 7",
        "the ticket was spent",
        "token 17 revoked by admin",
        "worker w3 (127.0.0.1:4711) serves data: read, list",
        "why? because",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_row_06_known_secrets_are_hidden_wherever_they_stand() -> None:
    formatter = LineFormatter(json_lines=True)
    formatter.hide(CANARY)
    formatter.hide(CANARY)
    formatter.hide("")
    line = formatter.format(_record("odd place: <%s>%s", CANARY, CANARY))
    assert CANARY not in line
    assert json.loads(line)["message"] == "odd place: <[redacted]>[redacted]"


def test_row_06_tracebacks_and_stacks_are_redacted() -> None:
    try:
        raise ValueError(f"bad header Authorization: Bearer {CANARY}")
    except ValueError:
        record = _record("failed", exc_info=sys.exc_info(), stack_info=f"Stack: token={CANARY}")
    for json_lines in (False, True):
        line = LineFormatter(json_lines=json_lines).format(record)
        assert CANARY not in line
        assert "ValueError" in line
        assert "Stack:" in line
    cached = _record("failed", exc_text=f"ValueError: ticket={CANARY}")
    assert CANARY not in LineFormatter(json_lines=True).format(cached)


def test_access_lines_hold_the_path_without_query() -> None:
    record = _record("%d %s %.2fms", 200, f"GET /ws/data?ticket={CANARY} (127.0.0.1)", 1.5, name="tornado.access")
    assert json.loads(LineFormatter(json_lines=True).format(record))["message"] == (
        "200 GET /ws/data (127.0.0.1) 1.50ms"
    )


def test_row_25_control_characters_are_escaped() -> None:
    nasty = "a\nb\r\x1b[31mc\x00\x7f\x9b\u2028\u202e\u200f\ufeff\ud800d"
    assert escape(nasty) == "a\\nb\\r\\x1b[31mc\\x00\\x7f\\x9b\\u2028\\u202e\\u200f\\ufeff\\ud800d"
    human = LineFormatter(json_lines=False).format(_record("name: %s", nasty, name="x\ny"))
    assert len(human.splitlines()) == 1
    assert "x\\ny" in human
    entry = json.loads(LineFormatter(json_lines=True).format(_record("name: %s", nasty)))
    assert entry["message"] == "name: " + escape(nasty)


def test_row_25_an_exception_cannot_forge_a_line() -> None:
    try:
        raise ValueError("x\n2026-01-01 00:00:00.000 info    broker: all is well\x1b[2J")
    except ValueError:
        record = _record("failed", exc_info=sys.exc_info())
    first, *rest = LineFormatter(json_lines=False).format(record).split("\n")
    assert first.endswith("broker.test: failed")
    assert rest
    assert all(line.startswith("    | ") for line in rest)
    assert "\x1b" not in "".join(rest)
    line = LineFormatter(json_lines=True).format(record)
    assert "\n" not in line
    assert "\x1b" not in json.loads(line)["exception"]


def test_row_25_lengths_are_cut() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("a" * 10 + "b" * 10, 8) == "aa…[12 characters]…bbbbbb"
    formatter = LineFormatter(json_lines=True)
    assert len(formatter.format(_record("%s", "x" * 1_000_000))) < logs.MESSAGE_MAX + 300
    assert len(formatter.format(_record("a", exc_text="x" * 1_000_000))) < logs.EXCEPTION_MAX + 300
    assert len(formatter.format(_record("a", name="n" * 1_000_000))) < 400
    # Each character of four becomes ten when escaped; the line stays within that.
    assert len(formatter.format(_record("%s", "\U000e0001\x1b" * 1_000_000))) < 12 * logs.MESSAGE_MAX


@pytest.mark.parametrize(
    "run", ["/", "?", "a?", "Bearer ", "cookie:", "token=", "\"'", "\\", "cookie'", 'token\\"', "bearer.", "=: "]
)
def test_redaction_takes_linear_time(run: str) -> None:
    text = run * (logs.LOOKED_AT_MAX // len(run))
    begun = time.process_time()
    redact(text)
    assert time.process_time() - begun < 2.0  # about 10 ms; quadratic would be minutes


@given(st.text(st.characters(), max_size=200))
def test_any_text_gives_one_line(text: str) -> None:
    entry = LineFormatter(json_lines=True).format(_record("%s", text))
    assert len(entry.splitlines()) == 1
    assert json.loads(entry)["level"] == "warning"
    human = LineFormatter(json_lines=False).format(_record("%s", text))
    assert len(human.splitlines()) == 1
    human.encode()


def test_arguments_that_do_not_fit_are_told_not_raised() -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError

    line = LineFormatter(json_lines=False).format(_record("%d of %d", "x"))
    assert "a log record of file.py:7 could not be formatted (TypeError): '%d of %d'" in line
    assert "(RuntimeError)" in LineFormatter(json_lines=False).format(_record("%s", Bad()))


def test_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    record = _record("hello %s", "you", created=1_700_000_000.25, msecs=250.0)
    assert LineFormatter(json_lines=False).format(record) == "2023-11-14 22:13:20.250 warning broker.test: hello you"
    assert json.loads(LineFormatter(json_lines=True).format(record)) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "broker.test",
        "message": "hello you",
    }


def test_everything_goes_through_and_the_root_logger_is_given_back(log_file: tuple[int, Path]) -> None:
    descriptor, path = log_file
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    with Logs("info", "auto", descriptor) as started:
        logging.getLogger("tornado.access").info("200 GET /?x=1 (a)")
        logging.getLogger("tornado.general").warning("general")
        logging.getLogger("tornado.application").error("application")
        logging.getLogger("asyncio").debug("hidden at info")
        started.set_level("debug")
        logging.getLogger("asyncio").debug("shown at debug")
        started.hide("kept back")
        logging.getLogger("broker").info("kept back")
    assert (root.level, root.handlers[:]) == before
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["message"] for entry in entries] == [
        "200 GET / (a)",
        "general",
        "application",
        "shown at debug",
        "[redacted]",
    ]
    assert started.lost == 0
    assert started.stop() is True  # once more is no error


def test_terminals_get_human_lines() -> None:
    ours, theirs = os.openpty()
    try:
        with Logs("info", "auto", theirs):
            logging.getLogger("broker").warning("hello")
        text = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} warning broker: hello\r\n", text)


def _blocked_pipe() -> tuple[int, int]:
    """A pipe nobody reads, full to the last byte."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        pass
    try:
        while True:
            os.write(writer, b"x")
    except BlockingIOError:
        pass
    fcntl.fcntl(writer, fcntl.F_SETFL, 0)
    return reader, writer


def _read_all(reader: int) -> str:
    with os.fdopen(reader, "rb") as stream:
        return stream.read().decode().lstrip("x")


def test_fault_14_a_blocked_pipe_stops_nobody_and_the_loss_is_told() -> None:
    reader, descriptor = _blocked_pipe()
    started = Logs("info", "human", descriptor, lines_max=10)
    with started:
        log = logging.getLogger("broker")
        begun = time.monotonic()
        for number in range(1000):
            log.info("line %d", number)
        assert time.monotonic() - begun < 10
        assert 989 <= started.lost <= 990  # ten wait, one may be with the thread
        lost = started.lost
        received = bytearray()
        os.set_blocking(reader, False)

        def told() -> bool:
            try:
                received.extend(os.read(reader, 65536))
            except BlockingIOError:
                pass
            return b"were lost" in received

        _wait_until(told)
        log.info("after")
        _wait_until(lambda: told() and b"after" in received)
    text = received.decode().lstrip("x")
    os.close(reader)
    os.close(descriptor)
    lines = text.splitlines()
    assert len(lines) == 1000 - lost + 2
    assert lines[-2].endswith(f"{lost} log lines were lost: they came faster than the log could be written")
    assert lines[-1].endswith("after")


def test_fault_14_stopping_is_bounded_in_time() -> None:
    reader, descriptor = _blocked_pipe()
    started = Logs("info", "human", descriptor)
    started.start()
    logging.getLogger("broker").info("never read")
    begun = time.monotonic()
    assert started.stop(timeout_s=0.2) is False
    assert time.monotonic() - begun < 10
    os.read(reader, 65536)  # lets the thread end
    _wait_until(lambda: not started._writer._thread.is_alive())
    os.close(descriptor)
    assert _read_all(reader).endswith("never read\n")


def test_fault_14_a_process_with_a_blocked_log_still_exits() -> None:
    program = """
import logging, sys
from broker.daemon.logs import Logs
logs = Logs("info", "json", 2)
logs.start()
for number in range(20_000):
    logging.getLogger("x").info("line %d " + "y" * 200, number)
print(logs.stop(0.1))
"""
    reader, descriptor = _blocked_pipe()
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=descriptor, timeout=50, check=False
    )
    os.close(descriptor)
    os.close(reader)
    assert (done.returncode, done.stdout) == (0, b"False\n")


def test_fault_14_a_full_disk_costs_lines_and_the_loss_is_told(
    log_file: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor, path = log_file
    writer = LineWriter(descriptor)
    really, room = os.write, [3]

    def write(where: int, data: memoryview) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        written = really(where, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    writer.start("{} lost".format)
    writer.offer("first")
    _wait_until(lambda: writer.lost == 1)
    writer.offer("second")
    _wait_until(lambda: writer.lost == 2)
    room[0] = 1000
    writer.offer("third")
    assert writer.stop(20)
    assert path.read_text() == "fir\nthird\n2 lost\n"


def test_a_vanished_reader_costs_lines_only() -> None:
    reader, descriptor = os.pipe()
    os.close(reader)
    writer = LineWriter(descriptor)
    writer.start("{} lost".format)
    writer.offer("first")
    writer.offer("second")
    assert writer.stop(20)
    assert writer.lost == 2
    writer.offer("after the end")
    assert writer.lost == 3
    os.close(descriptor)


def test_a_descriptor_that_became_non_blocking_loses_nothing() -> None:
    reader, descriptor = _blocked_pipe()
    os.set_blocking(descriptor, False)
    writer = LineWriter(descriptor)
    writer.start("{} lost".format)
    for number in range(5):
        writer.offer(f"line {number}")
    os.read(reader, 1 << 20)
    assert writer.stop(20)
    os.close(descriptor)
    assert _read_all(reader).split() == ["line", "0", "line", "1", "line", "2", "line", "3", "line", "4"]
    assert writer.lost == 0


def test_a_loss_is_counted_from_many_threads_and_warnings_arrive(log_file: tuple[int, Path]) -> None:
    import threading
    import warnings

    descriptor, path = log_file
    with Logs("info", "json", descriptor, lines_max=50) as started:
        threads = [
            threading.Thread(target=lambda: [logging.getLogger("t").info("x") for _ in range(500)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _wait_until(lambda: not started._writer._lines)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(f"token={CANARY}", UserWarning, stacklevel=1)
    text = path.read_text()
    assert CANARY not in text
    assert "UserWarning" in text
    entries = [json.loads(line) for line in text.splitlines()]
    assert sum(entry["logger"] == "t" for entry in entries) + started.lost == 2000
