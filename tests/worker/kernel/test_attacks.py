"""What callers, and code in the kernel, may do to a kernel's worker: each refused or bounded, and nobody else hurt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import zmq

from broker.client.async_client import AsyncClient
from broker.links.session import Session
from broker.peer.errors import Cancelled, RemoteError
from broker.worker.faults import BAD_PARAMS
from broker.worker.kernel import kernel as kernels
from broker.worker.kernel.worker import KernelWorker
from broker.worker.requests import Request
from tests.peer.harness import run, until
from tests.worker.kernel.harness import ENDPOINT, execute_content, header, kernel_running, outputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")

LONG = "import time\nprint('begun', flush=True)\nfor _ in range(6000): time.sleep(0.01)"
SILENT = """
def held(status, channel, parent=None, publish=get_ipython().kernel._publish_status):
    if status != "idle" or channel != "shell":
        publish(status, channel, parent)
get_ipython().kernel._publish_status = held
"""


async def running(client: AsyncClient) -> asyncio.Task[Any]:
    """A cell that takes a minute, and has begun."""
    stream = await client.stream(f"{ENDPOINT}/execute", {"code": LONG}, timeout=None)
    assert (await anext(stream))["text"] == "begun\n"

    async def ended() -> Any:
        async with stream:
            async for _ in stream:
                pass
        return stream.result

    return asyncio.create_task(ended())


def test_messages_that_are_none_are_refused_by_the_name_of_what_is_wrong() -> None:
    good = header(1, "execute_request")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"header": None}, "header is no object"),
        ({"header": 5}, "header is no object"),
        ({"header": {"msg_type": "shutdown_request"}, "content": {}}, "header.msg_id"),
        ({"header": good | {"msg_id": "x" * 257}}, "header.msg_id"),
        ({"header": header(1, "shutdown_request"), "content": "x"}, "content is no object"),
        ({"header": good, "content": [1]}, "content is no object"),
        ({"header": good, "parent_header": 1}, "parent_header is no object"),
        ({"header": good, "metadata": []}, "metadata is no object"),
        ({"header": good, "buffers": ["x"]}, "buffers is no list"),
    ]

    async def main() -> None:
        async with kernel_running() as (_, client):
            for params, named in bad:
                for method in ("shell", "control"):
                    with pytest.raises(RemoteError, match=named) as refused:
                        await client.call(f"{ENDPOINT}/{method}", params)
                    assert refused.value.code == BAD_PARAMS
            assert (await outputs(client, "1"))[1]["execution_count"] == 1, "nothing of it has reached the kernel"

    run(main)


def test_interrupt_and_shutdown_may_come_over_the_shell_too() -> None:
    """ipykernel takes both there: the one would interrupt nothing but itself, the other would look like its death."""

    async def main() -> None:
        async with kernel_running() as (worker, client):
            cell = await running(client)
            reply = await client.call(f"{ENDPOINT}/shell", {"header": header(1, "interrupt_request")})
            assert (reply["header"]["msg_type"], reply["content"]) == ("interrupt_reply", {"status": "ok"})
            with pytest.raises(RemoteError, match="KeyboardInterrupt"):
                await cell
            restart = {"header": header(2, "shutdown_request"), "content": {"restart": True}}
            reply = await client.call(f"{ENDPOINT}/shell", restart)
            assert reply["parent_header"]["msg_id"] == "front_2"
            assert reply["content"] == {"status": "ok", "restart": True}
            assert (await outputs(client, "1"))[1]["execution_count"] == 1
            assert worker.kernel.died == 0

    run(main)


@pytest.mark.parametrize("bound", ["ASKED_MAX", "ASKED_MAX_BYTES"])
def test_cells_that_are_sent_and_cancelled_do_not_pile_up_in_the_kernel(
    monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(kernels, bound, 3 if bound == "ASKED_MAX" else 1300)

    async def main() -> None:
        async with kernel_running() as (worker, client):
            cell = await running(client)
            for waiting in (2, 3):
                behind = asyncio.create_task(client.call(f"{ENDPOINT}/execute", {"code": "1"}))
                await until(lambda waiting=waiting: worker.kernel.waiting == waiting, "it waits")  # type: ignore[misc]
                behind.cancel()
                with pytest.raises((asyncio.CancelledError, Cancelled)):
                    await behind
                if bound != "ASKED_MAX" and waiting == 2:
                    break
            with pytest.raises(RemoteError, match="requests wait at the kernel") as refused:
                await client.call(f"{ENDPOINT}/execute", {"code": "2" * 1000})
            assert (refused.value.type, refused.value.retryable) == ("KernelBusy", True)
            await client.call(f"{ENDPOINT}/interrupt")
            with pytest.raises(RemoteError, match="KeyboardInterrupt"):
                await cell
            await until(lambda: not worker.kernel.waiting, "nothing waits")
            assert (await outputs(client, "'alive'"))[1]["status"] == "ok"

    run(main)


def interrupts(worker: KernelWorker, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Notes when the kernel is interrupted."""
    made: list[None] = []
    interrupt = worker.kernel.interrupt

    async def noted() -> None:
        made.append(None)
        await interrupt()

    monkeypatch.setattr(worker.kernel, "interrupt", noted)
    return made


def test_a_cell_that_has_replied_is_not_interrupted_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel runs then is somebody else's."""

    async def main() -> None:
        async with kernel_running() as (worker, client):
            made = interrupts(worker, monkeypatch)
            message = {"header": header(1, "execute_request"), "content": execute_content(SILENT), "iopub": True}
            async with await client.stream(f"{ENDPOINT}/shell", message, timeout=None) as stream:
                async for item in stream:
                    if item["channel"] == "shell":
                        break
            await until(lambda: not worker.kernel.waiting, "nothing waits")
            assert not made

    run(main)


def test_a_cell_whose_outputs_cannot_be_sent_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unsendable(_self: Request, _item: object) -> None:
        raise ValueError("an item that cannot be sent")

    async def main() -> None:
        async with kernel_running() as (worker, client):
            monkeypatch.setattr(Request, "send", unsendable)
            made = interrupts(worker, monkeypatch)
            with pytest.raises(RemoteError, match="cannot be sent"):
                await client.call(f"{ENDPOINT}/execute", {"code": LONG})
            await until(lambda: made and not worker.kernel.waiting, "it is interrupted")

    run(main)


def test_who_is_not_the_kernel_is_not_heard() -> None:
    """Something else listens at one of the ports and says what the kernel would: it has not the key."""

    async def main() -> None:
        async with kernel_running() as (worker, client):
            sockets = worker.kernel._sockets
            assert sockets is not None
            with zmq.Context() as context, context.socket(zmq.ROUTER) as pretended:
                pretended.linger = 0
                port = pretended.bind_to_random_port("tcp://127.0.0.1")
                shell = sockets._channels["shell"]
                shell._socket.connect(f"tcp://127.0.0.1:{port}")
                forged = Session(b"another key")
                pretended.set(zmq.ROUTER_MANDATORY, 1)

                def say() -> bool:
                    try:
                        forged.send(pretended, "execute_reply", {"status": "ok"}, identities=sockets._identity)
                    except zmq.ZMQError:
                        return False
                    return True

                await until(say, "connected")
                await until(lambda: shell.refused == 1, "refused")
                shell._socket.disconnect(f"tcp://127.0.0.1:{port}")
            assert (await client.call(f"{ENDPOINT}/state"))["execution_state"] in ("starting", "idle", "busy")

    run(main)
