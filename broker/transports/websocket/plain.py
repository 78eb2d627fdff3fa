"""The door for WebSockets that are opened in the plainest way, with a token, without tornado's HTTP server.

It only ever accepts: what is not plain, or would be refused, is left untouched to the HTTP server, whose handler judges
it by the same rules and answers. An accepted connection costs 138 µs this way, and 361 by the HTTP server.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from broker.auth.admission import check_room
from broker.auth.door import Gate
from broker.auth.facts import Refused, RequestFacts
from broker.config.model import Limits
from broker.core.access import Principal
from broker.engine.engine import Engine
from broker.links.handshake import Refusal, Upgrade, check_upgrade, choose_subprotocol, switching_protocols
from broker.links.loop import LoopLinks
from broker.links.opening import OpeningRequest, read_opening
from broker.links.take import own, written
from broker.transports.websocket.attach import check_role, welcome
from broker.transports.websocket.query import Attachment, read_attachment

_PLACE = "ws"
_SUBPROTOCOLS = ((), ("jsonrpc",))
"""others are credentials, or sessions to go on with"""


class PlainDoor:
    """Opens WebSockets for an acceptor; `opens` is what it asks."""

    def __init__(self, engine: Engine, links: LoopLinks, gate: Gate, limits: Callable[[], Limits]) -> None:
        self.engine = engine
        self.links = links
        self.gate = gate
        self.limits = limits
        self._opening: set[asyncio.Task[None]] = set()

    def opens(self, connection: socket.socket, address: tuple[object, ...], data: bytes) -> bool:
        """Whether a peer is attached, or about to be, by these first bytes; if not, they are still unread.

        `connection` does not block; it is the door's if that is so.
        """
        host = str(address[0]) if address else ""
        if not host or "%" in host or self.gate.asks_program:  # a Unix socket; an address with a zone
            return False
        request = read_opening(data)
        if request is None:
            return False
        place, slash, endpoint = request.path[1:].partition("/")
        upgrade = check_upgrade("GET", request)
        if place != _PLACE or (slash and not endpoint) or isinstance(upgrade, Refusal):
            return False
        if upgrade.subprotocols not in _SUBPROTOCOLS:
            return False
        try:
            found = self._judge(request, host, endpoint)
        except Refused:
            found = None
        if found is not None:
            connection.recv(len(data))  # it was only looked at
            task = self.engine.loop.create_task(self._open(connection, address, upgrade, *found, endpoint))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        return found is not None

    def _judge(self, request: OpeningRequest, host: str, endpoint: str) -> tuple[Principal, Attachment] | None:
        """Who comes, and as what. None if the HTTP server has to look; Refused, where it will say so."""
        attachment = read_attachment(endpoint, request.query)
        headers = tuple(request.headers.items())
        remote, secure = self.gate.proxies.client_of(host, False, headers)
        facts = RequestFacts(
            method="GET", path=request.path, headers=headers, query=request.query, remote=remote, secure=secure
        )
        authenticator = self.gate.authenticator
        principal = authenticator.recognise(facts)
        if principal is None or "ticket" in dict(request.query):
            return None
        check_role(principal, endpoint, attachment.role)
        check_room(self.engine, self.limits())
        authenticator.recognised()
        return principal, attachment

    async def _open(
        self,
        connection: socket.socket,
        address: tuple[object, ...],
        upgrade: Upgrade,
        principal: Principal,
        attachment: Attachment,
        endpoint: str,
    ) -> None:
        response = switching_protocols(upgrade.key, choose_subprotocol(upgrade.subprotocols))
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = await own(connection, response, self.links, remote=written(address))
        except OSError:
            connection.close()
            return  # gone before it was attached
        welcome(self.engine, self.gate.authenticator, link, principal, endpoint, attachment, None, self.limits())
