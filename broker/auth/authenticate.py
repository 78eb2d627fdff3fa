"""One authentication for every door: Host, then Origin, then exactly one credential."""

import base64
import binascii
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from broker.auth.facts import Refused, RequestFacts
from broker.auth.guesses import Guesses
from broker.auth.logins import Logins, cookie_values
from broker.auth.origins import HostRules
from broker.auth.sign_in import SignIn, Throttled
from broker.auth.tickets import Tickets
from broker.auth.tokens import TokenStore, curve_digest, digest_of
from broker.core.access import Principal

BEARER_SUBPROTOCOL = "bearer."
SECRET_MIN = 32
"""characters of a token given from outside, as `auth.admin_token`"""

_CHALLENGE = ("WWW-Authenticate", "Bearer")


class AuthCounters:
    """What authentication has seen, as plain counts."""

    __slots__ = ("admitted", "busy", "malformed", "misdirected", "missing", "origin_refused", "throttled", "wrong")

    def __init__(self) -> None:
        self.admitted = 0
        """requests that came with a valid credential"""
        self.malformed = 0
        """400: no usable Host, or a credential given twice"""
        self.misdirected = 0
        """421: another Host"""
        self.origin_refused = 0
        """403: a page of another origin"""
        self.missing = 0
        """401: no credential"""
        self.wrong = 0
        """401: a credential that is not valid, whatever the cause"""
        self.throttled = 0
        """429: one more of these from an address, or for a name, that had sent too many"""
        self.busy = 0
        """503: a password that came while too many waited to be looked at"""


class Credential(msgspec.Struct, frozen=True):
    """The one credential of a request that is looked at: where it stood, and what it was (None: unreadable)."""

    place: str
    secret: str | None


def from_authorization(facts: RequestFacts) -> Credential | None:
    """`Authorization: Bearer <token>` (RFC 6750 section 2.1); another scheme is a bad credential, not none."""
    value = _only(facts.header("authorization"), "Authorization header")
    if value is None:
        return None
    scheme, _, secret = value.partition(" ")
    return Credential("token", secret.strip(" ") if scheme.lower() == "bearer" else None)


def from_subprotocol(facts: RequestFacts) -> Credential | None:
    """`Sec-WebSocket-Protocol: bearer.<base64url of the token, unpadded>`: the one header a page can set."""
    offered = (part.strip() for line in facts.header("sec-websocket-protocol") for part in line.split(","))
    bearers = tuple(name for name in offered if name.startswith(BEARER_SUBPROTOCOL))
    value = _only(bearers, "bearer subprotocol")
    return None if value is None else Credential("token", _from_base64url(value[len(BEARER_SUBPROTOCOL) :]))


def from_ticket(facts: RequestFacts) -> Credential | None:
    """`?ticket=…`, good once."""
    value = _only(facts.parameter("ticket"), "ticket")
    return None if value is None else Credential("ticket", value)


Readers: TypeAlias = tuple[Callable[[RequestFacts], Credential | None], ...]
READERS: Readers = (
    from_authorization,
    from_subprotocol,
    from_ticket,
)
"""Where credentials are looked for; the first place that holds one decides."""


def from_jupyter_authorization(facts: RequestFacts) -> Credential | None:
    """`Authorization: token <token>`, as JupyterLab sends it, or Bearer as everywhere."""
    value = _only(facts.header("authorization"), "Authorization header")
    if value is None:
        return None
    scheme, _, secret = value.partition(" ")
    return Credential("token", secret.strip(" ") if scheme.lower() in ("bearer", "token") else None)


def from_token_parameter(facts: RequestFacts) -> Credential | None:
    """`?token=…`, as front ends of notebooks send it with a WebSocket."""
    value = _only(facts.parameter("token"), "token")
    return None if value is None else Credential("token", value)


JUPYTER_READERS = (from_jupyter_authorization, from_subprotocol, from_ticket, from_token_parameter)
"""Where credentials are looked for on the paths of Jupyter's front ends."""


def bearer_subprotocol(token: str) -> str:
    """The subprotocol that carries a token, for clients that can set no headers."""
    return BEARER_SUBPROTOCOL + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


def _only(values: tuple[str, ...], what: str) -> str | None:
    if len(values) > 1:
        raise Refused(400, f"more than one {what}")
    return values[0] if values else None


def _from_base64url(text: str) -> str | None:
    if "=" in text:  # no letter of a subprotocol's name (RFC 6455 section 4.1)
        return None
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return raw.decode("utf-8")
    except (binascii.Error, ValueError):  # UnicodeDecodeError, non-ASCII text
        return None


def check_fixed(fixed: Mapping[str, Principal]) -> None:
    """Secrets given from outside, and whom they prove.

    Raises ValueError if one of them is shorter than 32 characters (an empty one would let anybody in), TypeError for
    what is no text or no Principal. The secret itself is in no error.
    """
    for secret, principal in fixed.items():
        if not isinstance(secret, str):
            raise TypeError(f"a token in `fixed` is a {type(secret).__name__}; expected a text")
        if len(secret) < SECRET_MIN:
            raise ValueError(f"a token has at least {SECRET_MIN} characters: auth.admin_token, and those in `fixed`")
        if not isinstance(principal, Principal):
            raise TypeError(f"a token in `fixed` stands for a {type(principal).__name__}; expected a Principal")


