"""Front ends of notebooks as they are: JupyterLab's own library in node, and jupyter-kernel-client, at real kernels."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.foreign.harness import HERE
from tests.javascript.harness import missing, tool
from tests.transports.kernels.harness import USER, House


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """A broker with kernels, and a worker that starts more for who asks."""
    with House() as house:
        for number in ("lab-v1", "lab-legacy", "python"):
            house.kernel(number)
        yield house


def printed(cell: dict[str, Any]) -> str:
    """The text that a cell wrote."""
    return "".join(content["text"] for kind, content in cell["outputs"] if kind == "stream")


# --- JupyterLab ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offer", ["v1", "legacy"])
def test_jupyterlabs_library(house: House, offer: str) -> None:
    if not (HERE / "node_modules" / "@jupyterlab").is_dir():
        missing("run `npm install` in tests/foreign first")
    command = [tool("node"), str(HERE / "jupyterlab.mjs"), house.url, USER, f"lab-{offer}", offer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    assert found.get("at") == "the end", (found.get("at"), found.get("error"), done.stderr)
    assert found["subprotocol"] == ("v1.kernel.websocket.jupyter.org" if offer == "v1" else "")
    assert f"lab-{offer}" in found["running"]
    assert (found["specs"], found["language"]) == (["python3"], "python")

    cell = found["cell"]
    assert cell["status"] == "ok"
    kinds = [kind for kind, _ in itertools.groupby(kind for kind, _ in cell["outputs"])]  # text may come in pieces
    assert kinds == ["status", "execute_input", "stream", "display_data", "execute_result", "status"]
    assert printed(cell) == "out\n"
    assert cell["outputs"][-3][1]["data"] == {"text/html": "<b>x</b>", "image/png": "aGk="}
    assert cell["outputs"][-2][1]["data"]["text/plain"] == "42"
    assert found["failed"]["ename"] == "ZeroDivisionError"
    assert "error" in [kind for kind, _ in found["failed"]["outputs"]]
    assert found["prompt"] == "who? "
    assert printed(found["asked"]) == "hello lab\n"
    assert found["completed"] is True

    assert (found["echo"], found["buffers"]) == ({"echo": {"n": 1}}, [[2, 1, 0], [255]])
    assert found["interrupted"] == "KeyboardInterrupt"
    assert found["both"] == 0, "the reply is one front end's own, the outputs are everybody's"
    assert found["replayed"] == ["ok", "0\n1\n2\n3\n"], "all of it, in order, over a link that broke"
    assert found["restarted"] == ["NameError", True]
    assert found["died"] == "KernelDied" or found["died"].startswith("canceled")
    assert found["alive"] == "ok"
    assert (found["unknown"], found["stranger"], found["noOffer"]) == (None, 403, 501)


# --- jupyter-kernel-client -------------------------------------------------------------------------------------------


def test_jupyter_kernel_client(house: House) -> None:
    offering = house.offer()
    command = [sys.executable, str(HERE / "kernel_client.py"), house.url, USER, "python"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    *streams, display, value = found["cell"]["outputs"]
    assert (found["cell"]["status"], "".join(stream["text"] for stream in streams)) == ("ok", "out\n")
    assert display["data"] == {"image/png": "aGk="}
    assert value["data"]["text/plain"] == "42"
    assert (found["failed"], found["variable"]) == ("ZeroDivisionError", 7)
    assert (found["asked"], found["answered"]) == (["who? "], "hello lab\n")
    assert (found["interrupted"], found["restarted"]) == ("KeyboardInterrupt", "NameError")
    assert (found["value"], found["listed"]) == ("2", True)
    registry, name = house.broker.router.registry, f"kernels.{found['own']}"
    house.until(lambda: name not in registry.by_name or not registry.by_name[name].registrations, "it has been ended")
    house.end(offering)
