"""A real kernel as a worker: what is run, shown, asked for, sent to and fro, interrupted, restarted, and killed."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.client.async_client import AsyncClient
from broker.core.limits import Limits
from broker.peer import errors
from broker.wire.connection_file import ConnectionInfo, parse, render
from broker.worker.kernel.bounds import Bounds
from broker.worker.kernel.process import Attached, KernelError, Started
from broker.worker.kernel.worker import DEADLINE_S, KernelWorker
from tests.peer.harness import SECRET, broker_running, run, until
from tests.worker.kernel.harness import (
    ENDPOINT,
    elsewhere,
    execute_content,
    header,
    heard,
    is_status,
    kernel_running,
    outputs,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_code_runs_and_what_it_shows_comes_in_order() -> None:
    code = """
import sys
from IPython.display import display, clear_output
print("one"); print("two", file=sys.stderr)
handle = display({"image/png": "AAAA", "text/plain": "a picture"}, raw=True, display_id="here")
handle.update({"text/plain": "another"}, raw=True)
clear_output(wait=True)
6 * 7
"""

    async def main() -> None:
        async with kernel_running() as (_, client):
            items, result = await outputs(client, code)
            kinds = [item["type"] for item in items if item["type"] != "stream"]
            assert kinds == ["display_data", "update_display_data", "clear_output", "execute_result"]
            assert {item["name"]: item["text"] for item in items if item["type"] == "stream"} == {
                "stdout": "one\n", "stderr": "two\n",
            }  # fmt: skip
            shown = next(item for item in items if item["type"] == "display_data")
            assert (shown["data"]["image/png"], shown["transient"]) == ("AAAA", {"display_id": "here"})
            assert items[-1]["data"]["text/plain"] == "42"
            assert (result["status"], result["execution_count"]) == ("ok", 1)
            assert await client.call(f"{ENDPOINT}/is_complete", {"code": "for x in y:"}) == {
                "status": "incomplete", "indent": "    ",
            }  # fmt: skip
            assert "handle" in (await client.call(f"{ENDPOINT}/complete", {"code": "hand"}))["matches"]
            assert (await client.call(f"{ENDPOINT}/inspect", {"code": "handle"}))["found"]
            assert (await client.call(f"{ENDPOINT}/history", {"n": 1}))["history"][0][2].strip() == code.strip()
            assert (await client.call(f"{ENDPOINT}/kernel_info"))["language_info"]["name"] == "python"
            assert (await client.call(f"{ENDPOINT}/comm_info"))["comms"] == {}
            info = (await client.describe(ENDPOINT))["workers"][0]["info"]
            assert (info["dialect"], info["kernelspec"]["language"]) == ("jupyter", "python")
            assert info["kernel_info"]["implementation"] == "ipython"
            assert (await client.call(f"{ENDPOINT}/state"))["name"] == "python3"

    run(main)


def test_an_exception_is_the_requests_error_with_its_type_and_traceback() -> None:
    async def main() -> None:
        async with kernel_running() as (_, client):
            with pytest.raises(errors.RemoteError, match="division by zero") as caught:
                await client.call(f"{ENDPOINT}/execute", {"code": "print('before'); 1 / 0"})
            assert (caught.value.code, caught.value.type) == (-32000, "ZeroDivisionError")
            assert any("ZeroDivisionError" in line for line in caught.value.data["traceback"])
            with pytest.raises(errors.RemoteError, match="cursor_pos"):
                await client.call(f"{ENDPOINT}/complete", {"code": "x", "cursor": 1})

    run(main)


def test_the_deadline_is_seven_days_and_no_idle_deadline_bites() -> None:
    """The broker's own are a fraction of the time that the cell takes."""

    async def main() -> None:
        limits = {"limits": {"deadline_s": 0.2, "idle_s": 0.2}}
        async with broker_running(**limits) as broker, kernel_running(broker=broker) as (_, client):
            asked = asyncio.create_task(outputs(client, "import time\nprint(1)\ntime.sleep(1)\n'done'"))
            await until(
                lambda: any(r.state.value == "streaming" for r in broker.router.state.requests()) or asked.done(),
                "it runs",
            )
            (pending,) = [r for r in await client.call("broker.pending") if r["endpoint"] == ENDPOINT]
            assert DEADLINE_S - 60 < pending["left_s"] <= DEADLINE_S
            items, _ = await asked
            assert items[-1]["data"]["text/plain"] == "'done'"
            with pytest.raises(errors.DeadlineExceeded):
                await client.call(f"{ENDPOINT}/execute", {"code": "time.sleep(60)"}, timeout=0.3)
            assert (await outputs(client, "2"))[1]["status"] == "ok", "the cell was interrupted: its time was up"
            assert Limits().deadline_served_max_s == DEADLINE_S

    run(main)


