"""`broker user`: where passwords come from, what is printed, and with which exit code."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from broker.auth import passwords
from broker.auth.passwords import verify
from broker.auth.users import UserStore
from broker.auth.users_file import UserRecord
from broker.cli.main import main
from tests.auth.helpers import cheap_passwords

PASSWORD = "a canary of a password"
REAL_ARGON2 = passwords._argon2


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    cheap_passwords(monkeypatch)
    for name in ("BROKER_CONFIG", "BROKER_AUTH__USERS_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["user", *arguments])
        return Result(code, *capfd.readouterr())

    return run


def add(run: Run, name: str, *more: str, password: str = PASSWORD) -> Result:
    return run("add", name, "--password-stdin", *more, stdin=password.encode() + b"\n")


def users(tmp_path: Path) -> tuple[UserRecord, ...]:
    return UserStore(tmp_path / "state" / "broker" / "users.json").users()


def test_add_keeps_a_hash_and_prints_no_password(run: Run, tmp_path: Path) -> None:
    result = add(run, "carol", "--role", "caller", "--role", "listener", "--endpoint", "data*")
    assert result == (0, "", "user carol: caller, listener at data*\n")
    record = users(tmp_path)[0]
    assert (record.name, record.roles, record.endpoints) == ("carol", ("caller", "listener"), ("data*",))
    assert verify(record.hash, PASSWORD) and not verify(record.hash, PASSWORD + "\n")
    file = tmp_path / "state" / "broker" / "users.json"
    assert PASSWORD not in file.read_text() and file.stat().st_mode & 0o777 == 0o600


def test_on_a_terminal_it_asks_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_argon2", REAL_ARGON2)  # as the process has it
    terminal, other_end = os.openpty()
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-m", "broker", "user", "add", "carol"]
    process = subprocess.Popen(
        [sys.executable, "-c", take, *command],
        stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True,
    )  # fmt: skip
    os.close(other_end)
    said = b""
    answers = [(b"Password: ", "first try of it"), (b"again: ", "another one"), (b"Password: ", PASSWORD),
               (b"again: ", PASSWORD)]  # fmt: skip
    for prompt, answer in answers:
        heard = b""
        while prompt not in heard:
            heard += os.read(terminal, 1000)
        said += heard
        os.write(terminal, answer.encode() + b"\n")
    try:
        while chunk := os.read(terminal, 1000):
            said += chunk
    except OSError:  # how Linux tells the end of a terminal
        pass
    assert process.wait(20) == 0, said
    assert PASSWORD.encode() not in said and b"user carol: caller at *" in said
    os.close(terminal)
    assert verify(users(tmp_path)[0].hash, PASSWORD)


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (b"", "at least 8 are needed"),
        (b"short\n", "has 5 characters"),
        (b"two lines of\nit\n", "control characters"),
        (b"x" * 2000, "more than 1024 bytes"),
        (b"x" * 5000, "a password is one line"),
        (b"\xff" * 10, "not UTF-8"),
    ],
)
def test_a_bad_password_is_exit_code_2_and_one_clear_line(run: Run, stdin: bytes, said: str) -> None:
    for command in (("add", "carol"), ("password", "dave")):
        add(run, "dave")
        result = run(*command, "--password-stdin", stdin=stdin)
        assert (result.exit_code, result.stdout) == (2, "") and said in result.stderr
        assert result.stderr.startswith("broker: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a b",), "the name 'a b'"),
        (("local",), "the broker's own"),
        (("dave",), "there is a user dave already"),
        (("a", "--role", "boss"), "'boss' is not one of"),
        (("a", "--endpoint", "../x"), "'../x' is no endpoint pattern"),
    ],
)
def test_what_is_wrong_is_said_before_a_password_is_asked_for(run: Run, arguments: tuple[str, ...], said: str) -> None:
    add(run, "dave")
    result = run("add", *arguments)
    assert (result.exit_code, result.stdout) == (2, "") and said in result.stderr


def test_without_a_terminal_nothing_is_asked(run: Run, tmp_path: Path) -> None:
    result = run("add", "carol", stdin=PASSWORD.encode())
    assert result.exit_code == 2 and "--password-stdin" in result.stderr
    assert users(tmp_path) == ()


def test_no_password_is_taken_as_an_argument(run: Run) -> None:
    assert run("add", "carol", PASSWORD).exit_code == 2
    assert run("add", "carol", "--password", PASSWORD).exit_code == 2


def test_list_shows_every_user_and_no_hash(run: Run, tmp_path: Path) -> None:
    add(run, "carol", "--endpoint", "lab")
    add(run, "dave", "--role", "admin")
    run("disable", "dave")
    table = run("list")
    header, carol, dave = table.stdout.splitlines()
    assert header.split() == ["name", "state", "roles", "endpoints", "created", "changed"]
    assert carol.split()[:4] == ["carol", "valid", "caller", "lab"]
    assert dave.split()[:4] == ["dave", "disabled", "admin", "*"]
    listed = json.loads(run("list", "--json").stdout)
    assert [(row["name"], row["state"], row["roles"]) for row in listed] == [
        ("carol", "valid", ["caller"]),
        ("dave", "disabled", ["admin"]),
    ]
    for record in users(tmp_path):
        assert record.hash not in table.stdout + json.dumps(listed)


def test_list_of_nothing(run: Run) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "") and "no users" in result.stderr
    assert json.loads(run("list", "--json").stdout) == []


def test_password_disable_enable_remove(run: Run, tmp_path: Path) -> None:
    add(run, "carol")
    before = users(tmp_path)[0]
    result = run("password", "carol", "--password-stdin", stdin=b"another long one\n")
    assert result == (0, "", "user carol has another password\n")
    changed = users(tmp_path)[0]
    assert verify(changed.hash, "another long one") and changed.created == before.created
    assert run("disable", "carol").exit_code == 0 and users(tmp_path)[0].disabled
    assert run("enable", "carol").exit_code == 0 and users(tmp_path)[0] == changed
    assert run("remove", "carol") == (0, "", "user carol removed\n")
    assert users(tmp_path) == ()


def test_an_unknown_user_is_told_with_the_nearest(run: Run) -> None:
    add(run, "carol")
    for command in ("remove", "disable", "enable", "password"):
        result = run(command, "carlo")
        assert result.exit_code == 2 and "there is no user 'carlo'; did you mean 'carol'?" in result.stderr


def test_the_file_by_option_by_environment_and_by_configuration(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert add(run, "a", "--users-file", str(tmp_path / "option.json")).exit_code == 0
    assert (tmp_path / "option.json").exists()
    monkeypatch.setenv("BROKER_AUTH__USERS_FILE", str(tmp_path / "variable.json"))
    assert add(run, "a").exit_code == 0
    assert (tmp_path / "variable.json").exists()
    monkeypatch.delenv("BROKER_AUTH__USERS_FILE")
    (tmp_path / "broker.toml").write_text(f'[auth]\nusers_file = "{tmp_path}/configured.json"\n')
    assert add(run, "a", "--config", str(tmp_path / "broker.toml")).exit_code == 0
    assert (tmp_path / "configured.json").exists()
    assert not (tmp_path / "state").exists()


def test_a_file_that_cannot_be_used_is_bad_input(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "users.json"
    file.write_text("{")
    file.chmod(0o600)
    for command in (("list",), ("add", "a"), ("remove", "a")):
        result = run(*command, "--users-file", str(file))
        assert result.exit_code == 2 and "users.json is damaged" in result.stderr
    file.chmod(0o640)
    result = run("list", "--users-file", str(file))
    assert result.exit_code == 2 and "can be read by others" in result.stderr


def test_every_command_has_a_help_text(run: Run) -> None:
    for name in ("add", "list", "remove", "password", "disable", "enable"):
        result = run(name, "--help")
        assert result.exit_code == 0 and "--users-file" in result.stdout
