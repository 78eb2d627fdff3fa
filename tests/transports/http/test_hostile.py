"""Attacks of the list in docs/hostile.md on the HTTP routes, each by its number, and other bad input."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from tests.transports.http.harness import ask, wire, written
from tests.transports.websocket.harness import CALLER, config, run, serving

ROUTES = (
    ("POST", "/rpc"),
    ("POST", "/call/lab/m"),
    ("POST", "/broadcast"),
    ("POST", "/broadcast/lab"),
    ("GET", "/events/lab"),
    ("GET", "/whoami"),
    ("POST", "/logout"),
    ("POST", "/ticket"),
)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_row_03_no_route_answers_a_stranger(method: str, path: str) -> None:
    async def main() -> None:
        async with serving() as world:
            assert (await ask(world, path, method=method, secret=None)).status == 401
            assert (await ask(world, path, method=method, secret="wrong" * 8)).status == 401
            assert world.counters.attached == world.counters.accepted == world.counters.broadcasts == 0

    run(main)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
def test_row_04_pages_of_other_origins_are_refused(origin: str) -> None:
    async def main() -> None:
        async with serving() as world:
            headers = {"Origin": origin.format(port=world.broker.port)}
            for method, path in (*ROUTES, ("POST", "/login")):
                answer = await ask(world, path, method=method, headers=headers)
                assert answer.status == 403, path
                assert "access-control-allow-origin" not in answer.headers
                answer = await ask(world, path, method="OPTIONS", secret=None, headers=headers)
                assert answer.status == 403 and "access-control-allow-origin" not in answer.headers
            assert world.counters.attached == 0

    run(main)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "localhost:1"])
def test_row_05_a_rebound_name_is_answered_nothing(host: str) -> None:
    async def main() -> None:
        async with serving() as world:
            name = host.format(port=world.broker.port)
            for method, path in (*ROUTES, ("POST", "/login"), ("OPTIONS", "/rpc")):
                answer = await ask(world, path, method=method, headers={"Host": name, "Origin": f"http://{name}"})
                assert answer.status == 421, path
            assert world.counters.attached == 0

    run(main)


def test_row_06_no_secret_reaches_an_answer_or_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    canary = "canary-0123456789-abcdefghijklmnopqrstuv"

    async def main() -> None:
        async with serving() as world:
            cookie = f"broker-{world.broker.port}={canary}"
            own = {"Origin": f"http://127.0.0.1:{world.broker.port}"}
            answers = [
                await ask(world, "/login", {"token": canary}, secret=None),
                await ask(world, "/login", f'{{"token": "{canary}", }}'.encode(), secret=None),
                await ask(world, "/whoami", method="GET", secret=None, headers=own | {"Cookie": cookie}),
                await ask(world, "/whoami", method="GET", secret=None, headers={"Cookie": cookie}),
                await ask(world, "/whoami", method="GET", secret=None, headers=own | {"Cookie": f"{cookie}; {cookie}"}),
                await ask(world, "/call/lab/m", secret=canary),
                await ask(world, "/rpc", b"{", secret=canary),
            ]
            for answer in answers:
                assert answer.status in (400, 401, 403)
                assert canary not in f"{answer.headers} {answer.body!r}"

    with caplog.at_level(logging.DEBUG):
        run(main)
    assert canary not in caplog.text


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
        b"Content-Length: +2\r\n\r\n{}",
        b"Content-Length: 0x2\r\n\r\n{}",
        b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_row_27_what_two_parsers_could_read_differently_is_refused(lines: bytes) -> None:
    """What follows on the connection is not looked at: it may be somebody's smuggled request."""

    async def main() -> None:
        async with serving() as world, wire(world) as connection:
            head = written(world, "/call/lab/m", None, CALLER, "POST", {})[:-2]
            connection.send(head + lines + written(world, "/livez", None, CALLER, "GET", {}))
            rest = await connection.rest()
            assert rest.startswith(b"HTTP/1.1 400 ") and b"200 OK" not in rest, rest
            assert world.counters.accepted == 0

    run(main)


