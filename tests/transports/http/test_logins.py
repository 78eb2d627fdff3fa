"""`/login`, `/logout`, `/whoami`: signing in as a browser does."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.auth.tokens import TokenStore
from tests.transports.http.harness import Answer, ask
from tests.transports.websocket.harness import ADMIN, CALLER, World, config, run, serving, until


def own(world: World) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{world.broker.port}"}


async def sign_in(world: World, secret: str = CALLER) -> dict[str, str]:
    """The headers a page of the broker sends from then on."""
    answer = await ask(world, "/login", {"token": secret}, secret=None, headers=own(world))
    assert answer.status == 200, answer.body
    return own(world) | {"Cookie": answer.headers["set-cookie"].partition(";")[0]}


async def whoami(world: World, headers: dict[str, str]) -> Answer:
    return await ask(world, "/whoami", secret=None, method="GET", headers=headers)


def test_signing_in_and_out() -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await ask(world, "/login", {"token": CALLER}, secret=None, headers=own(world))
            assert answer.status == 200 and answer.json["principal"] == "carol"
            assert answer.json["expires_in_s"] == 12 * 3600
            name, _, rest = answer.headers["set-cookie"].partition("=")
            assert name == f"broker-{world.broker.port}"
            value, _, attributes = rest.partition("; ")
            assert attributes == "Path=/; Max-Age=43200; HttpOnly; SameSite=Strict" and len(value) == 43
            cookie = own(world) | {"Cookie": f"{name}={value}"}
            who = await whoami(world, cookie)
            assert who.json["roles"] == ["caller"] and who.json["kind"] == "login" and who.json["expires_at"]
            assert who.json["grants"] == [{"roles": ["caller"], "endpoints": ["lab*"]}]
            answer = await ask(world, "/logout", secret=None, headers=cookie)
            assert answer.status == 200 and "Max-Age=0" in answer.headers["set-cookie"]
            assert (await whoami(world, cookie)).status == 401
            assert (await ask(world, "/logout", secret=None, headers=cookie)).status == 401

    run(main)


def test_the_cookie_opens_the_other_routes() -> None:
    async def main() -> None:
        async with serving() as world:
            cookie = await sign_in(world)
            worker = await world.worker()
            peer = await world.peer("/ws/lab?role=caller", None, headers=cookie, origin=None)
            await peer.ask("m")
            await worker.serve_one()
            assert (await peer.reply(1))["result"] == "done"
            assert (await ask(world, "/ticket", secret=None, headers=cookie)).status == 200
            assert (await ask(world, "/call/lab/m?timeout=0.05", secret=None, headers=cookie)).status == 504
            assert (await ask(world, "/call/other/m", secret=None, headers=cookie)).status == 403

    run(main)


def test_signing_out_ends_the_links_opened_with_the_cookie() -> None:
    async def main() -> None:
        async with serving() as world:
            cookie, other = await sign_in(world), await sign_in(world)
            ended = await world.peer("/ws", None, headers=cookie, origin=None)
            stays = await world.peer("/ws", None, headers=other, origin=None)
            assert (await ask(world, "/logout", secret=None, headers=cookie)).status == 200
            assert (await ended.closed())[0] == 4401
            await stays.sync()

    run(main)


def test_signing_out_ends_what_could_come_back_too() -> None:
    async def main() -> None:
        async with serving() as world:
            cookie = await sign_in(world)
            gone = await world.peer("/ws?grace=300", None, headers=cookie, origin=None)
            await gone.read()
            gone.socket.transport.abort()
            await until(lambda: world.broker.router.sessions.suspended == 1, "it is away")
            here = await world.peer("/ws?grace=300", None, headers=cookie, origin=None)
            await here.read()
            again = await ask(world, "/login", {"token": CALLER}, secret=None, headers=cookie)
            assert (await here.closed())[0] == 4401
            assert len(world.broker.router.sessions) == 2, "the same person may come back to them"
            cookie = own(world) | {"Cookie": again.headers["set-cookie"].partition(";")[0]}
            here = await world.peer("/ws?grace=300", None, headers=cookie, origin=None)
            await here.read()
            assert (await ask(world, "/logout", secret=None, headers=cookie)).status == 200
            assert (await here.closed())[0] == 4401
            await until(lambda: len(world.broker.router.sessions) == 2, "its session has ended with it")

    run(main)


def test_signing_in_again_ends_the_sign_in_before() -> None:
    async def main() -> None:
        async with serving() as world:
            before = await sign_in(world)
            answer = await ask(world, "/login", {"token": ADMIN}, secret=None, headers=before)
            assert answer.json["principal"] == "admin"
            assert (await whoami(world, before)).status == 401

    run(main)


def test_a_sign_in_ends_by_itself_with_its_links() -> None:
    async def main() -> None:
        async with serving(config(auth={"session_s": 0.5})) as world:
            cookie = await sign_in(world)
            peer = await world.peer("/ws", None, headers=cookie, origin=None)
            assert (await peer.closed())[0] == 4401
            assert (await whoami(world, cookie)).status == 401
            assert len(world.broker.logins) == 0

    run(main)


def test_a_revoked_token_ends_its_sign_ins(tmp_path: Path) -> None:
    async def main() -> None:
        store = TokenStore(tmp_path / "tokens.json")
        record, secret = store.create("carol", endpoints=["lab"])
        async with serving(tokens=store) as world:
            cookie = await sign_in(world, secret)
            peer = await world.peer("/ws", None, headers=cookie, origin=None)
            store.revoke(record.id)
            assert (await whoami(world, cookie)).status == 401
            assert (await peer.closed())[0] == 4401
            await until(lambda: len(world.broker.logins) == 0, "the sign-in is forgotten")

    run(main)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(f'{{"token":"{CALLER}"}}', ""), (f"token={CALLER}", "application/x-www-form-urlencoded")],
)
def test_the_token_comes_as_json_or_as_a_form(body: str, content_type: str) -> None:
    async def main() -> None:
        async with serving() as world:
            headers = {"Content-Type": content_type} if content_type else {}
            answer = await ask(world, "/login", body.encode(), secret=None, headers=headers)
            assert answer.status == 200 and answer.json["principal"] == "carol"

    run(main)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"token":1}', b'{"token":"x","password":"y"}', b"\xff", b"a=b", b"token=a&token", b"[" * 9999],
)
def test_a_body_without_a_token_is_told_what_is_missing(body: bytes) -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await ask(world, "/login", body, secret=None)
            assert answer.status == 400 and "token" in answer.json["error"]
            assert "set-cookie" not in answer.headers

    run(main)


def test_a_wrong_token_is_refused_like_everywhere() -> None:
    async def main() -> None:
        async with serving(config(auth={"guesses_per_minute": 2})) as world:
            statuses = []
            for _ in range(3):
                answer = await ask(world, "/login", {"token": "wrong"}, secret=None)
                statuses.append(answer.status)
                assert "set-cookie" not in answer.headers
            assert statuses == [401, 401, 429]
            assert (await ask(world, "/login", {"token": CALLER}, secret=None)).status == 200

    run(main)


def test_who_came_with_a_token_has_nothing_to_sign_out_of() -> None:
    async def main() -> None:
        async with serving() as world:
            answer = await ask(world, "/logout")
            assert answer.status == 400 and "nothing to end" in answer.json["error"]
            assert (await ask(world, "/whoami", method="GET")).json["kind"] == "token"
            assert (await ask(world, "/whoami", method="GET", secret=None)).status == 401

    run(main)


def test_the_cookie_is_secure_where_the_browser_speaks_tls() -> None:
    async def main() -> None:
        async with serving(config(server={"trusted_proxies": ["127.0.0.1"]})) as world:
            body, proxied = {"token": CALLER}, {"X-Forwarded-Proto": "https"}
            answer = await ask(world, "/login", body, secret=None, headers=proxied)
            assert answer.headers["set-cookie"].endswith("; SameSite=Strict; Secure")
            answer = await ask(world, "/login", body, secret=None)
            assert "Secure" not in answer.headers["set-cookie"]

    run(main)
