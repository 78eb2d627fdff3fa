"""What signing in at `/login` gives rt-cloud's daemons beside the session cookie: a cookie they know by its name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from broker.auth.facts import RequestFacts
from broker.auth.logins import set_cookie
from broker.auth.origins import parse_authority
from broker.auth.proxies import parse_address
from broker.auth.signed_cookie import Signer
from broker.core.access import Grant, Principal, Role

log = logging.getLogger("broker.auth")

COOKIE = "login"
"""the cookie in which a daemon shows its sign-in"""
TEST_LOGIN = ("test", "test")
_FORWARDED = re.compile("forwarded|via|x-forwarded(-.*)?|x-real-ip|.*client-ip|.*connecting-ip")
"""headers by which proxies betray themselves"""


class DaemonSignIn:
    """Writes and reads the cookie `login`, signed with a key of this object, and knows rt-cloud's test login.

    That one stands for a worker at `endpoints` and nothing else; without `test_user` it is nobody's.
    """

    __slots__ = ("_signer", "_tester")

    def __init__(self, endpoints: Iterable[str], *, test_user: bool) -> None:
        self._signer = Signer()
        grants = (Grant(Role.WORKER, tuple(sorted(set(endpoints)))),)
        self._tester = Principal("test", grants, kind="login") if test_user else None

    def find_tester(self, facts: RequestFacts, name: str, password: str) -> Principal | None:
        """Whom the test login stands for, if this is it and comes from this machine; else None."""
        if self._tester is None or (name, password) != TEST_LOGIN:
            return None
        if not is_here(facts):
            log.warning("the login test is for this machine alone; it was refused to %s", facts.remote)
            return None
        return self._tester

    def write(self, value: str, live_s: float, *, secure: bool) -> str:
        """The Set-Cookie header for a sign-in of this value; with 0 seconds it takes the cookie away."""
        return set_cookie(COOKIE, self._signer.sign(COOKIE, value) if live_s else "", live_s, secure=secure)

    def read(self, text: str) -> str | None:
        """The value of the sign-in that a cookie stands for; None if it was not written here."""
        return self._signer.read(COOKIE, text)


def is_here(facts: RequestFacts) -> bool:
    """Whether who asks is on this machine and calls it by a name no other has, and no proxy says it stands between."""
    return (
        _is_loopback(facts.remote)
        and all(_is_loopback(_host_of(value)) for value in facts.header("host"))
        and not any(_FORWARDED.fullmatch(name) for name, _ in facts.headers)
    )


def _host_of(value: str) -> str:
    try:
        return parse_authority(value).host.strip("[]")
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    address = parse_address(host)
    return host == "localhost" if address is None else address.is_loopback
