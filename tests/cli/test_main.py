"""The frame of the command line: fast, lazy, one line per error, fixed exit codes."""

import importlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from broker.cli import main as frame
from broker.cli.exits import MEANINGS, Exit, Failure, exit_for, markdown_table
from broker.cli.main import COMMANDS, LazyGroup, cli, main
from broker.config.errors import ConfigError
from broker.core.errors import KINDS


def _broker(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env=kept | environment,
    )


def _run(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> int:
    """Runs a command that ends in `error`."""

    @click.command()
    def fails() -> None:
        if error is not None:
            raise error

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "fails", fails, raising=False)
    monkeypatch.setitem(cli.table, "fails", (f"{__name__}:fails", "Fails."))  # type: ignore[attr-defined]
    return main(["fails"])


def test_help_imports_neither_tornado_nor_zmq_nor_a_command() -> None:
    program = """
import sys
from broker.cli.main import main
code = main(sys.argv[1:])
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"tornado", "zmq", "msgspec", "prometheus_client", "uvloop", "asyncio", "ssl"}, loaded
assert {name for name in sys.modules if name.startswith("broker.cli.")} == {"broker.cli.main", "broker.cli.exits"}
print("code", code)
"""
    for arguments in (["--help"], ["--version"], ["nonsense"], []):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=50
        )
        assert "code" in done.stdout, done.stderr
    assert "asyncio" not in done.stderr


def test_help_costs_little_cpu() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    repetitions = 5
    for _ in range(repetitions):
        assert _broker("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / repetitions
    assert cpu_s < 0.3


def test_help_lists_commands_and_exit_codes() -> None:
    done = _broker("--help")
    for name, (_, text) in COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert text in done.stdout
    assert "130  interrupted or cancelled" in done.stdout
    assert done.stderr == ""
    assert _broker("-h").stdout == done.stdout


def test_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from broker._version import VERSION
    from broker.links.compiled import PURE, core

    monkeypatch.delenv(PURE, raising=False)
    assert _broker("--version").stdout == f"broker {VERSION} ({core()})\n"
    assert _broker("--version", **{PURE: "1"}).stdout == f"broker {VERSION} (pure Python)\n"


def test_no_command_shows_the_help_and_is_wrong_usage() -> None:
    done = _broker()
    assert done.returncode == Exit.USAGE
    assert done.stdout == ""
    assert "Commands:" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert COMMANDS[name][1].endswith(".")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["srve"], "broker: No such command 'srve'."),
        (["--prot"], "broker: No such option '--prot'."),
        (["config", "zzz"], "broker: No such command 'zzz'. (see 'broker config --help')"),
        (["config", "show", "--jsn"], "broker: No such option '--jsn'."),
        (["config", "show", "a", "b"], "broker: Got unexpected extra argument (b) (see 'broker config show --help')"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == Exit.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(expected)
    assert err.endswith(" --help')\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (Failure(Exit.DEADLINE, "data/read: the deadline passed"), 6, "broker: data/read: the deadline passed\n"),
        (Failure(Exit.OK, "fine"), 0, "broker: fine\n"),
        (ConfigError("x.toml: unknown key a"), 2, "broker: x.toml: unknown key a\n"),
        (click.ClickException("no"), 2, "broker: no\n"),
        (click.UsageError("bad"), 2, "broker: bad (see 'broker fails --help')\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "broker: a.json: No such file or directory\n"),
        (
            ConnectionRefusedError(111, "Connection refused"),
            3,
            "broker: the connection failed: [Errno 111] Connection refused\n",
        ),
        (
            ZeroDivisionError("division by zero"),
            70,
            "broker: unexpected ZeroDivisionError: division by zero "
            "(a defect of this program; BROKER_TRACEBACK=1 shows where)\n",
        ),
        (Failure(Exit.REMOTE_ERROR, "a\nb\x1b[2J\u202e"), 1, "broker: a b [2J \n"),
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 130, ""),
        (click.exceptions.Exit(5), 5, ""),
    ],
)
def test_every_ending_has_its_code_and_its_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    code: int,
    line: str,
) -> None:
    monkeypatch.delenv("BROKER_TRACEBACK", raising=False)
    assert _run(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


def test_the_traceback_is_there_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BROKER_TRACEBACK", "1")
    assert _run(monkeypatch, Failure(Exit.USAGE, "what")) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("broker: what\n")


def test_an_interrupt_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import click, signal, sys\n"
        "@click.command()\n"
        "def waits():\n"
        "    print('waiting', flush=True)\n"
        "    signal.pause()\n"
    )
    program = (
        "import sys; from broker.cli.main import main, cli\n"
        "cli.table['waits'] = ('waits:waits', 'Waits.')\n"
        "sys.exit(main(['waits']))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(frame.__file__).parents[2])])}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "")


@pytest.mark.parametrize("arguments", [["config", "init", "-"], ["--help"], ["--version"]])
def test_a_reader_that_goes_away_is_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
        timeout=50,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (Exit.PIPE_CLOSED, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["config", "init", "-"]])
