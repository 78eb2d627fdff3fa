"""Signing in as rt-cloud's daemons do, and every way in which that must not work."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlencode

import pytest
from tornado.httputil import HTTPServerRequest
from tornado.web import create_signed_value, decode_signed_value
from websockets.exceptions import InvalidStatus

from broker import Grant, Principal, Role
from broker.auth.daemon_sign_in import is_here
from broker.auth.facts import RequestFacts
from broker.auth.signed_cookie import Signer
from broker.auth.users import UserStore
from tests.auth.helpers import cheap_passwords
from tests.transports.http.harness import Answer, ask
from tests.transports.rtcloud.daemon import Daemon, LoginFailed, log_in
from tests.transports.rtcloud.harness import hand, rt_config, rt_serving
from tests.transports.rtcloud.test_daemon import here
from tests.transports.websocket.harness import ADMIN, CALLER, PRINCIPALS, WORKER, World, config, run, serving, until

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
XSRF = "abcdefghijklmnopqrstuvwxyz"
PASSWORD = "a long password"


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UserStore:
    cheap_passwords(monkeypatch)
    store = UserStore(tmp_path / "users.json")
    store.add("scanner", PASSWORD, ["worker"], ["data"])
    store.add("reader", PASSWORD, ["caller"], ["*"])
    return store


async def form(
    world: World, cookie: str = f"_xsrf={XSRF}", headers: dict[str, str] | None = None, **fields: str
) -> Answer:
    body = urlencode({"name": "test", "password": "test", "_xsrf": XSRF} | fields).encode()
    return await ask(world, "/login", body, secret=None, headers=FORM | {"Cookie": cookie} | (headers or {}))


def cookies_set(answer: Answer) -> dict[str, tuple[str, str]]:
    """What each cookie that is set holds, and its attributes."""
    found = {}
    for cookie in answer.all_headers("set-cookie"):
        name, _, rest = cookie.partition("=")
        value, _, attributes = rest.partition("; ")
        found[name] = value, attributes
    return found


def test_the_form_sets_a_signed_cookie() -> None:
    async def main() -> None:
        async with rt_serving() as world:
            page = await ask(world, "/login", secret=None, method="GET", headers={"Accept": "*/*"})
            assert page.status == 200
            value, _ = cookies_set(page)["_xsrf"]
            answer = await form(world, f"_xsrf={value}", _xsrf=value)
            assert (answer.status, answer.headers["location"]) == (303, "./")
            cookies = cookies_set(answer)
            session = f"broker-{world.broker.port}"
            assert set(cookies) == {"login", session}
            signed, attributes = cookies["login"]
            assert attributes == "Path=/; Max-Age=43200; HttpOnly; SameSite=Strict" == cookies[session][1]
            assert signed.isascii() and not set(signed) & set('"\\ ,;')  # as it stands in the jar it can be sent
            async with hand(world, cookie=signed):
                await here(world)
                (session,) = world.broker.router.sessions.by_id.values()
                assert session.principal == "test" and session.login_id and session.expires_at
            other_name = await ask(
                world, "/whoami", secret=None, method="GET",
                headers={"Origin": world.broker.url, "Cookie": f"broker-{world.broker.port}={signed}"},
            )  # fmt: skip
            assert other_name.status == 401

    run(main)


def test_users_of_the_broker_sign_in_and_a_wrong_password_sets_no_cookie(users: UserStore) -> None:
    async def main() -> None:
        async with rt_serving(users=users) as world:
            url = world.broker.url
            async with hand(world, cookie=await log_in(url, "scanner", PASSWORD)):
                await here(world)
            for user, password in (("scanner", "wrong"), ("test", "wrong"), ("", ""), ("nobody", "x")):
                with pytest.raises(LoginFailed):
                    await log_in(url, user, password)
            for headers in ({}, {"Accept": "text/html"}):
                answer = await form(world, password="wrong", headers=headers)
                assert answer.status == 401 and not set(cookies_set(answer)) - {"_xsrf"}

    run(main)


def test_a_browser_signs_in_with_the_same_form(users: UserStore) -> None:
    """There is one form, for people and daemons."""

    async def main() -> None:
        async with rt_serving(users=users) as world:
            browser = {"Accept": "text/html", "Origin": world.broker.url}
            page = await ask(world, "/login", secret=None, method="GET", headers=browser)
            value, _ = cookies_set(page)["_xsrf"]
            assert page.headers["content-type"].startswith("text/html") and f'value="{value}"' in page.body.decode()
            answer = await form(world, f"_xsrf={value}", browser, name="reader", password=PASSWORD, _xsrf=value)
            assert (answer.status, answer.headers["location"]) == (303, "./")
            session = f"broker-{world.broker.port}"
            cookie = {"Origin": world.broker.url, "Cookie": f"{session}={cookies_set(answer)[session][0]}"}
            who = await ask(world, "/whoami", secret=None, method="GET", headers=cookie | {"Accept": "text/html"})
            assert who.json["principal"] == "reader"

    run(main)


def test_logging_out_ends_the_daemons_link_and_takes_both_cookies(users: UserStore) -> None:
    async def main() -> None:
        async with rt_serving(users=users) as world:
            cookies = cookies_set(await form(world, name="scanner", password=PASSWORD))
            session = f"broker-{world.broker.port}"
            signed_in = {"Origin": world.broker.url, "Cookie": f"{session}={cookies[session][0]}"}
            async with hand(world, cookie=cookies["login"][0]) as daemon:
                await here(world)
                answer = await ask(world, "/logout", secret=None, headers=signed_in)
                assert answer.status == 200
                gone = cookies_set(answer)
                assert set(gone) == {"login", session}
                assert all(value == "" and "Max-Age=0" in attributes for value, attributes in gone.values())
                await daemon.socket.wait_closed()
                assert daemon.socket.close_code == 4401
            with pytest.raises(InvalidStatus) as refused:
                async with hand(world, cookie=cookies["login"][0]):
                    pass
            assert refused.value.response.status_code == 401

    run(main)


@pytest.mark.parametrize("change", ["remove", "disable", "password"])
def test_a_daemons_link_ends_with_its_user(users: UserStore, change: str) -> None:
    async def main() -> None:
        users.add("other", PASSWORD, ["worker"], ["data"])
        async with rt_serving(users=users) as world:
            cookie = await log_in(world.broker.url, "scanner", PASSWORD)
            stays = await log_in(world.broker.url, "other", PASSWORD)
            async with hand(world, cookie=cookie) as daemon, hand(world, cookie=stays):
                await here(world, count=2)
                elsewhere = UserStore(users.path)
                if change == "remove":
                    elsewhere.remove("scanner")
                elif change == "disable":
                    elsewhere.set_disabled("scanner", True)
                else:
                    elsewhere.set_password("scanner", "quite another one")
                await daemon.socket.wait_closed()
                assert daemon.socket.close_code == 4401
                with pytest.raises(InvalidStatus) as refused:
                    async with hand(world, cookie=cookie):
                        pass
                assert refused.value.response.status_code == 401
                with pytest.raises(LoginFailed):
                    await log_in(world.broker.url, "scanner", PASSWORD)
                await here(world, count=1)

    run(main)


def test_a_removed_users_cookie_is_void_at_once(users: UserStore) -> None:
    """Before the sign-ins are looked through, too."""

    async def main() -> None:
        async with rt_serving(users=users) as world:
            cookie = await log_in(world.broker.url, "scanner", PASSWORD)
            users.remove("scanner")
            with pytest.raises(InvalidStatus) as refused:
                async with hand(world, cookie=cookie):
                    pass
            assert refused.value.response.status_code == 401

    run(main)


def test_who_may_not_be_a_worker_there_is_refused_before_the_upgrade(users: UserStore) -> None:
    async def main() -> None:
        async with rt_serving(users=users) as world:
            for user, path in (("reader", "/wsData"), ("scanner", "/wsSubject")):
                cookie = await log_in(world.broker.url, user, PASSWORD)
                with pytest.raises(InvalidStatus) as refused:
                    async with hand(world, path, cookie=cookie):
                        pass
                assert refused.value.response.status_code == 403

    run(main)


@pytest.mark.parametrize(
    ("cookie", "fields"),
    [
        ("", {}),
        ("other=1", {}),
        (f"_xsrf={XSRF}", {"_xsrf": ""}),
        (f"_xsrf={XSRF}", {"_xsrf": XSRF[::-1]}),
        ("_xsrf=", {"_xsrf": ""}),
        ("_xsrf=abc", {"_xsrf": "abc"}),
        (f"_xsrf={XSRF}", {"_xsrf": "\u00e4"}),
    ],
)
def test_bad_input_a_form_without_the_right_xsrf(cookie: str, fields: dict[str, str]) -> None:
    async def main() -> None:
        async with rt_serving() as world:
            answer = await form(world, cookie, **fields)
            assert answer.status == 403 and not cookies_set(answer)
            assert len(world.broker.logins) == 0

    run(main)


@pytest.mark.parametrize("body", [b"\xff", b"&".join([b"a=1"] * 20), b""])
def test_bad_input_a_form_that_is_none(body: bytes) -> None:
    async def main() -> None:
        async with rt_serving() as world:
            answer = await ask(world, "/login", body, secret=None, headers=FORM | {"Cookie": f"_xsrf={XSRF}"})
            assert answer.status == 400 and not cookies_set(answer)

    run(main)


def test_bad_input_a_page_of_another_origin_cannot_sign_in_or_connect() -> None:
    async def main() -> None:
        async with rt_serving() as world:
            assert (await form(world, headers={"Origin": "http://evil.example"})).status == 403
            cookie = await log_in(world.broker.url, "test", "test")
            upgrade = {
                "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Cookie": f"login={cookie}",
            }  # fmt: skip
            for headers, status in (
                ({}, 403),
                ({"Origin": "http://evil.example"}, 403),
                ({"Origin": world.broker.url, "Cookie": f"login={cookie}; login={cookie}"}, 400),
                ({"Origin": world.broker.url, "Host": "evil.example"}, 421),
            ):
                answer = await ask(world, "/wsData", secret=None, method="GET", headers=upgrade | headers)
                assert answer.status == status, headers

    run(main)


@pytest.mark.parametrize("change", ["", "x", "cut", "swap"])
def test_bad_input_a_cookie_of_another_broker_or_a_changed_one(change: str) -> None:
    async def main() -> None:
        async with rt_serving() as world, rt_serving() as other:
            cookie = await log_in(world.broker.url, "test", "test")
            value, _, signature = cookie.rpartition(".")
            wrong = {
                "": cookie, "x": f"x{cookie}", "cut": value, "swap": f"{value}.{signature[::-1]}",
            }[change]  # fmt: skip
            target = world if change else other
            with pytest.raises(InvalidStatus) as refused:
                async with hand(target, cookie=wrong):
                    pass
            assert refused.value.response.status_code == 401
            assert target.broker.authenticator.counters.wrong == 1

    run(main)


def test_a_sign_in_ends_on_the_server() -> None:
    """Its end takes the cookie's worth away; its link ends when it expires."""

    async def main() -> None:
        async with rt_serving(rt_config(auth={"session_s": 1.5})) as world:
            cookie = await log_in(world.broker.url, "test", "test")
            async with hand(world, cookie=cookie) as daemon:
                await here(world)
                await daemon.socket.wait_closed()
                assert daemon.socket.close_code == 4401
            cookie = await log_in(world.broker.url, "test", "test")
            for login_id in list(world.broker.logins._live):
                world.broker.logins.close(login_id)
            with pytest.raises(InvalidStatus):
                async with hand(world, cookie=cookie):
                    pass

    run(main)


