"""`/livez` and `/readyz`."""

from __future__ import annotations

import json

from tests.transports.websocket.harness import run, serving


def test_alive_and_ready_until_it_drains() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            await caller.ask("m")
            await worker.taken()
            for path in ("/livez", "/readyz"):
                answer = await world.http(path, None)
                assert (answer.code, json.loads(answer.body)) == (200, {"status": "ok"})
            await world.broker.drain(0)
            answer = await world.http("/readyz", None)
            assert (answer.code, json.loads(answer.body)) == (503, {"status": "draining", "pending": 1})
            assert (await world.http("/livez", None)).code == 200
            assert await world.metric("broker_draining") == 1

    run(main)


def test_they_say_nothing_about_the_server() -> None:
    async def main() -> None:
        async with serving() as world:
            for path in ("/livez", "/readyz", "/nothing"):
                headers = (await world.http(path, None)).headers
                assert "Server" not in headers
                assert headers["Cache-Control"] == "no-store"
                assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]

    run(main)
