"""Signatures: which hashes, what is refused, and that only what was accepted is remembered."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.wire.signature import HASHES, History, SignatureError, hash_of, keyed, sign, verify

FRAMES = [b'{"msg_id":"m1"}', b"{}", b"{}", b'{"code":"1+1"}']
KEY = b"a0436f6c-1916"


@pytest.mark.parametrize("name", HASHES)
def test_every_hash_signs_as_hmac_says(name: str) -> None:
    mac = keyed(KEY, f"hmac-{name}")
    signature = sign(mac, FRAMES)
    assert signature == hmac.new(KEY, b"".join(FRAMES), name).hexdigest().encode()
    assert signature == signature.lower()
    verify(mac, signature, FRAMES)


def test_every_hash_of_hashlib_is_there_but_those_without_a_length() -> None:
    assert {*HASHES, "shake_128", "shake_256"} == hashlib.algorithms_guaranteed


@pytest.mark.parametrize(
    ("scheme", "named"),
    [
        ("sha256", "has to be hmac-HASH"),
        ("hmac", "has to be hmac-HASH"),
        ("", "has to be hmac-HASH"),
        ("HMAC-sha256", "has to be hmac-HASH"),
        ("hmac-", "names no hash"),
        ("hmac-nope", "names no hash"),
        ("hmac-SHA256", "names no hash"),
        ("hmac-new", "names no hash"),  # hashlib.new is no hash, though hashlib has the attribute
        ("hmac-shake_128", "names no hash"),
        ("hmac-sha256\n", "names no hash"),
    ],
)
def test_a_scheme_that_is_none_says_what_would_be_right(scheme: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as refused:
        hash_of(scheme)
    assert "sha256" in str(refused.value)


def test_without_a_key_nothing_is_signed_or_checked() -> None:
    assert keyed(b"") is None
    assert sign(None, FRAMES) == b""
    verify(None, b"anything", FRAMES)
    with pytest.raises(ValueError, match="names no hash"):
        keyed(b"", "hmac-nope")


@pytest.mark.parametrize(
    ("signature", "cause", "named"),
    [
        (b"", "unsigned", "Unsigned Message"),
        (sign(keyed(b"other"), FRAMES), "invalid_signature", "another key"),
        (sign(keyed(KEY), FRAMES).upper(), "invalid_signature", "lower-case"),
        (sign(keyed(KEY, "hmac-md5"), FRAMES), "invalid_signature", "32 characters where hmac-sha256 has 64"),
        (b"\xff" * 64, "invalid_signature", "Invalid Signature"),
        (sign(keyed(KEY), FRAMES) + b"\0", "invalid_signature", "65 characters"),
    ],
)
def test_a_refusal_names_its_cause(signature: bytes, cause: str, named: str) -> None:
    with pytest.raises(SignatureError, match=named) as refused:
        verify(keyed(KEY), signature, FRAMES)
    assert refused.value.cause == cause
    assert KEY.decode() not in str(refused.value)


@given(st.integers(0, 3), st.data())
def test_any_changed_byte_is_noticed(frame: int, data: st.DataObject) -> None:
    mac = keyed(KEY)
    signature = sign(mac, FRAMES)
    changed = bytearray(FRAMES[frame])
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SignatureError, match="Invalid Signature"):
        verify(mac, signature, [*FRAMES[:frame], bytes(changed), *FRAMES[frame + 1 :]])


def test_views_are_signed_as_bytes_are() -> None:
    assert sign(keyed(KEY), [memoryview(frame) for frame in FRAMES]) == sign(keyed(KEY), FRAMES)


def test_the_history_forgets_the_oldest() -> None:
    history = History(3)
    for number in range(5):
        history.remember(b"%d" % number)
    assert len(history) == 3
    assert [b"%d" % number in history for number in range(5)] == [False, False, True, True, True]
    with pytest.raises(SignatureError, match="Duplicate Signature") as refused:
        history.check(b"4")
    assert refused.value.cause == "duplicate_signature"
    history.check(b"0")


def test_a_history_of_none_remembers_none() -> None:
    history = History(0)
    history.remember(b"a")
    history.check(b"a")
    assert len(history) == 0
