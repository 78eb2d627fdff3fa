"""Signing in with name and password in a browser: on the page, and by the form that needs no script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.auth.users import UserStore
from tests.admin.web.webdriver import Browser
from tests.auth.helpers import cheap_passwords
from tests.javascript.harness import BrokerProcess

PASSWORD = "a password with blanks "


@pytest.fixture
def carol(broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserStore]:
    """A user of the running broker, who is removed afterwards."""
    cheap_passwords(monkeypatch)
    store = UserStore(broker._folder / "state" / "broker" / "users.json")
    store.add("carol", PASSWORD, ["caller", "listener"])
    yield store
    if len(store):
        store.remove("carol")


def signed_in(browser: Browser) -> None:
    browser.until_text("#state", "Connected")
    assert "carol" in browser.text("#who")


def signed_out(browser: Browser) -> None:
    browser.until("!document.querySelector('#signing-in').hidden", "the page asks who is there")


def test_name_and_password_on_the_page(browser: Browser, broker: BrokerProcess, carol: UserStore) -> None:
    browser.go(broker.url + "/")
    signed_out(browser)
    browser.type("#name", "carol")
    browser.type("#token", "wrong")
    browser.press("enter")
    browser.until_text("#sign-in-error", "the name or the password is not right")
    browser.type("#token", PASSWORD)
    browser.press("enter")
    signed_in(browser)
    carol.remove("carol")
    signed_out(browser)


def test_the_form_without_a_script(browser: Browser, broker: BrokerProcess, carol: UserStore, tmp_path: Path) -> None:
    browser.console()
    for width in (1200, 360):
        for dark in (False, True):
            browser.look(width, 700, dark=dark)
            browser.go(broker.url + "/login")
            browser.shoot(tmp_path / f"form-{width}-{'dark' if dark else 'light'}.png")
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
    browser.look(1200, 700)
    browser.type("#name", "carol")
    browser.type("#password", "wrong")
    browser.press("enter")
    browser.until_text(".error", "the name or the password is not right")
    assert browser.run("return location.pathname") == "/login"
    browser.type("#name", "carol")
    browser.type("#password", PASSWORD)
    browser.press("enter")
    signed_in(browser)
    assert browser.run("return location.pathname") == "/"
    assert [line for line in browser.console() if "Content Security Policy" in line] == []
    browser.click("#sign-out")
    signed_out(browser)
    browser._do("DELETE", "/cookie")  # `_xsrf` stays; the tests beside this one look at all cookies
