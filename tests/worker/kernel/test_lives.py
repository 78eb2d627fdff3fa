"""What outlives what: a restart its caller, a kernel its worker, a secret its process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker.peer import errors
from broker.worker.kernel.offering import KernelsWorker
from broker.worker.kernel.process import KernelError
from tests.peer.harness import SECRET, broker_running, run, until
from tests.worker.kernel.harness import ENDPOINT, kernel_running, outputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")


def test_a_restart_and_a_shutdown_go_on_without_the_caller_who_wanted_them() -> None:
    """Half a restart would be a kernel that answers nobody, for ever."""

    async def main() -> None:
        async with kernel_running() as (worker, client):
            for begun in (lambda: worker.kernel.state == "restarting", lambda: not worker.kernel._connected):
                await until(lambda: worker.kernel.state == "idle", "it is there")
                wanted = asyncio.create_task(client.call(f"{ENDPOINT}/restart"))
                await until(lambda begun=begun, wanted=wanted: begun() or wanted.done(), "it has begun")
                wanted.cancel()
                async with asyncio.timeout(20):
                    assert (await outputs(client, "1"))[1]["execution_count"] == 1, "a new one, and it answers"
            wanted = asyncio.create_task(client.call(f"{ENDPOINT}/shutdown"))
            await until(lambda: worker.kernel.state == "dead" or wanted.done(), "it has begun")
            wanted.cancel()
            await worker.wait()

    run(main)


def test_a_restart_that_is_asked_for_while_it_ends_starts_nothing() -> None:
    async def main() -> None:
        async with kernel_running() as (worker, client):
            ending = asyncio.create_task(client.call(f"{ENDPOINT}/shutdown"))
            await until(lambda: worker.kernel.is_dead or worker.kernel._restarting.locked(), "it has begun")
            with pytest.raises((errors.RemoteError, errors.NoWorker), match=r"ended|no worker"):
                await client.call(f"{ENDPOINT}/restart")
            await ending
            await worker.wait()

    run(main)


def test_code_in_a_kernel_does_not_find_its_workers_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make a worker of every caller."""
    monkeypatch.setenv("BROKER_TOKEN", SECRET)
    monkeypatch.setenv("KEPT", "kept")

    async def main() -> None:
        async with kernel_running() as (_, client):
            items, _ = await outputs(client, "import os; (os.environ.get('BROKER_TOKEN'), os.environ['KEPT'])")
            assert items[-1]["data"]["text/plain"] == "(None, 'kept')"
            await client.call(f"{ENDPOINT}/restart")
            items, _ = await outputs(client, "import os; [v for v in os.environ.values() if v.startswith('local-')]")
            assert SECRET not in items[-1]["data"]["text/plain"]

    run(main)


def test_an_id_that_another_worker_serves_is_refused() -> None:
    """Two kernels at one endpoint would share its callers' cells between them."""

    async def main() -> None:
        async with broker_running() as broker, kernel_running(broker=broker) as (_, client):
            async with KernelsWorker("kernels", broker.url, SECRET) as offering:
                with pytest.raises(errors.RemoteError, match="is served already") as refused:
                    await client.call("kernels/start", {"id": "test"})
                assert refused.value.type == "KernelExists"
                assert not offering.kernels
            assert (await outputs(client, "1"))[1]["execution_count"] == 1

    run(main)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_a_kernel_does_not_outlive_a_worker_that_is_killed(how: signal.Signals) -> None:
    async def main() -> None:
        async with broker_running() as broker:
            environment = os.environ | {"BROKER_URL": broker.url, "BROKER_TOKEN": SECRET}
            command = [sys.executable, "-m", "broker", "work", "kernel", "--endpoint", ENDPOINT, "--grace", "0"]
            from broker.client.async_client import AsyncClient

            async with AsyncClient(broker.url, SECRET, timeout=30) as client:
                with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as worker:
                    items = await client.call(f"{ENDPOINT}/execute", {"code": "import os; os.getpid()"}, wait=True)
                    pid = int(items[0]["data"]["text/plain"])
                    busy = asyncio.create_task(outputs(client, "while True: pass"))
                    await until(lambda: broker.router.pending.count, "it runs")
                    worker.send_signal(how)
                    with pytest.raises((errors.WorkerLost, errors.RemoteError)):
                        await busy
                    await until(lambda: not alive(pid), "it is gone")

    run(main)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_is_ended_while_its_kernel_starts_leaves_none() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            environment = os.environ | {"BROKER_URL": broker.url, "BROKER_TOKEN": SECRET}
            command = [sys.executable, "-m", "broker", "work", "kernel", "--endpoint", ENDPOINT]
            for how in (signal.SIGTERM, signal.SIGINT):
                with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as worker:
                    await until(lambda: children(worker.pid), "its kernel is started")
                    (kernel,) = children(worker.pid)
                    worker.send_signal(how)
                    await asyncio.to_thread(worker.wait, 20)
                    await until(lambda: not alive(kernel), "it is gone")  # noqa: B023

    run(main)


def test_two_kernels_at_one_endpoint_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with broker_running() as broker, kernel_running(broker=broker):
            assert "other worker" not in caplog.text
            async with kernel_running(broker=broker):
                assert f"{ENDPOINT} is served by 1 other worker(s) too" in caplog.text

    run(main)


def test_kernels_that_could_not_be_started_are_not_offered() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            worker = KernelsWorker("kernels", broker.url, SECRET, default="pyton3")
            with pytest.raises(KernelError, match="no kernel named 'pyton3': did you mean python3"):
                await worker.start()
            assert "kernels" not in broker.router.registry.by_name

    run(main)
