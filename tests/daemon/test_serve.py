"""The daemon as a process: start, access, TLS, signals, faults, and what it never writes anywhere."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from broker.auth.users import UserStore
from tests.daemon.process import REPOSITORY, Daemon, ask, command, daemon, environment, self_signed, trusting

ADMIN = "canary-admin-token-0123456789abcdefghij"


def wait_until(condition: Any, what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.01)


def closed_with(peer: Any) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            peer.recv(timeout=20)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


# ---------------------------------------------------------------- starting


def test_it_starts_writes_its_access_file_and_is_used_with_it(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        (file,) = (tmp_path / "xdg_runtime_dir" / "broker").glob("*.json")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.name == f"{running.port}.json"
        assert running.access["pid"] == running.process.pid
        assert running.url.startswith("http://127.0.0.1:")
        assert running.http("/livez", "")[0] == 200
        assert running.http("/readyz", "")[0] == 200
        assert running.http("/metrics", "")[0] == 401
        with running.connect() as peer:
            assert "peer" in ask(peer, "broker.ping")["result"]
        running.signal(signal.SIGTERM)
        assert running.ended() == 0
        assert not file.exists(), "nothing stale stays"
        assert not [line for line in running.lines() if line["level"] == "error"], running.log


def test_the_connection_file_of_a_running_broker_stays_its_own(tmp_path: Path) -> None:
    file = tmp_path / "zeromq.json"
    names = {"BROKER_ZEROMQ__ENABLED": "true", "BROKER_ZEROMQ__CONNECTION_FILE": str(file)}
    folders = [tmp_path / "before", tmp_path / "after"]
    for folder in folders:
        folder.mkdir()
    with daemon(folders[0], env=names) as before:
        first = file.read_text()
        ended = command(folders[1], "serve", "--port", "0", env=names)
        assert ended.returncode == 2
        (line,) = ended.stderr.splitlines()
        for word in (str(file), "another running broker", "zeromq.connection_file"):
            assert word in line
        assert file.read_text() == first
        before.signal(signal.SIGKILL)
        assert before.ended() == -signal.SIGKILL
    with daemon(folders[1], env=names) as after:  # over what a killed one has left
        assert file.read_text() != first
        after.signal(signal.SIGTERM)
        assert after.ended() == 0
        assert not file.exists(), "nothing stale stays"


def test_each_start_has_a_token_of_its_own(tmp_path: Path) -> None:
    tokens = []
    for _ in range(2):
        with daemon(tmp_path) as running:
            tokens.append(running.token)
            running.signal(signal.SIGINT)
            assert running.ended() == 0
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    ("flags", "env", "file", "said"),
    [
        (["--host", "0.0.0.0"], {}, "", ["0.0.0.0", "TLS", "--insecure"]),
        (["--host", "192.0.2.1", "--insecure"], {}, "", ["192.0.2.1"]),
        ([], {"BROKER_SERVER__PROT": "1"}, "", ["BROKER_SERVER__PROT", "BROKER_SERVER__PORT"]),
        ([], {"BROKER_AUTH__ADMIN_TOKEN": "short"}, "", ["auth.admin_token", "32"]),
        ([], {}, "[server]\nprot = 1\n", ["broker.toml", "server.prot", "server.port"]),
        ([], {}, "[limts]\n", ["broker.toml", "limts", "limits"]),
        ([], {}, "[server\n", ["broker.toml"]),
        ([], {}, "[server]\nhost = 5\n", ["broker.toml", "server.host"]),
        ([], {}, '[server]\ntls_certificate = "none.pem"\ntls_key = "none.key"\n', ["tls_certificate", "none.pem"]),
        ([], {}, "[limits]\noutbox_soft_bytes = 9000000\n", ["outbox"]),
        ([], {}, "[limits]\nwrite_turn_bytes = 4096\n", ["write_turn_bytes"]),
        (["--config", "missing.toml"], {}, "", ["missing.toml"]),
    ],
)
def test_what_it_cannot_start_with_is_one_line_and_exit_code_2(
    tmp_path: Path, flags: list[str], env: dict[str, str], file: str, said: list[str]
) -> None:
    if file:
        (tmp_path / "broker.toml").write_text(file)
        flags = [*flags, "--config", str(tmp_path / "broker.toml")]
    ended = command(tmp_path, "serve", "--port", "0", *flags, env=env)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    for word in said:
        assert word in line
    assert "short" not in line or "BROKER_AUTH__ADMIN_TOKEN" not in env


def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = command(tmp_path, "serve", "--port", str(port))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line
    assert "--port" in line


def test_a_damaged_token_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text("{")
    ended = command(tmp_path, "serve", "--port", "0", env={"BROKER_AUTH__TOKENS_FILE": str(tokens)})
    assert ended.returncode == 2
    assert "tokens.json" in ended.stderr


def test_a_file_of_users_that_others_can_read_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    users = tmp_path / "users.json"
    users.write_text('{"version": 1, "users": []}')
    users.chmod(0o644)
    ended = command(tmp_path, "serve", "--port", "0", env={"BROKER_AUTH__USERS_FILE": str(users)})
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "users.json can be read by others" in ended.stderr


def test_it_serves_without_a_place_for_its_access_file(tmp_path: Path) -> None:
    env = environment(tmp_path)
    folder = Path(env["XDG_RUNTIME_DIR"], "broker")
    folder.write_text("in the way")
    with daemon(tmp_path, wait=False, env={"BROKER_AUTH__ADMIN_TOKEN": ADMIN}) as running:
        running.logged("serves on")
        running.logged("will need --url and --token")
        running.signal(signal.SIGTERM)
        assert running.ended() == 0


# ---------------------------------------------------------------- TLS


def test_tls_from_end_to_end(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    env = {"BROKER_SERVER__TLS_CERTIFICATE": str(certificate), "BROKER_SERVER__TLS_KEY": str(key)}
    with daemon(tmp_path, env=env) as running:
        assert running.url.startswith("https://127.0.0.1:")
        newest = ssl.create_default_context(cafile=str(certificate))
        assert running.http("/livez", "", context=newest)[0] == 200
        context = trusting(certificate)
        with (
            running.connect("/ws/lab?role=worker", ssl=context) as worker,
            running.connect("/ws/lab", ssl=context) as caller,
        ):
            data = "x" * 1_000_000
            caller.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "m", "params": data}))
            call = json.loads(worker.recv(timeout=20))
            assert call["params"] == data
            worker.send(json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": data}))
            assert json.loads(caller.recv(timeout=20))["result"] == data
        with socket.create_connection(("127.0.0.1", running.port), 5) as plain:
            plain.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                assert b"HTTP" not in plain.recv(100), "a TLS alert at most"
            except ConnectionResetError:
                pass
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", running.port), 5) as raw:
            old.wrap_socket(raw)


# ---------------------------------------------------------------- tokens and tickets


def test_tokens_are_made_used_and_revoked_while_it_runs(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        made = command(tmp_path, "token", "create", "carol", "--role", "caller", "--endpoint", "lab")
        assert made.returncode == 0, made.stderr
        token = made.stdout.strip()
        wait_until(lambda: running.http("/ticket", token, "POST")[0] == 200, "the new token is known")
        ticket = json.loads(running.http("/ticket", token, "POST")[1])["ticket"]
        with running.connect(f"/ws/lab?ticket={ticket}", "") as by_ticket, running.connect("/ws/lab", token) as peer:
            with pytest.raises(InvalidStatus):
                running.connect(f"/ws/lab?ticket={ticket}", "")
            assert "result" in ask(peer, "broker.ping")
            assert command(tmp_path, "token", "revoke", "carol").returncode == 0
            for session in (by_ticket, peer):
                assert closed_with(session) == (4401, "the token was revoked")
        with pytest.raises(InvalidStatus):
            running.connect("/ws/lab", token)


CANARIES = {
    "admin": ADMIN,
    "wrong": "canary-wrong-0123456789abcdefghijklmnop",
    "query": "canary-query-0123456789abcdefghijklmnop",
    "path": "canary-path-0123456789abcdefghijklmnopq",
    "body": "canary-body-0123456789abcdefghijklmnopq",
    "password": "canary-password-0123456789abcdefghijklm",
}

RAISING = """
import broker.admin.metrics as metrics, sys
def raising(self):
    self.authenticate()
    raise RuntimeError(f"failed for {self.request.headers['Authorization']} at {self.request.uri}")
