"""`AsyncClient` against a real broker: calls, errors, deadlines, cancelling, broadcasts, lost connections."""

import asyncio
import os
import time
from typing import Any

import numpy as np
import pytest

from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.worker.worker import Worker
from tests.peer.harness import CALLER, SECRET, broker_running, run, until


def serving(url: str, **options: Any) -> Worker:
    worker = Worker("data", url, SECRET, **options)
    worker.cancelled = 0  # type: ignore[attr-defined]

    @worker.method
    async def echo(*arguments: Any, **named: Any) -> Any:
        """Say it again."""
        return named or list(arguments)

    @worker.method
    async def hang() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            worker.cancelled += 1  # type: ignore[attr-defined]
            raise

    @worker.method
    async def fail(text: str) -> None:
        raise LookupError(text)

    return worker


def test_call_with_everything_json_and_numpy_know() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client, serving(broker.url):
            assert await client.call("data/echo") == []
            assert await client.call("data/echo", {"a": 1, "b": [None, "ä"]}) == {"a": 1, "b": [None, "ä"]}
            assert await client.call("data/echo", [1, (2, 3)]) == [1, [2, 3]]
            image = np.arange(100_000, dtype="f8").reshape(100, 1000)
            reply = await client.call("data/echo", {"raw": os.urandom(1000), "image": image, "deep": [{"x": b""}]})
            assert (reply["image"] == image).all()
            assert len(reply["raw"]) == 1000
            assert reply["deep"] == [{"x": b""}]
            assert (await client.ping())["uptime_s"] >= 0
            assert [one["endpoint"] for one in await client.endpoints()] == ["data"]
            (worker,) = (await client.describe("data"))["workers"]
            assert worker["info"]["methods"]["echo"]["doc"] == "Say it again."

    run(main)


def test_errors_come_back_typed() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            with pytest.raises(errors.NoEndpoint):
                await client.call("data/echo")
            worker = await serving(broker.url).start()
            with pytest.raises(
                errors.RemoteError, match="data/fail: worker_error: LookupError: no such file"
            ) as caught:
                await client.call("data/fail", ["no such file"])
            error = caught.value
            assert (error.type, error.detail, error.endpoint, error.method) == (
                "LookupError", "no such file", "data", "fail",
            )  # fmt: skip
            assert error.worker == worker.peer
            assert error.attempts == 1
            assert error.dispatched
            assert 0 < error.elapsed_s < 30
            with pytest.raises(errors.NoMethod):
                await client.call("data/nothing")
            with pytest.raises(errors.RemoteError, match="missing a required argument: 'text'"):
                await client.call("data/fail")
            await worker.stop()
            with pytest.raises(errors.NoWorker):
                await client.call("data/echo")
            async with AsyncClient(broker.url, CALLER) as other:
                with pytest.raises(errors.Denied):
                    await other.call("secret/read")
                with pytest.raises(errors.Denied):
                    await other.call("broker.admin.peers")

    run(main)


def test_what_cannot_be_asked_is_refused_before_it_is_sent() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            for params in (5, "text", b"bytes", np.zeros(2)):
                with pytest.raises(TypeError, match="give a dict"):
                    await client.call("data/echo", params)
            with pytest.raises(ValueError, match="type set is no JSON"):
                await client.call("data/echo", [{1}])
            with pytest.raises(errors.InvalidRequest, match="endpoint/method"):
                await client.call("echo")
            with pytest.raises(errors.InvalidRequest, match="positive"):
                await client.call("data/echo", timeout=0)
            with pytest.raises(TypeError, match="seconds"):
                await client.call("data/echo", timeout="5")  # type: ignore[arg-type]
            with pytest.raises(errors.TooLarge):
                await client.publish("data", bytes(17 << 20))
            assert broker.router.counters.accepted == 0

    run(main)


def test_a_deadline_is_kept_and_the_worker_is_told() -> None:
    async def main() -> None:
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            serving(broker.url) as worker,
        ):
            began = time.monotonic()
            with pytest.raises(errors.DeadlineExceeded) as caught:
                await client.call("data/hang", timeout=0.2)
            assert caught.value.phase == "executing"
            assert 0.2 <= time.monotonic() - began < 5
            await until(lambda: worker.cancelled == 1, "the function is cancelled")  # type: ignore[attr-defined]

    run(main)


def test_cancelling_the_task_cancels_the_function() -> None:
    async def main() -> None:
        async with (
            broker_running() as broker,
            AsyncClient(broker.url, SECRET) as client,
            serving(broker.url) as worker,
        ):
            task = asyncio.create_task(client.call("data/hang"))
            await until(lambda: broker.router.pending.count == 1, "it is pending")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: worker.cancelled == 1, "the function is cancelled")  # type: ignore[attr-defined]
            future = await client.submit("data/hang")
            await until(lambda: broker.router.pending.count == 1, "it is pending")
            future.cancel()
            await until(lambda: worker.cancelled == 2, "the function is cancelled")  # type: ignore[attr-defined]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.call("data/hang"), 0.1)
            await until(lambda: worker.cancelled == 3, "the function is cancelled")  # type: ignore[attr-defined]
            assert broker.router.counters.ended["cancelled"] == 3

    run(main)


