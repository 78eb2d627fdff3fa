"""The base of the handlers of Jupyter's paths: where their clients put the token, and how refusals read to them."""

from __future__ import annotations

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

    def authenticate(self) -> Principal:
        """Who is asking. Raises Refused; without a valid credential 403, as Jupyter's clients expect it."""
        try:
            return super().authenticate()
        except Refused as refused:
            if refused.status == 401:
                raise Refused(403, refused.reason) from None
            raise

    def refusal(self, status: int, reason: str) -> bytes:
        """As everywhere, with the member `message` from which Jupyter's clients tell why."""
        return msgspec.json.encode({"message": reason, "error": reason, "status": status})

    def kernel(self, principal: Principal, number: str) -> Endpoint:
        """The endpoint of a kernel. Raises Refused 403 for who may not call it, 404 if nobody serves it."""
        name = PREFIX + number
        if not is_name(name):
            raise Refused(404, f"no kernel can be called {number[:128]!r}")
        if not roles_at(principal.grants, name) & Role.CALLER:
            raise Refused(403, f"{principal.name} may not be caller at {name}")
        endpoint = self.engine.router.registry.by_name.get(name)
        if endpoint is None or not endpoint.registrations:
            raise Refused(404, f"no worker serves {name}: there is no such kernel now")
        return endpoint

    def kernels(self, principal: Principal) -> list[Endpoint]:
        """The kernels that are served, and that somebody may call."""
        return [
            endpoint
            for name, endpoint in self.engine.router.registry.by_name.items()
            if name.startswith(PREFIX) and endpoint.registrations and roles_at(principal.grants, name) & Role.CALLER
        ]
