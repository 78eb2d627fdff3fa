"""The daemon as a process of its own, with its own folders, for tests of what only a process can show."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 20.0


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Such that nothing of this machine's own brokers is seen or touched."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        made = folder / name.lower()
        made.mkdir(mode=0o700, exist_ok=True)
        kept[name] = str(made)
    kept["PYTHONPATH"] = str(REPOSITORY)
    return {**kept, **(more or {})}


class Daemon:
    """A running `broker serve`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
        self.process = process
        self.folder = folder
        self.log_file = log
        self.access: dict[str, Any] = {}

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """The log's lines, which must all be JSON."""
        return [json.loads(line) for line in self.log.splitlines()]

    def wait_for(self, condition: Any, what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"never came true: {what}\n{self.log[-3000:]}"
            assert self.process.poll() is None or what.startswith("it ends"), self.log[-3000:]
            time.sleep(0.01)
        return value

    def logged(self, text: str) -> None:
        self.wait_for(lambda: text in self.log, f"the log says {text!r}")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def ended(self, timeout_s: float = PATIENCE_S) -> int:
        return self.process.wait(timeout_s)

    def ready(self) -> None:
        folder = self.folder / "xdg_runtime_dir" / "broker"
        path = self.wait_for(lambda: next(iter(folder.glob("*.json")), None), "the access file is there")
        self.access = json.loads(path.read_text())
        self.logged("serves on")

    @property
    def url(self) -> str:
        return str(self.access["url"])

    @property
    def token(self) -> str:
        return str(self.access["token"])

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def connect(self, path: str = "/ws", token: str | None = None, **options: Any) -> ClientConnection:
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"} if token != "" else {}
        headers |= options.pop("headers", {})
        options = {"compression": None, "max_size": None, "close_timeout": 1, "ping_interval": None} | options
        return connect(self.url.replace("http", "ws", 1) + path, additional_headers=headers, proxy=None, **options)

    def http(
        self,
        path: str,
        token: str | None = None,
        method: str = "GET",
        context: ssl.SSLContext | None = None,
        body: bytes = b"",
    ) -> tuple[int, str]:
        import urllib.error
        import urllib.request

        headers = {"Authorization": f"Bearer {self.token if token is None else token}"} if token != "" else {}
        request = urllib.request.Request(
            self.url + path, method=method, headers=headers, data=body if method == "POST" else None
        )
        handlers: list[Any] = [urllib.request.ProxyHandler({})]
        if context:
            handlers.append(urllib.request.HTTPSHandler(context=context))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        status, text = self.http("/metrics")
        assert status == 200, text
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in rows}


@contextmanager
def daemon(
    folder: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
    wait: bool = True,
) -> Iterator[Daemon]:
    """Run `broker serve --port 0` with these flags; it has ended when the block has."""
    log = folder / "log"
    command = command or [sys.executable, "-m", "broker", "serve"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--port", "0", *flags],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment(folder, env),
            cwd=folder,
        )
    running = Daemon(process, folder, log)
    try:
        if wait:
            running.ready()
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def command(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command of `broker` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        capture_output=True,
        text=True,
        env=environment(folder, env),
        cwd=folder,
        timeout=PATIENCE_S,
        check=False,
    )


def ask(socket: ClientConnection, method: str, params: object = None, wire_id: object = 1) -> Any:
    """One call and its answer; nothing else may come in between."""
    message = {"jsonrpc": "2.0", "id": wire_id, "method": method}
    if params is not None:
        message["params"] = params
    socket.send(json.dumps(message))
    return json.loads(socket.recv(timeout=PATIENCE_S))


def self_signed(folder: Path, name: str = "tls") -> tuple[Path, Path]:
    """A certificate for localhost and 127.0.0.1, and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


def trusting(certificate: Path) -> ssl.SSLContext:
    """A client's context, for the threaded client of `websockets`.

    TLS 1.2, because with 1.3 one of a hundred openings hangs in that client: one of its threads reads the server's
    session tickets while another writes. Its asyncio client and raw sockets show none of that.
    """
    context = ssl.create_default_context(cafile=str(certificate))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


__all__ = ["Daemon", "ask", "command", "daemon", "environment", "self_signed", "trusting"]
