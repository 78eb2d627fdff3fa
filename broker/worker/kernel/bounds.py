"""What a kernel's worker holds and waits for at most."""

from __future__ import annotations

import msgspec


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of one kernel's worker: bytes, requests, seconds. Raises ValueError for what makes no sense.

    What is beyond one of them is told: printed text as `[… characters of text dropped …]` at its place, requests as
    `KernelBusy`, a start as KernelError, a kernel that dies too often as `status: dead`. `state` counts what was
    dropped and refused.
    """

    text_max_bytes: int = 4 << 20
    """text of streams that waits for one reader; beyond it text is dropped"""
    waiting_max_bytes: int = 64 << 20
    """everything that waits for one reader; beyond it the rest is dropped too"""
    held_max_bytes: int = 256 << 20
    """everything that waits for all readers of this kernel together; beyond it likewise"""
    sent_max_bytes: int = (16 << 20) - 65_536
    """one message to the broker: below its `limits.message_max_bytes`, for it breaks the link of who sends more"""
    message_max_bytes: int = 256 << 20
    """a larger message of the kernel's breaks the connection it came over, and it is said that output is missing"""
    asked_max: int = 2000
    """requests that wait at the kernel, those that were cancelled since included; the next is refused"""
    asked_max_bytes: int = 256 << 20
    """what those hold together; one alone is always taken"""
    start_s: float = 60.0
    """how long a kernel that was started may take until it answers"""
    attach_s: float = 10.0
    """how long one that is attached to may take"""
    restarts_max: int = 5
    """deaths in a row after which a kernel is not started again; jupyter_client's restarter has the same bound"""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            least = 0 if name == "restarts_max" else 0.01 if name.endswith("_s") else 1
            if not least <= value <= 1 << 40:
                raise ValueError(f"{name} {value!r} is not between {least} and {1 << 40}")


BOUNDS = Bounds()


class Held:
    """How many bytes wait for all readers of one kernel."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0
