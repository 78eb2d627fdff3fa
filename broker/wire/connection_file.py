"""Connection files and addresses: where a kernel's, or the broker's, five ZeroMQ sockets are, and the key.

The JSON of jupyter_client ("Connection files", jupyter-client.readthedocs.io/en/stable/kernels.html), and the form of
2010 in one line, `tcp://ip:port/key`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal
from urllib.parse import quote, unquote, urlsplit

import msgspec

from broker.wire.signature import DEFAULT_SCHEME, hash_of

_HOST = re.compile(r"[A-Za-z0-9_*][\w.:%-]*|::[\w.:%-]*", re.ASCII)
_PATH = re.compile(r"[^\x00-\x1f\x7f]+")
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
SIGNING = ("key", "signature_scheme")
"""the fields by which two ends understand each other"""
SIZE_MAX = 65_536
"""bytes of a connection file"""


class ConnectionFileError(ValueError):
    """A connection file or address that is none, or two that do not fit; the text says which field. It holds no key."""


class ConnectionInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """What a connection file says. Over ipc `ip` is a path, and the ports are endings of it.

    An empty key means that nothing is signed. The two CURVE keys (Z85, 40 characters) are those of the server, unless
    a third says otherwise.
    """

    transport: Literal["tcp", "ipc"] = "tcp"
    ip: str = "127.0.0.1"
    shell_port: Port
    iopub_port: Port
    stdin_port: Port
    control_port: Port
    hb_port: Port
    key: str = ""
    signature_scheme: str = DEFAULT_SCHEME
    kernel_name: str = ""
    curve_publickey: str | None = None
    curve_secretkey: str | None = None
    curve_serverkey: str | None = None
    """ours: the server's public key, where the other two are a client's own"""

    def __repr__(self) -> str:
        return f"<ConnectionInfo {self.url('shell')} {self.kernel_name or ''} {self.signature_scheme}>"  # no key

    def url(self, channel: str) -> str:
        """The ZeroMQ endpoint of `shell`, `iopub`, `stdin`, `control` or `hb`."""
        port: int = getattr(self, f"{channel}_port")
        if self.transport == "ipc":
            return f"ipc://{self.ip}-{port}"
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"tcp://{host}:{port}"


def parse(data: bytes) -> ConnectionInfo:
    """What a connection file says; other members are ignored. Raises ConnectionFileError."""
    try:
        info = msgspec.json.decode(data, type=ConnectionInfo)
    except (ValueError, RecursionError) as error:
        raise ConnectionFileError(f"this is no connection file: {error}") from None
    check(info)
    return info


def check(info: ConnectionInfo) -> None:
    """See that what it says can be used. Raises ConnectionFileError naming the field."""
    try:
        hash_of(info.signature_scheme)
    except ValueError as error:
        raise ConnectionFileError(str(error)) from None
    if not (_HOST if info.transport == "tcp" else _PATH).fullmatch(info.ip):
        raise ConnectionFileError("ip: an address, or the path of ipc sockets, is needed")
    if not info.key.isascii():
        raise ConnectionFileError("key: only ASCII characters can be in it")
    ports = [getattr(info, name) for name in PORTS]
    for index, name in enumerate(PORTS):
        if ports[index] in ports[:index]:
            raise ConnectionFileError(f"{name} and {PORTS[ports.index(ports[index])]} are both {ports[index]}")
    for name in ("curve_publickey", "curve_secretkey", "curve_serverkey"):
        curve = getattr(info, name)
        if curve is not None and len(curve) != 40:
            raise ConnectionFileError(f"{name}: a Z85 key has 40 characters, this one {len(curve)}")


def render(info: ConnectionInfo) -> bytes:
    """The contents of its file, as jupyter_client reads it."""
    members = {name: value for name, value in msgspec.structs.asdict(info).items() if value is not None}
    return msgspec.json.format(msgspec.json.encode(members), indent=2) + b"\n"


def differing(
    first: ConnectionInfo, second: ConnectionInfo, fields: Iterable[str] = ConnectionInfo.__struct_fields__
) -> list[str]:
    """The names of the fields in which two of them differ."""
    return [name for name in fields if getattr(first, name) != getattr(second, name)]


def require_same(
    first: ConnectionInfo, second: ConnectionInfo, named: tuple[str, str] = ("the first", "the second"),
    fields: Iterable[str] = SIGNING,
) -> None:  # fmt: skip
    """See that two files can be used together. Raises ConnectionFileError that says which fields differ, and how; of
    keys only that they do.
    """
    found = [
        f"{name} ({getattr(first, name)} in {named[0]}, {getattr(second, name)} in {named[1]})"
        if name not in _SECRET
        else f"{name} (not told here)"
        for name in differing(first, second, fields)
    ]
    if found:
        raise ConnectionFileError(f"{named[0]} and {named[1]} do not fit: they differ in {', '.join(found)}")


_SECRET = ("key", "curve_secretkey")


class Address(msgspec.Struct, frozen=True):
    """A ZeroMQ address, and the key that stood in it; None where none did."""

    url: str
    key: str | None = None

    def __repr__(self) -> str:
        return f"<Address {self.url}>"


def parse_address(text: str) -> Address:
    """`tcp://ip:port`, `tcp://ip:port/key` (percent-encoded where needed) or `ipc://path`. Raises ConnectionFileError.

    An ipc address holds no key: its path may contain anything.
    """
    scheme, separator, rest = text.partition("://")
    if scheme == "ipc" and separator and rest and "\0" not in rest:
        return Address(text)
    if scheme != "tcp":
        raise ConnectionFileError("an address of ZeroMQ begins with tcp:// or ipc://")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConnectionFileError(f"this is no tcp://ip:port/key: {error}") from None
    if not host or not port or not _HOST.fullmatch(host) or parts.username or parts.query or parts.fragment:
        raise ConnectionFileError("an address over TCP has to be tcp://ip:port or tcp://ip:port/key")
    host = f"[{host}]" if ":" in host else host
    return Address(f"tcp://{host}:{port}", unquote(parts.path[1:]) if len(parts.path) > 1 else None)


def render_address(address: Address) -> str:
    """The address in one line, with its key: a secret."""
    return address.url if address.key is None else f"{address.url}/{quote(address.key, safe='')}"
