"""Who the client behind a trusted reverse proxy is: `X-Forwarded-For` and `-Proto`, believed only from there."""

import ipaddress
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TrustedProxies:
    """The addresses or networks (`10.0.0.5`, `10.0.0.0/8`, `::1`) whose forwarding headers are believed.

    Raises ValueError naming an entry that is neither.
    """

    __slots__ = ("_networks",)

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._networks = tuple(_network(entry) for entry in entries)

    def client_of(self, remote: str, secure: bool, headers: tuple[tuple[str, str], ...]) -> tuple[str, bool]:
        """The client's address and whether it speaks TLS.

        Without a trusted peer these are the connection's own. Otherwise the address is the rightmost one of
        `X-Forwarded-For` that is not itself trusted (what stands left of it, the client could have written);
        an entry that is no address ends the search at the last proxy known.
        """
        if not self._networks or not self._trusts(remote):
            return remote, secure
        return self._walk(remote, _values(headers, "x-forwarded-for")), _scheme_secure(
            _values(headers, "x-forwarded-proto"), secure
        )

    def _walk(self, remote: str, hops: list[str]) -> str:
        client = remote
        for hop in reversed(hops):
            address = _address(hop)
            if address is None:
                break
            client = str(address)
            if not self._trusts(client):
                break
        return client

    def _trusts(self, remote: str) -> bool:
        address = _address(remote)
        return address is not None and any(address in network for network in self._networks)


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        message = f"trusted proxy {entry!r} is neither an IP address nor a network such as 10.0.0.0/8"
        raise ValueError(message) from None


def _values(headers: tuple[tuple[str, str], ...], name: str) -> list[str]:
    """The members of a comma-separated header, over all its lines (RFC 9110 section 5.3)."""
    return [part.strip() for key, value in headers if key == name for part in value.split(",")]


def _scheme_secure(schemes: list[str], secure: bool) -> bool:
    # The last one was written by the proxy that talks to us; anything but the two names says nothing.
    last = schemes[-1].lower() if schemes else ""
    return last == "https" if last in {"http", "https"} else secure


def parse_address(text: str) -> Address | None:
    """An IP address, IPv4 inside IPv6 (`::ffff:…`) and a zone taken off; None if `text` is none."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _address(hop: str) -> Address | None:
    """A hop as proxies write it: an address, `[v6]`, `v4:port` or `[v6]:port`."""
    if hop.startswith("["):
        return parse_address(hop[1:].partition("]")[0])
    if hop.count(":") == 1:
        return parse_address(hop.partition(":")[0])
    return parse_address(hop)
