"""Files behind an endpoint that `broker work files` serves, of any size: they come and go in parts, never as a whole.

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
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from broker.peer.errors import BadReply

if TYPE_CHECKING:
    from broker.client.async_client import AsyncClient
    from broker.client.client import Client
    from broker.client.stream import Stream

PIECE_BYTES = 252 * 1024
"""sent at a time: whole pages, and with its JSON text one part, which is at most 256 KiB"""

Progress = Callable[[int, int], object]
"""told after every part: bytes so far, and how many there will be"""


class Tally:
    """Counts the bytes of a file on their way, to compare them at the end with what the worker has counted."""

    __slots__ = ("crc32", "name", "size")

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        self.crc32 = 0

    def add(self, data: Any) -> None:
        """One more part. Raises BadReply if it is not of bytes."""
        if not isinstance(data, (bytes, memoryview)):
            raise BadReply(f"{self.name}: the worker did not send bytes, but {data!r:.80}")
        self.size += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def check(self, told: Any) -> dict[str, Any]:
        """What the worker says of them. Raises BadReply if it has others."""
        size = told.get("length") if isinstance(told, dict) else None
        if size != self.size:
            raise BadReply(f"{self.name}: {self.size} bytes, and the worker says {told!r:.200}")
        if told.get("crc32", self.crc32) != self.crc32:
            raise BadReply(f"{self.name}: its {self.size} bytes are damaged: their CRC-32 is not the worker's")
        assert isinstance(told, dict)
        return told


class _LocalFile:
    """A local file, read part by part."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._state = os.fstat(file.fileno())
        self.size = self._state.st_size
        self._read = 0

    def next(self) -> bytes:
        """The next part, empty at the end. Raises ValueError if the file has changed since it was opened."""
        data = self._file.read(min(PIECE_BYTES, self.size - self._read))
        state = os.fstat(self._file.fileno())
        self._read += len(data)
        ended_early = not data and self._read < self.size
        if ended_early or (state.st_size, state.st_mtime_ns) != (self._state.st_size, self._state.st_mtime_ns):
            raise ValueError(f"{self._file.name} changed while it was sent")
        return data


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

    `timeout` is the deadline of each request in seconds (the client's if None). What carries contents has no deadline
    as long as something flows: for it `timeout` is how long nothing may (the broker's bound if None). What the worker
    refuses is a `RemoteError` of type `FileRefused`, or `FileChanged` for a file that changes while it is read; other
    errors are those of `call`. At most a few parts of 256 KiB are held in memory, however large a file is.
    """

    def __init__(self, client: AsyncClient, endpoint: str, *, timeout: float | None = None) -> None:
        self.endpoint = endpoint
        self._client = client
        self._options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        self._flow: dict[str, Any] = {"timeout": None, "idle": timeout}

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
        tally = Tally(f"{self.endpoint}/{path}")
        pieces = []
        async with await self._reading({"path": path, "offset": offset, "length": length}) as stream:
            async for piece in stream:
                tally.add(piece)
                pieces.append(piece)
        tally.check(stream.result)
        return b"".join(pieces)

    async def download(self, path: str, to: str | Path, *, progress: Progress | None = None) -> int:
        """Save a file as `to`, which is replaced at once when all has come; returns its size in bytes.

        Raises OSError if it cannot be written.
        """
        tally = Tally(f"{self.endpoint}/{path}")
        state = await self.stat(path)
        async with await self._reading({"path": path, "version": state.get("version")}) as stream:
            with replacing(Path(to)) as file:
                async for piece in stream:
                    tally.add(piece)
                    await asyncio.to_thread(file.write, piece)
                    if progress is not None:
                        progress(tally.size, state["size"])
                tally.check(stream.result)
        return tally.size

    async def _reading(self, params: dict[str, Any]) -> Stream:
        given = {name: value for name, value in params.items() if value is not None} | {"stream": True}
        return await self._client.stream(f"{self.endpoint}/read", given, idempotent=True, **self._flow)

    async def write(self, path: str, data: bytes, *, overwrite: bool = False) -> dict[str, Any]:
        """Write a file. It appears at `path` when all has come."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        pieces = [view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES)]
        tally = Tally(f"{self.endpoint}/{path}")
        for piece in pieces:
            tally.add(piece)
        return await self._write(path, pieces, overwrite, tally, len(view))

    async def upload(
        self, file: str | Path, path: str, *, overwrite: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Write a local file to `path`, where it appears when all has come.

        Raises OSError if it cannot be read, ValueError if it changes meanwhile.
        """
        tally = Tally(f"{self.endpoint}/{path}")
        with Path(file).open("rb") as source:  # noqa: ASYNC230 - opening is quick, reading goes to a thread
            local = _LocalFile(source)

            async def pieces() -> AsyncIterator[bytes]:
                while piece := await asyncio.to_thread(local.next):
                    yield piece
                    tally.add(piece)  # when the next is asked for, this one is on its way
                    if progress is not None:
                        progress(tally.size, local.size)

            return await self._write(path, pieces(), overwrite, tally, local.size)

    async def _write(
        self, path: str, pieces: Sequence[memoryview] | AsyncIterator[bytes], overwrite: bool, tally: Tally, size: int
    ) -> dict[str, Any]:
        params = {"path": path, "overwrite": overwrite, "size": size}
        return tally.check(await self._client.call(f"{self.endpoint}/write", params, parts=pieces, **self._flow))

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
