"""A kernel behind the broker as if it ran here: Jupyter's own clients, at their local sockets."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupyter_client
import pexpect
import pytest

from broker.auth.connection_files import write_connection_file
from broker.client.kernel_relay import KernelRelay, NoKernel
from broker.worker.kernel import asking
from broker.worker.kernel.kernel import Kernel
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, run, until
from tests.worker.kernel.harness import ENDPOINT, elsewhere, kernel_running, outputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    yield
    with warnings.catch_warnings():  # a BlockingKernelClient makes an event loop and never closes it
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


REVERSE = """
def opened(comm, message):
    comm.send({}, buffers=[bytes(message["buffers"][0])[::-1]])
get_ipython().kernel.comm_manager.register_target("t", opened)
"""


def blocking(path: Path) -> Any:
    client = jupyter_client.BlockingKernelClient(connection_file=str(path))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=20)
    return client


def execute(client: Any, code: str, **more: Any) -> tuple[list[Any], Any]:
    shown: list[Any] = []
    reply = client.execute_interactive(code, output_hook=shown.append, timeout=20, **more)
    return shown, reply["content"]


def test_a_blocking_kernel_client_works_as_with_a_local_kernel(tmp_path: Path) -> None:
    def use(path: Path) -> None:
        client = blocking(path)
        shown, reply = execute(client, "print('hi'); x = input('name? '); x", stdin_hook=lambda _: client.input("bob"))
        assert reply["status"] == "ok"
        assert [one["content"].get("text") for one in shown if one["msg_type"] == "stream"] == ["hi\n"]
        assert [one["content"]["data"] for one in shown if one["msg_type"] == "execute_result"] == [
            {"text/plain": "'bob'"}
        ]
        # Bursts of 500: ipykernel's own XPUB socket holds 1,000 and drops what is more, if its thread is kept waiting.
        shown, _ = execute(client, "import time\nfor i in range(3000): i % 500 or time.sleep(0.1); display(i)")
        numbers = [one["content"]["data"]["text/plain"] for one in shown if one["msg_type"] == "display_data"]
        assert numbers == [str(number) for number in range(3000)], "none is lost, none comes twice"
        shown, reply = execute(client, "1 / 0")
        assert reply["ename"] == "ZeroDivisionError"
        execute(client, REVERSE)
        message = client.session.msg("comm_open", {"comm_id": "1", "target_name": "t", "data": {}})
        client.session.send(client.shell_channel.socket, message, buffers=[b"abc"])
        while (told := client.get_iopub_msg(timeout=20))["msg_type"] != "comm_msg":
            pass
        assert [bytes(buffer) for buffer in told["buffers"]] == [b"cba"]
        msg_id = client.execute("import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.01)")
        while client.get_iopub_msg(timeout=20)["content"].get("text") != "begun\n":
            pass
        client.session.send(client.control_channel.socket, client.session.msg("interrupt_request", {}))
        assert client.get_control_msg(timeout=20)["content"]["status"] == "ok"
        while (reply := client.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != msg_id:
            pass
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert client.is_alive()
        client.stop_channels()

    async def main() -> None:
        async with kernel_running() as (_, client), KernelRelay(client, ENDPOINT) as relay:
            write_connection_file(tmp_path / "k.json", relay.info)
            await asyncio.to_thread(use, tmp_path / "k.json")

    run(main)


def test_two_front_ends_see_one_kernel_and_its_death_is_told(tmp_path: Path) -> None:
    def use(path: Path, pid: int) -> None:
        one, two = blocking(path), blocking(path)
        execute(one, "y = 'from one'; print(y)")
        while (told := two.get_iopub_msg(timeout=20))["content"].get("text") != "from one\n":
            pass
        assert told["parent_header"]["session"] == one.session.session
        assert execute(two, "y")[0][-2]["content"]["data"]["text/plain"] == "'from one'"
        one.execute("import time; time.sleep(60)")
        while one.get_iopub_msg(timeout=20)["content"].get("code") != "import time; time.sleep(60)":
            pass
        os.kill(pid, signal.SIGKILL)
        reply = one.get_shell_msg(timeout=20)
        while reply["msg_type"] != "execute_reply" or reply["content"]["status"] == "ok":
            reply = one.get_shell_msg(timeout=20)
        assert reply["content"]["ename"] == "KernelDied", "a client that waits does not wait for ever"
        states = set()
        while "restarting" not in states:
            states.add(two.get_iopub_msg(timeout=20)["content"].get("execution_state"))
        assert execute(two, "1")[1]["execution_count"] == 1
        one.stop_channels()
        two.stop_channels()

    async def main() -> None:
        async with kernel_running() as (_, client), KernelRelay(client, ENDPOINT) as relay:
            items, _result = await outputs(client, "import os; os.getpid()")
            write_connection_file(tmp_path / "k.json", relay.info)
            await asyncio.to_thread(use, tmp_path / "k.json", int(items[-1]["data"]["text/plain"]))

    run(main)


SILENT = """
def held(status, channel, parent=None, publish=get_ipython().kernel._publish_status):
    if status != "idle" or channel != "shell":
        publish(status, channel, parent)
