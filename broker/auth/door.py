"""The base of every HTTP handler: facts, authentication and refusals, the same for all routes."""

from __future__ import annotations

from collections.abc import Callable
from http.client import responses
from typing import Any, TypeAlias, cast

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream
from tornado.web import HTTPError, RequestHandler

from broker.auth.authenticate import READERS, Authenticator, Readers
from broker.auth.facts import Refused, RequestFacts, facts_of
from broker.auth.logins import cookie_name
from broker.auth.proxies import TrustedProxies
from broker.core.access import Principal
from broker.links.acceptor import Acceptor

_PAGES_MAY_SEND = "Accept, Authorization, Broker-Timeout, Content-Type, Idempotency-Key, Last-Event-ID, Traceparent"
_PAGES_MAY_READ = "Broker-Attempts, Broker-Elapsed-Ms, Broker-Outcome, Broker-Repeated, Broker-Retryable, Retry-After"
_PREFLIGHT_GOOD_S = 600


Authenticate: TypeAlias = Callable[[HTTPServerRequest], Principal | None]
"""The authentication of the program around the broker: who sends a request; None leaves it to the broker's own."""


class Gate:
    """What every handler asks: who may come in. `acceptor` is told who did, so that they count no longer.

    `authenticate` is the program's own authentication, asked before the broker's. `mounted` is the prefix of the routes
    in an application that somebody else serves: then the addresses that its sockets are bound to are names of the
    broker too, and sign-ins have a cookie of their own.
    """

    __slots__ = ("_authenticate", "_cookie", "_mounted", "acceptor", "authenticator", "path", "proxies")

    def __init__(
        self, authenticator: Authenticator, proxies: TrustedProxies, acceptor: Acceptor | None = None, *,
        authenticate: Authenticate | None = None, mounted: str | None = None,
    ) -> None:  # fmt: skip
        self.authenticator = authenticator
        self.proxies = proxies
        self.acceptor = acceptor
        self.path = f"{mounted or ''}/"
        """where the routes begin, for the cookie's Path"""
        self._authenticate = authenticate
        self._mounted = mounted
        self._cookie = ""

    @property
    def cookie(self) -> str:
        """The name of the session cookie."""
        return self._cookie or self.authenticator.cookie

    @property
    def asks_program(self) -> bool:
        """Whether the program around the broker has an authentication of its own, which wants to see each request."""
        return self._authenticate is not None

    def arrived(self, stream: IOStream) -> None:
        """A request is there."""
        if self.acceptor is not None:
            self.acceptor.requested(stream)
        if self._mounted is not None and stream.socket is not None:
            address = stream.socket.getsockname()
            if isinstance(address, tuple):  # else a Unix socket, whose proxy says what it is called
                self.authenticator.rules.add_bind(address[0], address[1])
                self._cookie = self._cookie or cookie_name(address[1], self._mounted)

    def authenticate(self, request: HTTPServerRequest, facts: RequestFacts, readers: Readers = READERS) -> Principal:
        """Who is asking, judged by Host and Origin first. Raises Refused, and what the program's function raises."""
        principal = self.ask_program(request, facts)
        return self.authenticator.authenticate(facts, self.cookie, readers) if principal is None else principal

    def ask_program(self, request: HTTPServerRequest, facts: RequestFacts) -> Principal | None:
        """Whom the program around the broker takes the sender for, judged by Host and Origin first; None if it does not
        say. Raises Refused, and what the program's function raises.
        """
        if self._authenticate is None:
            return None
        self.authenticator.check_door(facts)
        principal = self._authenticate(request)
        return None if principal is None else self.authenticator.admit(principal)


