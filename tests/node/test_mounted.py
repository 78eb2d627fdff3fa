"""Routes in an application of somebody else's: prefixes, pages, cookies, Host, Origin, their own authentication."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from typing import Any

import pytest
from tornado.httputil import HTTPServerRequest
from websockets.exceptions import InvalidStatus

from broker import Broker, Grant, Principal, Role, errors
from broker.auth.logins import cookie_name
from broker.auth.origins import HostRules
from tests.node.hosting import embedded, hosting
from tests.transports.websocket.harness import ADMIN, CALLER, PRINCIPALS, config, run

PAGE = {"Sec-Fetch-Site": "same-origin"}
ASKING = ["/whoami", "/metrics", "/events/lab", "/ws"]
ASKING_POST = ["/ticket", "/rpc", "/call/lab/m", "/broadcast/lab", "/broadcast", "/logout"]


# ── prefixes ──


@pytest.mark.parametrize("prefix", ["broker", "lab.x/a-b/broker"])
def test_the_page_and_what_it_loads_work_under_any_prefix(prefix: str) -> None:
    async def main() -> None:
        async with hosting(**{prefix: await embedded()}) as host:
            assert (await host.http("/")).body == b"the program's own"
            page = await host.http(f"/{prefix}/")
            assert page.code == 200
            assert "script-src 'self'" in page.headers["Content-Security-Policy"]
            loaded = re.findall(r'(?:href|src)="([^"]+)"', page.body.decode())
            assert len(loaded) >= 3
            for name in loaded:
                assert not name.startswith("/"), "an absolute path would leave the prefix"
                assert (await host.http(f"/{prefix}/{name}")).code == 200
            script = (await host.http(f"/{prefix}/static/page.js")).body.decode()
            for name in re.findall(r'from "(\./[^"]+)"', script):
                assert (await host.http(f"/{prefix}/static/{name[2:]}")).code == 200
            bare = await host.http(f"/{prefix}")
            assert (bare.code, bare.headers["Location"]) == (308, f"{prefix.rpartition('/')[2]}/")
            for path in ("/livez", "/readyz"):
                assert (await host.http(f"/{prefix}{path}")).code == 200
            for wrong in (
                f"/{prefix}/nothing",
                f"/{prefix}ws",
                "/ws",
                f"/x/{prefix}/ws",
                f"/{prefix.replace('.', 'x')}y/",
            ):
                assert (await host.http(wrong)).code == 404

    run(main)


@pytest.mark.parametrize("prefix", ["/", "broker", "/a/", "/a b", "/a(b)", "//a", "/é"])
def test_what_is_no_prefix_is_refused(prefix: str) -> None:
    async def main() -> None:
        async with Broker(config()) as broker:
            with pytest.raises(ValueError, match="is no prefix"):
                broker.routes(prefix)

    run(main)


def test_a_sign_in_holds_under_its_prefix_and_with_its_broker_only() -> None:
    async def main() -> None:
        async with hosting(a=await embedded(), b=await embedded()) as host:
            signed_in = await host.http("/a/login", method="POST", body=json.dumps({"token": CALLER}))
            assert signed_in.code == 200
            cookie = signed_in.headers["Set-Cookie"]
            assert cookie.startswith(f"broker-{host.port}-a=")
            assert "; Path=/a/;" in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
            sent = {"Cookie": cookie.partition(";")[0]} | PAGE
            who = await host.http("/a/whoami", headers=sent)
            assert json.loads(who.body)["principal"] == "carol"
            assert (await host.http("/b/whoami", headers=sent)).code == 401
            renamed = {"Cookie": sent["Cookie"].replace("-a=", "-b=")} | PAGE
            assert (await host.http("/b/whoami", headers=renamed)).code == 401, "a cookie of another broker"
            out = await host.http("/a/logout", method="POST", body="", headers=sent | {"Origin": origin(host)})
            assert out.code == 200
            assert out.headers["Set-Cookie"].startswith(f"broker-{host.port}-a=; Path=/a/; Max-Age=0")
            assert (await host.http("/a/whoami", headers=sent)).code == 401

    run(main)


def origin(host: Any) -> str:
    return f"http://127.0.0.1:{host.port}"


def test_a_broker_that_listens_too_keeps_the_cookies_apart() -> None:
    async def main() -> None:
        broker = await embedded()
        await broker.listen()
        async with hosting(lab=broker) as host:
            names = set()
            for port, path in ((host.port, "/lab/login"), (broker.port, "/login")):
                host.port = port
                answer = await host.http(path, method="POST", body=json.dumps({"token": CALLER}))
                names.add(answer.headers["Set-Cookie"].partition("=")[0])
            assert len(names) == 2

    run(main)


def test_names_of_cookies_are_tokens() -> None:
    assert cookie_name(80) == "broker-80"
    assert cookie_name(80, "/lab.x/~a") == "broker-80-lab.x--a"


# ── Host and Origin ──


def test_host_and_origin_are_judged_by_where_the_application_listens() -> None:
    async def main() -> None:
        settings = config(server={"allowed_origins": ["https://page.example"], "allowed_hosts": ["lab.example"]})
        asked: list[str] = []

        def authenticate(request: HTTPServerRequest) -> Principal:
            asked.append(request.path)
            return PRINCIPALS[ADMIN]

        async with hosting(broker=await embedded(settings=settings, authenticate=authenticate)) as host:
            own = f"localhost:{host.port}"
            for headers, status in (
                ({"Host": own}, 200),
                ({"Host": f"[::1]:{host.port}"}, 200),
                ({"Host": "lab.example"}, 200),
                ({"Host": own, "Origin": f"http://{own}"}, 200),
                ({"Origin": "https://page.example"}, 200),
                ({"Host": "evil.example"}, 421),
                ({"Host": f"evil.example:{host.port}"}, 421),
                ({"Host": "127.0.0.1:1"}, 421),
                ({"Host": own, "Origin": "https://evil.example"}, 403),
                ({"Origin": "null"}, 403),
            ):
                asked.clear()
                answer = await host.http("/broker/whoami", headers=headers)
                assert answer.code == status, (headers, answer.body)
                assert bool(asked) == (status == 200), "judged before the program is asked"
            allowed = await host.http("/broker/whoami", headers={"Origin": "https://page.example"})
            assert allowed.headers["Access-Control-Allow-Origin"] == "https://page.example"
            with pytest.raises(InvalidStatus) as refused:
                await host.peer(secret=None, origin="https://evil.example")
            assert refused.value.response.status_code == 403

    run(main)


def test_addresses_are_learned_once() -> None:
    rules = HostRules([("127.0.0.1", 1)])
    rules.add_bind("192.0.2.7", 8888)
    rules.add_bind("192.0.2.7", 8888)
    rules.add_bind("fe80::1%eth0", 8888)
    assert rules._hosts >= {("192.0.2.7", 8888), ("[fe80::1]", 8888)}
    assert len(rules._bound) == 2


# ── the program's own settings, and its own authentication ──


def test_an_application_that_wants_xsrf_cookies_does_not_get_in_the_way() -> None:
    async def main() -> None:
        broker = await embedded()
        broker.endpoint("lab", lambda peer, method, params: peer.principal)
        async with hosting({"xsrf_cookies": True}, broker=broker) as host:
            called = await host.http("/broker/call/lab/m", ADMIN, method="POST", body="")
            assert called.code == 200 and json.loads(called.body) == "admin"
            for path in ASKING_POST:
                assert (await host.http(f"/broker{path}", method="POST", body="{}")).code == 401, path
            signed_in = await host.http("/broker/login", method="POST", body=json.dumps({"token": ADMIN}))
            assert signed_in.code == 200
            other = {"Origin": "http://evil.example"}
            assert (await host.http("/broker/call/lab/m", ADMIN, method="POST", body="", headers=other)).code == 403

    run(main)


def anybody(name: str = "prof") -> Principal:
    return Principal(name, (Grant(Role.CALLER | Role.ADMIN, ("lab*",)),))


def test_the_program_says_who_is_asking_and_else_the_broker_does() -> None:
    async def main() -> None:
        def authenticate(request: HTTPServerRequest) -> Principal | None:
            return anybody() if request.headers.get("X-Own") == "yes" else None

        broker = await embedded(authenticate=authenticate)
        broker.endpoint("lab", lambda peer, method, params: peer.principal)
        async with hosting(broker=broker) as host:
            own = {"X-Own": "yes"}
            told = json.loads((await host.http("/broker/whoami", headers=own)).body)
            assert (told["principal"], told["kind"]) == ("prof", "host")
            assert json.loads((await host.http("/broker/whoami", CALLER)).body)["principal"] == "carol"
            assert (await host.http("/broker/whoami")).code == 401
            called = await host.http("/broker/call/lab/m", headers=own, method="POST", body="")
            assert json.loads(called.body) == "prof"
            denied = await host.http("/broker/call/other/m", headers=own, method="POST", body="")
            assert denied.code == 403
            peer = await host.peer("/broker/ws/lab", None, headers=own)
            assert (await peer.call("m"))["result"] == "prof"
            ticket = json.loads((await host.http("/broker/ticket", headers=own, method="POST", body="")).body)["ticket"]
            other = await host.peer(f"/broker/ws/lab?ticket={ticket}", None)
            assert (await other.call("m"))["result"] == "prof"
            assert broker.authenticator.counters.admitted >= 7

    run(main)


def test_the_program_gives_out_tickets_itself() -> None:
    async def main() -> None:
        broker = Broker(config())
        with pytest.raises(RuntimeError, match=r"await broker.start\(\)"):
            broker.ticket(anybody())
        await broker.start()
        broker.endpoint("lab", lambda peer, method, params: peer.principal)
        async with hosting(broker=broker) as host:
            ticket = broker.ticket(anybody())
            peer = await host.peer(f"/broker/ws/lab?ticket={ticket}", None)
            assert (await peer.call("m"))["result"] == "prof"
            for path in (f"/broker/ws/lab?ticket={ticket}", f"/broker/ws/other?ticket={broker.ticket(anybody())}"):
                with pytest.raises(InvalidStatus) as refused:  # spent; not granted
                    await host.peer(path, None)
                assert refused.value.response.status_code == (401 if "lab" in path else 403)
            with pytest.raises(errors.Refused, match="expired") as late:
                broker.ticket(Principal("prof", (), expires_at=time.time() - 1))
            assert (late.value.status, late.value.come_back) == (401, False)
            with pytest.raises(TypeError, match="neither a Principal"):
                broker.ticket("prof")  # type: ignore[arg-type]
            with pytest.raises(errors.Refused, match="too many") as many:
                for _ in range(1000):
                    broker.ticket(anybody())
            assert (many.value.status, many.value.come_back) == (429, True)

    run(main)


@pytest.mark.parametrize("fault", ["raises", "exits with HTTPError", "no principal", "a coroutine"])
def test_an_authentication_that_fails_lets_nobody_in(fault: str) -> None:
    async def main() -> None:
        def authenticate(request: HTTPServerRequest) -> Any:
            if fault == "raises":
                raise RuntimeError("on purpose")
            if fault == "exits with HTTPError":
                raise KeyError("x")
            return "admin" if fault == "no principal" else True

        async with hosting(broker=(broker := await embedded(authenticate=authenticate))) as host:
            for path in ASKING:
                assert (await host.http(f"/broker{path}", ADMIN)).code == 500, path
            for path in ASKING_POST:
                answer = await host.http(f"/broker{path}", ADMIN, method="POST", body="{}")
                assert answer.code == 500, path
                assert b"on purpose" not in answer.body
            with pytest.raises(InvalidStatus) as refused:
                await host.peer()
            assert refused.value.response.status_code == 500
            assert len(broker.router.sessions) == 0
            assert broker.authenticator.counters.admitted == 0
            assert (await host.http("/broker/")).code == 200, "the page asks nobody who they are"

    logging.getLogger("tornado.application").disabled = True
    try:
        run(main)
    finally:
        logging.getLogger("tornado.application").disabled = False


def test_every_route_that_asks_who_asks_the_program_once() -> None:
    async def main() -> None:
        asked: list[str] = []

        def authenticate(request: HTTPServerRequest) -> Principal | None:
            asked.append(request.path)
            return None

        async with hosting(broker=await embedded(authenticate=authenticate)) as host:
            for path in ASKING:
                assert (await host.http(f"/broker{path}")).code == 401
            for path in ASKING_POST:
                assert (await host.http(f"/broker{path}", method="POST", body="{}")).code == 401
            assert asked == [f"/broker{path}" for path in ASKING + ASKING_POST]

    run(main)


def test_a_principal_that_has_expired_stays_out_and_one_that_expires_is_sent_away() -> None:
    async def main() -> None:
        expires_at = time.time() - 1

        def authenticate(request: HTTPServerRequest) -> Principal:
            return Principal("prof", (Grant(Role.CALLER),), expires_at=expires_at, login_id="x", token_id="y")

        async with hosting(broker=await embedded(authenticate=authenticate)) as host:
            assert (await host.http("/broker/whoami")).code == 401
            expires_at = time.time() + 0.3
            peer = await host.peer("/broker/ws/lab", None)
            assert await peer.closed() == (4401, "the credential has expired")

    run(main)


def test_a_coroutine_function_is_refused_at_once() -> None:
    async def authenticate(request: HTTPServerRequest) -> Principal | None:
        return None

    class Authenticate:
        async def __call__(self, request: HTTPServerRequest) -> Principal | None:
            return None

    for wrong in (authenticate, Authenticate()):
        with pytest.raises(TypeError, match="must be a plain one"):
            Broker(authenticate=wrong)  # type: ignore[arg-type]


def test_it_is_asked_where_the_broker_listens_itself_too() -> None:
    async def main() -> None:
        async with Broker(config(), authenticate=lambda request: anybody()) as broker:
            await broker.listen()
            with socket.create_connection(("127.0.0.1", broker.port)):
                pass
            from tests.transports.websocket.harness import World

            world = World(broker, None)  # type: ignore[arg-type]
            assert json.loads((await world.http("/whoami", None)).body)["principal"] == "prof"

    run(main)


@pytest.mark.parametrize(
    "settings",
    [{"xsrf_cookies": True, "cookie_secret": "host"}, {"compress_response": True}, {"serve_traceback": True}],
    ids=["xsrf_cookies", "compress_response", "serve_traceback"],
)
def test_settings_of_the_application_change_nothing_for_the_broker(settings: dict[str, Any]) -> None:
    """Callers with a token know nothing of tornado's XSRF cookie; pages of others are refused by their Origin."""

    async def main() -> None:
        broker = await embedded()
        broker.serve("sum", {"add": lambda a, b: a + b})
        async with hosting(settings, broker=broker) as host:
            path, body = "/broker/call/sum/add", "[1, 2]"
            answer = await host.http(path, ADMIN, method="POST", body=body)
            assert (answer.code, json.loads(answer.body)) == (200, 3)
            elsewhere = {"Origin": "http://evil.example"}
            assert (await host.http(path, ADMIN, method="POST", body=body, headers=elsewhere)).code == 403
            assert (await host.http("/", method="POST", body="")).code == (403 if "xsrf_cookies" in settings else 405)
            peer = await host.peer()
            assert (await peer.reply(await peer.ask("sum/add", [1, 2])))["result"] == 3

    run(main)
