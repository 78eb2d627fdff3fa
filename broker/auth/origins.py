"""Host and Origin: which names the broker answers to, and which web pages may use it.

A browser carries a page's requests to whatever address a name resolves to, so a hostile page can point its own
name at 127.0.0.1 (DNS rebinding): then Host and Origin agree with each other, and only a list of the broker's
own names tells. A page under another name betrays itself by its Origin (RFC 6454), which browsers set and
pages cannot forge. So Host is checked first, Origin against the checked Host.
"""

import ipaddress
import re
from collections.abc import Iterable

import msgspec

from broker.auth.facts import Refused, RequestFacts

_HOST = r"(?P<host>\[[0-9a-f:.]{2,45}\]|[a-z0-9_.-]{1,253})"
_PORT = r"(?::(?P<port>[1-9][0-9]{0,4}))?"
_AUTHORITY = re.compile(_HOST + _PORT)
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]{0,63})://" + _HOST + _PORT)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Authority(msgspec.Struct, frozen=True):
    """A host, lower case (IPv6 in brackets and shortest form), and its port where one was written."""

    host: str
    port: int | None


class Origin(msgspec.Struct, frozen=True):
    """RFC 6454's triple; the port is the scheme's own where none was written, None for schemes without."""

    scheme: str
    host: str
    port: int | None


def parse_authority(text: str) -> Authority:
    """`host[:port]` without userinfo, blanks or control characters; ValueError for anything else."""
    return Authority(*_host_and_port(_match(_AUTHORITY, text)))


def parse_origin(text: str) -> Origin:
    """`scheme://host[:port]`, one only, no path (RFC 6454 section 6.2); ValueError for else, `null` too."""
    match = _match(_ORIGIN, text)
    host, port = _host_and_port(match)
    scheme = match["scheme"]
    return Origin(scheme, host, port if port is not None else _DEFAULT_PORTS.get(scheme))


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    # isascii first: lower() folds the Kelvin sign to "k".
    match = pattern.fullmatch(text.lower()) if text.isascii() else None
    if match is None:
        raise ValueError(text)
    return match


def _host_and_port(match: re.Match[str]) -> tuple[str, int | None]:
    host, port = match["host"], match["port"]
    if host.startswith("["):
        host = f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
    if port is not None and int(port) > 65535:
        raise ValueError(port)
    return host, None if port is None else int(port)


class HostRules:
    """The names the broker answers to and the pages that may use it.

    `binds` are the (host, port) it listens on. Its own names carry the port listened on: the host itself;
    for a loopback host also the other loopback names; for a wildcard (`0.0.0.0`, `::`, empty) the loopback
    names and every IP address written out (a rebound Host is by its nature a name, never an address).
    `allowed_hosts` add `name` (any port) or `name:port`; `allowed_origins` add origins, compared exactly.
    Raises ValueError naming a bad entry.
    """

    __slots__ = ("_any_address_ports", "_bound", "_hosts", "_names", "_origins")

    def __init__(
        self,
        binds: Iterable[tuple[str, int]],
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
    ) -> None:
        self._bound: set[tuple[str, int]] = set()
        self._hosts: set[tuple[str, int]] = set()
        self._any_address_ports: set[int] = set()
        self._names: set[str] = set()
        self._origins = frozenset(_allowed_origin(entry) for entry in allowed_origins)
        for host, port in binds:
            self._add_bind(host, port)
        for entry in allowed_hosts:
            authority = _allowed_host(entry)
            if authority.port is None:
                self._names.add(authority.host)
            else:
                self._hosts.add((authority.host, authority.port))

    def add_bind(self, host: str, port: int) -> None:
        """One more (host, port) that is listened on, an IP address; twice is once."""
        if (host, port) not in self._bound:
            self._bound.add((host, port))
            self._add_bind(host.partition("%")[0], port)

    def _add_bind(self, host: str, port: int) -> None:
        address = _address(host)
        wildcard = host == "" or (address is not None and address.is_unspecified)
        loopback = host.lower() == "localhost" or (address is not None and address.is_loopback)
        if wildcard:
            self._any_address_ports.add(port)
        else:
            self._hosts.add((parse_authority(_bracketed(host)).host, port))
        if wildcard or loopback:
            self._hosts.update((name, port) for name in _LOOPBACK_NAMES)

    def check(self, facts: RequestFacts) -> None:
        """Pass a request whose Host is the broker's own and whose Origin, if any, is allowed.

        Raises Refused: 400 for a missing, doubled or malformed Host, 421 for another one (RFC 9110 section
        15.5.20), 403 for an Origin that is not exactly the broker's own or in the list.
        """
        self._check_origin(facts, self._check_host(facts))

    def _check_host(self, facts: RequestFacts) -> Origin:
        """The broker's own origin, as this request addresses it."""
        values = facts.header("host")
        # RFC 9112 section 3.2: exactly one Host; and a target with a host of its own would override it.
        if len(values) != 1 or not facts.path.startswith(("/", "*")):
            raise Refused(400, "exactly one Host header and a plain path are required")
        try:
            authority = parse_authority(values[0])
        except ValueError:
            raise Refused(400, "the Host header is malformed") from None
        scheme = "https" if facts.secure else "http"
        port = authority.port or _DEFAULT_PORTS[scheme]
        if not self._is_own(authority.host, port):
            reason = f"this broker does not answer to the Host {_shown(values[0])}; server.allowed_hosts adds names"
            raise Refused(421, reason)
        return Origin(scheme, authority.host, port)

    def _is_own(self, host: str, port: int) -> bool:
        if (host, port) in self._hosts or host in self._names:
            return True
        return port in self._any_address_ports and _address(host.strip("[]")) is not None

    def _check_origin(self, facts: RequestFacts, own: Origin) -> None:
        values = facts.header("origin")
        if not values:
            return  # no browser: they send one with every WebSocket and every cross-origin request
        try:
            origin = parse_origin(values[0]) if len(values) == 1 else None
        except ValueError:
            origin = None
        if origin is None or (origin != own and origin not in self._origins):
            reason = (
                f"pages of the origin {_shown(values[0])} may not use this broker; server.allowed_origins adds them"
            )
            raise Refused(403, reason)

    def allows_origin(self, text: str) -> bool:
        """Whether an Origin stands in `allowed_origins` (for CORS answers; the own one needs none)."""
        try:
            return parse_origin(text) in self._origins
        except ValueError:
            return False


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 100 else text[:100] + "…")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _allowed_host(entry: str) -> Authority:
    try:
        return parse_authority(f"[{entry}]" if _address(entry) is not None and ":" in entry else entry)
    except ValueError:
        message = f"allowed host {entry!r} is no host name; write broker.example or broker.example:8787"
        raise ValueError(message) from None


def _allowed_origin(entry: str) -> Origin:
    try:
        return parse_origin(entry)
    except ValueError:
        message = f"allowed origin {entry!r} is no origin; write https://page.example or http://page.example:8080"
        raise ValueError(message) from None
