"""`KernelsWorker`: starts kernels for who asks, and serves each under an endpoint of its own."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

from broker.core.access import is_name
from broker.peer.errors import BrokerError
from broker.worker.faults import BAD_PARAMS, Fault
from broker.worker.kernel.process import KernelError, Started, find_specs_aside
from broker.worker.kernel.worker import GRACE_S, KernelWorker
from broker.worker.worker import Worker

log = logging.getLogger("broker.worker")

KERNELS_MAX = 16
"""kernels at once"""
START_DEADLINE_S = 120.0
"""of requests here: a kernel may take a minute until it answers"""


class KernelsWorker(Worker):
    """Serves `specs`, `start`, `list` and `stop` under an endpoint; each kernel is served as `ENDPOINT.ID`.

    `kernels_max` is how many kernels it has at a time; the next is refused. The other arguments are those of `Worker`.
    All kernels end with it. Its token has to grant the role of a worker at `ENDPOINT` and at `ENDPOINT.*`.
    """

    def __init__(
        self, endpoint: str = "kernels", url: str | None = None, token: str | None = None, *, name: str = "",
        kernels_max: int = KERNELS_MAX, default: str = "python3", grace: float = GRACE_S, wait: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(endpoint, url, token, name=name, grace=grace, wait=wait, deadline=START_DEADLINE_S)
        self.kernels: dict[str, KernelWorker] = {}
        self._kernels_max = kernels_max
        self._default = default
        self._url, self._token = url, token
        self._grace = grace
        self._starting: set[str] = set()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self.info = {"dialect": "jupyter-kernels"}
        self.add(self.specs)
        self.add(self.begin, "start")
        self.add(self.list)
        self.add(self.end, "stop")  # `start` and `stop` of a worker are its own

    async def specs(self) -> dict[str, Any]:
        """`{default, kernelspecs: {NAME: {name, spec, resources}}}`: what can be started."""
        found = await _specs()
        specs = {name: {"name": name, "spec": one["spec"], "resources": {}} for name, one in found.items()}
        return {"default": self._default if self._default in specs else next(iter(specs), ""), "kernelspecs": specs}

    async def begin(self, name: str | None = None, id: str | None = None) -> dict[str, Any]:
        """Start a kernel, wait until it answers and is served, and return it as `list` does.

        `name` is a kernelspec's; the endpoint is this one's name, a dot, and `id`, by default drawn at random.
        """
        number = id or str(uuid.uuid4())  # jupyter_server has no path for ids of another form
        endpoint = f"{self.endpoint}.{number}"
        if not is_name(endpoint):
            raise Fault(f"id {number[:80]!r} makes no name of an endpoint", code=BAD_PARAMS)
        if number in self.kernels or number in self._starting:
            raise _fault("KernelExists", f"there is a kernel {number} already")
        if len(self.kernels) + len(self._starting) >= self._kernels_max:
            text = f"{self._kernels_max} kernels run here, as many as may; stop one"
            raise Fault(text, data={"type": "KernelsMax", "message": text}, retryable=True)
        self._starting.add(number)
        try:
            process = Started(name or self._default)
            worker = KernelWorker(endpoint, process, self._url, self._token, name=self.name, grace=self._grace)
            await worker.start()
        except KernelError as error:
            raise _fault("KernelError", str(error)) from None
        except BrokerError as error:
            raise _fault("KernelError", f"the kernel was started but cannot be served as {endpoint}: {error}") from None
        finally:
            self._starting.discard(number)
        self.kernels[number] = worker
        self._leaving[number] = asyncio.get_running_loop().create_task(self._forget(number, worker))
        return await self._view(number, worker)

    async def list(self) -> list[dict[str, Any]]:
        """The kernels that run here: `{id, endpoint, name, execution_state, …}` each, as `state` tells."""
        return [await self._view(number, worker) for number, worker in self.kernels.items()]

    async def end(self, id: str) -> None:
        """End a kernel that was started here, and serve it no more."""
        worker = self.kernels.get(id)
        if worker is None:
            raise _fault("NoKernel", f"no kernel {id[:80]!r} was started here; {self.endpoint}.ID/shutdown ends any")
        worker.drain = 0.0  # taken from the broker first, so that nobody asks it any more; cells are not waited for
        await worker.stop()

    async def stop(self, *, now: bool = False) -> None:
        """Go, and end all kernels."""
        await super().stop(now=now)
        for task in self._leaving.values():
            task.cancel()
        await asyncio.gather(*(worker.stop(now=now) for worker in self.kernels.values()), return_exceptions=True)
        self.kernels.clear()

    async def _view(self, number: str, worker: KernelWorker) -> dict[str, Any]:
        return {"id": number, "endpoint": worker.endpoint, **await worker.state()}

    async def _forget(self, number: str, worker: KernelWorker) -> None:
        """Once a kernel's worker has ended, by whatever, it is none of ours any more."""
        try:
            await worker.wait()
        except BrokerError as error:
            log.warning("kernel %s: %s", number, error)
            await worker.stop(now=True)
        self.kernels.pop(number, None)
        self._leaving.pop(number, None)


async def _specs() -> dict[str, dict[str, Any]]:
    try:
        return await find_specs_aside()
    except KernelError as error:
        raise _fault("KernelError", str(error)) from None


def _fault(kind: str, text: str) -> Fault:
    return Fault(text, data={"type": kind, "message": text})
