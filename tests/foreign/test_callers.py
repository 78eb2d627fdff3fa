"""Libraries that know nothing of the broker call through it, and see outcomes as they see any server's errors."""

from __future__ import annotations

from concurrent.futures import wait
from typing import Any

import pytest

from tests.foreign.harness import (
    PATIENCE_S,
    BrokerProcess,
    Caller,
    Library,
    PlainCaller,
    PlainWorker,
    RemoteError,
    until,
)
from tests.foreign.libraries import CALLERS

VALUE = {"text": 'é \u2028 𝄞 \\ " \u0001', "deep": [[1.5, -0.25, None, True]], "large": 2**53 - 1, "": {}}
FAULTS = [
    RemoteError(1234, "no film", {"tray": [1, None, "é"], "cause": {"code": -32003}}),
    RemoteError(-1, "text as data", "a text"),
    RemoteError(-32050, "a list", [0, ""]),
    RemoteError(-32602, "of the worker's own", {"outcome": "deadline"}),
]


def subtract(params: Any) -> Any:
    if isinstance(params, dict):
        return params["minuend"] - params["subtrahend"]
    return params[0] - params[1]


def failure(params: Any) -> Any:
    raise FAULTS[params[0]]


METHODS = {"subtract": subtract, "echo": lambda params: params, "nothing": lambda params: None, "fail": failure}


def error_of(caller: Caller, method: str, params: Any = None) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        caller.call(method, params)
    return caught.value


