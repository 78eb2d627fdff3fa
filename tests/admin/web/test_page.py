"""The page in a real browser: signing in, calling, images, broadcasts, and what must not run."""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy
import pytest

from broker import AsyncClient, Worker
from broker.worker import current
from tests.admin.web.webdriver import Browser
from tests.javascript.harness import PATIENCE_S, TOKEN, BrokerProcess

SIZE = (240, 160)


def png(width: int, height: int) -> bytes:
    """A small picture with a gradient."""
    rows = b"".join(b"\0" + bytes((x * 255 // width + y) % 256 for x in range(width)) for y in range(height))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in [*chunks, (b"IEND", b"")]:
        parts.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(parts)


PNG = png(*SIZE)


class Camera:
    """A camera of the laboratory."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.scanning = threading.Event()

    def image(self, number: int) -> dict[str, Any]:
        """Take picture number so and so."""
        return {"number": number, "image": PNG, "raw": bytes(range(256))}

    def numbers(self) -> list[int]:
        """Some numbers."""
        return [1, 2, 3]

    def pixels(self) -> dict[str, Any]:
        """Numbers with a shape."""
        return {"pixels": numpy.arange(6, dtype="<u2").reshape(2, 3)}

    async def hang(self) -> None:
        """Answer never."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def scan(self) -> Iterator[int]:
        """Three slices."""
        self.scanning.clear()
        yield from range(3)
        current().progress(3, 10, "slices")
        assert self.scanning.wait(PATIENCE_S)

    def fail(self, why: str = "no light") -> None:
        """Fail."""
        raise RuntimeError(why)


class Laboratory:
    """Workers and a client on a loop in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.camera = Camera()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(),))
        self._thread.start()
        self._ready.result(PATIENCE_S)

    async def _main(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        worker = Worker("camera", self.url, TOKEN, name="camera on the roof").add_object(self.camera)
        try:
            await worker.start()
            async with AsyncClient(self.url, TOKEN) as self.client:
                self._ready.set_result(None)
                await self._leave.wait()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            raise
        finally:
            await worker.stop(now=True)

    def do(self, make: Callable[[], Any]) -> Any:
        """Run a coroutine over there."""
        return asyncio.run_coroutine_threadsafe(make(), self._loop).result(PATIENCE_S)

    def publish(self, data: object, topic: str | None = None) -> None:
        self.do(lambda: self.client.publish("camera", data, topic=topic))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()


@pytest.fixture(scope="module")
def laboratory(broker: BrokerProcess) -> Iterator[Laboratory]:
    """Somebody who serves `camera`."""
    running = Laboratory(broker.url)
    yield running
    running.close()


@pytest.fixture
def page(browser: Browser, broker: BrokerProcess, laboratory: Laboratory) -> Iterator[Browser]:
    """The page, signed in, the endpoint chosen."""
    browser.look(1200, 900)
    sign_in(browser, broker)
    browser.console()
    choose_camera(browser)
    yield browser
    assert [line for line in browser.console() if "Content Security Policy" in line] == []
    sign_out(browser)


def sign_in(browser: Browser, broker: BrokerProcess) -> None:
    browser.go(broker.url + "/")
    browser.until("!document.querySelector('#signing-in').hidden", "the page asks for a token")
    browser.type("#token", TOKEN)
    browser.press("enter")
    browser.until_text("#state", "Connected")


def choose_camera(browser: Browser) -> None:
    browser.until("document.querySelector('#endpoints [data-endpoint=camera]')", "camera is listed")
    browser.click("#endpoints [data-endpoint=camera] button")
    browser.until_text("#workers", "camera on the roof")


def sign_out(browser: Browser) -> None:
    browser.click("#sign-out")
    browser.until("!document.querySelector('#signing-in').hidden", "signed out")


def call(browser: Browser, method: str, params: str = "{}", timeout: str = "10") -> None:
    browser.type("#method", method)
    browser.type("#params", params)
    browser.type("#timeout", timeout)
    browser.click("#call")


def reply(browser: Browser) -> str:
    browser.until("document.querySelector('#outcome').dataset.outcome", "the call ends")
    return browser.text("#outcome")


def test_sign_in_sets_a_cookie_no_script_can_read(page: Browser) -> None:
    (cookie,) = page.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert page.run("return document.cookie") == ""
    assert "admin" in page.text("#who")
    page.go(page.run("return location.href"))
    page.until_text("#state", "Connected")  # the cookie is enough
    assert page.run("return document.querySelector('#signing-in').hidden")


def test_a_wrong_token_is_refused_with_the_reason(browser: Browser, broker: BrokerProcess) -> None:
    browser.go(broker.url + "/")
    browser.until("!document.querySelector('#signing-in').hidden", "the page asks for a token")
    browser.type("#token", "wrong")
    browser.click("#sign-in button")
    browser.until_text("#sign-in-error", "not valid")
    assert browser.cookies() == []


def test_sign_out_ends_the_session_on_the_server(browser: Browser, broker: BrokerProcess, page: Browser) -> None:
    call(page, "numbers")
    assert reply(page).startswith("ok")
    sign_out(page)
    assert page.run("return fetch('/whoami').then((response) => response.status)") == 401
    assert page.cookies() == []
    assert "2" not in page.run("return document.querySelector('#reply').textContent")
    sign_in(browser, broker)


def test_methods_are_shown_with_their_signatures_and_words(page: Browser) -> None:
    text = page.text("#workers")
    assert "A camera of the laboratory." in text
    assert "image(number: int) -> dict[str, Any]" in text and "Take picture number so and so." in text


def test_choosing_a_method_fills_in_its_params(page: Browser) -> None:
    page.run("[...document.querySelectorAll('.methods button')].find((b) => b.innerText.includes('image(')).click()")
    assert page.run("return document.querySelector('#method').value") == "image"
    assert page.run("return JSON.parse(document.querySelector('#params').value)") == {"number": 0}
    assert page.run("return document.activeElement.id") == "params"
    page.press("control", "enter")
    assert reply(page).startswith("ok")


def test_an_image_is_shown_as_an_image(page: Browser) -> None:
    call(page, "image", '{"number": 7}')
    assert reply(page).startswith("ok")
    text = page.text("#reply")
    assert '"number": 7' in text and f"⟨attachment 0: {len(PNG):,} bytes, image/png⟩" in text
    page.until("document.querySelector('#images img')?.complete", "the image is loaded")
    assert page.run("const i = document.querySelector('#images img'); return [i.naturalWidth, i.naturalHeight]") == [
        *SIZE
    ]
    assert "Save attachment-1.bin" in page.text("#attachments")


def test_progress_is_shown_and_items_are_gathered(page: Browser, laboratory: Laboratory) -> None:
    call(page, "scan")
    page.until_text("#outcome", "Waiting for the reply: 3 of 10, slices…")
    laboratory.camera.scanning.set()
    assert reply(page).startswith("ok")
    assert page.run("return JSON.parse(document.querySelector('#reply').textContent)") == [0, 1, 2]


def test_an_image_in_base64_is_shown_as_an_image(page: Browser) -> None:
    shown = page.run(
        "const {connect} = await import('/static/broker.js');"
        "window.other = await connect();"
        "await window.other.serve('album', {show: () => ({encoding: 'base64', content: arguments[0]})});"
        "return true",
        base64.b64encode(PNG).decode(),
    )
    assert shown
    page.type("#endpoint", "album")
    call(page, "show")
    assert reply(page).startswith("ok")
    page.until("document.querySelector('#images img')?.naturalWidth == 240", "the image is shown")
    page.run("window.other.close()")


def test_an_array_is_named_and_can_be_saved(page: Browser) -> None:
    call(page, "pixels")
    assert reply(page).startswith("ok")
    assert "⟨attachment 0: array of <u2 (2 × 3), 12 bytes⟩" in page.text("#reply")
    assert "Save attachment-0.bin" in page.text("#attachments")


def test_an_error_says_what_happened(page: Browser) -> None:
    call(page, "fail", '{"why": "no film"}')
    assert "camera/fail: worker_error: RuntimeError: no film" in reply(page)
    assert '"type": "RuntimeError"' in page.text("#reply")


def test_params_that_are_no_json_are_not_sent(page: Browser) -> None:
    call(page, "numbers", "{'a': 1}")
    page.until_text("#params-error", "Not sent:")
    assert page.run("return document.querySelector('#params').getAttribute('aria-invalid')") == "true"


def test_a_deadline_is_told(page: Browser) -> None:
    call(page, "hang", timeout="0.3")
    assert "deadline" in reply(page)


def test_cancel_reaches_the_worker(page: Browser, laboratory: Laboratory) -> None:
    laboratory.camera.cancelled.clear()
    call(page, "hang")
    page.until("!document.querySelector('#cancel').disabled", "the call is under way")
    page.click("#cancel")
    assert "cancelled" in reply(page)
    assert laboratory.camera.cancelled.wait(PATIENCE_S)


def test_broadcasts_appear_as_they_come(page: Browser, laboratory: Laboratory) -> None:
    page.type("#listen-topic", "new")
    page.click("#listen button")
    page.until_text("#listening", "camera · new")
    laboratory.publish({"file": "roof-0001.dcm"}, "new")
    page.until_text("#broadcasts", "roof-0001.dcm")
    laboratory.publish({"file": "roof-0002.dcm"}, "new")
    assert page.until_text("#broadcasts", "roof-0002.dcm").index("0002") < page.text("#broadcasts").index("0001")
    page.click("#listening button")
    page.until("document.querySelector('#listening').children.length == 0", "it listens no more")
    laboratory.publish({"file": "roof-0003.dcm"}, "new")
    call(page, "numbers")  # what was published before its answer would have been there
    reply(page)
    assert "roof-0003" not in page.text("#broadcasts")


def test_workers_that_come_and_go_are_seen(page: Browser, laboratory: Laboratory) -> None:
    async def come() -> Worker:
        worker = Worker("balance", laboratory.url, TOKEN)
        worker.add(lambda: 1, "weigh")
        return await worker.start()

    worker = laboratory.do(come)
    page.until_text("#endpoints", "balance\n1 worker")
    laboratory.do(worker.stop)
    page.until_text("#endpoints", "balance\n0 workers")


def test_row_26_script_in_names_is_shown_as_text(page: Browser, laboratory: Laboratory) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

    async def come() -> Worker:
        worker = Worker("evil", laboratory.url, TOKEN, name=evil)

        def speak() -> dict[str, str]:
            return {evil: evil}

        speak.__doc__ = evil
        worker.add(speak)
        return await worker.start()

    worker = laboratory.do(come)
    page.until("document.querySelector('#endpoints [data-endpoint=evil]')", "evil is listed")
    page.click("#endpoints [data-endpoint=evil] button")
    assert evil in page.until_text("#workers", "onerror")
    call(page, "speak")
    assert reply(page).startswith("ok")
    assert "onerror" in page.text("#reply")
    page.type("#listen-endpoint", "evil")
    page.click("#listen button")
    page.until_text("#listening", "evil")
    laboratory.do(lambda: laboratory.client.publish("evil", {"text": evil}))
    page.until_text("#broadcasts", "onerror")
    assert page.run("return [document.title, document.querySelectorAll('main img, main script').length]") == [
        "Request broker", 0,
    ]  # fmt: skip
    laboratory.do(worker.stop)


def test_row_26_injected_script_does_not_run(browser: Browser, broker: BrokerProcess) -> None:
    browser.go(broker.url + "/")
    browser.run(
        "const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\";"
        "document.body.append(s);"
        "const i = document.createElement('div'); i.innerHTML = '<img src=x onerror=\"document.title=`owned`\">';"
        "document.body.append(i);"
    )
    assert browser.run("return document.title") == "Request broker"
    assert any("Content Security Policy" in line for line in browser.console())


def test_the_page_needs_nothing_from_elsewhere(page: Browser) -> None:
    names = page.run("return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)")
    assert set(names) == {page.run("return location.origin")}


def test_all_of_it_works_by_keyboard(browser: Browser, broker: BrokerProcess, laboratory: Laboratory) -> None:
    sign_in(browser, broker)  # types and presses enter
    browser.until("document.querySelector('#endpoints [data-endpoint=camera]')", "camera is listed")
    browser.run("document.querySelector('#sign-out').focus()")
    tab_to(browser, "document.activeElement.closest('[data-endpoint=camera]')")
    browser.press("enter")
    browser.until_text("#workers", "numbers()")
    tab_to(browser, "document.activeElement.innerText?.startsWith('numbers()')")
    browser.press("enter")
    browser.press("control", "enter")
    assert reply(browser).startswith("ok")
    sign_out(browser)


def tab_to(browser: Browser, condition: str) -> None:
    for _ in range(40):
        if browser.run(f"return Boolean({condition})"):
            return
        browser.press("tab")
    raise AssertionError(f"never reached by tab: {condition}")


def test_it_fits_wide_and_narrow_light_and_dark(page: Browser, laboratory: Laboratory, tmp_path: Path) -> None:
    page.click("#listen button")
    page.until_text("#listening", "camera")
    laboratory.publish({"file": "roof-0001.dcm", "bytes": 39206})
    page.until_text("#broadcasts", "roof-0001.dcm")
    call(page, "image", '{"number": 7}')
    assert reply(page).startswith("ok")
    page.until("document.querySelector('#images img')?.complete", "the image is loaded")
    backgrounds = set()
    for width in (1200, 360):
        for dark in (False, True):
            page.look(width, 900, dark=dark)
            page.shoot(tmp_path / f"page-{width}-{'dark' if dark else 'light'}.png")
            assert page.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
            backgrounds.add(page.run("return getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    page.look(1200, 900)


def test_the_sign_in_fits_wide_and_narrow(browser: Browser, broker: BrokerProcess, tmp_path: Path) -> None:
    browser.go(broker.url + "/")
    browser.until("!document.querySelector('#signing-in').hidden", "the page asks for a token")
    assert browser.run("return document.activeElement.id") == "token"
    for width in (1200, 360):
        for dark in (False, True):
            browser.look(width, 700, dark=dark)
            browser.shoot(tmp_path / f"sign-in-{width}-{'dark' if dark else 'light'}.png")
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
    browser.look(1200, 900)


def test_every_field_has_a_label(page: Browser) -> None:
    nameless = page.run(
        "return [...document.querySelectorAll('input, textarea, button')]"
        ".filter((e) => !(e.labels?.length || e.innerText || e.getAttribute('aria-label'))).map((e) => e.outerHTML)"
    )
    assert nameless == []


def test_a_restart_of_the_broker_is_told_and_asks_for_the_token_again(
    browser: Browser, broker: BrokerProcess, laboratory: Laboratory
) -> None:
    browser.look(1200, 900)
    sign_in(browser, broker)
    choose_camera(browser)
    broker.kill()
    browser.until_text("#state", "Connecting")
    broker.start()
    browser.until_text("#sign-in-error", "signed out")  # sign-ins live in the memory of the broker
    assert browser.text("#workers") == "", "nothing is left of what was seen"
    browser.type("#token", TOKEN)
    browser.press("enter")
    browser.until_text("#state", "Connected")
    choose_camera(browser)
    call(browser, "numbers")
    assert reply(browser).startswith("ok")
    sign_out(browser)
