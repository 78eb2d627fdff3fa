"""A command per request: what it is given, what becomes of its output, and that nothing of it is left."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.worker.command import Command
from broker.worker.worker import Worker
from tests.peer.harness import SECRET, broker_running, run, until


def with_command(script: str, test: Callable[[AsyncClient], Awaitable[None]], *command: str) -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET, timeout=20) as client:
            worker = Worker("sh", broker.url, SECRET, drain=0.1)
            worker.add_fallback(Command(command or ("sh", "-c", script)))
            async with worker:
                await test(client)

    run(main)


def test_json_in_json_out() -> None:
    async def test(client: AsyncClient) -> None:
        assert await client.call("sh/any", {"a": [1, "ä"]}) == {"a": [1, "ä"]}
        assert await client.call("sh/any") is None
        big = ["x" * 1_000_000]
        assert await client.call("sh/any", big) == big
        assert await client.call("sh/any", [b"bytes"]) == [b"bytes"], "base64 for it, bytes for us"

    with_command("cat", test)


def test_what_it_finds_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_TOKEN", "a secret")
    monkeypatch.setenv("BROKER_AUTH__ADMIN_TOKEN", "another")

    async def test(client: AsyncClient) -> None:
        endpoint, method, timeout, token = await client.call("sh/read", timeout=7)
        assert (endpoint, method, token) == ("sh", "read", "")
        assert 0 < float(timeout) <= 7

    with_command(
        """
        SECRETS="$BROKER_TOKEN$BROKER_AUTH__ADMIN_TOKEN"
        echo "[\\"$BROKER_ENDPOINT\\",\\"$BROKER_METHOD\\",\\"$BROKER_TIMEOUT\\",\\"$SECRETS\\"]"
        """,
        test,
    )


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo working; echo {}", "sh printed what is no JSON"),
        ("echo first >&2; echo the reason >&2; exit 3", "sh exited with 3: the reason"),
        ("kill -9 $$", "sh was ended by signal 9"),
        ("yes", "sh printed more than"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(script: str, says: str) -> None:
    async def test(client: AsyncClient) -> None:
        with pytest.raises(errors.RemoteError, match=says):
            await client.call("sh/any", [1])

    with_command(script, test)


def test_a_command_that_is_not_there() -> None:
    async def test(client: AsyncClient) -> None:
        with pytest.raises(errors.RemoteError, match="/no/such/command cannot be run: No such file"):
            await client.call("sh/any")

    with_command("", test, "/no/such/command")


def test_one_that_does_not_read_is_no_trouble() -> None:
    async def test(client: AsyncClient) -> None:
        assert await client.call("sh/any", ["x" * 3_000_000]) == 1

    with_command("echo 1", test)


def test_one_that_closes_its_input_is_no_trouble_on_the_loop_of_the_command_line() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET, timeout=20) as client:
            worker = Worker("sh", broker.url, SECRET, drain=0.1)
            worker.add_fallback(Command(("sh", "-c", "exec <&-; echo 5")))
            async with worker:
                assert [five async for five in client.map("sh/any", [{"a": 1}] * 20)] == [5] * 20

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_it_is_killed_with_its_children_when_nobody_waits(tmp_path: Path) -> None:
    def gone(number: str) -> bool:
        """Whether it runs no more; a zombie that nobody has waited for yet does not run."""
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    def started(file: Path) -> bool:
        return file.exists() and file.read_text().count("\n") == 2

    async def test(client: AsyncClient) -> None:
        for cancel in (False, True):
            file = tmp_path / f"{cancel}"
            task: asyncio.Task[Any] = asyncio.create_task(
                client.call("sh/any", [str(file)], timeout=20 if cancel else 0.5)
            )
            await until(partial(started, file), "it runs")
            if cancel:
                task.cancel()
            with pytest.raises(asyncio.CancelledError if cancel else errors.DeadlineExceeded):
                await task
            for number in file.read_text().split():
                await until(partial(gone, number), f"process {number} is gone")

    script = """file=$(cat | tr -d '["]'); sleep 60 & (echo $$; echo $!) > "$file.new"; mv "$file.new" "$file"; wait"""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    with_command(script, test)
