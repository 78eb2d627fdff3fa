"""What a form with a password has to repeat, so that no other site's page can have sent it: the cookie `_xsrf`."""

import hmac
import re
import secrets

from broker.auth.facts import RequestFacts
from broker.auth.logins import cookie_values

COOKIE = "_xsrf"
"""The name that tornado's applications use, and clients written for them look for."""

_VALUE = re.compile(r"[A-Za-z0-9_.|:-]{20,256}")


def xsrf_value(facts: RequestFacts) -> str:
    """What the browser has already, or 256 new random bits in base64url.

    Another program on this host may have set it, whatever its port; it is left, or its forms would break.
    """
    for value in cookie_values(facts, COOKIE):
        if _VALUE.fullmatch(value):
            return value
    return secrets.token_urlsafe(32)


def xsrf_cookie(value: str, *, secure: bool) -> str:
    """The Set-Cookie header; it ends with the browser. Not HttpOnly: pages of other programs that share it read it."""
    return f"{COOKIE}={value}; Path=/; SameSite=Strict{'; Secure' if secure else ''}"


def has_xsrf(facts: RequestFacts, given: str) -> bool:
    """Whether a form's field repeats the cookie. Compared in constant time."""
    raw = given.encode("utf-8", "surrogatepass")
    matches = [
        hmac.compare_digest(value.encode("utf-8", "surrogatepass"), raw)
        for value in cookie_values(facts, COOKIE)
        if _VALUE.fullmatch(value)
    ]
    return any(matches)
