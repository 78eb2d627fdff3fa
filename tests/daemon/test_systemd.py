"""What systemd is told, over real sockets."""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.daemon.systemd import Notifier


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(address)
    listener.settimeout(10)
    return listener


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[socket.socket, Notifier]]:
    address = str(tmp_path / "n")
    with _listen(address) as listener:
        yield listener, Notifier({"NOTIFY_SOCKET": address})


def test_every_state(manager: tuple[socket.socket, Notifier]) -> None:
    listener, notifier = manager
    for sent, expected in (
        (notifier.ready(), b"READY=1"),
        (notifier.ready("serving on 8787"), b"READY=1\nSTATUS=serving on 8787"),
        (notifier.stopping(), b"STOPPING=1"),
        (notifier.stopping("3 in flight"), b"STOPPING=1\nSTATUS=3 in flight"),
        (notifier.status("7 sessions"), b"STATUS=7 sessions"),
        (notifier.watchdog(), b"WATCHDOG=1"),
        (notifier.extend_timeout(2.5), b"EXTEND_TIMEOUT_USEC=2500000"),
    ):
        assert sent is True
        assert listener.recv(4096) == expected


def test_reloading_carries_the_monotonic_time(manager: tuple[socket.socket, Notifier]) -> None:
    listener, notifier = manager
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notifier.reloading()
    first, second = listener.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_cannot_say_more_than_status(manager: tuple[socket.socket, Notifier]) -> None:
    listener, notifier = manager
    notifier.status("a\nMAINPID=1\r\nb \udcff")
    assert listener.recv(4096) == b"STATUS=a MAINPID=1 b ?"
    assert notifier.status("") is False


@pytest.mark.skipif(not os.path.exists("/proc"), reason="abstract sockets exist on Linux only")
def test_abstract_sockets() -> None:
    name = f"broker-test-{uuid.uuid4()}"
    with _listen("\0" + name) as listener:
        assert Notifier({"NOTIFY_SOCKET": "@" + name}).ready()
        assert listener.recv(4096) == b"READY=1"


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_a_socket_nothing_happens(environment: dict[str, str]) -> None:
    notifier = Notifier(environment | {"WATCHDOG_USEC": "1000000"})
    assert notifier.ready() is False
    assert notifier.reloading() is False
    assert notifier.watchdog() is False
    assert notifier.watchdog_s is None


def test_the_process_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "n")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with _listen(address) as listener:
        assert Notifier().ready()
        assert listener.recv(4096) == b"READY=1"


def test_a_manager_that_is_gone_or_does_not_listen_stops_nobody(tmp_path: Path) -> None:
    assert Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready() is False
    assert Notifier({"NOTIFY_SOCKET": "/" + "x" * 500}).ready() is False
    address = str(tmp_path / "n")
    notifier = Notifier({"NOTIFY_SOCKET": address})
    with _listen(address):
        begun = time.monotonic()
        while notifier.status("x" * 1000):  # until the socket's queue is full
            assert time.monotonic() - begun < 20
        assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("interval", "pid", "expected"),
    [
        ("30000000", "", 30.0),
        ("500000", "own", 0.5),
        ("30000000", "1", None),
        ("0", "", None),
        ("-1", "", None),
        ("x", "", None),
        ("²", "", None),
        ("", "", None),
    ],
)
def test_the_watchdog_interval(interval: str, pid: str, expected: float | None) -> None:
    pid = str(os.getpid()) if pid == "own" else pid
    notifier = Notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": interval, "WATCHDOG_PID": pid})
    assert notifier.watchdog_s == expected