def test_a_full_disk_under_the_output_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "broker", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=50,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "broker: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize(("arguments", "code"), [("--version", 0), ("config check", 0), ("nonsense", 2)])
def test_closed_outputs_are_no_defect(arguments: str, code: int) -> None:
    command = f'exec "{sys.executable}" -X dev -m broker {arguments} >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], check=False, timeout=50).returncode == code


def test_commands_are_imported_when_they_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: imported.append(name) or real(name))
    group = LazyGroup("g", table={"config": COMMANDS["config"], "broken": ("no.such.module:x", "Broken.")})
    context = click.Context(group)
    assert group.list_commands(context) == ["config", "broken"]
    assert "Broken." in group.get_help(context)
    assert [item.value for item in group.shell_complete(context, "b")] == ["broken"]
    assert imported == []
    assert group.get_command(context, "nothing") is None
    assert group.get_command(context, "config") is not None
    assert imported == ["broker.cli.config"]


def test_completion_offers_commands_with_their_help() -> None:
    completer = ShellComplete(cli, {}, "broker", "_BROKER_COMPLETE")
    items = completer.get_completions([], "")
    assert [item.value for item in items] == list(COMMANDS)
    assert items[0].help == COMMANDS["serve"][1]
    assert "init" in [item.value for item in completer.get_completions(["config"], "")]


def test_a_shell_can_ask_for_completions() -> None:
    words = {"COMP_WORDS": "broker conf", "COMP_CWORD": "1", "_BROKER_COMPLETE": "bash_complete"}
    done = _broker(**words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,config\n", "")
    assert "_BROKER_COMPLETE=zsh_complete" in _broker(_BROKER_COMPLETE="zsh_source").stdout


def test_the_exit_codes_are_fixed() -> None:
    assert {code.name: code.value for code in Exit} == {
        "OK": 0,
        "REMOTE_ERROR": 1,
        "USAGE": 2,
        "CANNOT_CONNECT": 3,
        "DENIED": 4,
        "NOT_SERVED": 5,
        "DEADLINE": 6,
        "COME_BACK": 7,
        "DEFECT": 70,
        "INTERRUPTED": 130,
        "PIPE_CLOSED": 141,
    }
    assert list(MEANINGS) == list(Exit)
    table = markdown_table().splitlines()
    assert table[:3] == ["| exit code | meaning |", "|---|---|", "| 0 | it worked |"]
    assert len(table) == 2 + len(Exit)


def test_every_outcome_has_an_exit_code() -> None:
    codes = {kind.name: exit_for(kind.name) for kind in KINDS}
    assert codes.pop("worker_error") == codes.pop("bad_reply") == Exit.REMOTE_ERROR
    assert Exit.REMOTE_ERROR not in codes.values(), "an outcome without a code of its own"
    assert codes["no_worker"] == Exit.NOT_SERVED
    assert codes["overloaded"] == codes["shutting_down"] == codes["worker_lost"] == Exit.COME_BACK
    assert exit_for("something new") == Exit.REMOTE_ERROR
