"""`broker call` with streams: items, `--out`, `--in`, the bar, Ctrl-C; much of it as real processes."""

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broker.cli import transfer
from broker.cli.bar import Bar, columns_of, cut
from broker.cli.main import main
from broker.node.broker import Broker
from broker.peer import errors
from broker.worker import current
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_thread


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


class Noted:
    """What the functions have seen, and what they wait for."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.go_on = threading.Event()
        self.ran = 0


Served = tuple[Broker, Noted, asyncio.AbstractEventLoop]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    noted = Noted()

    def rows(count: int) -> Generator[dict[str, Any], None, dict[str, int]]:
        for number in range(count):
            yield {"row": number}
        return {"rows": count}

    def two() -> Iterator[str]:
        yield "first"
        noted.go_on.wait(30)
        yield "second"

    def blobs(count: int, size: int, fail: bool = False) -> Iterator[bytes]:
        for number in range(count):
            yield bytes([number % 256]) * size
        noted.go_on.wait(30)
        if fail:
            raise LookupError("the disk is gone")

    def mixed() -> Generator[Any, None, dict[str, int]]:
        yield {"head": 1}
        yield {"name": "a", "data": b"abc"}
        yield b"def"
        return {"count": 2}

    def file(length: int, crc32: int | None = None) -> Generator[bytes, None, dict[str, Any]]:
        yield from [b"abc"] * (length // 3)
        return {"length": length, "crc32": zlib.crc32(b"abc" * (length // 3)) if crc32 is None else crc32}

    def pair() -> Iterator[Any]:
        yield [b"a", b"b"]

    def total() -> dict[str, int]:
        crc = size = 0
        for part in current().parts():
            size, crc = size + len(part), zlib.crc32(part, crc)
        return {"size": size, "crc32": crc}

    async def again() -> Any:
        async for part in current().parts():
            yield part

    def steps(count: int) -> str:
        for number in range(1, count + 1):
            current().progress(number, count, "turning\x1b[31m the\nstage")
            noted.go_on.wait(30)
        return "turned"

    def endless() -> Iterator[bytes]:
        try:
            while not current().cancelled:
                yield bytes(1000)
        finally:
            noted.cancelled.set()

    def take_for_ever() -> None:
        try:
            for _ in current().parts():
                pass
        except errors.Cancelled:
            noted.cancelled.set()
            raise

    def stuck() -> Iterator[int]:
        yield 1
        current().wait_cancelled(30)

    def count() -> int:
        noted.ran += 1
        return noted.ran

    with broker_thread() as (broker, loop):
        worker = Worker("data", broker.url, SECRET, drain=0.1)
        for reads in (rows, two, blobs, mixed, file, pair, steps, endless, stuck, count):
            worker.add(reads)
        for sends in (total, again, take_for_ever):
            worker.add(sends)
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(20)
        yield broker, noted, loop
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(20)


@pytest.fixture
def noted(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Noted:
    for name in [name for name in os.environ if name.startswith("BROKER_")]:
        monkeypatch.delenv(name)
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("BROKER_URL", served[0].url)
    monkeypatch.setenv("BROKER_TOKEN", SECRET)
    for event in (served[1].cancelled, served[1].go_on):
        event.clear()
    return served[1]


@pytest.fixture
def run(noted: Noted, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["call", *arguments])
        return Result(code, *capfd.readouterr())

    return run


def start(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    """A real process that calls."""
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "broker", "call", *arguments], **(given | options))


def wait_until(condition: Callable[[], object], what: str) -> None:
    ends_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_at, f"never came true: {what}"
        time.sleep(0.01)


# ---------------------------------------------------------------- items


def test_items_are_lines_of_json_and_the_result_is_the_last(run: Run) -> None:
    assert run("data/rows", "[3]") == (0, '{"row":0}\n{"row":1}\n{"row":2}\n{"rows":3}\n', "")
    assert run("data/rows", "[0]") == (0, '{"rows":0}\n', "")
    lines = run("data/mixed", "--json").out.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"head": 1}, {"name": "a", "data": {"$base64": "YWJj"}}, {"$base64": "ZGVm"}, {"count": 2},
    ]  # fmt: skip


def test_items_are_printed_as_they_come(noted: Noted) -> None:
    process = start("data/two")
    assert process.stdout is not None
    assert process.stdout.readline() == b'"first"\n'
    assert process.poll() is None
    noted.go_on.set()
    assert process.communicate(timeout=20) == (b'"second"\n', b"")
    assert process.returncode == 0


def test_who_reads_the_lines_may_go_away(noted: Noted) -> None:
    process = start("data/endless")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert noted.cancelled.wait(20)
    assert process.wait(20) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


# ---------------------------------------------------------------- --out


def test_out_takes_its_name_when_all_has_come(noted: Noted, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    process = start("data/blobs", '{"count": 300, "size": 10000}', "--out", str(folder / "copy"))
    wait_until(lambda: [file.stat().st_size for file in folder.iterdir()] not in ([], [0]), "something is on the disk")
    assert not (folder / "copy").exists()
    assert process.poll() is None
    noted.go_on.set()
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == (b"", 0)
    assert err == b"wrote 3000000 bytes to %b\n" % bytes(folder / "copy")
    assert (folder / "copy").read_bytes() == b"".join(bytes([n % 256]) * 10000 for n in range(300))
    assert os.listdir(folder) == ["copy"]


def test_a_broken_connection_in_the_middle_does_not_show(served: Served, noted: Noted, tmp_path: Path) -> None:
    broker, _, loop = served
    folder = tmp_path / "out"
    folder.mkdir()
    process = start("data/blobs", '{"count": 300, "size": 10000}', "--out", str(folder / "copy"))
    wait_until(lambda: any(file.stat().st_size for file in folder.iterdir()), "it is saving")
    loop.call_soon_threadsafe(broker.links.links[-1].abort)
    noted.go_on.set()
    assert process.communicate(timeout=20)[0] == b""
    assert process.returncode == 0
    assert (folder / "copy").read_bytes() == b"".join(bytes([n % 256]) * 10000 for n in range(300))


def test_out_of_what_fails_leaves_what_was_there(run: Run, noted: Noted, tmp_path: Path) -> None:
    noted.go_on.set()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "copy").write_bytes(b"old")
    result = run("data/blobs", '{"count": 3, "size": 10, "fail": true}', "--out", str(folder / "copy"))
    assert (result.code, result.out) == (1, "")
    assert "LookupError: the disk is gone" in result.err
    result = run("data/pair", "--out", str(folder / "copy"))
    assert result.code == 2
    assert "an item has 2 attachments, not one" in result.err
    result = run("data/rows", "[0]", "--out", str(folder / "copy"))
    assert result.code == 2
    assert "the reply has 0 attachments, not one" in result.err
    assert (folder / "copy").read_bytes() == b"old"
    assert os.listdir(folder) == ["copy"]


def test_out_prints_what_is_around_the_bytes(run: Run, noted: Noted, tmp_path: Path) -> None:
    noted.go_on.set()
    out = tmp_path / "copy"
    result = run("data/mixed", "--out", str(out))
    assert result.out == '{"head":1}\n{"name":"a","data":{"$buffer":0}}\n{"count":2}\n'
    assert out.read_bytes() == b"abcdef"
    result = run("data/mixed", "--out", "-")
    assert result == (0, "abcdef", "")
    assert run("data/blobs", '{"count": 2, "size": 3}', "--out", "-").out == "\0\0\0\1\1\1"
    if Path("/dev/full").exists():
        result = run("data/blobs", '{"count": 2, "size": 3000000}', "--out", "/dev/full")
        assert (result.code, result.err) == (2, "broker: --out /dev/full: No space left on device\n")


def test_out_compares_what_came_with_what_was_sent(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    result = run("data/file", "[6]", "--out", str(out))
    assert (result.code, json.loads(result.out)["length"]) == (0, 6)
    assert out.read_bytes() == b"abcabc"
    assert run("data/file", "[0]", "--out", str(out)).err == f"wrote 0 bytes to {out}\n"
    assert out.read_bytes() == b""
    for wrong, says in (("[6, 5]", "its 6 bytes are damaged"), ("[7]", "6 bytes, and the worker says")):
        result = run("data/file", wrong, "--out", str(out))
        assert (result.code, result.out) == (1, "")
        assert says in result.err
    assert out.read_bytes() == b"", "as it was"


# ---------------------------------------------------------------- --in


def test_in_sends_a_file_of_any_size(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(20_000_001))
    told = {"size": 20_000_001, "crc32": zlib.crc32(file.read_bytes())}
    assert json.loads(run("data/total", "--in", str(file)).out) == told
    out = tmp_path / "copy"
    assert run("data/again", "--in", str(file), "--out", str(out)).code == 0
    assert out.read_bytes() == file.read_bytes()
    file.write_bytes(b"")
    assert json.loads(run("data/total", "--in", str(file)).out) == {"size": 0, "crc32": 0}
    assert json.loads(run("data/total", "--in", "-", stdin=b"abc").out)["size"] == 3
    done = start("data/total", "--in", "-", stdin=subprocess.PIPE)
    out_text, err = done.communicate(b"x" * 700_000, timeout=20)
    assert (json.loads(out_text)["size"], err, done.returncode) == (700_000, b"", 0)


def test_a_stdin_that_waits_for_input_does_not_keep_the_process(noted: Noted) -> None:
    process = start("data/take_for_ever", "--in", "-", "--timeout", "0.3", stdin=subprocess.PIPE)
    assert process.wait(20) == 6
    assert process.stderr is not None
    err = process.stderr.read()
    assert b"data/take_for_ever: deadline" in err
    assert err.count(b"\n") == 1
    process.communicate()
    assert noted.cancelled.wait(20)


# ---------------------------------------------------------------- options, and how it ends


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["data/total", "--in", "/no/such/file"], 2, "--in /no/such/file: No such file"),
        (["data/total", "--in", "/"], 2, "--in /: Is a directory"),
        (["data/total", "-", "--in", "-"], 2, "standard input holds the parameters or what --in sends, not both"),
        (["data/total", "--in", "/dev/null", "--key", "a"], 2, "--key is for a request that is repeated as a whole"),
        (["data/count", "--key", ""], 2, "key has 0 bytes"),
        (["data/count", "--priority", "10"], 2, "10 is not in the range"),
        (["data/count", "--idle", "0"], 2, "--idle 0 is not a positive number"),
        (["data/blobs", "[1, 1]", "--out", "/no/such/folder/x"], 2, "--out /no/such/folder/x: No such file"),
        (["data/rows", '["a"]'], 1, "TypeError"),
        (["data/rovs"], 5, "Did you mean rows?"),
        (["data/stuck", "--out", "-", "--idle", "0.2"], 6, "data/stuck: deadline"),
    ],
)
def test_what_goes_wrong(run: Run, arguments: list[str], code: int, says: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (code, "")
    assert says in result.err
    assert result.err.startswith("broker: ")
    assert result.err.count("\n") == 1


def test_a_key_gets_the_reply_of_the_first(run: Run) -> None:
    first = run("data/count", "--key", "k", "--group", "g", "--priority", "-3")
    assert first.code == 0
    assert run("data/count", "--key", "k", "--group", "g", "--priority", "-3") == first
    result = run("data/count", "[1]", "--key", "k")
    assert result.code == 2
    assert "key_conflict" in result.err


def test_timing(run: Run) -> None:
    result = run("data/rows", "[1]", "--timing")
    assert result.out == '{"row":0}\n{"rows":1}\n'
    told = json.loads(result.err)["timing_ms"]
    assert 0 <= told["dispatched_ms"] <= told["first_part_ms"] <= told["ended_ms"]
    assert "repeated as a whole" in run("data/rows", "[1]", "--timing", "--key", "k").err


def test_ctrl_c_in_a_stream_cancels_and_leaves_nothing(noted: Noted, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    process = start("data/endless", "--out", str(folder / "copy"))
    wait_until(lambda: any(file.stat().st_size for file in folder.iterdir()), "it is saving")
    process.send_signal(signal.SIGINT)
    assert noted.cancelled.wait(20)
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 130
    assert os.listdir(folder) == []


def test_ctrl_c_while_standard_input_is_awaited(noted: Noted) -> None:
    process = start("data/again", "--in", "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"abc")
    process.stdin.flush()
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.communicate() == (b"", b"")


# ---------------------------------------------------------------- the bar


def test_a_bar_on_a_terminal(noted: Noted) -> None:
    seen = _on_a_terminal(noted, "data/steps", "[10]")
    assert "100%" in seen
    assert "10/10" in seen
    assert "#" in seen
    assert "turning?[31m the stage" in seen, "one line, and nothing that the terminal would obey"
    assert _on_a_terminal(noted, "data/steps", "[10]", "--no-progress") == ""
    bar, _, timing = _on_a_terminal(noted, "data/steps", "[10]", "--timing").rpartition("\x1b[K\r\n")
    assert "10/10" in bar
    assert timing.startswith('{"timing_ms":{') and timing.endswith("}}\r\n"), "when the bar is finished"
    assert _on_a_terminal(noted, "data/steps", "[10]", "--json") == ""


def _on_a_terminal(noted: Noted, *arguments: str) -> str:
    """What a terminal on standard error shows of a call that takes as long as it needs to show something."""
    program = """
