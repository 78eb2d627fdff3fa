"""`broker doctor`: looks at everything between a command and its broker, and says what is wrong and what to do."""

from __future__ import annotations

import asyncio
import email.utils
import http.client
import json
import ssl
import time
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import SplitResult

import click
import msgspec

from broker._version import VERSION
from broker.auth.targets import Target, locator, place_of
from broker.cli.connection import broker_options, clean_line, counted, exit_code
from broker.cli.exits import Exit, Failure
from broker.client.async_client import AsyncClient
from broker.links.compiled import core
from broker.peer.connection import split_url
from broker.peer.errors import BrokerError

TIMEOUT_S = 10.0
CLOCK_OFF_S = 5.0
EXPIRES_SOON_S = 86_400.0
CERTIFICATE_SOON_S = 14 * 86_400.0

Status = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True):
    """What one look found: `text` says what, `advice` what to do."""

    name: str
    status: Status
    text: str
    advice: str = ""


class _Ended(Exception):
    """Nothing more can be looked at; how the command ends."""

    def __init__(self, code: Exit) -> None:
        super().__init__()
        self.code = code


@click.command()
@broker_options
def doctor(url: str | None, token: str | None, as_json: bool) -> None:
    """Check URL, TLS, token, clock, versions and endpoints, and say what to do.

    The exit code is 0 if nothing failed (warnings count as nothing), 3 if the broker is not reached, 4 if it does not
    let us in.
    """
    checks: list[Check] = []
    code = Exit.OK
    examination = _Examination(url, token)
    try:
        for check in examination.run():
            checks.append(check)
            if not as_json:
                _print(check)
    except _Ended as ended:
        code = ended.code
    if as_json:
        click.echo(msgspec.json.encode({"ok": code == Exit.OK, "checks": checks}).decode())
    if code != Exit.OK:
        failed = [check.name for check in checks if check.status == "fail"]
        raise Failure(code, f"doctor: {', '.join(failed)} failed; the lines above say what to do")


def _print(check: Check) -> None:
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}[check.status]
    click.echo(f"{click.style(f'{check.status:4}', fg=colour)}  {check.name}: {clean_line(check.text)}")
    if check.advice:
        click.echo(f"      {clean_line(check.advice)}")


