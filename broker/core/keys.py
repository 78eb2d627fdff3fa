"""Idempotency keys: requests that are one and the same piece of work, and finished replies kept for repeats.

A key belongs to a principal and an endpoint. Of the requests that name it while the work is under way, one leads: it
waits in the queue, or has the attempt. The others have joined it; each is a request of its own, with its own id,
deadline and end. If the one that leads ends before the work does, the next takes over, and the worker notices nothing.
What the first said is kept as a digest only.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TypeAlias

import msgspec

from broker.core.budget import Budget
from broker.core.counters import Counters
from broker.core.errors import OK, WORKER_ERROR, Outcome
from broker.core.events import Asked
from broker.core.limits import Limits
from broker.core.messages import Body
from broker.core.pending import JOINED, Request

Name: TypeAlias = tuple[str, str, str]
"""principal, endpoint, key"""

MEMORY_SHARE = 4
"""What is kept holds at most this part of `memory_soft_bytes`, so that it does not stop the requests."""
DIGEST_BYTES = 20
JOINED_MAX = 1000
"""requests that may wait for one piece of work beside the one that leads: they all end within one turn of the loop"""
ENTRY_BYTES = 600
"""what an entry costs beside its payload: 420 bytes measured (tracemalloc, a key of 36), more with a longer key"""


class Work(msgspec.Struct, eq=False):
    """What a key names while it has not ended: the request that leads, and those that have joined it, oldest first.

    No deadline of theirs is later than `latest`.
    """

    name: Name
    digest: bytes
    leader: Request
    joined: OrderedDict[Request, None]  # a dict looks for its first entry among all that were taken out before it
    latest: float = 0.0

    def in_time(self, now: float) -> Request | None:
        """The oldest that has joined and has time left."""
        if self.latest <= now:
            return None
        return next((each for each in self.joined if each.deadline > now), None)


class Kept(msgspec.Struct, frozen=True):
    """A finished reply. `size` is in bytes, `kept_at` on the loop's clock."""

    digest: bytes
    outcome: Outcome
    body: Body
    attempts: int
    size: int
    kept_at: float


class _Owner(msgspec.Struct, eq=False):
    """What is kept for one principal, oldest first."""

    names: OrderedDict[Name, None]
    bytes: int = 0


