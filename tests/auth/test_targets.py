"""Which broker is meant, and that an access file's token goes to that file's own URL only."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.auth.access_file import Access, AccessFile, runtime_folder
from broker.auth.targets import find_target

URL = "http://127.0.0.1:4711"


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AccessFile]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    file = AccessFile.write(4711, Access(url=URL, token="local", pid=os.getpid(), started=time.time()))
    assert file.path.parent == runtime_folder()
    yield file
    file.remove()


def test_arguments_before_the_environment_before_the_access_file(local: AccessFile) -> None:
    environ = {"BROKER_URL": "http://env:1", "BROKER_TOKEN": "env"}
    assert find_target("http://arg:1", "arg", environ)() == ("http://arg:1", "arg")
    assert find_target(None, None, environ)() == ("http://env:1", "env")
    assert find_target("http://arg:1", None, environ)() == ("http://arg:1", "env")
    assert find_target(None, None, {})() == (URL, "local")
    assert find_target(None, "arg", {})() == (URL, "arg")


@pytest.mark.parametrize("url", [URL, f"{URL}/", "127.0.0.1:4711", "ws://localhost:4711/ws", "http://LOCALHOST:4711"])
def test_the_access_files_token_goes_to_its_own_url(local: AccessFile, url: str) -> None:
    assert find_target(url, None, {})() == (url, "local")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:4712", "https://127.0.0.1:4711", "http://example.org:4711", "http://127.0.0.1.example.org:4711",
        "http://127.0.0.1:4711@example.org", "http://10.0.0.1:4711", "http://x:port", "nonsense",
    ],
)  # fmt: skip
def test_and_to_no_other(local: AccessFile, url: str) -> None:
    assert find_target(url, None, {})() == (url, "")


def test_it_is_looked_up_anew_each_time(local: AccessFile) -> None:
    target = find_target(None, None, {})
    assert target() == (URL, "local")
    local.remove()
    with pytest.raises(OSError, match="no broker of yours runs here"):
        target()
    again = AccessFile.write(4711, Access(url=URL, token="new", pid=os.getpid(), started=time.time()))
    assert target() == (URL, "new")
    again.remove()
