"""What a script does with a kernel by jupyter-kernel-client: `python kernel_client.py URL TOKEN KERNEL`.

Writes what came of it as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from jupyter_kernel_client import JupyterKernelClient


def cells(kernel: JupyterKernelClient) -> dict[str, Any]:
    """Outputs, errors, variables."""
    found = {
        "cell": kernel.execute("print('out'); display({'image/png': 'aGk='}, raw=True); 6*7"),
        "failed": kernel.execute("1/0")["outputs"][0]["ename"],
    }
    kernel.set_variable("x", 7)
    return found | {"variable": kernel.get_variable("x")}


def question(kernel: JupyterKernelClient) -> dict[str, Any]:
    """A cell that asks for input."""
    client, asked, texts = kernel._manager.client, [], []

    def answer(message: dict[str, Any]) -> None:
        asked.append(message["content"]["prompt"])
        client.input("lab")

    client.execute_interactive(
        "print('hello', input('who? '))", allow_stdin=True, stdin_hook=answer, timeout=20,
        output_hook=lambda message: texts.append(message["content"].get("text", "")),
    )  # fmt: skip
    return {"asked": asked, "answered": "".join(texts)}


def interrupted(kernel: JupyterKernelClient) -> dict[str, Any]:
    """A cell that is interrupted, and a kernel that is restarted."""
    code = "import time; print('now', flush=True); time.sleep(60)"

    def begun(message: dict[str, Any]) -> None:
        if message["header"]["msg_type"] == "stream":
            threading.Thread(target=kernel.interrupt).start()

    reply = kernel._manager.client.execute_interactive(code, timeout=40, output_hook=begun)
    kernel.execute("before = 1")
    kernel.restart()
    after = kernel.execute("before")["outputs"][0]["ename"]
    return {"interrupted": reply["content"]["ename"], "restarted": after}


def started(url: str, token: str) -> dict[str, Any]:
    """A kernel of its own."""
    kernel = JupyterKernelClient(server_url=url, token=token)
    kernel.start()
    value = kernel.execute("1+1")["outputs"][0]["data"]["text/plain"]
    number = kernel.id
    listed = number in [model["id"] for model in kernel.list_kernels()]
    kernel._manager.shutdown_kernel(now=True)
    return {"value": value, "listed": listed, "own": number}


def main(url: str, token: str, number: str) -> dict[str, Any]:
    """All of it."""
    kernel = JupyterKernelClient(server_url=url, token=token, kernel_id=number)
    kernel.start()
    return cells(kernel) | question(kernel) | interrupted(kernel) | started(url, token)


print(json.dumps(main(*sys.argv[1:])), flush=True)
os._exit(0)  # its `stop` often waits 10 s: of two threads that read, the wrong one gets the close frame
