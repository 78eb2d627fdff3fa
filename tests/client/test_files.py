"""Files of any size, read and written in parts: whole, verified, and with little memory."""

import asyncio
import hashlib
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from broker.client import files as module
from broker.client.async_client import AsyncClient
from broker.client.client import Client
from broker.client.files import AsyncRemoteFiles, RemoteFiles, Tally, replacing
from broker.peer.errors import BadReply, DeadlineExceeded, RemoteError
from broker.worker import files as worker_files
from broker.worker.files import Files
from broker.worker.uploads import Upload
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, broker_thread, run, until

BIG = 20_000_001  # more than a message
PIECE = module.PIECE_BYTES


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
            assert told == [(min(done, BIG), BIG) for done in range(PIECE, BIG + PIECE, PIECE)]
            assert (await files.write("written.bin", content))["crc32"] == zlib.crc32(content)
            assert (folder / "written.bin").read_bytes() == content
            told.clear()
            stored = await files.upload(to, "again.bin", progress=lambda done, total: told.append((done, total)))
            assert stored["size"] == BIG
            assert told == [(min(done, BIG), BIG) for done in range(PIECE, BIG + PIECE, PIECE)]
            assert (folder / "again.bin").read_bytes() == content
            with pytest.raises(RemoteError, match=r"exists; overwrite=true"):
                await files.upload(to, "again.bin")
            await files.upload(to, "again.bin", overwrite=True)
            assert sorted(os.listdir(folder)) == ["again.bin", "big.bin", "written.bin"]

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

            with pytest.raises(RemoteError, match=r"'big.bin' changed while it was read") as caught:
                await files.download("big.bin", tmp_path / "copy.bin", progress=change)
            assert caught.value.type == "FileChanged"
            assert os.listdir(tmp_path) == ["data"]

            def shrink(done: int, total: int) -> None:
                local.write_bytes(b"less")

            local = tmp_path / "local.bin"
            local.write_bytes(bytes(BIG))
            with pytest.raises(ValueError, match=r"local.bin changed while it was sent"):
                await files.upload(local, "new.bin", progress=shrink)
            await until(lambda: os.listdir(folder) == ["big.bin"], "nothing is left of it")

    run(main)


def test_a_transfer_that_is_cancelled_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            serving(broker.url, folder) as worker,
        ):
            files = AsyncRemoteFiles(client, "data")
            begun = asyncio.Event()
            begins = {"progress": lambda done, total: begun.set()}
            for transfer in (
                files.download("big.bin", tmp_path / "copy.bin", **begins),
                files.upload(folder / "big.bin", "copy.bin", **begins),
            ):
                begun.clear()
                task = asyncio.create_task(transfer)
                await begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: worker.executing == 0, "the worker has heard of it")
                assert os.listdir(folder) == ["big.bin"]
                assert os.listdir(tmp_path) == ["data"]

    run(main)


def test_it_may_take_longer_than_the_deadline_of_other_calls_and_not_stand_still(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        release = threading.Event()
        append = Upload.append

        def append_slowly(upload: Upload, data: memoryview) -> None:
            time.sleep(0.01)
            append(upload, data)

        def append_and_stand_still(upload: Upload, data: memoryview) -> None:
            release.wait(20)
            append(upload, data)

        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET, timeout=0.3) as client,
            serving(broker.url, folder) as worker,
        ):
            files = AsyncRemoteFiles(client, "data", timeout=0.3)
            monkeypatch.setattr(Upload, "append", append_slowly)
            assert (await files.upload(folder / "big.bin", "slow.bin"))["size"] == BIG  # 77 parts, 10 ms each
            monkeypatch.setattr(Upload, "append", append_and_stand_still)
            with pytest.raises(DeadlineExceeded):
                await files.upload(folder / "big.bin", "still.bin")
            release.set()
            await until(lambda: worker.executing == 0, "it has heard of it")
            assert sorted(os.listdir(folder)) == ["big.bin", "slow.bin"]

    run(main)


MEASURED = """
import asyncio, sys
from broker.client.async_client import AsyncClient
from broker.client.files import AsyncRemoteFiles

def peak_kib():  # not getrusage: it begins with what its parent had
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

async def main(url, token, what, path):
    async with AsyncClient(url, token) as client:
        files = AsyncRemoteFiles(client, "data")
        await files.stat("big.bin")
        before = peak_kib()
        if what == "download":
            await files.download("big.bin", path)
        else:
            await files.upload(path, "again.bin")
        print(peak_kib() - before)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it counts in KiB on Linux, and what is resident is in /proc")
def test_a_large_file_needs_little_memory_at_both_ends(tmp_path: Path) -> None:
    size = 64 << 20
    served = tmp_path / "data"
    served.mkdir()
    with (served / "big.bin").open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))

    async def peak_kib(process: asyncio.subprocess.Process) -> int:
        status = await asyncio.to_thread(Path(f"/proc/{process.pid}/status").read_text)
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "broker", "work", "files", str(served), "--endpoint", "data", "--allow-write",
                "--url", broker.url, "--token", SECRET, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                await client.call("data/stat", ["big.bin"], wait=True, timeout=20)
                await client.call("data/write", {"path": "small.bin", "data": bytes(1 << 20)})
                before_kib = await peak_kib(worker)
                for what in ("download", "upload"):
                    process = await asyncio.create_subprocess_exec(
                        sys.executable, "-c", MEASURED, broker.url, SECRET, what, str(tmp_path / "copy.bin"),
                        stdout=subprocess.PIPE,
                    )  # fmt: skip
                    grown_kib = int((await process.communicate())[0])
                    assert grown_kib < 20_480, f"a client's {what} took {grown_kib} KiB"
                grown_kib = await peak_kib(worker) - before_kib
                assert grown_kib < 20_480, f"the worker took {grown_kib} KiB"
            finally:
                worker.kill()
                await worker.wait()

    run(main)
    copies = [served / "big.bin", tmp_path / "copy.bin", served / "again.bin"]
    assert [copy.stat().st_size for copy in copies] == [size] * 3
    assert len({hashlib.sha256(copy.read_bytes()).digest() for copy in copies}) == 1


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
    ("parts", "told", "says"),
    [
        (["text"], None, "did not send bytes, but 'text'"),
        ([{"a": 1}], None, "did not send bytes"),
        ([b"abc"], {"length": 4}, "data/a: 3 bytes, and the worker says {'length': 4}"),
        ([b"abc"], None, "3 bytes, and the worker says None"),
        ([b"ab", b"c"], {"length": 3, "crc32": 1}, "its 3 bytes are damaged"),
    ],
)
def test_what_does_not_come_whole_is_refused(parts: list[Any], told: Any, says: str) -> None:
    tally = Tally("data/a")
    with pytest.raises(BadReply, match=says):
        for part in parts:
            tally.add(part)
        tally.check(told)


def test_a_worker_of_somebody_elses_needs_no_checksum() -> None:
    tally = Tally("data/a")
    tally.add(b"ab")
    tally.add(memoryview(b"c"))
    assert tally.check({"length": 3}) == {"length": 3}
    assert tally.check({"length": 3, "crc32": zlib.crc32(b"abc")})


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


def test_a_piece_of_a_file_is_one_part() -> None:
    from broker.peer.calls import size_of
    from broker.peer.values import encode
    from broker.wire.pieces import PIECE_MAX_BYTES

    assert size_of(*encode(bytes(module.PIECE_BYTES))) <= PIECE_MAX_BYTES
    assert module.PIECE_BYTES == worker_files.PIECE_BYTES
