"""The chaos run: a broker's process, workers' processes, callers, a proxy between them, and somebody with a seed.

At the end all books must agree: what every caller noted, what the workers' journals say, what the broker counted; and
the broker must be as empty and as small as it was before the trouble began.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from broker import AsyncClient
from tests.chaos.ledger import UNKNOWN, Ledger, executions
from tests.chaos.peers import Caller, HttpCaller, PlainCaller, SdkCaller, SlowReader
from tests.chaos.proxy import Pair, Proxy
from tests.daemon.process import REPOSITORY, Daemon, daemon, environment

WORKERS = 4
SLACK_S = 3.5
"""how late a caller may know: the SDK waits 1 s for the word of a broker that may be stopped for 1 s"""
GRACE_MAX_S = 5.0
PATIENCE_S = 30.0
RSS_TOLERANCE_BYTES = 24 << 20
HELD = (
    "broker_requests_pending",
    'broker_endpoint_queued{endpoint="data"}',
    'broker_endpoint_executing{endpoint="data"}',
)
"""what the broker must have none of in the end"""
CONFIG = """
[server]
allowed_hosts = ["127.0.0.1"]
[limits]
ping_interval_s = 1.5
ping_timeout_s = 3
grace_max_s = 5
"""


class WorkerProcess:
    """A worker in a process of its own, started again whenever it has been killed."""

    def __init__(self, name: str, folder: Path, url: str, token: str, capacity: int, grace: int = 0) -> None:
        self.name = name
        self._folder = folder
        self._arguments = (url, token, str(capacity), str(grace))
        self._starts = 0
        self._stopped = False
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it is there, and not stopped."""
        return self.process is not None and self.process.poll() is None and not self._stopped

    def start(self) -> None:
        """Start it, with a journal of its own."""
        self._starts += 1
        self._stopped = False
        url, token, capacity, grace = self._arguments
        journal = self._folder / f"{self.name}.{self._starts}.journal"
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.worker", url, token, str(journal), capacity, grace],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(self._folder), cwd=REPOSITORY,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; SIGKILL is waited for."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
        elif number in (signal.SIGSTOP, signal.SIGCONT):
            self._stopped = number == signal.SIGSTOP


