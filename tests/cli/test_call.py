"""The commands that ask: what they print, where, and with which exit code; a few as real processes."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broker.cli.main import main
from broker.node.broker import Broker
from broker.worker import current
from broker.worker.worker import Worker
from tests.peer.harness import CALLER, SECRET, broker_thread


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]
Running = tuple[Broker, asyncio.AbstractEventLoop]


def read(path: str = "", raw: bytes = b"") -> Any:
    """Read something."""
    return {"path": path, "data": b"\x00\xff" + raw}


def hang() -> None:
    current().wait_cancelled(50)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with broker_thread(endpoints={"kept": {"history": 10}}) as (broker, loop):
        worker = Worker("data", broker.url, SECRET, name="cam\x1b[31mera", drain=0.1)
        worker.add(read)
        worker.add(hang)
        worker.add(lambda *a, **k: k or list(a), "echo")
        worker.add(lambda: b"only bytes", "bytes")
        worker.add(lambda: 1 / 0, "fail")
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(20)
        yield broker, loop
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(20)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("BROKER_")]:
        monkeypatch.delenv(name)
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def run(running: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("BROKER_URL", running[0].url)
    monkeypatch.setenv("BROKER_TOKEN", SECRET)

    def run(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape"))))
        code = main(list(arguments))
        return Result(code, *capfd.readouterr())

    return run


def test_call_prints_the_reply_as_json(run: Run) -> None:
    assert run("call", "data/echo", '{"a": [1, "ä"]}') == (0, '{"a":[1,"ä"]}\n', "")
    assert run("call", "data/echo", "-", stdin="[1,\n2]") == (0, "[1,2]\n", "")
    code, _, said = run("call", "data/echo", "-", stdin="\udcff")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("broker: standard input is no JSON: ")
    assert run("call", "data/echo") == (0, "[]\n", "")
    assert json.loads(run("call", "broker.ping").out)["node"]


def test_bytes_go_out_and_come_in(run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "in.bin", tmp_path / "out.bin"
    file.write_bytes(b"abc")
    assert run("call", "data/read", '{"path":"p"}').out == '{"path":"p","data":{"$base64":"AP8="}}\n'
    assert run("call", "data/read", "--attach", f"raw={file}", "--out", str(out)) == (
        0, '{"path":"","data":{"$buffer":0}}\n', f"wrote 5 bytes to {out}\n",
    )  # fmt: skip
    assert out.read_bytes() == b"\x00\xffabc"
    assert run("call", "data/echo", '[{"$buffer": 0}]', "--attach", str(file)).out == '[{"$base64":"YWJj"}]\n'
    assert run("call", "data/bytes", "--out", str(out)) == (0, "", f"wrote 10 bytes to {out}\n")
    assert run("call", "data/bytes", "--out", "-") == (0, "only bytes", "")
    result = run("call", "data/echo", "[1]", "--out", str(out))
    assert (result.code, result.out) == (2, "[1]\n")
    assert "has 0 attachments, not one" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["data/echo", "{"], 2, "'{' is no JSON"),
        (["data/echo", "5"], 2, "data/echo: params is of type int; give a dict"),
        (["nonsense"], 2, "'nonsense' is not of the form endpoint/method"),
        (["data/echo", "--timeout", "0"], 2, "not a positive number"),
        (["data/echo", "--retries", "1"], 2, "retries needs idempotent"),
        (["data/echo", "--grace", "inf"], 2, "inf is not in the range"),
        (["data/echo", "--timeout", "1e9"], 2, "above the bound"),
        (["data/echo", "--attach", "/no/such/file"], 2, "--attach /no/such/file: No such file"),
        (["data/echo", "[1]", "--attach", "x=/dev/null"], 2, "parameters by name"),
        (["data/echo", "[1]", "--attach", "/dev/null"], 2, 'write {"$buffer": 0} where it belongs'),
        (["data/bytes", "--out", "/no/such/folder/x"], 2, "--out /no/such/folder/x: No such file"),
        (["data/ecko"], 5, "data/ecko: no_method: no worker of data has a method ecko"),
        (["data/ecko"], 5, "Did you mean echo?"),
        (["daat/echo"], 5, "Did you mean data?"),
        (["xyzzy/echo"], 5, " Endpoints here: data."),
        (["data/xyzzy"], 5, " Methods of data: bytes, "),
        (["data/fail"], 1, "data/fail: worker_error: ZeroDivisionError: division by zero (worker "),
        (["data/read", "[1,2,3]"], 1, "Invalid params: read(path: str = '', raw: bytes = b'')"),
        (["data/hang", "--timeout", "0.1"], 6, "data/hang: deadline"),
        (["broker.nonsense"], 5, "the broker's own methods are"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(run: Run, arguments: list[str], code: int, says: str) -> None:
    result = run("call", *arguments)
    assert (result.code, result.out) == (code, "")
    assert says in result.err
    assert result.err.startswith("broker: ")
    assert result.err.count("\n") == 1


def test_errors_as_json(run: Run) -> None:
    result = run("call", "data/fail", "--json")
    error = json.loads(result.out)["error"]
    assert (error["outcome"], error["data"]) == (
        "worker_error", {"type": "ZeroDivisionError", "message": "division by zero"},
    )  # fmt: skip
    assert result.code == 1
    assert result.err


def test_credentials_and_places(run: Run, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("ping", "--token", "wrong" * 9)
    assert result.code == 4
    assert "does not let us in" in result.err
    assert "wrong" not in result.err
    result = run("peers", "--token", CALLER)
    assert result.code == 4
    assert "denied" in result.err
    result = run("ping", "--url", "http://127.0.0.1:1")
    assert (result.code, result.out) == (3, "")
    assert "no broker at http://127.0.0.1:1: Connection refused" in result.err
    assert run("ping", "--url", "nonsense://x").code == 2
    monkeypatch.delenv("BROKER_URL")
    monkeypatch.delenv("BROKER_TOKEN")
    result = run("ping")
    assert result.code == 3
    assert "start one with `broker serve`" in result.err
    assert run("ping", "--url", running[0].url, "--token", SECRET).code == 0
    result = run("ping", "--url", running[0].url)
    assert result.code == 4, "no token at all"


def test_listings(run: Run) -> None:
    result = run("endpoints")
    assert result.out.splitlines()[0].split() == ["endpoint", "workers", "free", "executing", "queued", "listeners"]
    assert [line.split()[:2] for line in sorted(result.out.splitlines()[1:])] == [["data", "1"], ["kept", "0"]]
    assert {one["endpoint"] for one in json.loads(run("endpoints", "--json").out)} == {"data", "kept"}
    assert "serves" in run("peers").out
    assert {peer["principal"] for peer in json.loads(run("peers", "--json").out)} == {"local"}
    assert json.loads(run("pending", "--json").out) == []
    assert run("pending").err == "nothing is pending\n"
    assert "answered in" in run("ping").out
    assert json.loads(run("ping", "--json").out)["round_trip_ms"] > 0
    result = run("describe", "data")
    assert "read(path: str = '', raw: bytes = b'') -> Any  Read something." in result.out
    assert "\x1b" not in result.out, "what others are called does nothing to the terminal"
    assert json.loads(run("describe", "data", "--json").out)["endpoint"] == "data"
    assert run("describe", "nothing").code == 5


def test_broadcast_and_listen(run: Run) -> None:
    heard: list[Result] = []

    def listen(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "broker", "listen", *arguments], capture_output=True, text=True, check=False,
            timeout=50,
        )  # fmt: skip
        heard.append(Result(done.returncode, done.stdout, done.stderr))

    for arguments, sent, expected in (
        (("data", "--count", "2"), ("data",), "{}\n{}\n"),
        (("data", "--topic", "new", "--json", "--count", "1"), ("data", "--topic", "new"), None),
        (("--count", "1"), ("--all",), "{}\n"),
    ):
        thread = threading.Thread(target=listen, args=arguments)
        thread.start()
        where = () if "--all" in sent else (sent[0],)
        for _ in range(2 if "2" in arguments else 1):
            while thread.is_alive():
                options = [one for one in sent if one not in where]
                result = run("broadcast", *where, "{}", *options)
                assert result.code == 0
                if "sent to 0 listeners" not in result.err and "--all" not in sent:
                    break
                time.sleep(0.05)
        thread.join(50)
        assert heard[-1].code == 0, heard[-1]
        assert "listening to" in heard[-1].err
        if expected is not None:
            assert heard[-1].out == expected
        else:
            assert json.loads(heard[-1].out) == {"endpoint": "data", "topic": "new", "seq": 1, "data": {}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "to whom?"),
        (["data", "{"], "is no JSON"),
        (["--all", "1", "2"], "--all goes to everybody"),
        (["--to", "nobody-1"], "no peer"),
    ],
)
def test_wrong_broadcasts(run: Run, arguments: list[str], says: str) -> None:
    result = run("broadcast", *arguments)
    assert result.code == 2
    assert says in result.err


def test_listening_in_vain(run: Run) -> None:
    result = run("listen", "data", "--timeout", "0.05")
    assert result.code == 6
    assert "no broadcast of data within 0.05 s" in result.err


def test_listening_to_what_was_before(run: Run) -> None:
    for n in range(3):
        assert run("broadcast", "kept", str(n), "--topic", "new").code == 0
    listen = ("listen", "kept", "--topic", "new", "--timeout", "20")
    result = run(*listen, "--since", "1", "--count", "2", "--grace", "1")
    assert (result.code, result.out) == (0, "1\n2\n")
    epoch = result.err.strip().removesuffix(")").rpartition("(epoch ")[2]
    assert run(*listen, "--since", "2", "--count", "1", "--epoch", epoch).out == "2\n"
    assert run(*listen, "--since", "2", "--count", "1", "--epoch", "another").out == "0\n"
    result = run(*listen, "--epoch", epoch)
    assert (result.code, "--epoch goes with --since" in result.err) == (2, True)
    assert run("listen", "--since", "1").code == 2


def test_wait_queues_until_a_worker_comes(run: Run, running: Running) -> None:
    broker, loop = running

    async def serve() -> Worker:
        while not broker.router.pending.count:
            await asyncio.sleep(0.01)
        worker = Worker("later", broker.url, SECRET)
        worker.add(lambda: "here", "where")
        return await worker.start()

    coming = asyncio.run_coroutine_threadsafe(serve(), loop)
    assert run("call", "later/where", "--wait", "--timeout", "20") == (0, '"here"\n', "")
    asyncio.run_coroutine_threadsafe(coming.result(20).stop(), loop).result(20)
    assert run("call", "later/where").code == 5


def test_ctrl_c_cancels_and_exits_130(run: Run, running: Running) -> None:
    async def cancelled() -> int:
        return running[0].router.counters.ended["cancelled"]

    before = asyncio.run_coroutine_threadsafe(cancelled(), running[1]).result(20)
    process = subprocess.Popen(
        [sys.executable, "-m", "broker", "call", "data/hang"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not json.loads(run("pending", "--json").out):
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130
    assert asyncio.run_coroutine_threadsafe(cancelled(), running[1]).result(20) == before + 1
