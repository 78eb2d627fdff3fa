"""The file of users: changed by several, believed only if it is whole and private."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.auth import record_file
from broker.auth.users import UnknownUser, UserStore, default_users_path
from broker.auth.users_file import UserError, read_users
from broker.core.access import Grant, Role
from tests.auth.helpers import cheap_passwords

PASSWORD = "a canary of a password"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "users.json"


def test_a_user_is_found_with_what_was_granted(file: Path) -> None:
    store = UserStore(file)
    assert len(store) == 0 and store.find("carol") is None
    record = store.add("carol", PASSWORD, ["caller", "listener", "caller"], ["lab*"])
    user = store.find("carol")
    assert user is not None and user.id == record.id and store.is_valid(user.id)
    principal = user.principal
    assert (principal.name, principal.kind, principal.user_id) == ("carol", "user", record.id)
    assert principal.grants == (Grant(Role.CALLER | Role.LISTENER, ("lab*",)),) and principal.expires_at is None
    assert PASSWORD not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert [user.name for user in UserStore(file).users()] == ["carol"]


def test_another_process_is_noticed(file: Path) -> None:
    here, there = UserStore(file), UserStore(file)
    there.add("carol", PASSWORD)
    first = here.find("carol")
    assert first is not None and here.refresh() == frozenset(), "nobody is gone"
    there.set_password("carol", "quite another one")
    second = here.find("carol")
    assert second is not None and second.id != first.id
    assert not here.is_valid(first.id) and here.is_valid(second.id)
    assert here.refresh() == {first.id} and here.refresh() == frozenset()
    there.set_disabled("carol", True)
    assert here.refresh() == {second.id} and not here.is_valid(second.id)
    there.set_disabled("carol", False)
    assert here.refresh() == frozenset() and here.is_valid(second.id), "the very entry is back"
    there.remove("carol")
    assert here.refresh() == {second.id} and here.find("carol") is None


def test_what_is_wrong_is_said_and_nothing_changes(file: Path) -> None:
    store = UserStore(file)
    store.add("carol", PASSWORD)
    before = file.read_bytes()
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("a user carol already", lambda: store.add("carol", PASSWORD)),
        ("does not match", lambda: store.add("a b", PASSWORD)),
        ("the broker's own", lambda: store.add("admin", PASSWORD)),
        ("the role 'boss'", lambda: store.add("dave", PASSWORD, ["boss"])),
        ("needs a role", lambda: store.add("dave", PASSWORD, [])),
        ("no endpoint pattern", lambda: store.add("dave", PASSWORD, ["caller"], [".."])),
        ("at least 8", lambda: store.add("dave", "short")),
        ("at least 8", lambda: store.set_password("carol", "short")),
    ]
    for text, change in wrong:
        with pytest.raises(UserError, match=text):
            change()
    for change in (store.remove, lambda name: store.set_password(name, PASSWORD), store.get):
        with pytest.raises(UnknownUser, match="did you mean 'carol'"):
            change("carola")
    assert file.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o644])
def test_a_file_that_others_can_open_is_refused(file: Path, mode: int) -> None:
    store = UserStore(file)
    store.add("carol", PASSWORD)
    file.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        UserStore(file)
    with pytest.raises(UserError, match="chmod 600"):
        store.add("dave", PASSWORD)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"{",
        lambda text: b"[" * 100_000,
        lambda text: b"\xff",
        lambda text: text.replace(b'"version": 1', b'"version": 2'),
        lambda text: text.replace(b'"carol"', b'"dave"'),
        lambda text: text.replace(b'"carol"', b'"../x"'),
        lambda text: text.replace(b"$scrypt$", b"$crypt$"),
        lambda text: text.replace(b"ln=4", b"ln=30"),
        lambda text: text.replace(b'"created"', b'"extra": 1, "created"'),
        lambda text: text.replace(b'"caller"', b'"boss"'),
    ],
)
def test_a_damaged_file_is_refused_at_the_start_and_keeps_the_old_at_a_reload(
    file: Path, change: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store = UserStore(file)
    carol = store.add("carol", PASSWORD)
    store.add("dave", PASSWORD)
    whole = file.read_bytes()
    broken = change(whole)
    assert broken != whole
    with file.open("r+b") as there:  # as an editor would, over it
        there.truncate()
        there.write(broken)
    with pytest.raises(UserError, match="damaged"):
        UserStore(file)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            user = store.find("carol")
            assert user is not None and user.id == carol.id and store.refresh() == frozenset()
    assert len(caplog.records) == 1 and "users stay as they were" in caplog.text
    file.write_bytes(whole)
    store.remove("carol")
    assert store.find("carol") is None


def test_a_file_that_cannot_be_used_is_not_read_for_everybody_who_asks(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = UserStore(file)
    store.add("carol", PASSWORD)
    reads = []

    def counted(path: Path) -> Any:
        reads.append(path)
        return read_users(path)

    store._file._read = counted
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    for _ in range(20):
        assert store.find("carol") is not None
    assert len(reads) == 1
    file.write_bytes(whole[:-40])
    assert store.find("carol") is not None and len(reads) == 2, "it has changed again"
    monkeypatch.setattr(record_file, "AGAIN_S", 0.0)
    file.write_bytes(whole[:-50])
    store.find("carol")
    store.find("carol")
    assert len(reads) == 4, "what could not be read may be readable later without a change"
    file.write_bytes(whole)
    assert store.find("carol") is not None and len(reads) == 5


def test_a_link_is_read_and_not_replaced(file: Path, tmp_path: Path) -> None:
    UserStore(file).add("carol", PASSWORD)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    store = UserStore(link)
    assert store.find("carol") is not None
    with pytest.raises(UserError, match="symbolic link"):
        store.remove("carol")


def test_a_fifo_does_not_hold_the_daemon(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "users.json", 0o600)
    with pytest.raises(UserError, match="no regular file"):
        UserStore(tmp_path / "users.json")


def test_who_is_nobody_costs_what_users_cost(file: Path) -> None:
    store = UserStore(file)
    store.add("carol", PASSWORD)
    assert store.stand_in("x").startswith("$scrypt$ln=4,r=8,p=1$")
    assert store.stand_in("x") == store.stand_in("x")
    record = store.get("carol")
    other = msgspec.structs.replace(record, name="dave", hash=record.hash.replace("ln=4", "ln=5"))
    data = msgspec.json.encode({"version": 1, "users": [record, other]})
    file.write_bytes(data)
    assert store.find("dave") is not None
    costs = {store.stand_in(f"nobody{number}").split("$")[2] for number in range(64)}
    assert costs == {"ln=4,r=8,p=1", "ln=5,r=8,p=1"}, "where users differ, nobodies differ"


def test_the_default_place_is_beside_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_users_path() == Path("/state/broker/users.json")