def test_the_test_user_is_for_this_machine_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with rt_serving(rt_config(rtcloud={"test_user": False})) as world:
            with pytest.raises(LoginFailed):
                await log_in(world.broker.url, "test", "test")
        async with rt_serving() as world:
            for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):  # a proxy nobody trusts, on this machine
                assert (await form(world, headers={header: "203.0.113.5"})).status == 401
        for remote in ("203.0.113.5", "::ffff:203.0.113.5"):
            settings = rt_config(server={"trusted_proxies": ["127.0.0.1"]})
            async with serving(settings) as world:
                assert (await form(world, headers={"X-Forwarded-For": remote})).status == 401
        said = [record.getMessage() for record in caplog.records if record.name == "broker.auth"]
        assert said[-1] == "the login test is for this machine alone; it was refused to 203.0.113.5"
        assert len(said) == 5  # and not a word where there is no such login

    run(main)


@pytest.mark.parametrize(
    ("remote", "header", "here"),
    [
        ("127.0.0.1", "", True),
        ("::1", "", True),
        ("::ffff:127.0.0.1", "", True),
        ("192.0.2.1", "", False),
        ("2001:db8::1", "", False),
        ("", "", False),
        ("127.0.0.1", "x-forwarded-for", False),
        ("127.0.0.1", "x-forwarded-proto", False),
        ("127.0.0.1", "via", False),
        ("127.0.0.1", "cf-connecting-ip", False),
        ("127.0.0.1", "user-agent", True),
    ],
)
def test_this_machine_is_who_comes_from_it_directly(remote: str, header: str, here: bool) -> None:
    headers = ((header, "127.0.0.1"),) if header else ()
    assert is_here(RequestFacts(method="POST", path="/login", headers=headers, remote=remote)) is here


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost:8787", True), ("127.0.0.1:8787", True), ("[::1]:8787", True), ("broker.lab", False), ("[x", False)],
)
def test_a_name_that_others_have_too_is_not_this_machines_alone(host: str, here: bool) -> None:
    facts = RequestFacts(method="POST", path="/login", headers=(("host", host),), remote="127.0.0.1")
    assert is_here(facts) is here