def test_row_27_a_second_host_is_refused() -> None:
    async def main() -> None:
        async with serving() as world:
            for method, path in ROUTES:
                async with wire(world) as connection:
                    request = written(world, path, b"", CALLER, method, {})
                    connection.send(request.replace(b"\r\n\r\n", b"\r\nHost: evil.example\r\n\r\n", 1))
                    assert (await connection.header())[0] == 400
            async with wire(world) as connection:
                connection.send(b"POST http://evil.example/call/lab/m HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert (await connection.header())[0] in (400, 404, 421)

    run(main)


def test_row_27_a_forged_forwarded_for_is_nobody() -> None:
    async def main() -> None:
        async with serving(config(auth={"guesses_per_minute": 2})) as world:
            statuses = [
                (await ask(world, "/call/lab/m", secret="x" * 40, headers={"X-Forwarded-For": f"10.0.0.{n}"})).status
                for n in range(3)
            ]
            assert statuses == [401, 401, 429], "one bucket for the one address there is"
            worker = await world.worker()
            forged = {"X-Forwarded-For": "10.9.9.9", "X-Forwarded-Proto": "https"}
            asking = asyncio.create_task(ask(world, "/call/lab/m", headers=forged))
            call = await worker.taken()
            sessions = {s.dialect: s.remote for s in world.broker.router.sessions.by_id.values()}
            assert sessions["http"] == "127.0.0.1"
            await worker.answer(call, result=1)
            await asking
            answer = await ask(world, "/login", {"token": CALLER}, headers=forged)
            assert "Secure" not in answer.headers["set-cookie"], "believed only from server.trusted_proxies"

    run(main)


# ---------------------------------------------------------------- CORS


def test_an_allow_listed_page_may_ask_and_read() -> None:
    async def main() -> None:
        async with serving(config(server={"allowed_origins": ["https://page.example"]})) as world:
            origin = {"Origin": "https://page.example"}
            for path in ("/call/lab/m", "/rpc", "/events/lab", "/whoami", "/ticket", "/broadcast"):
                preflight = origin | {"Access-Control-Request-Method": "POST"}
                answer = await ask(world, path, method="OPTIONS", secret=None, headers=preflight)
                assert answer.status == 204 and answer.body == b"", path
                assert answer.headers["access-control-allow-origin"] == "https://page.example"
                assert answer.headers["access-control-allow-credentials"] == "true"
                assert answer.headers["vary"] == "Origin"
                method = "GET" if path in ("/events/lab", "/whoami") else "POST"
                assert method in answer.headers["access-control-allow-methods"].split(", ")
                assert "Authorization" in answer.headers["access-control-allow-headers"]
            for secret, status in ((CALLER, 404), (None, 401)):
                answer = await ask(world, "/call/lab/m", secret=secret, headers=origin)
                assert answer.status == status, "what is refused can be read too"
                assert answer.headers["access-control-allow-origin"] == "https://page.example"
                assert "Broker-Outcome" in answer.headers["access-control-expose-headers"]

    run(main)


def test_nobody_else_is_told_that_they_may() -> None:
    async def main() -> None:
        async with serving(config(server={"allowed_origins": ["https://page.example"]})) as world:
            for origin in (None, f"http://127.0.0.1:{world.broker.port}"):
                headers = {"Origin": origin} if origin else {}
                answer = await ask(world, "/call/lab/m", headers=headers)
                assert answer.headers["vary"] == "Origin"
                assert not [name for name in answer.headers if name.startswith("access-control")]
            answer = await ask(world, "/rpc", method="OPTIONS", secret=None)
            assert answer.status == 204 and answer.headers["allow"] == "POST, OPTIONS"

    run(main)


# ---------------------------------------------------------------- methods, sizes, slowness


@pytest.mark.parametrize(
    ("path", "allow"),
    [("/call/lab/m", "POST, OPTIONS"), ("/rpc", "POST, OPTIONS"), ("/whoami", "GET, HEAD, OPTIONS")],
)
def test_a_wrong_method_is_told_the_right_ones(path: str, allow: str) -> None:
    async def main() -> None:
        async with serving() as world:
            for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"} - set(allow.split(", ")):
                answer = await ask(world, path, method=method)
                assert answer.status == 405 and answer.headers["allow"] == allow, method

    run(main)


def test_head_is_get_without_the_body() -> None:
    async def main() -> None:
        async with serving() as world:
            for path in ("/whoami", "/livez", "/readyz", "/metrics"):
                answer = await ask(world, path, method="HEAD")
                assert answer.status == 200 and int(answer.headers["content-length"]) > 0 and answer.body == b""

    run(main)


SMALL = {"message_max_bytes": 8192, "unauthenticated_max_bytes": 4096}


def test_a_body_above_the_bound_is_413_and_can_be_read() -> None:
    async def main() -> None:
        async with serving(config(limits=SMALL)) as world, wire(world) as connection:
            for path in ("/call/lab/m", "/rpc", "/broadcast/lab"):
                connection.send(written(world, path, b" " * 8193, CALLER, "POST", {}))
                answer = await connection.answer()
                assert answer.status == 413 and "8192" in answer.json["error"], "and the connection goes on"
            chunks = b"1000\r\n" + b" " * 4096 + b"\r\n"
            head = written(world, "/rpc", None, CALLER, "POST", {"Transfer-Encoding": "chunked"})
            connection.send(head + chunks * 3 + b"0\r\n\r\n")
            assert (await connection.answer()).status == 413
            connection.send(written(world, "/rpc", b" " * 8192, CALLER, "POST", {}))
            assert (await connection.answer()).status == 400

    run(main)


@pytest.mark.parametrize(
    "headers", [{"Content-Length": "100000000000"}, {"Content-Length": "8193", "Expect": "100-continue"}]
)
def test_a_body_far_above_the_bound_is_not_waited_for(headers: dict[str, str]) -> None:
    async def main() -> None:
        async with serving(config(limits=SMALL)) as world, wire(world) as connection:
            connection.send(written(world, "/rpc", None, CALLER, "POST", headers))
            assert (await connection.answer()).status == 413
            assert await connection.rest() == b""

    run(main)


def test_a_strangers_body_is_not_read_beyond_its_smaller_bound() -> None:
    async def main() -> None:
        async with serving(config(limits=SMALL)) as world:
            async with wire(world) as connection:
                connection.send(written(world, "/rpc", None, None, "POST", {"Content-Length": "4097"}))
                assert (await connection.answer()).status == 401
                assert await connection.rest() == b""
            async with wire(world) as connection:  # a short one is read, so that the connection lives on
                for _ in range(2):
                    connection.send(written(world, "/rpc", b" " * 4096, None, "POST", {}))
                    assert (await connection.answer()).status == 401
            async with wire(world) as connection:
                head = written(world, "/rpc", None, None, "POST", {"Transfer-Encoding": "chunked"})
                connection.send(head + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 2)
                assert (await connection.rest()).startswith(b"HTTP/1.1 400 ")

    run(main)


def test_a_login_is_small() -> None:
    async def main() -> None:
        async with serving(config(limits=SMALL)) as world, wire(world) as connection:
            connection.send(written(world, "/login", None, None, "POST", {"Content-Length": "4097"}))
            assert (await connection.rest()).startswith(b"HTTP/1.1 400 ")

    run(main)


def test_a_slow_body_is_not_waited_for() -> None:
    async def main() -> None:
        async with serving(config(limits={"body_timeout_s": 0.2})) as world, wire(world) as connection:
            connection.send(written(world, "/rpc", None, CALLER, "POST", {"Content-Length": "10"}) + b"{")
            assert await connection.rest() == b""
            assert world.counters.attached == 0

    run(main)


def test_hanging_up_within_the_body_opens_nothing() -> None:
    async def main() -> None:
        async with serving() as world:
            async with wire(world) as connection:
                connection.send(written(world, "/rpc", None, CALLER, "POST", {"Content-Length": "10"}) + b"{")
            assert (await ask(world, "/livez", method="GET")).status == 200
            assert world.counters.attached == 0

    run(main)


@pytest.mark.parametrize(("method", "path"), ROUTES[:-1])
def test_unknown_parameters_are_named(method: str, path: str) -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await ask(world, f"{path}?tpoic=t", method=method)
            assert answer.status in (400,) and b"tpoic" in answer.body

    run(main)


def test_more_sessions_than_the_bound_are_503() -> None:
    async def main() -> None:
        async with serving(config(limits={"sessions_max": 1})) as world:
            await world.worker()
            answer = await ask(world, "/call/lab/m")
            assert answer.status == 503 and answer.headers["retry-after"] == "5"

    run(main)


def test_while_the_broker_stops_what_is_asked_ends_as_shutting_down() -> None:
    async def main() -> None:
        async with serving() as world:
            asking = asyncio.create_task(ask(world, "/call/lab/m?wait=1&timeout=20"))
            while not world.broker.router.pending.count:
                await asyncio.sleep(0)
            assert not await world.broker.drain(0)
            answer = await ask(world, "/call/lab/m")
            assert (answer.status, answer.outcome) == (503, "shutting_down")
            stopping = asyncio.create_task(world.broker.stop())
            answer = await asking
            assert (answer.status, answer.outcome) == (503, "shutting_down")
            assert json.loads(answer.body)["error"]["code"] == -32007
            await stopping

    run(main)
