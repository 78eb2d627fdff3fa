"""The examples of the JSON-RPC 2.0 specification, section 7 (https://www.jsonrpc.org/specification#examples).

The messages are the specification's, character by character; replies are compared by result, code, message and id.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.transports.websocket.harness import Peer, run, serving

PARSE_ERROR = {"code": -32700, "message": "Parse error"}
INVALID_REQUEST = {"code": -32600, "message": "Invalid Request"}
METHOD_NOT_FOUND = {"code": -32601, "message": "Method not found"}


def reply(wire_id: Any, **member: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", **member, "id": wire_id}


# title: what is sent, and the reply; None: there is none
EXAMPLES: dict[str, list[tuple[str, Any]]] = {
    "rpc call with positional parameters": [
        ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}', reply(1, result=19)),
        ('{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}', reply(2, result=-19)),
    ],
    "rpc call with named parameters": [
        (
            '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
            reply(3, result=19),
        ),
        (
            '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
            reply(4, result=19),
        ),
    ],
    "a Notification": [
        ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
        ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    ],
    "rpc call of non-existent method": [
        ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', reply("1", error=METHOD_NOT_FOUND)),
    ],
    "rpc call with invalid JSON": [
        ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', reply(None, error=PARSE_ERROR)),
    ],
    "rpc call with invalid Request object": [
        ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', reply(None, error=INVALID_REQUEST)),
    ],
    "rpc call Batch, invalid JSON": [
        (
            """[
  {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
  {"jsonrpc": "2.0", "method"
]""",
            reply(None, error=PARSE_ERROR),
        ),
    ],
    "rpc call with an empty Array": [
        ("[]", reply(None, error=INVALID_REQUEST)),
    ],
    "rpc call with an invalid Batch (but not empty)": [
        ("[1]", [reply(None, error=INVALID_REQUEST)]),
    ],
    "rpc call with invalid Batch": [
        ("[1,2,3]", [reply(None, error=INVALID_REQUEST)] * 3),
    ],
    "rpc call Batch": [
        (
            """[
    {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
    {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
    {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
    {"foo": "boo"},
    {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
    {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
]""",
            [
                reply("1", result=7),
                reply("2", result=19),
                reply(None, error=INVALID_REQUEST),
                reply("5", error=METHOD_NOT_FOUND),
                reply("9", result=["hello", 5]),
            ],
        ),
    ],
    "rpc call Batch (all notifications)": [
        (
            """[
    {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
    {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
]""",
            None,
        ),
    ],
}
NOTIFIED = {"a Notification": 2, "rpc call Batch": 1, "rpc call Batch (all notifications)": 2}
"""how many notifications reach the worker"""


def difference(params: Any) -> int:
    minuend, subtrahend = params if isinstance(params, list) else (params["minuend"], params["subtrahend"])
    result: int = minuend - subtrahend
    return result


METHODS: dict[str, Callable[[Any], Any]] = {"subtract": difference, "sum": sum, "get_data": lambda params: ["hello", 5]}


async def work(worker: Peer, notified: list[Any]) -> None:
    """The server that the specification has in mind."""
    while True:
        request = await worker.read()
        if "id" not in request:
            notified.append(request)
        elif request["method"] in METHODS:
            await worker.answer(request, result=METHODS[request["method"]](request.get("params")))
        else:
            await worker.answer(request, error=METHOD_NOT_FOUND)


def bare(replies: Any) -> Any:
    """Without the errors' data, of which the specification's examples have none."""
    if isinstance(replies, list):
        return [bare(member) for member in replies]
    if "error" in replies:
        replies["error"].pop("data", None)
    return replies


def in_order(replies: Any) -> Any:
    """ "The Response objects being returned from a batch call MAY be returned in any order" (section 6)."""
    return (
        sorted(replies, key=lambda member: json.dumps(member, sort_keys=True)) if isinstance(replies, list) else replies
    )


@pytest.mark.parametrize("declared", [False, True], ids=["the worker refuses", "the broker refuses"])
@pytest.mark.parametrize("title", EXAMPLES)
def test_examples(title: str, declared: bool) -> None:
    """`declared`: the worker has said which methods it has, so that the broker knows those that do not exist."""

    async def main() -> None:
        notified: list[Any] = []
        async with serving() as world, AsyncExitStack() as stack:
            worker = await world.worker("spec")
            if declared:
                methods = [*METHODS, "update", "notify_hello", "notify_sum"]
                await worker.send({"jsonrpc": "2.0", "id": 0, "method": "broker.serve", "params": {"methods": methods}})
                assert "result" in await worker.reply(0)
            working = asyncio.create_task(work(worker, notified))
            stack.callback(working.cancel)
            caller = await world.peer("/ws/spec")
            for sent, expected in EXAMPLES[title]:
                await caller.send(sent)
                if expected is not None:
                    assert in_order(bare(await caller.read())) == in_order(expected)
            assert await caller.silent()
            await worker_has(notified, NOTIFIED.get(title, 0) - (declared and title == "a Notification"))

    run(main)


async def worker_has(notified: list[Any], count: int) -> None:
    async with asyncio.timeout(10):
        while len(notified) < count:
            await asyncio.sleep(0.005)
    assert len(notified) == count
