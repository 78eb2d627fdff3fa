"""The five sockets of a kernel behind an SSH server, each through a tunnel of its own."""

from __future__ import annotations

import re
import shlex
from typing import Any

import msgspec

from broker.wire.connection_file import PORTS, ConnectionInfo

_SERVER = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]*(?::\d{1,5})?")
LOOPBACK = "127.0.0.1"


def tunnel(info: ConnectionInfo, server: str, key_file: str | None = None) -> ConnectionInfo:
    """Open tunnels to a kernel's five ports as seen from `server` (`[user@]host[:port]`); what then leads there.

    They are pyzmq's own (`zmq.ssh`): the machine's `ssh`, driven by pexpect, without a password: set up a key or an
    agent first. Each ends 60 s after it was opened, or when its last connection ends. Blocks until they stand. Raises
    ValueError for ipc and for a server that is no name, ConnectionError, ImportError that says what to install.
    """
    if info.transport != "tcp":
        raise ValueError("only tcp goes through a tunnel; this connection file says ipc")
    if not _SERVER.fullmatch(server):  # it becomes part of a command line
        raise ValueError(f"{server!r} is no [user@]host[:port]")
    ssh = _library()
    quoted = shlex.quote(key_file) if key_file else None
    local = ssh.select_random_ports(len(PORTS))
    try:
        if not ssh.try_passwordless_ssh(server, quoted):
            raise ConnectionError(f"ssh to {server} wants a password; set up a key or an agent, or name a key file")
        for name, port in zip(PORTS, local, strict=True):
            ssh.openssh_tunnel(port, getattr(info, name), server, info.ip, quoted)
    except (ssh.MaxRetryExceeded, ssh.SSHException, RuntimeError, ssh.pexpect.ExceptionPexpect) as error:
        raise ConnectionError(f"no tunnel through {server}: {error}") from None
    return msgspec.structs.replace(info, ip=LOOPBACK, **dict(zip(PORTS, local, strict=True)))


def _library() -> Any:
    import zmq.ssh.tunnel

    ssh: Any = zmq.ssh.tunnel
    if ssh.pexpect is None:
        raise ImportError("tunnels over SSH need pexpect: pip install pexpect")
    return ssh
