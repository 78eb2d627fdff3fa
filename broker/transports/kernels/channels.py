"""`/api/kernels/{id}/channels`: the opening of a front end's WebSocket, judged before the 101."""

from __future__ import annotations

from broker.auth.facts import Refused
from broker.core.errors import DRAINED, UNAUTHORISED
from broker.links.handshake import Refusal, check_upgrade, choose_subprotocol, switching_protocols
from broker.links.loop import LoopLinks
from broker.links.session import new_id
from broker.links.take import take
from broker.transports.kernels.door import KernelDoor
from broker.transports.kernels.front_end import LegacyDialect, V1Dialect
from broker.transports.kernels.front_ends import key_of
from broker.wire.kernel import V1

SESSION_MAX = 128
"""characters of a front end's session id"""


class ChannelsHandler(KernelDoor):
    """A front end at one kernel. The order of refusal: Host, Origin, credential, request, role, kernel, bounds."""

    links: LoopLinks

    async def get(self, number: str) -> None:
        """Connect a front end, or refuse it with 400, 403, 404, 421, 426 or 503.

        `session_id` in the query names its session: a second link of it replaces the first, and one that comes back
        hears what was said meanwhile. Other parameters are ignored; front ends add some against caches.
        """
        principal = self.authenticate()
        upgrade = check_upgrade(self.request.method or "", self.request.headers, self.request.version)
        if isinstance(upgrade, Refusal):
            raise Refused(upgrade.status, upgrade.reason, upgrade.headers)
        endpoint = self.kernel(principal, number)
        if endpoint.limits.closed:
            raise Refused(403, endpoint.why_closed)
        key = key_of(principal, endpoint.name, self._session())
        if self.front_ends.find(key) is None:
            self.check_room()
        stream = self.detach()
        subprotocol = choose_subprotocol(upgrade.subprotocols, (V1,))
        try:
            link = await take(stream, switching_protocols(upgrade.key, subprotocol), self.links)
        except OSError:
            return  # gone before it was attached, or no file descriptor was left: the stream is closed already
        if self.engine.router.draining:
            self.turn_away(link, DRAINED, "the broker is shutting down")
        elif not self.gate.authenticator.still_holds(principal):  # it ended while this waited: nobody else would notice
            self.turn_away(link, UNAUTHORISED, "the credential has ended")
        else:
            dialect = V1Dialect() if subprotocol else LegacyDialect()
            self.front_ends.connect(key, link, dialect, principal, self.credential(principal))

    def _session(self) -> str:
        given = self.facts.parameter("session_id")
        if len(given) > 1 or any(len(session) > SESSION_MAX for session in given):
            raise Refused(400, f"session_id is given once, with at most {SESSION_MAX} characters")
        return given[0] if given and given[0] else new_id()
