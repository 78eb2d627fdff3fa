"""The files a browser gets: what is served, with which headers, and that nothing else is."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPMessage
from importlib.resources import files

import pytest

from broker._version import VERSION
from broker.admin.web.files import PAGE, TYPES, read_file
from tests.javascript.harness import BrokerProcess


def ask(
    broker: BrokerProcess, path: str, method: str = "GET", **headers: str
) -> tuple[int, HTTPMessage, bytes]:  # fmt: skip
    """Status, headers and body; the path goes out as it stands."""
    connection = HTTPConnection("127.0.0.1", broker.port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("name", TYPES)
def test_each_file_is_served_as_what_it_is(broker: BrokerProcess, name: str) -> None:
    status, headers, body = ask(broker, f"/static/{name}")
    assert status == 200
    assert headers["Content-Type"] == TYPES[name]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Server"] is None
    assert body == files("broker.admin.web").joinpath("static", name).read_bytes()


def test_a_browser_that_has_it_is_told_so(broker: BrokerProcess) -> None:
    _, headers, _ = ask(broker, "/static/broker.js")
    assert headers["Cache-Control"] == "no-cache"
    status, again, body = ask(broker, "/static/broker.js", If_None_Match=headers["Etag"])
    assert (status, body, again["Etag"]) == (304, b"", headers["Etag"])
    assert ask(broker, "/static/broker.js", If_None_Match='"another"')[0] == 200
    assert len({read_file(name).etag for name in TYPES}) == len(TYPES)


def test_head_says_the_length_only(broker: BrokerProcess) -> None:
    status, headers, body = ask(broker, "/static/broker.js", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(read_file("broker.js").content)


@pytest.mark.parametrize(
    "path",
    [
        "/static/", "/static/package.json", "/static/../files.py", "/static/..%2ffiles.py", "/static/%2e%2e/files.py",
        "/static/static/broker.js", "/static//etc/passwd", "/static/broker.js/", "/static/broker.js%00",
        "/static/BROKER.JS", "/static/.", "/static/..", "/static/page.css%20", "/static/__init__.py",
    ],
)  # fmt: skip
def test_nothing_else_is_served(broker: BrokerProcess, path: str) -> None:
    assert ask(broker, path)[0] == 404


def test_hostile_26_the_page_may_run_its_own_files_only(broker: BrokerProcess) -> None:
    status, headers, body = ask(broker, "/")
    assert status == 200 and body == read_file(PAGE).content
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
        "img-src": "'self' blob:", "frame-ancestors": "'none'", "base-uri": "'none'", "form-action": "'self'",
    }  # fmt: skip
    assert headers["X-Content-Type-Options"] == "nosniff"
    for inline in (b" style=", b"<style", b" on", b"javascript:"):
        assert inline not in body.replace(b" one", b"").lower()


def test_files_are_for_who_names_the_broker_rightly(broker: BrokerProcess) -> None:
    for path in ("/", "/static/broker.js"):
        assert ask(broker, path, Host="evil.example")[0] == 421
        assert ask(broker, path, Origin="http://evil.example")[0] == 403
        assert ask(broker, path, "POST")[0] == 405


def test_no_file_sets_markup_from_text() -> None:
    for name in ("page.js", "broker.js"):
        text = read_file(name).content.decode()
        for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert danger not in text, (name, danger)


def test_the_npm_package_has_the_version_of_the_broker() -> None:
    package = json.loads(files("broker.admin.web").joinpath("static", "package.json").read_text())
    assert package["version"] == VERSION
    for named in (package["main"], package["types"], *package["files"]):
        assert files("broker.admin.web").joinpath("static", named.removeprefix("./")).is_file()
