"""Tells systemd how the daemon is: sd_notify(3) by hand, a datagram of NAME=VALUE lines; nothing without systemd."""

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends states to the socket in NOTIFY_SOCKET; without that variable every method does nothing.

    No method blocks or raises: a service manager that does not listen must not stop the broker. Each returns
    whether the message was handed over.
    """

    __slots__ = ("_address", "watchdog_s")

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environment) if self._address is not None else None
        """Seconds within which systemd wants `watchdog()` called, None if it does not."""

    def ready(self, status: str = "") -> bool:
        """The broker serves, after its start or after a reload."""
        return self._send("READY=1", *_status(status))

    def reloading(self) -> bool:
        """A reload has begun; `ready` ends it. systemd compares the time with its own to tell reloads apart."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> bool:
        """The drain has begun."""
        return self._send("STOPPING=1", *_status(status))

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(*_status(text))

    def watchdog(self) -> bool:
        """The broker is alive; due at least every `watchdog_s`, best at half of it."""
        return self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Stopping or starting takes up to `seconds` longer; keeps systemd from killing a drain."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, *lines: str) -> bool:
        if self._address is None or not lines:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError:
            return False
        return True


def _address(name: str) -> str | None:
    """The socket's address: a path, or with a leading @ an abstract one; other kinds are not for us."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _status(text: str) -> tuple[str, ...]:
    # A line break would let the text say more than STATUS, so it becomes a space.
    return (f"STATUS={' '.join(text.split())}",) if text else ()


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """The interval in WATCHDOG_USEC, unless WATCHDOG_PID says that it is meant for another process."""
    interval = environment.get("WATCHDOG_USEC", "")
    pid = environment.get("WATCHDOG_PID", "")
    if not (interval.isascii() and interval.isdigit() and int(interval) > 0):
        return None
    return int(interval) / 1_000_000 if pid in ("", str(os.getpid())) else None
