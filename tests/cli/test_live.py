"""`broker pending` and `broker trace`: what is printed of live requests, for whom, and with which exit code."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from broker.cli.main import main
from broker.client.async_client import AsyncClient
from broker.worker.worker import Worker
from tests.peer.harness import CALLER, SECRET, broker_thread

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACE = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A broker at which one request executes, of an administrator, and two wait, the second of an ordinary caller."""
    free = threading.Event()
    with broker_thread() as (broker, loop):
        began = threading.Event()

        def hold() -> None:
            began.set()
            free.wait(60)

        async def begin() -> tuple[Worker, AsyncClient, AsyncClient]:
            worker = Worker("data", broker.url, SECRET, capacity=1, drain=5)
            worker.add(hold)
            await worker.start()
            admin = AsyncClient(broker.url, SECRET, timeout=100)
            caller = AsyncClient(broker.url, CALLER, timeout=50)
            await admin.submit("data/hold", trace=TRACE)
            await asyncio.to_thread(began.wait, 20)
            await admin.submit("data/hold")
            await caller.submit("data/hold", trace="run \x1b[31m12")
            while broker.router.pending.count < 3:
                await asyncio.sleep(0.005)
            return worker, admin, caller

        async def end(worker: Worker, *clients: AsyncClient) -> None:
            for client in clients:
                await client.close()
            free.set()
            await worker.stop()

        parts = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
        yield broker.url
        asyncio.run_coroutine_threadsafe(end(*parts), loop).result(30)


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    for name in [name for name in os.environ if name.startswith("BROKER_")]:
        monkeypatch.delenv(name)
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("BROKER_URL", url)

    def run(*arguments: str, token: str = SECRET) -> Result:
        monkeypatch.setenv("BROKER_TOKEN", token)
        return Result(main(list(arguments)), *capfd.readouterr())

    return run


def test_pending_lists_where_each_is(run: Run) -> None:
    code, out, err = run("pending")
    head, first, second, third = (line.split() for line in out.splitlines())
    assert (code, err) == (0, "")
    assert head == [
        "request", "endpoint", "method", "state", "peer", "worker", "attempts", "parts", "age_s", "left_s",
    ]  # fmt: skip
    assert first[1:4] == ["data", "hold", "executing"] and first[-4] == "1"
    assert second[1:6] == ["data", "hold", "queued", "as", "1"]
    assert third[1:6] == ["data", "hold", "queued", "as", "2"]
    assert [row["state"] for row in json.loads(run("pending", "--json").out)] == ["executing", "queued", "queued"]
    assert len(json.loads(run("pending", "data", "--json").out)) == 3
    assert json.loads(run("pending", "other", "--json").out) == []


def test_who_is_no_administrator_sees_his_own_and_is_told(run: Run) -> None:
    code, out, err = run("pending", token=CALLER)
    assert code == 0 and len(out.splitlines()) == 2 and "queued as 2" in out
    assert err == "these are your own requests; administrators see all\n"
    (mine,) = json.loads(run("pending", "--json", token=CALLER).out)
    assert mine["principal"] == "caller"
    assert run("trace", str(mine["request"]), token=CALLER).code == 0
    assert run("trace", TRACE, token=CALLER).code == 5, "somebody else's"


def test_trace_shows_one_request_by_number_traceparent_and_trace_id(run: Run) -> None:
    first = json.loads(run("pending", "--json").out)[0]
    by_number = run("trace", str(first["request"]))
    assert by_number.code == 0
    assert by_number.out.splitlines()[0] == f"request {first['request']}: data/hold, executing"
    for line in (f"  worker     {first['worker']}, 1 attempt", f"  trace      {TRACE}"):
        assert line in by_number.out.splitlines()
    assert f"  asked by   {first['peer']} ({first['principal']})" in by_number.out
    for name in (TRACE, TRACE_ID):
        (row,) = json.loads(run("trace", name, "--json").out)
        assert row["request"] == first["request"]


def test_what_others_named_does_nothing_to_the_terminal(run: Run) -> None:
    (mine,) = json.loads(run("pending", "--json", token=CALLER).out)
    out = run("trace", str(mine["request"])).out
    assert "\x1b" not in out and "run ?[31m12" in out


@pytest.mark.parametrize("name", ["999999", "9" * 32, "00-nothing", "\x1b[31m"])
def test_what_is_not_there_is_told_with_an_exit_code(run: Run, name: str) -> None:
    code, out, err = run("trace", name)
    assert (code, out) == (5, "")
    assert err.startswith("broker: no live request is ") and err.count("\n") == 1 and "\x1b" not in err
