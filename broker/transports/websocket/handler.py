"""The opening of a WebSocket: everything is judged before the 101, nothing after it."""

from __future__ import annotations

from broker.auth.admission import Admission
from broker.auth.facts import Refused
from broker.links.handshake import Refusal, check_upgrade, choose_subprotocol, switching_protocols
from broker.links.loop import LoopLinks
from broker.links.take import take
from broker.transports.websocket.attach import check_role, welcome
from broker.transports.websocket.query import read_attachment
from broker.transports.websocket.resume import find_session


class WebSocketHandler(Admission):
    """`/ws` and `/ws/{endpoint}`. The order of refusal: request, Host, Origin, credential, query, role, bounds."""

    links: LoopLinks

    async def get(self, endpoint: str = "") -> None:
        """Attach a peer, or refuse it with 400, 401, 403, 405, 421, 426 or 503."""
        principal = self.authenticate()
        upgrade = check_upgrade(self.request.method or "", self.request.headers, self.request.version)
        if isinstance(upgrade, Refusal):
            raise Refused(upgrade.status, upgrade.reason, upgrade.headers)
        attachment = read_attachment(endpoint, self.facts.query)
        check_role(principal, endpoint, attachment.role)
        resumed = find_session(
            self.engine.router, self.gate.authenticator, upgrade.subprotocols, principal, endpoint, attachment,
            self.facts.remote,
        )  # fmt: skip
        if resumed is None:
            self.check_room()
        stream = self.detach()
        response = switching_protocols(upgrade.key, choose_subprotocol(upgrade.subprotocols))
        try:
            link = await take(stream, response, self.links)
        except OSError:
            return  # gone before it was attached, or no file descriptor was left: the stream is closed already
        welcome(
            self.engine, self.gate.authenticator, link, principal, endpoint, attachment, resumed, self.limits()
        )  # fmt: skip
