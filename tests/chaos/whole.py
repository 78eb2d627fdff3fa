"""Everything at once under a virtual clock: the real core, engine, codec and links, and the real SDK at both ends.

Only time and the network are pretended (`virtual`): links are slow, silent, cut at one end first, cut while they open;
workers die, callers cancel, readers stall, the broker restarts. After every event the router's tables are checked; at
the end the callers' books (`ledger`), the workers' and the broker's are compared, and nothing may be left anywhere.

`python -m tests.chaos.whole --seeds 200`; `--first-seed N --seeds 1` repeats one. A failing seed is made short.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import broker.peer.backoff
import broker.peer.connection
from broker import AsyncClient, Worker
from broker.auth.facts import Refused
from broker.config.model import Config
from broker.core.access import Grant, Principal, Role
from broker.core.limits import EndpointLimits, Limits
from broker.core.router import Router
from broker.engine.engine import Engine
from broker.links import compiled
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.links.socket import SocketLink
from broker.peer.errors import CannotConnect
from broker.transports.websocket.attach import attach
from broker.transports.websocket.handler import WebSocketHandler
from broker.transports.websocket.query import read_query
from broker.transports.websocket.resume import find_session
from broker.wire.pieces import join_reply
from tests.chaos.ledger import UNKNOWN, Entry, Ledger
from tests.chaos.peers import SdkCaller
from tests.chaos.virtual import VirtualLoop, Wire, virtual_time
from tests.chaos.worker import make
from tests.core.shrink import shrink

EVERYTHING = Principal("somebody", (Grant(Role.CALLER | Role.WORKER),))
WORKERS, CLIENTS, WIDTH = 3, 3, 3
QUESTIONS, TROUBLES = 60, 25
GRACES_S = (1.0, 5.0, 30.0)
KEPT = (10, 1000)
LONG_S = 300.0
"""what is to be answered may take so long: more than all troubles together, so that its deadline means it was stuck"""
SLACK_S = 1.6
"""the SDK's guard of 1 s in slots of 0.25 s, the broker's slot, and a link's delay"""
KINDS = (
    ("echo", 10), ("slow", 5), ("fail", 2), ("hang", 1), ("taken_back", 3), ("retried", 4), ("keyed", 3),
    ("streamed", 4), ("sent", 3), ("both", 2), ("left_early", 2),
)  # fmt: skip
TROUBLE = (
    ("cut", 6), ("hold", 5), ("slow", 4), ("storm", 1), ("kill_worker", 3), ("restart", 1), ("deaf", 2)
)  # fmt: skip


class Item:
    """One planned thing: a question of one slot, or a trouble. Each has a seed of its own, so that others may go."""

    __slots__ = ("at", "kind", "seed", "slot")

    def __init__(self, kind: str, seed: int, *, slot: int = -1, at: float = 0.0) -> None:
        self.kind = kind
        self.seed = seed
        self.slot = slot
        """of a question; -1 for a trouble"""
        self.at = at
        """seconds after the slot's last question, or after the beginning"""

    def __repr__(self) -> str:
        who = "trouble" if self.slot < 0 else f"slot {self.slot}"
        return f"{who} {self.at:.3f} {self.kind} {self.seed}"


def plan(seed: int) -> list[Item]:
    """What happens in the run of this seed."""
    rng = random.Random(seed)
    items: list[Item] = []
    pace_s = rng.choice((0.005, 0.05, 0.3))
    kinds, weights = [kind for kind, _ in KINDS], [weight * rng.choice((0.2, 1, 1, 3)) for _, weight in KINDS]
    for _ in range(QUESTIONS):
        (kind,) = rng.choices(kinds, weights)
        slot = rng.randrange(CLIENTS * WIDTH)
        items.append(Item(kind, rng.getrandbits(32), slot=slot, at=rng.expovariate(1 / pace_s)))
    kinds, weights = [kind for kind, _ in TROUBLE], [weight * rng.choice((0.2, 1, 1, 3)) for _, weight in TROUBLE]
    for _ in range(rng.choice((0, 5, TROUBLES))):
        (kind,) = rng.choices(kinds, weights)
        items.append(Item(kind, rng.getrandbits(32), at=rng.uniform(0.0, rng.choice((1.0, 5.0, 15.0)))))
    return items