metrics.MetricsHandler.get = raising
from broker.cli.main import main
main(["serve", *sys.argv[1:]])
"""


@pytest.mark.parametrize("style", ["human", "json"])
def test_row_06_no_credential_is_written_anywhere(tmp_path: Path, style: str) -> None:
    """Uses tokens in every way there is, wrong and right, with a 500 among them, then greps all it ever wrote."""
    flags = ["--log-level", "debug", "--log-format", style]
    env = {"BROKER_AUTH__ADMIN_TOKEN": ADMIN, "PYTHONASYNCIODEBUG": "1"}
    with daemon(tmp_path, *flags, env=env, command=[sys.executable, "-c", RAISING]) as running:
        assert running.http("/metrics", ADMIN)[0] == 500
        running.http(f"/metrics?token={CANARIES['query']}", ADMIN)
        assert running.http("/metrics", CANARIES["wrong"])[0] == 401
        UserStore(tmp_path / "xdg_state_home" / "broker" / "users.json").add("carol", CANARIES["password"])
        for name, password in (("carol", CANARIES["password"]), ("carol", CANARIES["password"] + "x"), ("", "x")):
            body = json.dumps({"name": name or CANARIES["password"], "password": password}).encode()
            assert running.http("/login", "", "POST", body=body)[0] == (401 if password[-1] == "x" else 200)
            assert running.http("/login", "", "POST", body=body + b",")[0] == 400
        ticket = json.loads(running.http("/ticket", ADMIN, "POST")[1])["ticket"]
        bearer = "bearer." + base64.urlsafe_b64encode(ADMIN.encode()).decode().rstrip("=")
        local = running.token
        with running.connect(f"/ws/lab?ticket={ticket}", "") as one, running.connect("/ws", ADMIN) as two:
            for peer in (one, two):
                peer.send('{"jsonrpc":"2.0","id":1,"method":"' + CANARIES["body"])
                peer.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "x", "params": {"token": CANARIES["body"]}}))
        with running.connect("/ws/lab", "", subprotocols=[bearer]) as three:
            three.send("x")
            three.send("x")
            three.send("x")
            closed_with(three)
        for path in (
            f"/ws/lab?ticket={ticket}", f"/ws/lab?ticket={CANARIES['query']}", f"/ws/lab?token={CANARIES['query']}",
            f"/ws/{CANARIES['path']}?access_token={CANARIES['query']}",
        ):  # fmt: skip
            with pytest.raises(InvalidStatus):
                running.connect(path, "")
        with pytest.raises(InvalidStatus):
            running.connect("/ws", CANARIES["wrong"])
        with socket.create_connection(("127.0.0.1", running.port), 5) as raw:
            raw.sendall(f"GET /ws?ticket={ticket} HTTP/9.9\r\nAuthorization: Bearer {ADMIN}\r\nx\r\n\r\n".encode())
            raw.recv(1000)
        (tmp_path / "broker.toml").write_text("[server\n")
        running.signal(signal.SIGHUP)
        running.logged("reload")
        running.signal(signal.SIGTERM)
        assert running.ended() == 0
        log = running.log
        assert "failed for" in log, "the 500 was logged"
        secrets = {**CANARIES, "ticket": ticket, "local": local, "bearer": bearer.removeprefix("bearer.")}
        del secrets["path"]  # no credential: a path is logged
        for name, secret in secrets.items():
            assert secret not in log, f"the {name} stands in the log: {log[max(0, log.index(secret) - 300) :][:600]}"
            assert secret[8:-4] not in log
        state = tmp_path / "xdg_state_home"
        for file in state.rglob("*"):
            if file.is_file():
                assert not [name for name, secret in secrets.items() if secret in file.read_text()]


# ---------------------------------------------------------------- faults


WORKER = """
import sys
from websockets.sync.client import connect
url, token = sys.argv[1:]
with connect(url, additional_headers={"Authorization": "Bearer " + token}, proxy=None, compression=None) as socket:
    for number in range(100):
        socket.recv()
    print("ready", flush=True)
    socket.recv()