class Chaos:
    """One run over `seconds`, from one seed. `faults` is empty after a good one."""

    def __init__(self, seed: int, seconds: float, folder: Path, say: Callable[[str], None] = print) -> None:
        self.seed = seed
        self.seconds = seconds
        self.folder = folder
        self.say = say
        self.random = random.Random(seed)
        self.ledger = Ledger()
        self.workers: list[WorkerProcess] = []
        self.callers: list[Caller] = []
        self.troubles: Counter[str] = Counter()
        self.tasks: dict[asyncio.Task[None], None] = {}
        self.proxy: Proxy
        self.daemon: Daemon
        self.rss_bytes: dict[str, int] = {}
        self._own = 0

    @property
    def faults(self) -> list[str]:
        """What went wrong."""
        return self.ledger.faults

    def run(self) -> bool:
        """Do it all; whether it was good. Prints what happened."""
        file = self.folder / "broker.toml"
        file.write_text(CONFIG)
        with daemon(self.folder, "--config", str(file), "--log-level", "warning", wait=False) as running:
            self.daemon = running
            self._ready()
            try:
                asyncio.run(self._main())
            finally:
                for worker in self.workers:
                    worker.signal(signal.SIGKILL)
                if running.process.poll() is not None:
                    self.ledger.fault(None, f"the broker has ended by itself:\n{running.log[-3000:]}")
        if "Traceback" in running.log:
            self.ledger.fault(None, f"the broker's log holds a traceback:\n{running.log[-3000:]}")
        self._report()
        return not self.faults

    def _ready(self) -> None:
        folder = self.folder / "xdg_runtime_dir" / "broker"
        path = self.daemon.wait_for(lambda: next(iter(folder.glob("*.json")), None), "the access file is there")
        self.daemon.access = msgspec.json.decode(path.read_bytes())

    # ------------------------------------------------------------ the course of it

    async def _main(self) -> None:
        proxy = self.proxy = Proxy(self.daemon.port, self.ledger.happened)
        try:
            await self._start_workers()
            await self._start_callers()
            calm_s = min(8.0, self.seconds * 0.15)
            await self._load(calm_s, trouble=False)
            await self._settled("before")
            await self._load(self.seconds - calm_s, trouble=True)
            await self._settled("after")
            await self._books()
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            await proxy.close()

    async def _start_workers(self) -> None:
        for number in range(WORKERS):
            name = f"worker{number}"
            port = await self.proxy.listen(name)
            capacity = (1, 8, 8, 32)[number % 4]
            url = f"http://127.0.0.1:{port}"
            grace = (0, 0, 4, 0)[number % 4]
            worker = WorkerProcess(name, self.folder, url, self.daemon.token, capacity, grace)
            worker.start()
            self.workers.append(worker)
        async with AsyncClient(self.daemon.url, self.daemon.token) as client:
            await client.call("data/echo", {"tag": "first", "data": b""}, wait=True, timeout=PATIENCE_S)

    async def _start_callers(self) -> None:
        kinds: list[tuple[type[Caller], int]] = [(SdkCaller, 3), (PlainCaller, 2), (HttpCaller, 1), (SlowReader, 1)]
        for kind, count in kinds:
            for number in range(count):
                name = f"{kind.__name__}{number}"
                await self.proxy.listen(name)
                self.callers.append(kind(name, str(self.seed), self.ledger, self.proxy))

    async def _load(self, seconds: float, *, trouble: bool) -> None:
        """Let all callers ask for so long; returns when all they asked has ended."""
        running = []
        for caller in self.callers:
            caller.stopping = False
            port = self.proxy.ports[caller.name]
            running.append(asyncio.ensure_future(caller.run(f"http://127.0.0.1:{port}", self.daemon.token)))
        ends_at = time.monotonic() + seconds
        while (left_s := ends_at - time.monotonic()) > 0:
            await asyncio.wait(running, timeout=min(left_s, self.random.expovariate(3.0)))
            for task in running:
                if task.done():
                    task.result()
            if trouble:
                self._trouble()
        for caller in self.callers:
            caller.stopping = True
        self._heal()
        await asyncio.wait_for(asyncio.gather(*running), PATIENCE_S)

    # ------------------------------------------------------------ trouble

    def _trouble(self) -> None:
        """One thing goes wrong."""
        troubles: list[tuple[Callable[[], None], int]] = [
            (self._kill_worker, 4), (self._stop_worker, 4), (self._cut, 6), (self._silence, 4), (self._freeze, 5),
            (self._slow, 5), (self._storm, 1), (self._stop_broker, 1),
        ]  # fmt: skip
        act = self.random.choices([act for act, _ in troubles], [weight for _, weight in troubles])[0]
        self.troubles[act.__name__.strip("_")] += 1
        act()

    def _pair(self) -> Pair | None:
        name = self.random.choice(list(self.proxy.pairs))
        pairs = self.proxy.pairs[name]
        return self.random.choice(pairs) if pairs else None

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            act()

        task = asyncio.ensure_future(wait())
        self.tasks[task] = None
        task.add_done_callback(lambda done: self.tasks.pop(done, None))

    def _kill_worker(self) -> None:
        worker = self.random.choice(self.workers)
        if worker.is_running:
            self.ledger.happened(f"{worker.name}: SIGKILL")
            worker.signal(signal.SIGKILL)
            self._later(self.random.uniform(0.1, 2.0), worker.start)

    def _stop_worker(self) -> None:
        worker, seconds = self.random.choice(self.workers), self.random.uniform(0.2, 6.0)
        if worker.is_running:
            self.ledger.happened(f"{worker.name}: SIGSTOP for {seconds:.2f} s")
            worker.signal(signal.SIGSTOP)
            self._later(seconds, lambda: worker.signal(signal.SIGCONT))

    def _stop_broker(self) -> None:
        seconds = self.random.uniform(0.1, 1.0)
        self.ledger.happened(f"broker: SIGSTOP for {seconds:.2f} s")
        self.daemon.signal(signal.SIGSTOP)
        self._later(seconds, lambda: self.daemon.signal(signal.SIGCONT))

    def _cut(self) -> None:
        if pair := self._pair():
            self.proxy.cut(pair)

    def _silence(self) -> None:
        if pair := self._pair():
            self.proxy.silence(pair, self.random.uniform(0.5, 6.0))

    def _freeze(self) -> None:
        if pair := self._pair():
            self.proxy.freeze(pair, self.random.uniform(0.1, 2.0))

    def _slow(self) -> None:
        if pair := self._pair():
            rate = self.random.choice((None, 20_000.0, 1_000_000.0))
            self.proxy.slow(pair, self.random.uniform(0.5, 2.0), self.random.choice((0.001, 0.05, 0.3)), rate)

    def _storm(self) -> None:
        """Everybody's link at once."""
        for pair in self.proxy.all_pairs():
            self.proxy.cut(pair)

    def _heal(self) -> None:
        for pair in self.proxy.all_pairs():
            pair.go_on()

    # ------------------------------------------------------------ the end

    async def _settled(self, when: str) -> None:
        """Wait until the broker holds nothing any more, and take down how large it is."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := self._left()) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        if left:
            self.ledger.fault(None, f"{when} the trouble something is left at the broker: {left}")
        self.rss_bytes[when] = rss_bytes(self.daemon.process.pid)

    def _left(self) -> dict[str, float]:
        """What should be 0 or as before and is not."""
        metrics = self.daemon.metrics()
        left = {name: metrics[name] for name in HELD if metrics[name]}
        workers, alive = metrics['broker_endpoint_workers{endpoint="data"}'], sum(w.is_running for w in self.workers)
        if alive < WORKERS or workers != WORKERS:
            left["workers"] = workers
        sessions = metrics["broker_sessions"]
        if sessions > WORKERS:
            left["sessions"] = sessions
        return left

    async def _books(self) -> None:
        """What the callers noted, what the workers did, what the broker counted."""
        metrics = self.daemon.metrics()
        self.outcomes = self.ledger.judge(executions(self.folder), SLACK_S)
        counted = {
            match[1]: int(value)
            for name, value in metrics.items()
            if (match := re.fullmatch(r'broker_requests_ended_total\{outcome="(\w+)"\}', name))
        }
        accepted = int(metrics["broker_requests_accepted_total"])
        if accepted != sum(counted.values()):
            self.ledger.fault(None, f"accepted {accepted}, ended {sum(counted.values())}")
        # What a caller was not told it may have asked twice (the SDK does so with what is idempotent), or never.
        unknown = 2 * self.outcomes[UNKNOWN] + 2 * self.proxy.opened + 10
        for outcome, told in sorted(self.outcomes.items()):
            if outcome in (UNKNOWN, "open"):
                continue
            count = counted.get(outcome, 0)
            if not told <= count <= told + unknown:
                text = f"{told} callers were told {outcome}, the broker counted {count} (at most {unknown} more)"
                self.ledger.fault(None, text)
        grown = self.rss_bytes["after"] - self.rss_bytes["before"]
        if grown > RSS_TOLERANCE_BYTES:
            self.ledger.fault(None, f"the broker has grown by {grown >> 20} MiB: {self.rss_bytes}")
        self.counted = counted

    def _report(self) -> None:
        say = self.say
        asked = len(self.ledger.entries)
        say(f"seed {self.seed}, {self.seconds:.0f} s, {asked} requests, troubles {dict(self.troubles)}")
        if hasattr(self, "counted"):
            say(f"callers: {dict(sorted(self.outcomes.items()))}")
            say(f"broker:  {dict(sorted((n, c) for n, c in self.counted.items() if c))}")
            mib = {when: f"{size / (1 << 20):.0f} MiB" for when, size in self.rss_bytes.items()}
            say(f"latest end {self.ledger.latest_s:+.2f} s after its deadline; the broker's memory {mib}")
        for fault in self.faults[:5]:
            say(f"FAULT {fault}")
        if self.faults:
            say(f"{len(self.faults)} faults; again with --seed {self.seed}")


def rss_bytes(pid: int) -> int:
    """How much memory a process has resident."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def default_seed() -> int:
    """A seed nobody chose."""
    return int.from_bytes(os.urandom(3), "big")
