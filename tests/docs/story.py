"""Runs the blocks of one page in their order, in a folder of its own, with real processes.

What the words behind a block's language mean:

    bash                        runs; must end with 0
    bash background until=TEXT  starts and stays; goes on when TEXT has been written
    bash syntax                 is for a machine or a moment the tests do not have: only its syntax is checked
    bash …, console needs=npm   only where node and the packages of tests/javascript are; they must be where CI is true
    console                     `$ command` lines, each followed by what it prints; `…` stands for anything
    python                      runs; must end with 0
    python file=NAME            is written to that file, for blocks that come later
    diff file=NAME              changes that file; each of its pieces, between lines of `@@`, must fit in one place
    toml                        is loaded as a configuration
    json                        is JSON
    js                          its syntax is checked with node
    js run                      runs in node, with needs=npm; must end with 0
    js file=NAME                is written to that file; its syntax is checked
    html                        a page, whose scripts are checked as js
    nginx, caddy, ini           braces and sections are checked
    promql                      names of metrics are checked elsewhere, brackets here
    text, transcript            not run here
    python, js of=FILE          is quoted from that file of the repository; a line of `…` leaves some out

The page's port 8787 becomes the one on which the page's own broker listens.
"""

import ast
import configparser
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

from broker.config.load import load
from broker.worker.kernel.ports import free_ports
from tests.docs.blocks import ROOT, Block

PORT = "8787"
PATIENCE_S = 30.0
NOT_RUN = frozenset({"text", "transcript"})


class Wrong(AssertionError):
    """A block that does not do what it should; the text says where and what."""


