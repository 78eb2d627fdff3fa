"""Signing in with name and password: over JSON, from a form without any script, and by who should not."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

import pytest

from broker.auth.hashing import THREADS
from broker.auth.users import UserStore
from tests.auth.helpers import cheap_passwords
from tests.transports.http.harness import Answer, ask, wire, written
from tests.transports.http.test_logins import own, whoami
from tests.transports.websocket.harness import CALLER, World, config, run, serving, until

PASSWORD = "canary-of-a-password"
BROWSER = {"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
PROXIED = {"server": {"trusted_proxies": ["127.0.0.1"]}}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)


@pytest.fixture
def users(tmp_path: Path) -> UserStore:
    store = UserStore(tmp_path / "users.json")
    store.add("carol", PASSWORD, ["caller"], ["lab*"])
    return store


async def log_in(
    world: World, name: str = "carol", password: str = PASSWORD, headers: Mapping[str, str] | None = None
) -> Answer:
    body = {"name": name, "password": password}
    return await ask(world, "/login", body, secret=None, headers=own(world) | dict(headers or {}))


async def send_form(world: World, xsrf: str | None, cookie: str | None = None, **more: str) -> Answer:
    fields = {"name": "carol", "password": PASSWORD} | ({} if xsrf is None else {"_xsrf": xsrf}) | more
    headers = {"Content-Type": "application/x-www-form-urlencoded"} | ({} if cookie is None else {"Cookie": cookie})
    return await ask(world, "/login", urlencode(fields).encode(), secret=None, headers=headers)


def session_of(world: World, answer: Answer) -> dict[str, str]:
    return own(world) | {"Cookie": answer.headers["set-cookie"].partition(";")[0]}


def test_signing_in_and_out_with_a_password(users: UserStore) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            answer = await log_in(world)
            assert answer.status == 200 and answer.json["principal"] == "carol" and answer.json["kind"] == "user"
            assert re.fullmatch(
                rf"broker-{world.broker.port}=[\w-]{{43}}; Path=/; Max-Age=43200; HttpOnly; SameSite=Strict",
                answer.headers["set-cookie"],
            )
            session = session_of(world, answer)
            who = await whoami(world, session)
            assert who.json["kind"] == "login" and who.json["grants"] == [{"roles": ["caller"], "endpoints": ["lab*"]}]
            assert (await ask(world, "/call/other/m", secret=None, headers=session)).status == 403
            assert (await ask(world, "/ticket", secret=None, headers=session)).status == 200
            assert (await ask(world, "/logout", secret=None, headers=session)).status == 200
            assert (await whoami(world, session)).status == 401

    run(main)


def test_unknown_wrong_and_disabled_are_one_refusal(users: UserStore) -> None:
    async def main() -> None:
        users.add("dave", PASSWORD)
        users.set_disabled("dave", True)
        async with serving(users=users) as world:
            refusals = set()
            for name, password in (
                ("carol", "wrong"), ("nobody", "wrong"), ("nobody", PASSWORD), ("dave", PASSWORD), ("", ""),
                ("carol", ""), ("carol", "x" * 9999), ("x" * 9999, "x"), ("../x", PASSWORD), ("carol\n", PASSWORD),
            ):  # fmt: skip
                answer = await log_in(world, name, password)
                headers = {name: value for name, value in answer.headers.items() if name != "date"}
                refusals.add((answer.status, json.dumps(headers), answer.body))
            assert len(refusals) == 1
            status, headers, body = refusals.pop()
            assert status == 401 and "set-cookie" not in headers and b"the name or the password" in body
            assert world.broker.authenticator.counters.wrong == 10

    run(main)


def test_a_flood_of_guesses_does_not_lock_the_user_out_of_the_usual_address(users: UserStore) -> None:
    settings = config(**PROXIED, auth={"passwords_per_minute": 3})

    async def main() -> None:
        async with serving(settings, users=users) as world:
            home, new = {"X-Forwarded-For": "10.0.0.1"}, {"X-Forwarded-For": "10.0.0.9"}
            assert (await log_in(world, headers=home)).status == 200
            statuses = []
            for number in range(12):
                attacker = {"X-Forwarded-For": f"192.0.2.{number % 4}"}
                statuses.append((await log_in(world, password=f"guess {number}", headers=attacker)).status)
            assert statuses == [401] * 3 + [429] * 9
            late = await log_in(world, headers=new)
            assert late.status == 429 and int(late.headers["retry-after"]) > 0 and "set-cookie" not in late.headers
            assert (await log_in(world, headers=home)).status == 200
            assert world.broker.authenticator.counters.throttled == 10
            # A name that nobody has is throttled in the same words.
            for _ in range(4):
                nobody = await log_in(world, "nobody", headers=new)
            assert (nobody.status, nobody.body) == (late.status, late.body)

    run(main)


def test_wrong_passwords_of_an_address_are_counted_with_its_wrong_tokens(users: UserStore) -> None:
    async def main() -> None:
        async with serving(config(auth={"guesses_per_minute": 2}), users=users) as world:
            assert (await log_in(world, "nobody")).status == 401
            assert (await ask(world, "/login", {"token": "wrong"}, secret=None)).status == 401
            assert (await log_in(world, "somebody")).status == 429
            assert (await ask(world, "/login", {"token": CALLER}, secret=None)).status == 200, "a token always passes"

    run(main)


def test_the_password_reaches_no_answer_and_no_line_of_the_log(
    users: UserStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        asyncio.get_running_loop().slow_callback_duration = 0  # every callback is logged, with its arguments
        async with serving(users=users) as world:
            xsrf = "x" * 43
            answers = [
                await log_in(world, "nobody"),
                await log_in(world, PASSWORD, PASSWORD),
                await log_in(world, password=PASSWORD + "x"),
                await ask(world, "/login", f'{{"name": "carol", "password": "{PASSWORD}", }}'.encode(), secret=None),
                await ask(world, "/login", {"name": "carol", "password": [PASSWORD]}, secret=None),
                await ask(world, "/login", {"name": "carol", "password": PASSWORD, "more": 1}, secret=None),
                await send_form(world, None),
                await send_form(world, xsrf, f"_xsrf={xsrf}", password=PASSWORD + "x"),
                await send_form(world, xsrf, f"_xsrf={xsrf}", more="x"),
                await ask(world, f"/login?password={PASSWORD}", {}, secret=None),
                await log_in(world),
            ]
            monkeypatch.setattr("broker.auth.sign_in.verify", lambda encoded, password: 1 // 0)
            answers.append(await log_in(world, password="another " + PASSWORD))
            assert [answer.status for answer in answers] == [401] * 3 + [400] * 3 + [403, 401, 400, 400, 200, 500]
            for answer in answers:
                assert PASSWORD not in f"{answer.headers} {answer.body!r}"

    with caplog.at_level(logging.DEBUG):
        run(main)
    assert "ZeroDivisionError" in caplog.text, "what fails is logged"
    said = [record for record in caplog.records if "?password=" not in record.getMessage()]
    assert PASSWORD not in "".join(record.getMessage() + str(record.exc_text) for record in said)
    assert len(caplog.records) - len(said) <= 1, "only the access line, whose query the daemon's log cuts out"


# ---------------------------------------------------------------- forms


def test_a_form_works_without_any_script(users: UserStore) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            page = await ask(world, "/login", secret=None, method="GET", headers=BROWSER)
            assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
            policy = page.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; style-src 'self';") and "script-src" not in policy
            assert "form-action 'self'" in policy and "frame-ancestors 'none'" in policy
            assert b"<script" not in page.body and page.headers["referrer-policy"] == "same-origin"
            cookie, _, attributes = page.headers["set-cookie"].partition("; ")
            value = cookie.removeprefix("_xsrf=")
            assert attributes == "Path=/; SameSite=Strict" and len(value) == 43 and value.encode() in page.body
            browser = BROWSER | own(world) | {"Cookie": cookie}

            form = urlencode({"name": "carol", "password": "wrong", "_xsrf": value}).encode()
            again = await ask(world, "/login", form, secret=None, headers=browser)
            assert again.status == 401 and b"the name or the password is not right" in again.body
            assert value.encode() in again.body and b"<form" in again.body, "the same value, for other tabs"
            assert "broker-" not in again.headers["set-cookie"]

            form = urlencode({"name": "carol", "password": PASSWORD, "_xsrf": value}).encode()
            done = await ask(world, "/login", form, secret=None, headers=browser)
            assert done.status == 303 and done.headers["location"] == "./"
            assert (await whoami(world, session_of(world, done))).json["principal"] == "carol"

    run(main)


def test_a_form_has_to_repeat_the_cookie(users: UserStore) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            told = await ask(world, "/login", secret=None, method="GET", headers={"Accept": "*/*"})
            value = told.json["_xsrf"]
            cookie = told.headers["set-cookie"].partition(";")[0]
            assert cookie == f"_xsrf={value}"
            for xsrf, sent in (
                (None, None), (None, cookie), ("", cookie), (value, None), ("x" * 43, cookie), (value, "_xsrf="),
                ("", "_xsrf="), ("short", "_xsrf=short"), (value + "x", cookie), ("é" * 30, "_xsrf=" + "%C3%A9" * 30),
                (value, f"other={value}"),
            ):  # fmt: skip
                answer = await send_form(world, xsrf, sent)
                assert answer.status == 403 and "_xsrf" in answer.json["error"], (xsrf, sent)
                assert "set-cookie" not in answer.headers
            assert world.broker.sign_in is not None and not world.broker.sign_in._remembered, (
                "no password was looked at"
            )
            answer = await send_form(world, value, cookie)
            assert answer.status == 200 and answer.json["principal"] == "carol"
            # What another program on this host has set is left, or its forms would break.
            theirs = "2|12345678|0123456789abcdef0123456789abcdef|1700000000"
            kept = await ask(world, "/login", secret=None, method="GET", headers={"Cookie": f"_xsrf={theirs}"})
            assert kept.json["_xsrf"] == theirs
            assert (await send_form(world, theirs, f"_xsrf={theirs}")).status == 200
            nasty = await ask(
                world, "/login", secret=None, method="GET", headers={"Cookie": '_xsrf="><script>alert(1)'}
            )
            assert re.fullmatch(r"[\w-]{43}", nasty.json["_xsrf"])

    run(main)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_other_pages_sign_nobody_in(users: UserStore, origin: str) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            answer = await log_in(world, headers={"Origin": origin})
            assert answer.status == 403 and "set-cookie" not in answer.headers
            page = await ask(world, "/login", secret=None, method="GET", headers={"Origin": origin})
            assert page.status == 403 and "set-cookie" not in page.headers

    run(main)


@pytest.mark.parametrize(
    "body",
    [
        b"name=carol",
        b"password=x",
        b"name=carol&password",
        b"name=%FF&password=x",
        b"name=carol&password=x&_xsrf=y&token=z",
        b"&".join(b"a%d=1" % number for number in range(11)),
        b'{"name":"carol"}',
        b'{"name":"carol","password":null}',
        b'{"name":"carol","password":"x","token":"y"}',
        b'{"name":"carol","password":"\xff"}',
    ],
)
def test_a_body_that_is_neither(users: UserStore, body: bytes) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            answer = await ask(world, "/login", body, secret=None)
            assert answer.status == 400 and "name" in answer.json["error"] and "token" in answer.json["error"]

    run(main)


def test_the_cookies_are_secure_where_the_browser_speaks_tls(users: UserStore) -> None:
    async def main() -> None:
        async with serving(config(**PROXIED), users=users) as world:
            tls = {"X-Forwarded-Proto": "https", "Origin": f"https://127.0.0.1:{world.broker.port}"}
            page = await ask(world, "/login", secret=None, method="GET", headers=tls)
            assert page.headers["set-cookie"].endswith("; SameSite=Strict; Secure")
            assert (await log_in(world, headers=tls)).headers["set-cookie"].endswith("; SameSite=Strict; Secure")

    run(main)


# ---------------------------------------------------------------- ends


def test_a_cookie_of_another_broker_is_nobodys(users: UserStore) -> None:
    async def main() -> None:
        async with serving(users=users) as world, serving(users=users) as other:
            value = session_of(other, await log_in(other))["Cookie"].partition("=")[2]
            for name in (f"broker-{world.broker.port}", f"broker-{other.broker.port}"):
                headers = own(world) | {"Cookie": f"{name}={value}"}
                assert (await whoami(world, headers)).status == 401
            mine = f"broker-{other.broker.port}={value}"
            assert (await whoami(other, own(other) | {"Cookie": mine})).status == 200

    run(main)


@pytest.mark.parametrize("change", ["remove", "disable", "password"])
def test_who_is_removed_or_changed_is_signed_out_with_all_links(users: UserStore, change: str) -> None:
    async def main() -> None:
        users.add("dave", PASSWORD)
        async with serving(users=users) as world:
            session = session_of(world, await log_in(world))
            dave = session_of(world, await log_in(world, "dave"))
            peer = await world.peer("/ws", None, headers=session, origin=None)
            by_token = await world.peer("/ws", CALLER)  # her token is another credential, though of the same name
            other = await world.peer("/ws", None, headers=dave, origin=None)
            tickets = [(await ask(world, "/ticket", secret=None, headers=session)).json["ticket"]]
            elsewhere = UserStore(users.path)
            if change == "remove":
                elsewhere.remove("carol")
            elif change == "disable":
                elsewhere.set_disabled("carol", True)
            else:
                elsewhere.set_password("carol", "quite another one")
            assert (await peer.closed())[0] == 4401
            assert (await whoami(world, session)).status == 401
            assert (await ask(world, f"/whoami?ticket={tickets[0]}", secret=None, method="GET")).status == 401
            assert (await log_in(world)).status == 401, "what was remembered is void"
            assert (await whoami(world, dave)).status == 200
            await other.sync()
            await by_token.sync()
            if change == "password":
                anew = session_of(world, await log_in(world, password="quite another one"))
                assert (await whoami(world, anew)).status == 200

    run(main)


@pytest.mark.parametrize("change", ["remove", "disable", "password"])
def test_sessions_that_are_away_end_with_the_user_and_outlive_a_password(users: UserStore, change: str) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            session, sessions = session_of(world, await log_in(world)), world.broker.router.sessions
            peers = [await world.peer("/ws?grace=300", None, headers=session, origin=None) for _ in range(2)]
            await peers[0].read()
            peers[0].socket.transport.abort()
            await until(lambda: sessions.suspended == 1, "one is away")
            if change == "password":
                users.set_password("carol", "quite another one")
            else:
                users.remove("carol") if change == "remove" else users.set_disabled("carol", True)
            await peers[1].read()
            assert (await peers[1].closed())[0] == 4401
            if change == "password":
                await until(lambda: sessions.suspended == 2, "with the new one both may come back")
            else:
                await until(lambda: not len(sessions), "nothing is left of either")
                assert not world.broker.router.state.budget.used

    run(main)


def test_links_of_a_sign_in_that_gave_way_to_newer_ones_end_as_well(users: UserStore) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            world.broker.logins._per_principal_max = 100
            session = session_of(world, await log_in(world))
            peer = await world.peer("/ws", None, headers=session, origin=None)
            async with wire(world) as connection:
                for _ in range(100):
                    body = json.dumps({"name": "carol", "password": PASSWORD}).encode()
                    connection.send(written(world, "/login", body, None, "POST", {}))
                    assert (await connection.answer()).status == 200
            assert len(world.broker.logins) == 100 and (await whoami(world, session)).status == 401
            await peer.sync()
            users.remove("carol")
            assert (await peer.closed())[0] == 4401
            await until(lambda: len(world.broker.logins) == 0, "all sign-ins are forgotten")

    run(main)


def test_a_file_that_breaks_while_running_keeps_the_old(users: UserStore, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            session = session_of(world, await log_in(world))
            users.path.write_text("{")
            assert (await log_in(world)).status == 200 and (await whoami(world, session)).status == 200
            await until(lambda: "users stay as they were" in caplog.text, "it is said")
            users.path.chmod(0o644)
            assert (await log_in(world)).status == 200
            assert (await whoami(world, session)).status == 200

    run(main)


def test_when_too_many_wait_the_next_is_told_to_come_back(users: UserStore) -> None:
    async def main() -> None:
        async with serving(users=users) as world:
            assert world.broker.sign_in is not None
            hashing = world.broker.sign_in.hashing
            hashing._running, hashing._waiting_max = THREADS, 0
            answer = await log_in(world)
            assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
            assert await world.metric("broker_door_total", result="busy") == 1
            assert world.broker.authenticator.counters.wrong == 0
            hashing._running = 0
            assert (await log_in(world)).status == 200

    run(main)


def test_a_broker_without_users_says_so() -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await log_in(world)
            assert answer.status == 401 and "no users" in answer.json["error"]

    run(main)


def test_hanging_up_while_the_hash_is_computed_opens_nothing(users: UserStore, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr("broker.auth.sign_in.verify", lambda encoded, password: go.wait(20))

    async def main() -> None:
        async with serving(users=users) as world:
            sign_in, server = world.broker.sign_in, world.broker._server
            assert sign_in is not None and server is not None
            async with wire(world) as connection:
                body = json.dumps({"name": "carol", "password": PASSWORD}).encode()
                connection.send(written(world, "/login", body, None, "POST", {}))
                await until(lambda: bool(sign_in._under_way), "the hash is under way")
            await until(lambda: all(each.stream.closed() for each in server._connections), "the caller has left")
            go.set()
            await until(lambda: not sign_in._under_way, "nothing is under way")
            assert (await ask(world, "/livez", method="GET")).status == 200
            assert len(world.broker.logins) == 0

    run(main)
