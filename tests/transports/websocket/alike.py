"""A broker's whole path under a virtual clock: pretend transports, real links and peers, one engine and its router.

Who comes, what they say, how the bytes are cut and which transports are stuck is drawn from the seed, so that the same
seed goes the same way whether the path is the compiled one or the one in Python. What was written, and every table and
counter, is kept step by step.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
import pytest

from broker.config.model import Config
from broker.core.access import Grant, Principal, Role
from broker.core.events import Drain
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Options
from broker.core.router import Router
from broker.engine.engine import Engine
from broker.links.compiled import PURE
from broker.links.limits import LinkLimits
from broker.links.loop import LoopLinks
from broker.links.socket import SocketLink
from broker.transports.websocket.attach import attach
from broker.transports.websocket.query import Attachment
from broker.wire import jsonrpc, native
from broker.wire.pieces import join_reply
from tests.chaos.virtual import virtual_time
from tests.core.harness import calls_of_python
from tests.transports.websocket.pretend import Numbers, Peer, Transport
from tests.transports.websocket.tables import standing

ENDPOINTS = {
    "round": EndpointLimits(policy="round_robin"),
    "sticky": EndpointLimits(policy="sticky"),
    "fresh": EndpointLimits(newest_wins=True),
}
NAMES = ("least", "least", "least", "round", "sticky", "fresh")
CALM_NAMES = ("least", "least", "least", "least", "fresh")
GRANTS = (
    (Grant(Role.CALLER | Role.WORKER | Role.ADMIN),),
    (Grant(Role.CALLER | Role.WORKER),),
    (Grant(Role.CALLER, ("least", "sticky")), Grant(Role.WORKER, ("*",))),
)
ROLES = (Role.CALLER, Role.CALLER, Role.WORKER, Role.WORKER, Role.LISTENER)
CALM_ROLES = (Role.CALLER, Role.WORKER)
PEERS_MIN, PEERS_MAX = 6, 14
CHUNKS = (1, 3, 50, 5000, 1 << 20, 1 << 20, 1 << 20)
"""how many bytes come at once"""


ORDER = "order among links"
"""the name of what a step tells of it"""


class Failure(AssertionError):
    """A run went wrong, or two of them differ: the text says how to see it again."""


class Way(NamedTuple):
    """How a run goes: the class of its links, whether its engine is the compiled one, and what PURE is set to."""

    name: str
    link: type[SocketLink]
    compiled: bool
    pure: str


def python_link() -> type[SocketLink]:
    """SocketLink once more, with the receive methods in Python that the compiled ones replace in the class itself."""
    specification = find_spec("broker.links.socket")
    assert specification is not None and specification.loader is not None
    module = module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "Writer", None)
        specification.loader.exec_module(module)
    link: type[SocketLink] = module.SocketLink
    assert link.buffer_updated is not SocketLink.buffer_updated
    return link


class World:
    """One run: the broker and its peers. `steps` holds what each step wrote, and how all stood after it."""

    def __init__(self, way: Way, seed: int, in_python: Counter[str], *, calm: bool, one_by_one: bool) -> None:
        self.way = way
        self.calm = calm
        self.one_by_one = one_by_one
        self.rng = rng = random.Random(seed)
        self.seed = seed
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.raised.append(context))
        self.limits = calm_limits(rng) if calm else troubled_limits(rng)
        self.router = Router(self.limits, ENDPOINTS, join=join_reply, node="node", now=self.loop.time())
        self.engine = Engine(self.router, self.loop, compiled=way.compiled)
        self.links = LoopLinks(link_limits(rng, calm))
        assert self.links.native == (not way.pure)
        self.peers: list[Peer] = []
        self.numbers = Numbers()
        self.in_python = in_python
        """how often the handlers in Python took something in, by their names"""
        self.raised: list[dict[str, Any]] = []
        self.lines: list[tuple[int, str]] = []
        self.steps: list[dict[str, str]] = []
        acts: list[tuple[Callable[[], None], float]] = [
            (self.come, 4), (self.talk, 56), (self.lose, 0.2), (self.stick, 6), (self.unstick, 6),
            (self.reconfigure, 0.05 if calm else 0.3), (self.drain, 0 if calm else 0.05), (lambda: None, 28),
        ]  # fmt: skip
        self.acts = [act for act, _ in acts]
        self.weights = [weight for _, weight in acts]

    def say(self, number: int, line: str) -> None:
        self.lines.append((number, line))

    async def run(self, steps: int) -> None:
        for _ in range(5):
            self.come()
        for _ in range(steps):
            await self.step()
        self.engine.stop()

    async def step(self) -> None:
        """Something happens, bytes come through, and the loop turns, or time passes."""
        rng = self.rng
        if len(self.present()) < PEERS_MIN:
            self.come()
        rng.choices(self.acts, self.weights)[0]()
        for peer in self.peers:
            if peer.transport.incoming and rng.random() < 0.8:
                peer.transport.deliver(rng.choice(CHUNKS))
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        if rng.random() < 0.08:
            await asyncio.sleep(rng.choice((0.01, 0.2, 1)))
        if not any(peer.transport.link._pieces for peer in self.peers):  # the budget hears of them once per turn
            self.router.check()
        links = [peer.transport.link for peer in self.peers]
        stands = standing(self.router, self.engine, self.links.counters, links)
        written = {"written": repr(sorted(self.lines, key=itemgetter(0))), ORDER: repr([one for one, _ in self.lines])}
        self.steps.append(written | stands)
        self.lines = []

    def present(self) -> list[Peer]:
        return [peer for peer in self.peers if not peer.transport.closing]

    # ------------------------------------------------------------ what happens

    def come(self) -> None:
        """Somebody is attached."""
        rng = self.rng
        if len(self.present()) >= PEERS_MAX:
            return
        number = len(self.peers)
        kernel = random.Random(f"{self.seed} {number}")
        transport = Transport(number, self.say, kernel, one_by_one=self.one_by_one)
        transport.link = link = self.way.link(self.links, remote=f"remote {number}")
        link.connection_made(transport)
        role = rng.choice(CALM_ROLES if self.calm else ROLES)
        endpoint = rng.choice(CALM_NAMES if self.calm else NAMES)
        if role != Role.WORKER and rng.random() < 0.6:
            endpoint = ""
        self.peers.append(Peer(transport, endpoint, rng, self.numbers, calm=self.calm))
        grants = GRANTS[0] if self.calm else rng.choice(GRANTS)
        principal = Principal(f"principal {rng.randrange(3)}", grants)
        attach(self.engine, link, principal, endpoint, self.attachment(role), None, Config().limits)

    def attachment(self, role: Role) -> Attachment:
        rng = self.rng
        return Attachment(
            role=role,
            listen=rng.choice((None, True, False)),
            meta=rng.random() < 0.4,
            binary=rng.random() < 0.3,
            capacity=rng.choice((None, None, None, 5) if self.calm else (None, None, 1, 2, 5)),
            grace_s=rng.choice((0, 0, 0, 3.0)),
            defaults=Options(
                timeout=rng.choice((None, None, 3 if self.calm else 0.2)),
                meta=rng.random() < 0.5,
                group=rng.choice((None, None, "g")),
                timing=rng.random() < (0.02 if self.calm else 0.1),
                idempotent=rng.random() < (0.05 if self.calm else 0.2),
            ),
        )

    def talk(self) -> None:
        self.rng.choice(self.present()).talk()

    def lose(self) -> None:
        self.rng.choice(self.present()).transport.lose()

    def stick(self) -> None:
        self.rng.choice(self.present()).transport.stuck = True

    def unstick(self) -> None:
        for peer in self.peers:
            peer.transport.unstick()

    def reconfigure(self) -> None:
        """Other bounds, and maybe another policy, from now on."""
        rng = self.rng
        limits = msgspec.structs.replace(
            self.limits,
            in_flight_max=rng.choice((2, 1000)),
            memory_soft_bytes=rng.choice((3000, 1 << 30)),
            requests_per_s=rng.choice((0, 0, 10)),
        )
        policy = rng.choice(("least_pending", "round_robin", "sticky"))
        least = {"least": EndpointLimits(policy=policy)} if rng.random() < 0.5 else {}
        self.router.reconfigure(limits, ENDPOINTS | least, self.loop.time())
        self.engine.perform()

    def drain(self) -> None:
        self.engine.feed(Drain(self.rng.random() < 0.5))


def troubled_limits(rng: random.Random) -> Limits:
    """Bounds of which some are soon reached."""
    return Limits(
        grace_max_s=5.0,
        queue_max=rng.choice((3, 50)),
        in_flight_max=rng.choice((5, 1000)),
        memory_soft_bytes=rng.choice((30_000, 1 << 30)),
        capacity=rng.choice((1, 3, 64)),
        requests_per_s=rng.choice((0, 0, 0, 20)),
        deadline_s=rng.choice((0.3, 30)),
        kept_max=rng.choice((10, 1000)),
    )


def calm_limits(rng: random.Random) -> Limits:
    """Bounds far away."""
    return Limits(grace_max_s=5.0, queue_max=50, capacity=64, kept_max=rng.choice((10, 1000)))


def link_limits(rng: random.Random, calm: bool) -> LinkLimits:
    """Bounds of every link."""
    soft = rng.choice((300, 3000, 1 << 20))
    return LinkLimits(
        outbox_soft_bytes=soft,
        outbox_hard_bytes=8 << 20 if calm else rng.choice((max(soft, 9000), 8 << 20)),
        ping_interval_s=rng.choice((0, 2.0)),
        ping_timeout_s=3,
        write_turn_bytes=65_536,
        message_max_bytes=70_000 if calm else rng.choice((2000, 70_000)),
    )


def run(way: Way, seed: int, steps: int, *, calm: bool, one_by_one: bool = False) -> World:
    """A run from a seed, from its first step to its last. Raises Failure."""
    with virtual_time() as loop, pytest.MonkeyPatch.context() as patch:
        patch.setenv(PURE, way.pure)
        patch.setattr(jsonrpc, "_ROUTES", {})  # what all of a process have learned
        numbers = itertools.count()
        patch.setattr(secrets, "token_urlsafe", lambda _: f"secret {next(numbers)}")
        in_python = calls_of_python(patch)

        async def main() -> World:
            world = World(way, seed, in_python, calm=calm, one_by_one=one_by_one)
            try:
                await world.run(steps)
                assert not world.raised, world.raised
            except Exception as error:
                text = f"seed {seed}, {calm=}, {one_by_one=}, {way.name}, step {len(world.steps)}: {error!r}"
                raise Failure(text) from error
            return world

        return loop.run_until_complete(main())
