"""Tunnels over SSH: pyzmq's own, with a program in the place of `ssh` that forwards as it is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.links.tunnels import tunnel
from broker.wire.connection_file import PORTS, ConnectionInfo

# What `ssh -f -L 127.0.0.1:local:host:remote server sleep 60` does, for one connection. It asks for no password.
SSH = """#!{python}
import os, socket, sys, threading
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if "wants-password" in sys.argv:
    print("Password: ", end="", flush=True)
    sys.stdin.readline()
if "-O" in sys.argv:
    sys.exit(1)  # there is no master connection
if "-L" not in sys.argv:
    sys.exit(0)
_, local, host, remote = sys.argv[sys.argv.index("-L") + 1].split(":")
server = socket.create_server(("127.0.0.1", int(local)))
server.settimeout(20)
ready, say = os.pipe()
if os.fork():
    os.read(ready, 1)  # until the other has left the terminal, whose end would end it
    os._exit(0)
os.setsid()
for descriptor in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
os.write(say, b"1")
near, _ = server.accept()
far = socket.create_connection((host, int(remote)))
def pump(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    os._exit(0)
threading.Thread(target=pump, args=(far, near), daemon=True).start()
pump(near, far)
"""


def info(**ports: Any) -> ConnectionInfo:
    return ConnectionInfo(**{**{name: 1 + at for at, name in enumerate(PORTS)}, "key": "k", **ports})


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    log = tmp_path / "log"
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    yield log


def test_messages_go_through_it(log: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        for socket in (router, dealer):
            socket.linger = 0
            socket.rcvtimeo = 20_000
        port = router.bind_to_random_port("tcp://127.0.0.1")
        near = tunnel(info(shell_port=port), "me@gate:2222", "/keys/my key")
        assert near.ip == "127.0.0.1"
        assert near.key == "k"
        assert {getattr(near, name) for name in PORTS}.isdisjoint({port, *range(1, 6)})
        dealer.connect(near.url("shell"))
        dealer.send(b"hello")
        assert router.recv_multipart()[1] == b"hello"
        lines = log.read_text().splitlines()
        assert any(f"{near.shell_port}:127.0.0.1:{port} me@gate sleep" in line for line in lines)
        assert all("/keys/my key" in line for line in lines)
    # The others have nobody who connects to them; their programs end at once when somebody does.
    import socket as plain

    for name in PORTS[1:]:
        plain.create_connection(("127.0.0.1", getattr(near, name)), 5).close()


@pytest.mark.parametrize("server", ["", "-oProxyCommand=x", "a b", "gate;x", "gate:", "a@b@c", "gate\n"])
def test_a_server_that_is_no_name(server: str) -> None:
    with pytest.raises(ValueError, match="host"):
        tunnel(info(), server)


def test_ipc_does_not_go_through_it() -> None:
    with pytest.raises(ValueError, match="only tcp"):
        tunnel(ConnectionInfo(transport="ipc", ip="/run/x", **{name: at + 1 for at, name in enumerate(PORTS)}), "gate")


def test_a_password_is_not_asked_for(log: Path) -> None:
    with pytest.raises(ConnectionError, match="wants a password"):
        tunnel(info(), "wants-password")
