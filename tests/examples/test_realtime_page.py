"""The example in a real browser: the button, the plot, two pages, a scanner that is killed, a page that comes late."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from examples.realtime import scanner
from examples.realtime.program import Program as RealTime
from tests.admin.web.webdriver import Browser
from tests.examples.program import PATIENCE_S, Program

POINTS = "(document.querySelector('#plot .series-0[d]')?.getAttribute('d').match(/[ML]/g) ?? []).length"
DRAWN = "document.querySelector('#plot .series-0[d]').getAttribute('d')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


def begin(browser: Browser, repetition_s: float, images: int) -> None:
    browser.type("#repetition", str(repetition_s))
    browser.type("#images", str(images))
    browser.click("#press")
    browser.until("document.querySelector('#press').innerText === 'Stop'", "a run is under way")


def open_page(browser: Browser, url: str) -> None:
    browser.go(url)
    browser.until_text("#connection", "Connected")
    browser.until("!document.querySelector('#press').disabled", "the button can be pressed")


def points(browser: Browser, at_least: int) -> int:
    return int(browser.until(f"{POINTS} >= {at_least} && {POINTS}", f"{at_least} points are drawn"))


@pytest.mark.timeout(120)
def test_a_run_is_seen_by_every_page_and_looks_well(browser: Browser, tmp_path: Path) -> None:
    with Program(tmp_path) as program:
        browser.look(1200, 800)
        browser.console()
        browser.go(program.url)
        assert "Open the URL" in browser.text("body")  # a stranger
        browser.console()
        open_page(browser, program.page)
        assert browser.run("return location.search") == ""
        (cookie,) = browser.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        browser.until_text("#scanner", "Scanner ready")
        browser.shoot(tmp_path / "empty.png")

        begin(browser, 0.2, 25)
        points(browser, 3)
        assert browser.text("#status") == "Run 1, started by operator."
        assert browser.run("return document.querySelector('#repetition').disabled")

        first = browser.window()
        second = browser.open_window()  # comes late, and has it all
        browser.look(1200, 800)
        open_page(browser, program.url)
        points(browser, 4)
        browser.until_text("#status", "all images are taken")
        drawn = browser.until(DRAWN, "the last point is drawn")
        assert points(browser, 5) <= 25
        assert " mm " in browser.text("#numbers")
        browser.use(first)
        browser.until_text("#status", "all images are taken")
        browser.until(f"{DRAWN} === {json.dumps(drawn)}", "both have drawn the same")

        browser.use(second)
        open_page(browser, program.url)  # loaded anew
        browser.until(f"{DRAWN} === {json.dumps(drawn)}", "and so has the one that was loaded anew")
        for width, dark in ((1200, False), (1200, True), (360, False), (360, True)):
            browser.look(width, 800, dark=dark)
            browser.until(
                "document.querySelector('#plot').getAttribute('viewBox')?.startsWith("
                "'0 0 ' + document.querySelector('#plot').clientWidth)",
                "the plot is as wide as its place",
            )
            assert browser.run("return document.documentElement.scrollWidth") <= width
            browser.shoot(tmp_path / f"page-{width}-{'dark' if dark else 'light'}.png")
        assert [line for line in browser.console() if "favicon" not in line] == []
        browser.close_window()
        browser.use(first)
        assert program.end(signal.SIGINT) == 0


@pytest.mark.timeout(120)
def test_a_run_waits_for_a_scanner_that_was_killed_and_stops_when_told(browser: Browser, tmp_path: Path) -> None:
    with Program(tmp_path, "--no-scanner") as program:
        browser.look(1200, 800)
        open_page(browser, program.page)
        browser.until_text("#scanner", "Scanner away")
        with program.scanner() as scanner:
            browser.until_text("#scanner", "Scanner ready")
            begin(browser, 0.2, 10_000)
            seen = points(browser, 3)
            scanner.end(signal.SIGKILL)
            browser.until_text("#status", "The scanner is away")
            browser.until_text("#scanner", "Scanner away")
            seen = max(seen, points(browser, 3))
            open_page(browser, program.url)  # who comes now is told, too
            browser.until_text("#status", "The scanner is away")
            browser.shoot(tmp_path / "away.png")
        with program.scanner(2):
            browser.until_text("#status", "Run 1 goes on")
            points(browser, seen + 3)
            browser.click("#press")
            browser.until_text("#status", "Run 1 has ended: stopped.")
            browser.until("document.querySelector('#press').innerText === 'Start'", "another run may begin")
            begin(browser, 0.2, 10_000)  # a terminal ends what the page began
            with program.client() as client:
                assert client.call("realtime/stop")["running"] is False
            browser.until_text("#status", "Run 2 has ended: stopped.")
            browser.type("#images", "0")
            browser.click("#press")
            assert browser.run("return document.querySelector('#images').validity.rangeUnderflow")
        assert program.end(signal.SIGTERM) == 0
        browser.until_text("#connection", "Connecting")


class Inside:
    """The program in a thread of this process, so that a test has its broker."""

    def __init__(self) -> None:
        self._ready: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self.page = self._ready.result(PATIENCE_S)

    async def _run(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        self._program = RealTime()
        try:
            url = await self._program.start(0, with_scanner=False)
            self._program.broker.serve("scanner", [scanner.expose])
            self._ready.set_result(f"{url}/?key={self._program.login.key}")
            await self._leave.wait()
        finally:
            await self._program.stop()

    def cut(self) -> int:
        """Close everybody's connection; how many those were."""
        cutting = asyncio.run_coroutine_threadsafe(self._program.broker.close_all(), self._loop)
        return cutting.result(PATIENCE_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()


@pytest.mark.timeout(120)
def test_a_page_goes_on_without_a_gap_after_its_connection_broke(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    program = Inside()
    try:
        open_page(browser, program.page)
        browser.run(
            "const shown = document.querySelector('#connection'); window.seen = [];"
            "new MutationObserver(() => window.seen.push(shown.innerText)).observe(shown, { childList: true })"
        )
        begin(browser, 0.2, 10_000)
        seen = points(browser, 2)
        assert program.cut() == 1
        browser.until("window.seen.includes('Connecting…')", "the page has noticed")
        browser.until_text("#connection", "Connected")
        points(browser, seen + 3)
        browser.click("#press")
        browser.until_text("#status", "has ended: stopped")
        drawn = browser.until(DRAWN, "the last point is drawn")
        open_page(browser, browser.run("return location.href"))
        browser.until(f"{DRAWN} === {json.dumps(drawn)}", "who hears all of it anew draws the same")
    finally:
        program.close()
