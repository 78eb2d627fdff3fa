"""The access file: who finds which broker, and what is never believed."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker.auth import access_file
from broker.auth.access_file import DEFAULT_PORT, Access, AccessError, AccessFile, find, live, runtime_folder


def access(port: int, token: str = "brk_x", pid: int | None = None) -> Access:
    return Access(url=f"http://127.0.0.1:{port}", token=token, pid=pid or os.getpid(), started=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "broker"


def test_written_found_and_removed(folder: Path) -> None:
    file = AccessFile.write(9001, access(9001, "brk_secret"), folder)
    assert find(folder=folder) == access(9001, "brk_secret")
    assert find(9001, folder) == access(9001, "brk_secret")
    assert sorted(json.loads(file.path.read_text())) == ["pid", "started", "token", "url"]
    file.remove()
    file.remove()
    assert list(folder.iterdir()) == []
    with pytest.raises(AccessError, match="no broker of yours runs here"):
        find(folder=folder)


def test_the_file_and_its_folder_are_private_under_any_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        file = AccessFile.write(9001, access(9001), folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file.remove()


def test_a_folder_left_open_is_closed_to_others(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    file = AccessFile.write(9001, access(9001), folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file.remove()


def test_several_brokers(folder: Path) -> None:
    files = [AccessFile.write(port, access(port), folder) for port in (9001, 9002)]
    with pytest.raises(AccessError, match=r"say which with --url: http://127.0.0.1:9001, http://127.0.0.1:9002"):
        find(folder=folder)
    assert find(9002, folder).url.endswith(":9002")
    with pytest.raises(AccessError, match="runs on port 9003"):
        find(9003, folder)
    files.append(AccessFile.write(DEFAULT_PORT, access(DEFAULT_PORT), folder))
    assert find(folder=folder).url.endswith(f":{DEFAULT_PORT}")
    for file in files:
        file.remove()


HOLDER = """
import os, sys, time
from pathlib import Path
from broker.auth.access_file import Access, AccessFile
access = Access(url="http://127.0.0.1:9001", token="brk_x", pid=os.getpid(), started=1.0)
file = AccessFile.write(9001, access, Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_broker_s_file_is_stale_and_the_next_one_takes_its_place(folder: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        assert list(live(folder)) == [9001]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert (folder / "9001.json").exists()
    assert live(folder) == {}
    file = AccessFile.write(9001, access(9001, "brk_next"), folder)
    assert find(folder=folder).token == "brk_next"
    file.remove()


def test_a_process_number_taken_by_another_process_makes_no_file_live(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "9001.json").write_text(json.dumps({"url": "http://x", "token": "t", "pid": os.getpid(), "started": 1.0}))
    (folder / "9001.json").chmod(0o600)
    assert live(folder) == {}, "nobody holds its lock"


def test_a_lock_kept_by_a_child_makes_no_file_live(folder: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, -1, 10**30):
        file = AccessFile.write(9001, access(9001, pid=pid), folder)
        assert live(folder) == {}
        file.remove()


def test_a_stopping_broker_leaves_its_successor_s_file(folder: Path) -> None:
    old = AccessFile.write(9001, access(9001, "brk_old"), folder)
    new = AccessFile.write(9001, access(9001, "brk_new"), folder)
    old.remove()
    assert find(folder=folder).token == "brk_new"
    new.remove()


def test_removing_after_the_folder_has_gone(folder: Path) -> None:
    file = AccessFile.write(9001, access(9001), folder)
    file.path.unlink()
    folder.rmdir()
    file.remove()


def test_links_and_other_things_under_a_port_s_name_are_not_believed(folder: Path, tmp_path: Path) -> None:
    elsewhere = AccessFile.write(9001, access(9001), tmp_path / "elsewhere")
    folder.mkdir(mode=0o700)
    (folder / "9001.json").symlink_to(elsewhere.path)
    os.mkfifo(folder / "9002.json", 0o600)
    (folder / "9003.json").mkdir()
    (folder / "9004.json").write_text("{")
    (folder / "9005.json").write_text("[" * 100_000)
    (folder / "0009.json").write_text("{}")
    started = time.monotonic()
    assert live(folder) == {}
    assert time.monotonic() - started < 30, "no FIFO held it"
    elsewhere.remove()


def test_a_link_in_place_of_the_file_is_replaced_not_followed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (folder / "9001.json").symlink_to(precious)
    file = AccessFile.write(9001, access(9001), folder)
    assert precious.read_text() == "precious"
    assert not file.path.is_symlink()
    file.remove()


def test_a_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    file = AccessFile.write(9001, access(9001), tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(AccessError, match="not a folder of your own"):
        AccessFile.write(9001, access(9001), folder)
    assert live(folder) == {}
    file.remove()


def test_a_file_others_may_write_is_not_believed(folder: Path) -> None:
    file = AccessFile.write(9001, access(9001), folder)
    file.path.chmod(0o666)
    assert live(folder) == {}
    file.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give things away")
def test_what_belongs_to_somebody_else_is_not_believed(folder: Path) -> None:
    file = AccessFile.write(9001, access(9001), folder)
    os.chown(file.path, 12345, 12345)
    assert live(folder) == {}
    os.chown(file.path, 0, 0)
    assert list(live(folder)) == [9001]
    os.chown(folder, 12345, 12345)
    assert live(folder) == {}
    with pytest.raises(AccessError, match="owner uid 12345"):
        AccessFile.write(9001, access(9001), folder)
    file.remove()


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_folder() == tmp_path / "broker"
    file = AccessFile.write(9001, access(9001))
    assert file.path == tmp_path / "broker" / "9001.json"
    assert find() == access(9001)
    file.remove()


@pytest.mark.parametrize("bad", ["", "relative", "/nowhere/at/all", "open"])
def test_a_runtime_folder_that_is_not_the_user_s_own_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    if bad == "open":
        bad = str(tmp_path / "open")
        os.mkdir(bad)
        os.chmod(bad, 0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", bad)
    monkeypatch.setattr(access_file.tempfile, "gettempdir", lambda: str(tmp_path))
    assert runtime_folder() in {tmp_path / f"broker-{os.geteuid()}", Path(f"/run/user/{os.geteuid()}/broker")}