def test_submit_and_map_keep_their_order_and_their_bound() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            worker = Worker("data", broker.url, SECRET)
            most = now = 0

            @worker.method
            async def square(x: int) -> int:
                nonlocal most, now
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.001 * (10 - x % 10))
                now -= 1
                if x == 77:
                    raise ValueError("not this one")
                return x * x

            async with worker:
                many = ([x] for x in range(60))
                assert [r async for r in client.map("data/square", many, concurrency=7)] == [x * x for x in range(60)]
                assert 2 <= most <= 7
                found = [r async for r in client.map("data/square", [[76], [77], [78]], return_exceptions=True)]
                assert found[0] == 76 * 76
                assert isinstance(found[1], errors.RemoteError)
                with pytest.raises(errors.RemoteError):
                    [r async for r in client.map("data/square", [[77]] * 30)]
                await until(lambda: broker.router.pending.count == 0, "the rest is cancelled")
                futures = [await client.submit("data/square", [x], timeout=5) for x in range(20)]
                assert await asyncio.gather(*futures) == [x * x for x in range(20)]
                with pytest.raises(ValueError, match="concurrency"):
                    [r async for r in client.map("data/square", [], concurrency=0)]

    run(main)


def test_broadcasts_reach_subscribers_with_what_they_missed() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client:
            async with await client.subscribe("data") as messages, await client.subscribe("data", topic="new") as news:
                everybody = await client.subscribe(None)
                assert await client.publish("data", {"x": b"abc"}) == {"seq": 1, "listeners": 1}
                await client.publish("data", 2, topic="new")
                await client.publish(None, "all")
                first = await messages.get(5)
                assert (first.endpoint, first.topic, first.seq, first.data, first.missed) == (
                    "data", None, 1, {"x": b"abc"}, 0,
                )  # fmt: skip
                second = await news.get(5)
                assert (second.topic, second.seq, second.data) == ("new", 1, 2)
                assert (await everybody.get(5)).data == "all"
                with pytest.raises(TimeoutError, match=r"no broadcast of data within 0\.05 s"):
                    await messages.get(0.05)
                for number in range(1200):
                    await client.publish("data", number)
                await until(lambda: messages.dropped == 200, "the oldest were dropped")
                assert (await messages.get(1)).data == 200
                await everybody.close()
                assert [message async for message in everybody] == []
            assert await client.publish("data") == {"seq": 1202, "listeners": 0}
            with pytest.raises(ValueError, match="a topic belongs to an endpoint"):
                await client.publish(None, 1, topic="new")

    run(main)


def test_no_broker_a_wrong_token_and_no_url_are_told_apart() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            with pytest.raises(errors.Refused, match="token") as refused:
                await AsyncClient(broker.url, "wrong" * 9).connect()
            assert refused.value.status == 401
            assert "wrong" not in str(refused.value)
            port = broker.port
        with pytest.raises(errors.CannotConnect, match=f"no broker at http://127.0.0.1:{port}: Connection refused"):
            await AsyncClient(f"http://127.0.0.1:{port}", "x").call("broker.ping")
        with pytest.raises(errors.InvalidRequest, match="no URL of a broker"):
            await AsyncClient("ftp://x", "x").connect()
        with pytest.raises(errors.InvalidRequest, match="neither a query"):
            await AsyncClient("http://x:1/?token=5", "x").connect()

    run(main)