class Authenticator:
    """Says who a request comes from, or refuses it; the same way for every route.

    `rules` judge Host and Origin; `tokens` are the stored ones (None: there are none); `fixed` maps secrets
    known to this process alone (the local token, the admin token) to their principals; `clock` is wall-clock
    time, for the expiry of what a ticket was issued to; `logins` are the sign-ins of browsers, whose cookie is called
    `cookie` (None, or no name: no cookie is looked at); `sign_in` judges passwords (None: there are no users).
    Raises as `check_fixed`.
    """

    def __init__(
        self,
        rules: HostRules,
        *,
        tokens: TokenStore | None,
        tickets: Tickets,
        guesses: Guesses,
        fixed: Mapping[str, Principal],
        clock: Callable[[], float] = time.time,
        logins: Logins | None = None,
        sign_in: SignIn | None = None,
    ) -> None:
        check_fixed(fixed)
        self.rules = rules
        self.tokens = tokens
        self.tickets = tickets
        self.logins = logins
        self.sign_in = sign_in
        self.cookie = ""
        self.counters = AuthCounters()
        self._guesses = guesses
        self._fixed = {digest_of(secret): principal for secret, principal in fixed.items()}
        self._clock = clock

    def check_door(self, facts: RequestFacts) -> None:
        """Judge Host and Origin only: for the few routes that are open to anybody.

        Raises Refused (400, 421, 403) as `HostRules.check`.
        """
        try:
            self.rules.check(facts)
        except Refused as refused:
            self._count_door(refused.status)
            raise

    def authenticate(self, facts: RequestFacts, cookie: str | None = None, readers: Readers = READERS) -> Principal:
        """Who sent the request. `cookie` is what the session cookie is called there, if not as elsewhere; `readers`
        say where else credentials are looked for.

        Raises Refused: 400, 421, 403 as `check_door`; 400 for a credential given twice; 401 for none, 401 in
        one form for every credential that is not valid, 429 with Retry-After instead of that when too many
        wrong ones came from the address. A valid credential passes however many wrong ones came before.
        """
        self.check_door(facts)
        credential = self._credential(facts, self.cookie if cookie is None else cookie, readers)
        principal = self._principal(credential)
        if principal is None:
            raise self._wrong(facts.remote)
        self.counters.admitted += 1
        return principal

    def recognise(self, facts: RequestFacts) -> Principal | None:
        """Who sent a request with a token in its Authorization header; None where `authenticate` has more to look at,
        or would refuse. Nothing is counted: who lets them in calls `recognised`.
        """
        try:
            self.rules.check(facts)
            credential = from_authorization(facts)
        except Refused:
            return None
        return self._bearer(credential.secret) if credential is not None and credential.secret else None

    def recognised(self) -> None:
        """Somebody whom `recognise` knew has been let in."""
        self.counters.admitted += 1

    def admit(self, principal: Principal) -> Principal:
        """Let in somebody whom the program around the broker vouches for; of kind `host`.

        Raises Refused 401 if they have expired, TypeError for what is no principal.
        """
        if not isinstance(principal, Principal):
            raise TypeError(f"authenticate gave a {type(principal).__name__}, neither a Principal nor None")
        admitted = msgspec.structs.replace(principal, kind="host", token_id="", login_id="")
        if not self.still_holds(admitted):
            self.counters.wrong += 1
            raise Refused(401, "the credential has expired", (_CHALLENGE,))
        self.counters.admitted += 1
        return admitted

    def authenticate_token(self, facts: RequestFacts, token: str) -> Principal:
        """Who holds a token that came in the body of a request, to sign in with.

        Raises Refused as `authenticate`.
        """
        self.check_door(facts)
        return self.authenticate_bearer(token, facts.remote)

    def authenticate_bearer(self, token: str, remote: str) -> Principal:
        """Who holds a token that came over a connection without HTTP. Raises Refused: 401, 429 as `authenticate`."""
        principal = self._bearer(token)
        if principal is None:
            raise self._wrong(remote)
        self.counters.admitted += 1
        return principal

    def authenticate_curve(self, public_key: bytes) -> Principal | None:
        """As `holder_of_curve`, for a peer that comes in: counted."""
        principal = self.holder_of_curve(public_key)
        if principal is None:
            self.counters.wrong += 1
        else:
            self.counters.admitted += 1
        return principal

    def holder_of_curve(self, public_key: bytes) -> Principal | None:
        """Who holds the secret half of a CURVE key (Z85), as ZeroMQ's handshake has shown; None for nobody known."""
        return self.tokens.lookup(curve_digest(public_key)) if self.tokens is not None else None

    async def authenticate_password(self, facts: RequestFacts, name: str, password: str) -> Principal:
        """Which user this is. The slow hash runs in a thread; for who was right a moment ago none is needed.

        Raises Refused: 400, 421, 403 as `check_door`; 401 in one form and after the same time for a name that nobody
        has, a wrong password and a disabled user; 429 with Retry-After, the password unseen, when too many were
        wrong; 503 with Retry-After when too many wait.
        """
        self.check_door(facts)
        if self.sign_in is None:
            raise Refused(401, "this broker has no users; sign in with a token", (_CHALLENGE,))
        try:
            principal = await self.sign_in.check(name, password, facts.remote)
        except Throttled as throttled:
            self.counters.throttled += 1
            retry = (("Retry-After", str(throttled.wait_s)),)
            raise Refused(429, "too many wrong passwords; try again later", retry) from None
        except Refused:
            self.counters.busy += 1
            raise
        if principal is None:
            self.counters.wrong += 1
            raise Refused(401, "the name or the password is not right", (_CHALLENGE,))
        self.counters.admitted += 1
        return principal

    def authenticate_login(self, facts: RequestFacts, value: str | None) -> Principal:
        """Who signed in with this value of a cookie that another door has read; None stands for one that is not valid.

        Raises Refused as `authenticate`.
        """
        self.check_door(facts)
        principal = self.logins.find(value) if self.logins is not None and value is not None else None
        if principal is None or not self.still_holds(principal):
            raise self._wrong(facts.remote)
        self.counters.admitted += 1
        return principal

    def _from_cookie(self, facts: RequestFacts, cookie: str) -> Credential | None:
        """The session cookie, which browsers send by themselves: only a page of ours may use it.

        `check_door` has compared the Origin already. Browsers send none with a GET of the page's own origin (Fetch
        standard, section 3.2), so there `Sec-Fetch-Site` has to say so, which no page can forge. SameSite=Strict alone
        would let pages on other ports of the same host in.
        """
        if self.logins is None or not cookie:
            return None
        value = _only(cookie_values(facts, cookie), f"cookie {cookie}")
        if value is None:
            return None
        own = facts.method in ("GET", "HEAD") and facts.header("sec-fetch-site") == ("same-origin",)
        if not (facts.header("origin") or own):
            raise Refused(403, "a session cookie counts only for pages of the broker: with Origin or Sec-Fetch-Site")
        return Credential("cookie", value)

    def _count_door(self, status: int) -> None:
        self.counters.malformed += status == 400
        self.counters.misdirected += status == 421
        self.counters.origin_refused += status == 403

    def _credential(self, facts: RequestFacts, cookie: str, readers: Readers) -> Credential:
        try:
            for reader in readers:
                credential = reader(facts)
                if credential is not None:
                    return credential
            credential = self._from_cookie(facts, cookie)
            if credential is not None:
                return credential
        except Refused as refused:
            self._count_door(refused.status)
            raise
        self.counters.missing += 1
        raise Refused(401, "a credential is required", (_CHALLENGE,))

    def _principal(self, credential: Credential) -> Principal | None:
        secret = credential.secret or ""  # the empty one is nobody's, and costs as much
        if credential.place == "token":
            return self._bearer(secret)
        if credential.place == "cookie" and self.logins is not None:
            principal = self.logins.find(secret)
        else:
            principal = self.tickets.redeem(secret)
        return principal if principal is not None and self.still_holds(principal) else None

    def _bearer(self, secret: str) -> Principal | None:
        digest = digest_of(secret)
        stored = self.tokens.lookup(digest) if self.tokens is not None else None
        # As with stored tokens, a dict keyed by digests tells nothing about the secrets.
        return self._fixed.get(digest, stored)

    def still_holds(self, principal: Principal) -> bool:
        """Whether what somebody came in with, or got a ticket for, has neither expired nor ended since."""
        if principal.expires_at is not None and self._clock() >= principal.expires_at:
            return False
        if principal.login_id and not (self.logins is not None and self.logins.is_open(principal.login_id)):
            return False
        if principal.user_id and not (self.sign_in is not None and self.sign_in.users.is_valid(principal.user_id)):
            return False
        return not principal.token_id or (self.tokens is not None and self.tokens.is_valid(principal.token_id))

    def knows(self, name: str) -> bool:
        """Whether a stored token, or a user, is valid now that proves this principal."""
        stored = self.tokens is not None and any(
            record.name == name and self.tokens.is_valid(record.id) for record in self.tokens.tokens()
        )
        user = self.sign_in.users.find(name) if self.sign_in is not None else None
        return stored or (user is not None and not user.disabled)

    def not_yours(self, remote: str) -> Refused:
        """The refusal of who names a session that is another's, or not with its secret; it counts as a guess."""
        return self._throttled(remote) or Refused(403, "there is no such session of yours to resume")

    def _wrong(self, remote: str) -> Refused:
        return self._throttled(remote) or Refused(401, "the credential is not valid", (_CHALLENGE,))

    def _throttled(self, remote: str) -> Refused | None:
        """Count a wrong guess; the refusal if there were too many."""
        wait_s = self._guesses.wrong(remote)
        if wait_s:
            self.counters.throttled += 1
            return Refused(429, "too many wrong credentials from this address", (("Retry-After", str(wait_s)),))
        self.counters.wrong += 1
        return None
