"""The base of the handlers of Jupyter's paths: where their clients put the token, and how refusals read to them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from broker.auth.admission import Admission
from broker.auth.authenticate import JUPYTER_READERS
from broker.auth.facts import Refused
from broker.core.access import Principal, Role, is_name, roles_at
from broker.core.registry import Endpoint
from broker.transports.kernels.front_ends import FrontEnds

OFFERING = "kernels"
"""the endpoint whose workers start kernels"""
PREFIX = f"{OFFERING}."
"""what the endpoint of every kernel begins with; the rest is its id"""


class KernelDoor(Admission):
    """A handler of Jupyter's paths."""

    readers = JUPYTER_READERS
    front_ends: FrontEnds
    hung_up: Callable[[], None] | None = None
    """told when the client has"""

    def authenticate(self) -> Principal:
        """Who is asking. Raises Refused; without a valid credential 403, as Jupyter's clients expect it."""
        try:
            return super().authenticate()
        except Refused as refused:
            if refused.status == 401:
                raise Refused(403, refused.reason) from None
            raise

    def on_connection_close(self) -> None:
        """The client hung up: nobody waits for what it asked."""
        super().on_connection_close()
        if self.hung_up is not None:
            self.hung_up()

    def refusal(self, status: int, reason: str) -> bytes:
        """As everywhere, with the member `message` from which Jupyter's clients tell why."""
        return msgspec.json.encode({"message": reason, "error": reason, "status": status})

    def kernel(self, principal: Principal, number: str) -> Endpoint:
        """The endpoint of a kernel. Raises Refused 403 for who may not call it, 404 if nobody serves it."""
        name = PREFIX + number
        if not is_name(name):
            raise Refused(404, f"no kernel can be called {number[:128]!r}")
        self.check_caller(principal, name)
        endpoint = self.engine.router.registry.by_name.get(name)
        if endpoint is None or not endpoint.registrations:
            raise Refused(404, f"no worker serves {name}: there is no such kernel now")
        return endpoint

    @staticmethod
    def check_caller(principal: Principal, name: str) -> None:
        """Raises Refused 403 for who may not call an endpoint."""
        if not roles_at(principal.grants, name) & Role.CALLER:
            raise Refused(403, f"{principal.name} may not be caller at {name}")

    def kernels(self, principal: Principal) -> list[Endpoint]:
        """The kernels that are served, and that somebody may call."""
        return [
            endpoint
            for name, endpoint in self.engine.router.registry.by_name.items()
            if name.startswith(PREFIX) and endpoint.registrations and roles_at(principal.grants, name) & Role.CALLER
        ]
