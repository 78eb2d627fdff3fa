"""`/login`, `/logout`, `GET /whoami`: how a browser or a program signs in, and who it is then."""

from __future__ import annotations

import math
from urllib.parse import parse_qs

import msgspec

from broker.auth.daemon_sign_in import DaemonSignIn
from broker.auth.door import Door
from broker.auth.facts import Refused
from broker.auth.logins import Logins, cookie_values, set_cookie
from broker.auth.xsrf import has_xsrf, xsrf_cookie, xsrf_value
from broker.core.access import ROLE_NAMES, Principal
from broker.core.errors import UNAUTHORISED
from broker.engine.engine import Engine
from broker.transports.http.query import check_names
from broker.transports.http.sign_in_page import POLICY, REFERRER_POLICY, sign_in_page


class _Token(msgspec.Struct, forbid_unknown_fields=True):
    token: str


class _Password(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    password: str


class _Form(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    password: str
    xsrf: str = msgspec.field(default="", name="_xsrf")


_NEITHER = (
    'the body must be {"token": "…"} or {"name": "…", "password": "…"} as JSON, or a form with the field token, '
    "or with name, password and _xsrf"
)


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
    daemons: DaemonSignIn | None
    """set where rt-cloud's daemons are workers, whose form is the same"""

    def set_session(self, value: str, live_s: float) -> None:
        """Give the browser its cookie, or take it away."""
        cookie = set_cookie(self.gate.cookie, value, live_s, secure=self.facts.secure, path=self.gate.path)
        self.add_header("Set-Cookie", cookie)

    def end(self, login_id: str, *, for_good: bool) -> None:
        """End a sign-in and every link that was opened with it; `for_good` their sessions too, whatever their grace."""
        self.logins.close(login_id)
        for session in [each for each in self.engine.router.sessions.by_id.values() if each.login_id == login_id]:
            if for_good:
                self.engine.router.attaching.expel(session, "signed out", self.engine.now())
            elif session.link is not None:
                session.link.close(UNAUTHORISED.code, "signed out")
        self.engine.perform()


class LoginHandler(_LoginDoor):
    """`GET /login` gives what a form needs, `POST /login` signs in: a token, or name and password. JSON or form."""

    _asked_by_form = False

    def get(self) -> None:
        """The cookie `_xsrf`; to a browser the form that repeats it, to others its value as JSON. Open to anybody."""
        self.check_door()
        check_names(self.facts, ())
        if self._is_browser():
            self._show_form()
            return
        value = xsrf_value(self.facts)
        self.add_header("Set-Cookie", xsrf_cookie(value, secure=self.facts.secure))
        self.answer({"_xsrf": value})

    async def post(self) -> None:
        """Sign in. 400 for a body with neither a token nor a password, 401 and 429 for wrong ones, 403 for a form
        without its `_xsrf`, 503 when too many sign in at once.

        Whatever session cookie came along is not looked at, so that a stale one keeps nobody out; one that is live is
        replaced.
        """  # fmt: skip
        self.check_door()
        check_names(self.facts, ())
        given = self._given()
        authenticator = self.gate.authenticator
        if isinstance(given, _Token):
            principal = authenticator.authenticate_token(self.facts, given.token)
        else:
            principal = await self._who_is(given)
            if self.stream.closed():
                return  # nobody is left to take the cookie
        if self.gate.acceptor is not None:
            self.gate.acceptor.authenticated(self.stream)
        value, live_s = self.logins.open(principal)
        for old in cookie_values(self.facts, self.gate.cookie):
            before = self.logins.find(old)
            if before is not None:
                self.end(before.login_id, for_good=before.name != principal.name)
        self.set_session(value, live_s)
        if self._asked_by_form and self.daemons is not None:
            self.add_header("Set-Cookie", self.daemons.write(value, live_s, secure=self.facts.secure))
        # A daemon says nothing of what it accepts, and is used to being sent to the page.
        if self._asked_by_form and (self.daemons is not None or self._is_browser()):
            self.set_header("Location", "./")
            self.set_status(303)
        self.answer(view_principal(principal) | {"expires_in_s": math.floor(live_s)}, self.get_status())

    def refuse(self, status: int, reason: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """To who sent the form from a browser as the form again, with the reason; else as everywhere."""
        if not (self._asked_by_form and self._is_browser()):
            super().refuse(status, reason, headers)
            return
        self.set_status(status)
        for name, value in headers:
            self.set_header(name, value)
        self._show_form(reason)

    async def _who_is(self, given: _Password | _Form) -> Principal:
        if self.daemons is not None and isinstance(given, _Form):
            tester = self.daemons.find_tester(self.facts, given.name, given.password)
            if tester is not None:
                return tester
        return await self.gate.authenticator.authenticate_password(self.facts, given.name, given.password)

    def _given(self) -> _Token | _Password | _Form:
        """What the body holds. Raises Refused: 400, 403."""
        body = self.request.body
        try:
            if body.lstrip().startswith(b"{"):
                named = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
                if "token" in named:
                    return msgspec.json.decode(body, type=_Token)
                return msgspec.json.decode(body, type=_Password)
            # curl -d calls everything a form, so the type that is declared says nothing.
            fields = parse_qs(
                body.decode("ascii"), keep_blank_values=True, strict_parsing=True, max_num_fields=10, errors="strict"
            )
            form = {name: values[-1] for name, values in fields.items()}
            if "token" in form:
                return msgspec.convert(form, _Token)
            given = msgspec.convert(form, _Form)
        except (ValueError, RecursionError):  # its text may hold the token
            raise Refused(400, _NEITHER) from None
        self._asked_by_form = True
        if not has_xsrf(self.facts, given.xsrf):
            raise Refused(403, "the form does not repeat the cookie _xsrf of GET /login; open it again")
        return given

    def _is_browser(self) -> bool:
        accepted = (part.partition(";")[0].strip() for line in self.facts.header("accept") for part in line.split(","))
        return "text/html" in accepted

    def _show_form(self, error: str = "") -> None:
        value = xsrf_value(self.facts)
        self.add_header("Set-Cookie", xsrf_cookie(value, secure=self.facts.secure))
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("Referrer-Policy", REFERRER_POLICY)
        self.finish(sign_in_page(value, error))


class LogoutHandler(_LoginDoor):
    """`POST /logout`: ends the sign-in on the server and takes the cookie away."""

    def post(self) -> None:
        """Sign out. 400 for somebody who came with another credential than the cookie."""
        principal = self.authenticate()
        check_names(self.facts, ())
        if principal.kind != "login":
            raise Refused(400, f"signed in with a {principal.kind}, not with the cookie of /login: nothing to end")
        self.end(principal.login_id, for_good=True)
        self.set_session("", 0)
        if self.daemons is not None:
            self.add_header("Set-Cookie", self.daemons.write("", 0, secure=self.facts.secure))
        self.answer({"principal": principal.name, "signed_out": True})


class WhoAmIHandler(Door):
    """`GET /whoami`: the principal behind the credential, its roles, and when it expires."""

    def get(self) -> None:
        """Say who is asking. 401 for nobody."""
        principal = self.authenticate()
        check_names(self.facts, ())
        self.answer(view_principal(principal))