def test_it_is_off_unless_configured(users: UserStore) -> None:
    async def main() -> None:
        async with serving(config(), users=users) as world:
            assert (await ask(world, "/wsData", method="GET")).status == 404
            assert (await form(world)).status == 401
            answer = await form(world, name="scanner", password=PASSWORD)
            assert answer.status == 200 and set(cookies_set(answer)) == {f"broker-{world.broker.port}"}

    run(main)


def test_only_configured_paths_are_there_and_other_sign_ins_go_on() -> None:
    async def main() -> None:
        async with rt_serving(rt_config(rtcloud={"endpoints": {"wsScanner": "lab1"}})) as world:
            assert (await ask(world, "/wsData", method="GET")).status == 404
            assert (await ask(world, "/wsScanner", method="GET")).status == 426
            assert (await ask(world, "/wsScanner")).status == 405
            async with Daemon(world.broker.url, {}, path="/wsScanner"):
                await here(world, "lab1")
            answer = await ask(world, "/login", {"token": CALLER}, secret=None, headers={"Origin": world.broker.url})
            assert answer.status == 200 and answer.json["principal"] == "carol"
            assert set(cookies_set(answer)) == {f"broker-{world.broker.port}"}, "who has a token is no daemon"
            stale = {"Origin": world.broker.url, "Cookie": f"_xsrf={XSRF}"}
            assert (await ask(world, "/login", {"token": CALLER}, secret=None, headers=stale)).status == 200
            test = {"name": "test", "password": "test"}
            assert (await ask(world, "/login", test, secret=None, headers=stale)).status == 401, "for the form alone"

    run(main)


