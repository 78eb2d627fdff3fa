"""The broker as an object: joins router, engine, links, doors and routes, in any process and any event loop."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from tornado.httpserver import HTTPServer
from tornado.log import access_log
from tornado.netutil import bind_sockets
from tornado.routing import Rule, URLSpec
from tornado.web import Application, RequestHandler

from broker.admin.health import LiveHandler, ReadyHandler
from broker.admin.metrics import Lag, MetricsHandler, Sources
from broker.admin.web.files import FileHandler, PageHandler
from broker.auth.authenticate import Authenticator, check_fixed
from broker.auth.daemon_sign_in import DaemonSignIn
from broker.auth.door import Authenticate, Door, Gate
from broker.auth.facts import Refused
from broker.auth.guesses import Guesses
from broker.auth.logins import Logins, cookie_name
from broker.auth.origins import HostRules
from broker.auth.proxies import TrustedProxies
from broker.auth.sign_in import SignIn
from broker.auth.tickets import Tickets
from broker.auth.tokens import TokenStore, admin_principal
from broker.auth.users import UserStore
from broker.config.certificates import server_context
from broker.config.load import check
from broker.config.model import Config
from broker.core.access import Principal
from broker.core.classes import ClassesOf
from broker.core.errors import DRAINED, UNAUTHORISED
from broker.core.events import Drain
from broker.core.router import Router
from broker.core.sessions import Session
from broker.engine.engine import Engine
from broker.links import compiled
from broker.links.acceptor import Acceptor
from broker.links.loop import LoopLinks
from broker.node.embedding import Embedding
from broker.node.settings import accept_limits, core_limits, link_limits
from broker.peer import errors
from broker.transports.http.calls import BroadcastHandler, CallHandler
from broker.transports.http.events import EventsHandler
from broker.transports.http.logins import LoginHandler, LogoutHandler, WhoAmIHandler
from broker.transports.http.rpc import RpcHandler
from broker.transports.http.tickets import TicketHandler
from broker.transports.kernels.channels import ChannelsHandler
from broker.transports.kernels.front_ends import FrontEnds
from broker.transports.kernels.rest import (
    InterruptHandler,
    KernelHandler,
    KernelsHandler,
    RestartHandler,
    SpecsHandler,
    VersionHandler,
)
from broker.transports.rtcloud.handler import RtCloudHandler
from broker.transports.websocket.handler import WebSocketHandler
from broker.transports.websocket.plain import PlainDoor
from broker.wire.connection_file import ConnectionInfo
from broker.wire.pieces import join_reply
from broker.wire.rtcloud import CALL_ID_BITS, CallIds

if TYPE_CHECKING:
    from broker.transports.zeromq.door import ZmqDoor

log = logging.getLogger("broker")

LAG_SAMPLE_S = 0.5
TOKENS_LOOK_S = 1.0
FIXED_LIMITS = (
    "slot_ms", "prune_slice", "fanout_slice", "ping_interval_s", "ping_timeout_s", "stall_s", "close_timeout_s",
    "header_timeout_s", "body_timeout_s", "unauthenticated_max_bytes",
)  # fmt: skip
"""limits that parts are made with once, so that a reload cannot change them"""
STREAM_BUFFER_MIN_BYTES = 1 << 20
CLOSING_BATCH = 200
"""links closed at once at the end of a drain; the next batch follows after a random moment"""


class ReloadError(ValueError):
    """A new configuration that cannot be taken over while the broker runs; the text names the key."""


class NotFoundHandler(Door):
    """Whatever has no route: 404, in the form of all other errors."""

    def prepare(self) -> None:
        """Refuse."""
        super().prepare()
        self.check_door()
        raise Refused(404, "no such path")


class ToPageHandler(Door):
    """The prefix without its last slash: the page is behind it, and what it loads is relative to that."""

    def get(self) -> None:
        """Send browsers there. Relative, so that it holds behind a proxy that takes a part of the path away."""
        self.check_door()
        self.set_header("Location", f"{self.request.path.rpartition('/')[2]}/")
        self.set_status(308)
        self.finish()


class Broker(Embedding):
    """One broker. `await start()`, then `await listen()` for sockets of its own; `await stop()` leaves nothing behind.

    Or without `listen`: `routes` go into an application of somebody else's, and `Embedding` has what a program does
    with a broker in its own process. `tokens` and `users` are those stored in files (None: there are none), `fixed`
    maps secrets known to this process alone to who they stand for. `authenticate(request)` is the program's own
    authentication: given tornado's request it returns a `Principal`, or None to leave it to the broker's credentials.
    It is asked once for every request that has to say who sends it, after Host and Origin were judged and before an
    upgrade, on the event loop; if it raises, the answer is 500 and nobody is let in.

    Making it raises ConfigError for a wrong value in the configuration, ValueError for a secret shorter than 32
    characters, TypeError for arguments of other types.

    Not thread-safe but for what `Embedding` says: everything is called on the event loop that `start` ran in.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        tokens: TokenStore | None = None,
        users: UserStore | None = None,
        fixed: Mapping[str, Principal] | None = None,
        authenticate: Authenticate | None = None,
    ) -> None:
        super().__init__()
        if authenticate is not None and not callable(authenticate):
            raise TypeError(f"authenticate is a {type(authenticate).__name__}; give a function of the request, or None")
        call = getattr(type(authenticate), "__call__", None)  # noqa: B004 - an object whose call is a coroutine function
        if inspect.iscoroutinefunction(authenticate) or inspect.iscoroutinefunction(call):
            raise TypeError("authenticate is a coroutine function; it must be a plain one, which answers at once")
        self.config = Config() if config is None else config
        check(self.config)
        self._authenticate = authenticate
        self._gates: list[Gate] = []
        self.node = secrets.token_hex(4)
        self.port = 0
        self._tokens = tokens
        self._users = users
        self._fixed = dict(fixed or {})
        check_fixed(self._fixed)
        if self.config.auth.admin_token:
            self._fixed[self.config.auth.admin_token] = admin_principal()
        self._lag = Lag()
        self._server: HTTPServer | None = None
        self.zeromq: ZmqDoor | None = None
        """the ZeroMQ door, once it is open"""
        self._acceptor: Acceptor | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._stopping: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Make the parts on the running event loop. Nothing listens yet. Raises RuntimeError if it runs already.

        After `stop` it may be started again, on another loop too: with new routes, serving what it has served.
        """
        if self._loop is not None or self._stopping is not None:
            raise RuntimeError("the broker runs already; a second one is another object")
        loop = asyncio.get_running_loop()
        limits = self.config.limits
        self.router = Router(
            core_limits(self.config),
            self._endpoint_limits(self.config),
            join=join_reply,
            node=self.node,
            now=time.monotonic(),
        )
        self.engine = Engine(
            self.router,
            loop,
            prune_slice=limits.prune_slice,
            fanout_slice=limits.fanout_slice,
            compiled=compiled.wanted(),
        )
        self.links = LoopLinks(link_limits(self.config), budget=self.router.state.budget)
        auth = self.config.auth
        self.tickets = Tickets(time.monotonic, live_s=auth.ticket_s)
        self.logins = Logins(time.time, live_s=auth.session_s)
        guesses = Guesses(time.monotonic, per_minute=auth.guesses_per_minute)
        self.sign_in: SignIn | None = None
        if self._users is not None:
            self.sign_in = SignIn(self._users, time.monotonic, guesses, per_minute=auth.passwords_per_minute)
        self.authenticator = Authenticator(
            self._host_rules(self.config),
            tokens=self._tokens,
            tickets=self.tickets,
            guesses=guesses,
            fixed=self._fixed,
            logins=self.logins,
            sign_in=self.sign_in,
        )
        self.authenticator.cookie = cookie_name(self.config.server.port)
        self._gates.clear()
        self.gate = self._new_gate()
        rtcloud = self.config.rtcloud
        self.daemons: DaemonSignIn | None = None
        if rtcloud.enabled:
            self.daemons = DaemonSignIn(rtcloud.endpoints.values(), test_user=rtcloud.test_user)
        self.call_ids = CallIds(lambda: secrets.randbits(CALL_ID_BITS) or 1)
        self.front_ends = FrontEnds(self.engine, self.links, self.config.kernels)
        self._repeat("lag", LAG_SAMPLE_S, self._sample_lag)
        if self._tokens is not None:
            self._repeat("tokens", TOKENS_LOOK_S, self._look_at_tokens)
        if self._users is not None:
            self._repeat("users", TOKENS_LOOK_S, self._look_at_users)
        self._begin()

    def _new_gate(self, mounted: str | None = None) -> Gate:
        proxies = TrustedProxies(self.config.server.trusted_proxies)
        gate = Gate(self.authenticator, proxies, authenticate=self._authenticate, mounted=mounted)
        self._gates.append(gate)
        return gate

    async def listen(self) -> str:
        """Bind the configured address and serve on it; returns the URL.

        Raises OSError if the address cannot be had, ConfigError for a certificate that cannot be used.
        """
        self._check_here()
        server, limits = self.config.server, self.config.limits
        context = server_context(server)
        sockets = bind_sockets(server.port, server.host, reuse_port=False)
        self.port = sockets[0].getsockname()[1]
        self.authenticator.rules = self._host_rules(self.config)
        self.authenticator.cookie = cookie_name(self.port)
        self._server = HTTPServer(
            Application(
                self._routes("", self.gate),
                default_handler_class=NotFoundHandler,
                default_handler_args={"gate": self.gate},
                log_function=self._log_request,
            ),
            idle_connection_timeout=limits.header_timeout_s,
            body_timeout=limits.body_timeout_s,
            max_header_size=limits.unauthenticated_max_bytes,
            max_body_size=limits.unauthenticated_max_bytes,  # no route takes more; one that does raises it itself
        )
        self._acceptor = Acceptor(
            self._server,
            limits=accept_limits(self.config),
            ssl_context=context,
            # A body that is too large must fit as far as it takes to refuse it in words.
            max_buffer_size=max(STREAM_BUFFER_MIN_BYTES, limits.message_max_bytes + limits.unauthenticated_max_bytes),
            opens=PlainDoor(self.engine, self.links, self.gate, lambda: self.config.limits).opens,
        )
        self.gate.acceptor = self._acceptor
        self._acceptor.add_sockets(sockets)
        if self.config.zeromq.enabled:
            await self.open_zeromq()
        return self.url

    async def open_zeromq(self) -> ConnectionInfo:
        """Open the ZeroMQ door alone, as configured; what its connection file says.

        Raises ConfigError, also if an address cannot be had.
        """
        from broker.node.zeromq import open_door  # not everybody wants pyzmq's 30 ms

        self._check_running()
        self.zeromq = open_door(self.config, self.engine, self.links, self.authenticator)
        return self.zeromq.info

    def _log_request(self, handler: RequestHandler) -> None:
        """As tornado does it, but turning peers away is no error while the broker drains."""
        status, request = handler.get_status(), handler.request
        if status < 400 or (status == 503 and self.router.draining):
            level = logging.INFO
        else:
            level = logging.WARNING if status < 500 else logging.ERROR
        spent_ms = 1000 * request.request_time()
        access_log.log(level, "%d %s %s (%s) %.2fms", status, request.method, request.uri, request.remote_ip, spent_ms)

    @property
    def url(self) -> str:
        """Where the broker listens, as a client writes it."""
        server = self.config.server
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(server.host, server.host)  # noqa: S104
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        return f"{'https' if server.tls_certificate else 'http'}://{host}:{self.port}"

    def routes(self, prefix: str = "") -> list[Rule | URLSpec]:
        """All routes, for a tornado application that somebody else serves, without tornado's `xheaders`.

        `prefix` is empty, or a path that begins with a slash and ends with none (else ValueError). The broker answers
        to the addresses the application's sockets are bound to, and to `server.allowed_hosts`. Raises RuntimeError
        before `start`.
        """
        if prefix and not re.fullmatch(r"(/[A-Za-z0-9_.~-]+)+", prefix):
            raise ValueError(f"{prefix!r} is no prefix: nothing, or a path such as /broker without a slash at its end")
        self._check_running()
        return self._routes(re.escape(prefix), self._new_gate(mounted=prefix))

    def ticket(self, principal: Principal) -> str:
        """A ticket for somebody whom the program has let in: `?ticket=` of one WebSocket within `auth.ticket_s`.

        For programs whose own authentication has to wait for something, which `authenticate` cannot. Raises
        `errors.Refused`: 401 for a principal that has expired, 429 with too many unused ones; RuntimeError before
        `start`.
        """
        self._check_running()
        try:
            return self.tickets.issue(self.authenticator.admit(principal))
        except Refused as refused:
            error = errors.Refused(refused.reason)
            error.status, error.come_back = refused.status, refused.status == 429
            raise error from None

    def _routes(self, prefix: str, of: Gate) -> list[Rule | URLSpec]:
        gate = {"gate": of}
        asking = gate | {"engine": self.engine, "limits": lambda: self.config.limits}
        listening = asking | {"links": self.links}
        login = gate | {"engine": self.engine, "logins": self.logins, "daemons": self.daemons}
        sources = Sources(
            self.router, self.links, self.authenticator.counters, self._lag, lambda: self._acceptor, self.front_ends,
            lambda: self.zeromq,
        )  # fmt: skip
        return [
            *([URLSpec(prefix, ToPageHandler, gate)] if prefix else []),
            URLSpec(rf"{prefix}/", PageHandler, gate),
            URLSpec(rf"{prefix}/static/([^/]+)", FileHandler, gate),
            URLSpec(rf"{prefix}/ws", WebSocketHandler, listening),
            URLSpec(rf"{prefix}/ws/([^/]+)", WebSocketHandler, listening),
            URLSpec(rf"{prefix}/ticket", TicketHandler, gate | {"tickets": self.tickets}),
            URLSpec(rf"{prefix}/rpc", RpcHandler, asking),
            URLSpec(rf"{prefix}/call/([^/]+)/([^/]+)", CallHandler, asking),
            URLSpec(rf"{prefix}/broadcast", BroadcastHandler, asking),
            URLSpec(rf"{prefix}/broadcast/([^/]+)", BroadcastHandler, asking),
            URLSpec(rf"{prefix}/events/([^/]+)", EventsHandler, listening),
            URLSpec(rf"{prefix}/login", LoginHandler, login),
            URLSpec(rf"{prefix}/logout", LogoutHandler, login),
            URLSpec(rf"{prefix}/whoami", WhoAmIHandler, gate),
            URLSpec(rf"{prefix}/livez", LiveHandler, gate),
            URLSpec(rf"{prefix}/readyz", ReadyHandler, gate | {"router": self.router}),
            URLSpec(rf"{prefix}/metrics", MetricsHandler, gate | {"sources": sources}),
            *self._rtcloud_routes(prefix, listening),
            *self._kernel_routes(prefix, listening),
        ]

    def _kernel_routes(self, prefix: str, listening: dict[str, Any]) -> list[Rule | URLSpec]:
        """The paths of Jupyter's front ends."""
        if not self.config.kernels.enabled:
            return []
        front = {name: value for name, value in listening.items() if name != "links"} | {"front_ends": self.front_ends}
        kernel = rf"{prefix}/api/kernels/([^/]+)"
        return [
            URLSpec(rf"{prefix}/api", VersionHandler, front),
            URLSpec(rf"{prefix}/api/kernelspecs", SpecsHandler, front),
            URLSpec(rf"{prefix}/api/kernelspecs/([^/]+)", SpecsHandler, front),
            URLSpec(rf"{prefix}/api/kernels", KernelsHandler, front),
            URLSpec(kernel, KernelHandler, front),
            URLSpec(rf"{kernel}/interrupt", InterruptHandler, front),
            URLSpec(rf"{kernel}/restart", RestartHandler, front),
            URLSpec(rf"{kernel}/channels", ChannelsHandler, front | {"links": self.links}),
        ]

    def _rtcloud_routes(self, prefix: str, listening: dict[str, Any]) -> list[Rule | URLSpec]:
        """The paths of rt-cloud's daemons."""
        if self.daemons is None:
            return []
        endpoints = self.config.rtcloud.endpoints
        classes = {
            path: ClassesOf(f"{name}.*" for name in names) for path, names in self.config.rtcloud.classes.items()
        }
        arguments = listening | {
            "daemons": self.daemons, "ids": self.call_ids, "endpoints": endpoints, "classes": classes,
        }  # fmt: skip
        return [URLSpec(rf"{prefix}/({'|'.join(map(re.escape, endpoints))})", RtCloudHandler, arguments)]

    async def drain(self, timeout_s: float) -> bool:
        """Take no new work and wait for what is in flight; whether all of it ended in time."""
        self._check_here()
        self.engine.feed(Drain())
        ends_at = self.engine.now() + timeout_s
        while self.router.pending.count and self.engine.now() < ends_at:  # noqa: ASYNC110 - the router has no events
            await asyncio.sleep(0.02)
        return self.router.pending.count == 0

    async def stop(self) -> None:
        """End what is left as `shutting_down`, close every link, and let go of sockets and timers.

        Called again it waits for the same end; where nothing runs it does nothing. It ends all the same if who waits is
        cancelled: a function that answers requests is, by this very end. Raises RuntimeError on another loop.
        """
        if self._stopping is None:
            if self._loop is None:
                return
            self._check_here()
            self._stopping = self._loop.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        try:
            await self._let_go()
        finally:
            self._stopping = None

    async def _let_go(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._acceptor is not None:
            self._acceptor.close()
        self.engine.feed(Drain(now=True))
        self._leave()
        await self._close_links()
        if self.zeromq is not None:
            self.zeromq.close()
            self.zeromq = None
        await self._end()
        if self.sign_in is not None:
            await self.sign_in.close()
        self.engine.stop()
        if self._server is not None:
            await self._server.close_all_connections()
            self._server = None

    def abort(self) -> None:
        """Drop every connection at once, so that a `stop` under way waits for nobody."""
        for link in self.links.links:
            link.abort()

    async def _close_links(self) -> None:
        """In batches with a random pause between, so that not all come back in the same instant."""
        sessions = self.router.sessions.by_id.values()
        closes: list[Callable[[int, str], None]] = [link.close for link in self.links.links]
        closes += [session.link.close for session in sessions if session.dialect == "sse" and session.link is not None]
        for at in range(0, len(closes), CLOSING_BATCH):
            for close in closes[at : at + CLOSING_BATCH]:
                close(DRAINED.code, "the broker is shutting down; come back in a moment")
            if at + CLOSING_BATCH < len(closes):
                await asyncio.sleep(secrets.randbelow(50) / 1000)
        await self.links.close(DRAINED.code, "the broker is shutting down; come back in a moment")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ------------------------------------------------------------ reload

    def reload(self, config: Config) -> None:
        """Take over a new configuration while running: all of it, or nothing.

        Raises ReloadError for a key that needs a restart, ConfigError or ValueError for one that is wrong, TypeError
        for what is no Config.
        """
        check(config)
        for key in ("host", "port", "insecure", "uvloop"):
            if getattr(config.server, key) != getattr(self.config.server, key):
                raise ReloadError(f"server.{key} cannot change while the broker runs; restart it")
        if bool(config.server.tls_certificate) != bool(self.config.server.tls_certificate):
            raise ReloadError("server.tls_certificate: TLS cannot be switched while the broker runs; restart it")
        for section in ("auth", "rtcloud", "zeromq", "kernels"):
            if getattr(config, section) != getattr(self.config, section):
                raise ReloadError(f"the section {section} cannot change while the broker runs; restart it")
        for key in FIXED_LIMITS:
            if getattr(config.limits, key) != getattr(self.config.limits, key):
                raise ReloadError(f"limits.{key} cannot change while the broker runs; restart it")
        if config.log.format != self.config.log.format:
            raise ReloadError("log.format cannot change while the broker runs; restart it")
        context: ssl.SSLContext | None = server_context(config.server)
        rules, proxies = self._host_rules(config), TrustedProxies(config.server.trusted_proxies)
        limits, endpoints, links = core_limits(config), self._endpoint_limits(config), link_limits(config)
        # Nothing below can fail.
        self.config = config
        self.authenticator.rules = rules
        for gate in self._gates:
            gate.proxies = proxies
        self.router.reconfigure(limits, endpoints, self.engine.now())
        self.engine.perform()
        self.links.limits = links
        if self._acceptor is not None:
            self._acceptor.ssl_context = context
            self._acceptor.limits = accept_limits(config)

    # ------------------------------------------------------------ housekeeping

    def _host_rules(self, config: Config) -> HostRules:
        server = config.server
        binds = [(server.host, self.port)] if self.port else []  # without sockets of its own it has no such name
        return HostRules(binds, server.allowed_hosts, server.allowed_origins)

    def _repeat(self, name: str, interval_s: float, action: Any) -> None:
        """Call `action(late_s)` every so often until the broker stops; what it raises is logged."""
        loop = asyncio.get_running_loop()
        due = loop.time() + interval_s

        def run() -> None:
            late_s = loop.time() - due
            self._repeat(name, interval_s, action)
            try:
                action(late_s)
            except Exception:
                log.exception("%s failed", name)

        self._timers[name] = loop.call_at(due, run)

    def _sample_lag(self, late_s: float) -> None:
        self._lag.add(max(0.0, late_s))

    def _look_at_tokens(self, _: float) -> None:
        """End the sessions of tokens that were revoked."""
        assert self._tokens is not None
        gone = self._tokens.refresh()
        if gone:
            self.logins.close_all_of(gone)
            self._send_away(lambda session: session.token_id in gone, "the token was revoked")

    def _look_at_users(self, _: float) -> None:
        """End the sign-ins of users who were removed or changed, and what was opened with them."""
        assert self._users is not None
        gone = self._users.refresh()
        if not gone:
            return
        self.logins.close_all_of(gone)
        names = {user_id.rpartition(":")[0] for user_id in gone}

        def is_meant(session: Session) -> bool:
            # By the name: a sign-in that gave way to newer ones is no longer among the logins, its links live on.
            return bool(session.login_id) and session.principal in names and not self.logins.is_open(session.login_id)

        self._send_away(is_meant, "the user was removed or changed")

    def _send_away(self, is_meant: Callable[[Session], bool], reason: str) -> None:
        """Close the links of sessions whose credential has ended.

        They may come back within their grace if their principal has another valid one, as after a change of password;
        else they end now, those without a link too, with all that is kept for them.
        """
        meant = [session for session in self.router.sessions.by_id.values() if is_meant(session)]
        known = {name: self.authenticator.knows(name) for name in {session.principal for session in meant}}
        for session in meant:
            if not known[session.principal]:
                self.router.attaching.expel(session, reason, self.engine.now())
            elif session.link is not None:
                session.link.close(UNAUTHORISED.code, reason)
        self.engine.perform()