class _Examination:
    """One run: each step yields what it found, or ends everything."""

    def __init__(self, url: str | None, token: str | None) -> None:
        self._locate = locator(url, token)

    def run(self) -> Iterator[Check]:
        """All steps in order. Raises _Ended after the step that failed."""
        yield from self._find()
        yield from self._reach()
        yield from self._clock()
        yield from self._ready()
        yield from self._token()
        yield from self._talk()

    def _find(self) -> Iterator[Check]:
        try:
            self._target: Target = self._locate()
            is_zeromq = not isinstance(place_of(self._target.url), str)
        except OSError as error:
            text, _, advice = str(error).partition("; ")
            yield Check("broker", "fail", text, advice or "Mend that, or give --url and --token.")
            raise _Ended(Exit.CANNOT_CONNECT) from None
        if is_zeromq:
            advice = "`broker ping` asks there; give the broker's http:// URL here."
            yield Check("url", "fail", "this is a ZeroMQ door, and what is looked at here goes over HTTP", advice)
            raise _Ended(Exit.USAGE)
        try:
            self._parts: SplitResult = split_url(self._target.url)
        except ValueError as error:
            yield Check("url", "fail", str(error), "Write it like that.")
            raise _Ended(Exit.USAGE) from None
        url = self._parts.geturl()
        self._port = self._parts.port
        self._secure = self._parts.scheme in ("https", "wss")
        yield Check("url", "ok", f"{url} (from: {self._target.url_from})")
        if not self._secure and not _is_loopback(self._parts.hostname or ""):
            advice = "Use https, or a tunnel such as ssh -L; serve TLS with server.tls_certificate."
            yield Check("tls", "warn", "the token goes over the network in the clear", advice)

    def _reach(self) -> Iterator[Check]:
        began = time.perf_counter()
        try:
            status, headers, body = self._get("/livez")
        except ssl.SSLCertVerificationError as error:
            text = f"the certificate is not accepted: {error.verify_message}"
            yield Check("tls", "fail", text, "Give the broker a certificate for this name, or set SSL_CERT_FILE to the "
                        "certificate of whoever signed it.")  # fmt: skip
            raise _Ended(Exit.CANNOT_CONNECT) from None
        except ssl.SSLError as error:
            text = f"no TLS there: {error.reason or error}"
            yield Check("tls", "fail", text, "Something else listens there, or the broker speaks no TLS: try http://.")
            raise _Ended(Exit.CANNOT_CONNECT) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            advice = "Is the broker running, the port right, a firewall between? `broker serve` starts one."
            if not self._secure and isinstance(error, (http.client.HTTPException, ConnectionResetError)):
                advice = "Something else listens there, or the broker speaks TLS: try https://."
            elif self._secure and isinstance(error, (TimeoutError, ConnectionResetError)):
                advice = "Something else listens there, or the broker speaks no TLS: try http://."
            yield Check("reachable", "fail", f"no answer: {_why(error)}", advice)
            raise _Ended(Exit.CANNOT_CONNECT) from None
        self._took_s = time.perf_counter() - began
        self._date = headers.get("Date", "")
        if status == 421:
            host = self._parts.netloc
            advice = f"Add it to server.allowed_hosts of the broker, or use the name it knows: {_detail(body)}"
            yield Check("reachable", "fail", f"the broker does not answer to the name {host}", advice)
            raise _Ended(Exit.CANNOT_CONNECT)
        if status != 200 or b'"ok"' not in body:
            text = f"HTTP {status} from /livez: something else than a broker answers there"
            yield Check("reachable", "fail", text, "Check host, port and path of the URL, and what a proxy does.")
            raise _Ended(Exit.CANNOT_CONNECT)
        yield Check("reachable", "ok", f"answered in {self._took_s * 1e3:.1f} ms")
        if self._secure:
            yield self._certificate()

    def _certificate(self) -> Check:
        left_s = self._not_after - time.time()
        text = f"{self._tls_version}, the certificate is good until {_moment(self._not_after)}"
        if self._not_after and left_s < CERTIFICATE_SOON_S:
            return Check("tls", "warn", text, "Renew it soon; SIGHUP makes the broker read it.")
        return Check("tls", "ok", text)

    def _clock(self) -> Iterator[Check]:
        try:
            theirs = email.utils.parsedate_to_datetime(self._date).timestamp()
        except (TypeError, ValueError):
            yield Check("clock", "warn", "the broker did not say what time it has", "A proxy may have removed Date.")
            return
        # The header counts whole seconds, cut off: on average half a second is missing.
        off_s = time.time() - self._took_s / 2 - (theirs + 0.5)
        if abs(off_s) > CLOCK_OFF_S + self._took_s:
            text = f"this machine is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the broker"
            yield Check("clock", "warn", text, "Expiry of tokens will surprise you, deadlines will not; look at NTP.")
        else:
            yield Check("clock", "ok", "agrees with the broker's within the second or so that HTTP tells")

    def _ready(self) -> Iterator[Check]:
        status, _, body = self._again("/readyz")
        if status == 200:
            yield Check("ready", "ok", "the broker takes new work")
        else:
            yield Check("ready", "warn", f"the broker takes no new work: {_detail(body)}", "It is shutting down.")

    def _token(self) -> Iterator[Check]:
        if not self._target.token:
            advice = "Make one with `broker token create NAME` where the broker runs; give it by --token."
            yield Check("token", "fail", "there is none for this broker", advice)
            raise _Ended(Exit.DENIED)
        status, _, body = self._again("/whoami", self._target.token)
        if status != 200:
            advice = "It may have been revoked, have expired, or belong to another broker: `broker token list` there."
            if status == 429:
                advice = "Wait a minute: too many wrong tokens came from this address."
            yield Check("token", "fail", f"not accepted: {_detail(body)} (from: {self._target.token_from})", advice)
            raise _Ended(Exit.DENIED)
        who = json.loads(body)
        grants = "; ".join(f"{', '.join(grant['roles'])} at {', '.join(grant['endpoints'])}" for grant in who["grants"])
        text = f"{who['principal']} ({grants or 'no roles'}; from: {self._target.token_from})"
        expires_at = who["expires_at"]
        if expires_at is None:
            yield Check("token", "ok", text)
        elif expires_at - time.time() < EXPIRES_SOON_S:
            yield Check("token", "warn", f"{text}; expires {_moment(expires_at)}", "Get a new one soon.")
        else:
            yield Check("token", "ok", f"{text}; expires {_moment(expires_at)}")

    def _talk(self) -> Iterator[Check]:
        try:
            told, endpoints = asyncio.run(_ask(self._target))
        except BrokerError as error:
            yield Check("websocket", "fail", str(error), "A proxy between has to pass the upgrade to WebSocket.")
            raise _Ended(exit_code(error)) from None
        yield Check("websocket", "ok", f"ping answered in {told['took_ms']:.1f} ms as {told['peer']}")
        theirs = str(told.get("version", "?"))
        if theirs.split(".")[:2] == VERSION.split(".")[:2]:
            yield Check("versions", "ok", f"broker {theirs}, this command {VERSION} ({core()})")
        else:
            advice = "Install the same version here and there."
            yield Check("versions", "warn", f"broker {theirs}, this command {VERSION}", advice)
        yield _endpoints(endpoints)

    # ------------------------------------------------------------ HTTP

    def _again(self, path: str, token: str = "") -> tuple[int, Any, bytes]:
        try:
            return self._get(path, token)
        except (OSError, http.client.HTTPException):
            return 0, {}, b"the broker stopped answering"

    def _get(self, path: str, token: str = "") -> tuple[int, Any, bytes]:
        host = self._parts.hostname or ""
        connection: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, self._port or 443, timeout=TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, self._port or 80, timeout=TIMEOUT_S)
        try:
            connection.connect()
            if isinstance(connection.sock, ssl.SSLSocket):
                self._tls_version = connection.sock.version() or "TLS"
                not_after: Any = (connection.sock.getpeercert() or {}).get("notAfter", "")
                self._not_after = float(ssl.cert_time_to_seconds(not_after)) if not_after else 0.0
            prefix = self._parts.path.rstrip("/").removesuffix("/ws")
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            connection.request("GET", prefix + path, headers=headers)
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read(65_536)
        finally:
            connection.close()


async def _ask(target: Target) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    async with AsyncClient(target.url, target.token, timeout=TIMEOUT_S, reconnect=False) as client:
        began = time.perf_counter()
        told = await client.ping()
        told["took_ms"] = (time.perf_counter() - began) * 1e3
        return told, await client.endpoints()


def _endpoints(found: list[dict[str, Any]]) -> Check:
    if not found:
        advice = "Start a worker, such as `broker work files . --endpoint data`."
        return Check("endpoints", "warn", "none is known to this token", advice)
    text = ", ".join(f"{one['endpoint']} ({counted(one['workers'], 'worker')})" for one in found[:10])
    text += f" and {len(found) - 10} more" if len(found) > 10 else ""
    if not any(one["workers"] for one in found):
        return Check("endpoints", "warn", text, "Nobody serves any of them now; start a worker.")
    return Check("endpoints", "ok", text)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came within {TIMEOUT_S:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _detail(body: bytes) -> str:
    """What the broker's own refusals say, else the beginning of the body."""
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    if isinstance(told, dict):
        for name in ("detail", "error", "message", "status"):
            if isinstance(told.get(name), str):
                return str(told[name])
    return body[:200].decode("utf-8", "replace")


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
