"""The page under a prefix of somebody else's application, in a real browser: by token, and by the program's login."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from broker import Broker
from tests.admin.web.webdriver import Browser
from tests.javascript.harness import PATIENCE_S
from tests.transports.websocket.harness import ADMIN, PRINCIPALS, config


class Program:
    """A program in a thread, with one broker that wants a token and one that knows everybody already."""

    def __init__(self) -> None:
        self._ready: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self.port = self._ready.result(PATIENCE_S)

    async def _run(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        asking = Broker(config(), fixed=PRINCIPALS)
        knowing = Broker(config(), authenticate=lambda request: PRINCIPALS[ADMIN])
        server = HTTPServer(Application([*await self._routes(asking, "/a/b"), *await self._routes(knowing, "/own")]))
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        self._ready.set_result(sockets[0].getsockname()[1])
        await self._leave.wait()
        server.stop()
        await asking.stop()
        await knowing.stop()
        await server.close_all_connections()

    async def _routes(self, broker: Broker, prefix: str) -> list[object]:
        await broker.start()
        broker.serve("sum", {"add": lambda a, b: a + b})
        return [*broker.routes(prefix)]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    running = Program()
    yield running
    running.close()


def calls(browser: Browser) -> None:
    """Choose the endpoint, call its method, see the answer."""
    browser.until("document.querySelector('#endpoints [data-endpoint=sum]')", "sum is listed")
    browser.click("#endpoints [data-endpoint=sum] button")
    browser.until_text("#workers", "add")
    browser.type("#method", "add")
    browser.type("#params", '{"a": 2, "b": 40}')
    browser.click("#call")
    browser.until("document.querySelector('#outcome').dataset.outcome", "the call ends")
    assert browser.text("#outcome").startswith("ok")
    assert "42" in browser.text("#reply")


def test_the_page_signs_in_and_calls_under_a_prefix(browser: Browser, program: Program) -> None:
    browser.console()
    browser.go(f"http://127.0.0.1:{program.port}/a/b")  # without the slash: it is sent on
    browser.until("!document.querySelector('#signing-in').hidden", "the page asks for a token")
    assert browser.run("return location.pathname") == "/a/b/"
    browser.type("#token", ADMIN)
    browser.press("enter")
    browser.until_text("#state", "Connected")
    (cookie,) = browser.cookies()
    assert (cookie["name"], cookie["path"], cookie["httpOnly"]) == (f"broker-{program.port}-a-b", "/a/b/", True)
    calls(browser)
    browser.go(f"http://127.0.0.1:{program.port}/a/b/")
    browser.until_text("#state", "Connected")  # the cookie is enough
    browser.click("#sign-out")
    browser.until("!document.querySelector('#signing-in').hidden", "signed out")
    assert browser.cookies() == []
    assert [line for line in browser.console() if "Content Security Policy" in line] == []


def test_the_page_needs_no_sign_in_where_the_program_knows_who_it_is(browser: Browser, program: Program) -> None:
    browser.go(f"http://127.0.0.1:{program.port}/own/")
    browser.until_text("#state", "Connected")
    assert browser.run("return document.querySelector('#signing-in').hidden")
    assert "admin" in browser.text("#who")
    assert browser.run("return document.querySelector('#sign-out').hidden"), "it would end nothing"
    assert browser.cookies() == []
    calls(browser)
