"""`broker demo`: a broker, a worker and callers as real processes, and what happens when one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import os
import shutil
import signal
import site
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from broker.auth.access_file import Access, live
from broker.cli.connection import clean_line
from broker.cli.exits import Exit, Failure
from broker.client.async_client import AsyncClient
from broker.client.files import AsyncRemoteFiles
from broker.peer.errors import BrokerError, WorkerLost

READY_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0
SMALL_BYTES = 8 << 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option("--keep", is_flag=True, help="Stay up afterwards, and print what to paste, until Ctrl-C.")
def demo(folder: Path | None, keep: bool) -> None:
    """Show the whole story with real processes, on small files that come along, or on those of DIR.

    DIR is only read. Everything runs on a free port with a token of its own, beside any other broker, and leaves
    neither process nor file behind.
    """
    if folder is not None and not folder.is_dir():
        raise Failure(Exit.USAGE, f"{folder}: there is no such folder")
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        with tempfile.TemporaryDirectory(prefix="broker-demo-") as place:
            asyncio.run(_main(Path(place).resolve(), folder.resolve() if folder else None, keep))
    except BrokerError as error:
        raise Failure(Exit.DEFECT, f"the demo failed: {error}") from error
    except asyncio.CancelledError:  # a signal
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _main(place: Path, folder: Path | None, keep: bool) -> None:
    """Run the story; signals end it, and whatever it started with it."""
    stage = _Stage(place)
    telling = asyncio.ensure_future(_tell(stage, folder, keep))
    loop = asyncio.get_running_loop()

    def end() -> None:
        if stage.is_kept:
            stage.leave.set()
        elif not telling.cancel() or telling.cancelling() > 1:
            stage.kill()  # the second time

    for number in _SIGNALS:
        loop.add_signal_handler(number, end)
    try:
        await telling
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # until the folder is removed


class _Stage:
    """Where it plays: a folder that is removed at the end, and the processes that run."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.is_kept = False
        self.leave = asyncio.Event()
        self._running: dict[asyncio.subprocess.Process, Path] = {}
        self._started = 0
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        for name, sub in (("XDG_RUNTIME_DIR", "run"), ("XDG_STATE_HOME", "state"), ("XDG_CONFIG_HOME", "config")):
            (place / sub).mkdir(mode=0o700)
            self._environment[name] = str(place / sub)
        (place / "log").mkdir()
        package = Path(__file__).parents[2]
        if str(package) not in site.getsitepackages():  # run from its sources
            self._environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(package), self._environment.get("PYTHONPATH", "")))
            )
        (place / "empty").mkdir()

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start a `broker` command."""
        log = self.place / "log" / f"{self._started}.txt"
        self._started += 1
        # An empty folder: Python looks for modules in the one where it is started. A session of its own: Ctrl-C is
        # for the demo, which ends the others in order.
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "broker", *arguments, stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL, stderr=stderr, env=self._environment, start_new_session=True,
                cwd=self.place / "empty",
            )  # fmt: skip
        self._running[process] = log
        return process

    async def run(self, *arguments: str) -> None:
        """Run a `broker` command to its end. Raises Failure if it fails."""
        process = await self.start(*arguments)
        if await asyncio.wait_for(process.wait(), READY_TIMEOUT_S) != 0:
            raise self.failure(process, arguments[0])
        self.forget(process)

    async def until(self, process: asyncio.subprocess.Process, what: str, look: Callable[[], Awaitable[object]]) -> Any:
        """Wait until `look` gives something, as long as the process lives."""
        ends_at = time.monotonic() + READY_TIMEOUT_S
        while not (found := await look()):
            if process.returncode is not None or time.monotonic() > ends_at:
                raise self.failure(process, what)
            await asyncio.sleep(0.02)
        return found

    def failure(self, process: asyncio.subprocess.Process, what: str) -> Failure:
        """What to say of a process that did not do what it should; its last words."""
        lines = self._running[process].read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        how = f"ended with {process.returncode}" if process.returncode is not None else "is not ready in time"
        return Failure(Exit.DEFECT, f"the demo failed: {what} {how}: {lines[-1]}")

    def forget(self, process: asyncio.subprocess.Process) -> None:
        """It has ended, as it should."""
        del self._running[process]

    def kill(self) -> None:
        """End everything at once."""
        for process in self._running:
            _signal(process, signal.SIGKILL)

    async def end(self) -> None:
        """End everything in order: workers before the broker, at most a few seconds each."""
        for process in reversed(list(self._running)):
            _signal(process, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
            except TimeoutError:
                _signal(process, signal.SIGKILL)
                await process.wait()
            self.forget(process)

    async def any_ended(self) -> None:
        """Wait until one of the processes ends, which none should. Raises Failure then."""
        waits = {asyncio.ensure_future(process.wait()): process for process in self._running}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            raise self.failure(waits[done.pop()], "a process")
        finally:
            for wait in waits:
                wait.cancel()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            # Its own `send_signal` takes the status of one that has just ended, and asyncio warns that it is gone.
            os.kill(process.pid, number)


async def _tell(stage: _Stage, folder: Path | None, keep: bool) -> None:
    """The story."""
    began = time.monotonic()
    try:
        access = await _start_broker(stage)
        async with AsyncClient(access.url, access.token, timeout=READY_TIMEOUT_S) as client:
            data, incoming = stage.place / "data", "data"
            if folder is None:
                _copy_data(data)
            else:
                data, incoming = folder, "incoming"
                (stage.place / "incoming").mkdir()
            worker = await _start_worker(stage, client, data, "data")
            if folder is not None:
                await _start_worker(stage, client, stage.place / "incoming", "incoming")
            await _fetch(client, data)
            await _broadcast(stage, client)
            await _watch(client, stage.place / incoming, incoming)
            await _lose(stage, client, worker)
            await _show_books(access)
            _say(f"That was all, in {time.monotonic() - began:.1f} s.")
            if keep:
                await _start_worker(stage, client, data, "data", aloud=False)
                _print_hints(access)
                await _stay(stage)
    finally:
        # Not to be interrupted: only a second signal hurries it, by killing.
        await _unhurried(stage.end())


async def _unhurried(ending: Awaitable[None]) -> None:
    task = asyncio.ensure_future(ending)
    interrupted = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            interrupted = True
    if interrupted:
        raise asyncio.CancelledError


async def _start_broker(stage: _Stage) -> Access:
    _act("A broker starts", "broker serve --port 0")
    daemon = await stage.start("serve", "--port", "0")

    async def look() -> Access | None:
        return next(iter(live(stage.place / "run" / "broker").values()), None)

    access: Access = await stage.until(daemon, "the broker", look)
    _say(f"it serves on {access.url} (process {daemon.pid}), with a fresh token for this user only")
    return access


async def _start_worker(
    stage: _Stage, client: AsyncClient, folder: Path, endpoint: str, *, aloud: bool = True
) -> asyncio.subprocess.Process:
    if aloud:
        _act("A worker dials out and serves a folder", f"broker work files {folder} --endpoint {endpoint}")
    worker = await stage.start("work", "files", str(folder), "--endpoint", endpoint)

    async def look() -> bool:
        return any(one["endpoint"] == endpoint and one["workers"] for one in await client.endpoints())

    await stage.until(worker, "the worker", look)
    if aloud:
        methods = ", ".join((await client.describe(endpoint))["workers"][0]["methods"])
        _say(f"it is there (process {worker.pid}), with {methods}")
    return worker


async def _fetch(client: AsyncClient, data: Path) -> None:
    _act("A caller asks what there is, and for a file", "broker call data/list")
    told = await client.call("data/list", {"recursive": True, "limit": 200})
    found = [entry for entry in told["entries"] if entry["type"] == "file"]
    for entry in found[:5]:
        _say(f"{entry['size']:>9} bytes  {entry['path']}")
    if len(found) > 5 or told["more"]:
        _say("          and more")
    small = [entry for entry in found if 0 < entry["size"] <= SMALL_BYTES]
    if not small:
        _say("there is no small file to fetch")
        return
    path = next((entry["path"] for entry in small if entry["path"].endswith((".dcm", ".png"))), small[0]["path"])
    began = time.perf_counter()
    content = await AsyncRemoteFiles(client, "data").read(path)
    took_ms = (time.perf_counter() - began) * 1e3
    digest = hashlib.sha256(content).hexdigest()
    if digest != hashlib.sha256(await asyncio.to_thread((data / path).read_bytes)).hexdigest():
        raise Failure(Exit.DEFECT, f"the demo failed: {path} came with other bytes than it has on disk")
    _say(f"{path}: {len(content)} bytes in {took_ms:.1f} ms, byte for byte the file on disk (SHA-256 {digest[:12]}…)")


async def _broadcast(stage: _Stage, client: AsyncClient) -> None:
    _act("Somebody tells all who listen", """broker broadcast data '{"text": "the magnet is cold"}'""")
    async with await client.subscribe("data") as messages:
        await stage.run("broadcast", "data", '{"text": "the magnet is cold"}')
        message = await messages.get(READY_TIMEOUT_S)
    _say(f"a listener heard, as number {message.seq}: {message.data['text']}")


async def _watch(client: AsyncClient, folder: Path, endpoint: str) -> None:
    _act("A caller waits for a new image while an instrument writes it",
         f"""broker call {endpoint}/watch '{{"pattern": "*.dcm"}}'""")  # fmt: skip
    files = AsyncRemoteFiles(client, endpoint)
    # `after` the newest: nothing is missed, however soon it comes.
    newest = await files.newest("*.dcm")
    watching = asyncio.ensure_future(files.watch("*.dcm", after=newest["modified"] if newest else 0.0))
    try:
        content = await asyncio.to_thread((Path(__file__).parents[1] / "demo" / "volume-002.dcm").read_bytes)
        await asyncio.to_thread(_write_slowly, folder / "volume-003.dcm", content)
        found = await watching
    finally:
        watching.cancel()
    if found is None:
        raise Failure(Exit.DEFECT, "the demo failed: the new file was not noticed")
    fetched = await files.read(found["path"])
    if fetched != content:
        raise Failure(Exit.DEFECT, f"the demo failed: {found['path']} was told before it was complete")
    late_s = max(0.0, time.time() - found["modified"])
    _say(f"{found['path']} was told when it was complete, {late_s:.1f} s after its last byte, and fetched: "
         f"{len(fetched)} bytes")  # fmt: skip


def _write_slowly(path: Path, content: bytes) -> None:
    """As an instrument does: piece by piece."""
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(content), 8192):
            file.write(content[at : at + 8192])
            time.sleep(0.05)


async def _lose(stage: _Stage, client: AsyncClient, worker: asyncio.subprocess.Process) -> None:
    _act("The worker is killed in the middle of a request", f"kill -9 {worker.pid}")
    call = asyncio.ensure_future(client.call("data/watch", {"pattern": "never"}))

    async def look() -> bool:
        return bool((await client.describe("data"))["executing"])

    try:
        await stage.until(worker, "the worker", look)
        worker.kill()
        began = time.perf_counter()
        await call
    except WorkerLost as error:
        _say(f"the caller was told why after {(time.perf_counter() - began) * 1e3:.0f} ms:")
        _say(str(error))
    else:
        raise Failure(Exit.DEFECT, "the demo failed: a killed worker answered")
    finally:
        call.cancel()
    await worker.wait()
    stage.forget(worker)


async def _show_books(access: Access) -> None:
    _act("The books: every accepted request ended exactly once", f"curl -H 'Authorization: …' {access.url}/metrics")
    accepted, ended, pending = await asyncio.to_thread(_read_books, access)
    outcomes = ", ".join(f"{count} {name}" for name, count in ended.items() if count)
    _say(f"accepted {accepted} = ended {sum(ended.values())} ({outcomes}) + pending {pending}")
    if accepted != sum(ended.values()) + pending:
        raise Failure(Exit.DEFECT, "the demo failed: the books do not balance")


def _read_books(access: Access) -> tuple[int, dict[str, int], int]:
    """Accepted, ended by outcome, pending, from /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    parts = urlsplit(access.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=READY_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {access.token}"})
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {sample.name: int(sample.value) for sample in found if not sample.labels}
    ended = {one.labels["outcome"]: int(one.value) for one in found if one.name == "broker_requests_ended_total"}
    return values["broker_requests_accepted_total"], ended, values["broker_requests_pending"]


def _print_hints(access: Access) -> None:
    """What to paste elsewhere."""
    click.echo(f"""
It stays up until Ctrl-C. In a browser: {access.url}/ with the token
{access.token}

In another terminal:

curl -H 'Authorization: Bearer {access.token}' -d '{{"pattern": "*"}}' {access.url}/call/data/list

In Python:

from broker import Client
with Client("{access.url}", "{access.token}") as client:
    for entry in client.call("data/list")["entries"]:
        print(entry["size"], entry["path"])
""")
    sys.stdout.flush()


async def _stay(stage: _Stage) -> None:
    stage.is_kept = True
    leaving = asyncio.ensure_future(stage.leave.wait())
    ending = asyncio.ensure_future(stage.any_ended())
    try:
        await asyncio.wait((leaving, ending), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            ending.result()
    finally:
        stage.is_kept = False
        leaving.cancel()
        ending.cancel()


def _copy_data(to: Path) -> None:
    to.mkdir()
    for file in sorted((Path(__file__).parents[1] / "demo").iterdir()):
        if file.suffix in (".csv", ".png", ".dcm"):
            shutil.copyfile(file, to / file.name)


def _act(what: str, command: str) -> None:
    """One act begins."""
    click.echo(click.style(what, bold=True))
    click.echo(click.style(f"  $ {command}", dim=True))
    sys.stdout.flush()


def _say(text: str) -> None:
    click.echo(f"  {clean_line(text) if not text.startswith(' ') else text}")
    sys.stdout.flush()
