"""Where a kernel comes from: one that is started here, by jupyter_client, or one that runs and is attached to."""

from __future__ import annotations

import asyncio
import difflib
import os
from pathlib import Path
from typing import Any, Protocol

from broker.auth.connection_files import read_connection_file
from broker.wire.connection_file import PORTS, ConnectionFileError, ConnectionInfo
from broker.worker.kernel.ports import free_ports

INSTALL = "pip install 'request-broker[jupyter]' installs jupyter_client and ipykernel"
ENDS_S = 5.0
"""how long a kernel may take to end by itself before it is killed"""


class KernelError(Exception):
    """A kernel that cannot be had or does not do what it was asked; the text says what to do."""


class Process(Protocol):
    """A kernel's life, as far as this machine has a hand in it."""

    name: str
    spec: dict[str, Any] | None
    can_restart: bool

    async def start(self) -> ConnectionInfo:
        """Where it is, from now on. Raises KernelError."""
        ...

    async def is_alive(self) -> bool | None:
        """Whether it lives; None if that cannot be known."""
        ...

    async def interrupt(self) -> bool:
        """Interrupt what it is doing by a signal; False if it has to be sent a message instead."""
        ...

    async def restart(self, *, now: bool) -> ConnectionInfo:
        """Another in its place. Raises KernelError."""
        ...

    async def end(self, *, now: bool) -> None:
        """End it, if it was started here."""
        ...


class Started:
    """A kernel that jupyter_client starts here, by the name of its kernelspec, and ends with the worker."""

    can_restart = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec: dict[str, Any] | None = None
        self._manager: Any = None

    async def start(self) -> ConnectionInfo:
        """Where it is, from now on. Raises KernelError: no such kernelspec, it does not start."""
        self.spec = find_spec(self.name)
        try:
            self._manager = _jupyter_client().AsyncKernelManager(kernel_name=self.name, **kernel_ports())
            await self._manager.start_kernel(env=_environment())
        except Exception as error:  # whatever a kernelspec's command or a provisioner raises
            raise KernelError(f"the kernel {self.name} does not start: {error}") from None
        return self._info()

    async def is_alive(self) -> bool | None:
        """Whether its process runs."""
        return bool(await self._manager.is_alive())

    async def interrupt(self) -> bool:
        """Interrupt it by a signal, or leave it to a message if its kernelspec says so."""
        assert self.spec is not None
        if self.spec.get("interrupt_mode") == "message":
            return False
        try:
            await self._manager.interrupt_kernel()
        except RuntimeError as error:  # it has no process now
            raise KernelError(f"the kernel {self.name} cannot be interrupted: {error}") from None
        return True

    async def restart(self, *, now: bool) -> ConnectionInfo:
        """Another process, with the same ports and the same key. Raises KernelError."""
        try:
            await self._manager.restart_kernel(now=now)
        except Exception as error:
            raise KernelError(f"the kernel {self.name} does not start again: {error}") from None
        return self._info()

    async def end(self, *, now: bool) -> None:
        """Ask it to end, kill it if it does not, and remove its connection file."""
        manager, self._manager = self._manager, None
        if manager is not None and manager.has_kernel:
            manager.shutdown_wait_time = ENDS_S
            await manager.shutdown_kernel(now=now)
        elif manager is not None:
            manager.cleanup_connection_file()

    def _info(self) -> ConnectionInfo:
        return read_connection_file(Path(self._manager.connection_file))


class Attached:
    """A kernel that somebody else has started, found by its connection file. It is not ended with the worker."""

    can_restart = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = ""
        self.spec: dict[str, Any] | None = None

    async def start(self) -> ConnectionInfo:
        """What the file says. Raises KernelError."""
        try:
            info = read_connection_file(self._path)
        except (OSError, ConnectionFileError) as error:
            raise KernelError(f"{error}; `jupyter --runtime-dir` says where kernels' files are") from None
        self.name = info.kernel_name
        return info

    async def is_alive(self) -> bool | None:
        """Nobody here knows; the connection tells."""
        return None

    async def interrupt(self) -> bool:
        """No signal reaches it: it is sent a message."""
        return False

    async def restart(self, *, now: bool) -> ConnectionInfo:
        """Who has started it can start it again. Raises KernelError."""
        raise KernelError("this kernel was not started here, so it is not restarted from here")

    async def end(self, *, now: bool) -> None:
        """It goes on."""


def kernel_ports() -> dict[str, Any]:
    """What a KernelManager is told, so that it takes these ports and not ones others may be given. Raises OSError."""
    return {"cache_ports": False} | dict(zip(PORTS, free_ports(len(PORTS)), strict=True))


def find_specs() -> dict[str, dict[str, Any]]:
    """The kernelspecs of this machine by name: `{spec, resource_dir}`. Raises KernelError without jupyter_client."""
    found: dict[str, dict[str, Any]] = _jupyter_client().kernelspec.KernelSpecManager().get_all_specs()
    return found


def find_spec(name: str) -> dict[str, Any]:
    """One of them. Raises KernelError, which says what there is."""
    specs = find_specs()
    if name not in specs:
        near = difflib.get_close_matches(name, specs, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        listed = f"there are {', '.join(sorted(specs))}" if specs else f"there is none; {INSTALL}"
        raise KernelError(f"there is no kernel named {name!r}: {hint}{listed} (`jupyter kernelspec list`)")
    spec: dict[str, Any] = specs[name]["spec"]
    return spec


def _environment() -> dict[str, str]:
    """This process's, without what is the worker's own: its token above all, which is in no caller's hands so."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BROKER_") or name == "BROKER_URL"}


def _jupyter_client() -> Any:
    try:
        import jupyter_client
    except ImportError:
        raise KernelError(f"kernels are started by jupyter_client, which is not installed; {INSTALL}") from None
    return jupyter_client


async def find_specs_aside() -> dict[str, dict[str, Any]]:
    """`find_specs` in a thread: it reads a file per kernel."""
    return await asyncio.to_thread(find_specs)
