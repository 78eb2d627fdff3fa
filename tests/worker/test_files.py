"""`Files`: what it tells, what it refuses (attack row 30), and how it waits."""

import asyncio
import base64
import errno
import os
import resource
import socket
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.peer.errors import DeadlineExceeded, RemoteError
from broker.worker import confined
from broker.worker import files as module
from broker.worker.confined import Confined, FileChanged, FileRefused, Look
from broker.worker.files import Files
from broker.worker.uploads import Upload
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, run, until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder `data` beside `dataevil` and a secret, with a few files."""
    served = tmp_path / "data"
    (served / "sub").mkdir(parents=True)
    (served / "a.txt").write_bytes(b"alpha")
    (served / "b.dcm").write_bytes(b"\x00DICM")
    (served / "sub" / "c.txt").write_bytes(b"gamma")
    (tmp_path / "dataevil").mkdir()
    (tmp_path / "dataevil" / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    return served


def paths(told: dict[str, Any]) -> list[str]:
    return [entry["path"] for entry in told["entries"]]


def everything(files: Files) -> list[Callable[[str], Any]]:
    """Every way to name a path."""
    return [
        files.read, files.stat, files.list, files.delete,
        lambda path: files.read(path, stream=True),
        lambda path: files.write(path, b"evil", overwrite=True),
        lambda path: files.newest("*", path),
        lambda path: asyncio.run(files.watch(path=path, existing=True, timeout=0.0)),
    ]  # fmt: skip


def all_allowed(folder: Path) -> Files:
    return Files(folder, writable=True, deletable=True)


# ---------------------------------------------------------------- what it tells


def test_list(folder: Path) -> None:
    files = Files(folder)
    told = files.list()
    assert paths(told) == ["a.txt", "b.dcm", "sub"]
    assert told["more"] is False
    assert [entry["type"] for entry in told["entries"]] == ["file", "file", "folder"]
    assert told["entries"][0]["size"] == 5
    assert told["entries"][0]["modified"] == (folder / "a.txt").stat().st_mtime
    assert paths(files.list("sub")) == ["sub/c.txt"]
    assert paths(files.list(pattern="*.txt", recursive=True)) == ["a.txt", "sub/c.txt"]
    assert paths(files.list(".", "[ab].*")) == ["a.txt", "b.dcm"]


def test_list_goes_on_where_it_stopped(folder: Path) -> None:
    for number in range(20):
        (folder / "sub" / f"{number:02}").touch()
    (folder / "sub-x").touch()
    files = Files(folder)
    whole = paths(files.list(recursive=True))
    found: list[str] = []
    told = files.list(recursive=True, limit=3)
    while told["more"]:
        assert len(told["entries"]) == 3
        found += paths(told)
        told = files.list(recursive=True, limit=3, after=found[-1])
    assert found + paths(told) == whole
    assert len(whole) == 25


def test_a_long_list_stays_below_a_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIST_MAX_BYTES", 1000)
    for number in range(10):
        (folder / "sub" / (f"{number}" + "x" * 200)).touch()
    told = Files(folder).list("sub")
    assert told["more"]
    assert len(told["entries"]) < 5


def test_stat_and_read(folder: Path) -> None:
    files = Files(folder)
    state = files.stat("a.txt")
    assert (state["path"], state["type"], state["size"]) == ("a.txt", "file", 5)
    assert files.stat(".")["path"] == "."
    assert files.stat("sub/../a.txt") == state
    whole = files.read("a.txt")
    assert whole == {
        "path": "a.txt", "size": 5, "offset": 0, "length": 5, "more": False, "version": state["version"],
        "data": b"alpha",
    }  # fmt: skip
    assert files.read("a.txt", 1, 3)["data"] == b"lph"
    assert files.read("a.txt", 1, 3)["more"] is False
    assert files.read("a.txt", 3, 100)["data"] == b"ha"
    assert files.read("a.txt", 5)["data"] == b""
    assert files.read("a.txt", 2**62)["data"] == b""
    assert files.read("a.txt", 0, 0)["data"] == b""
    assert base64.b64decode(files.read("b.dcm", encoding="base64")["data"]) == b"\x00DICM"


def test_read_gives_a_bounded_range(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_MAX_BYTES", 3)
    files = Files(folder)
    first = files.read("a.txt")
    assert (first["data"], first["more"]) == (b"alp", True)
    last = files.read("a.txt", 3, version=first["version"])
    assert (last["data"], last["more"]) == (b"ha", False)
    assert files.read("a.txt", length=3)["more"] is False
    assert files.read("a.txt", length=4)["more"] is True


def test_a_file_that_changes_between_two_ranges_is_told(folder: Path) -> None:
    files = Files(folder)
    version = files.read("a.txt", 0, 2)["version"]
    with (folder / "a.txt").open("ab") as file:
        file.write(b"more")
    with pytest.raises(FileChanged, match=r"'a.txt' has changed since"):
        files.read("a.txt", 2, version=version)


def streamed(files: Files, *arguments: Any, **options: Any) -> tuple[list[bytes], dict[str, Any]]:
    """The parts of a `read`, and its reply."""
    reading = files.read(*arguments, stream=True, **options)
    assert isinstance(reading, Generator)
    parts = []
    while True:
        try:
            parts.append(next(reading))
        except StopIteration as end:
            return parts, end.value


def test_a_stream_gives_the_same_piece_by_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 2)
    files = Files(folder)
    version = files.stat("a.txt")["version"]
    told = {"path": "a.txt", "size": 5, "offset": 0, "length": 5, "more": False, "version": version}
    assert streamed(files, "a.txt") == ([b"al", b"ph", b"a"], told | {"crc32": zlib.crc32(b"alpha")})
    assert streamed(files, "a.txt", 1, 3, version=version)[0] == [b"lp", b"h"]
    parts, told = streamed(files, "a.txt", 4, 100)
    assert (parts, told["length"], told["crc32"]) == ([b"a"], 1, zlib.crc32(b"a"))
    assert streamed(files, "a.txt", 2**62)[0] == []
    assert streamed(files, "a.txt", 0, 0)[0] == []
    with pytest.raises(FileChanged, match=r"'a.txt' has changed since its version '0-0'"):
        streamed(files, "a.txt", version="0-0")


@pytest.mark.parametrize("change", ["grow", "shrink", "touch"])
def test_a_stream_of_a_file_that_changes_ends_with_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 2)
    reading = Files(folder).read("a.txt", stream=True)
    assert isinstance(reading, Generator)
    assert next(reading) == b"al"
    if change == "touch":
        os.utime(folder / "a.txt", (1, 1))
    else:
        os.truncate(folder / "a.txt", 8 if change == "grow" else 1)
    with pytest.raises(FileChanged, match=r"'a.txt' changed while it was read; read it anew"):
        next(reading)


def test_a_file_that_is_replaced_while_it_is_streamed_comes_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 2)
    files = all_allowed(folder)
    reading = files.read("a.txt", stream=True)
    assert isinstance(reading, Generator)
    assert next(reading) == b"al"
    files.write("a.txt", b"omega", overwrite=True)
    assert b"".join(reading) == b"pha"


def test_a_stream_that_is_left_closes_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 2)
    before = len(os.listdir("/dev/fd"))
    reading = Files(folder).read("a.txt", stream=True)
    assert isinstance(reading, Generator)
    next(reading)
    assert len(os.listdir("/dev/fd")) == before + 1
    reading.close()
    assert len(os.listdir("/dev/fd")) == before


def test_newest(folder: Path) -> None:
    files = Files(folder)
    os.utime(folder / "a.txt", (2e9, 2e9))
    os.utime(folder / "sub" / "c.txt", (2.1e9, 2.1e9))
    newest = files.newest()
    assert newest is not None
    assert newest["path"] == "a.txt"
    newest = files.newest("*.txt", recursive=True)
    assert newest is not None
    assert newest["path"] == "sub/c.txt"
    assert files.newest("*.nothing") is None


def test_types_are_endings_whatever_their_case(folder: Path) -> None:
    (folder / "brain.NII.gz").touch()
    (folder / "other.gz").touch()
    (folder / "link.dcm").symlink_to("a.txt")
    files = Files(folder, types=("dcm", ".nii.gz"), writable=True, deletable=True)
    assert paths(files.list()) == ["b.dcm", "brain.NII.gz", "sub"]
    for operation in (files.read, files.stat, files.delete, lambda path: files.write(path, b"", overwrite=True)):
        for path in ("a.txt", "other.gz", "link.dcm"):
            with pytest.raises(FileRefused, match=r"there is no|only files of the types .dcm, .nii.gz are served"):
                operation(path)
    assert (folder / "a.txt").read_bytes() == b"alpha"


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(NotADirectoryError):
            Files(path)


# ---------------------------------------------------------------- attack row 30: out of the folder


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt", "..", "sub/../../secret.txt", "sub/../../data/../secret.txt", "/etc/passwd", "//etc/passwd",
        "../dataevil/secret.txt", "./../secret.txt", "\0", "a.txt\0.dcm", "../" * 60 + "etc/passwd",
        "nothing/../../secret.txt",
    ],
)  # fmt: skip
def test_row_30_paths_that_lead_out_are_refused(folder: Path, path: str) -> None:
    for operation in everything(all_allowed(folder)):
        with pytest.raises(FileRefused, match=r"leads out|relative to the folder|without NUL"):
            operation(path)
    assert (folder.parent / "secret.txt").read_text() == "secret"


def test_row_30_an_absolute_path_is_refused_though_it_leads_within(folder: Path) -> None:
    with pytest.raises(FileRefused, match=r"relative"):
        Files(folder).read(str(folder / "a.txt"))


@pytest.mark.parametrize("path", [5, None, b"a.txt", ["a.txt"], {"a": 1}, True])
def test_row_30_a_path_that_is_no_text_is_refused(folder: Path, path: Any) -> None:
    for operation in everything(all_allowed(folder)):
        with pytest.raises(FileRefused, match=r"path must be text"):
            operation(path)


def test_row_30_links_out_do_not_exist(folder: Path) -> None:
    (folder / "file-out.txt").symlink_to("../secret.txt")
    (folder / "absolute-out.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "folder-out").symlink_to("../dataevil")
    (folder / "chain").symlink_to("folder-out")
    (folder / "up").symlink_to("..")
    (folder / "void").symlink_to("nothing")
    (folder / "circle").symlink_to("circle")
    files = all_allowed(folder)
    for path in ("file-out.txt", "absolute-out.txt", "folder-out", "folder-out/secret.txt", "chain/secret.txt", "up",
                 "up/secret.txt", "up/data/a.txt/../../secret.txt"):  # fmt: skip
        for operation in everything(files):
            with pytest.raises(FileRefused, match=r"leads out"):
                operation(path)
    for path in ("void", "circle"):
        with pytest.raises(FileRefused):
            files.read(path)
    assert paths(files.list(recursive=True)) == ["a.txt", "b.dcm", "sub", "sub/c.txt"]
    assert (folder.parent / "dataevil" / "secret.txt").read_text() == "secret"


def test_row_30_links_within_lead_where_they_lead(folder: Path) -> None:
    (folder / "sub" / "up.txt").symlink_to("../a.txt")
    (folder / "again").symlink_to("sub")
    files = all_allowed(folder)
    assert files.read("sub/up.txt")["data"] == b"alpha"
    assert files.read("again/c.txt")["data"] == b"gamma"
    # `again` is listed and not entered, so links cannot make a walk endless.
    assert paths(files.list(recursive=True)) == ["a.txt", "again", "b.dcm", "sub", "sub/c.txt", "sub/up.txt"]
    files.write("sub/up.txt", b"new", overwrite=True)
    assert (folder / "a.txt").read_bytes() == b"new"
    files.delete("sub/up.txt")
    assert (folder / "a.txt").exists()
    assert not (folder / "sub" / "up.txt").is_symlink()


def test_row_30_a_neighbour_with_a_longer_name_is_not_within(folder: Path) -> None:
    confined_place = Confined(folder)
    assert str(folder.parent / "dataevil").startswith(str(confined_place.root))
    with pytest.raises(FileRefused, match=r"leads out"):
        confined_place.resolve("../dataevil/secret.txt")


def test_row_30_devices_pipes_and_sockets_are_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "sock"))
        files = all_allowed(folder)
        names = ["pipe", "sock"]
        try:
            os.mknod(folder / "null", 0o666 | 0o020000, os.makedev(1, 3))
            names.append("null")
        except PermissionError:
            pass  # only root makes devices
        for name in names:
            for operation in (files.read, files.delete, lambda path: files.write(path, b"x", overwrite=True)):
                with pytest.raises(FileRefused, match=r"is no regular file"):
                    operation(name)
            assert files.stat(name)["type"] == "other"
            assert files.newest(name) is None
    for operation in (files.read, files.delete, lambda path: files.write(path, b"x", overwrite=True)):
        with pytest.raises(FileRefused):
            operation("sub")
        with pytest.raises(FileRefused):
            operation(".")
        with pytest.raises(FileRefused):
            operation("")


def _swapping(
    monkeypatch: pytest.MonkeyPatch, path: str, swap: Callable[[], None], operation: Callable[[], Any]
) -> Any:
    """Run an operation with something done right after the path was judged."""
    resolve = Confined.resolve

    def resolve_and_swap(place: Confined, given: str) -> tuple[str, ...]:
        parts = resolve(place, given)
        if given == path:
            swap()
        return parts

    monkeypatch.setattr(Confined, "resolve", resolve_and_swap)
    return operation()


@pytest.mark.parametrize("name", ["read", "stat", "write", "delete"])
def test_row_30_a_link_put_in_place_after_the_check_leads_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder / "sub" / "secret.txt").write_text("inside")
    files = all_allowed(folder)

    def swap() -> None:
        if not (folder / "sub").is_symlink():
            (folder / "sub").rename(folder / "old")
            (folder / "sub").symlink_to("../dataevil")

    operation = {
        "read": files.read,
        "stat": files.stat,
        "write": lambda path: files.write(path, b"evil", overwrite=True),
        "delete": files.delete,
    }[name]
    with pytest.raises(FileRefused):
        _swapping(monkeypatch, "sub/secret.txt", swap, lambda: operation("sub/secret.txt"))
    assert (folder.parent / "dataevil" / "secret.txt").read_text() == "secret"


def test_row_30_a_file_that_becomes_a_link_after_the_check_leads_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = all_allowed(folder)

    def swap() -> None:
        (folder / "a.txt").unlink(missing_ok=True)
        (folder / "a.txt").symlink_to("../secret.txt")

    for operation in (files.read, lambda path: files.write(path, b"evil", overwrite=True), files.stat):
        (folder / "a.txt").unlink(missing_ok=True)
        (folder / "a.txt").write_text("inside")
        with monkeypatch.context() as patch, pytest.raises(FileRefused):
            _swapping(patch, "a.txt", swap, lambda: operation("a.txt"))  # noqa: B023 - called at once
    assert (folder.parent / "secret.txt").read_text() == "secret"


def test_row_30_a_folder_that_becomes_a_link_is_not_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(folder)

    def swap() -> None:
        (folder / "sub").rename(folder / "old")
        (folder / "sub").symlink_to("../dataevil")

    with pytest.raises(FileRefused):
        _swapping(monkeypatch, "sub", swap, lambda: files.list("sub"))


def test_row_30_a_race_of_links_never_gives_the_secret(folder: Path) -> None:
    """A thread swaps a folder and a link to the outside as fast as it can while everything is read."""
    (folder / "sub" / "secret.txt").write_text("inside")
    (folder / "other").symlink_to("../dataevil")
    (folder / "other").rename(folder / "link")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            (folder / "sub").rename(folder / "real")
            (folder / "link").rename(folder / "sub")
            (folder / "sub").rename(folder / "link")
            (folder / "real").rename(folder / "sub")

    thread = threading.Thread(target=swap)
    thread.start()
    files = Files(folder)
    given, refused = 0, 0
    try:
        ends_at = time.monotonic() + 20
        while (given < 50 or refused < 50) and time.monotonic() < ends_at:
            try:
                data = files.read("sub/secret.txt")["data"]
                assert data == b"inside"
                given += 1
                names = [entry["path"] for entry in files.list("sub")["entries"]]
                assert names == ["sub/c.txt", "sub/secret.txt"]
            except FileRefused:
                refused += 1
    finally:
        stop.set()
        thread.join()
    assert given
    assert refused


def test_refusals_do_not_say_where_the_folder_is(folder: Path) -> None:
    (folder / "circle").symlink_to("circle")
    files = all_allowed(folder)
    for path in ("../x", "nothing/x", "x" * 5000, "a.txt/b", "circle", "sub", "/etc/passwd", "\ud800", "\udc80"):
        for operation in (files.read, files.delete, lambda path: files.write(path, b"")):
            try:
                operation(path)
            except FileRefused as refused:
                assert str(folder.parent) not in str(refused)
                assert len(str(refused)) < 600
                assert refused.data == {"type": "FileRefused", "message": str(refused)}
            else:
                pytest.fail(f"{path!r:.20} was served")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("method", "params", "says"),
    [
        ("read", {"path": "a.txt", "offset": -1}, "offset -1 is not a whole number"),
        ("read", {"path": "a.txt", "offset": 1.5}, "offset 1.5"),
        ("read", {"path": "a.txt", "offset": True}, "offset True"),
        ("read", {"path": "a.txt", "offset": 2**80}, "offset 12089"),
        ("read", {"path": "a.txt", "length": "5"}, "length '5'"),
        ("read", {"path": "a.txt", "encoding": "hex"}, "encoding 'hex' is not known"),
        ("list", {"limit": 0}, "limit 0 is not a whole number from 1 to 10000"),
        ("list", {"limit": 10_001}, "limit 10001"),
        ("list", {"pattern": 5}, "pattern 5 is no text"),
        ("list", {"pattern": "*" * 1001}, "pattern has 1001 letters"),
        ("list", {"pattern": "sub/*"}, "compared with names, not paths"),
        ("list", {"path": "a.txt"}, "'a.txt' is no folder"),
        ("list", {"after": 5}, "after 5 is no text"),
        ("newest", {"path": "nothing"}, "there is no 'nothing' here"),
        ("read", {"path": "a.txt", "stream": True, "encoding": "base64"}, "a stream is of bytes"),
        ("write", {"path": "new", "data": "text"}, "data must be bytes"),
        ("write", {"path": "new"}, "data is missing"),
        ("write", {"path": "new", "data": b"", "size": -1}, "size -1 is not a whole number"),
        ("write", {"path": "new", "data": b"abc", "size": 2}, "'new': more than the 2 bytes came"),
        ("write", {"path": "new", "data": b"abc", "size": 4}, "'new': 3 bytes came of the 4"),
        ("write", {"path": "nothing/new", "data": b""}, "there is no 'nothing/new' here"),
        ("write", {"path": ".broker-00000000.part", "data": b""}, "only files of other names are served"),
        ("delete", {"path": "nothing"}, "there is no 'nothing' here"),
        ("delete", {"path": "sub/.."}, "is no regular file"),
        ("watch", {"stable_s": -1}, "stable_s -1 is not a number of seconds"),
        ("watch", {"stable_s": float("nan")}, "stable_s nan"),
        ("watch", {"timeout": "1"}, "timeout '1'"),
        ("watch", {"minimum_bytes": -1}, "minimum_bytes -1"),
        ("watch", {"after": "yesterday"}, "neither a Unix time nor the cursor"),
        ("watch", {"after": [1]}, "neither a Unix time nor the cursor"),
        ("watch", {"path": "a.txt"}, "'a.txt' is no folder"),
    ],
)
def test_wrong_parameters_are_named(folder: Path, method: str, params: dict[str, Any], says: str) -> None:
    function = getattr(all_allowed(folder), method)
    with pytest.raises(FileRefused) as caught:
        asyncio.run(function(**params)) if method == "watch" else function(**params)
    assert says in str(caught.value)


def test_strange_names(folder: Path) -> None:
    names = ["new\nline", "tab\t", "ünïcödé", "-rf", "~home", "a b", '"quoted"', "\x1b[31mred", "*", "[x]", "..."]
    for name in names:
        (folder / "sub" / name).write_text(name)
    files = all_allowed(folder)
    assert sorted(paths(files.list("sub"))) == sorted(f"sub/{name}" for name in [*names, "c.txt"])
    for name in names:
        assert files.read(f"sub/{name}")["data"] == name.encode()
        assert files.stat(f"sub/{name}")["path"] == f"sub/{name}"


def test_names_that_are_no_unicode_are_counted(folder: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt")).touch()
    except OSError:
        pytest.skip("this file system takes Unicode only")
    told = Files(folder).list()
    assert paths(told) == ["a.txt", "b.dcm", "sub"]
    assert told["unnameable"] == 1


def test_a_vanished_folder_is_told(folder: Path) -> None:
    files = all_allowed(folder)
    folder.rename(folder.parent / "moved")
    for operation in everything(files):
        with pytest.raises(FileRefused, match=r"there is no|vanished"):
            operation("a.txt")
    for gone in (files.list, files.newest, lambda: files.stat("."), lambda: files.write("new", b"")):
        with pytest.raises(FileRefused, match=r"the folder that is served has vanished; make it again"):
            gone()


def test_huge_folders_are_bounded_and_left_when_nobody_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3000):
        (folder / "sub" / f"{number}").touch()
    files = Files(folder)
    assert len(files.list("sub", limit=10)["entries"]) == 10
    monkeypatch.setattr(confined, "LOOK_MAX", 2000)
    with pytest.raises(FileRefused, match=r"more than 2000 names"):
        files.list(recursive=True)
    look = Look()
    look.stopped = True
    with pytest.raises(FileRefused, match=r"nobody waits"):
        list(Confined(folder).walk((), False, look))


def test_folders_below_each_other_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "DEPTH_MAX", 5)
    folder.joinpath(*"12345").mkdir(parents=True)
    assert "1/2/3/4/5" in paths(Files(folder).list(recursive=True))
    folder.joinpath(*"123456").mkdir(parents=True)
    with pytest.raises(FileRefused, match=r"more than 5 folders below each other"):
        Files(folder).list(recursive=True)


def test_no_descriptor_is_left(folder: Path) -> None:
    (folder / "out").symlink_to("..")
    before = len(os.listdir("/dev/fd"))
    files = all_allowed(folder)
    for _ in range(20):
        for path in ("a.txt", "sub/c.txt", "sub", "out/secret.txt", "nothing", "sub/nothing/x"):
            for operation in (files.read, files.stat, files.list, files.newest, lambda path: files.write(path, b"")):
                try:
                    operation(path)
                except FileRefused:
                    pass
    files.list(recursive=True, limit=1)
    assert len(os.listdir("/dev/fd")) <= before + 1


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("system", ["/", "/dev", "/dev/fd/..", "/proc", "/proc/self", "/sys", "/sys/kernel"])
def test_the_systems_own_folders_are_not_served(system: str) -> None:
    if not Path(system).is_dir() or (system == "/dev/fd/.." and sys.platform != "linux"):
        pytest.skip("there is no such folder")
    with pytest.raises(ValueError, match="the system's own files; name the folder that holds the data"):
        Files(Path(system))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no such folder")
def test_memory_may_hold_data() -> None:
    Files(Path("/dev/shm"))


@pytest.mark.parametrize(
    ("allowed", "more"),
    [({}, set()), ({"writable": True}, {"write"}), ({"deletable": True}, {"delete"})],
)
def test_only_what_is_allowed_is_served_and_described(folder: Path, allowed: dict[str, bool], more: set[str]) -> None:
    worker = Worker("data", "http://127.0.0.1:1", SECRET).add_object(Files(folder, **allowed))
    assert set(worker.methods) == {"list", "stat", "read", "newest", "watch"} | more


def test_nothing_is_written_unless_allowed(folder: Path) -> None:
    files = Files(folder)
    with pytest.raises(FileRefused, match=r"without --allow-write"):
        files.write("new", b"x")
    with pytest.raises(FileRefused, match=r"without --allow-delete"):
        files.delete("a.txt")
    assert sorted(os.listdir(folder)) == ["a.txt", "b.dcm", "sub"]


def test_write_and_delete(folder: Path) -> None:
    files = all_allowed(folder)
    crc32 = zlib.crc32(b"new")
    told = {"path": "sub/new.txt", "size": 3, "length": 3, "written": True, "crc32": crc32}
    assert files.write("sub/new.txt", b"new") == told
    assert files.read("sub/new.txt")["data"] == b"new"
    with pytest.raises(FileRefused, match=r"'sub/new.txt' exists; overwrite=true replaces it"):
        files.write("sub/new.txt", b"x")
    (folder / "sub" / "new.txt").chmod(0o600)
    files.write("sub/new.txt", memoryview(b"newer"), overwrite=True)
    assert (folder / "sub" / "new.txt").read_bytes() == b"newer"
    assert (folder / "sub" / "new.txt").stat().st_mode & 0o777 == 0o600
    files.write("empty", b"")
    assert files.delete("sub/new.txt") == {"path": "sub/new.txt", "deleted": True}
    assert sorted(os.listdir(folder / "sub")) == ["c.txt"]


def test_a_full_disk_leaves_the_old_file_and_no_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = all_allowed(folder)
    pwrite = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if offset + len(data) > 4:
            if offset < 4:
                return pwrite(descriptor, data[: 4 - offset], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    for path in ("a.txt", "new.txt"):
        with pytest.raises(FileRefused, match=r"is not written: No space left on device"):
            files.write(path, b"123456789", overwrite=True)
    assert (folder / "a.txt").read_bytes() == b"alpha"
    assert sorted(os.listdir(folder)) == ["a.txt", "b.dcm", "sub"]


def test_a_limit_of_the_system_on_sizes_is_told(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(FileRefused, match=r"'new' is not written: File too large"):
            all_allowed(folder).write("new", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(folder)) == ["a.txt", "b.dcm", "sub"]


def test_two_who_write_one_name_do_not_overwrite_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = all_allowed(folder)
    append = Upload.append

    def append_and_be_late(upload: Upload, data: memoryview) -> None:
        append(upload, data)
        (folder / "new").write_bytes(b"first")

    monkeypatch.setattr(Upload, "append", append_and_be_late)
    with pytest.raises(FileRefused, match=r"exists"):
        files.write("new", b"second")
    assert (folder / "new").read_bytes() == b"first"
    assert sorted(os.listdir(folder)) == ["a.txt", "b.dcm", "new", "sub"]


def test_a_file_system_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    files = all_allowed(folder)
    files.write("new", b"new")
    assert (folder / "new").read_bytes() == b"new"
    assert sorted(os.listdir(folder)) == ["a.txt", "b.dcm", "new", "sub"]


# ---------------------------------------------------------------- watching


def watching(folder: Path, story: Callable[[Files], Awaitable[None]]) -> None:
    """Run a story on a loop, with at most 30 s, and see that neither task nor watcher is left."""

    async def main() -> None:
        files = Watched(folder)
        async with asyncio.timeout(30):
            await story(files)
        assert files._changes.watchers == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    ends_at = time.monotonic() + 10
    while any(thread.name == "folder-changes" for thread in threading.enumerate()):
        assert time.monotonic() < ends_at, "a watcher's thread is left"
        time.sleep(0.01)


class Watched(Files):
    """Counts how often it has looked."""

    looks = 0

    def _files_now(self, *arguments: Any) -> Any:
        found = super()._files_now(*arguments)
        self.looks += 1
        return found


async def begun(files: Files, watchers: int = 1) -> None:
    """The watch has looked at what was there before."""
    assert isinstance(files, Watched)
    await until(lambda: files._changes.watchers == watchers and files.looks, "it watches")


def test_watch_answers_when_a_new_file_is_complete(folder: Path) -> None:
    async def story(files: Files) -> None:
        watch = asyncio.create_task(files.watch("*.dat", stable_s=1.5))
        await begun(files)
        (folder / "other.txt").write_bytes(b"no match")
        with (folder / "slow.dat").open("wb", buffering=0) as file:
            for _ in range(20):
                file.write(b"x" * 10)
                await asyncio.sleep(0.1)
                assert not watch.done()
        told = await watch
        assert told is not None
        assert (told["path"], told["size"]) == ("slow.dat", 200)

    watching(folder, story)


def test_watch_notices_a_file_that_changes(folder: Path) -> None:
    async def story(files: Files) -> None:
        watch = asyncio.create_task(files.watch("*.txt", recursive=True, stable_s=0.1))
        await begun(files)
        assert not watch.done()
        with (folder / "sub" / "c.txt").open("ab") as file:
            file.write(b"!")
        told = await watch
        assert told is not None
        assert (told["path"], told["size"]) == ("sub/c.txt", 6)

    watching(folder, story)


def test_watch_with_a_minimum(folder: Path) -> None:
    async def story(files: Files) -> None:
        watch = asyncio.create_task(files.watch("*.dat", minimum_bytes=20))
        await begun(files)
        with (folder / "growing.dat").open("wb", buffering=0) as file:
            file.write(b"x" * 19)
            await asyncio.sleep(1)
            assert not watch.done()
            file.write(b"x")
            told = await watch
        assert told is not None
        assert told["size"] == 20

    watching(folder, story)


def test_watch_takes_existing_files_the_oldest_first(folder: Path) -> None:
    os.utime(folder / "b.dcm", (1000, 1000))

    async def story(files: Files) -> None:
        told = await files.watch(existing=True, stable_s=0)
        assert told is not None
        assert told["path"] == "b.dcm"
        assert await files.watch(timeout=0.05) is None
        assert await files.watch("*.nothing", existing=True, timeout=0.0) is None

    watching(folder, story)


def test_watch_after_a_time_and_after_a_cursor_misses_nothing(folder: Path) -> None:
    for name in "zyx":  # one clock tick, as a burst of files has on a coarse clock
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))

    async def story(files: Files) -> None:
        after: float | str = 1_699_999_999
        found = []
        while (told := await files.watch("[xyz]", after=after, stable_s=0, timeout=0.0)) is not None:
            found.append(told["path"])
            after = told["cursor"]
        assert found == ["x", "y", "z"]
        modified = files.stat("x")["modified"]
        assert await files.watch("[xyz]", after=modified, stable_s=0, timeout=0.0) is None

    watching(folder, story)


def test_an_empty_file_is_not_complete_unless_the_minimum_says_so(folder: Path) -> None:
    (folder / "flag").touch()

    async def story(files: Files) -> None:
        assert await files.watch("flag", existing=True, stable_s=0, timeout=0.1) is None
        assert await files.watch("flag", existing=True, minimum_bytes=0, timeout=0.1) is not None

    watching(folder, story)


def test_a_file_that_grows_for_ever_ends_with_the_timeout(folder: Path) -> None:
    async def story(files: Files) -> None:
        watch = asyncio.create_task(files.watch("endless", stable_s=1, timeout=2))
        with (folder / "endless").open("wb", buffering=0) as file:
            while not watch.done():
                file.write(b"x")
                await asyncio.sleep(0.02)
        assert await watch is None

    watching(folder, story)


def test_a_preallocated_file_is_complete_when_it_is_no_more_written(folder: Path) -> None:
    async def story(files: Files) -> None:
        watch = asyncio.create_task(files.watch("image", stable_s=1.5))
        await begun(files)
        with (folder / "image").open("wb", buffering=0) as file:
            file.truncate(1000)
            for _ in range(25):
                os.pwrite(file.fileno(), b"x", 5)
                await asyncio.sleep(0.1)
                assert not watch.done()
        assert await watch is not None

    watching(folder, story)


def test_a_folder_that_vanishes_ends_the_watch(folder: Path) -> None:
    async def story(files: Files) -> None:
        watch = asyncio.create_task(files.watch(path="sub"))
        await begun(files)
        (folder / "sub" / "c.txt").unlink()
        (folder / "sub").rmdir()
        with pytest.raises(FileRefused, match=r"the folder 'sub' has vanished"):
            await watch

    watching(folder, story)


def test_cancelling_leaves_neither_thread_nor_watcher(folder: Path) -> None:
    async def story(files: Files) -> None:
        tasks = [asyncio.create_task(files.watch("*.none", recursive=bool(number % 2))) for number in range(40)]
        await begun(files, 2)  # forty requests share two watchers
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)

    watching(folder, story)


def test_without_a_watcher_it_looks_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import watchfiles

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "inotify instances are used up")

    monkeypatch.setattr(watchfiles, "watch", fail)
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.3)

    async def story(files: Files) -> None:
        watch = asyncio.create_task(files.watch("*.dat"))
        await begun(files)
        (folder / "new.dat").write_bytes(b"x")
        assert await watch is not None

    watching(folder, story)


# ---------------------------------------------------------------- behind a broker


def serving(url: str, folder: Path, **options: Any) -> Worker:
    worker = Worker("data", url, SECRET)
    return worker.add_object(Files(folder, **options))


def test_behind_a_broker(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = serving(broker.url, folder)
            async with worker:
                image = os.urandom(100_000)
                (folder / "image.dcm").write_bytes(image)
                told = await client.call("data/read", {"path": "image.dcm"})
                assert told["data"] == image
                with pytest.raises(RemoteError) as caught:
                    await client.call("data/read", {"path": "../secret.txt"})
                assert caught.value.type == "FileRefused"
                assert "leads out of the folder" in caught.value.detail
                with pytest.raises(RemoteError, match=r"missing a required argument"):
                    await client.call("data/read", {})
                (described,) = (await client.describe("data"))["workers"]
                methods = described["info"]["methods"]
                assert set(methods) == {"list", "stat", "read", "newest", "watch"}
                assert all(method["doc"] and method["signature"] for method in methods.values())

    run(main)


def test_a_deadline_and_a_cancellation_reach_the_watch(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET)
            files = Files(folder)
            async with worker.add_object(files):
                with pytest.raises(DeadlineExceeded):
                    await client.call("data/watch", {"pattern": "*.none"}, timeout=0.5)
                await until(lambda: files._changes.watchers == 0, "the deadline ends the watch")
                call = asyncio.create_task(client.call("data/watch", {"pattern": "*.none"}))
                await until(lambda: files._changes.watchers == 1, "it watches")
                call.cancel()
                await until(lambda: files._changes.watchers == 0, "cancelling ends the watch")
                await until(lambda: not worker.executing, "the worker has nothing to do")

    run(main)


def test_several_workers_share_the_load(folder: Path) -> None:
    async def main() -> None:
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            serving(broker.url, folder),
            serving(broker.url, folder),
        ):
            watches = [asyncio.create_task(client.call("data/watch", {"pattern": "x", "existing": True}))
                       for _ in range(2)]  # fmt: skip
            await until(lambda: broker.router.pending.count == 2, "both are given out")
            workers = (await client.describe("data"))["workers"]
            assert [worker["executing"] for worker in workers] == [1, 1]
            (folder / "x").write_bytes(b"x")
            assert [told["path"] for told in await asyncio.gather(*watches)] == ["x", "x"]

    run(main)
