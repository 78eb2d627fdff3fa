"""`broker work files` and `broker call … --out` over files of any size."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.cli import transfer
from broker.cli.main import main
from broker.worker import files as worker_files
from broker.worker.files import Files
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, broker_thread, run

BIG = 20_000_001


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    served = tmp_path / "data"
    served.mkdir()
    (served / "a.dcm").write_bytes(b"DICM")
    (served / "big.bin").write_bytes(os.urandom(BIG))
    return served


@pytest.fixture
def at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A broker with a files worker; BROKER_URL and BROKER_TOKEN lead there."""
    with broker_thread() as (broker, loop):
        worker = Worker("data", broker.url, SECRET).add_object(Files(folder))
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(20)
        monkeypatch.setenv("BROKER_URL", broker.url)
        monkeypatch.setenv("BROKER_TOKEN", SECRET)
        yield
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(20)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "nothing: there is no such folder"),
        (["data/a.dcm"], "data/a.dcm: there is no such folder"),
        (["data", "--types", "a/b"], "--types a/b: give endings"),
        (["/"], "/: /, /proc, /sys and /dev hold the system's own files; name the folder that holds the data"),
        (["data", "--endpoint", "a b"], "'a b' is no name of an endpoint"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    folder: Path, arguments: list[str], says: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["work", "files", "--endpoint", "data", *arguments]) == 2
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_real_process_serves_a_folder_and_ends_by_sigterm(folder: Path) -> None:
    async def story() -> None:
        async with broker_running() as broker:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "broker", "work", "files", str(folder), "--endpoint", "data",
                "--types", "dcm, .txt", "--allow-write", "--json", "--url", broker.url, "--token", SECRET,
                stderr=subprocess.PIPE,
            )  # fmt: skip
            assert process.stderr is not None
            line = {"message": ""}
            while "serving data at" not in line["message"]:
                line = json.loads(await asyncio.wait_for(process.stderr.readline(), 20))
                assert line["level"] == "info"
            from broker.client.async_client import AsyncClient

            async with AsyncClient(broker.url, SECRET) as client:
                assert [entry["path"] for entry in (await client.call("data/list"))["entries"]] == ["a.dcm"]
                assert (await client.call("data/read", {"path": "a.dcm"}))["data"] == b"DICM"
                await client.call("data/write", {"path": "new.txt", "data": b"new"})
            process.send_signal(signal.SIGTERM)
            rest = (await asyncio.wait_for(process.communicate(), 20))[1]
            assert process.returncode == 0
            assert b"Traceback" not in rest

    run(story)
    assert (folder / "new.txt").read_bytes() == b"new"


def test_a_file_larger_than_a_message_is_saved_whole(
    folder: Path, at: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy.bin"
    assert main(["call", "data/read", '{"path": "big.bin"}', "--out", str(out), "--json"]) == 0
    told = capfd.readouterr()
    assert out.read_bytes() == (folder / "big.bin").read_bytes()
    assert f"wrote {BIG} bytes to {out}" in told.err
    view = json.loads(told.out)
    assert (view["length"], view["size"], view["more"]) == (BIG, BIG, False)
    part = '{"path": "big.bin", "offset": 1, "length": 9000000}'
    assert main(["call", "data/read", part, "--out", str(out)]) == 0
    assert out.read_bytes() == (folder / "big.bin").read_bytes()[1:9000001]
    assert main(["call", "data/read", '["big.bin"]', "--out", str(out)]) == 0
    assert out.stat().st_size == BIG


def test_out_to_standard_output(folder: Path, at: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "broker", "call", "data/read", '{"path": "big.bin"}', "--out", "-"],
        capture_output=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "big.bin").read_bytes()


def test_out_that_cannot_be_written_is_one_line(at: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["call", "data/read", '{"path": "big.bin"}', "--out", "/nothing/there"]) == 2
    assert capfd.readouterr().err == "broker: --out /nothing/there: No such file or directory\n"
    if Path("/dev/full").exists():
        assert main(["call", "data/read", '{"path": "big.bin"}', "--out", "/dev/full"]) == 2
        assert capfd.readouterr().err == "broker: --out /dev/full: No space left on device\n"


def test_a_file_that_changes_is_an_error_and_leaves_nothing(
    folder: Path, at: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = transfer.Ranges.take

    def take_and_change(ranges: transfer.Ranges, reply: object) -> bytes:
        os.utime(folder / "big.bin", (1, 1))
        return take(ranges, reply)

    monkeypatch.setattr(transfer.Ranges, "take", take_and_change)
    assert main(["call", "data/read", '{"path": "big.bin"}', "--out", str(tmp_path / "copy")]) == 1
    assert "'big.bin' has changed since" in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["data"]


def test_a_long_transfer_shows_its_progress_on_a_terminal(folder: Path, at: None, tmp_path: Path) -> None:
    program = """
import sys
from broker.cli import transfer
from broker.cli.main import main
transfer.SHOWN_AFTER_S = 0
sys.exit(main(sys.argv[1:]))
"""
    terminal, end = pty.openpty()
    out = str(tmp_path / "copy")
    command = [sys.executable, "-c", program, "call", "data/read", '{"path": "big.bin"}', "--out", out]
    process = subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL)
    os.close(end)
    seen = b""
    try:
        while piece := os.read(terminal, 4096):
            seen += piece
    except OSError:
        pass  # how a terminal ends on Linux
    assert process.wait(20) == 0
    os.close(terminal)
    assert b"reading big.bin" in seen
    assert b"100%" in seen
    assert Path(out).stat().st_size == BIG


def test_a_short_one_shows_nothing(at: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["call", "data/read", '{"path": "a.dcm"}', "--out", str(tmp_path / "copy")]) == 0
    assert "%" not in capfd.readouterr().err


def test_ctrl_c_in_the_middle_leaves_nothing(folder: Path, at: None, tmp_path: Path) -> None:
    with (folder / "huge.bin").open("wb") as file:
        file.truncate(worker_files.READ_MAX_BYTES * 300)  # a hole: costs no disk
    out = tmp_path / "copies"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "broker", "call", "data/read", '{"path": "huge.bin"}', "--out", str(out / "copy")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    ends_at = time.monotonic() + 20
    while not os.listdir(out):
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert os.listdir(out) == []