def test_results_come_as_the_worker_gave_them(calling: Library, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with PlainWorker(url + "?role=worker", METHODS) as worker, Caller(calling, url) as caller:
        assert caller.call("subtract", [42, 23]) == 19
        assert caller.call("subtract", {"subtrahend": 23, "minuend": 42}) == 19
        assert caller.call("echo", [VALUE]) == [VALUE]
        assert caller.call("echo", {"value": VALUE}) == {"value": VALUE}
        assert caller.call("nothing") is None
        assert worker.requests[-1].get("params") in (None, [], {})
        assert all(set(request) <= {"jsonrpc", "id", "method", "params"} for request in worker.requests)


def test_without_an_endpoint_in_the_url_methods_name_it(calling: Library, broker: BrokerProcess, endpoint: str) -> None:
    with (
        PlainWorker(broker.ws(f"/ws/{endpoint}?role=worker"), METHODS) as worker,
        Caller(calling, broker.ws("/ws")) as caller,
    ):
        assert caller.call(f"{endpoint}/subtract", [42, 23]) == 19
        assert worker.requests[-1]["method"] == "subtract"
        assert error_of(caller, "subtract", [42, 23]).code == -32600


@pytest.mark.parametrize("index", range(len(FAULTS)))
def test_a_workers_own_error_keeps_code_message_and_data(
    calling: Library, broker: BrokerProcess, endpoint: str, index: int
) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with PlainWorker(url + "?role=worker", METHODS), Caller(calling, url) as caller:
        error, fault = error_of(caller, "fail", [index]), FAULTS[index]
        assert error.args == fault.args


def test_a_notification_reaches_the_worker_and_has_no_answer(
    calling: Library, broker: BrokerProcess, endpoint: str
) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with PlainWorker(url + "?role=worker", METHODS) as worker, Caller(calling, url) as caller:
        caller.notify("log", {"line": "by name"})
        caller.notify("log", ["by position"])
        until(lambda: len(worker.notifications) == 2, "both notifications have come")
        assert worker.notifications == [
            {"jsonrpc": "2.0", "method": "log", "params": {"line": "by name"}},
            {"jsonrpc": "2.0", "method": "log", "params": ["by position"]},
        ]
        assert caller.call("subtract", [3, 1]) == 2


def test_the_default_timeout_of_the_connection_ends_a_call(
    calling: Library, broker: BrokerProcess, endpoint: str
) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with PlainWorker(url + "?role=worker", METHODS) as worker, Caller(calling, url + "?timeout=0.2") as caller:
        error = error_of(caller, "hold", {"key": 1})
        assert (error.code, error.data["outcome"], error.data["phase"]) == (-32003, "deadline", "executing")
        assert (error.data["endpoint"], error.data["method"]) == (endpoint, "hold")
        assert error.data["dispatched"] is True and error.data["elapsed_ms"] >= 200
        until(lambda: bool(worker.notifications), "the worker is told")
        told = worker.notifications[0]
        assert (told["method"], told["params"]) == ("$/cancelRequest", {"id": worker.held[1]})
        worker.release(1)  # too late: dropped
        assert caller.call("subtract", [3, 1]) == 2


def test_broker_call_gives_options_to_libraries_that_cannot(
    calling: Library, broker: BrokerProcess, endpoint: str
) -> None:
    with (
        PlainWorker(broker.ws(f"/ws/{endpoint}?role=worker"), METHODS),
        Caller(calling, broker.ws("/ws")) as caller,
    ):
        call = {"endpoint": endpoint, "method": "subtract", "params": [42, 23], "timeout": 10}
        assert caller.call("broker.call", call) == 19
        error = error_of(caller, "broker.call", {"endpoint": endpoint, "method": "hold", "params": [1], "timeout": 0.1})
        assert (error.code, error.data["outcome"]) == (-32003, "deadline")
        error = error_of(caller, "broker.call", {"endpoint": endpoint, "method": "hold", "timeot": 1})
        assert error.code == -32602 and "timeot" in error.data["detail"]


def test_outcomes_the_broker_makes(calling: Library, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with Caller(calling, url) as caller:
        error = error_of(caller, "subtract", [1, 2])
        assert (error.code, error.message, error.data["outcome"]) == (-32601, "Method not found", "no_endpoint")
        with PlainWorker(url + "?role=worker", METHODS) as worker:
            held = caller.submit("hold", ["lost"])
            until(lambda: "lost" in worker.held, "the worker has it")
        with pytest.raises(RemoteError) as caught:
            held.result(PATIENCE_S)
        assert (caught.value.code, caught.value.data["outcome"]) == (-32002, "worker_lost")
        error = error_of(caller, "subtract", [1, 2])
        assert (error.code, error.data["outcome"], error.data["retryable"]) == (-32001, "no_worker", True)


def test_twenty_in_flight_answered_from_the_last_to_the_first(
    calling: Library, broker: BrokerProcess, endpoint: str
) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with PlainWorker(url + "?role=worker", METHODS) as worker, Caller(calling, url) as caller:
        calls = [caller.submit("hold", {"key": key}) for key in range(20)]
        until(lambda: len(worker.held) == 20, "all are in flight")
        for key in reversed(range(20)):
            worker.release(key)
            assert calls[key].result(PATIENCE_S) == key
            assert not any(call.done() for call in calls[:key])
        assert not wait(calls, 0).not_done


def test_broadcasts_are_heard(calling: Library, broker: BrokerProcess, endpoint: str) -> None:
    if not CALLERS[calling.name].hears:
        pytest.skip("this library shows its user no notifications")
    url = broker.ws(f"/ws/{endpoint}")
    with Caller(calling, url) as caller, PlainCaller(url + "?listen=0") as publisher:
        publisher.call("broker.publish", {"endpoint": endpoint, "data": VALUE})
        publisher.call("broker.publish", {"endpoint": endpoint, "data": None})
        caller.call("broker.publish", {"endpoint": endpoint, "data": [1]})
        heard = caller.heard(3)
        assert [broadcast["data"] for broadcast in heard] == [VALUE, None, [1]]
        assert {broadcast["endpoint"] for broadcast in heard} == {endpoint}
        first = heard[0]["seq"]
        assert [broadcast["seq"] for broadcast in heard] == [first, first + 1, first + 2]


def test_cancelling_tells_the_worker_and_frees_its_slot(calling: Library, broker: BrokerProcess, endpoint: str) -> None:
    if not CALLERS[calling.name].cancels:
        pytest.skip("this library cannot cancel")
    url = broker.ws(f"/ws/{endpoint}")
    with PlainWorker(url + "?role=worker&capacity=1", METHODS) as worker, Caller(calling, url) as caller:
        call = caller.submit("hold", {"key": 1})
        until(lambda: 1 in worker.held, "the worker has it")
        caller.cancel(call)
        with pytest.raises(RemoteError) as caught:
            call.result(PATIENCE_S)
        # vscode-jsonrpc shows what the broker says; python-lsp-jsonrpc has ended the call by itself
        assert (caught.value.code, (caught.value.data or {}).get("cause")) in [(-32005, "caller"), (None, None)]
        until(lambda: bool(worker.notifications), "the worker is told")
        told = worker.notifications[0]
        assert (told["method"], told["params"]) == ("$/cancelRequest", {"id": worker.held[1]})
        assert caller.call("subtract", [3, 1]) == 2
