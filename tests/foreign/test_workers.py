"""Libraries that know nothing of the broker serve through it, whatever their replies look like."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from typing import Any

import pytest

from tests.foreign.harness import (
    PATIENCE_S,
    TOKEN,
    BrokerProcess,
    Library,
    PlainCaller,
    RemoteError,
    attached,
    dial,
    until,
)
from tests.foreign.libraries import WORKERS

VALUE = {"text": 'é \u2028 𝄞 \\ " \u0001', "deep": [[1.5, -0.25, None, True]], "large": 2**53 - 1, "": {}}


def strikes(broker: BrokerProcess, endpoint: str) -> list[int]:
    """Of the workers at an endpoint."""
    with PlainCaller(broker.ws("/ws")) as admin:
        peers = admin.call("broker.admin.peers")
    return [peer["strikes"] for peer in peers if endpoint in peer["serves"]]


def test_a_worker_is_found_as_soon_as_it_is_connected(broker: BrokerProcess, endpoint: str) -> None:
    host, port = broker.url.removeprefix("http://").split(":")
    opening = (
        f"GET /ws/{endpoint}-%d?role=worker HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with PlainCaller(broker.ws("/ws")) as caller, ExitStack() as stack:
        workers = [stack.enter_context(socket.create_connection((host, int(port)), PATIENCE_S)) for _ in range(30)]
        for n, worker in enumerate(workers):
            worker.sendall((opening % n).encode())
        for n, worker in enumerate(workers):
            assert worker.recv(4096).startswith(b"HTTP/1.1 101 ")
            # A call would end here as `no_endpoint` if the worker were attached only some time after its handshake.
            assert len(caller.call("broker.describe", {"endpoint": f"{endpoint}-{n}"})["workers"]) == 1


def test_calls_are_answered(working: Library, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with attached(working, url + "?role=worker"), PlainCaller(url) as caller:
        assert caller.call("subtract", [42, 23]) == 19
        assert caller.call("subtract", {"subtrahend": 23, "minuend": 42}) == 19
        assert caller.call("echo", [VALUE]) == VALUE
        assert caller.call("echo", {"value": VALUE}) == VALUE
        assert caller.call("echo", [0]) == 0
        assert caller.call("nothing") is None
        assert caller.call("nothing", []) is None
        assert strikes(broker, endpoint) == [0]


def test_its_own_errors_pass(working: Library, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with attached(working, url + "?role=worker"), PlainCaller(url) as caller:
        with pytest.raises(RemoteError) as caught:
            caller.call("fail")
        assert caught.value.args == WORKERS[working.name].fault
        with pytest.raises(RemoteError) as caught:
            caller.call("no.such.method", [1])
        assert caught.value.code == -32601
        assert caught.value.data is None or "outcome" not in caught.value.data, "this error is the library's own"
        assert caller.call("subtract", [3, 1]) == 2


def test_notifications_arrive_and_unknown_ones_harm_nobody(
    working: Library, broker: BrokerProcess, endpoint: str
) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with attached(working, url + "?role=worker"), PlainCaller(url) as caller:
        for method in ("log", "no.such.method"):
            caller.socket.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": ["one"]}))
        caller.socket.send(json.dumps({"jsonrpc": "2.0", "method": "log", "params": {"line": "two"}}))
        until(lambda: len(caller.call("logged")) == 2, "both have come")
        assert sorted(caller.call("logged")) == ["one", "two"]
        assert strikes(broker, endpoint) == [0]


def test_twenty_in_flight_answered_from_the_last_to_the_first(
    working: Library, broker: BrokerProcess, endpoint: str
) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with (
        attached(working, url + "?role=worker"),
        PlainCaller(url) as control,
        dial(url) as bare,
    ):
        for key in range(20):
            request = {"jsonrpc": "2.0", "id": f"call {key}", "method": "hold", "params": {"key": key}}
            bare.send(json.dumps(request))
        until(lambda: control.call("held") == 20, "all are in flight")
        for key in reversed(range(20)):
            control.call("release", [key])
            reply = json.loads(bare.recv(PATIENCE_S))
            assert reply == {"jsonrpc": "2.0", "id": f"call {key}", "result": key}


def test_after_a_deadline_and_a_cancelled_call_it_works_on(
    working: Library, broker: BrokerProcess, endpoint: str
) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with attached(working, url + "?role=worker"), PlainCaller(url) as caller, dial(url) as bare:
        with pytest.raises(RemoteError) as caught:
            caller.call("hold", ["late"], meta={"timeout": 0.1})
        assert caught.value.code == -32003
        bare.send(json.dumps({"jsonrpc": "2.0", "id": 7, "method": "hold", "params": ["cancelled"]}))
        until(lambda: held(caller, working) == 1, "it is in flight")
        bare.send(json.dumps({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": 7}}))
        reply = json.loads(bare.recv(PATIENCE_S))
        assert (reply["id"], reply["error"]["code"], reply["error"]["data"]["cause"]) == (7, -32005, "caller")
        if WORKERS[working.name].cancels:
            # the library has answered both with -32800 by now, which nobody waits for any more
            until(lambda: caller.call("cancelled") == ["late", "cancelled"], "the library has cancelled both")
        else:
            caller.call("release", ["late"])  # its reply comes too late
            caller.call("release", ["cancelled"])
        assert caller.call("subtract", [3, 1]) == 2
        assert strikes(broker, endpoint) == [0]


def held(caller: PlainCaller, working: Library) -> int:
    """How many are held beside the one whose deadline has passed."""
    count: int = caller.call("held")
    return count if WORKERS[working.name].cancels else count - 1


def test_a_library_that_refuses_unknown_members_is_sent_none_unless_it_asks(
    libraries: Any, broker: BrokerProcess, endpoint: str
) -> None:
    working, url = libraries("worker", "jsonrpcserver"), broker.ws(f"/ws/{endpoint}")
    with attached(working, url + "?role=worker"), PlainCaller(url + "?meta=1&timeout=10") as caller:
        assert caller.call("subtract", [42, 23], meta={"timeout": 5, "idempotent": True}) == 19
    with attached(working, url + "?role=worker&meta=1"), PlainCaller(url) as caller:
        # It answers with `id: null`; as one request alone is in flight there, the error is that one's.
        with pytest.raises(RemoteError) as caught:
            caller.call("subtract", [42, 23])
        assert caught.value.code == -32600
        assert strikes(broker, endpoint) == [0]
