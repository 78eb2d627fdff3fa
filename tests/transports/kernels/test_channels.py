"""A front end's WebSocket at a real kernel: what goes through, who gets what, and coming back."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from broker.daemon.logs import redact
from broker.wire.kernel import V1, Sign, tell, write_v1
from tests.transports.kernels.harness import OTHER, STRANGER, USER, Front, House, front

ECHO = """
def _open(comm, message):
    @comm.on_msg
    def _(message):
        comm.send({"echo": message["content"]["data"]}, buffers=[bytes(b)[::-1] for b in message["buffers"]])
get_ipython().kernel.comm_manager.register_target("echo", _open)
"""


def kinds(messages: list[dict[str, Any]]) -> list[str]:
    """What came, in order; a kernel flushes what is printed now and then, so text may come in pieces."""
    return [kind for kind, _ in itertools.groupby(message["type"] for message in messages)]


def printed(messages: list[dict[str, Any]]) -> str:
    return "".join(message["content"]["text"] for message in messages if message["type"] == "stream")


@pytest.mark.parametrize("v1", [True, False])
def test_a_cell_with_its_outputs(house: House, *, v1: bool) -> None:
    with front(house, "k1", f"cell-{v1}", v1=v1) as page:
        number = page.execute("print('é\\U0001d11e'); display({'image/png': 'aGk='}, raw=True); 6*7")
        assert page.reply(number)["content"]["status"] == "ok"
        heard = page.heard(number)
        assert kinds(heard) == ["status", "execute_input", "stream", "display_data", "execute_result", "status"]
        assert printed(heard) == "é\U0001d11e\n"
        assert heard[-3]["content"]["data"] == {"image/png": "aGk="}
        assert heard[-2]["content"]["data"] == {"text/plain": "42"}


def test_an_error_is_the_kernels_own(house: House) -> None:
    with front(house, "k1", "error") as page:
        number = page.execute("1/0")
        assert page.reply(number)["content"]["ename"] == "ZeroDivisionError"
        assert "error" in kinds(page.heard(number))


def test_input_is_asked_of_who_ran_the_cell(house: House) -> None:
    with front(house, "k1", "asks") as page, front(house, "k1", "other", OTHER) as other:
        number = page.execute("name = input('who? '); print('hello', name)", allow_stdin=True)
        asked = page.find(lambda m: m["channel"] == "stdin")
        assert (asked["type"], asked["parent"], asked["content"]["prompt"]) == ("input_request", number, "who? ")
        page.say("stdin", "input_reply", {"value": "ursula"})
        assert page.reply(number)["content"]["status"] == "ok"
        assert printed(other.heard(number)) == "hello ursula\n"
        assert not [m for m in other.inbox if m["channel"] == "stdin"]


@pytest.mark.parametrize("v1", [True, False])
def test_comms_carry_buffers_both_ways(house: House, *, v1: bool) -> None:
    with front(house, "k1", f"comm-{v1}", v1=v1) as page:
        page.reply(page.execute(ECHO))
        page.say("shell", "comm_open", {"comm_id": f"c{v1}", "target_name": "echo", "data": {}})
        page.say("shell", "comm_msg", {"comm_id": f"c{v1}", "data": {"n": 1}}, buffers=(b"\0\1\2", b"", b"abc"))
        echoed = page.find(lambda m: m["type"] == "comm_msg" and m["content"]["comm_id"] == f"c{v1}")
        assert echoed["content"]["data"] == {"echo": {"n": 1}}
        assert echoed["buffers"] == [b"\2\1\0", b"", b"cba"]


def test_control_overtakes_a_running_cell(house: House) -> None:
    with front(house, "k1", "control") as page:
        number = page.execute("import time; time.sleep(60)")
        page.find(lambda m: m["type"] == "execute_input")
        info = page.say("control", "kernel_info_request", {})
        assert page.reply(info)["content"]["implementation"] == "ipython"
        assert house.request("POST", "/api/kernels/k1/interrupt")[0] == 204
        assert page.reply(number)["content"]["ename"] == "KeyboardInterrupt"


def test_two_front_ends_hear_one_kernel(house: House) -> None:
    with front(house, "k1", "one") as one, front(house, "k1", "two", OTHER, v1=False) as two:
        number = one.execute("print('for both')")
        assert one.reply(number)["content"]["status"] == "ok"
        for page in (one, two):
            assert printed(page.heard(number)) == "for both\n"
        own = two.execute("1")
        two.reply(own)
        assert not [m for m in two.inbox if m["parent"] == number and m["channel"] == "shell"], "the other's reply"
        assert house.request("GET", "/api/kernels/k1")[2]["connections"] >= 2


def test_who_comes_back_hears_what_was_said_meanwhile(house: House) -> None:
    with front(house, "k1", "back") as page:
        number = page.execute("import time\nfor i in range(3):\n    time.sleep(0.2)\n    print(i, flush=True)\n'end'")
        page.find(lambda m: m["type"] == "execute_input")
        page.socket.close(1001)
    with front(house, "k1", "witness") as witness:
        witness.find(lambda m: m["parent"] == number and m["content"].get("execution_state") == "idle")
    with front(house, "k1", "back", v1=False) as page:
        assert page.reply(number)["content"]["status"] == "ok"
        heard = page.heard(number)
        assert printed(heard) == "0\n1\n2\n"
        assert kinds(heard)[-2:] == ["execute_result", "status"]


def test_a_second_link_of_a_session_replaces_the_first(house: House) -> None:
    with front(house, "k1", "twice") as first, front(house, "k1", "twice") as second:
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                first.read()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4409
        assert second.reply(second.execute("1"))["content"]["status"] == "ok"


def test_a_session_of_the_same_name_is_another_for_another_user(house: House) -> None:
    with front(house, "k1", "same", USER) as mine, front(house, "k1", "same", OTHER) as other:
        assert mine.reply(mine.execute("1"))["content"]["status"] == "ok"
        assert other.reply(other.execute("1"))["content"]["status"] == "ok"


def test_a_cell_goes_on_when_its_front_end_has_gone(house: House) -> None:
    with front(house, "k1", "leaves") as page:
        page.execute("import time; time.sleep(0.5); survived = 'yes'")
        page.find(lambda m: m["type"] == "execute_input")
        page.socket.close(1000)
    with front(house, "k1", "looks") as page:
        number = page.execute("survived")
        assert "'yes'" in [m["content"].get("data", {}).get("text/plain") for m in page.heard(number)]


def test_a_restart_is_told(house: House) -> None:
    with front(house, "k1", "restart") as page:
        page.reply(page.execute("before = 1"))
        status, _, model = house.request("POST", "/api/kernels/k1/restart")
        assert (status, model["id"]) == (200, "k1")
        page.status("restarting")
        assert page.reply(page.execute("before"))["content"]["ename"] == "NameError"


def test_death_is_told_and_ends_what_was_asked(house: House) -> None:
    with front(house, "k1", "dies") as page:
        number = page.execute("import os; os._exit(1)")
        reply = page.reply(number)
        assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "KernelDied")
        heard = page.heard(number)
        assert "error" in kinds(heard), "shown in the cell"
        assert page.status("restarting")
        assert page.reply(page.execute("1"))["content"]["status"] == "ok", "it was started again"


def test_a_worker_that_goes_takes_its_kernel_with_it(house: House) -> None:
    worker = house.kernel("k2")
    with front(house, "k2", "lost") as page:
        number = page.execute("import time; time.sleep(60)")
        page.find(lambda m: m["type"] == "execute_input")
        house.end(worker)
        reply = page.reply(number)
        assert reply["content"]["status"] == "error"
        assert reply["content"]["ename"]
        page.status("dead")
    assert house.request("GET", "/api/kernels/k2")[0] == 404


# --- refusals, all before the upgrade --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [
        ("/api/kernels/nobody/channels", USER, 404),
        ("/api/kernels/nobody/channels", "", 403),
        ("/api/kernels/k1/channels", "", 403),
        ("/api/kernels/k1/channels", "wrong-secret-for-tests-0123456789abcdef", 403),
        ("/api/kernels/k1/channels", STRANGER, 403),
        ("/api/kernels/nobody/channels", STRANGER, 403),
        ("/api/kernels/%2e%2e/channels", USER, 404),
        ("/api/kernels/k1/channels?session_id=a&session_id=b", USER, 400),
        (f"/api/kernels/k1/channels?session_id={'a' * 129}", USER, 400),
    ],
)
def test_what_is_refused_at_the_handshake(house: House, path: str, token: str, status: int) -> None:
    headers = {"Authorization": f"token {token}"} if token else {}
    with pytest.raises(InvalidStatus) as refused:
        connect(house.url.replace("http", "ws") + path, additional_headers=headers).close()
    assert refused.value.response.status_code == status
    assert b"message" in (refused.value.response.body or b"")


def test_it_is_a_websocket(house: House) -> None:
    assert house.request("GET", "/api/kernels/k1/channels")[0] == 426


def test_other_pages_are_refused(house: House) -> None:
    with pytest.raises(InvalidStatus) as refused:
        front(house, "k1", origin="https://evil.example").__enter__()
    assert refused.value.response.status_code == 403


def whole_frame() -> bytes:
    sign = Sign("m", "malformed", "2026-01-02T03:04:05.000006Z")
    return b"".join(write_v1(tell("shell", "execute_request", {"code": "undone = 1"}, sign)))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\1\0\0\0\0\0\0\0",
        (1_000_000).to_bytes(8, "little"),
        (2**64 - 1).to_bytes(8, "little") + bytes(64),
        whole_frame()[:-1],
        whole_frame()[:60],
        whole_frame() + b"appended",
        whole_frame().replace(b"shell", b"iopub"),
        whole_frame().replace(b"shell", b"shall"),
    ],
    ids=["empty", "count", "million", "huge", "truncated", "cut in its table", "appended", "iopub", "no channel"],
)
def test_three_malformed_messages_close_the_link(house: House, frame: bytes) -> None:
    with front(house, "k1", "witness") as witness, front(house, "k1", "malformed") as page:
        for _ in range(3):
            page.socket.send(frame)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                page.read()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4400
        assert witness.reply(witness.execute("undone"))["content"]["ename"] == "NameError"


def test_text_is_malformed_where_all_messages_are_binary(house: House) -> None:
    with front(house, "k1", "text") as page:
        page.socket.send('{"header": {"msg_id": "m", "msg_type": "execute_request"}, "content": {"code": "1"}}')
        assert page.reply(page.execute("1"))["content"]["status"] == "ok"


def test_a_subprotocol_nobody_speaks_is_not_agreed_to(house: House) -> None:
    """RFC 6455, 4.2.2: the server names one that was offered, or none; a front end then speaks as without any."""
    url = f"{house.url.replace('http', 'ws')}/api/kernels/k1/channels?session_id=other&token={USER}"
    with connect(url, subprotocols=["v9.kernel.websocket.jupyter.org"]) as socket:  # type: ignore[list-item]
        assert socket.subprotocol is None
        page = Front(socket, "other", v1=False)
        assert page.reply(page.execute("1"))["content"]["status"] == "ok"


def test_bytes_behind_the_last_buffer_of_a_legacy_frame_are_its_own(house: House) -> None:
    """There the last part runs to the end: nothing tells what was appended from what belongs to it."""
    with front(house, "k1", "appended", v1=False) as page:
        page.reply(page.execute(ECHO))
        page.say("shell", "comm_open", {"comm_id": "longer", "target_name": "echo", "data": {}})
        header = {"msg_id": "a", "msg_type": "comm_msg", "session": "appended"}
        text = {"channel": "shell", "header": header, "content": {"comm_id": "longer", "data": {}}}
        packed = json.dumps(text | {"parent_header": {}, "metadata": {}}).encode()
        page.socket.send(struct.pack(">3I", 2, 12, 12 + len(packed)) + packed + b"abc" + b"more")
        echoed = page.find(lambda m: m["type"] == "comm_msg" and m["content"]["comm_id"] == "longer")
        assert echoed["buffers"] == [b"eromcba"]


def test_one_malformed_message_hurts_nobody(house: House) -> None:
    with front(house, "k1", "clumsy", v1=False) as page:
        page.socket.send('{"header": {}}')
        assert page.reply(page.execute("1"))["content"]["status"] == "ok"


def test_no_token_is_in_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """`redact` is what every line of the daemon's log goes through."""
    caplog.set_level("INFO")
    assert house.request("GET", f"/api/kernels?token={USER}", token="")[0] == 200
    assert house.request("GET", f"/api/kernels/nobody?token={USER}", token="")[0] == 404
    with connect(
        f"{house.url.replace('http', 'ws')}/api/kernels/k1/channels?token={USER}",
        subprotocols=[V1],  # type: ignore[list-item]
    ):
        pass
    assert caplog.records
    assert all(USER not in redact(record.getMessage()) for record in caplog.records)
