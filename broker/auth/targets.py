"""Which broker a program means, and with which token it goes there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from broker.auth.access_file import Access, AccessError, find, live


def find_target(
    url: str | None = None, token: str | None = None, environ: Mapping[str, str] = os.environ
) -> Callable[[], tuple[str, str]]:
    """A function that gives URL and token, looked up anew each time it is called; it raises OSError if there is none.

    What is given goes before BROKER_URL and BROKER_TOKEN, and these before the access file of a broker on this
    machine. An access file's token goes to that file's own URL only.
    """
    url = url or environ.get("BROKER_URL") or None
    token = token or environ.get("BROKER_TOKEN") or None

    def target() -> tuple[str, str]:
        if url is not None and token is not None:
            return url, token
        if url is not None:
            return url, _token_for(url)
        try:
            access = find()
        except AccessError as error:
            raise ConnectionError(str(error)) from None
        return access.url, token or access.token

    return target


def _token_for(url: str) -> str:
    """The access file's token, if a broker of the user's own on this machine has that very URL; else none."""
    wanted = _place(url)
    found: list[Access] = [access for access in live().values() if _place(access.url) == wanted]
    return found[0].token if found else ""


def _place(url: str) -> tuple[bool, str, int]:
    """What of a URL says who will see the token: TLS, host and port."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    secure = parts.scheme in ("https", "wss")
    host = parts.hostname or ""
    if host in ("localhost", "::1"):
        host = "127.0.0.1"
    try:
        port = parts.port
    except ValueError:
        port = 0
    return secure, host, port or (443 if secure else 80)
