"""Who a request comes from: which credential is looked at, and how the refusals look."""

from pathlib import Path

import msgspec
import pytest

from broker.auth.authenticate import Authenticator, bearer_subprotocol
from broker.auth.facts import Refused
from broker.auth.guesses import Guesses
from broker.auth.origins import HostRules
from broker.auth.tickets import Tickets
from broker.auth.tokens import admin_principal, new_secret
from broker.core.access import Role, is_admin, roles_at
from tests.auth.helpers import ADMIN, Clock, Doors, bearer, request


@pytest.fixture
def doors(tmp_path: Path) -> Doors:
    return Doors(tmp_path)


def refusal(doors: Doors, *headers: tuple[str, str], **more: str) -> Refused:
    with pytest.raises(Refused) as caught:
        doors.authenticator.authenticate(request(*headers, **more))
    return caught.value


def form(refused: Refused) -> tuple[int, str, tuple[tuple[str, str], ...]]:
    return refused.status, refused.reason, refused.headers


def test_row_01_no_credential_is_401_with_a_challenge(doors: Doors) -> None:
    refused = refusal(doors)
    assert refused.status == 401
    assert ("WWW-Authenticate", "Bearer") in refused.headers
    assert doors.authenticator.counters.missing == 1


def test_row_02_identical_refusals(doors: Doors) -> None:
    expiring, expired_secret = doors.store.create("old", expires_in_s=10)
    revoked, revoked_secret = doors.store.create("out")
    good, good_secret = doors.store.create("good")
    doors.store.revoke(revoked.id)
    doors.wall.now += 10
    # the last letter carries two bits only; the middle of the token carries six
    altered = good_secret[:20] + ("A" if good_secret[20] != "A" else "B") + good_secret[21:]
    wrong = [expired_secret, revoked_secret, new_secret(), altered, "x", "", "brk_", good.digest, ADMIN[:-1]]
    forms = {form(refusal(doors, bearer(secret))) for secret in wrong}
    forms |= {form(refusal(doors, ("sec-websocket-protocol", bearer_subprotocol(secret)))) for secret in wrong}
    forms |= {form(refusal(doors, ticket=secret)) for secret in wrong}
    forms |= {
        form(refusal(doors, ("authorization", value)))
        for value in ("", "Basic dTpw", "Bearer", f"Token {good_secret}", good_secret, f"Bearer {good_secret} x")
    }
    forms |= {form(refusal(doors, ("sec-websocket-protocol", f"bearer.{value}"))) for value in ("", "=", "a", "é", "*")}
    assert forms == {(401, "the credential is not valid", (("WWW-Authenticate", "Bearer"),))}
    assert doors.authenticator.counters.wrong == len(wrong) * 3 + 6 + 5
    assert expiring.id != good.id


