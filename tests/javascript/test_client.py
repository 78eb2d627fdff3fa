"""The JavaScript client in node, against a broker process; each function of scenarios.mjs is a test here."""

from __future__ import annotations

import asyncio
import re
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy
import numpy.typing
import pytest

from broker import AsyncClient, Worker
from broker.admin.web.files import MODULES
from broker.core.errors import KINDS
from broker.worker import current
from tests.javascript.harness import HERE, PATIENCE_S, TOKEN, BrokerProcess, npm_packages, tool

SCENARIOS = re.findall(r"^export async function (\w+)", (HERE / "scenarios.mjs").read_text(), re.MULTILINE)
APART = {"calls_a_python_worker", "serves_python_callers", "outcomes_have_their_classes", "names_are_listed"}
"""scenarios that need something beside the broker; they have tests of their own below"""
DTYPES = ["<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "|b1", ">f4", "<c16"]
"""of numpy; JavaScript has numbers like these but for the last two, which it keeps as bytes"""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker process."""
    process = BrokerProcess(tmp_path_factory.mktemp("broker"))
    yield process
    process.stop()


def play(name: str, url: str, actions: dict[str, Callable[[], object]] | None = None) -> list[str]:
    """Run a scenario to its end; what it printed beside its wishes. Node ends by itself: nothing is left open."""
    npm_packages()
    process = subprocess.Popen(
        [tool("node"), "play.mjs", name, url], cwd=HERE, env={"PATH": "/usr/bin:/bin", "TOKEN": TOKEN},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    overdue = threading.Timer(PATIENCE_S + 15, process.kill)
    overdue.start()
    said = []
    try:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == "please":
                (actions or {})[rest]()
                process.stdin.write("done\n")
                process.stdin.flush()
            else:
                said.append(line.strip())
        errors = process.stderr.read()
        assert process.wait() == 0, f"{' '.join(said)}\n{errors}"
        assert errors == ""
    finally:
        overdue.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    return said


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in APART])
def test_node(name: str, broker: BrokerProcess) -> None:
    play(name, broker.url, {"kill": broker.kill, "start": broker.start})


def test_node_calls_a_python_worker(broker: BrokerProcess) -> None:
    def echo(data: bytes, text: str) -> dict[str, object]:
        assert text == "ü"
        return {"data": data, "length": len(data)}

    def fail() -> None:
        raise ValueError("no such thing")

    numbers = numpy.arange(6).reshape(2, 3)
    sent = [numbers.astype(dtype) for dtype in DTYPES]
    sent += [numpy.full((), 7, "<f4"), numpy.empty((0, 3), "<f4")]

    def arrays() -> dict[str, object]:
        return {"arrays": sent}

    def same(arrays: list[numpy.typing.NDArray[numpy.generic]]) -> bool:
        pairs = zip(arrays, sent, strict=True)
        return all(one.dtype == other.dtype and numpy.array_equal(one, other) for one, other in pairs)

    async def scaled(by: int) -> AsyncIterator[object]:
        done = 0
        async for item in current().parts():
            yield item * by
            done += 1
        current().progress(done, text="scaled")

    async def main() -> None:
        worker = Worker("python", broker.url, TOKEN)
        for function in (echo, fail, arrays, same, scaled):
            worker.add(function)
        await worker.start()
        try:
            await asyncio.to_thread(play, "calls_a_python_worker", broker.url)
        finally:
            await worker.stop(now=True)

    asyncio.run(main())


def test_node_serves_python_callers(broker: BrokerProcess) -> None:
    image = numpy.arange(12, dtype="<u2").reshape(3, 4)

    async def call() -> object:
        async with AsyncClient(broker.url, TOKEN) as client:
            negative = await client.call("javascript/negative", {"image": image.astype("<i2")})
            assert negative.dtype == numpy.dtype("<i2") and numpy.array_equal(negative, -image.astype("<i2"))
            ramp = await client.call("javascript/ramp", {"length": 5})
            assert ramp.dtype == numpy.dtype("<f4") and ramp.tolist() == [0, 0.5, 1, 1.5, 2]
            large = bytes(range(256)) * (80 << 10)
            assert (await client.call("javascript/echo", {"data": large, "text": ""}))["data"] == large
            told: list[object] = []
            stream = await client.stream(
                "javascript/scaled", {"by": 3}, parts=[1, large, 2], progress=lambda *given: told.append(given)
            )
            assert [item async for item in stream] == [3, 3 * len(large), 6]
            assert (stream.result, told[-1]) == (3, (3, None, "scaled"))
            return await client.call("javascript/echo", {"data": bytes(range(256)) * 100, "text": "ü"})

    answer: Future[object] = Future()
    play("serves_python_callers", broker.url, {"call": lambda: answer.set_result(asyncio.run(call()))})
    assert answer.result(0) == {"data": bytes(range(256)) * 100, "text": "ü", "length": 25600}


def test_every_outcome_has_its_class(broker: BrokerProcess) -> None:
    (said,) = play("outcomes_have_their_classes", broker.url)
    assert said.split()[1:] == sorted({kind.name for kind in KINDS} - {"ok"})


def test_npm_installs_it_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "somebody", "private": true, "type": "module"}')
    folder = HERE.parent.parent / "broker" / "admin" / "web" / "static"
    command = [tool("npm"), "install", "--install-links", "--offline", "--no-audit", "--no-fund", str(folder)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=50)
    script = "import { connect, Client } from 'request-broker-client'; console.log(typeof connect, typeof Client)"
    done = subprocess.run(
        [tool("node"), "--input-type=module", "-e", script], cwd=tmp_path, check=True, capture_output=True, text=True,
        timeout=50,
    )  # fmt: skip
    assert done.stdout == "function function\n"
    installed = {path.name for path in (tmp_path / "node_modules" / "request-broker-client").iterdir()}
    assert installed == {"broker.js", "broker.d.ts", "package.json", *MODULES}


def test_the_types_are_those_of_the_module() -> None:
    compiler = npm_packages() / "typescript" / "bin" / "tsc"
    done = subprocess.run(
        [tool("node"), str(compiler), "--project", "tsconfig.json"], cwd=HERE, capture_output=True, text=True,
        timeout=55,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_types_name_what_the_module_exports() -> None:
    static = HERE.parent.parent / "broker" / "admin" / "web" / "static"
    typed = re.findall(r"^export (?:class|function|const) (\w+)", (static / "broker.d.ts").read_text(), re.MULTILINE)
    script = "import * as module from 'request-broker-client'; console.log(Object.keys(module).join(' '))"
    npm_packages()
    done = subprocess.run(
        [tool("node"), "--input-type=module", "-e", script], cwd=HERE, check=True, capture_output=True, text=True,
        timeout=50,
    )  # fmt: skip
    assert set(done.stdout.split()) == set(typed)
