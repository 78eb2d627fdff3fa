"""`POST /login`, `POST /logout`, `GET /whoami`: how a browser signs in, and who it is then."""

from __future__ import annotations

import math
from urllib.parse import parse_qs

import msgspec

from broker.auth.door import Door
from broker.auth.facts import Refused
from broker.auth.logins import Logins, cookie_values, set_cookie
from broker.core.access import ROLE_NAMES, Principal
from broker.core.errors import UNAUTHORISED
from broker.engine.engine import Engine
from broker.transports.http.query import check_names


class _Token(msgspec.Struct, forbid_unknown_fields=True):
    token: str


def view_principal(principal: Principal) -> dict[str, object]:
    """Who somebody is and what they may do where. `expires_at` is in Unix seconds, null for never."""
    grants = [
        {"roles": [name for name, role in ROLE_NAMES.items() if grant.roles & role], "endpoints": grant.endpoints}
        for grant in principal.grants
    ]
    roles = [name for name, role in ROLE_NAMES.items() if any(grant.roles & role for grant in principal.grants)]
    return {
        "principal": principal.name,
        "kind": principal.kind,
        "roles": roles,
        "grants": grants,
        "expires_at": principal.expires_at,
    }


class _LoginDoor(Door):
    engine: Engine
    logins: Logins

    def set_session(self, value: str, live_s: float) -> None:
        """Give the browser its cookie, or take it away."""
        cookie = set_cookie(self.gate.cookie, value, live_s, secure=self.facts.secure, path=self.gate.path)
        self.set_header("Set-Cookie", cookie)

    def end(self, login_id: str) -> None:
        """End a sign-in and every link that was opened with it."""
        self.logins.close(login_id)
        for session in list(self.engine.router.sessions.by_id.values()):
            if session.login_id == login_id and session.link is not None:
                session.link.close(UNAUTHORISED.code, "signed out")


class LoginHandler(_LoginDoor):
    """`POST /login` with `{"token": …}` as JSON or as a form: sets the session cookie."""

    def post(self) -> None:
        """Sign in. 400 for a body without a token, 401 and 429 for a wrong one.

        Whatever cookie came along is not looked at, so that a stale one keeps nobody out; one that is live is replaced.
        """
        self.check_door()
        check_names(self.facts, ())
        principal = self.gate.authenticator.authenticate_token(self.facts, self._token())
        if self.gate.acceptor is not None:
            self.gate.acceptor.authenticated(self.stream)
        value, live_s = self.logins.open(principal)
        for old in cookie_values(self.facts, self.gate.cookie):
            before = self.logins.find(old)
            if before is not None:
                self.end(before.login_id)
        self.set_session(value, live_s)
        self.answer(view_principal(principal) | {"expires_in_s": math.floor(live_s)})

    def _token(self) -> str:
        body = self.request.body
        try:
            if not body.lstrip().startswith(b"{"):  # curl -d calls everything a form
                form = parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=10)
                return msgspec.convert({name: values[-1] for name, values in form.items()}, _Token).token
            return msgspec.json.decode(body, type=_Token).token
        except (ValueError, RecursionError):  # its text may hold the token
            raise Refused(400, 'the body must be {"token": "…"} as JSON, or a form with the field token') from None


class LogoutHandler(_LoginDoor):
    """`POST /logout`: ends the sign-in on the server and takes the cookie away."""

    def post(self) -> None:
        """Sign out. 400 for somebody who came with another credential than the cookie."""
        principal = self.authenticate()
        check_names(self.facts, ())
        if principal.kind != "login":
            raise Refused(400, f"signed in with a {principal.kind}, not with the cookie of /login: nothing to end")
        self.end(principal.login_id)
        self.set_session("", 0)
        self.answer({"principal": principal.name, "signed_out": True})


class WhoAmIHandler(Door):
    """`GET /whoami`: the principal behind the credential, its roles, and when it expires."""

    def get(self) -> None:
        """Say who is asking. 401 for nobody."""
        principal = self.authenticate()
        check_names(self.facts, ())
        self.answer(view_principal(principal))
