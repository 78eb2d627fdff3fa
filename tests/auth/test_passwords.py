"""Hashes of passwords: what verifies, what is refused, and what stands in for nobody's."""

from __future__ import annotations

from typing import Literal

import pytest

from broker.auth import passwords
from broker.auth.passwords import PasswordError, check_hash, checked_password, hash_password, stand_in, verify
from tests.auth.helpers import cheap_passwords

# RFC 7914, section 12: scrypt("pleaseletmein", "SodiumChloride", N=16384, r=8, p=1), its first 32 bytes.
KNOWN = "$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf046/2o+7qQT44+qbVD9lRdofI"
SALT, DIGEST = "c2FsdHNhbHQ", "MTIzNDU2Nzg5MDEyMzQ1Ng"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)


def test_what_is_hashed_verifies_and_nothing_else_does() -> None:
    encoded = hash_password("correct horse")
    check_hash(encoded)
    assert verify(encoded, "correct horse")
    for other in ("", "correct horse ", "Correct horse", "correct hors", "correct horse\0", "\ud800"):
        assert not verify(encoded, other)
    assert hash_password("correct horse") != encoded, "salted"


def test_a_published_hash_verifies() -> None:
    assert verify(KNOWN, "pleaseletmein") and not verify(KNOWN, "pleaseletmeout")


def test_what_is_stored_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(passwords, "_argon2", lambda: None)
    assert hash_password("correct horse").startswith("$scrypt$ln=15,r=8,p=1$")


def test_the_ways_to_compose_a_letter_are_one_password() -> None:
    assert verify(hash_password("Grüße an alle"), "Gru\u0308ße an alle")


def test_a_longer_one_with_the_same_beginning_is_wrong() -> None:
    encoded = hash_password("x" * 1024)
    assert verify(encoded, "x" * 1024) and not verify(encoded, "x" * 1025)


def test_however_long_one_is_only_so_much_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = "\u0301\u0316" * 16_000
    encoded, lengths = hash_password("correct horse"), []
    normalize = passwords.unicodedata.normalize

    def counted(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
        lengths.append(len(text))
        return normalize(form, text)

    monkeypatch.setattr(passwords.unicodedata, "normalize", counted)
    assert not verify(encoded, "correct horse" + marks)
    with pytest.raises(PasswordError, match="more than 1024 bytes"):
        checked_password("correct horse" + marks)
    assert max(lengths) <= 2048
    longest = "u\u0308\u0304" * 512  # 1536 letters that are composed to 1024 bytes
    assert verify(hash_password(checked_password(longest)), longest)


@pytest.mark.parametrize(
    "text", ["", "1234567", "ab\ncdefgh", "abcdefg\0", "abcdefgh\x85", "x" * 1025, "é" * 513], ids=ascii
)
def test_what_cannot_be_a_password(text: str) -> None:
    with pytest.raises(PasswordError) as caught:
        checked_password(text)
    assert not text or text not in str(caught.value)


def test_what_can_be_one() -> None:
    for text in ("12345678", "x" * 1024, "пароль и ещё", "with blanks at the end  "):
        assert checked_password(text) == text


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        "plain text",
        "$scrypt$",
        f"$scrypt$ln=30,r=8,p=1${SALT}${DIGEST}",
        f"$scrypt$ln=20,r=32,p=16${SALT}${DIGEST}",
        f"$scrypt$ln=0,r=8,p=1${SALT}${DIGEST}",
        f"$scrypt$ln=4,r=0,p=1${SALT}${DIGEST}",
        f"$scrypt$ln=4,r=8,p=1$${DIGEST}",
        f"$scrypt$ln=4,r=8,p=1${SALT}$QQ",
        f"$scrypt$ln=4,r=8,p=1${SALT}$" + "Q" * 200,
        f"$scrypt$ln=4,r=8,p=1${SALT}$QQQQQ" + "Q" * 20,
        f"$scrypt$ln=4,r=8,p=1${SALT}${DIGEST}\n",
        f"$scrypt$ln=٤,r=8,p=1${SALT}${DIGEST}",
        f"$argon2id$v=19$m=99999999,t=3,p=4${SALT}${DIGEST}",
        f"$argon2i$v=19$m=65536,t=3,p=4${SALT}${DIGEST}",
        f"$2b$12${SALT}{DIGEST}",
    ],
)
def test_a_hash_that_cannot_be_used_is_refused(encoded: str) -> None:
    with pytest.raises(PasswordError) as caught:
        check_hash(encoded)
    assert DIGEST not in str(caught.value)


def test_what_stands_in_costs_the_same_and_is_nobodys() -> None:
    encoded = hash_password("correct horse")
    other = stand_in(encoded)
    check_hash(other)
    assert other.rsplit("$", 2)[0] == encoded.rsplit("$", 2)[0] and other != stand_in(encoded)
    assert not verify(other, "correct horse")


def test_argon2_without_the_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_argon2", lambda: None)
    with pytest.raises(PasswordError, match=r"request-broker\[users\]"):
        check_hash(f"$argon2id$v=19$m=65536,t=3,p=4${SALT}${DIGEST}")


def test_argon2_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pytest.importorskip("argon2")
    encoded = hash_password("correct horse")
    assert encoded.startswith("$argon2id$")
    check_hash(encoded)
    assert verify(encoded, "correct horse") and not verify(encoded, "wrong horse")
    assert not verify(stand_in(encoded), "correct horse")
    assert verify(KNOWN, "pleaseletmein"), "what was hashed before it was installed"
