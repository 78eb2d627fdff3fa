"""The systems under load: this broker and its peers, each pinned to one processor and told to the generator.

`ours` is `broker serve` with its defaults, `pure` the same without the compiled core, `floor` and `relay` what is
left if one takes everything away (in C, in Python). nats-server and Crossbar are peers where they are installed:
nats-server on the PATH or in /usr/sbin, Crossbar on the PATH or named by `CROSSBAR`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.echo import self_signed
from benchmarks.processes import ROOT, START_S, daemon, end, family, pinned, processors
from broker.worker.kernel.ports import free_ports

HERE = Path(__file__).parent
TOKEN = secrets.token_urlsafe(32)
RUN_S = 240.0
SETTLE_S = {"crossbar": 3.0}

Figures = dict[str, Any]


class Subject:
    """One system that serves, and how the generator speaks to it."""

    def __init__(self, name: str, pid: int, words: list[str]) -> None:
        self.name = name
        self.pid = pid
        self._words = words

    def run(self, mode: str = "ask", **options: Any) -> Figures:
        """Put the generator's load on it; what it found. RuntimeError with its words if that failed."""
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        pids = ",".join(map(str, family(self.pid)))
        command = [compiled("generator"), *self._words, f"--mode={mode}", f"--broker={pids}", *words]
        done = subprocess.run(
            pinned(command, processors()[1]),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RUN_S,
            check=False,
        )
        if done.returncode or not done.stdout:
            raise RuntimeError(f"{self.name}, {mode} {options}: {done.stderr.strip() or done.returncode}")
        found: Figures = json.loads(done.stdout)
        if found.get("failed"):
            raise RuntimeError(f"{self.name}, {mode} {options}: {found['failed']} requests failed; {done.stderr}")
        return found


def compiled(name: str) -> str:
    """The program made of one of the C files here, built anew when that has changed. SystemExit without a compiler."""
    source = HERE / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    program = Path(tempfile.gettempdir(), f"broker-benchmarks-{os.getuid()}", f"{name}-{digest}")
    if program.exists():
        return str(program)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("the load generator is made when it is needed: install a C compiler")
    program.parent.mkdir(mode=0o700, exist_ok=True)
    fresh = f"{program}.{os.getpid()}"
    base = [compiler, "-O2", "-o", fresh, str(source)]
    for more in (["-DWITH_TLS", "-lssl", "-lcrypto"], []):  # without OpenSSL's headers: without TLS
        done = subprocess.run([*base, *more], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            Path(fresh).replace(program)
            return str(program)
    raise SystemExit(f"{source.name} does not compile:\n{done.stderr}")


def peers() -> list[str]:
    """Those of the peers that are installed."""
    return [name for name, command in (("nats", _nats()), ("crossbar", _crossbar())) if command]


def _nats() -> str | None:
    return shutil.which("nats-server", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))


def _crossbar() -> str | None:
    return os.environ.get("CROSSBAR") or shutil.which("crossbar")


@contextmanager
def subject(name: str, environment: Mapping[str, str] | None = None, *, tls: bool = False) -> Iterator[Subject]:
    """A system for the length of the block. `environment` configures this broker only."""
    with ExitStack() as stack:
        if name in ("ours", "pure"):
            variables = {"BROKER_AUTH__ADMIN_TOKEN": TOKEN, **(environment or {})}
            if tls:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                self_signed(Path(folder))
                variables["BROKER_SERVER__TLS_CERTIFICATE"] = f"{folder}/cert.pem"
                variables["BROKER_SERVER__TLS_KEY"] = f"{folder}/key.pem"
            process = stack.enter_context(daemon(variables, processor=processors()[0], pure=name == "pure"))
            words = [f"--port={process.port}", "--dialect=rpc", f"--token={TOKEN}"]
            yield Subject(name, process.pid, [*words, "--tls"] if tls else words)
        else:
            port, pid, dialect = stack.enter_context(_PEERS[name](tls) if name == "relay" else _PEERS[name]())
            words = [f"--port={port}", f"--dialect={dialect}", *(["--tls"] if tls else [])]
            yield Subject(name, pid, [*words, "--caller-path=/ws"] if dialect == "wamp" else words)


Peer = Iterator[tuple[int, int, str]]
"""port, process id, dialect"""


@contextmanager
def _floor() -> Peer:
    with _printing_its_port([compiled("floor")]) as (port, pid):
        yield port, pid, "rpc"


@contextmanager
def _relay(tls: bool = False) -> Peer:
    command = [sys.executable, "-m", "benchmarks.relay", *(["--tls"] if tls else [])]
    with _printing_its_port(command) as (port, pid):
        yield port, pid, "rpc"


@contextmanager
def _printing_its_port(command: list[str]) -> Iterator[tuple[int, int]]:
    words = pinned(command, processors()[0])
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().split()[-1]), process.pid
    finally:
        end(process)
        process.stdout.close()


@contextmanager
def _nats_server() -> Peer:
    (port,) = free_ports(1)
    with _until_it_listens("nats", [_nats() or "", "-a", "127.0.0.1", "-p", str(port)], port) as pid:
        yield port, pid, "nats"


@contextmanager
def _crossbar_node() -> Peer:
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_crossbar_config(port)))
        command = [_crossbar() or "", "start", "--cbdir", folder, "--loglevel", "warn"]
        with _until_it_listens("crossbar", command, port) as pid:
            yield port, pid, "wamp"


def _crossbar_config(port: int) -> dict[str, Any]:
    """A router that lets everybody do everything; one transport, WebSocket."""
    may = dict.fromkeys(("call", "register", "publish", "subscribe"), True)
    permissions = [{"uri": "", "match": "prefix", "allow": may, "cache": True}]
    realm = {"name": "realm1", "roles": [{"name": "anonymous", "permissions": permissions}]}
    transport = {
        "type": "websocket",
        "endpoint": {"type": "tcp", "interface": "127.0.0.1", "port": port, "backlog": 4096},
        "serializers": ["json"],
        "options": {"allowed_origins": ["*"], "enable_webstatus": False},
    }
    return {"version": 2, "workers": [{"type": "router", "realms": [realm], "transports": [transport]}]}


@contextmanager
def _until_it_listens(name: str, command: list[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(
        pinned(command, processors()[0]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        ends_at = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 0.5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > ends_at:
                    raise SystemExit(f"{name} did not start: {' '.join(command)}") from None
                time.sleep(0.1)
        time.sleep(SETTLE_S.get(name, 0.2))
        yield process.pid
    finally:
        end(process)


_PEERS: dict[str, Any] = {"floor": _floor, "relay": _relay, "nats": _nats_server, "crossbar": _crossbar_node}