def test_input_is_asked_of_the_caller_whose_request_wants_it() -> None:
    async def main() -> None:
        async with kernel_running() as (_, client):

            async def answer(name: str, number: int) -> Any:
                message = {
                    "header": header(number, "execute_request"),
                    "content": execute_content(f"x = input('{name}? '); x"),
                }
                async with await client.stream(f"{ENDPOINT}/shell", message | {"iopub": True}, timeout=None) as stream:
                    result = None
                    async for item in stream:
                        if item["channel"] == "stdin":
                            assert (item["header"]["msg_type"], item["content"]["prompt"]) == (
                                "input_request",
                                f"{name}? ",
                            )
                            assert item["parent_header"]["msg_id"] == f"front_{number}"
                            reply = {"parent_header": item["header"], "content": {"value": f"I am {name}"}}
                            await client.call(f"{ENDPOINT}/stdin", reply)
                        elif item["header"]["msg_type"] == "execute_result":
                            result = item["content"]["data"]["text/plain"]
                    assert stream.result["parent_header"]["msg_id"] == f"front_{number}"
                    assert stream.result["content"]["status"] == "ok"
                    return result

            assert await asyncio.gather(answer("alice", 1), answer("bob", 2)) == ["'I am alice'", "'I am bob'"]
            with pytest.raises(errors.RemoteError, match="stream: in"):
                await asyncio.to_thread(post, client.url, "execute", {"code": "input()", "allow_stdin": True})
            plain = {"header": header(3, "execute_request"), "content": execute_content("input()")}
            reply = await asyncio.to_thread(post, client.url, "shell", plain)
            assert reply["content"]["ename"] == "StdinNotImplementedError", "nobody could be asked, which it was told"

    run(main)


