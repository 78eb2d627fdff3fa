"""`/metrics` in the Prometheus text format, made from plain integers when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

from broker._version import VERSION
from broker.auth.authenticate import AuthCounters
from broker.auth.door import Door
from broker.auth.facts import Refused
from broker.core.access import Principal, is_admin
from broker.core.router import Router
from broker.links.acceptor import Acceptor
from broker.links.loop import LoopLinks

if TYPE_CHECKING:
    from prometheus_client.core import Metric

ENDPOINTS_SHOWN = 200
"""endpoints with a label of their own; the others are added up as `other`"""


class Lag:
    """How late the event loop is: the last sample, the longest, in seconds. Sampled twice a second."""

    __slots__ = ("last_s", "max_s")

    def __init__(self) -> None:
        self.last_s = 0.0
        self.max_s = 0.0

    def add(self, late_s: float) -> None:
        """One sample."""
        self.last_s = late_s
        self.max_s = max(self.max_s, late_s)


class FrontEndCounts(Protocol):
    """What is counted of Jupyter's front ends; their number is how many there are."""

    @property
    def connected(self) -> int:
        """Those with a link."""
        ...

    @property
    def left_out(self) -> int:
        """Messages they had no room for."""
        ...

    def __len__(self) -> int: ...


class NoFrontEnds:
    """Where there are none."""

    connected = left_out = 0

    def __len__(self) -> int:
        return 0


class ZeroMqCounts(Protocol):
    """What is counted at the ZeroMQ door."""

    @property
    def refused(self) -> Mapping[str, int]:
        """Messages refused, by cause."""
        ...

    @property
    def handshakes(self) -> Mapping[str, int]:
        """Connections, by what became of them."""
        ...

    evicted: int
    heartbeats: int
    published: int
    published_dropped: int
    subscriptions_refused: int


class ZeroMqDoor(Protocol):
    """The ZeroMQ door, as far as its figures go."""

    @property
    def counters(self) -> ZeroMqCounts:
        """Totals."""
        ...

    @property
    def peers(self) -> int:
        """Routes to somebody who has sent a valid message."""
        ...

    @property
    def connections(self) -> int:
        """Connections of all sockets."""
        ...

    @property
    def topics(self) -> int:
        """Topics that plain SUB sockets listen to."""
        ...


class Sources(msgspec.Struct):
    """Where the figures come from. `acceptor` is None in a program that brings its own HTTP server, `zeromq` where that
    door is shut.
    """

    router: Router
    links: LoopLinks
    auth: AuthCounters
    lag: Lag
    acceptor: Callable[[], Acceptor | None]
    front_ends: FrontEndCounts = msgspec.field(default_factory=NoFrontEnds)
    zeromq: Callable[[], ZeroMqDoor | None] = lambda: None


