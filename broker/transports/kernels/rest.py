"""Jupyter's REST interface to kernels: which there are, start, interrupt, restart and end them.

As `jupyter_server` has it (petstore.swagger.io with jupyter_server's `services/api/api.yaml`), where a kernel is an
endpoint `kernels.ID` that a worker serves.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from broker._version import VERSION
from broker.auth.facts import Refused
from broker.core.access import Principal
from broker.core.errors import DENIED, NO_ENDPOINT, NO_METHOD, NO_WORKER
from broker.core.registry import Endpoint
from broker.transports.kernels.asker import Asker, Failed
from broker.transports.kernels.door import OFFERING, KernelDoor
from broker.transports.kernels.models import info_of, kernel_model, specs_model

STATE_S = 2.0
"""how long a kernel's worker may take to tell its state, before it is told to be unknown"""
_NOBODY_OFFERS = (NO_ENDPOINT, NO_METHOD, NO_WORKER)


class StartParams(msgspec.Struct):
    """The body of `POST /api/kernels`; where and with which environment is the worker's affair."""

    name: str | None = None


class RestDoor(KernelDoor):
    """A path of kernels."""

    async def model(self, asker: Asker, endpoint: Endpoint) -> dict[str, Any]:
        """A kernel as it is now."""
        try:
            state = await asker.ask(endpoint.name, "state", timeout_s=STATE_S)
        except Failed:
            state = {}
        connections = self.front_ends.connections(endpoint.name)
        return kernel_model(endpoint, state if isinstance(state, dict) else {}, connections)

    async def do(self, number: str, method: str) -> dict[str, Any]:
        """Have a kernel's worker do something; the kernel as it is after a restart."""
        principal = self.authenticate()
        endpoint = self.kernel(principal, number)
        with Asker(self, principal) as asker:
            try:
                await asker.ask(endpoint.name, method)
            except Failed as failed:
                raise failed.refused() from None
            return await self.model(asker, endpoint) if method == "restart" else {}


class VersionHandler(KernelDoor):
    """`GET /api`: clients look whether there is anybody."""

    def get(self) -> None:
        """The version, of the broker."""
        self.authenticate()
        self.answer({"version": VERSION})


class SpecsHandler(RestDoor):
    """`GET /api/kernelspecs` and `/api/kernelspecs/{name}`."""

    async def get(self, name: str = "") -> None:
        """What can be started, and what runs."""
        principal = self.authenticate()
        specs = specs_model(await self._offered(principal), [info_of(each) for each in self.kernels(principal)])
        if not name:
            self.answer(specs)
        elif name in specs["kernelspecs"]:
            self.answer(specs["kernelspecs"][name])
        else:
            raise Refused(404, f"there is no kernelspec {name[:128]!r}")

    async def _offered(self, principal: Principal) -> dict[str, Any]:
        with Asker(self, principal) as asker:
            try:
                offered = await asker.ask(OFFERING, "specs")
            except Failed as failed:
                if failed.end.outcome.kind in (*_NOBODY_OFFERS, DENIED):
                    return {}  # kernels that run can be used all the same
                raise failed.refused() from None
        return offered if isinstance(offered, dict) else {}


class KernelsHandler(RestDoor):
    """`GET` and `POST /api/kernels`."""

    async def get(self) -> None:
        """The kernels that the caller may use."""
        principal = self.authenticate()
        with Asker(self, principal) as asker:
            models = await asyncio.gather(*(self.model(asker, each) for each in self.kernels(principal)))
        self.answer(models)

    async def post(self) -> None:
        """Have a worker start one: 201, or 501 if no worker offers to."""
        principal = self.authenticate()
        try:
            params = msgspec.json.decode(self.request.body or b"{}", type=StartParams)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON object with a name: {error}") from None
        with Asker(self, principal) as asker:
            try:
                started = await asker.ask(OFFERING, "start", {"name": params.name} if params.name else {})
            except Failed as failed:
                if failed.end.outcome.kind in _NOBODY_OFFERS:
                    text = "no worker starts kernels here; `broker work kernels` does, where they are to run"
                    raise Refused(501, text) from None
                raise failed.refused() from None
            number = str(started.get("id", "")) if isinstance(started, dict) else ""
            model = await self.model(asker, self.kernel(principal, number))
        self.set_header("Location", f"{self.gate.path}api/kernels/{number}")
        self.answer(model, 201)


class KernelHandler(RestDoor):
    """`GET` and `DELETE /api/kernels/{id}`."""

    async def get(self, number: str) -> None:
        """One kernel."""
        principal = self.authenticate()
        endpoint = self.kernel(principal, number)
        with Asker(self, principal) as asker:
            self.answer(await self.model(asker, endpoint))

    async def delete(self, number: str) -> None:
        """End it."""
        await self.do(number, "shutdown")
        self.set_status(204)
        self.finish()


class InterruptHandler(RestDoor):
    """`POST /api/kernels/{id}/interrupt`."""

    async def post(self, number: str) -> None:
        """Interrupt what it is doing."""
        await self.do(number, "interrupt")
        self.set_status(204)
        self.finish()


class RestartHandler(RestDoor):
    """`POST /api/kernels/{id}/restart`."""

    async def post(self, number: str) -> None:
        """Another process in its place."""
        self.answer(await self.do(number, "restart"))