class Story:
    """One page being run. `close` ends its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.patience_s = PATIENCE_S
        self._background: list[subprocess.Popen[str]] = []
        runtime = folder / "runtime"
        runtime.mkdir(mode=0o700)
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_STATE_HOME": str(folder / "state"),
            "BROKER_SERVER__PORT": str(self.port),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "LANG": "C.UTF-8",
        }

    def run(self, block: Block) -> None:
        """Do what the block's language and options ask. Raises Wrong."""
        if block.language in NOT_RUN or (block.options.get("needs") == "npm" and not self._has_npm_packages()):
            return
        if "of" in block.options:
            _check_quoted(block)
            return
        action = getattr(self, f"_{block.language}", None)
        if action is None:
            raise Wrong(f"{block.place}: nobody knows how to check a block of {block.language or 'no language'!r}")
        action(block, re.sub(rf"\b{PORT}\b", str(self.port), block.text))

    def close(self) -> None:
        """End what runs in the background, the last first."""
        for process in reversed(self._background):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)

    def _bash(self, block: Block, text: str) -> None:
        if "syntax" in block.options:
            self._check(block, ["bash", "-n", "-c", text])
        elif "background" in block.options:
            self._start(block, text)
        else:
            self._check(block, ["bash", "-euo", "pipefail", "-c", text])

    def _start(self, block: Block, text: str) -> None:
        log = self.folder / f"background-{block.line}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._background.append(process)
        ends_at = time.monotonic() + self.patience_s
        while block.options["until"] not in log.read_text():
            if process.poll() is not None or time.monotonic() > ends_at:
                state = "ended" if process.poll() is not None else f"ran {self.patience_s:g} s"
                raise Wrong(f"{block.place}: it {state} without {block.options['until']!r}:\n{log.read_text()}")
            time.sleep(0.02)

    def _console(self, block: Block, text: str) -> None:
        commands = re.split(r"^\$ ", text, flags=re.MULTILINE)
        if commands[0].strip():
            raise Wrong(f"{block.place}: a console begins with `$ command`")
        for entry in commands[1:]:
            command, _, expected = entry.partition("\n")
            while command.endswith("\\"):
                more, _, expected = expected.partition("\n")
                command = f"{command}\n{more}"
            done = self._run(["bash", "-uo", "pipefail", "-c", command])
            pattern = r".*?".join(re.escape(piece) for piece in expected.strip().split("…"))
            if not re.fullmatch(pattern, done.stdout.strip(), re.DOTALL):
                raise Wrong(f"{block.place}: $ {command}\nexpected\n{expected.strip()}\nprinted\n{done.stdout.strip()}")

    def _python(self, block: Block, text: str) -> None:
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise Wrong(f"{block.place}: {error}") from None
        name = block.options.get("file", "block.py")
        (self.folder / name).write_text(text)
        if "file" not in block.options:
            self._check(block, [sys.executable, "-W", "error", name])

    def _diff(self, block: Block, text: str) -> None:
        file = self.folder / block.options["file"]
        changed = file.read_text()
        for piece in re.split(r"^@@\n", text, flags=re.MULTILINE):
            lines = piece.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            at = [match.start() for match in re.finditer(f"^(?={re.escape(before)})", changed, re.MULTILINE)]
            if len(at) != 1:
                raise Wrong(f"{block.place}: this fits {file.name} in {len(at)} places, not in one:\n{before}")
            changed = changed[: at[0]] + after + changed[at[0] + len(before) :]
        ast.parse(changed)
        file.write_text(changed)

    def _toml(self, block: Block, text: str) -> None:
        file = self.folder / block.options.get("file", "block.toml")
        file.write_text(text)
        for name in re.findall(r'tls_\w+ = "([\w.]+)"', text):
            (self.folder / name).touch()
        load(file)

    def _json(self, block: Block, text: str) -> None:
        try:
            json.loads(text)
        except ValueError as error:
            raise Wrong(f"{block.place}: {error}") from None

    def _js(self, block: Block, text: str) -> None:
        _check_brackets(block, text)
        node = shutil.which("node")
        name = block.options.get("file", "block.mjs")
        (self.folder / name).write_text(text)
        if node is not None:
            self._check(block, [node, "--check", name])
        if "run" in block.options and self._has_npm_packages():
            self._check(block, ["node", name])

    def _html(self, block: Block, text: str) -> None:
        for script in re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL):
            self._js(block, script)

    def _has_npm_packages(self) -> bool:
        """Put them where node looks. Without them, where nobody insists, the syntax has to do."""
        installed = ROOT / "tests" / "javascript" / "node_modules"
        if shutil.which("node") is None or not installed.is_dir():
            if os.environ.get("CI") == "true":
                raise Wrong("install node, and run `npm install` in tests/javascript first")
            return False
        here = self.folder / "node_modules"
        if not here.exists():
            here.symlink_to(installed)
        return True

    def _ini(self, block: Block, text: str) -> None:
        try:
            configparser.ConfigParser(strict=False, interpolation=None).read_string(text)
        except configparser.Error as error:
            raise Wrong(f"{block.place}: {error}") from None

    def _nginx(self, block: Block, text: str) -> None:
        _check_brackets(block, text)
        for line in text.splitlines():
            stripped = line.strip()
            if stripped and not stripped.startswith("#") and stripped[-1] not in ";{}":
                raise Wrong(f"{block.place}: a directive without its end: {stripped}")

    def _caddy(self, block: Block, text: str) -> None:
        _check_brackets(block, text)

    def _promql(self, block: Block, text: str) -> None:
        _check_brackets(block, text)

    def _check(self, block: Block, command: list[str]) -> None:
        done = self._run(command)
        if done.returncode:
            raise Wrong(f"{block.place}: ended with {done.returncode}\n{done.stdout}")

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=self.patience_s,
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            raise Wrong(f"{command[-1]}\ndid not end within {self.patience_s:g} s: {expired.output}") from None


def _check_quoted(block: Block) -> None:
    """Each piece stands in the file as it is here, but for how deep it is indented, one behind the other."""
    source = ROOT / block.options["of"]
    lines = source.read_text(encoding="utf-8").splitlines()
    at = 0
    for piece in re.split(r"^…\n", block.text, flags=re.MULTILINE):
        wanted = piece.splitlines()
        while not _is_same(lines[at : at + len(wanted)], wanted):
            at += 1
            if at + len(wanted) > len(lines):
                raise Wrong(f"{block.place}: {block.options['of']} does not say (any more, or in this order):\n{piece}")
        at += len(wanted)


def _is_same(lines: list[str], wanted: list[str]) -> bool:
    return dedent("\n".join(lines)) == dedent("\n".join(wanted))


def _check_brackets(block: Block, text: str) -> None:
    for pair in ("{}", "()", "[]"):
        if text.count(pair[0]) != text.count(pair[1]):
            raise Wrong(f"{block.place}: {pair} do not pair")
