"""What a script does with a kernel by jupyter-kernel-client: `python kernel_client.py URL TOKEN KERNEL`.

Writes what came of it as one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from jupyter_kernel_client import JupyterKernelClient
from jupyter_kernel_client.wsclient import KernelWebSocketClient


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


ECHO = """
def opened(comm, message):
    @comm.on_msg
    def echo(message):
        comm.send({"echo": message["content"]["data"]}, buffers=[bytes(b)[::-1] for b in message["buffers"]])
get_ipython().kernel.comm_manager.register_target("echo", opened)
"""
TICKS = "import time\nfor n in range(4):\n    print(n, flush=True)\n    time.sleep(0.4)"


def connected(url: str, token: str, number: str, again_s: int = 0) -> Any:
    """The library's own client of one kernel, as its `JupyterKernelClient` makes it."""
    where = f"{url.replace('http', 'ws')}/api/kernels/{number}/channels"
    client = KernelWebSocketClient(where, token, reconnect_interval=again_s)
    client.start_channels()
    client.wait_for_ready(timeout=20)
    return client


def heard(client: Any, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The next message on iopub that fits."""
    while True:
        message: dict[str, Any] = client.get_iopub_msg(timeout=20)
        if wanted(message):
            return message


def comms(client: Any) -> dict[str, Any]:
    """Comm messages with binary buffers, there and back."""
    client.execute_interactive(ECHO, timeout=20, output_hook=lambda _: None)
    for kind, more, buffers in (
        ("comm_open", {"target_name": "echo", "data": {}}, []),
        ("comm_msg", {"data": {"n": 1}}, [bytes([0, 1, 2]), b"", bytes([255])]),
    ):
        message = client.session.msg(kind, {"comm_id": "c"} | more)
        client.shell_channel.send(message | {"buffers": buffers})
    told = heard(client, lambda message: message["header"]["msg_type"] == "comm_msg")
    return {"echo": told["content"]["data"], "buffers": [list(bytes(buffer)) for buffer in told["buffers"]]}


def both(one: Any, two: Any) -> dict[str, Any]:
    """Two front ends: what one runs the other sees, and may go on with."""
    asked = one.execute("shared = 'from one'; print(shared, flush=True)")
    told = heard(two, lambda message: message["content"].get("text") == "from one\n")
    value = two.execute_interactive("shared", timeout=20, output_hook=lambda _: None)["content"]["status"]
    while (reply := one.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != asked:
        pass
    return {
        "seen": told["parent_header"]["msg_id"] == asked, "shared": value, "own": reply["content"]["status"],
        "others": two.shell_channel.msg_ready(),
    }  # fmt: skip


def replayed(client: Any) -> dict[str, Any]:
    """A link that breaks while a cell runs: nothing of it is lost."""
    texts, first = [], client.kernel_socket.sock

    def shown(message: dict[str, Any]) -> None:
        texts.append(message["content"].get("text", ""))
        if texts[-1].startswith("0"):
            client.kernel_socket.sock.sock.shutdown(socket.SHUT_RDWR)

    reply = client.execute_interactive(TICKS, timeout=40, output_hook=shown)
    again = client.kernel_socket.sock is not first
    return {"status": reply["content"]["status"], "text": "".join(texts), "again": again}


def died(client: Any) -> dict[str, Any]:
    """A kernel that dies in the middle, and the one that comes after it."""
    asked = client.execute("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    while (reply := client.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != asked:
        pass
    heard(client, lambda message: message["content"].get("execution_state") == "restarting")
    after = client.execute_interactive("1", timeout=30, output_hook=lambda _: None)
    return {"ename": reply["content"]["ename"], "count": after["content"]["execution_count"]}


def channels(url: str, token: str, number: str) -> dict[str, Any]:
    """What is sent and heard message by message. In the layout without a subprotocol: of the other (v1) this library's
    1.0.2 reads no message, for want of a `channel` in what it logs.
    """
    one, two = connected(url, token, number, again_s=1), connected(url, token, number)
    return {"comms": comms(one), "both": both(one, two), "replayed": replayed(one), "died": died(one)}


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
    found = cells(kernel) | question(kernel) | interrupted(kernel) | started(url, token)
    return found | {"channels": channels(url, token, number)}


print(json.dumps(main(*sys.argv[1:])), flush=True)
os._exit(0)  # its `stop` often waits 10 s: of two threads that read, the wrong one gets the close frame
