"""Files larger than a message, read and written by ranges behind one call."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from broker.client import files as module
from broker.client.async_client import AsyncClient
from broker.client.client import Client
from broker.client.files import AsyncRemoteFiles, Ranges, RemoteFiles, replacing
from broker.peer.errors import BadReply, RemoteError, TooLarge
from broker.worker import files as worker_files
from broker.worker.files import Files
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, broker_thread, run

BIG = 20_000_001  # more than a message


def serving(url: str, folder: Path) -> Worker:
    return Worker("data", url, SECRET).add_object(Files(folder, writable=True, deletable=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    served = tmp_path / "data"
    served.mkdir()
    (served / "big.bin").write_bytes(os.urandom(BIG))
    return served


def test_a_large_file_there_and_back(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client, serving(broker.url, folder):
            files = AsyncRemoteFiles(client, "data")
            content = (folder / "big.bin").read_bytes()
            assert await files.read("big.bin") == content
            assert await files.read("big.bin", 1, 9_000_000) == content[1:9_000_001]
            assert await files.read("big.bin", BIG - 1, 9_000_000) == content[-1:]
            assert await files.read("big.bin", BIG + 5) == b""
            told: list[tuple[int, int]] = []
            to = tmp_path / "copy.bin"
            assert await files.download("big.bin", to, progress=lambda done, total: told.append((done, total))) == BIG
            assert to.read_bytes() == content
            assert told == [(8 << 20, BIG), (16 << 20, BIG), (BIG, BIG)]
            with pytest.raises(TooLarge):
                await files.write("too-big.bin", content)
            told.clear()
            stored = await files.upload(to, "again.bin", progress=lambda done, total: told.append((done, total)))
            assert stored["size"] == BIG
            assert told[-1] == (BIG, BIG)
            assert (folder / "again.bin").read_bytes() == content
            with pytest.raises(RemoteError, match=r"exists; overwrite=true"):
                await files.upload(to, "again.bin")
            await files.upload(to, "again.bin", overwrite=True)
            assert sorted(os.listdir(folder)) == ["again.bin", "big.bin"]

    run(main)


def test_small_files(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client, serving(broker.url, folder):
            files = AsyncRemoteFiles(client, "data", timeout=20)
            empty = tmp_path / "empty"
            empty.touch()
            assert (await files.upload(empty, "empty"))["size"] == 0
            assert await files.read("empty") == b""
            assert await files.download("empty", empty) == 0
            await files.write("note.txt", b"hello")
            assert [entry["path"] for entry in await files.list()] == ["big.bin", "empty", "note.txt"]
            assert (await files.stat("note.txt"))["size"] == 5
            assert ((await files.newest("*.txt")) or {})["path"] == "note.txt"
            assert ((await files.watch("*.txt", existing=True, stable_s=0)) or {})["path"] == "note.txt"
            assert await files.watch("*.none", timeout=0.01) is None
            assert (await files.delete("note.txt"))["deleted"]
            with pytest.raises(RemoteError, match=r"there is no 'note.txt' here"):
                await files.download("note.txt", tmp_path / "note.txt")
            assert sorted(os.listdir(tmp_path)) == ["data", "empty"]

    run(main)


def test_a_long_listing_is_fetched_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_files, "LIST_MAX_BYTES", 300)
    for number in range(30):
        (folder / f"{number:02}").touch()

    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client, serving(broker.url, folder):
            assert len(await AsyncRemoteFiles(client, "data").list()) == 31

    run(main)


def test_a_file_that_changes_meanwhile_is_a_clear_error(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client, serving(broker.url, folder):
            files = AsyncRemoteFiles(client, "data")

            def change(done: int, total: int) -> None:
                with (folder / "big.bin").open("ab") as file:
                    file.write(b"more")

            with pytest.raises(RemoteError, match=r"'big.bin' has changed since") as caught:
                await files.download("big.bin", tmp_path / "copy.bin", progress=change)
            assert caught.value.type == "FileChanged"
            assert os.listdir(tmp_path) == ["data"]

            def shrink(done: int, total: int) -> None:
                local.write_bytes(b"less")

            local = tmp_path / "local.bin"
            local.write_bytes(bytes(BIG))
            with pytest.raises(ValueError, match=r"local.bin changed while it was sent"):
                await files.upload(local, "new.bin", progress=shrink)
            assert not (folder / "new.bin").exists()

    run(main)


def test_the_same_without_await(folder: Path, tmp_path: Path) -> None:
    with broker_thread() as (broker, loop):
        worker = serving(broker.url, folder)
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(20)
        with Client(broker.url, SECRET) as client:
            files = RemoteFiles(client, "data")
            content = (folder / "big.bin").read_bytes()
            assert files.read("big.bin") == content
            assert files.download("big.bin", tmp_path / "copy.bin") == BIG
            assert files.upload(tmp_path / "copy.bin", "again.bin")["size"] == BIG
            assert [entry["path"] for entry in files.list(pattern="*.bin")] == ["again.bin", "big.bin"]
            assert files.stat("again.bin")["size"] == BIG
            assert files.write("x.txt", b"x")["size"] == 1
            assert (files.newest("*.txt") or {})["path"] == "x.txt"
            assert (files.watch("*.txt", existing=True, stable_s=0) or {})["path"] == "x.txt"
            assert files.delete("x.txt")["deleted"]
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(20)


def test_names_are_the_same_in_both() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(AsyncRemoteFiles) == public(RemoteFiles)


@pytest.mark.parametrize(
    ("replies", "says"),
    [
        ([None], "did not send a range of a file"),
        ([{"data": "text", "size": 5}], "did not send a range"),
        ([{"data": b"x"}], "did not send a range"),
        ([{"data": b"123456", "size": 5}], "do not belong at 0"),
        ([{"data": b"x", "size": 5, "offset": 2}], "do not belong at 0"),
        ([{"data": b"x", "size": 5}, {"data": b"x", "size": 5, "offset": 0}], "1 bytes from 0 do not belong at 1"),
        ([{"data": b"x", "size": 5}, {"data": b"", "size": 1, "offset": 1}], "ended after 1 of 5 bytes"),
    ],
)
def test_replies_that_do_not_continue_are_refused(replies: list[Any], says: str) -> None:
    ranges = Ranges({"path": "a"}, "data/a")
    with pytest.raises(BadReply, match=says):
        for reply in replies:
            assert ranges.params()["path"] == "a"
            ranges.take(reply)


def test_a_worker_of_somebody_elses_needs_no_version() -> None:
    ranges = Ranges({"path": "a", "offset": 1, "length": 3})
    assert ranges.params() == {"path": "a", "offset": 1, "length": 3}
    assert ranges.take({"data": b"b", "size": 5}) == b"b"
    assert ranges.params() == {"path": "a", "offset": 2, "length": 2}
    ranges.take({"data": b"cd", "size": 5})
    assert ranges.is_done
    assert (ranges.received, ranges.total) == (3, 3)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    target.chmod(0o600)
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(KeyError), replacing(tmp_path / "link") as file:
        file.write(b"half")
        raise KeyError
    assert target.read_text() == "old"
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "nothing" / "x"):
        pass
    assert caught.value.filename == str(tmp_path / "nothing" / "x")
    with replacing(Path("/dev/null")) as file:
        file.write(b"gone")
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_pieces_fit_into_a_message() -> None:
    from broker.peer.session import MESSAGE_MAX_BYTES

    assert module.RANGE_BYTES * 4 / 3 < MESSAGE_MAX_BYTES  # in base64 too
