"""`broker work`: what it serves, what it says when that is not possible, and how it ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.cli.main import main
from broker.client.async_client import AsyncClient
from broker.peer import errors
from tests.peer.harness import CALLER, SECRET, broker_running, run

MODULE = '''
"""Things to serve."""
import sys

class Camera:
    """A camera."""
    def __init__(self): self.taken = 0
    def take(self, n=1):
        """Take images."""
        print("this goes to standard output")
        self.taken += n
        return self.taken

ready = Camera()

def double(x): return 2 * x

def _hidden(): ...

class Broken:
    def __init__(self): raise OSError("no camera is connected")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "served.py").write_text(MODULE)
    (tmp_path / "wrong.py").write_text("1 +")
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "needs.py").write_text("import a_module_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop("served", None)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nothing_there:x", "there is no module nothing_there"),
        ("needs", "there is no module a_module_that_is_not_there"),
        ("served:nothing", "served has no nothing"),
        ("served:Camera.nothing", "Camera has no nothing"),
        ("served:Broken", "cannot be served: no camera is connected"),
        ("wrong", "importing it failed: SyntaxError"),
        ("leaves", "importing it called sys.exit(3)"),
        ("served:MODULE", "served has no MODULE"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], target: str, says: str
) -> None:
    code = main(["work", "python", target, "--endpoint", "x", "--url", "http://127.0.0.1:1", "--token", "x"])
    err = capfd.readouterr().err
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["python", "served"], 2, "Missing option '--endpoint'"),
        (["python", "served", "--endpoint", "a/b"], 2, "no name of an endpoint"),
        (["exec", "--endpoint", "x"], 2, "Missing argument"),
        (["python", "served", "--endpoint", "x", "--no-wait"], 3, "no broker at http://127.0.0.1:1"),
        (["python", "served", "--endpoint", "x", "--url", "http://["], 2, "'http://[' is no URL of a broker"),
        (["python", "served", "--endpoint", "x", "--capacity", "0"], 2, "capacity"),
    ],
)
def test_usage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int,
    says: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("BROKER_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("BROKER_TOKEN", "x")
    assert main(["work", *arguments]) == code
    assert says in capfd.readouterr().err


async def work(url: str, folder: Path, *arguments: str, token: str = SECRET) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker", "work", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
        env=os.environ | {"BROKER_URL": url, "BROKER_TOKEN": token},
    )  # fmt: skip


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, bytes, bytes]:
    process.send_signal(signal.SIGTERM)
    out, err = await process.communicate()
    return process.returncode, out, err


def test_a_module_a_class_an_object_and_a_function(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            for target, method, params, result in (
                ("served", "double", [4], 8),
                ("served:double", "double", [4], 8),
                ("served:Camera", "take", {"n": 3}, 3),
                ("served:ready", "take", [2], 2),
                ("served:ready.take", "take", [2], 2),
            ):
                process = await work(broker.url, folder, "python", target, "--endpoint", "data", "--name", "me")
                assert await client.call(f"data/{method}", params, wait=True) == result
                (worker,) = (await client.describe("data"))["workers"]
                assert worker["info"]["name"] == "me"
                assert worker["methods"] == [method]
                code, out, err = await ended(process)
                assert code == 0, err
                assert b"serving data" in err
                assert out == (b"this goes to standard output\n" if method == "take" else b"")

    run(main)


def test_a_command(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            script = "tr a-z A-Z"
            process = await work(broker.url, folder, "exec", "--endpoint", "sh", "sh", "-c", script)
            assert await client.call("sh/shout", ["hello"], wait=True) == ["HELLO"]
            assert (await ended(process))[0] == 0

    run(main)


def test_a_worker_that_is_not_allowed_says_so(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker:
            for token, says in ((CALLER, b"denied"), ("wrong" * 9, b"does not let us in")):
                process = await work(broker.url, folder, "python", "served", "--endpoint", "data", token=token)
                _, err = await process.communicate()
                assert process.returncode == 4
                assert says in err
                assert b"Traceback" not in err

    run(main)


def test_the_broker_is_told_of_a_worker_that_fails_and_goes_on(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            process = await work(broker.url, folder, "python", "served", "--endpoint", "data")
            with pytest.raises(errors.RemoteError, match="TypeError: unsupported operand"):
                await client.call("data/double", {"x": {}}, wait=True)
            assert await client.call("data/double", [1]) == 2
            _, _, err = await ended(process)
            assert b"data/double failed: unsupported operand" in err

    run(main)


def test_what_callers_send_neither_forges_lines_nor_reaches_the_terminal(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            (folder / "served.py").write_text("def say(text): raise ValueError(text)")
            process = await work(broker.url, folder, "python", "served", "--endpoint", "data")
            with pytest.raises(errors.RemoteError):
                await client.call("data/say", ["x\nserving gold\x1b[2J"], wait=True)
            _, _, said = await ended(process)
            assert b"data/say failed: x\\nserving gold\\x1b[2J\n" in said
            assert b"  ValueError: x\n  serving gold" in said, (
                "a traceback keeps its lines, none of which begins a line"
            )
            assert b"\x1b" not in said

    run(main)


def test_what_it_says_as_lines_of_json(folder: Path) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            process = await work(broker.url, folder, "exec", "--endpoint", "sh", "--json", "false")
            with pytest.raises(errors.RemoteError):
                await client.call("sh/any", wait=True)
            _, _, said = await ended(process)
            lines = [json.loads(line) for line in said.splitlines()]
            assert ("warning", "sh/any failed: false exited with 1") in [(x["level"], x["message"]) for x in lines]

    run(main)


def test_a_signal_while_it_waits_for_a_broker_ends_it(folder: Path) -> None:
    async def main() -> None:
        process = await work("http://127.0.0.1:1", folder, "python", "served", "--endpoint", "data")
        assert process.stderr is not None
        assert b"Connection refused; trying again" in await process.stderr.readline()
        assert (await ended(process))[0] == 0

    run(main)


async def daemon(environment: dict[str, str]) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker", "serve", "--port", "0", "--log-format", "json", stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stderr is not None
    return process, (await process.stderr.readline()).decode()


def test_a_broker_restarted_under_everybodys_feet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker and caller use the access file: the new broker has another port and another token."""
    (folder / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}

    async def main() -> None:
        process, _ = await daemon(environment)
        served = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "broker", "work", "python", "served", "--endpoint", "data", stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=folder, env=environment,
        )  # fmt: skip
        client = AsyncClient()
        assert await client.call("data/double", [1], wait=True) == 2
        first = client.url
        process.kill()
        await process.wait()
        process, _ = await daemon(environment)
        assert await client.call("data/double", [2], wait=True, idempotent=True) == 4
        assert client.url != first
        await client.close()
        assert (await ended(served))[0] == 0
        process.terminate()
        await process.communicate()
        assert process.returncode == 0

    run(main)
