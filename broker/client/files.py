"""Files behind an endpoint that `broker work files` serves: whole, however large, by ranges behind the same calls.

    async with AsyncClient() as client:
        files = AsyncRemoteFiles(client, "data")
        image = await files.read("run-1/image.dcm")
        await files.download("run-1/all.nii.gz", "all.nii.gz")

`RemoteFiles` is the same for `Client`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from broker.peer.errors import BadReply

if TYPE_CHECKING:
    from broker.client.async_client import AsyncClient
    from broker.client.client import Client

RANGE_BYTES = 8 << 20
"""sent at a time; of what is read the worker chooses"""

Progress = Callable[[int, int], object]
"""told after every range: bytes so far, and how many there will be"""


class Ranges:
    """What to ask for, range after range, until a file is whole. No I/O: `params()` to ask with, `take(reply)`.

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


class _Pieces:
    """What to send, piece after piece, of a local file. No I/O but reading it."""

    def __init__(self, file: IO[bytes], path: str, overwrite: bool) -> None:
        self._file = file
        self._path = path
        self._overwrite = overwrite
        self._upload = secrets.token_hex(8)
        self._state = os.fstat(file.fileno())
        self.total = self._state.st_size
        self.sent = 0
        self.is_done = False

    def params(self) -> dict[str, Any]:
        """The next request. Raises ValueError if the file has changed since the first one."""
        data = self._file.read(RANGE_BYTES)
        state = os.fstat(self._file.fileno())
        last = self.sent + len(data) >= self.total
        whole = self.sent + len(data) == self.total if last else bool(data)
        if not whole or (state.st_size, state.st_mtime_ns) != (self._state.st_size, self._state.st_mtime_ns):
            raise ValueError(f"{self._file.name} changed while it was sent")
        params = {"path": self._path, "data": data, "overwrite": self._overwrite}
        if self.sent or not last:
            params |= {"upload": self._upload, "offset": self.sent, "last": last}
        self.sent += len(data)
        self.is_done = last
        return params

    def check(self, told: Any) -> dict[str, Any]:
        """The reply to the last piece. Raises BadReply if the worker has another length."""
        if not isinstance(told, dict) or told.get("size") != self.total:
            raise BadReply(f"{self._path}: {self.total} bytes were sent, and the worker says {told!r:.200}")
        return told


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` at the end, and leaves nothing if there is an error."""
    # A device or a pipe is written to as it is.
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    target = path.resolve()  # a link stays one
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    try:
        with temporary.open("xb") as file:
            if mode is not None:
                temporary.chmod(mode)
            yield file
        temporary.replace(target)
    except FileNotFoundError as error:
        if error.filename == str(temporary):
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


class AsyncRemoteFiles:
    """The files behind one endpoint, through an `AsyncClient`.

    `timeout` is the deadline of each request in seconds (the client's if None); a large file takes several. What the
    worker refuses is a `RemoteError` of type `FileRefused`, or `FileChanged` for a file that changes between two
    ranges; other errors are those of `call`.
    """

    def __init__(self, client: AsyncClient, endpoint: str, *, timeout: float | None = None) -> None:
        self.endpoint = endpoint
        self._client = client
        self._options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}

    async def _ask(self, method: str, params: dict[str, Any], **options: Any) -> Any:
        given = {name: value for name, value in params.items() if value is not None}
        return await self._client.call(f"{self.endpoint}/{method}", given, **(self._options | options))

    async def list(self, path: str = ".", pattern: str = "*", *, recursive: bool = False) -> list[dict[str, Any]]:
        """All entries at `path` whose names match `pattern`, by name, in as many requests as it takes."""
        entries: list[dict[str, Any]] = []
        params: dict[str, Any] = {"path": path, "pattern": pattern, "recursive": recursive, "limit": 10_000}
        while True:
            told = await self._ask("list", params, idempotent=True)
            entries += told["entries"]
            if not told["more"]:
                return entries
            params["after"] = entries[-1]["path"]

    async def stat(self, path: str) -> dict[str, Any]:
        """`path`, `type` (file, folder, other), `size` in bytes, `modified` in Unix seconds, `version`."""
        told: dict[str, Any] = await self._ask("stat", {"path": path}, idempotent=True)
        return told

    async def newest(self, pattern: str = "*", path: str = ".", *, recursive: bool = False) -> dict[str, Any] | None:
        """The file that matches and was changed last, as `stat` tells it; None if there is none."""
        params = {"pattern": pattern, "path": path, "recursive": recursive}
        told: dict[str, Any] | None = await self._ask("newest", params, idempotent=True)
        return told

    async def watch(
        self, pattern: str = "*", path: str = ".", *, recursive: bool = False, existing: bool = False,
        after: float | str | None = None, minimum_bytes: int | None = None, stable_s: float | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the worker is told
    ) -> dict[str, Any] | None:  # fmt: skip
        """Wait for a file that matches and is complete, for `timeout` seconds (then None), or until the deadline."""
        params = {
            "pattern": pattern, "path": path, "recursive": recursive, "existing": existing, "after": after,
            "minimum_bytes": minimum_bytes, "stable_s": stable_s, "timeout": timeout,
        }  # fmt: skip
        options = {} if timeout is None or self._options else {"timeout": timeout + 10}
        told: dict[str, Any] | None = await self._ask("watch", params, idempotent=True, **options)
        return told

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """The contents, all of them or `length` bytes from `offset`; less only where the file ends."""
        ranges = Ranges({"path": path, "offset": offset, "length": length}, f"{self.endpoint}/{path}")
        pieces = []
        while not ranges.is_done:
            pieces.append(ranges.take(await self._ask("read", ranges.params(), idempotent=True)))
        return b"".join(pieces)

    async def download(self, path: str, to: str | Path, *, progress: Progress | None = None) -> int:
        """Save a file as `to`, which is replaced at once when all has come; returns its size in bytes.

        Raises OSError if it cannot be written.
        """
        ranges = Ranges({"path": path}, f"{self.endpoint}/{path}")
        with replacing(Path(to)) as file:
            while not ranges.is_done:
                data = ranges.take(await self._ask("read", ranges.params(), idempotent=True))
                await asyncio.to_thread(file.write, data)
                if progress is not None:
                    progress(ranges.received, ranges.total)
        return ranges.received

    async def write(self, path: str, data: bytes, *, overwrite: bool = False) -> dict[str, Any]:
        """Write a file of at most a message."""
        told: dict[str, Any] = await self._ask("write", {"path": path, "data": data, "overwrite": overwrite})
        return told

    async def upload(
        self, file: str | Path, path: str, *, overwrite: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Write a local file of any size to `path`, where it appears when all has come.

        Its pieces must reach the same folder: with several workers they serve one they share. Raises OSError if it
        cannot be read, ValueError if it changes meanwhile.
        """
        told: Any = None
        with Path(file).open("rb") as source:  # noqa: ASYNC230 - opening is quick, reading goes to a thread
            pieces = _Pieces(source, path, overwrite)
            while not pieces.is_done:
                told = await self._ask("write", await asyncio.to_thread(pieces.params))
                if progress is not None:
                    progress(pieces.sent, pieces.total)
            return pieces.check(told)

    async def delete(self, path: str) -> dict[str, Any]:
        """Remove one file."""
        told: dict[str, Any] = await self._ask("delete", {"path": path})
        return told


class RemoteFiles:
    """The files behind one endpoint, through a `Client`; see `AsyncRemoteFiles`."""

    def __init__(self, client: Client, endpoint: str, *, timeout: float | None = None) -> None:
        self.endpoint = endpoint
        self._client = client
        self._inner = AsyncRemoteFiles(client._inner, endpoint, timeout=timeout)

    def list(self, path: str = ".", pattern: str = "*", *, recursive: bool = False) -> list[dict[str, Any]]:
        """All entries at `path`. See `AsyncRemoteFiles.list`."""
        return self._client._run(self._inner.list(path, pattern, recursive=recursive))

    def stat(self, path: str) -> dict[str, Any]:
        """What there is at `path`. See `AsyncRemoteFiles.stat`."""
        return self._client._run(self._inner.stat(path))

    def newest(self, pattern: str = "*", path: str = ".", *, recursive: bool = False) -> dict[str, Any] | None:
        """The file changed last. See `AsyncRemoteFiles.newest`."""
        return self._client._run(self._inner.newest(pattern, path, recursive=recursive))

    def watch(self, pattern: str = "*", path: str = ".", **options: Any) -> dict[str, Any] | None:
        """Wait for a file. Options as of `AsyncRemoteFiles.watch`."""
        return self._client._run(self._inner.watch(pattern, path, **options))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """The contents. See `AsyncRemoteFiles.read`."""
        return self._client._run(self._inner.read(path, offset, length))

    def download(self, path: str, to: str | Path, *, progress: Progress | None = None) -> int:
        """Save a file. See `AsyncRemoteFiles.download`; `progress` is called in the client's thread."""
        return self._client._run(self._inner.download(path, to, progress=progress))

    def write(self, path: str, data: bytes, *, overwrite: bool = False) -> dict[str, Any]:
        """Write a file. See `AsyncRemoteFiles.write`."""
        return self._client._run(self._inner.write(path, data, overwrite=overwrite))

    def upload(
        self, file: str | Path, path: str, *, overwrite: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Write a local file of any size. See `AsyncRemoteFiles.upload`."""
        return self._client._run(self._inner.upload(file, path, overwrite=overwrite, progress=progress))

    def delete(self, path: str) -> dict[str, Any]:
        """Remove one file."""
        return self._client._run(self._inner.delete(path))
