"""`broker context`: what is kept, how safely, and which broker a command goes to."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.auth import access_file
from broker.auth.access_file import Access, AccessFile
from broker.auth.contexts import ContextError, add_context, contexts_path, load_contexts, use_context
from broker.auth.targets import Target, find_target, locator
from broker.cli.main import main
from tests.peer.harness import SECRET, broker_thread

URL = "https://broker.lab.example"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("BROKER_")]:
        monkeypatch.delenv(name)
    for name in ("config", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


def test_add_list_use_remove(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["context", "list"]) == 0
    assert "no contexts" in capfd.readouterr().err
    assert main(["context", "add", "lab", "--url", URL, "--token", "secret-1"]) == 0
    assert main(["context", "add", "home", "--url", "http://127.0.0.1:1", "--use"]) == 0
    told = capfd.readouterr().err
    assert "context lab kept in" in told
    assert "secret-1" not in told
    assert main(["context", "list", "--json"]) == 0
    out = capfd.readouterr().out
    assert json.loads(out) == [
        {"name": "lab", "url": URL, "token": True, "in_use": False},
        {"name": "home", "url": "http://127.0.0.1:1", "token": False, "in_use": True},
    ]
    assert main(["context", "use", "lab"]) == 0
    assert main(["context", "list"]) == 0
    out = capfd.readouterr().out
    assert "*  lab" in out
    assert "secret-1" not in out
    assert main(["context", "add", "lab", "--url", URL, "--token", "secret-2"]) == 0
    assert "context lab replaced" in capfd.readouterr().err
    assert load_contexts().contexts["lab"].token == "secret-2"
    assert main(["context", "remove", "lab"]) == 0
    assert "commands go to the broker on this machine" in capfd.readouterr().err
    assert list(load_contexts().contexts) == ["home"]
    assert load_contexts().current is None


def test_the_file_is_for_its_owner_only(home: Path) -> None:
    os.umask(os.umask(0))
    add_context("lab", URL, "secret")
    assert contexts_path() == home / "config" / "broker" / "contexts.json"
    assert stat.S_IMODE(contexts_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(contexts_path().parent.stat().st_mode) == 0o700


def test_a_token_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("from-a-pipe\n"))
    assert main(["context", "add", "lab", "--url", URL, "--token", "-"]) == 0
    assert load_contexts().contexts["lab"].token == "from-a-pipe"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "../x", "--url", URL], "is no name for a context"),
        (["add", "local", "--url", URL], "local stands for the broker on this machine"),
        (["add", "x", "--url", "lab"], "names no scheme"),
        (["add", "x", "--url", "http://["], "is no URL of a broker"),
        (["add", "x", "--url", "http://lab:99999"], "is no URL of a broker"),
        (["add", "x", "--url", "ftp://lab"], "is no URL of a broker"),
        (["add", "x", "--url", "http://user:secret@lab"], "neither a query nor a user name"),
        (["add", "x", "--url", URL, "--token", "a b"], "--token holds spaces"),
        (["use", "nothing"], "there is no context 'nothing'; there are: lab"),
        (["remove", "nothing"], "there is no context 'nothing'; there are: lab"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    add_context("lab", URL, "secret")
    assert main(["context", *arguments]) == 2
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert list(load_contexts().contexts) == ["lab"]


def _damage(text: str) -> None:
    contexts_path().write_text(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda: _damage("{"), "is damaged"),
        (lambda: _damage('{"contexts": 5}'), "is damaged"),
        (lambda: _damage("[" * 100_000), "is damaged"),
        (lambda: contexts_path().chmod(0o666), "could have been written by others"),
        (lambda: (contexts_path().unlink(), os.mkfifo(contexts_path())), "is no regular file"),
        (lambda: (contexts_path().unlink(), contexts_path().symlink_to("/etc/passwd")), "cannot read the contexts"),
    ],
)
def test_a_spoilt_file_is_told_and_not_believed(
    spoil: Callable[[], object], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    add_context("lab", URL, "secret")
    spoil()
    with pytest.raises(ContextError, match=says):
        load_contexts()
    assert main(["context", "list"]) == 2
    with pytest.raises(ConnectionError, match=says):
        find_target()()
    assert main(["endpoints"]) == 3
    assert says in capfd.readouterr().err


def test_the_environment_goes_before_the_context_and_that_before_the_local_broker(home: Path) -> None:
    access = AccessFile.write(8765, Access(url="http://127.0.0.1:8765", token="local", pid=os.getpid(), started=0.0))
    try:
        assert access_file.find().token == "local"
        assert find_target(environ={})() == ("http://127.0.0.1:8765", "local")
        add_context("lab", URL, "secret")
        assert find_target(environ={})() == (URL, "secret")
        assert find_target(environ={"BROKER_TOKEN": "mine"})() == (URL, "mine")
        given = {"BROKER_URL": "http://else:1", "BROKER_TOKEN": "mine"}
        assert find_target(environ=given)() == ("http://else:1", "mine")
        assert find_target("http://flag:1", "flag", environ=given)() == ("http://flag:1", "flag")
        use_context("local")
        assert find_target(environ={})() == ("http://127.0.0.1:8765", "local")
    finally:
        access.remove()


def test_a_kept_token_goes_to_its_own_url_only() -> None:
    add_context("lab", URL, "secret")
    assert find_target("https://BROKER.lab.example:443", environ={})()[1] == "secret"
    for other in ("http://broker.lab.example", "https://broker.lab.example.evil", "https://broker.lab.example:444"):
        assert find_target(other, environ={})()[1] == ""


def test_it_is_said_where_a_target_comes_from() -> None:
    add_context("lab", URL, "secret")
    assert locator(environ={})() == Target(URL, "secret", "context lab", "context lab")
    assert locator(URL, environ={})() == Target(URL, "secret", "given", "context lab")
    told = locator(environ={"BROKER_URL": "http://x", "BROKER_TOKEN": "t"})()
    assert told == Target("http://x", "t", "BROKER_URL", "BROKER_TOKEN")
    assert locator("http://x", environ={})() == Target("http://x", "", "given", "nowhere")


def test_a_command_goes_to_the_context_in_use(capfd: pytest.CaptureFixture[str]) -> None:
    with broker_thread() as (broker, _):
        add_context("lab", broker.url, SECRET)
        assert main(["ping", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["url"] == broker.url