def test_what_answers_there_may_be_no_broker() -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(replies.pop())
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        replies = [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"]
        with pytest.raises(errors.CannotConnect, match=r"what answers there is no broker \(HTTP 404"):
            await AsyncClient(url, "x").connect()
        with pytest.raises(errors.CannotConnect, match="no HTTP"):
            await AsyncClient(url, "x").connect()
        replies = [b'HTTP/1.1 503 Busy\r\nContent-Length: 17\r\n\r\n{"error":"later"}']
        with pytest.raises(errors.Refused, match="later") as refused:
            await AsyncClient(url, "x").connect()
        assert refused.value.come_back
        server.close()
        await server.wait_closed()

    run(main)


def test_a_broker_restarted_under_its_feet() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            port = broker.port
            client = await AsyncClient(broker.url, SECRET, grace=0).connect()
            messages = await client.subscribe("data")
            worker = await serving(broker.url).start()
            hanging = asyncio.create_task(client.call("data/hang"))
            again = asyncio.create_task(client.call("data/hang", timeout=0.5, idempotent=True))
            await until(lambda: broker.router.pending.count == 2, "both are pending")
            broker.links.links[0].abort()  # the client's socket breaks
            with pytest.raises(errors.ConnectionLost, match="It may have run") as lost:
                await hanging
            assert lost.value.may_have_executed
            with pytest.raises(errors.DeadlineExceeded):
                await again  # it was sent again
        waiting = asyncio.create_task(client.call("data/echo", [1], wait=True))
        await asyncio.sleep(0.05)
        async with broker_running(port):
            assert await waiting == [1], "asked while there was none"
            await client.publish("data", "back")
            assert (await messages.get(10)).data == "back"
            await worker.stop()
            await client.close()
            with pytest.raises(errors.ConnectionLost, match="closed on this side"):
                await client.call("data/echo")

    run(main)


def test_nothing_hangs_beyond_its_deadline_when_the_broker_is_gone() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            client = await AsyncClient(broker.url, SECRET).connect()
        began = time.monotonic()
        with pytest.raises(errors.ConnectionLost, match="did not reach the broker") as lost:
            await client.call("data/echo", timeout=0.2)
        assert not lost.value.may_have_executed
        assert time.monotonic() - began < 6
        await client.close()

    run(main)


def test_connecting_counts_against_the_deadline() -> None:
    async def main() -> None:
        silent: list[asyncio.StreamWriter] = []
        server = await asyncio.start_server(lambda _, writer: silent.append(writer), "127.0.0.1", 0)
        client = AsyncClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", SECRET, timeout=0.25)
        loop = asyncio.get_running_loop()
        for ask in (
            client.connect(), client.call("data/echo", timeout=0.2), client.submit("data/echo", timeout=0.2),
            client.notify("data/echo"), client.subscribe("data"), client.endpoints(), anext(client.map("data/x", [1])),
        ):  # fmt: skip
            began = loop.time()
            with pytest.raises(errors.CannotConnect, match=r"no answer within 0\.2"):
                await ask
            assert loop.time() - began < 5  # without a deadline it is 10
        await client.close()
        server.close()
        for writer in silent:
            writer.close()

    run(main)


def test_without_reconnect_the_first_loss_is_the_end() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            client = await AsyncClient(broker.url, SECRET, reconnect=False).connect()
            messages = await client.subscribe("data")
        with pytest.raises(errors.ConnectionLost, match="4412"):
            await messages.get(5)
        with pytest.raises(errors.ConnectionLost, match="4412"):
            await client.call("data/echo")
        await client.close()

    run(main)


def test_close_ends_what_is_in_flight() -> None:
    async def main() -> None:
        async with broker_running() as broker:
            client = await AsyncClient(broker.url, SECRET).connect()
            async with serving(broker.url) as worker:
                task = asyncio.create_task(client.call("data/hang"))
                await until(lambda: broker.router.pending.count == 1, "it is pending")
                await client.close()
                with pytest.raises(errors.ConnectionLost):
                    await task
                await client.close()
                await until(lambda: worker.cancelled == 1, "the function is cancelled")  # type: ignore[attr-defined]
            assert not broker.links.links or await closed(broker)

    async def closed(broker: Any) -> bool:
        await until(lambda: not broker.links.links, "all links are gone")
        return True

    run(main)


def test_ten_thousand_in_flight_from_one_client() -> None:
    async def main() -> None:
        async with (
            broker_running(limits={"queue_max": 20_000}) as broker,
            AsyncClient(broker.url, SECRET) as client,
            serving(broker.url),
        ):
            calls = [client.call("data/echo", [x, "x" * 300]) for x in range(10_000)]
            assert [reply[0] for reply in await asyncio.gather(*calls)] == list(range(10_000))
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client, serving(broker.url):
            found = await asyncio.gather(*(client.call("data/echo", [x]) for x in range(3000)), return_exceptions=True)
            surplus = [one for one in found if isinstance(one, errors.Overloaded)]
            assert 0 < len(surplus) < 3000
            assert surplus[0].bound == "queue"
            assert len(surplus) + sum(isinstance(one, list) for one in found) == 3000

    run(main)


def test_much_in_flight_waits_for_the_outbox_instead_of_breaking_the_link() -> None:
    async def main() -> None:
        async with broker_running() as broker, AsyncClient(broker.url, SECRET) as client, serving(broker.url):
            block = bytes(1 << 20)
            calls = [client.call("data/echo", [x, block]) for x in range(40)]
            replies = await asyncio.gather(*calls)
            assert [reply[0] for reply in replies] == list(range(40))
            assert all(reply[1] == block for reply in replies)

    run(main)


def test_several_clients_share_nothing() -> None:
    async def main() -> None:
        async with (
            broker_running() as one,
            broker_running() as two,
            serving(one.url),
            AsyncClient(one.url, SECRET) as a,
            AsyncClient(two.url, SECRET) as b,
        ):
            assert await a.call("data/echo", [1]) == [1]
            with pytest.raises(errors.NoEndpoint):
                await b.call("data/echo", [1])

    run(main)
