"""`broker work kernel`, `broker work kernels`, and what `broker call` shows of a kernel."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.worker.kernel.offering import KernelsWorker
from tests.peer.harness import SECRET, broker_running, broker_thread, run, until


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("BROKER_TOKEN", SECRET)


def started(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "broker", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.Popen(command, text=True, **pipes)


def done(*arguments: str, given: str = "") -> tuple[int, str, str]:
    with started(*arguments) as process:
        out, err = process.communicate(given, timeout=30)
    return process.returncode, out, err


@contextmanager
def kernel_served(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with started("work", *arguments) as worker:
        assert worker.stderr is not None
        for line in worker.stderr:
            if "serving" in line:
                break
        try:
            yield worker
        finally:  # else a failed test would wait for the worker for ever
            worker.send_signal(signal.SIGTERM)
            worker.communicate(timeout=30)
        assert worker.returncode == 0


def test_a_kernel_is_served_and_called_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with broker_thread() as (broker, _):
        monkeypatch.setenv("BROKER_URL", broker.url)
        with kernel_served("kernel", "--endpoint", "kernels.a"):

            def call(code: str, *more: str, given: str = "", **content: Any) -> tuple[int, str, str]:
                return done("call", "kernels.a/execute", json.dumps({"code": code} | content), *more, given=given)

            code = "import sys; print('out'); print('err', file=sys.stderr); 6 * 7"
            assert call(code) == (0, "out\n42\n", "err\n")
            status, out, err = call("1 / 0")
            assert (status, out) == (1, "")
            assert "ZeroDivisionError" in err and "\x1b[" not in err
            assert err.splitlines()[-1].startswith(
                "broker: kernels.a/execute: worker_error: ZeroDivisionError: division"
            )
            assert call("input('name? ')", given="bob\n", allow_stdin=True) == (0, "name? 'bob'\n", "")
            picture = "from IPython.display import display; display({'image/png': 'AAAA'}, raw=True)"
            assert call(picture) == (0, "<image/png; --json shows it>\n", "")
            shown, result = map(json.loads, call("'x'", "--json")[1].splitlines())
            assert (shown["type"], shown["data"]) == ("execute_result", {"text/plain": "'x'"})
            assert result["status"] == "ok"
            status, _, err = done("call", "kernels.b/execute", '{"code": "1"}')
            assert (status, "Did you mean kernels.a?" in err) == (5, True)
            status, _, err = done("kernel", "connect", "kernels.x")
            assert (status, "Did you mean kernels.a?" in err) == (5, True)


def test_ctrl_c_interrupts_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    with broker_thread() as (broker, _):
        monkeypatch.setenv("BROKER_URL", broker.url)
        with kernel_served("kernel", "--endpoint", "kernels.a"):
            code = "print('begun', flush=True)\nx = 0\nwhile True: x += 1"
            with started("call", "kernels.a/execute", json.dumps({"code": code})) as calling:
                assert calling.stdout is not None
                assert calling.stdout.readline() == "begun\n"
                calling.send_signal(signal.SIGINT)
                calling.communicate(timeout=20)
                assert calling.returncode == 130
            assert done("call", "kernels.a/execute", '{"code": "x > 0"}') == (0, "True\n", ""), "and nothing else"


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    for arguments, says in (
        (
            ("--name", "pyton3"),
            r"there is no kernel named 'pyton3': did you mean python3\? there are .*kernelspec list",
        ),
        (("--connection-file", str(tmp_path / "none.json")), "there is no file .*none.json; `jupyter --runtime-dir`"),
        (("--name", "python3", "--connection-file", "x"), "give one of them"),
    ):
        status, out, err = done("work", "kernel", "--endpoint", "kernels.a", "--url", "http://127.0.0.1:1", *arguments)
        assert (status, out) == (2, "")
        assert re.fullmatch(f"broker: .*{says}.*\n", err), err
    path = tmp_path / "mine.json"
    path.write_text("mine")
    status, _, err = done(
        "kernel", "connect", "kernels.a", "--connection-file", str(path), "--url", "http://127.0.0.1:1"
    )
    assert (status, "is there already" in err, path.read_text()) == (2, True, "mine")


def test_kernels_are_started_for_who_asks_within_a_bound() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET, timeout=30) as client:
            worker = KernelsWorker("kernels", broker.url, SECRET, kernels_max=2)
            async with worker:
                specs = await client.call("kernels/specs")
                assert specs["default"] == "python3"
                assert specs["kernelspecs"]["python3"]["spec"]["language"] == "python"
                one = await client.call("kernels/start", {"name": "python3", "id": "one"})
                assert (one["id"], one["endpoint"], one["name"]) == ("one", "kernels.one", "python3")
                assert (await client.call("kernels.one/execute", {"code": "1"}))[-1]["status"] == "ok"
                with pytest.raises(errors.RemoteError, match="there is a kernel one already"):
                    await client.call("kernels/start", {"id": "one"})
                with pytest.raises(errors.RemoteError, match="no name of an endpoint"):
                    await client.call("kernels/start", {"id": "a/b"})
                with pytest.raises(errors.RemoteError, match="did you mean python3"):
                    await client.call("kernels/start", {"name": "pyton3"})
                two = await client.call("kernels/start")
                with pytest.raises(errors.RemoteError, match="as many as may") as caught:
                    await client.call("kernels/start")
                assert (caught.value.type, caught.value.retryable) == ("KernelsMax", True)
                assert [each["id"] for each in await client.call("kernels/list")] == ["one", two["id"]]
                await client.call("kernels/stop", {"id": "one"})
                await client.call(f"{two['endpoint']}/shutdown")
                await until(lambda: not worker.kernels, "both are forgotten")
                assert await client.call("kernels/list") == []
                with pytest.raises(errors.RemoteError, match="no kernel 'one' was started here"):
                    await client.call("kernels/stop", {"id": "one"})
                with pytest.raises(errors.NoWorker):
                    await client.call("kernels.one/state")
                await client.call("kernels/start", {"id": "left"})
                left = worker.kernels["left"].kernel.process
            assert left._manager is None, "it ended with its worker"  # type: ignore[attr-defined]

    run(main)


def test_nothing_of_jupyter_is_imported_before_a_kernel_is_served() -> None:
    modules = (
        "broker.cli.kernels, broker.cli.kernel, broker.cli.call, broker.worker.kernel.offering, broker.client.client"
    )
    code = (
        f"import sys, {modules}, broker.client.kernel_relay\n"
        "print([name for name in sys.modules if name.startswith(('jupyter', 'ipykernel', 'IPython', 'traitlets'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = (
        "import sys, broker, broker.cli.main, broker.worker.worker, broker.client.client; print('zmq' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_on_a_terminal_input_is_asked_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with broker_thread() as (broker, _):
        monkeypatch.setenv("BROKER_URL", broker.url)
        with kernel_served("kernel", "--endpoint", "kernels.a"):
            parent, child = pty.openpty()
            params = json.dumps({"code": "input('name? ')", "allow_stdin": True})
            with started("call", "kernels.a/execute", params, stdin=child, stdout=child, stderr=child) as calling:
                os.close(child)
                said = b""
                while b"name? " not in said:
                    said += os.read(parent, 1000)
                os.write(parent, b"alice\n")
                while b"'alice'" not in said:
                    said += os.read(parent, 1000)
                assert calling.wait(20) == 0
            os.close(parent)
