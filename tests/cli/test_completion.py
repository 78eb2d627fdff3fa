"""`broker completion`: the scripts, in the shells that are there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from broker.cli.main import main


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with a `broker` command in front."""
    program = tmp_path / "broker"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m broker "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def script(shell: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    return told.out


def test_bash_completes_commands_and_options(environment: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    probe = (
        script("bash", capfd)
        + """
complete -p broker | grep -q _broker_completion || exit 9
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _broker_completion broker; echo "${COMPREPLY[*]}"; }
ask broker do
ask broker work f
ask broker work files --allow-
ask broker context ""
ask broker call a/b --gr
ask broker listen --e
"""
    )
    done = subprocess.run(
        ["bash", "-c", probe], capture_output=True, text=True, env=environment, timeout=50, check=True
    )
    assert done.stdout.splitlines() == [
        "doctor", "files", "--allow-write --allow-delete", "add list remove use", "--group --grace", "--epoch",
    ]  # fmt: skip
    assert done.stderr == ""


def test_bash_in_an_interactive_shell(environment: dict[str, str], tmp_path: Path) -> None:
    """As in ~/.bashrc, with the Tab key."""
    import pty

    (tmp_path / ".bashrc").write_text('eval "$(broker completion bash)"; PS1="ready> "\n')
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("bash", ["bash", "--rcfile", str(tmp_path / ".bashrc"), "-i"], environment | {"TERM": "dumb"})
    try:
        seen = _read_until(terminal, b"ready> ")
        os.write(terminal, b"broker doct\t--help\n")
        seen = _read_until(terminal, b"Usage: broker doctor")
        assert b"broker doctor --help" in seen
    finally:
        os.write(terminal, b"\x03\nexit\n")
        os.close(terminal)
        os.waitpid(process, 0)


def _read_until(terminal: int, what: bytes) -> bytes:
    import select
    import time

    seen, ends_at = b"", time.monotonic() + 30
    while what not in seen:
        assert time.monotonic() < ends_at, seen
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096)
    return seen


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_take_their_script(
    shell: str, environment: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capfd)
    assert "_BROKER_COMPLETE" in text
    if shutil.which(shell) is None:
        return  # what it does with it cannot be seen here
    file = tmp_path / "script"
    file.write_text(text)
    arguments = [shell, "-n", str(file)] if shell == "fish" else [shell, "-fc", f"autoload -Uz compinit; source {file}"]
    subprocess.run(arguments, env=environment, timeout=50, check=True)


def test_what_the_other_shells_ask_is_answered(environment: dict[str, str]) -> None:
    for shell, form in (("zsh", "plain\ndoctor\n"), ("fish", "plain,doctor\t")):
        asked = {"_BROKER_COMPLETE": f"{shell}_complete", "COMP_WORDS": "broker doct", "COMP_CWORD": "1"}
        if shell == "fish":
            asked["COMP_CWORD"] = "doct"
        done = subprocess.run(
            ["broker"], capture_output=True, text=True, env=environment | asked, timeout=50, check=True
        )
        assert form in done.stdout


def test_an_unknown_shell(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capfd.readouterr().err