class Door(RequestHandler):
    """A handler that knows who is asking. Subclasses call `authenticate` first, or `check_door` if open to anybody.

    Every answer is JSON unless a subclass says otherwise, is not cached, and says nothing about the server.
    """

    gate: Gate
    facts: RequestFacts
    readers: Readers = READERS
    """where credentials are looked for"""

    def initialize(self, gate: Gate, **more: Any) -> None:
        """Called by tornado with the route's arguments; the others become attributes."""
        self.gate = gate
        for name, value in more.items():
            setattr(self, name, value)

    def prepare(self) -> None:
        """The request is complete: its facts are taken once."""
        self._let_page_read()
        self.facts = facts_of(self.request, self.gate.proxies)
        self.gate.arrived(self.stream)

    def set_default_headers(self) -> None:
        """Headers of every answer."""
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        self.set_header("Content-Type", "application/json; charset=utf-8")

    def _let_page_read(self) -> bool:
        """Let pages of an allow-listed origin read the answer (Fetch standard, section 3.3); there is no wildcard."""
        self.set_header("Vary", "Origin")
        origins = self.request.headers.get_list("Origin")
        if len(origins) != 1 or not self.gate.authenticator.rules.allows_origin(origins[0]):
            return False
        self.set_header("Access-Control-Allow-Origin", origins[0])
        self.set_header("Access-Control-Allow-Credentials", "true")
        self.set_header("Access-Control-Expose-Headers", _PAGES_MAY_READ)
        return True

    def allowed_methods(self) -> tuple[str, ...]:
        """The methods of this path, for Allow."""
        handled = ("GET", "POST", "DELETE")
        own = [name for name in handled if getattr(type(self), name.lower()) is not getattr(Door, name.lower())]
        return (*own, *(["HEAD"] if "GET" in own else []), "OPTIONS")

    def options(self, *_: str) -> None:
        """What may be asked here; to a page of another, allow-listed origin also that it may (a CORS preflight)."""
        self.check_door()
        allowed = ", ".join(self.allowed_methods())
        if self._let_page_read():
            self.set_header("Access-Control-Allow-Methods", allowed)
            self.set_header("Access-Control-Allow-Headers", _PAGES_MAY_SEND)
            self.set_header("Access-Control-Max-Age", _PREFLIGHT_GOOD_S)
        self.set_header("Allow", allowed)
        self.set_status(204)
        self.finish()

    def _head(self, *path: str) -> Any:
        """As GET, without the body."""
        if "GET" not in self.allowed_methods():
            raise HTTPError(405)
        return self.get(*path)

    head: Callable[..., Any] = _head

    @property
    def stream(self) -> IOStream:
        """The connection's stream."""
        return cast("HTTP1Connection", self.request.connection).stream

    def check_xsrf_cookie(self) -> None:
        """Tornado's own check, which an application can switch on for all its handlers, is not for these.

        Their callers know no such cookie. Pages of other sites are refused by their Origin, and the one form there is
        has a check of its own.
        """

    def check_door(self) -> None:
        """Judge Host and Origin. Raises Refused."""
        self.gate.authenticator.check_door(self.facts)

    def authenticate(self) -> Principal:
        """Who is asking. Raises Refused."""
        principal = self.gate.authenticate(self.request, self.facts, self.readers)
        if self.gate.acceptor is not None:
            self.gate.acceptor.authenticated(self.stream)
        return principal

    def answer(self, value: object, status: int = 200) -> None:
        """Answer with JSON."""
        self.set_status(status)
        self.finish(msgspec.json.encode(value))

    def refuse(self, status: int, reason: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """Answer with an error. After an upgrade offered in vain the connection ends: nobody looks at what follows."""
        self.set_status(status)
        for name, value in headers:
            self.set_header(name, value)
        upgrade = "Upgrade" in self.request.headers
        if upgrade:
            self.set_header("Connection", "close")
        written = self.finish(self.refusal(status, reason))
        if upgrade:
            stream = self.stream
            written.add_done_callback(lambda _: stream.close())

    def refusal(self, status: int, reason: str) -> bytes:
        """The body of a refusal."""
        return msgspec.json.encode({"error": reason, "status": status})

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Tornado's own errors and `Refused`, in the one form."""
        if self._headers_written:
            super().send_error(status_code, **kwargs)
            return
        error = kwargs.get("exc_info", (None, None))[1]
        self.clear()
        self._let_page_read()
        if isinstance(error, Refused):
            self.refuse(error.status, error.reason, error.headers)
        elif status_code == 405:
            allowed = ", ".join(self.allowed_methods())
            self.refuse(405, f"{self.request.method} is not for this path; it takes {allowed}", (("Allow", allowed),))
        else:
            reason = kwargs.get("reason") or {404: "no such path"}.get(status_code)
            self.refuse(status_code, reason or responses.get(status_code, "unknown"))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Refusals are answers, not faults of the broker."""
        if not isinstance(value, Refused):
            super().log_exception(typ, value, tb)

    def compute_etag(self) -> None:
        """Answers are about now."""
