"""Which broker a program means, and with which token it goes there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from broker.auth.access_file import AccessError, find, live
from broker.auth.connection_files import read_connection_file
from broker.auth.contexts import ContextError, Contexts, load_contexts
from broker.wire.connection_file import ConnectionFileError, parse_address

if TYPE_CHECKING:
    from broker.links.zeromq_connect import Place

_LOCALLY = "the broker running on this machine"


class Target(NamedTuple):
    """A broker, the token for it (empty: none was found), and in words where each was found."""

    url: str
    token: str
    url_from: str
    token_from: str


def find_target(
    url: str | None = None, token: str | None = None, environ: Mapping[str, str] = os.environ
) -> Callable[[], tuple[str | Place, str]]:
    """A function that gives URL and token, looked up anew each time it is called; it raises OSError if there is none.

    What is given goes before BROKER_URL and BROKER_TOKEN, these before the context in use, and that before the access
    file of a broker on this machine. A token that is kept goes to the URL it is kept with only.
    """
    locate = locator(url, token, environ)

    def find() -> tuple[str | Place, str]:
        target = locate()
        return place_of(target.url), target.token

    return find


def place_of(url: str) -> str | Place:
    """What is behind an address: a URL as it is, or, for `tcp://ip:port/key`, `ipc://path` and the name of a connection
    file (it ends in `.json`), the place of a ZeroMQ door. Raises OSError if the file cannot be used.
    """
    is_file = "://" not in url and url.endswith(".json")
    if not is_file and not url.startswith(("tcp://", "ipc://")):
        return url
    from broker.links.zeromq_connect import Place  # pyzmq, for those alone who use it

    try:
        if not is_file:
            address = parse_address(url)
            return Place(address.url, (address.key or "").encode("ascii"))
        info = read_connection_file(Path(url).expanduser())
    except (ConnectionFileError, UnicodeEncodeError) as error:
        raise ConnectionError(str(error)) from None
    if info.curve_publickey and not info.curve_serverkey:
        raise ConnectionError(
            f"{url} is the broker's own, without a pair of keys; `broker curve keys` makes a client's file of it"
        )
    return Place(
        info.url("shell"),
        info.key.encode(),
        info.signature_scheme,
        *((text or "").encode() for text in (info.curve_serverkey, info.curve_publickey, info.curve_secretkey)),
    )


def locator(
    url: str | None = None, token: str | None = None, environ: Mapping[str, str] = os.environ
) -> Callable[[], Target]:
    """As `find_target`, and says where it found them."""
    url_from, token_from = ("given" if url else "BROKER_URL"), ("given" if token else "BROKER_TOKEN")
    url = url or environ.get("BROKER_URL") or None
    token = token or environ.get("BROKER_TOKEN") or None

    def locate() -> Target:
        if url is not None:
            if token is not None:
                return Target(url, token, url_from, token_from)
            return _with_kept(url, url_from)
        contexts = _contexts()
        if contexts.in_use is not None:
            kept, place = contexts.in_use, f"context {contexts.current}"
            return Target(kept.url, token or kept.token, place, token_from if token else place)
        try:
            access = find()
        except AccessError as error:
            raise ConnectionError(str(error)) from None
        return Target(access.url, token or access.token, _LOCALLY, token_from if token else _LOCALLY)

    return locate


def _contexts() -> Contexts:
    try:
        return load_contexts()
    except ContextError as error:
        raise ConnectionError(str(error)) from None


def _with_kept(url: str, url_from: str) -> Target:
    """The token kept for that very URL: by a broker of the user's own on this machine, or in a context."""
    wanted = _place(url)
    for access in live().values():
        if _place(access.url) == wanted:
            return Target(url, access.token, url_from, _LOCALLY)
    for name, context in _contexts().contexts.items():
        if context.token and _place(context.url) == wanted:
            return Target(url, context.token, url_from, f"context {name}")
    return Target(url, "", url_from, "nowhere")


def _place(url: str) -> tuple[bool, str, int]:
    """What of a URL says who will see the token: TLS, host and port."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        return False, url, 0  # no URL: no token is kept for it, and whoever connects to it says what is wrong
    secure = parts.scheme in ("https", "wss")
    host = parts.hostname or ""
    if host in ("localhost", "::1"):
        host = "127.0.0.1"
    return secure, host, port or (443 if secure else 80)
