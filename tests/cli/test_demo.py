"""`broker demo`: the whole story as a process, and that it leaves nothing behind however it ends."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "broker" / "demo"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A folder for temporary files of its own, to see what is left there; a mark, to see what still runs."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "elsewhere").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    # Whatever the user has set up does not matter to the demo.
    odd = {"BROKER_URL": "http://127.0.0.1:1", "BROKER_TOKEN": "wrong", "BROKER_SERVER__PORT": "1"}
    return kept | odd | {"TMPDIR": str(tmp_path / "tmp")}


def start(environment: dict[str, str], *arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "broker", "demo", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder,
    )  # fmt: skip


def assert_nothing_is_left(environment: dict[str, str]) -> None:
    place = environment["TMPDIR"]
    assert os.listdir(place) == []
    assert processes_with(place) == []


def processes_with(text: str) -> list[str]:
    """Processes that the demo has started: the folder is in their environment."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc/self/environ").exists() else ():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and int(entry.name) != os.getpid()
                and text.encode() in (entry / "environ").read_bytes()
            ):
                found.append((entry / "cmdline").read_bytes().decode())
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder with names that would mislead Python."""
    folder = tmp_path / "elsewhere"
    yield folder
    assert os.listdir(folder) == []


def test_the_story(environment: dict[str, str], elsewhere: Path) -> None:
    done = start(environment, folder=elsewhere)
    out, err = done.communicate(timeout=55)
    assert (done.returncode, err) == (0, "")
    for line in (
        r"it serves on http://127\.0\.0\.1:\d+",
        r"it is there \(process \d+\), with list, newest, read, stat, watch",
        r"\d+ bytes  measurements\.csv",
        r"phantom\.png: \d+ bytes in [\d.]+ ms, byte for byte the file on disk",
        r"a listener heard, as number 1: the magnet is cold",
        r"volume-003\.dcm was told when it was complete",
        r"data/watch: worker_lost: ",
        r"accepted (\d+) = ended \1 \(\d+ ok, 1 worker_lost\) \+ pending 0",
        r"That was all, in ",
    ):
        assert re.search(line, out), f"{line} is not in\n{out}"
    assert_nothing_is_left(environment)


def test_it_runs_from_a_folder_that_would_mislead_python(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mislead"
    (folder / "broker").mkdir(parents=True)
    (folder / "json.py").write_text("raise SystemExit('the wrong json')")
    program = "import sys; sys.path.pop(0); from broker.cli.main import main; sys.exit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=folder, timeout=55,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_nothing_is_left(environment)


def test_a_folder_of_ones_own_is_only_read(environment: dict[str, str], elsewhere: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "sub" / "note.txt").write_text("mine")
    before = sorted((path, path.stat().st_mtime_ns) for path in mine.rglob("*"))
    done = start(environment, str(mine), folder=elsewhere)
    out, err = done.communicate(timeout=55)
    assert (done.returncode, err) == (0, "")
    assert "sub/note.txt: 4 bytes in" in out
    assert "volume-003.dcm was told" in out
    assert sorted((path, path.stat().st_mtime_ns) for path in mine.rglob("*")) == before
    assert_nothing_is_left(environment)


def test_an_empty_folder(environment: dict[str, str], elsewhere: Path) -> None:
    done = start(environment, str(elsewhere), folder=elsewhere)
    out, err = done.communicate(timeout=55)
    assert (done.returncode, err) == (0, "")
    assert "there is no small file to fetch" in out


def test_no_such_folder(environment: dict[str, str], elsewhere: Path) -> None:
    done = start(environment, "nothing", folder=elsewhere)
    _, err = done.communicate(timeout=55)
    assert (done.returncode, err) == (2, "broker: nothing: there is no such folder\n")


def read_until(process: subprocess.Popen[str], what: str) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if what in line:
            return "".join(lines)
    pytest.fail(f"{what!r} never came: {''.join(lines)} {process.stderr.read() if process.stderr else ''}")


def test_keep_prints_what_works_when_pasted(environment: dict[str, str], elsewhere: Path) -> None:
    process = start(environment, "--keep", folder=elsewhere)
    try:
        out = read_until(process, "In Python:") + read_until(process, "print(entry")
        snippet = out[out.index("from broker import") :]
        clean = {name: value for name, value in environment.items() if not name.startswith("BROKER_")}
        done = subprocess.run(
            [sys.executable, "-c", snippet], capture_output=True, text=True, env=clean, timeout=50, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "phantom.png" in done.stdout
        if shutil.which("curl"):
            line = next(line for line in out.splitlines() if line.startswith("curl "))
            done = subprocess.run(
                ["sh", "-c", f"{line} --noproxy '*' -s -f"], capture_output=True, text=True, timeout=50, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "phantom.png" in done.stdout
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
    finally:
        process.kill()
        process.wait()
    assert_nothing_is_left(environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["A broker starts", "it serves on", "byte for byte", "kill -9"])
def test_a_signal_leaves_nothing(
    environment: dict[str, str], elsewhere: Path, moment: str, number: signal.Signals
) -> None:
    process = start(environment, folder=elsewhere)
    read_until(process, moment)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert_nothing_is_left(environment)


def test_a_second_signal_hurries(environment: dict[str, str], elsewhere: Path) -> None:
    process = start(environment, folder=elsewhere)
    read_until(process, "it is there")
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)  # the last one may come when everything is over
    assert err == ""
    assert_nothing_is_left(environment)


def test_a_reader_that_goes_away_leaves_nothing(environment: dict[str, str], elsewhere: Path) -> None:
    process = start(environment, folder=elsewhere)
    read_until(process, "it serves on")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
    assert_nothing_is_left(environment)


def test_the_data_that_comes_along() -> None:
    import pydicom

    for name in ("volume-001.dcm", "volume-002.dcm"):
        image = pydicom.dcmread(DATA / name)
        assert image.pixel_array.shape == (128, 128)
        assert image.PatientName == "Phantom^Computed"
    assert (DATA / "phantom.png").read_bytes().startswith(b"\x89PNG")
    assert len((DATA / "measurements.csv").read_text().splitlines()) == 241
    described = (DATA / "README.md").read_text()
    assert all(file.name in described for file in DATA.iterdir() if file.suffix not in (".md", ".pyc"))
    assert sum(file.stat().st_size for file in DATA.iterdir() if file.is_file()) < 200_000