def post(url: str, method: str, params: dict[str, Any]) -> Any:
    """Ask as curl does: by a caller who takes no items."""
    asked = urllib.request.Request(
        f"{url}/call/{ENDPOINT}/{method}", json.dumps(params).encode(), {"Authorization": f"Bearer {SECRET}"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=20) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise errors.RemoteError(json.load(error)["error"]["message"]) from None


def test_comms_carry_binary_buffers_both_ways() -> None:
    code = """
from ipykernel.comm import Comm
def opened(comm, message):
    @comm.on_msg
    def echo(message):
        comm.send({"got": message["content"]["data"]}, buffers=[bytes(b)[::-1] for b in message["buffers"]])
get_ipython().kernel.comm_manager.register_target("echo", opened)
"""

    async def main() -> None:
        async with kernel_running() as (_, client):
            await outputs(client, code)
            async with await client.subscribe(ENDPOINT, topic="iopub") as messages:
                opened = {
                    "header": header(1, "comm_open"),
                    "content": {"comm_id": "c1", "target_name": "echo", "data": {}},
                }
                assert await client.call(f"{ENDPOINT}/shell", opened) is None, "there is no reply to it"
                sent = {
                    "header": header(2, "comm_msg"), "content": {"comm_id": "c1", "data": {"n": 1}},
                    "buffers": [b"\x00\x01\x02", b"", b"abc" * 100_000],
                }  # fmt: skip
                assert await client.call(f"{ENDPOINT}/shell", sent) is None
                got = await heard(messages, lambda told: told["header"]["msg_type"] == "comm_msg")
                assert got["content"] == {"comm_id": "c1", "data": {"got": {"n": 1}}}
                assert got["buffers"] == [b"\x02\x01\x00", b"", b"cba" * 100_000]
                assert got["parent_header"]["msg_id"] == "front_2"
            assert list((await client.call(f"{ENDPOINT}/comm_info"))["comms"]) == ["c1"]

    run(main)


def test_everybody_hears_the_kernel_and_two_callers_get_their_own() -> None:
    async def main() -> None:
        async with kernel_running() as (_, client), await client.subscribe(ENDPOINT, topic="iopub") as messages:
            first, second = await asyncio.gather(outputs(client, "print('a')"), outputs(client, "print('b')"))
            assert [item["text"] for item in first[0]] == ["a\n"]
            assert [item["text"] for item in second[0]] == ["b\n"]
            texts = []
            while len(texts) < 2:
                told = await heard(messages, lambda told: told["header"]["msg_type"] == "stream")
                texts.append(told["content"]["text"])
            assert sorted(texts) == ["a\n", "b\n"]
            numbers = [told["n"] for told in [await heard(messages, is_status("idle"))]]
            assert numbers[0] > 0

    run(main)


def test_interrupt_and_cancel_reach_the_running_cell() -> None:
    forever = "import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.01)"

    async def main() -> None:
        async with (
            kernel_running() as (worker, client),
            await client.subscribe(ENDPOINT, topic="iopub") as messages,
        ):

            async def begin() -> asyncio.Task[Any]:
                task = asyncio.create_task(outputs(client, forever))
                await heard(messages, lambda told: told["content"].get("text") == "begun\n")
                return task

            interrupted = await begin()
            await client.call(f"{ENDPOINT}/interrupt")
            with pytest.raises(errors.RemoteError) as caught:
                await interrupted
            assert caught.value.type == "KeyboardInterrupt"
            running = await begin()
            queued = asyncio.create_task(outputs(client, "ran = 'all'\nwhile True: time.sleep(0.01)"))
            other = asyncio.create_task(outputs(client, "'another'"))
            await until(lambda: worker.kernel.waiting == 3, "all are at the kernel")
            queued.cancel()
            await until(lambda: worker.executing == 2, "its worker was told")
            assert not running.done(), "who cancels a cell that waits does no harm to the one that runs"
            running.cancel()
            items, _ = await other
            assert items[-1]["data"]["text/plain"] == "'another'", "both were interrupted, and nobody else"
            await until(lambda: worker.kernel.waiting == 0, "nothing is forgotten there")

    run(main)


def test_restart_ends_what_runs_and_begins_anew() -> None:
    async def main() -> None:
        async with (
            kernel_running() as (worker, client),
            await client.subscribe(ENDPOINT, topic="iopub") as messages,
        ):
            await outputs(client, "x = 1")
            asked = asyncio.create_task(outputs(client, "import time; time.sleep(60)"))
            await until(lambda: worker.kernel.state == "busy" and worker.kernel.waiting, "it runs")
            again = asyncio.create_task(client.call(f"{ENDPOINT}/restart"))
            with pytest.raises(errors.RemoteError) as caught:
                await asked
            assert caught.value.type == "KernelRestarted"
            told = await heard(messages, is_status("restarting"))
            assert told["header"]["session"], "the kernel's own"
            late = asyncio.create_task(client.call(f"{ENDPOINT}/execute", {"code": "x"}))
            await again
            with pytest.raises(errors.RemoteError) as caught:
                await late
            assert caught.value.type == "NameError", "asked while it restarted, answered by the new one"

    run(main)


def test_a_kernel_that_is_killed_ends_its_requests_and_is_started_again() -> None:
    async def main() -> None:
        async with (
            kernel_running() as (worker, client),
            await client.subscribe(ENDPOINT, topic="iopub") as messages,
        ):
            asked = asyncio.create_task(
                outputs(client, "import os; print(os.getpid(), flush=True)\nimport time; time.sleep(60)")
            )
            told = await heard(messages, lambda told: told["content"].get("name") == "stdout")
            os.kill(int(told["content"]["text"]), signal.SIGKILL)
            with pytest.raises(errors.RemoteError, match="died while it had this request") as caught:
                await asked
            assert (caught.value.type, caught.value.retryable) == ("KernelDied", False)
            await heard(messages, is_status("restarting"))
            assert (await outputs(client, "1"))[1]["execution_count"] == 1, "a new one"
            assert worker.kernel.died == 1

    run(main)


def test_a_kernel_that_dies_again_and_again_is_dead_until_it_is_restarted() -> None:
    async def main() -> None:
        async with (
            kernel_running(bounds=Bounds(restarts_max=0)) as (_, client),
            await client.subscribe(ENDPOINT, topic="iopub") as messages,
        ):
            with pytest.raises(errors.RemoteError) as caught:
                await outputs(client, "import os; os._exit(1)")
            assert caught.value.type == "KernelDied"
            await heard(messages, is_status("dead"))
            with pytest.raises(errors.RemoteError, match="`restart` starts it again"):
                await outputs(client, "1")
            assert (await client.call(f"{ENDPOINT}/state"))["execution_state"] == "dead"
            await client.call(f"{ENDPOINT}/restart")
            assert (await outputs(client, "1"))[1]["status"] == "ok"

    run(main)


def test_a_front_ends_shutdown_request_is_no_death() -> None:
    async def main() -> None:
        async with kernel_running() as (worker, client):
            asked = {"header": header(1, "shutdown_request"), "content": {"restart": True}}
            reply = await client.call(f"{ENDPOINT}/control", asked)
            assert (reply["header"]["msg_type"], reply["content"]) == (
                "shutdown_reply",
                {"status": "ok", "restart": True},
            )
            assert worker.kernel.died == 0
            await outputs(client, "1")
            asked["content"] = {"restart": False}
            assert (await client.call(f"{ENDPOINT}/control", asked))["content"]["restart"] is False
            await worker.wait()

    run(main)


def test_shutdown_ends_kernel_and_worker() -> None:
    async def main() -> None:
        async with kernel_running() as (worker, client):
            process = worker.kernel.process
            await client.call(f"{ENDPOINT}/shutdown")
            await worker.wait()
            with pytest.raises(errors.NoWorker):
                await client.call(f"{ENDPOINT}/state")
            assert isinstance(process, Started)
            assert process._manager is None

    run(main)


def test_a_kernel_that_runs_is_attached_to_and_left_running(tmp_path: Path) -> None:
    async def main() -> None:
        async with elsewhere(tmp_path) as (path, manager):
            async with kernel_running(Attached(path)) as (_, client):
                await outputs(client, "import time; x = 5")
                asked = asyncio.create_task(outputs(client, "time.sleep(60)"))
                await until(lambda: asked.done() or _.kernel.state == "busy", "it runs")
                await client.call(f"{ENDPOINT}/interrupt")
                with pytest.raises(errors.RemoteError) as caught:
                    await asked
                assert caught.value.type == "KeyboardInterrupt", "by a message"
                with pytest.raises(errors.RemoteError, match="not started here"):
                    await client.call(f"{ENDPOINT}/restart")
            assert await manager.is_alive()
            async with kernel_running(Attached(path)) as (_, client):
                assert (await outputs(client, "x"))[0][-1]["data"]["text/plain"] == "5", "it is the same one"
                async with await client.subscribe(ENDPOINT, topic="iopub") as messages:
                    asked = asyncio.create_task(outputs(client, "time.sleep(60)"))
                    await heard(messages, is_status("busy"))
                    await manager.restart_kernel(now=True)
                    with pytest.raises(errors.RemoteError, match="died while"):
                        await asked
                    await heard(messages, is_status("restarting"))
                with pytest.raises(errors.RemoteError, match="NameError"):
                    await outputs(client, "x")

    run(main, timeout_s=55)


def test_who_asks_an_attached_kernel_that_has_ended_is_not_sent_to_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with elsewhere(tmp_path) as (path, manager), kernel_running(Attached(path)) as (_, client):
            async with await client.subscribe(ENDPOINT, topic="iopub") as messages:
                await manager.shutdown_kernel(now=True)
                await heard(messages, is_status("dead"))
            with pytest.raises(errors.RemoteError, match="whoever started it has to start it again"):
                await outputs(client, "1")

    run(main, timeout_s=55)


def test_connection_files_that_lead_nowhere_are_refused_with_the_reason(tmp_path: Path) -> None:
    nowhere = ConnectionInfo(shell_port=1, iopub_port=2, stdin_port=3, control_port=4, hb_port=5, key="k")

    async def refused(path: Path, says: str) -> None:
        async with broker_running() as broker:
            worker = KernelWorker(ENDPOINT, Attached(path), broker.url, SECRET, bounds=Bounds(attach_s=1.0))
            with pytest.raises(KernelError, match=says):
                await worker.start()

    def write(info: ConnectionInfo) -> Path:
        path = tmp_path / "other.json"
        path.write_bytes(render(info))
        path.chmod(0o600)
        return path

    async def main() -> None:
        await refused(tmp_path / "none.json", "there is no file .*none.json; `jupyter --runtime-dir` says")
        (tmp_path / "text.json").write_text("hello")
        (tmp_path / "text.json").chmod(0o600)
        await refused(tmp_path / "text.json", "this is no connection file")
        await refused(write(nowhere), "no kernel listens at tcp://127.0.0.1:1")
        async with elsewhere(tmp_path) as (path, _):
            info = parse(path.read_bytes())
            await refused(write(msgspec.structs.replace(info, key="another")), "signs with another key")
            swapped = msgspec.structs.replace(info, stdin_port=1)
            await refused(write(swapped), "its stdin_port in the connection file does not")

    run(main)


def test_a_kernel_that_does_not_exist_or_does_not_start_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, argv in (("broken", ["/nowhere/python"]), ("ends", [sys.executable, "-c", "raise SystemExit(3)"])):
        folder = tmp_path / "share" / "kernels" / name
        folder.mkdir(parents=True)
        spec = {"argv": argv, "display_name": name, "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))

    async def main() -> None:
        async with broker_running() as broker:
            for name, says in (
                (
                    "pyton3",
                    "there is no kernel named 'pyton3': did you mean python3\\? there are broken",
                ),
                ("broken", "the kernel broken does not start: .*/nowhere/python"),
                ("ends", "ended before it answered"),
            ):
                with pytest.raises(KernelError, match=says):
                    await KernelWorker(ENDPOINT, Started(name), broker.url, SECRET).start()
            monkeypatch.setitem(sys.modules, "jupyter_client", None)
            with pytest.raises(KernelError, match=r"not installed; pip install 'request-broker\[jupyter\]'"):
                await KernelWorker(ENDPOINT, Started("python3"), broker.url, SECRET).start()

    run(main)


def test_the_kernel_outlives_its_broker(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker:
            port = broker.port
            worker = KernelWorker(ENDPOINT, Started("python3"), broker.url, SECRET)
            worker.drain = 1.0
            await worker.start()
            async with AsyncClient(broker.url, SECRET) as client:
                await outputs(client, "x = 41")
        try:
            async with broker_running(port) as broker, AsyncClient(broker.url, SECRET) as client:
                items = await client.call(f"{ENDPOINT}/execute", {"code": "x + 1"}, wait=True)
                assert items[0]["data"]["text/plain"] == "42"
        finally:
            await worker.stop()

    run(main)


def test_a_hundred_megabytes_of_text_are_bounded_and_what_is_missing_is_said() -> None:
    """A caller that reads gets all of it; listeners may lose text, and see it from the gap or are told."""
    code = "for i in range(100): print('x' * 1_000_000)\nfrom IPython.display import display\ndisplay('the end')"

    async def main() -> None:
        async with kernel_running() as (worker, client):
            before = peak()
            async with await client.stream(f"{ENDPOINT}/execute", {"code": code}, timeout=None) as stream:
                first = await anext(stream)
                await until(lambda: worker.kernel.state == "idle", "the kernel has printed it all; nobody has read it")
                items = [first, *[item async for item in stream]]
            assert items[-1]["data"]["text/plain"] == "'the end'", "messages of other kinds are not lost"
            text = "".join(item["text"] for item in items if item["type"] == "stream")
            assert len(text) < 30_000_000
            assert "characters of text dropped: more than was taken on the way]" in text
            assert peak() - before < 330 << 20, "a message of 100 MB is there three times; all else is in the noise"

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    run(main)


def test_a_message_above_the_bound_costs_its_output_and_that_is_told() -> None:
    async def main() -> None:
        async with kernel_running(bounds=Bounds(message_max_bytes=1 << 20)) as (worker, client):
            items, result = await outputs(client, "print('x' * (2 << 20))")
            assert "output is missing: the connection to the kernel's IOPub broke" in items[-1]["text"]
            assert result["status"] == "ok"
            assert (await outputs(client, "print('hi')"))[0][0]["text"] == "hi\n", "it is heard again"
            assert worker.kernel.died == 0

    run(main)