"""


def test_fault_01_a_killed_worker_process_ends_its_hundred_requests(tmp_path: Path) -> None:
    with daemon(tmp_path) as running, running.connect("/ws/lab") as caller:
        url = running.url.replace("http", "ws", 1) + "/ws/lab?role=worker"
        worker = subprocess.Popen([sys.executable, "-c", WORKER, url, running.token], stdout=subprocess.PIPE)
        try:
            wait_until(lambda: running.metrics()['broker_endpoint_workers{endpoint="lab"}'] == 1, "the worker is there")
            for number in range(100):
                caller.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": "m"}))
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            worker.kill()
            worker.wait()
            killed = time.monotonic()
            replies = [json.loads(caller.recv(timeout=20)) for _ in range(100)]
            took = time.monotonic() - killed
        finally:
            worker.kill()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        assert {reply["error"]["data"]["outcome"] for reply in replies} == {"worker_lost"}
        assert sorted(reply["id"] for reply in replies) == list(range(100))
        assert took < 1.0, f"{took * 1e3:.0f} ms; 100 are promised, the rest is for a busy machine"
        metrics = running.metrics()
        ended = sum(value for name, value in metrics.items() if name.startswith("broker_requests_ended_total{"))
        assert metrics['broker_requests_ended_total{outcome="worker_lost"}'] == 100
        assert metrics["broker_requests_accepted_total"] == ended + metrics["broker_requests_pending"]


def test_fault_06_sigterm_drains_and_exits_0(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        with running.connect("/ws/lab?role=worker") as worker, running.connect("/ws/lab") as caller:
            caller.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "slow"}))
            call = json.loads(worker.recv(timeout=20))
            running.signal(signal.SIGTERM)
            wait_until(lambda: running.http("/readyz", "")[0] == 503, "it says that it is not ready")
            assert running.http("/livez", "")[0] == 200
            with pytest.raises(InvalidStatus) as refused:
                running.connect("/ws/lab")
            assert refused.value.response.status_code == 503
            assert ask(caller, "more", wire_id=2)["error"]["data"]["outcome"] == "shutting_down"
            worker.send(json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": "finished"}))
            assert json.loads(caller.recv(timeout=20))["result"] == "finished"
            for peer in (worker, caller):
                code, reason = closed_with(peer)
                assert code == 4412
                assert "come back" in reason
        assert running.ended() == 0
        assert not list((tmp_path / "xdg_runtime_dir" / "broker").glob("*.json"))


def test_fault_06_the_drain_is_bounded(tmp_path: Path) -> None:
    with daemon(tmp_path, env={"BROKER_SERVER__DRAIN_S": "0.3"}) as running:
        with running.connect("/ws/lab?role=worker") as worker, running.connect("/ws/lab") as caller:
            caller.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "slow"}))
            worker.recv(timeout=20)
            running.signal(signal.SIGTERM)
            assert json.loads(caller.recv(timeout=20))["error"]["data"]["outcome"] == "shutting_down"
            assert closed_with(caller)[0] == 4412
        assert running.ended() == 0


SILENT = """
import socket, sys, time
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as client:
    client.sendall(sys.stdin.buffer.read())
    print(client.recv(12), flush=True)
    time.sleep(60)
