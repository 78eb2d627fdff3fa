"""Kernels and kernelspecs as Jupyter's REST interface writes them, from what workers say of themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.core.registry import Endpoint
from broker.transports.kernels.door import PREFIX

UNKNOWN = "unknown"


class Info(msgspec.Struct):
    """What the worker of a kernel says of it."""

    kernel: str = ""
    kernelspec: dict[str, Any] | None = None
    kernel_info: dict[str, Any] = {}


def info_of(endpoint: Endpoint) -> Info:
    """What the worker of a kernel says of it; little where it says nothing, or something else."""
    for registration in endpoint.registrations.values():
        try:
            return msgspec.json.decode(registration.info.raw, type=Info)
        except (ValueError, RecursionError):
            continue
    return Info()


def name_of(info: Info) -> str:
    """The name of a kernel's kernelspec."""
    return info.kernel or str(info.kernel_info.get("implementation") or UNKNOWN)


def kernel_model(endpoint: Endpoint, state: dict[str, Any], connections: int) -> dict[str, Any]:
    """A kernel; `state` is what its worker answers."""
    return {
        "id": endpoint.name.removeprefix(PREFIX),
        "name": name_of(info_of(endpoint)),
        "last_activity": state.get("last_activity") or "1970-01-01T00:00:00.000000Z",
        "execution_state": state.get("execution_state") or UNKNOWN,
        "connections": connections,
    }


def spec_model(info: Info) -> dict[str, Any]:
    """The kernelspec of a kernel that runs."""
    language = info.kernel_info.get("language_info")
    spec = {
        "argv": [],
        "display_name": name_of(info),
        "language": language.get("name", "") if isinstance(language, dict) else "",
        "env": {},
        **(info.kernelspec or {}),
    }
    return {"name": name_of(info), "spec": spec, "resources": {}}


def specs_model(offered: dict[str, Any], running: list[Info]) -> dict[str, Any]:
    """All kernelspecs: those that can be started, and those of kernels that run."""
    specs = {name_of(info): spec_model(info) for info in running}
    found = offered.get("kernelspecs")
    if isinstance(found, dict):
        specs |= found
    default = offered.get("default")
    return {"default": default if default in specs else next(iter(specs), ""), "kernelspecs": specs}
