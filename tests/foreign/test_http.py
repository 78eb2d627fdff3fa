"""curl and Python's own HTTP client see the status codes and the JSON that the protocol promises."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
from collections.abc import Callable

import pytest

from tests.foreign.harness import PATIENCE_S, TOKEN, BrokerProcess, dial

Answer = tuple[int, dict[str, str], str]
Ask = Callable[..., Answer]


def by_curl(url: str, method: str = "GET", headers: dict[str, str] | None = None, body: str | None = None) -> Answer:
    curl = shutil.which("curl")
    if curl is None:
        if os.environ.get("CI") == "true":
            pytest.fail("curl is not installed")
        pytest.skip("curl is not installed")
    arguments = [curl, "--silent", "--show-error", "--include", "--max-time", str(PATIENCE_S), "--noproxy", "*"]
    arguments += ["--head"] if method == "HEAD" else ["--request", method]
    for name, value in (headers or {}).items():
        arguments += ["--header", f"{name}: {value}"]
    if body is not None:
        arguments += ["--data-binary", body]
    done = subprocess.run([*arguments, url], capture_output=True, check=True)
    head, _, text = done.stdout.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(status.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}, text


def by_python(url: str, method: str = "GET", headers: dict[str, str] | None = None, body: str | None = None) -> Answer:
    address, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request(method, "/" + path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read().decode()
    finally:
        connection.close()


BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(params=[by_curl, by_python])
def ask(request: pytest.FixtureRequest) -> Ask:
    """A client."""
    client: Ask = request.param
    return client


def error_of(answer: Answer, status: int) -> str:
    """An error is JSON of one form whatever the path, and is not cached."""
    assert answer[0] == status
    assert answer[1]["content-type"].startswith("application/json")
    assert answer[1]["cache-control"] == "no-store" and "server" not in answer[1]
    body = json.loads(answer[2])
    assert set(body) >= {"error", "status"} and body["status"] == status
    reason: str = body["error"]
    return reason


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_health_is_open_to_anybody(ask: Ask, broker: BrokerProcess, path: str) -> None:
    status, headers, body = ask(broker.url + path)
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    assert headers["content-type"].startswith("application/json")
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"


def test_a_ticket_opens_one_socket(ask: Ask, broker: BrokerProcess) -> None:
    status, headers, body = ask(broker.url + "/ticket", "POST", BEARER)
    assert status == 200 and headers["cache-control"] == "no-store"
    ticket = json.loads(body)
    assert set(ticket) == {"ticket", "expires_in_s"} and ticket["expires_in_s"] == 30
    assert "=" not in ticket["ticket"]
    upgrade = {
        "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    assert first_line(broker, f"/ws?ticket={ticket['ticket']}", upgrade).startswith("HTTP/1.1 101 ")
    error_of(ask(f"{broker.url}/ws?ticket={ticket['ticket']}", "GET", upgrade), 401)


def first_line(broker: BrokerProcess, path: str, headers: dict[str, str]) -> str:
    """Of the answer to an upgrade, which neither client understands."""
    import socket

    host, port = broker.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", *(f"{name}: {headers[name]}" for name in headers)]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return connection.recv(4096).decode().partition("\r\n")[0]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-wrong-wrong-wrong-wrong-wrong"}])
@pytest.mark.parametrize(("path", "method"), [("/ticket", "POST"), ("/metrics", "GET")])
def test_without_a_good_token_nothing_is_told(
    ask: Ask, broker: BrokerProcess, path: str, method: str, headers: dict[str, str]
) -> None:
    answer = ask(broker.url + path, method, headers)
    reason = error_of(answer, 401)
    assert "www-authenticate" in answer[1]
    assert "wrong-wrong" not in reason


def test_metrics_are_prometheus_text(ask: Ask, broker: BrokerProcess) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    status, headers, body = ask(broker.url + "/metrics", "GET", BEARER)
    assert status == 200 and headers["content-type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(body)}
    assert any(name.startswith("broker_") for name in names)


@pytest.mark.parametrize("path", ["/nothing", "/ws/a/b", "/livez/", "/%2e%2e/etc/passwd", "/metrics/x?y=z"])
@pytest.mark.parametrize("headers", [{}, BEARER], ids=["anonymous", "known"])
def test_unknown_paths(ask: Ask, broker: BrokerProcess, path: str, headers: dict[str, str]) -> None:
    error_of(ask(broker.url + path, "GET", headers), 404)


@pytest.mark.parametrize(("method", "path"), [("POST", "/livez"), ("DELETE", "/metrics"), ("GET", "/ticket")])
def test_other_methods_are_refused(ask: Ask, broker: BrokerProcess, method: str, path: str) -> None:
    body = "" if method == "POST" else None
    error_of(ask(broker.url + path, method, BEARER, body), 405)


def test_a_plain_get_of_a_socket_says_what_is_missing(ask: Ask, broker: BrokerProcess) -> None:
    answer = ask(broker.url + "/ws/data", "GET", BEARER)
    assert answer[0] in (400, 426)
    assert "upgrade" in error_of(answer, answer[0]).lower()


def test_a_rebound_host_is_misdirected(ask: Ask, broker: BrokerProcess) -> None:
    for path in ("/livez", "/metrics", "/nothing"):
        error_of(ask(broker.url + path, "GET", BEARER | {"Host": "evil.example"}), 421)


@pytest.mark.parametrize("target", ["/ws", "/ws/data?role=worker"])
def test_a_refused_socket_is_told_by_its_status(broker: BrokerProcess, target: str) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with pytest.raises(InvalidStatus) as caught, connect(broker.ws(target)):
        pass
    assert caught.value.response.status_code == 401
    assert json.loads(caught.value.response.body)["status"] == 401
    with pytest.raises(InvalidStatus) as caught:
        dial(broker.ws("/ws/data?rol=worker"))
    assert caught.value.response.status_code == 400
    assert "role" in json.loads(caught.value.response.body)["error"]
