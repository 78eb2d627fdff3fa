"""The sign-ins of browsers, and the cookie as the fourth place where a credential may stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.auth.authenticate import Credential
from broker.auth.facts import Refused, RequestFacts
from broker.auth.logins import Logins, cookie_name, cookie_values, set_cookie
from broker.auth.sign_in import SignIn
from broker.auth.users import UserStore
from broker.core.access import Grant, Principal, Role
from tests.auth.helpers import ADMIN, Clock, Doors, bearer, cheap_passwords, request

CAROL = Principal("carol", (Grant(Role.CALLER, ("lab",)),), token_id="aa")
OWN = ("origin", "http://localhost:8787")


def doors(folder: Path) -> Doors:
    made = Doors(folder)
    made.authenticator.logins = Logins(made.wall, live_s=100)
    made.authenticator.cookie = "broker-8787"
    return made


def cookie(value: str, name: str = "broker-8787") -> tuple[str, str]:
    return ("cookie", f"theme=dark; {name}={value}; other=1")


def signed_in(made: Doors, principal: Principal | None = None) -> str:
    assert made.authenticator.logins is not None
    return made.authenticator.logins.open(principal or Principal("carol", CAROL.grants))[0]


def refusal(made: Doors, *headers: tuple[str, str], method: str = "POST", **more: str) -> Refused:
    with pytest.raises(Refused) as caught:
        made.authenticator.authenticate(asked(*headers, method=method, **more))
    return caught.value


def asked(*headers: tuple[str, str], method: str = "POST", **more: str) -> RequestFacts:
    facts = request(*headers, **more)
    return RequestFacts(
        method=method, path=facts.path, headers=facts.headers, query=facts.query, remote=facts.remote
    )  # fmt: skip


# ---------------------------------------------------------------- the table


def test_a_sign_in_is_found_until_it_ends() -> None:
    clock = Clock()
    logins = Logins(clock, live_s=60)
    value, live_s = logins.open(CAROL)
    assert live_s == 60 and len(value) == 43
    found = logins.find(value)
    assert found is not None and (found.name, found.kind, found.grants) == ("carol", "login", CAROL.grants)
    assert found.expires_at == clock.now + 60 and found.token_id == "aa"
    assert logins.find(value + "x") is None and logins.find("") is None
    assert logins.is_open(found.login_id)
    clock.now += 60
    assert logins.find(value) is None and not logins.is_open(found.login_id) and len(logins) == 0


def test_a_sign_in_ends_no_later_than_its_token() -> None:
    clock = Clock()
    logins = Logins(clock, live_s=60)
    _, live_s = logins.open(Principal("carol", (), expires_at=clock.now + 10))
    assert live_s == 10
    later, _ = logins.open(CAROL)
    clock.now += 10
    assert len(logins) == 1 and logins.find(later)


def test_signing_out_ends_one_and_leaves_the_others() -> None:
    logins = Logins(Clock())
    (first, _), (second, _) = logins.open(CAROL), logins.open(CAROL)
    found = logins.find(first)
    assert found is not None and logins.close(found.login_id) and not logins.close(found.login_id)
    assert logins.find(first) is None and logins.find(second) is not None


def test_sign_ins_are_bounded() -> None:
    clock = Clock()
    logins = Logins(clock, live_s=60, logins_max=3, per_principal_max=2)
    first, _ = logins.open(CAROL)
    logins.open(CAROL)
    logins.open(CAROL)
    assert logins.find(first) is None and len(logins) == 2, "one person's oldest gives way"
    logins.open(Principal("dave", ()))
    assert logins.find(logins.open(Principal("eve", ()))[0]) is not None
    assert len(logins) == 3, "who has most gives way"
    with pytest.raises(Refused) as caught:
        logins.open(Principal("frank", ()))
    assert caught.value.status == 429 and dict(caught.value.headers)["Retry-After"]
    clock.now += 60
    assert logins.open(Principal("frank", ()))


def test_the_cookies_value_is_kept_nowhere() -> None:
    logins = Logins(Clock())
    value, _ = logins.open(CAROL)
    assert value not in repr(logins._live)


# ---------------------------------------------------------------- the header


def test_the_cookie_as_it_is_set() -> None:
    assert cookie_name(8787) == "broker-8787" != cookie_name(8788)
    text = set_cookie("broker-1", "abc", 43_200.7, secure=False)
    assert text == "broker-1=abc; Path=/; Max-Age=43200; HttpOnly; SameSite=Strict"
    assert set_cookie("broker-1", "abc", 1, secure=True).endswith("; Secure")
    assert "Max-Age=0" in set_cookie("broker-1", "", 0, secure=False)


def test_the_cookie_as_it_comes() -> None:
    facts = request(("cookie", "a=1;broker-1=x=y ; broker-11=no"), ("cookie", "broker-1=z"))
    assert cookie_values(facts, "broker-1") == ("x=y", "z")
    assert cookie_values(request(), "broker-1") == ()


# ---------------------------------------------------------------- the fourth reader


def test_a_cookie_counts_for_a_page_of_the_broker(tmp_path: Path) -> None:
    made = doors(tmp_path)
    value = signed_in(made)
    assert made.authenticator.authenticate(asked(cookie(value), OWN)).name == "carol"
    allowed = ("origin", "https://page.example")
    assert made.authenticator.authenticate(asked(cookie(value), allowed)).kind == "login"
    own = ("sec-fetch-site", "same-origin")
    for method in ("GET", "HEAD"):
        assert made.authenticator.authenticate(asked(cookie(value), own, method=method)).name == "carol"


@pytest.mark.parametrize(
    ("headers", "method"),
    [
        ([], "GET"),
        ([], "POST"),
        ([("sec-fetch-site", "same-site")], "GET"),
        ([("sec-fetch-site", "cross-site")], "GET"),
        ([("sec-fetch-site", "none")], "GET"),
        ([("sec-fetch-site", "same-origin")], "POST"),
        ([("sec-fetch-site", "same-origin"), ("sec-fetch-site", "same-origin")], "GET"),
        ([("origin", "http://localhost:3000")], "GET"),
        ([("origin", "null")], "POST"),
    ],
)
def test_a_cookie_that_anybody_elses_page_could_send_does_not_count(
    headers: list[tuple[str, str]], method: str, tmp_path: Path
) -> None:
    made = doors(tmp_path)
    assert refusal(made, cookie(signed_in(made)), *headers, method=method).status == 403
    assert made.authenticator.counters.origin_refused == 1


def test_a_bad_cookie_is_refused_and_never_skipped(tmp_path: Path) -> None:
    made = doors(tmp_path)
    assert refusal(made, cookie("nonsense"), OWN).status == 401
    assert made.authenticator.counters.wrong == 1
    value = signed_in(made)
    assert refusal(made, cookie(value), cookie(value), OWN).status == 400, "twice"
    assert refusal(made, cookie(value, "broker-8788"), OWN).reason == "a credential is required"


def test_a_token_goes_before_the_cookie(tmp_path: Path) -> None:
    made = doors(tmp_path)
    value = signed_in(made)
    assert made.authenticator.authenticate(asked(cookie(value), bearer(ADMIN), OWN)).kind == "admin"
    assert refusal(made, cookie(value), bearer("wrong"), OWN).status == 401
    assert refusal(made, cookie(value), OWN, ticket="wrong").status == 401
    assert made.authenticator.authenticate(asked(cookie("nonsense"), bearer(ADMIN))).kind == "admin"


def test_a_cookie_is_no_token_and_no_ticket(tmp_path: Path) -> None:
    made = doors(tmp_path)
    value = signed_in(made)
    assert refusal(made, bearer(value)).status == 401
    assert refusal(made, ticket=value).status == 401
    assert refusal(made, cookie(made.local), OWN).status == 401
    assert made.authenticator._principal(Credential("cookie", None)) is None


def test_a_cookie_dies_with_the_token_it_was_got_for(tmp_path: Path) -> None:
    made = doors(tmp_path)
    record, secret = made.store.create("carol")
    principal = made.authenticator.authenticate_token(asked(OWN), secret)
    value = signed_in(made, principal)
    assert made.authenticator.authenticate(asked(cookie(value), OWN)).name == "carol"
    made.store.revoke(record.id)
    assert refusal(made, cookie(value), OWN).status == 401


def test_a_ticket_dies_with_the_sign_in_it_was_got_with(tmp_path: Path) -> None:
    made = doors(tmp_path)
    principal = made.authenticator.authenticate(asked(cookie(signed_in(made)), OWN))
    good, late = (made.tickets.issue(principal) for _ in range(2))
    assert made.authenticator.authenticate(asked(ticket=good)).kind == "ticket"
    assert made.authenticator.logins is not None and made.authenticator.logins.close(principal.login_id)
    assert refusal(made, ticket=late).status == 401


def test_cookie_and_ticket_die_with_the_users_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)
    made, users = doors(tmp_path), UserStore(tmp_path / "users.json")
    record = users.add("carol", "a long password")
    value = signed_in(made, record.principal())
    assert refusal(made, cookie(value), OWN).status == 401, "a broker without users knows none"
    made.authenticator.sign_in = SignIn(users, made.steady, made.guesses)
    principal = made.authenticator.authenticate(asked(cookie(value), OWN))
    ticket = made.tickets.issue(principal)
    users.set_password("carol", "another long one")
    assert refusal(made, cookie(value), OWN).status == 401
    assert refusal(made, ticket=ticket).status == 401


def test_the_sign_ins_of_tokens_and_users_end_together_and_are_named() -> None:
    logins = Logins(Clock(), live_s=60)
    values = [
        logins.open(Principal("carol", (), token_id="aa"))[0],
        logins.open(Principal("carol", (), user_id="carol:1"))[0],
        logins.open(Principal("dave", (), user_id="dave:1"))[0],
    ]
    ids = [found.login_id for value in values if (found := logins.find(value))]
    assert logins.close_all_of({"aa", "carol:1", "x"}) == set(ids[:2]) and len(logins) == 1
    assert logins.close_all_of({"aa"}) == frozenset()


def test_what_is_closed_early_is_not_kept_until_its_time() -> None:
    logins = Logins(Clock(), live_s=60)
    for _ in range(5000):
        value, _ = logins.open(CAROL)
        found = logins.find(value)
        assert found is not None and logins.close(found.login_id)
    assert len(logins) == 0 and len(logins._ends) <= 1001 and not logins._by_name


def test_signing_in_with_a_wrong_token_counts_as_a_guess(tmp_path: Path) -> None:
    made = Doors(tmp_path, per_minute=2)
    statuses = []
    for _ in range(3):
        with pytest.raises(Refused) as caught:
            made.authenticator.authenticate_token(asked(OWN), "wrong")
        statuses.append(caught.value.status)
    assert statuses == [401, 401, 429]
    with pytest.raises(Refused) as caught:
        made.authenticator.authenticate_token(asked(("origin", "http://evil.example")), ADMIN)
    assert caught.value.status == 403
