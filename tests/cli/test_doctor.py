"""`broker doctor`: every finding, its advice and its exit code."""

import asyncio
import datetime
import http.server
import json
import os
import socket
import ssl
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.auth.tokens import TokenStore
from broker.cli import doctor as module
from broker.cli.main import main
from broker.node.broker import Broker
from broker.worker.worker import Worker
from tests.peer.harness import CALLER, SECRET, broker_thread


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BROKER_") or name.startswith("SSL_")]:
        monkeypatch.delenv(name)
    for name in ("config", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def examine(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["doctor", *arguments, "--json"])
    told = json.loads(capfd.readouterr().out)
    assert told["ok"] == (code == 0)
    for check in told["checks"]:
        assert check["status"] == "ok" or check["advice"]
    return code, {check["name"]: check for check in told["checks"]}


def test_all_is_well(capfd: pytest.CaptureFixture[str]) -> None:
    with broker_thread() as (broker, loop):
        worker = Worker("data", broker.url, SECRET)
        worker.add(lambda: None, "nothing")
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(20)
        code, checks = examine(capfd, "--url", broker.url, "--token", SECRET)
        assert code == 0
        names = ["url", "reachable", "clock", "ready", "token", "websocket", "versions", "endpoints"]
        assert list(checks) == names
        assert {check["status"] for check in checks.values()} == {"ok"}
        assert checks["endpoints"]["text"] == "data (1 worker)"
        assert main(["doctor", "--url", broker.url, "--token", CALLER]) == 0
        told = capfd.readouterr()
        assert "ok    token: caller (caller at data; from: given)" in told.out
        assert SECRET not in told.out
        assert CALLER not in told.out
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(20)


def test_nobody_there(capfd: pytest.CaptureFixture[str]) -> None:
    code, checks = examine(capfd)
    assert code == 3
    assert "no broker of yours runs here" in checks["broker"]["text"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        code, checks = examine(capfd, "--url", f"http://127.0.0.1:{port}", "--token", "x")
    assert code == 3
    assert checks["reachable"]["text"] == "no answer: Connection refused"
    assert main(["doctor", "--url", f"http://127.0.0.1:{port}"]) == 3
    assert capfd.readouterr().err == "broker: doctor: reachable failed; the lines above say what to do\n"


def test_a_zeromq_door_is_no_url(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, checks = examine(capfd, "--url", "tcp://127.0.0.1:5000/key")
    assert code == 2
    assert "broker ping" in checks["url"]["advice"]
    code, checks = examine(capfd, "--url", str(tmp_path / "none.json"))
    assert code == 3
    assert "there is no file" in checks["broker"]["text"]


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://u:p@x", "http://127.0.0.1:99999"])
def test_what_is_no_url(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, checks = examine(capfd, "--url", url)
    assert code == 2
    assert checks["url"]["status"] == "fail"


@contextmanager
def something_else(answer: bytes) -> Iterator[int]:
    """A server that says the same to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)
            except OSError:
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "no answer: SSH-2.0-OpenSSH"),
        (b"", "no answer: Remote end closed connection without response"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP 404 from /livez: something else"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "HTTP 200 from /livez: something else"),
    ],
)
def test_something_else_listens_there(answer: bytes, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with something_else(answer) as port:
        code, checks = examine(capfd, "--url", f"http://127.0.0.1:{port}", "--token", "x")
    assert code == 3
    assert says in checks["reachable"]["text"]


def test_silence_ends(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code, checks = examine(capfd, "--url", f"http://127.0.0.1:{listener.getsockname()[1]}", "--token", "x")
    assert code == 3
    assert checks["reachable"]["text"] == "no answer: nothing came within 0.2 s"


def test_a_name_the_broker_does_not_know(capfd: pytest.CaptureFixture[str]) -> None:
    with broker_thread() as (broker, _):
        code, checks = examine(capfd, "--url", f"http://127.0.0.2:{broker.port}", "--token", SECRET)
        if "Connection refused" in checks["reachable"]["text"]:
            # Bound to one address: pretend that the name leads there.
            code, checks = _examine_as("broker.evil.example", broker, capfd)
    assert code == 3
    assert "does not answer to the name" in checks["reachable"]["text"]
    assert "server.allowed_hosts" in checks["reachable"]["advice"]


def _examine_as(name: str, broker: Broker, capfd: pytest.CaptureFixture[str]) -> Any:
    create = socket.create_connection

    def connect(address: tuple[str, int], *arguments: Any, **keywords: Any) -> socket.socket:
        return create(("127.0.0.1", address[1]), *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", connect)
        return examine(capfd, "--url", f"http://{name}:{broker.port}", "--token", SECRET)


def test_tokens_that_do_not_let_in(capfd: pytest.CaptureFixture[str]) -> None:
    with broker_thread() as (broker, _):
        code, checks = examine(capfd, "--url", broker.url)
        assert code == 4
        assert checks["token"]["text"] == "there is none for this broker"
        code, checks = examine(capfd, "--url", broker.url, "--token", "x" * 43)
        assert code == 4
        assert "not accepted: the credential is not valid (from: given)" in checks["token"]["text"]


def test_a_token_that_expires_soon(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    _, soon = store.create("soon", ("caller",), ("data",), 3600.0)
    _, later = store.create("later", ("caller",), ("data",), 10 * 86400.0)
    with broker_thread() as (broker, _):
        broker.authenticator.tokens = store
        code, checks = examine(capfd, "--url", broker.url, "--token", soon)
        assert code == 0
        assert checks["token"]["status"] == "warn"
        assert "; expires " in checks["token"]["text"]
        assert checks["endpoints"]["status"] == "warn"
        code, checks = examine(capfd, "--url", broker.url, "--token", later)
        assert checks["token"]["status"] == "ok"


@pytest.mark.parametrize(("off_s", "says"), [(3600, "3600 s ahead of"), (-3600, "3600 s behind")])
def test_a_clock_that_is_off(
    off_s: float, says: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with broker_thread() as (broker, _):
        wall = time.time
        real = {name: getattr(time, name) for name in ("perf_counter", "strftime", "gmtime")}
        monkeypatch.setattr(module, "time", types.SimpleNamespace(time=lambda: wall() + off_s, **real))
        code, checks = examine(capfd, "--url", broker.url, "--token", SECRET)
    assert code == 0
    assert checks["clock"]["status"] == "warn"
    text = checks["clock"]["text"].replace("3599", "3600").replace("3601", "3600")
    assert says in text


def test_a_version_that_differs(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERSION", "99.0.0")
    with broker_thread() as (broker, _):
        code, checks = examine(capfd, "--url", broker.url, "--token", SECRET)
    assert code == 0
    assert checks["versions"]["status"] == "warn"
    assert "this command 99.0.0" in checks["versions"]["text"]


def test_a_broker_that_drains(capfd: pytest.CaptureFixture[str]) -> None:
    with broker_thread() as (broker, loop):
        from broker.core.events import Drain

        loop.call_soon_threadsafe(broker.engine.feed, Drain())
        code, checks = examine(capfd, "--url", broker.url, "--token", SECRET)
    assert checks["ready"]["status"] == "warn"
    assert code in (0, 7)


def test_a_proxy_that_does_not_pass_websockets(capfd: pytest.CaptureFixture[str]) -> None:
    with broker_thread() as (broker, _):

        class Proxy(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                import http.client

                if "Upgrade" in self.headers:
                    self.send_error(400)
                    return
                behind = http.client.HTTPConnection("127.0.0.1", broker.port, timeout=10)
                headers = {name: value for name, value in self.headers.items() if name == "Authorization"}
                behind.request("GET", self.path, headers=headers)
                reply = behind.getresponse()
                body = reply.read()
                behind.close()
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
            thread = threading.Thread(target=proxy.serve_forever)
            thread.start()
            code, checks = examine(capfd, "--url", f"http://127.0.0.1:{proxy.server_port}", "--token", SECRET)
            proxy.shutdown()
            thread.join()
    assert code in (2, 3, 7)
    assert checks["websocket"]["status"] == "fail"
    assert "pass the upgrade" in checks["websocket"]["advice"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=5))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    (folder / "key.pem").chmod(0o600)
    return folder / "cert.pem", folder / "key.pem"


def test_tls(
    certificate: tuple[Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate
    tls = {"host": "127.0.0.1", "tls_certificate": str(cert), "tls_key": str(key), "allowed_hosts": ["localhost"]}
    with broker_thread(server=tls) as (broker, _):
        url = f"https://localhost:{broker.port}"
        code, checks = examine(capfd, "--url", url, "--token", SECRET)
        assert code == 3
        assert "the certificate is not accepted: self-signed certificate" in checks["tls"]["text"]
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        code, checks = examine(capfd, "--url", url, "--token", SECRET)
        assert code == 0
        assert checks["tls"]["status"] == "warn"  # it is good for five days
        assert checks["tls"]["text"].startswith("TLSv1.3, the certificate is good until ")
        code, checks = examine(capfd, "--url", f"http://localhost:{broker.port}", "--token", SECRET)
        assert code == 3
        assert "try https://" in checks["reachable"]["advice"]
    assert ssl.HAS_TLSv1_3


def test_no_tls_there(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with something_else(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        code, checks = examine(capfd, "--url", f"https://127.0.0.1:{port}", "--token", SECRET)
    assert code == 3
    assert "no TLS there" in checks["tls"]["text"]
    assert "try http://" in checks["tls"]["advice"]
    monkeypatch.setattr(module, "TIMEOUT_S", 0.5)
    with broker_thread() as (broker, _):  # it waits for the rest of what it takes for a request
        code, checks = examine(capfd, "--url", f"https://127.0.0.1:{broker.port}", "--token", SECRET)
    assert code == 3
    assert "try http://" in checks["reachable"]["advice"]


def test_a_token_in_the_clear_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    with broker_thread() as (broker, _):
        _, checks = _examine_as("broker.evil.example", broker, capfd)
    assert "in the clear" in checks["tls"]["text"]
