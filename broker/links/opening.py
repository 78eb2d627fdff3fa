"""The plainest opening request of a WebSocket (RFC 6455, 4.1), read without an HTTP server.

It only ever accepts: None means that an HTTP server is to read the same bytes and to judge them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPENING_MAX_BYTES = 2048
"""of a request that is looked at here; with the name of an endpoint and a token it has 300"""

_PLAIN_PART = r"[A-Za-z0-9_.-]+"
_REQUEST = re.compile(
    rf"GET (?P<path>(?:/{_PLAIN_PART})+)(?:\?(?P<query>{_PLAIN_PART}={_PLAIN_PART}(?:&{_PLAIN_PART}={_PLAIN_PART})*))? "
    r"HTTP/1\.1"
)
_HEADER = re.compile(r"(?P<name>[A-Za-z-]+): (?P<value>[!-~](?:[ -~]*[!-~])?)")
_PLAIN_HEADERS = frozenset((
    "host", "upgrade", "connection", "sec-websocket-key", "sec-websocket-version", "sec-websocket-protocol",
    "sec-websocket-extensions", "authorization", "user-agent", "accept", "accept-encoding", "accept-language",
    "cache-control", "pragma",
))  # fmt: skip
"""Others may mean that somebody else is to judge: a page's Origin, a cookie, what a proxy forwards, a body."""


@dataclass(frozen=True, slots=True)
class OpeningRequest:
    """A request of the plainest form: no name of a header, and no parameter, stands in it twice or encoded.

    `path` begins with a slash; `query` holds (name, value); the names in `headers` are in lower case.
    """

    path: str
    query: tuple[tuple[str, str], ...]
    headers: dict[str, str]

    def get_list(self, name: str) -> list[str]:
        """As `broker.links.handshake.HeaderLines`."""
        value = self.headers.get(name.lower())
        return [] if value is None else [value]


def read_opening(data: bytes) -> OpeningRequest | None:
    """The request that these bytes are from the first to the last; None if they are anything else."""
    if not data.endswith(b"\r\n\r\n") or not data.isascii():
        return None
    first, *lines = data[:-4].decode("ascii").split("\r\n")
    request = _REQUEST.fullmatch(first)
    if request is None:
        return None
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            return None
        name = header["name"].lower()
        if name not in _PLAIN_HEADERS or name in headers:
            return None
        headers[name] = header["value"]
    query: dict[str, str] = {}
    for parameter in (request["query"] or "").split("&") if request["query"] else ():
        name, _, value = parameter.partition("=")
        if name in query:
            return None
        query[name] = value
    return OpeningRequest(request["path"], tuple(query.items()), headers)