import sys
from broker.cli import bar, transfer
from broker.cli.main import main
transfer.SHOWN_AFTER_S = 0
bar.TICK_S = 0.01
sys.exit(main(["call", *sys.argv[1:]]))
"""
    terminal, end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=end, stdout=subprocess.DEVNULL)
    os.close(end)
    noted.go_on.set()
    seen = b""
    try:
        while piece := os.read(terminal, 4096):
            seen += piece
    except OSError:
        pass  # how a terminal ends on Linux
    assert process.wait(20) == 0
    os.close(terminal)
    return seen.decode()


def test_lines_where_there_is_no_terminal(run: Run, noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    noted.go_on.set()
    monkeypatch.setattr(transfer, "SHOWN_AFTER_S", 0)
    result = run("data/steps", "[4]", "--progress")
    assert result.out == '"turned"\n'
    assert result.err.splitlines()[-1].startswith("data/steps  [#")
    assert "100%  4/4" in result.err
    assert "\r" not in result.err
    assert run("data/steps", "[4]").err == ""


@pytest.mark.parametrize("width", [20, 30, 50, 80, 300])
def test_the_line_fits(width: int) -> None:
    bar = Bar("reading 数据/长长长长长长长.bin", shown=True, after_s=0)
    bar.count(500, 1_000_000)
    assert columns_of(bar.line(width)) <= width
    bar.tell(5, 10, "数据 " * 20)
    line = bar.line(width)
    assert columns_of(line) <= width
    assert line.endswith("…" if width < 200 else "数据")
    bar.tell(5, None, None)
    assert columns_of(bar.line(width)) <= width


def test_the_line_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("broker.cli.bar.time.monotonic", lambda: now)
    bar = Bar("", shown=True, after_s=0)
    bar.tell(0, 1_070_000_000, "bytes")
    now += 1
    bar.tell(172_000_000, 1_070_000_000, "bytes")
    assert bar.line(100).endswith("172 MB of 1.07 GB  172 MB/s  5 s left")
    bar.tell(1_070_000_000, 1_070_000_000, "bytes")
    assert bar.line(100).endswith("1.07 GB of 1.07 GB  1.07 GB/s")
    bar.tell(10, 100_000, "rows")
    assert bar.line(100).endswith("10/100 k  10/s  2.78 h left  rows")
    bar.tell(10, 6000, "rows")
    assert "10 min left" in bar.line(100)


def test_what_the_line_says() -> None:
    bar = Bar("data/read", shown=True, after_s=0)
    bar.count(1_234_567)
    assert bar.line(80) == "data/read  1.23 MB"
    bar.count(500, 1000)
    assert bar.line(80) == f"data/read  [{'#' * 20}{'-' * 20}]   50%  500 B of 1 kB"
    bar.tell(3, None, "warming up")
    assert bar.line(80) == "data/read  3  warming up"
    bar.count(999, 1000)
    assert bar.line(80) == "data/read  3  warming up", "what the worker tells goes first"
    bar.tell(7, 0, "")
    assert bar.line(80) == "data/read  7/0"
    bar.tell(30, 20, "more than all")
    assert "100%  30/20  more than all" in bar.line(100)
    bar.tell(-1, 20, None)
    assert "  0%  -1/20" in bar.line(100)
    bar.tell(1_234_567, 12_345_678, None)
    assert "1.23 M/12.3 M" in bar.line(100)
    bar.tell(9999, None, None)
    assert bar.line(80) == "data/read  9999"
    bar.tell(172_000_000, 1_070_000_000, "bytes")
    assert bar.line(100).endswith("16%  172 MB of 1.07 GB"), "the unit is no text"
    assert cut("añ数据", 4) == "añ…"
    assert (columns_of("e\u0301"), cut("abc", 3), cut("abc", 1)) == (1, "abc", "…")
