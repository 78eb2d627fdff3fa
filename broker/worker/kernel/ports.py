"""Ports for a process that is yet to start and will listen on them by number.

A port the system has just given away and taken back (bind to 0, close) may be anybody's when the process comes to bind
it, half a second later: each outgoing connection of this machine takes one of the same range. A kernel whose IOPub port
was taken so prints a traceback and stays, silent. So they come from below that range, where nobody is who did not ask.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 10_000
"""below are the well-known services"""
HANDED_OUT = 32_768
"""where the range begins that the system hands out, if it does not say (Linux's default; others begin higher)"""
TRIES = 1_000


def free_ports(count: int, ip: str = "127.0.0.1") -> list[int]:
    """That many different ports nobody listens on at `ip`. Raises OSError if there are not enough."""
    end = _handed_out()
    if end < LOWEST + TRIES:  # the system hands out nearly all there are; no port is better than another
        end = 65_536
    found: list[int] = []
    for port in random.sample(range(LOWEST, end), min(TRIES + count, end - LOWEST)):
        if len(found) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind((ip, port))
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        raise OSError(f"no {count} free ports at {ip} between {LOWEST} and {end}")
    return found


def _handed_out() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return HANDED_OUT
