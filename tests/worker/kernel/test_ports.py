"""The ports of a kernel to be started: free, and in nobody's way."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

import pytest

from broker.wire.connection_file import PORTS, ConnectionInfo
from broker.worker.kernel import ports
from broker.worker.kernel.ports import free_ports
from tests.peer.harness import run
from tests.worker.kernel.harness import kernel_running


def test_no_port_is_given_that_an_outgoing_connection_may_take() -> None:
    found = free_ports(200)
    with socket.socket() as given:
        given.bind(("127.0.0.1", 0))
        lowest = ports._handed_out()
        assert given.getsockname()[1] >= lowest
    assert len(set(found)) == 200
    assert all(ports.LOWEST <= port < lowest for port in found)


def test_a_port_somebody_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        taken = free_ports(3)
        for port in taken:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        (free,) = free_ports(1)
        monkeypatch.setattr(random, "sample", lambda *_: [*taken, free])
        assert free_ports(1) == [free]
        with pytest.raises(OSError, match="no 2 free ports"):
            free_ports(2)


def test_where_nearly_all_ports_are_handed_out_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_handed_out", lambda: 1024)
    assert len(free_ports(5)) == 5


def test_a_kernel_started_here_listens_on_such_ports() -> None:
    async def main() -> None:
        async with kernel_running() as (worker, _):
            info: ConnectionInfo = worker.kernel.process._info()  # type: ignore[attr-defined]
            assert all(ports.LOWEST <= port < ports._handed_out() for port in (getattr(info, name) for name in PORTS))
            await worker.kernel.restart()
            assert worker.kernel.process._info() == info  # type: ignore[attr-defined]

    run(main)