# ---------------------------------------------------------------- the broker, without its sockets


class Turned(Refused):
    """What a wrong secret gets."""


class _Strict:
    """Stands for the authenticator: nobody guesses here."""

    def not_yours(self, remote: str) -> Refused:
        return Turned(403, "not your session")


class Door(WebSocketHandler):
    """The handler of the WebSocket path, without the HTTP in front of it."""

    def __init__(self, engine: Engine, links: LoopLinks) -> None:
        self.engine = engine
        self.links = links
        self.limits = lambda: Config().limits

    def enter(self, link: Link, target: str, subprotocols: Sequence[str]) -> None:
        """What `get` does once everything about the request was found good. Raises Refused."""
        query = parse_qs(urlsplit(target).query, keep_blank_values=True)
        attachment = read_query(query)
        authenticator = cast(Any, _Strict())
        resumed = find_session(
            self.engine.router, authenticator, subprotocols, EVERYTHING, "", attachment, "127.0.0.1"
        )  # fmt: skip
        attach(self.engine, link, EVERYTHING, "", attachment, resumed, self.limits())


class Node:
    """One life of the broker."""

    def __init__(self, name: str, limits: Limits, check: Callable[[Router], None]) -> None:
        endpoints = {"data": EndpointLimits(queue_max=20)}
        loop = asyncio.get_running_loop()
        self.router = Router(limits, endpoints, join=join_reply, node=name, now=loop.time())
        self.engine = Engine(self.router, loop, compiled=compiled.wanted())
        for kind, handler in list(self.router.handlers.items()):
            self.router.handlers[kind] = self._checked(handler, check)
        self.links = LoopLinks(LinkLimits(ping_interval_s=2.0, ping_timeout_s=2.0))
        self.door = Door(self.engine, self.links)

    def _checked(self, handler: Callable[..., None], check: Callable[[Router], None]) -> Callable[..., None]:
        def handle(event: object, now: float) -> None:
            handler(event, now)
            check(self.router)

        return handle


# ---------------------------------------------------------------- the run


