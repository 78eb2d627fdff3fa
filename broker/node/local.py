"""Coming in from the broker's own process: a link in memory in place of a WebSocket, with the same peer behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs

from broker.auth.tokens import local_principal
from broker.core.access import Principal, Role
from broker.core.errors import DRAINED
from broker.core.events import Attached
from broker.links.pair import PairLink, make_pair
from broker.peer.connection import QUERY
from broker.peer.errors import Refused
from broker.transports.websocket.peer import WebSocketPeer
from broker.transports.websocket.query import read_query
from broker.wire.jsonrpc import JsonRpc

if TYPE_CHECKING:
    import asyncio

    from broker.config.model import Config
    from broker.engine.engine import Engine
    from broker.links.loop import LoopLinks

REMOTE = "in process"
_ATTACHMENT = read_query(parse_qs(QUERY))
"""as what the SDK attaches itself over a WebSocket"""


class Home(Protocol):
    """What of a broker is needed to come in."""

    config: Config
    engine: Engine
    links: LoopLinks

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it runs on. Raises RuntimeError before its start."""
        ...


class NearPeer(WebSocketPeer):
    """A peer of this process."""

    __slots__ = ()


class OwnPeer(NearPeer):
    """One by which the broker itself asks and answers for the program around it; nobody's peer."""

    __slots__ = ()


class Local:
    """Who comes in without a socket: given to `Client`, `AsyncClient` or `Worker` in place of a URL.

    Made by `Broker.local`. It may do what its principal may; the bounds and outcomes are those of every peer, but
    that `limits.sessions_max`, in which it counts, does not refuse it.
    """

    def __init__(self, home: Home, principal: Principal | None = None, kind: type[NearPeer] = NearPeer) -> None:
        if principal is not None and not isinstance(principal, Principal):
            raise TypeError(f"the principal is a {type(principal).__name__}; expected a Principal, or None")
        self._home = home
        self._kind = kind
        self.principal = principal or local_principal()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the broker. Raises RuntimeError before its start."""
        return self._home.loop

    def open_link(self, links: LoopLinks) -> PairLink:
        """Attach a peer; the far end of its link. On the broker's loop (else RuntimeError). Raises Refused."""
        home = self._home
        if links.loop is not home.loop:
            raise RuntimeError("the broker runs on another event loop; in other threads use Client(broker)")
        engine = home.engine
        if engine.router.draining:
            raise Refused("the broker is shutting down", code=DRAINED.code)
        number = engine.next_session()
        here, there = make_pair(home.links, links, remote=REMOTE)
        codec = JsonRpc(
            node=engine.router.node, session_id=number, meta=_ATTACHMENT.meta, binary=_ATTACHMENT.binary,
            defaults=_ATTACHMENT.defaults, callers=True,
        )  # fmt: skip
        limits = home.config.limits
        peer = self._kind(engine, here, codec, limits.message_max_bytes, limits.batch_max)
        principal = self.principal
        attached = Attached(
            session=number, link=peer, principal=principal.name, grants=principal.grants, role=Role.CALLER,
            expires_at=engine.moment(principal.expires_at), remote=REMOTE, dialect="jsonrpc",
        )  # fmt: skip
        engine.feed(attached)
        peer.start(engine.router.sessions.by_id[number])
        return there