"""


def silent_client(running: Daemon) -> subprocess.Popen[bytes]:
    """A peer that is attached and neither reads nor answers a close frame."""
    head = (
        f"GET /ws/lab HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2tra2tra2tra2tra2traw==\r\n"
        f"Authorization: Bearer {running.token}\r\n\r\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SILENT, str(running.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(head.encode())
    process.stdin.close()
    assert b"101" in process.stdout.readline()
    process.stdout.close()
    return process


@pytest.mark.parametrize("answers", [True, False])
def test_fault_06_a_second_sigterm_ends_now(tmp_path: Path, answers: bool) -> None:
    with daemon(tmp_path, env={"BROKER_LIMITS__CLOSE_TIMEOUT_S": "30"}) as running:
        silent = None if answers else silent_client(running)
        try:
            with running.connect("/ws/lab?role=worker") as worker, running.connect("/ws/lab") as caller:
                caller.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "slow"}))
                worker.recv(timeout=20)
                running.signal(signal.SIGTERM)
                running.logged("draining")
                began = time.monotonic()
                running.signal(signal.SIGTERM)
                assert json.loads(caller.recv(timeout=20))["error"]["data"]["outcome"] == "shutting_down"
                for peer in (worker, caller):
                    closed_with(peer)
            assert running.ended(20) == 0
            assert time.monotonic() - began < 8, "neither the drain nor a peer that does not answer is waited for"
        finally:
            if silent is not None:
                silent.kill()
                silent.wait()


def test_fault_07_nothing_stale_blocks_a_start_after_sigkill(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        stale = running.access
        running.signal(signal.SIGKILL)
        assert running.ended() == -signal.SIGKILL
    (left,) = (tmp_path / "xdg_runtime_dir" / "broker").glob("*.json")
    began = time.monotonic()
    with daemon(tmp_path, "--port", str(json.loads(left.read_text())["url"].rpartition(":")[2]), wait=False) as again:
        again.wait_for(lambda: json.loads(left.read_text())["pid"] == again.process.pid, "its own access file is there")
        took = time.monotonic() - began
        again.access = json.loads(left.read_text())
        assert again.token != stale["token"]
        again.logged("serves on")
        with again.connect() as peer:
            assert "result" in ask(peer, "broker.ping")
        with pytest.raises(InvalidStatus):
            again.connect("/ws", stale["token"])
        assert took < 5, f"{took:.2f} s; under 1 s is promised on a free machine"


def test_fault_11_a_stopped_process_forgives_those_who_waited(tmp_path: Path) -> None:
    env = {"BROKER_LIMITS__PING_INTERVAL_S": "0.6", "BROKER_LIMITS__PING_TIMEOUT_S": "0.6"}
    with (
        daemon(tmp_path, env=env) as running,
        running.connect("/ws/lab?role=worker") as worker,
        running.connect("/ws/lab") as caller,
    ):
        caller.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "m"}))
        call = json.loads(worker.recv(timeout=20))
        running.signal(signal.SIGSTOP)
        time.sleep(2.5)  # longer than interval and patience together
        worker.send(json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": "still here"}))
        running.signal(signal.SIGCONT)
        assert json.loads(caller.recv(timeout=20))["result"] == "still here"
        assert "result" in ask(caller, "broker.ping", wire_id=2)
        assert running.metrics()["broker_link_ping_timeouts_total"] == 0


def test_fault_12_without_file_descriptors_it_pauses_and_resumes(tmp_path: Path) -> None:
    limit = "import resource,sys;resource.setrlimit(resource.RLIMIT_NOFILE,(40,40));" + (
        "from broker.cli.main import main;main(['serve',*sys.argv[1:]])"
    )
    with daemon(tmp_path, command=[sys.executable, "-c", limit]) as running:
        with running.connect("/ws/lab") as peer:
            sockets = []
            for _ in range(60):
                sockets.append(socket.create_connection(("127.0.0.1", running.port), 5))
            running.logged("accepting pauses")
            before = resources_of(running)
            time.sleep(1.5)
            assert resources_of(running) - before < 0.75, "it does not spin"
            assert "result" in ask(peer, "broker.ping"), "who is attached notices nothing"
            assert len(running.log) < 20_000
            # An opening that is admitted just as the last descriptor goes must not stay half open.
            for connection in sockets:
                connection.close()
            wait_until(lambda: running.http("/livez", "")[0] == 200, "it accepts again")
            with running.connect("/ws/lab") as another:
                assert "result" in ask(another, "broker.ping")
        assert "Traceback" not in running.log
        running.signal(signal.SIGTERM)
        assert running.ended() == 0


def resources_of(running: Daemon) -> float:
    """Seconds of processor time the daemon has used."""
    fields = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_fault_14_a_log_pipe_nobody_reads_blocks_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "broker", "serve", "--port", "0", "--log-level", "debug"],
        stdout=writing,
        stderr=writing,
        stdin=subprocess.DEVNULL,
        env=environment(tmp_path),
        cwd=REPOSITORY,
    )
    os.close(writing)
    log = tmp_path / "log"
    log.write_text("serves on (into a pipe)")
    running = Daemon(process, tmp_path, log)
    try:
        running.ready()
        for number in range(3000):  # each makes a line of its own; together they are more than the pipe holds
            if number % 10 == 0:
                assert running.http(f"/nothing{number}{'x' * 1000}", "")[0] == 404
            if number % 500 == 0:
                with running.connect("/ws") as peer:
                    assert "result" in ask(peer, "broker.ping")
        running.signal(signal.SIGTERM)
        assert running.ended() == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def test_fault_15_a_reload_with_an_error_is_refused_whole(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    _, other_key = self_signed(tmp_path, "other")
    file = tmp_path / "broker.toml"

    def settings(certificate_file: Path, key_file: Path, more: str = "") -> str:
        return f'[server]\ntls_certificate = "{certificate_file}"\ntls_key = "{key_file}"\n{more}'

    file.write_text(settings(certificate, key, "[limits]\nbatch_max = 2\n"))
    with daemon(tmp_path, "--config", str(file)) as running:
        context = trusting(certificate)
        for bad, said in (
            (settings(certificate, key, "[limits]\nbatch_max = 5\nbatch_maxx = 5\n"), "batch_maxx"),
            (settings(certificate, other_key, "[limits]\nbatch_max = 5\n"), "tls_key"),
            (settings(tmp_path / "none.pem", key, "[limits]\nbatch_max = 5\n"), "none.pem"),
            (settings(certificate, key, "[limits]\nbatch_max = 5\nstall_s = 5\n"), "limits.stall_s"),
            (settings(certificate, key, "[limits]\nbatch_max = 5\nwrite_turn_bytes = 5000\n"), "write_turn_bytes"),
            (settings(certificate, key, 'host = "127.0.0.2"\n[limits]\nbatch_max = 5\n'), "server.host"),
            ("[server\n", "broker.toml"),
        ):
            file.write_text(bad)
            before = running.log.count("refused")
            running.signal(signal.SIGHUP)
            running.wait_for(lambda count=before: running.log.count("refused") > count, "the reload is refused")
            assert said in running.lines()[-1]["message"]
            with running.connect("/ws", ssl=context) as peer:
                three = [{"jsonrpc": "2.0", "id": n, "method": "broker.ping"} for n in range(3)]
                peer.send(json.dumps(three))
                assert "at most 2" in peer.recv(timeout=20), "the old one stays"
        new, new_key = self_signed(tmp_path, "new")
        file.write_text(settings(new, new_key, "[limits]\nbatch_max = 5\n"))
        running.signal(signal.SIGHUP)
        running.logged("reloaded")
        with pytest.raises(ssl.SSLError):
            running.connect("/ws", ssl=context)
        fresh = trusting(new)
        with running.connect("/ws", ssl=fresh) as peer:
            peer.send(json.dumps(three))
            replies = json.loads(peer.recv(timeout=20))
            assert [reply["id"] for reply in replies] == [0, 1, 2], "all of the new one holds"


def test_a_reload_leaves_those_who_are_attached_alone(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("[limits]\nqueue_max = 1\n")
    with daemon(tmp_path, "--config", str(file)) as running, running.connect("/ws/lab") as caller:
        caller.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "m", "meta": {"wait": True}}))
        file.write_text('[limits]\nqueue_max = 2\n[endpoints.shut]\nclosed = "for good"\n')
        running.signal(signal.SIGHUP)
        running.logged("reloaded")
        with running.connect("/ws/shut") as turned_away:
            assert closed_with(turned_away) == (4404, "for good")
        with running.connect("/ws/lab?role=worker") as worker:
            call = json.loads(worker.recv(timeout=20))
            worker.send(json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": 1}))
            assert json.loads(caller.recv(timeout=20))["result"] == 1