class Collector:
    """Turns the counters into metric families. Every name stands here and nowhere else."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """All families, in a fixed order."""
        yield from self._build()
        yield from self._requests()
        yield from self._messages()
        yield from self._memory()
        yield from self._sessions()
        yield from self._endpoints()
        yield from self._links()
        yield from self._doors()
        zeromq = self._sources.zeromq()
        if zeromq is not None:
            yield from self._zeromq(zeromq)

    def _build(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        build = GaugeMetricFamily("broker_build_info", "1, of what runs here.", labels=["version", "core"])
        build.add_metric([VERSION, "compiled" if self._sources.links.native else "python"], 1)
        yield build

    def _requests(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        counters, pending = self._sources.router.counters, self._sources.router.pending
        yield CounterMetricFamily("broker_requests_accepted", "Requests taken into the books.", value=counters.accepted)
        ended = CounterMetricFamily("broker_requests_ended", "Requests that ended, by outcome.", labels=["outcome"])
        for name, count in counters.ended.items():
            ended.add_metric([name], count)
        yield ended
        overloaded = CounterMetricFamily("broker_overloaded", "Refusals, by the bound reached.", labels=["bound"])
        for bound, count in counters.overloaded.items():
            overloaded.add_metric([bound], count)
        yield overloaded
        yield GaugeMetricFamily("broker_requests_pending", "Accepted, not ended.", value=pending.count)
        yield CounterMetricFamily("broker_attempts", "Requests given to workers.", value=counters.attempts)
        yield CounterMetricFamily("broker_retries", "Requests given to another worker.", value=counters.retries)
        keys = self._sources.router.state.keys
        text = "Requests that joined one in flight with the same idempotency key."
        yield CounterMetricFamily("broker_keys_joined", text, value=counters.keys_joined)
        text = "Requests answered from the reply kept under their key."
        yield CounterMetricFamily("broker_keys_repeated", text, value=counters.keys_repeated)
        yield GaugeMetricFamily("broker_keys_kept", "Finished replies kept for repeats.", value=len(keys.kept))
        yield GaugeMetricFamily("broker_keys_kept_bytes", "The same, their size.", value=keys.kept_bytes)
        yield CounterMetricFamily("broker_cancels", "Attempts called back.", value=counters.cancels)
        text = "Requests that went from a full queue for a caller with fewer."
        yield CounterMetricFamily("broker_displaced", text, value=counters.displaced)
        text = "Requests that waited when a newer one of their kind came."
        yield CounterMetricFamily("broker_superseded", text, value=counters.superseded)
        text = "Errors of workers for a class they never answered well; they are passed over for it a while."
        yield CounterMetricFamily("broker_doubts", text, value=counters.doubts)
        buckets, total = [], 0
        for power, count in enumerate(counters.latency):
            total += count
            if power >= 6:  # 64 µs
                buckets.append((str(2**power / 1e6), float(total)))
        buckets.append(("+Inf", float(total)))
        yield HistogramMetricFamily(
            "broker_request_seconds", "From acceptance to end.", buckets=buckets, sum_value=counters.latency_sum_s
        )

    def _messages(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        counters = self._sources.router.counters
        for name, text in (
            ("late_replies", "Replies to attempts that had ended."),
            ("foreign_replies", "Replies to what others were asked."),
            ("nameless_replies", "Replies with id null."),
            ("malformed", "Messages that were none."),
            ("strikes", "Signs of abuse."),
            ("notifications", "Calls nobody waits for."),
            ("notifications_dropped", "Those of them no worker was free for."),
            ("broadcasts", "Messages published."),
            ("parts_down", "Parts of replies passed on."),
            ("parts_up", "Parts of requests passed on."),
            ("part_bytes_down", "Bytes of the parts of replies."),
            ("part_bytes_up", "Bytes of the parts of requests."),
            ("parts_dropped", "Parts that came twice, after the end, or for nobody."),
            ("streams_broken", "Requests that ended because one side broke the rules of streams."),
            ("progress", "Progress passed on."),
            ("progress_dropped", "Progress nobody had asked for, or whose reader was slow."),
            ("broadcasts_refused", "Messages not published because too many were under way, or too much waits."),
            ("copies", "Copies of broadcasts written."),
            ("copies_dropped", "Copies dropped because a reader was slow, or too much waits."),
            ("replays", "Subscriptions that began with what a topic had kept."),
        ):
            yield CounterMetricFamily(f"broker_{name}", text, value=getattr(counters, name))

    def _memory(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        state = self._sources.router.state
        text = "Payloads and outboxes held in all."
        yield GaugeMetricFamily("broker_memory_used_bytes", text, value=state.budget.used)
        text = "From where on new requests are refused."
        yield GaugeMetricFamily("broker_memory_soft_bytes", text, value=state.limits.memory_soft_bytes)
        text = "From where on broadcasts are dropped."
        yield GaugeMetricFamily("broker_memory_hard_bytes", text, value=state.limits.memory_hard_bytes)
        held = GaugeMetricFamily("broker_memory_held_bytes", "What is held, by what it is for.", labels=["by"])
        for name, size in state.held().items():
            held.add_metric([name], size)
        yield held

    def _sessions(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        router, counters = self._sources.router, self._sources.router.counters
        yield GaugeMetricFamily("broker_sessions", "Sessions there are.", value=len(router.sessions))
        yield CounterMetricFamily("broker_sessions_attached", "Sessions that came.", value=router.counters.attached)
        yield CounterMetricFamily("broker_sessions_detached", "Sessions that left.", value=router.counters.detached)
        yield CounterMetricFamily("broker_sessions_suspended", "Links lost that may return.", value=counters.suspended)
        yield CounterMetricFamily("broker_sessions_resumed", "Those of them that did.", value=counters.resumed)
        text = "Acknowledgements of what was never sent."
        yield CounterMetricFamily("broker_acks_ignored", text, value=counters.acks_ignored)
        text = "What was given up because one principal held more than its share."
        over_share = CounterMetricFamily("broker_over_share", text, labels=["of"])
        for name, count in counters.over_share.items():
            over_share.add_metric([name], count)
        yield over_share
        text = "Sessions without a link that may return."
        yield GaugeMetricFamily("broker_sessions_away", text, value=router.sessions.suspended)
        front_ends = self._sources.front_ends
        text = "Front ends of kernels, those that are away included."
        yield GaugeMetricFamily("broker_front_ends", text, value=len(front_ends))
        yield GaugeMetricFamily("broker_front_ends_connected", "Those of them with a link.", value=front_ends.connected)
        text = "Messages of kernels that a front end had no room for, away or reading slowly."
        yield CounterMetricFamily("broker_front_end_messages_left_out", text, value=front_ends.left_out)
        yield GaugeMetricFamily("broker_fanouts", "Broadcasts under way.", value=len(router.fanouts))
        text = "Sessions that hear again what a topic has kept."
        yield GaugeMetricFamily("broker_replays_pending", text, value=len(router.state.replays))
        yield GaugeMetricFamily("broker_draining", "1 while the broker shuts down.", value=int(router.draining))

    def _endpoints(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        sums: dict[str, list[int]] = {}
        for endpoint in self._sources.router.registry.by_name.values():
            label = endpoint.name if len(sums) < ENDPOINTS_SHOWN else "other"
            row = sums.setdefault(label, [0, 0, 0, 0])
            row[0] += len(endpoint.registrations)
            row[1] += len(endpoint.queue)
            row[2] += sum(registration.load for registration in endpoint.registrations.values())
            row[3] += endpoint.listeners
        for column, (name, text) in enumerate(
            (
                ("workers", "Workers of an endpoint."),
                ("queued", "Requests that wait for a worker."),
                ("executing", "Requests that workers have."),
                ("listeners", "Sessions that hear its broadcasts."),
            )
        ):
            family = GaugeMetricFamily(f"broker_endpoint_{name}", text, labels=["endpoint"])
            for label, row in sums.items():
                family.add_metric([label], row[column])
            yield family

    def _links(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        links, lag = self._sources.links, self._sources.lag
        waiting = [link.outbox_bytes for link in links.links]
        yield GaugeMetricFamily("broker_links", "Open sockets of peers.", value=len(waiting))
        yield GaugeMetricFamily("broker_outbox_bytes", "Bytes peers have not taken yet.", value=sum(waiting))
        yield GaugeMetricFamily("broker_outbox_bytes_max", "The fullest outbox.", value=max(waiting, default=0))
        for name in links.counters.__slots__:
            text = f"{name.replace('_', ' ').capitalize()} on all links."
            yield CounterMetricFamily(f"broker_link_{name}", text, value=getattr(links.counters, name))
        yield GaugeMetricFamily("broker_loop_lag_seconds", "How late the event loop was last.", value=lag.last_s)
        yield GaugeMetricFamily("broker_loop_lag_max_seconds", "How late it ever was.", value=lag.max_s)

    @staticmethod
    def _zeromq(door: ZeroMqDoor) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counters = door.counters
        yield GaugeMetricFamily("broker_zeromq_connections", "Connections of its sockets.", value=door.connections)
        yield GaugeMetricFamily("broker_zeromq_peers", "Peers that have sent a valid message.", value=door.peers)
        yield GaugeMetricFamily("broker_zeromq_topics", "Topics SUB sockets listen to.", value=door.topics)
        refused = CounterMetricFamily("broker_zeromq_refused", "Messages refused, by cause.", labels=["cause"])
        for name, count in counters.refused.items():
            refused.add_metric([name], count)
        yield refused
        text = "Connections, by what became of them."
        handshakes = CounterMetricFamily("broker_zeromq_handshakes", text, labels=["result"])
        for name, count in counters.handshakes.items():
            handshakes.add_metric([name], count)
        yield handshakes
        for name, text, count in (
            ("evicted", "Connections ended by the broker.", counters.evicted),
            ("heartbeats", "Heartbeats echoed.", counters.heartbeats),
            ("published", "Broadcasts given to the XPUB socket.", counters.published),
            ("published_dropped", "Broadcasts it had no room for.", counters.published_dropped),
            ("subscriptions_refused", "Subscriptions of SUB sockets refused.", counters.subscriptions_refused),
        ):
            yield CounterMetricFamily(f"broker_zeromq_{name}", text, value=count)

    def _doors(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        door = CounterMetricFamily("broker_door", "Requests at the door, by what became of them.", labels=["result"])
        for name in self._sources.auth.__slots__:
            door.add_metric([name], getattr(self._sources.auth, name))
        yield door
        acceptor = self._sources.acceptor()
        if acceptor is not None:
            yield GaugeMetricFamily(
                "broker_unauthenticated", "Sockets nobody has authenticated on.", value=acceptor.unauthenticated
            )
            for name in acceptor.counters.__slots__:
                text = f"{name.replace('_', ' ').capitalize()} at the listening sockets."
                yield CounterMetricFamily(f"broker_accept_{name}", text, value=getattr(acceptor.counters, name))


def may_see_metrics(principal: Principal) -> bool:
    """Metrics name all endpoints: they are for administrators and for whoever has a role at all of them."""
    return is_admin(principal.grants) or any("*" in grant.endpoints for grant in principal.grants)


class MetricsHandler(Door):
    """`GET /metrics`."""

    sources: Sources

    def get(self) -> None:
        """The metrics, for those who may see every endpoint."""
        principal = self.authenticate()
        if not may_see_metrics(principal):
            raise Refused(403, "metrics are for administrators and for tokens with a role at every endpoint (*)")
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_LATEST

        registry = CollectorRegistry(auto_describe=False)
        registry.register(Collector(self.sources))
        self.set_header("Content-Type", CONTENT_TYPE_LATEST)
        self.finish(generate_latest(registry))