def test_row_02_an_unknown_token_takes_the_steps_of_a_known_one(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[int] = []
    original = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return original(one, other)

    monkeypatch.setattr("broker.auth.tokens.hmac.compare_digest", counting)
    secret = doors.store.create("good")[1]
    doors.authenticator.authenticate(request(bearer(secret)))
    refusal(doors, bearer(new_secret()))
    refusal(doors, bearer("short"))
    assert compared == [32, 32, 32]


def test_row_02_many_wrong_guesses_are_throttled_and_good_credentials_pass(tmp_path: Path) -> None:
    doors = Doors(tmp_path, per_minute=3)
    secret = doors.store.create("good")[1]
    assert [refusal(doors, bearer("x")).status for _ in range(5)] == [401, 401, 401, 429, 429]
    assert refusal(doors, bearer("x")).headers == (("Retry-After", "20"),)
    assert doors.authenticator.authenticate(request(bearer(secret))).name == "good"
    assert refusal(doors, bearer("x"), remote="10.0.0.9").status == 401, "another address has its own bucket"
    assert refusal(doors).status == 401, "no credential is no guess"
    doors.steady.now += 20
    assert [refusal(doors, bearer("x")).status for _ in range(2)] == [401, 429]
    assert doors.authenticator.counters.throttled == 4
    assert doors.authenticator.counters.admitted == 1


def test_a_stored_token_by_header_and_by_subprotocol(doors: Doors) -> None:
    record, secret = doors.store.create("camera-1", ["worker"], ["data*"])
    by_header = doors.authenticator.authenticate(request(bearer(secret)))
    by_subprotocol = doors.authenticator.authenticate(
        request(("sec-websocket-protocol", f"jsonrpc, {bearer_subprotocol(secret)}"))
    )
    assert by_header == by_subprotocol
    assert (by_header.name, by_header.kind, by_header.token_id) == ("camera-1", "token", record.id)
    assert roles_at(by_header.grants, "data2") & Role.WORKER
    assert not roles_at(by_header.grants, "other")
    assert not is_admin(by_header.grants)


def test_the_scheme_has_no_case_and_the_subprotocols_may_come_on_several_lines(doors: Doors) -> None:
    secret = doors.store.create("a")[1]
    doors.authenticator.authenticate(request(("authorization", f"bEARER  {secret} ")))
    doors.authenticator.authenticate(
        request(("sec-websocket-protocol", "jsonrpc"), ("sec-websocket-protocol", bearer_subprotocol(secret)))
    )


def test_a_padded_subprotocol_is_no_credential_of_ours(doors: Doors) -> None:
    import base64

    secret = doors.local + "x" * ((2 - len(doors.local)) % 3)  # so that base64 would pad
    fixed = {secret: admin_principal()}
    authenticator = Authenticator(
        doors.authenticator.rules, tokens=None, tickets=doors.tickets, guesses=doors.guesses, fixed=fixed
    )
    padded = "bearer." + base64.urlsafe_b64encode(secret.encode()).decode()
    assert padded.endswith("=")
    assert authenticator.authenticate(request(("sec-websocket-protocol", padded.rstrip("=")))).name == "admin"
    with pytest.raises(Refused):
        authenticator.authenticate(request(("sec-websocket-protocol", padded)))


def test_a_subprotocol_with_foreign_letters_is_not_read_around_them(doors: Doors) -> None:
    name = bearer_subprotocol(doors.local)
    assert doors.authenticator.authenticate(request(("sec-websocket-protocol", name))).kind == "local"
    for letters in ("****", "++++", "!", "."):
        altered = name[:20] + letters + name[20:]
        assert refusal(doors, ("sec-websocket-protocol", altered)).status == 401


def test_the_local_and_the_admin_token_may_do_everything(doors: Doors) -> None:
    for secret, kind in ((doors.local, "local"), (ADMIN, "admin")):
        principal = doors.authenticator.authenticate(request(bearer(secret)))
        assert (principal.kind, principal.name, principal.expires_at) == (kind, kind, None)
        assert is_admin(principal.grants)
        assert roles_at(principal.grants, "anything") & Role.WORKER


@pytest.mark.parametrize("secret", ["", "x" * 31])
def test_a_short_admin_token_is_refused_at_the_start(secret: str) -> None:
    clock = Clock()
    with pytest.raises(ValueError, match=r"32 characters.*auth\.admin_token"):
        Authenticator(
            HostRules([]),
            tokens=None,
            tickets=Tickets(clock),
            guesses=Guesses(clock),
            fixed={secret: admin_principal()},
        )


def test_exactly_one_credential_is_looked_at_and_a_bad_one_is_never_skipped(doors: Doors) -> None:
    secret = doors.store.create("good")[1]
    good_subprotocol = ("sec-websocket-protocol", bearer_subprotocol(secret))
    bad_subprotocol = ("sec-websocket-protocol", bearer_subprotocol("x"))
    ticket = doors.tickets.issue(doors.authenticator.authenticate(request(bearer(secret))))
    assert refusal(doors, bearer("x"), good_subprotocol, ticket=ticket).status == 401
    assert refusal(doors, ("authorization", "Basic eDp5"), good_subprotocol).status == 401
    assert refusal(doors, bad_subprotocol, ticket=ticket).status == 401
    doors.authenticator.authenticate(request(bearer(secret), bad_subprotocol, ticket="x"))
    doors.authenticator.authenticate(request(good_subprotocol, ticket="x"))
    assert len(doors.tickets) == 1, "a ticket that was not looked at is not spent"
    doors.authenticator.authenticate(request(ticket=ticket))


def test_a_credential_given_twice_is_refused(doors: Doors) -> None:
    secret = doors.store.create("good")[1]
    twice = refusal(doors, bearer(secret), bearer(secret))
    assert (twice.status, twice.reason) == (400, "more than one Authorization header")
    name = bearer_subprotocol(secret)
    assert refusal(doors, ("sec-websocket-protocol", f"{name}, {name}")).status == 400
    facts = msgspec.structs.replace(request(), query=(("ticket", "a"), ("ticket", "b")))
    with pytest.raises(Refused) as caught:
        doors.authenticator.authenticate(facts)
    assert caught.value.status == 400
    assert doors.authenticator.counters.malformed == 3


def test_a_ticket_opens_once_with_its_principal_s_grants_and_expiry(doors: Doors) -> None:
    record, secret = doors.store.create("page", ["listener"], ["data"], expires_in_s=3600)
    principal = doors.authenticator.authenticate(request(bearer(secret)))
    ticket = doors.tickets.issue(principal)
    came = doors.authenticator.authenticate(request(ticket=ticket))
    assert came == msgspec.structs.replace(principal, kind="ticket")
    assert came.expires_at == record.expires
    assert refusal(doors, ticket=ticket).status == 401


def test_a_ticket_of_a_token_revoked_or_expired_since_is_worth_nothing(doors: Doors) -> None:
    for end in ("revoke", "expire"):
        record, secret = doors.store.create(end, expires_in_s=10)
        ticket = doors.tickets.issue(doors.authenticator.authenticate(request(bearer(secret))))
        if end == "revoke":
            doors.store.revoke(record.id)
        else:
            doors.wall.now += 10
        assert refusal(doors, ticket=ticket).status == 401


def test_row_09_the_principal_says_when_its_token_expires(doors: Doors) -> None:
    secret = doors.store.create("short", expires_in_s=60)[1]
    assert doors.authenticator.authenticate(request(bearer(secret))).expires_at == doors.wall.now + 60
    doors.wall.now += 60
    assert refusal(doors, bearer(secret)).status == 401


def test_row_03_the_order_of_refusal_is_host_then_origin_then_credential(doors: Doors) -> None:
    wrong = bearer("x")
    assert refusal(doors, wrong, ("origin", "http://evil.example"), host="evil.example").status == 421
    assert refusal(doors, wrong, ("origin", "http://evil.example")).status == 403
    assert refusal(doors, wrong).status == 401
    counters = doors.authenticator.counters
    assert (counters.misdirected, counters.origin_refused, counters.wrong) == (1, 1, 1)


def test_a_door_open_to_anybody_still_judges_host_and_origin(doors: Doors) -> None:
    doors.authenticator.check_door(request())
    with pytest.raises(Refused, match="421"):
        doors.authenticator.check_door(request(host="evil.example:8787"))
    with pytest.raises(Refused, match="403"):
        doors.authenticator.check_door(request(("origin", "null")))


def test_row_06_no_refusal_repeats_a_credential(doors: Doors) -> None:
    canary = "brk_canary-canary-canary-canary-canary"
    said = [
        refusal(doors, bearer(canary)),
        refusal(doors, bearer(canary), bearer(canary)),
        refusal(doors, ("sec-websocket-protocol", bearer_subprotocol(canary))),
        refusal(doors, ticket=canary),
        refusal(doors, ("authorization", f"Basic {canary}")),
    ]
    for refused in said:
        assert canary not in f"{refused} {refused!r} {refused.headers}"
        assert bearer_subprotocol(canary) not in f"{refused!r}"
