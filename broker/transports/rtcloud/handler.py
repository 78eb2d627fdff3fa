"""The opening of an rt-cloud daemon's WebSocket: everything is judged before the 101, nothing after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from broker.auth.admission import Admission
from broker.auth.daemon_sign_in import COOKIE, DaemonSignIn
from broker.auth.facts import Refused
from broker.auth.logins import cookie_values
from broker.core.access import Principal, Role, roles_at
from broker.core.classes import ClassesOf
from broker.core.errors import DRAINED, ENDPOINT_CLOSED, UNAUTHORISED
from broker.core.events import Attached
from broker.core.messages import Body
from broker.links.handshake import Refusal, check_upgrade, switching_protocols
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.links.take import take
from broker.transports.rtcloud.peer import RtCloudPeer
from broker.wire.rtcloud import Bounds, CallIds, RtCloud

INFO = b'{"dialect":"rtcloud"}'
PIECE_MARGIN_BYTES = 64


class RtCloudHandler(Admission):
    """`/wsData` and the other configured paths. The order of refusal: Host, Origin, credential, request, role, bounds.

    `endpoints` maps the last part of the path to the endpoint that is served there, `classes` to what is known of its
    daemons' classes.
    """

    links: LoopLinks
    ids: CallIds
    daemons: DaemonSignIn
    endpoints: Mapping[str, str]
    classes: Mapping[str, ClassesOf]

    async def get(self, name: str) -> None:
        """Attach a daemon, or refuse it with 400, 401, 403, 405, 421, 426, 429 or 503."""
        principal = self.authenticate()
        upgrade = check_upgrade(self.request.method or "", self.request.headers, self.request.version)
        if isinstance(upgrade, Refusal):
            raise Refused(upgrade.status, upgrade.reason, upgrade.headers)
        endpoint = self.endpoints[name]
        if not roles_at(principal.grants, endpoint) & Role.WORKER:
            raise Refused(403, f"{principal.name} may not be worker at {endpoint}")
        self.check_room()
        stream = self.detach()
        try:
            link = await take(stream, switching_protocols(upgrade.key, None), self.links, limits=self._link_limits())
        except OSError:
            return  # gone before it was attached, or no file descriptor was left: the stream is closed already
        router = self.engine.router
        known = router.registry.by_name.get(endpoint)
        if router.draining:
            self.turn_away(link, DRAINED, "the broker is shutting down")
        elif not self.gate.authenticator.still_holds(principal):  # it ended while this waited: nobody else would notice
            self.turn_away(link, UNAUTHORISED, "the credential has ended")
        elif known is not None and known.limits.closed:
            self.turn_away(link, ENDPOINT_CLOSED, known.limits.closed)
        else:
            self._attach(link, principal, endpoint, self.classes.get(name))

    def authenticate(self) -> Principal:
        """Who is asking: by the program's own authentication, by the cookie `login`, else as on all other paths.

        The program comes first, as its own login, too, may set a cookie of that name: rt-cloud's does. Raises Refused.
        """
        values = cookie_values(self.facts, COOKIE)
        if not values:
            return super().authenticate()
        principal = self.gate.ask_program(self.request, self.facts) or self._by_cookie(values)
        if self.gate.acceptor is not None:
            self.gate.acceptor.authenticated(self.stream)
        return principal

    def _by_cookie(self, values: tuple[str, ...]) -> Principal:
        authenticator = self.gate.authenticator
        authenticator.check_door(self.facts)
        if len(values) > 1:
            raise Refused(400, f"more than one cookie {COOKIE}")
        if not self.facts.header("origin"):  # with one, `check_door` has compared it
            raise Refused(
                403, "the cookie counts only with Origin, so that no other page's request is taken for one's own"
            )
        return authenticator.authenticate_login(self.facts, self.daemons.read(values[0]))

    def _link_limits(self) -> LinkLimits:
        """A large request may wait in the outbox without costing the daemon its pongs, and so the link."""
        limits = self.links.limits
        soft = max(limits.outbox_soft_bytes, limits.message_max_bytes)
        return dataclasses.replace(
            limits, outbox_soft_bytes=soft, outbox_hard_bytes=max(limits.outbox_hard_bytes, 2 * soft)
        )

    def _attach(self, link: Link, principal: Principal, endpoint: str, classes: ClassesOf | None) -> None:
        limits = self.limits()
        piece_max = min(Bounds().piece_max_bytes, limits.part_max_bytes - PIECE_MARGIN_BYTES)
        codec = RtCloud(self.ids, Bounds(self.links.limits.message_max_bytes, piece_max))
        peer = RtCloudPeer(self.engine, self.links, link, codec)
        session_id = self.engine.next_session()
        self.engine.feed(
            Attached(
                session=session_id,
                link=peer,
                principal=principal.name,
                **self.credential(principal),
                role=Role.WORKER,
                endpoint=endpoint,
                listen=False,
                methods=classes,
                remote=link.remote,
                dialect="rtcloud",
                info=Body(INFO),
            )
        )
        peer.start(self.engine.router.sessions.by_id[session_id])