class Whole:
    """One run of a plan."""

    def __init__(self, seed: int, items: Sequence[Item]) -> None:
        self.seed = seed
        self.items = items
        self.random = random.Random(seed)
        self.ledger = Ledger()
        self.ran: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.wires: list[Wire] = []
        self.events = 0
        self.hash = hashlib.sha256()
        self.routers: list[Router] = []
        self.node: Node | None = None
        self.workers: list[Worker] = []
        self.clients: list[AsyncClient] = []
        self.limits = Limits(
            grace_max_s=self.random.choice(GRACES_S), kept_max=self.random.choice(KEPT),
        )  # fmt: skip

    @property
    def faults(self) -> list[str]:
        """What went wrong."""
        return self.ledger.faults

    @property
    def digest(self) -> str:
        """Of the trace."""
        return self.hash.hexdigest()

    # ------------------------------------------------------------ what everybody sees

    def say(self, text: str) -> None:
        """Into the trace."""
        self.ledger.happened(text)
        self.hash.update(f"{time.monotonic():.6f} {text}\n".encode())

    def checked(self, router: Router) -> None:
        """After every event of the router."""
        self.events += 1
        try:
            router.check()
        except AssertionError as error:
            self.ledger.fault(None, f"after event {self.events}: {error!r}")
            raise

    async def connect(self, url: str, links: LoopLinks, *, subprotocols: Sequence[str] = (), **_: Any) -> Link:
        """In the place of `broker.links.connect.connect`."""
        rng, name = self.random, urlsplit(url).hostname or ""
        delay_s = rng.choice((0.0, 0.0005, 0.02, 0.2))
        await asyncio.sleep(delay_s)
        node = self.node
        if node is None:
            raise ConnectionRefusedError(111, "Connection refused")
        wire = Wire(name, rng, delay_s)
        near, far = SocketLink(links, client=True, remote="broker"), SocketLink(node.links, remote=name)
        wire.near.protocol, wire.far.protocol = near, far
        near.connection_made(cast(Any, wire.near))
        far.connection_made(cast(Any, wire.far))
        self.wires = [old for old in self.wires if old.is_open] + [wire]
        resumes = "resumes" if any(offer.startswith("resume.") for offer in subprotocols) else "begins"
        self.say(f"{name} connects, {delay_s} s away, {resumes}")
        node.door.enter(far, url, subprotocols)
        await asyncio.sleep(delay_s)
        if rng.random() < 0.03 or not wire.is_open:
            self.say(f"{name}: cut while it opened")
            wire.near.abort()
            raise ConnectionResetError(104, "Connection reset by peer")
        near.subprotocol = "jsonrpc"
        return near

    # ------------------------------------------------------------ the course of it

    async def main(self) -> None:
        """All of it."""
        self._live()
        for number in range(WORKERS):
            await self._start_worker(number)
        for number in range(CLIENTS):
            client = AsyncClient(f"http://client{number}:1", "t")
            while not client.is_connected:
                try:
                    await client.connect()
                except CannotConnect:
                    self.say(f"client{number} tries again")
            self.clients.append(client)
        slots = [asyncio.ensure_future(self._slot(number)) for number in range(CLIENTS * WIDTH)]
        began = time.monotonic()
        for item in sorted((item for item in self.items if item.slot < 0), key=lambda item: item.at):
            await asyncio.sleep(max(0.0, began + item.at - time.monotonic()))
            await self._trouble(item)
        await asyncio.sleep(1.0)
        for wire in self.wires:
            wire.go_on()
            wire.near.delay_s = wire.far.delay_s = 0.001
        await asyncio.gather(*slots)
        await self._leave()
        self.outcomes = self.ledger.judge(self.ran, SLACK_S)
        for entry in self.ledger.entries.values():
            self._nothing_stuck(entry)
            if self.is_lossless:
                self._nothing_lost(entry)

    @property
    def is_lossless(self) -> bool:
        """Whether every link that breaks can be resumed: then no call may end as lost, whatever the network does."""
        generous = self.limits.grace_max_s == GRACES_S[-1] and self.limits.kept_max == KEPT[-1]
        return generous and not any(item.kind == "restart" for item in self.items)

    def _nothing_stuck(self, entry: Entry) -> None:
        if entry.kind != "hang" and (entry.outcome == "deadline" or entry.ended_at >= entry.due_at):
            self.ledger.fault(entry, "was stuck")

    def _nothing_lost(self, entry: Entry) -> None:
        meant = entry.kind in ("taken back", "left early")
        if entry.outcome == UNKNOWN and not meant and entry.ended_at < entry.due_at:
            self.ledger.fault(entry, "was lost, though its session could go on")

    def _live(self) -> None:
        self.node = Node(f"n{len(self.routers)}", self.limits, self.checked)
        self.routers.append(self.node.router)

    async def _start_worker(self, number: int) -> None:
        def note(tag: str) -> None:
            self.ran[tag] += 1
            self.say(f"worker{number} begins {tag}")

        worker = make(f"http://worker{number}:1", "t", note, (1, 8, 32)[number % 3], (0.0, 4.0, 0.0)[number % 3])
        await worker.start()
        self.workers.append(worker)

    async def _slot(self, number: int) -> None:
        """One after the other, what is planned for this slot."""
        caller = SdkCaller(f"slot{number}", "", self.ledger, cast(Any, None))
        caller.threads, caller.timeout_s = False, LONG_S
        caller.client = self.clients[number // WIDTH]
        for index, item in enumerate(self.items):
            if item.slot == number:
                await asyncio.sleep(item.at)
                caller.random = random.Random(item.seed)
                caller.made = index * 10  # the same tags, whatever else is left out
                await getattr(caller, item.kind)()

    async def _leave(self) -> None:
        """Everybody goes, and nothing may be left."""
        for client in self.clients:
            await client.close()
        for worker in self.workers:
            await worker.stop(now=True)
        await asyncio.sleep(self.limits.grace_max_s + 10.0)
        node = self.node
        assert node is not None
        router = node.router
        router.check()
        left = {
            "sessions": len(router.sessions.by_id), "requests": router.pending.count,
            "deadlines": len(router.pending.deadlines), "expiry": len(router.sessions.expiry),
            "suspended": router.sessions.suspended, "links": len(node.links.links),
            "bytes": router.state.budget.used - router.state.keys.kept_bytes,
            "attempts": sum(len(endpoint.queue) for endpoint in router.registry.by_name.values()),
        }  # fmt: skip
        if any(left.values()):
            self.ledger.fault(None, f"left at the broker: { {name: count for name, count in left.items() if count} }")
        books = router.counters
        if books.accepted != sum(books.ended.values()):
            self.ledger.fault(None, f"accepted {books.accepted}, ended {sum(books.ended.values())}")
        await self._stop_node(node)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if tasks:
            self.ledger.fault(None, f"tasks are left: {tasks}")

    async def _stop_node(self, node: Node) -> None:
        node.engine.stop()
        await node.links.close()

    # ------------------------------------------------------------ trouble

    def _wire(self, rng: random.Random) -> Wire | None:
        wires = [wire for wire in self.wires if wire.is_open]
        return rng.choice(wires) if wires else None

    async def _trouble(self, item: Item) -> None:
        rng = random.Random(item.seed)
        self.say(f"trouble: {item.kind}")
        await getattr(self, f"_{item.kind}")(rng)

    async def _cut(self, rng: random.Random) -> None:
        if wire := self._wire(rng):
            self.say(f"{wire.name} is cut")
            wire.cut(rng.choice((0.0, 0.0, 0.01, 1.0)))

    async def _hold(self, rng: random.Random) -> None:
        if wire := self._wire(rng):
            seconds = rng.uniform(0.01, rng.choice((0.3, 3.0, 8.0)))
            self.say(f"{wire.name} is silent for {seconds:.3f} s")
            wire.hold()
            act = wire.go_on if rng.random() < 0.5 else wire.cut
            asyncio.get_running_loop().call_later(seconds, act)

    async def _slow(self, rng: random.Random) -> None:
        if wire := self._wire(rng):
            delay_s = rng.choice((0.05, 0.3, 1.0))
            self.say(f"{wire.name} is {delay_s} s away")
            wire.near.delay_s = wire.far.delay_s = delay_s

    async def _storm(self, rng: random.Random) -> None:
        for wire in list(self.wires):
            wire.cut(0.0)

    async def _deaf(self, rng: random.Random) -> None:
        """One direction stands still for a while: a reader that does not read."""
        if wire := self._wire(rng):
            end = rng.choice((wire.near, wire.far))
            self.say(f"{wire.name}: one end hears late")
            end.other.delay_s = rng.uniform(0.5, 3.0)
            asyncio.get_running_loop().call_later(2.0, lambda: setattr(end.other, "delay_s", 0.001))

    async def _kill_worker(self, rng: random.Random) -> None:
        """Its links break, what it did is gone; another takes its place."""
        number = rng.randrange(len(self.workers))
        worker = self.workers.pop(number)
        name = urlsplit(worker._target()[0]).hostname
        self.say(f"{name} dies")
        for wire in self.wires:
            if wire.name == name:
                wire.cut(0.0)
        await worker.stop(now=True)
        await self._start_worker(int((name or "")[6:]))

    async def _restart(self, rng: random.Random) -> None:
        """The broker dies and comes back, knowing nothing."""
        node, self.node = self.node, None
        assert node is not None
        self.say("the broker dies")
        node.engine.stop()
        for wire in self.wires:
            wire.cut(0.0)
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        self._live()
        self.say("the broker is back")


class _Errors(logging.Handler):
    """Whatever is logged as an error is a fault, but that a worker's function failed: some are meant to."""

    def __init__(self, whole: Whole) -> None:
        super().__init__(logging.ERROR)
        self._whole = whole

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "broker.worker" or not record.getMessage().startswith("data/fail"):
            text = logging.Formatter().format(record)
            self._whole.ledger.fault(None, f"logged by {record.name}: {text}")


@contextmanager
def pretended(whole: Whole) -> Iterator[None]:
    """What the SDK takes from the system comes from the seed meanwhile."""
    connection, backoff = cast(Any, broker.peer.connection), cast(Any, broker.peer.backoff)
    kept = connection.connect, backoff.random
    logger = logging.getLogger("broker")
    propagated, logger.propagate = logger.propagate, False
    listener = _Errors(whole)
    logger.addHandler(listener)

    class Seeded:
        @staticmethod
        def Random() -> random.Random:
            return random.Random(whole.random.getrandbits(32))

    connection.connect, backoff.random = whole.connect, Seeded
    try:
        yield
    finally:
        connection.connect, backoff.random = kept
        logger.removeHandler(listener)
        logger.propagate = propagated


def run(seed: int, items: Sequence[Item] | None = None) -> Whole:
    """One run; its faults say whether it was good."""
    with virtual_time() as loop:
        whole = Whole(seed, plan(seed) if items is None else items)
        problems: list[str] = []

        def told(_: object, context: dict[str, Any]) -> None:
            problems.append(f"{context['message']}: {context.get('exception')!r}")

        loop.set_exception_handler(told)
        with pretended(whole):
            try:
                loop.run_until_complete(whole.main())
            except Exception as error:  # anything at all is a failing run
                whole.ledger.fault(None, f"{type(error).__name__}: {error}")
        _end(loop)
        for problem in problems:
            whole.ledger.fault(None, f"the loop was told: {problem}")
    return whole


def _end(loop: VirtualLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    gc.collect(0)


def short(seed: int, tries_max: int = 300) -> tuple[list[Item], Whole]:
    """The least of a failing seed's plan that still fails, and its run."""
    items = shrink(plan(seed), lambda some: bool(run(seed, some).faults), tries_max)
    return items, run(seed, items)


def tell(whole: Whole, items: Sequence[Item]) -> str:
    """A failing run as text: the plan that is left, the faults, the last of the trace."""
    lines = [f"seed {whole.seed}, {len(items)} of its plan are left:", *(f"  {item}" for item in items)]
    lines += [f"FAULT {fault}" for fault in whole.faults[:3]]
    lines += [f"  {whole.ledger.at(at)} {text}" for at, text in list(whole.ledger.events)[-60:]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.whole", description="the whole under a virtual clock")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--digest", action="store_true", help="print one digest over all traces")
    parser.add_argument("--whole", action="store_true", help="do not shorten what fails")
    given = parser.parse_args()
    began, events, asked, failed = time.monotonic(), 0, 0, 0
    outcomes: Counter[str] = Counter()
    digest = hashlib.sha256()
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        whole = run(seed)
        events += whole.events
        asked += len(whole.ledger.entries)
        outcomes.update(whole.outcomes)
        digest.update(whole.digest.encode())
        if whole.faults:
            failed += 1
            items, found = (plan(seed), whole) if given.whole else short(seed)
            print(tell(found, items), file=sys.stderr)
            if failed >= 3:
                break
    if given.digest:
        print(digest.hexdigest())
        return min(failed, 1)
    took_s = time.monotonic() - began
    print(
        f"{given.seeds} seeds, {asked} requests, {events} events of the core in {took_s:.0f} s "
        f"({events / took_s * 60:,.0f} a minute), {failed} failed; {dict(outcomes.most_common())}"
    )
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
