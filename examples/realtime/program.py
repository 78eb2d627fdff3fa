"""The program: its own page and its own login, the broker under `/broker`, and a scanner that it starts itself."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler, StaticFileHandler, decode_signed_value

from broker import Broker, Config, Grant, Principal, Role, TokenStore, UserStore
from broker.auth.tokens import default_tokens_path
from broker.auth.users import default_users_path
from broker.config.model import Endpoint
from examples.realtime.runs import NAME, Asks, Laboratory, ask_scanner

log = logging.getLogger("realtime")

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
HOST = "127.0.0.1"
PREFIX = "/broker"
HISTORY = Endpoint(history=20_000, history_s=8 * 86_400)
"""what is kept for browsers that come late: at least one whole run, the longest of which takes 7 days"""
COMES_BACK_S = 2.0
"""until a scanner that has ended is started again"""
ENDS_S = 5.0
"""how long the scanner may take to end"""

OPERATOR = Principal("operator", (Grant(Role.CALLER, (NAME,)),))
SCANNER = Principal("scanner", (Grant(Role.WORKER, ("scanner",)),))

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; " \
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"  # fmt: skip


class Login:
    """Who knows the key of this start gets a signed cookie; the program's pages and the broker ask for the same one."""

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(24)
        self.secret = secrets.token_hex(32)
        self.cookie = ""
        """its name, known with the port"""

    def who(self, request: HTTPServerRequest) -> Principal | None:
        """Who sends a request: what `Broker(authenticate=…)` asks."""
        cookie = request.cookies.get(self.cookie)
        if cookie is None or decode_signed_value(self.secret, self.cookie, cookie.value) != b"operator":
            return None
        return OPERATOR


class Home(RequestHandler):
    """The page, for who has the cookie; `/?key=…` gives it."""

    def initialize(self, login: Login) -> None:
        """Called by tornado."""
        self._login = login

    def set_default_headers(self) -> None:
        """The page runs no scripts but its own."""
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")

    def get(self) -> None:
        """The page; for strangers, what to do. With 200: rt-cloud's daemons come here from their login, and insist."""
        key = self.get_query_argument("key", "")
        if key and hmac.compare_digest(key.encode(), self._login.key.encode()):
            self.set_signed_cookie(self._login.cookie, "operator", httponly=True, samesite="Strict")
            self.redirect("/", status=303)
        elif self._login.who(self.request) is None:
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish("Open the URL that the program has printed in its terminal.\n")
        else:
            self.finish((HERE / "page" / "index.html").read_bytes())


class Program:
    """All of it. `await start(port)` gives the URL; `await stop()` leaves nothing behind."""

    def __init__(self, asks: Asks = ask_scanner, config: Config | None = None) -> None:
        config = config or Config()
        kept = {NAME: HISTORY}
        self.login = Login()
        self._scanner_token = secrets.token_urlsafe(32)
        # Ways in: the program's cookie, secrets of this start, and those of `broker token` and `broker user`.
        self.broker = Broker(
            msgspec.structs.replace(config, endpoints=kept | config.endpoints),
            authenticate=self.login.who,
            fixed={self.login.key: OPERATOR, self._scanner_token: SCANNER},
            tokens=TokenStore(Path(config.auth.tokens_file or default_tokens_path())),
            users=UserStore(Path(config.auth.users_file or default_users_path())),
        )
        self.laboratory = Laboratory(self.broker, asks)
        self._server: HTTPServer | None = None
        self._scanner: asyncio.Task[None] | None = None

    async def start(self, port: int, *, with_scanner: bool = True) -> str:
        """Serve to this machine alone; the URL. Raises OSError if the port cannot be had."""
        sockets = bind_sockets(port, HOST)
        port = sockets[0].getsockname()[1]
        self.login.cookie = f"realtime-{port}"  # cookies of one host are sent to all of its ports
        await self.broker.start()
        self._served = self.broker.serve(NAME, self.laboratory)
        self.broker.endpoint(self.laboratory.source, None, self._tell_scanner, self._tell_scanner)
        application = Application(
            [
                ("/", Home, {"login": self.login}),
                ("/page/(.*)", StaticFileHandler, {"path": HERE / "page"}),
                *self.broker.routes(PREFIX),
                *(self.broker.routes() if self.broker.config.rtcloud.enabled else []),  # its daemons know no prefix
            ],
            cookie_secret=self.login.secret,
        )
        self._server = HTTPServer(application)
        self._server.add_sockets(sockets)
        url = f"http://{HOST}:{port}"
        if with_scanner:
            self._scanner = asyncio.create_task(self._keep_scanner(url))
        return url

    async def stop(self) -> None:
        """Nobody can start a run any more; then the run, the scanner, the sockets and the broker end."""
        await self._served.close()
        await asyncio.to_thread(self.laboratory.stop)
        if self._scanner is not None:
            self._scanner.cancel()
            with suppress(asyncio.CancelledError):
                await self._scanner
        if self._server is not None:
            self._server.stop()
            await self.broker.stop()
            await self._server.close_all_connections()

    def _tell_scanner(self, _: object) -> None:
        """A hook: a scanner has come or gone."""
        here = bool(self.broker.peers(self.laboratory.source))
        self.broker.broadcast(NAME, {"kind": "scanner", "here": here})

    async def _keep_scanner(self, url: str) -> None:
        """A scanner in a process of its own; when it ends, another one."""
        given = {"BROKER_URL": url + PREFIX, "BROKER_TOKEN": self._scanner_token}
        while True:
            # A session of its own: Ctrl-C is for the program, which ends the scanner in its turn.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "examples.realtime.scanner", "--end-with-input",
                stdin=asyncio.subprocess.PIPE, env=os.environ | given, cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip
            log.info("the scanner is process %d", process.pid)
            try:
                await process.wait()
            finally:
                await _end(process)
            log.warning("the scanner ended with %s; another is started in %g s", process.returncode, COMES_BACK_S)
            await asyncio.sleep(COMES_BACK_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its standard input ends, and so does it; or it is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), ENDS_S)
    except TimeoutError:
        process.kill()
        await process.wait()
