"""`Upload`: whole or not at all, and nothing left of it, however its process ends."""

import errno
import fcntl
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.worker import uploads
from broker.worker.confined import FileRefused
from broker.worker.files import Files
from broker.worker.uploads import Upload, remove_left_overs


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_it_appears_when_it_is_published(tmp_path: Path, folder: int) -> None:
    with Upload(folder, "a", "sub/a", overwrite=False) as upload:
        upload.append(memoryview(b"one"))
        upload.append(memoryview(b""))
        upload.append(memoryview(b"two"))
        (name,) = os.listdir(tmp_path)
        assert uploads.PART.fullmatch(name)
        upload.publish()
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert (upload.size, upload.crc32) == (6, zlib.crc32(b"onetwo"))
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_not_published_leaves_nothing(tmp_path: Path, folder: int) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyError), Upload(folder, "a", "a", overwrite=True) as upload:
        upload.append(memoryview(b"new"))
        raise KeyError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path: Path, folder: int) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileRefused, match=r"'a' exists"):
        Upload(folder, "a", "a", overwrite=False)
    with Upload(folder, "b", "b", overwrite=False) as upload:
        (tmp_path / "b").write_bytes(b"somebody else's")
        with pytest.raises(FileRefused, match=r"'b' exists"):
            upload.publish()
    assert (tmp_path / "b").read_bytes() == b"somebody else's"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_it_is_brought_to_disk_on_the_way(tmp_path: Path, folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(uploads, "SYNC_BYTES", 4)
    with Upload(folder, "a", "a", overwrite=False) as upload:
        for _ in range(5):
            upload.append(memoryview(b"xxx"))
        upload.publish()
    assert synced == [6, 12, 15]


HOLDS = """
import os, sys
from broker.worker.uploads import Upload
upload = Upload(os.open(sys.argv[1], os.O_RDONLY), "a", "a", overwrite=False)
upload.append(memoryview(b"half"))
print("begun", flush=True)
sys.stdin.read()
"""


def age(folder: Path, seconds: float = 2 * uploads.YOUNG_S) -> None:
    for name in os.listdir(folder):
        state = (folder / name).stat()
        os.utime(folder / name, (state.st_atime, state.st_mtime - seconds))


def test_a_killed_process_leaves_a_part_that_the_next_removes(tmp_path: Path, folder: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdin=-1, stdout=-1)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"begun\n"
    age(tmp_path)
    remove_left_overs(folder)
    assert len(os.listdir(tmp_path)) == 1, "somebody is at it"
    process.kill()
    process.communicate()
    Files(tmp_path)
    assert len(os.listdir(tmp_path)) == 1, "who may not write removes nothing"
    Files(tmp_path, writable=True)
    assert os.listdir(tmp_path) == []


def test_the_next_upload_removes_what_is_left_over_in_its_folder(tmp_path: Path, folder: int) -> None:
    (tmp_path / ".broker-0123456789abcdef.part").write_bytes(b"half")
    age(tmp_path)
    (tmp_path / ".broker-fedcba9876543210.part").write_bytes(b"just made, and not locked yet")
    (tmp_path / ".broker-x.part").mkdir()
    (tmp_path / "other.part").write_bytes(b"somebody else's")
    with Upload(folder, "a", "a", overwrite=False) as upload:
        upload.publish()
    kept = [".broker-fedcba9876543210.part", ".broker-x.part", "a", "other.part"]
    assert sorted(os.listdir(tmp_path)) == kept


def test_where_files_cannot_be_locked_age_decides(tmp_path: Path, folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    part = tmp_path / ".broker-0123456789abcdef.part"
    part.write_bytes(b"half")
    age(tmp_path)
    remove_left_overs(folder)
    assert part.exists()
    age(tmp_path, uploads.LEFT_OVER_S)
    remove_left_overs(folder)
    assert not part.exists()