class Keys:
    """The work that is under way, and the replies that are kept, by the name of their key.

    `limits.keys_kept_max`, `keys_kept_max_bytes` and `keys_kept_s` bound what is kept: the oldest go first, those of
    principals with more than `principal_share` of it before others', and a reply that is larger than all may be is not
    kept at all.
    """

    __slots__ = ("_counters", "_greedy", "_owners", "budget", "kept", "kept_bytes", "working")

    def __init__(self, budget: Budget, counters: Counters) -> None:
        self.budget = budget
        self._counters = counters
        self._owners: dict[str, _Owner] = {}
        self._greedy: dict[str, None] = {}  # principals above their share
        self.working: dict[Name, Work] = {}
        self.kept: OrderedDict[Name, Kept] = OrderedDict()
        self.kept_bytes = 0

    def find(self, event: Asked) -> Work | Kept | None:
        """What is known of the key this request names; it must name one."""
        name = name_of(event)
        return self.working.get(name) or self.kept.get(name)

    # ------------------------------------------------------------ under way

    def begin(self, request: Request, event: Asked, digest: bytes) -> None:
        """The first request with this key has been taken in."""
        name = name_of(event)
        request.work = self.working[name] = Work(name, digest, request, OrderedDict())

    def join(self, request: Request, work: Work) -> None:
        """One more request waits for this work."""
        request.state = JOINED
        request.repeated = True
        request.attempts = work.leader.attempts
        request.work = work
        work.joined[request] = None
        work.latest = max(work.latest, request.deadline)

    def leave(self, request: Request) -> Work | None:
        """A request has ended. If it led, the work is over, and is returned for those that have joined it."""
        work, request.work = request.work, None
        assert work is not None
        if work.leader is not request:
            del work.joined[request]
            return None
        del self.working[work.name]
        return work

    def hand_over(self, work: Work, successor: Request) -> None:
        """Another request leads from now on: attempt and stream are its own, and whoever led has joined it.

        A place in the queue is not moved here.
        """
        leader, stream = work.leader, work.leader.stream
        if stream is not None and (size := stream.kept_bytes()):
            self.budget.hold(leader, -size)
            self.budget.hold(successor, size)
        attempt = leader.attempt
        successor.state, leader.state = leader.state, JOINED
        successor.attempt, leader.attempt = attempt, None
        successor.stream, leader.stream = stream, None
        if attempt is not None:
            attempt.request = successor
        del work.joined[successor]
        work.joined[leader] = None
        work.latest = max(work.latest, leader.deadline)
        work.leader = successor

    # ------------------------------------------------------------ finished

    def keep(self, work: Work, outcome: Outcome, body: Body, attempts: int, limits: Limits, now: float) -> None:
        """Keep a reply that a repeat would get again: a result, or an error that is not worth trying again."""
        if not (outcome.kind is OK or (outcome.kind is WORKER_ERROR and not outcome.retryable)):
            return
        size = ENTRY_BYTES + len(body.raw) + sum(map(len, body.attachments))
        if size > bytes_max(limits):
            return
        # Copied, so that nothing else is held: what came may be a view into all that was received with it.
        copied = Body(bytes(body.raw), tuple(map(bytes, body.attachments)))
        self.kept[work.name] = Kept(work.digest, outcome, copied, attempts, size, now)
        self._owners.setdefault(work.name[0], _Owner(OrderedDict())).names[work.name] = None
        self._count(work.name[0], size, limits)
        self.forget(limits, now)

    def forget(self, limits: Limits, now: float) -> None:
        """Forget what is too old, too much or too many."""
        while self.kept:
            oldest = next(iter(self.kept.values()))
            within = len(self.kept) <= limits.keys_kept_max and self.kept_bytes <= bytes_max(limits)
            if now - oldest.kept_at >= limits.keys_kept_s:
                self._let_go(next(iter(self.kept)), limits)
            elif within:
                return
            elif self._greedy:
                self._counters.over_share["replies"] += 1
                self._let_go(next(iter(self._owners[next(iter(self._greedy))].names)), limits)
            else:
                self._let_go(next(iter(self.kept)), limits)

    def _let_go(self, name: Name, limits: Limits) -> None:
        size = self.kept.pop(name).size
        del self._owners[name[0]].names[name]
        self._count(name[0], -size, limits)

    def _count(self, principal: str, size: int, limits: Limits) -> None:
        """A principal has so many bytes more, or less."""
        self.kept_bytes += size
        self.budget.used += size
        owner, share = self._owners[principal], limits.principal_share
        owner.bytes += size
        if owner.bytes > share * bytes_max(limits) or len(owner.names) > share * limits.keys_kept_max:
            self._greedy[principal] = None
        else:
            self._greedy.pop(principal, None)
        if not owner.names:
            del self._owners[principal]

    def check(self, limits: Limits) -> None:
        """Assert that all views agree. For tests and simulators."""
        for name, work in self.working.items():
            leader = work.leader
            assert work.name == name and name not in self.kept, "work goes on though its reply is kept"
            assert leader.work is work and leader.state is not JOINED and leader not in work.joined
            for request in work.joined:
                assert request.work is work and request.state is JOINED and request.deadline <= work.latest
                assert request.attempt is None and request.stream is None and request.slot is not None
                assert request not in request.endpoint.queue, "it has joined and waits for a worker too"
        assert self.kept_bytes == sum(kept.size for kept in self.kept.values())
        assert sum(len(owner.names) for owner in self._owners.values()) == len(self.kept)
        for principal, owner in self._owners.items():
            assert all(name[0] == principal for name in owner.names)
            assert owner.names and owner.bytes == sum(self.kept[name].size for name in owner.names)
        assert self._greedy.keys() <= self._owners.keys()
        assert len(self.kept) <= limits.keys_kept_max and self.kept_bytes <= limits.keys_kept_max_bytes


def bytes_max(limits: Limits) -> int:
    """How much is kept at most."""
    return min(limits.keys_kept_max_bytes, limits.memory_soft_bytes // MEMORY_SHARE)


def name_of(event: Asked) -> Name:
    """By what its key is known."""
    assert event.options.key is not None
    return event.session.principal, event.endpoint, event.options.key


def digest_of(event: Asked) -> bytes:
    """What tells one content from another: the method, the text of the params, the attachments. 1 to 2 ms per MB."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in (event.method.encode(), event.body.raw, *event.body.attachments):
        digest.update(b"%d:" % len(part))  # so that nothing moves from one to the next unnoticed
        digest.update(part)
    return digest.digest()
