"""What authentication looks at in a request, apart from any HTTP library, and how a refusal is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from tornado.httputil import HTTPServerRequest

    from broker.auth.proxies import TrustedProxies


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request as authentication sees it.

    `path` is the request target without its query; `headers` are (lower-case name, value) in their order, a
    name as often as it was sent; `query` holds decoded (name, value) pairs likewise; `remote` is the client's
    IP address and `secure` whether the client speaks TLS, both after trusted proxies were looked through.
    """

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    query: tuple[tuple[str, str], ...] = ()
    remote: str = ""
    secure: bool = False

    def header(self, name: str) -> tuple[str, ...]:
        """All values sent under a lower-case header name, in order; empty if there is none."""
        return tuple(value for key, value in self.headers if key == name)

    def parameter(self, name: str) -> tuple[str, ...]:
        """All values of a query parameter, in order; empty if there is none."""
        return tuple(value for key, value in self.query if key == name)


class Refused(Exception):
    """A request that goes no further: the HTTP status, a reason fit for the client, headers to send with it.

    The reason never repeats a credential.
    """

    def __init__(self, status: int, reason: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason
        self.headers = headers

    def __str__(self) -> str:
        return f"{self.status} {self.reason}"


def facts_of(request: HTTPServerRequest, proxies: TrustedProxies) -> RequestFacts:
    """The facts of a tornado request. The server must run with tornado's `xheaders` off."""
    headers = tuple((name.lower(), value) for name, value in request.headers.get_all())
    remote, secure = proxies.client_of(request.remote_ip or "", request.protocol == "https", headers)
    query = tuple(
        (name, value.decode("utf-8", "replace")) for name, values in request.query_arguments.items() for value in values
    )
    return RequestFacts(
        method=request.method or "",
        path=request.path,
        headers=headers,
        query=query,
        remote=remote,
        secure=secure,
    )