def test_a_token_opens_the_path_too() -> None:
    async def main() -> None:
        async with rt_serving(rt_config(rtcloud={"endpoints": {"wsLab": "lab"}})) as world:
            await world.peer("/wsLab", WORKER)
            await here(world, "lab")
            for secret, status in ((CALLER, 403), (None, 401)):
                with pytest.raises(InvalidStatus) as refused:
                    await world.peer("/wsLab", secret)
                assert refused.value.response.status_code == status

    run(main)


def test_routes_stand_under_a_prefix() -> None:
    async def main() -> None:
        from tornado.httpserver import HTTPServer
        from tornado.netutil import bind_sockets
        from tornado.web import Application

        from broker.node.broker import Broker

        async with Broker(rt_config(), fixed=PRINCIPALS) as broker:
            sockets = bind_sockets(0, "127.0.0.1")
            broker.port = sockets[0].getsockname()[1]
            broker.authenticator.rules = broker._host_rules(broker.config)
            server = HTTPServer(Application(broker.routes("/lab")))
            server.add_sockets(sockets)
            url = f"http://127.0.0.1:{broker.port}"
            daemon = Daemon(f"{url}/lab", {}, path="/wsData")
            daemon.origin = url
            async with daemon:
                await until(lambda: "data" in broker.router.registry.by_name, "it serves")
            server.stop()
            await server.close_all_connections()

    run(main)


def test_no_room_is_refused_before_the_upgrade() -> None:
    async def main() -> None:
        async with rt_serving(rt_config(limits={"sessions_max": 1})) as world:
            await world.peer("/ws", ADMIN)
            with pytest.raises(InvalidStatus) as refused:
                async with hand(world):
                    pass
            assert refused.value.response.status_code == 503

    run(main)


def test_signatures_are_of_one_name_one_value_and_one_key() -> None:
    signer, other = Signer(), Signer()
    text = signer.sign("login", "a.b")
    assert signer.read("login", text) == "a.b"
    assert signer.read("other", text) is None
    assert other.read("login", text) is None
    for wrong in ("", ".", "a.b", text[:-1], text + "x", "x" + text, text.replace("a", "ä"), "x" * 5000):
        assert signer.read("login", wrong) is None


def test_a_program_with_a_login_of_its_own_lets_daemons_in_by_its_own_cookie() -> None:
    async def main() -> None:
        asked: list[str] = []

        def authenticate(request: HTTPServerRequest) -> Principal | None:
            asked.append(request.path)
            name = decode_signed_value("secret", "login", request.cookies["login"].value)
            return Principal(name.decode(), (Grant(Role.WORKER, ("data",)),)) if name else None

        async with rt_serving(authenticate=authenticate) as world:
            theirs = create_signed_value("secret", "login", "scanner").decode()
            async with hand(world, cookie=theirs):
                await until(lambda: "data" in world.broker.router.registry.by_name, "it serves")
                (session,) = world.broker.router.sessions.by_id.values()
                assert session.principal == "scanner"
            with pytest.raises(InvalidStatus) as refused:
                async with hand(world, "/wsSubject", cookie=theirs):
                    pass
            assert refused.value.response.status_code == 403
            asked.clear()
            async with hand(world):  # the test login's own, which the program does not know
                assert asked.count("/wsData") == 1, "asked once"
            wrong = create_signed_value("another secret", "login", "scanner").decode()
            with pytest.raises(InvalidStatus) as refused:
                async with hand(world, cookie=wrong):
                    pass
            assert refused.value.response.status_code == 401

    run(main)