get_ipython().kernel._publish_status = held
"""


def test_a_reply_does_not_wait_for_the_kernels_last_word_and_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the last word, that it is idle, never comes at all."""
    monkeypatch.setattr(asking, "TRAILS_S", 1.5)

    def use(path: Path, kernel: Kernel) -> None:
        client = blocking(path)
        client.execute(SILENT)
        msg_id = client.execute("1 + 1")
        while (reply := client.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != msg_id:
            pass
        assert reply["content"]["status"] == "ok"
        assert kernel.waiting, "the request itself waits"
        while kernel.waiting:
            time.sleep(0.05)
        asked = client.kernel_info()
        assert client.get_shell_msg(timeout=20)["parent_header"]["msg_id"] == asked, "it does not come again"
        client.stop_channels()

    async def main() -> None:
        async with kernel_running() as (worker, client), KernelRelay(client, ENDPOINT) as relay:
            write_connection_file(tmp_path / "k.json", relay.info)
            await asyncio.to_thread(use, tmp_path / "k.json", worker.kernel)

    run(main)


def test_broadcasts_that_are_no_messages_end_no_relay(tmp_path: Path) -> None:
    """Who may serve the endpoint may publish there, whatever it likes."""
    junk: list[Any] = [
        5, "x", None, {}, {"header": 1}, {"header": {"msg_type": "status"}}, {"header": {}, "parent_header": 3},
        {"header": {"msg_type": "status"}, "content": []}, {"header": {"msg_type": "stream"}, "n": "x"},
        {"header": {"msg_type": "stream"}, "parent_header": {"msg_id": []}},
    ]  # fmt: skip

    def use(path: Path) -> None:
        client = blocking(path)
        assert execute(client, "1")[1]["status"] == "ok"
        client.stop_channels()

    async def main() -> None:
        async with kernel_running() as (_, client), KernelRelay(client, ENDPOINT) as relay:
            for one in junk:
                assert (await client.publish(ENDPOINT, one, topic="iopub"))["listeners"] >= 1
            write_connection_file(tmp_path / "k.json", relay.info)
            await asyncio.to_thread(use, tmp_path / "k.json")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await relay.wait()

    run(main)


def test_input_is_taken_of_the_client_alone_that_was_asked(tmp_path: Path) -> None:
    def use(path: Path, relay: KernelRelay) -> None:
        one, two = blocking(path), blocking(path)

        def answer(_: Any) -> None:
            refused = relay.refused
            two.input("of another")
            while relay.refused == refused:
                time.sleep(0.005)
            one.input("of mine")

        shown, _ = execute(one, "input('name? ')", stdin_hook=answer)
        results = [each["content"]["data"]["text/plain"] for each in shown if each["msg_type"] == "execute_result"]
        assert results == ["'of mine'"]
        one.input("of nobody")
        one.stop_channels()
        two.stop_channels()

    async def main() -> None:
        async with kernel_running() as (_, client), KernelRelay(client, ENDPOINT) as relay:
            write_connection_file(tmp_path / "k.json", relay.info)
            await asyncio.to_thread(use, tmp_path / "k.json", relay)
            await until(lambda: relay.refused == 2, "what nobody asked for is refused")

    run(main)


def test_what_waits_to_be_passed_on_is_bounded_and_the_next_is_answered(tmp_path: Path) -> None:
    def use(path: Path) -> None:
        client = jupyter_client.BlockingKernelClient(connection_file=str(path))
        client.load_connection_file()
        client.start_channels(iopub=False, hb=False)  # until somebody hears the kernel, requests wait
        asked = [client.kernel_info() for _ in range(5)]
        replies = [client.get_shell_msg(timeout=20) for _ in asked]
        assert {reply["parent_header"]["msg_id"] for reply in replies} == set(asked), "one each"
        names = [reply["content"].get("ename") for reply in replies]
        assert "Overloaded" in names and None in names
        assert {reply["msg_type"] for reply in replies} == {"kernel_info_reply"}
        client.stop_channels()

    async def main() -> None:
        async with kernel_running() as (_, client), KernelRelay(client, ENDPOINT, waiting_max=2) as relay:
            write_connection_file(tmp_path / "k.json", relay.info)
            await asyncio.to_thread(use, tmp_path / "k.json")
            assert relay.refused >= 2

    run(main)


def test_an_interrupt_request_has_its_busy_and_idle(tmp_path: Path) -> None:
    """As from a kernel itself: there are clients that wait for the last word of every request."""

    def words(path: Path) -> list[tuple[str, Any]]:
        client = blocking(path)
        message = client.session.msg("interrupt_request", {})
        client.session.send(client.control_channel.socket, message)
        assert client.get_control_msg(timeout=20)["content"]["status"] == "ok"
        found: list[tuple[str, Any]] = []
        while not found or found[-1][1] != "idle":
            told = client.get_iopub_msg(timeout=20)
            if told["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                found.append((told["msg_type"], told["content"].get("execution_state")))
        client.stop_channels()
        return found

    async def main() -> None:
        async with (
            elsewhere(tmp_path) as (own, _),
            kernel_running() as (_, client),
            KernelRelay(client, ENDPOINT) as relay,
        ):
            write_connection_file(tmp_path / "k.json", relay.info)
            relayed = await asyncio.to_thread(words, tmp_path / "k.json")
            assert relayed == await asyncio.to_thread(words, own)

    run(main)


def test_an_endpoint_that_is_no_kernel_is_refused() -> None:
    async def main() -> None:
        async with broker_running() as broker, kernel_running(broker=broker) as (_, client):
            worker = Worker("kernels.other", broker.url, SECRET)
            worker.add(len, "size")
            async with worker:
                with pytest.raises(NoKernel, match=r"kernels\.other is served by no kernel"):
                    async with KernelRelay(client, "kernels.other"):
                        pass

    run(main)


def test_jupyter_console_uses_what_kernel_connect_writes(tmp_path: Path) -> None:
    path = tmp_path / "console.json"

    def use(url: str) -> None:
        environment = os.environ | {"BROKER_TOKEN": SECRET, "BROKER_URL": url, "TERM": "dumb"}
        command = [sys.executable, "-m", "broker", "kernel", "connect", ENDPOINT, "--connection-file", str(path)]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as connect:
            assert connect.stderr is not None
            assert str(path) in connect.stderr.readline()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            console = pexpect.spawn(
                sys.executable, ["-m", "jupyter_console", "--existing", str(path), "--simple-prompt"],
                env=environment, encoding="utf-8", timeout=30,
            )  # fmt: skip
            console.expect(r"In \[1\]:")
            console.sendline("6 * 7")
            console.expect(r"Out\[1\]: 42")
            console.expect(r"In \[2\]:")
            console.sendline("input('name? ')")
            console.expect("name\\? ")
            console.sendline("bob")
            console.expect("'bob'")
            console.close(force=True)
            connect.send_signal(signal.SIGHUP)  # its terminal was closed
            assert connect.wait(20) == 0
        assert not path.exists(), "what was written is removed"

    async def main() -> None:
        async with kernel_running() as (worker, client):
            await asyncio.to_thread(use, client.url)
            await until(lambda: not worker.executing, "nothing is left at the kernel")

    run(main, timeout_s=55)
