"""Answers requests by running a command, one process each: JSON on its standard input, JSON on its standard output."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

import msgspec

from broker.peer.session import MESSAGE_MAX_BYTES
from broker.peer.values import encode
from broker.wire.attachments import expand
from broker.worker.faults import Fault
from broker.worker.requests import current

STDERR_KEPT = 4096
"""bytes of what it last wrote to standard error that are told when it fails"""

PIPE_CLOSES_S = 1.0
"""how long after its end a command's output is waited for"""


class Command:
    """A command as the answer to every method.

    The process reads the parameters as JSON (attachments as `{"$base64": "…"}`), finds BROKER_ENDPOINT, BROKER_METHOD
    and BROKER_TIMEOUT (seconds left) in its environment, and prints the result as JSON; no output is null. Exit codes
    beside 0 are errors. Together with its children it is killed when the request is cancelled or its deadline passes.
    """

    __slots__ = ("_command",)

    def __init__(self, command: Sequence[str]) -> None:
        if not command:
            raise ValueError("a command is missing")
        self._command = tuple(command)

    async def __call__(self, method: str, params: Any) -> Any:
        """Run it once. Raises Fault when it cannot be run, fails, or prints what is no JSON."""
        raw, attachments = encode(params)
        process = await self._start(method)
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            feeding = asyncio.ensure_future(_feed(process.stdin, expand(raw, attachments) if attachments else raw))
            errors = asyncio.ensure_future(_tail(process.stderr))
            try:
                output = await _read(process.stdout)
                if output is None:
                    raise Fault(f"{self._command[0]} printed more than {MESSAGE_MAX_BYTES} bytes")
                await feeding
                said = await errors
                status = await process.wait()
            finally:
                for task in (feeding, errors):
                    task.cancel()
                await asyncio.wait((feeding, errors))
        finally:
            await _kill(process)
        return self._result(status, output, said)

    async def _start(self, method: str) -> asyncio.subprocess.Process:
        request = current()
        environment = {**os.environ, "BROKER_ENDPOINT": request.endpoint, "BROKER_METHOD": method}
        for secret in ("BROKER_TOKEN", "BROKER_AUTH__ADMIN_TOKEN"):  # it has no business with credentials
            environment.pop(secret, None)
        if request.left_s is not None:
            environment["BROKER_TIMEOUT"] = f"{request.left_s:.3f}"
        pipe = asyncio.subprocess.PIPE
        try:
            return await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
            )
        except OSError as error:
            raise Fault(f"{self._command[0]} cannot be run: {error.strerror}", retryable=True) from None

    def _result(self, status: int, output: bytes, said: bytes) -> Any:
        last = said.decode("utf-8", "replace").strip()
        if status != 0:
            how = f"was ended by signal {-status}" if status < 0 else f"exited with {status}"
            message = f"{self._command[0]} {how}" + (f": {last.splitlines()[-1][:500]}" if last else "")
            raise Fault(message, data={"type": "ExitStatus", "message": message, "status": status, "stderr": last})
        if not output.strip():
            return None
        try:
            return msgspec.json.decode(output)
        except (msgspec.DecodeError, RecursionError) as error:
            shown = output[:60].decode("utf-8", "replace")
            raise Fault(f"{self._command[0]} printed what is no JSON ({error}): {shown!r}") from None


async def _feed(stdin: asyncio.StreamWriter, data: bytes) -> None:
    try:
        stdin.write(data)
        await stdin.drain()
    except (ConnectionError, RuntimeError):  # the latter is uvloop's for a pipe that was closed before the first byte
        pass  # it does not want to know
    finally:
        stdin.close()


async def _read(stdout: asyncio.StreamReader) -> bytes | None:
    """All it prints; None if that is too much."""
    pieces: list[bytes] = []
    size = 0
    while piece := await stdout.read(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > MESSAGE_MAX_BYTES:
            return None
    return b"".join(pieces)


async def _tail(stderr: asyncio.StreamReader) -> bytes:
    """The end of what it says."""
    kept = b""
    while piece := await stderr.read(1 << 14):
        kept = (kept + piece)[-STDERR_KEPT:]
    return kept


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Leave neither the process nor its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: it was started in a session of its own
    except (ProcessLookupError, PermissionError):
        pass
    # `wait` returns when its pipes are at their end (Python 3.11), and one that is full has to be read for that.
    try:
        async with asyncio.timeout(PIPE_CLOSES_S):
            for pipe in (process.stdout, process.stderr):
                while pipe is not None and await pipe.read(1 << 16):
                    pass
            await process.wait()
    except TimeoutError:
        pass  # held by a child that left the group
