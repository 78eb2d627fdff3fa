"""The budget of bytes over everything a broker holds, with real sockets: refused above it, nothing left afterwards."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

from tests.transports.http.harness import ask, written
from tests.transports.websocket.harness import LISTENER, World, config, run, serving, until

KIB = 1024
MIB = KIB * KIB
BODY = "x" * (700 * KIB)


@contextlib.asynccontextmanager
async def deaf(world: World, path: str) -> AsyncIterator[None]:
    """One who asks for events over HTTP and reads nothing."""
    quiet = socket.create_connection(("127.0.0.1", world.broker.port))
    quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    quiet.sendall(written(world, path, None, LISTENER, "GET", {}))
    try:
        yield
    finally:
        quiet.close()


def test_fault_13_large_requests_and_slow_readers_are_refused_above_the_budget_and_leave_nothing() -> None:
    async def main() -> None:
        limits = {"memory_soft_bytes": 3 * MIB, "memory_hard_bytes": 3 * MIB, "stall_s": 30.0}
        async with serving(config(limits=limits)) as world:
            budget = world.broker.router.state.budget
            worker, publisher = await world.worker(), await world.caller()
            slow = await world.caller("lab", "role=listener")
            slow.socket.transport.pause_reading()
            async with deaf(world, "/events/lab"):
                await until(lambda: world.broker.router.registry.by_name["lab"].listeners == 2, "both listen")
                for _ in range(100):  # until the kernel takes no more, and their outboxes fill
                    await publisher.call("broker.publish", {"data": BODY[: 100 * KIB]})
                    if budget.outboxes > MIB:
                        break
                assert budget.used >= budget.outboxes > MIB
                await until(lambda: len(world.broker.router.fanouts) == 0, "all copies are on their way")

                caller = await world.caller()
                refused, taken = None, []
                while refused is None:
                    wire_id = await caller.ask("read", {"large": BODY})
                    await caller.sync()
                    refused = next((m for m in caller.inbox if m.get("id") == wire_id), None)
                    taken.append(wire_id)
                taken.pop()
                data = refused["error"]["data"]
                assert (data["outcome"], data["bound"], data["retryable"]) == ("overloaded", "memory", True)
                assert data["retry_after_ms"] > 0
                assert 1 <= len(taken) <= 5 and budget.used > 3 * MIB
                answer = await ask(world, "/call/lab/read", {"small": 1})
                assert (answer.status, answer.outcome) == (429, "overloaded") and answer.headers["retry-after"]

                told = await publisher.call("broker.publish", {"data": 1})
                assert told["error"]["data"]["bound"] == "memory"
                assert world.counters.broadcasts_refused == 1
                told = (await (await world.peer()).call("broker.admin.memory"))["result"]
                assert told["used"] == budget.used and told["soft"] == 3 * MIB
                assert await world.metric("broker_memory_used_bytes") > 3 * MIB
                for wire_id in taken:
                    await worker.serve_one("done")
                    assert (await caller.reply(wire_id))["result"] == "done"
            slow.socket.transport.resume_reading()
            await slow.socket.close()
            await until(lambda: budget.used == budget.outboxes == 0, "nothing is held any more")
            wire_id = await caller.ask("read", {"large": BODY})
            await worker.serve_one("again")
            assert (await caller.reply(wire_id))["result"] == "again"
            await until(lambda: budget.used == 0, "nothing is held any more")
            assert world.books_balance()
            world.broker.router.check()

    run(main)
