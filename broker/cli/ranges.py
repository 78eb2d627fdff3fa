"""A file that comes range by range: what to ask for next, until it is whole."""

from __future__ import annotations

from typing import Any

from broker.peer.errors import BadReply


class Ranges:
    """What to ask for, range after range. No I/O: `params()` to ask with, `take(reply)`.

    Each reply has to continue the last one; that the file stays the same is the worker's to check, by `version`.
    """

    def __init__(self, params: dict[str, Any], name: str = "") -> None:
        self._params = dict(params)
        self._name = name or str(params.get("path", ""))
        self._begins_at = self.position = int(params.get("offset") or 0)
        self._ends_at: int | None = None
        self.is_done = False
        self.total = 0
        """bytes there will be; known after the first reply"""

    @property
    def received(self) -> int:
        """Bytes so far."""
        return self.position - self._begins_at

    def params(self) -> dict[str, Any]:
        """The parameters of the next request."""
        if self._ends_at is None:
            return self._params
        params = self._params | {"offset": self.position}
        if self._params.get("length") is not None:
            params["length"] = self._ends_at - self.position
        return params

    def take(self, reply: Any) -> bytes:
        """The bytes of a reply. Raises BadReply if they do not continue what came, or the file ended early."""
        data = reply.get("data") if isinstance(reply, dict) else None
        size = reply.get("size") if isinstance(reply, dict) else None
        if not isinstance(data, bytes) or not isinstance(size, int):
            raise BadReply(f"{self._name}: the worker did not send a range of a file, with size and data")
        if self._ends_at is None:
            length = self._params.get("length")
            self._ends_at = max(self._begins_at, size if length is None else min(size, self._begins_at + length))
            self.total = self._ends_at - self._begins_at
            if isinstance(reply.get("version"), str):
                self._params["version"] = reply["version"]
        offset = reply.get("offset", self.position)
        if offset != self.position or len(data) > self._ends_at - self.position:
            raise BadReply(f"{self._name}: {len(data)} bytes from {offset} do not belong at {self.position}")
        self.position += len(data)
        self.is_done = self.position == self._ends_at
        if not self.is_done and not data:
            raise BadReply(f"{self._name} ended after {self.position} of {self._ends_at} bytes; it has changed")
        return data


def goes_on(reply: Any) -> bool:
    """Whether a reply is the first range of a file that has more."""
    return isinstance(reply, dict) and reply.get("more") is True and isinstance(reply.get("data"), bytes)


def is_empty(reply: Any) -> bool:
    """Whether a reply tells of a file that it is empty; then nothing comes of it."""
    return isinstance(reply, dict) and reply.get("length") == 0 and "data" not in reply
