"""Passwords and their hashes: scrypt of the standard library, argon2id where `argon2-cffi` is installed."""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import unicodedata
from typing import Any

PASSWORD_MIN = 8
"""characters (NIST SP 800-63B, section 5.1.1.2)"""
PASSWORD_MAX_BYTES = 1024
PASSWORD_MAX_LETTERS = 2 * PASSWORD_MAX_BYTES
"""Code points that are looked at: NFC makes at most three of them two bytes. Putting marks in order takes the square of
their number, and holds the GIL: 0.8 s for 32,000 (measured)."""

SCRYPT_LN, SCRYPT_R, SCRYPT_P = 15, 8, 1
"""Cost: 32 MiB and 99 ms of processor time per hash (the machine of docs/architecture.md; 38 ms with ln = 14)."""
MEMORY_MAX_BYTES = 1 << 30
"""of one hash: what the users' file asks for is bounded, too"""
_SALT_BYTES = 16
_DIGEST_BYTES = 32
_SCRYPT = re.compile(r"\$scrypt\$ln=([0-9]{1,2}),r=([0-9]{1,2}),p=([0-9]{1,2})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")
_ARGON2ID = re.compile(
    r"\$argon2id\$v=19\$m=([0-9]{1,8}),t=([0-9]{1,2}),p=([0-9]{1,2})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)"
)


class PasswordError(ValueError):
    """Why a text cannot be a password, or a hash not be used, in one line that repeats neither."""


def checked_password(text: str) -> str:
    """A new password. Raises PasswordError if it is too short, too long, or has control characters."""
    if len(text) < PASSWORD_MIN:
        raise PasswordError(f"the password has {len(text)} characters; at least {PASSWORD_MIN} are needed")
    if len(text) > PASSWORD_MAX_LETTERS or len(_bytes_of(text)) > PASSWORD_MAX_BYTES:
        raise PasswordError(f"the password has more than {PASSWORD_MAX_BYTES} bytes")
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise PasswordError("the password has control characters, such as a second line")
    return text


def hash_password(password: str) -> str:
    """The hash to be stored, as `$name$parameters$salt$digest`. Takes about 0.1 s of a processor, without the GIL."""
    argon2 = _argon2()
    if argon2 is not None:
        return str(argon2.PasswordHasher().hash(_bytes_of(password)))
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = _scrypt(_bytes_of(password), salt, SCRYPT_LN, SCRYPT_R, SCRYPT_P, _DIGEST_BYTES)
    return f"$scrypt$ln={SCRYPT_LN},r={SCRYPT_R},p={SCRYPT_P}${_text(salt)}${_text(digest)}"


def verify(encoded: str, password: str) -> bool:
    """Whether the password has this hash; takes as long as `hash_password`, whatever the answer.

    Raises PasswordError for what is no hash.
    """
    letters = password[:PASSWORD_MAX_LETTERS]
    whole = _bytes_of(letters)
    raw = whole[:PASSWORD_MAX_BYTES]  # a longer one is nobody's, and costs no more
    same = _verify_scrypt(encoded, raw) if encoded.startswith("$scrypt$") else _verify_argon2(encoded, raw)
    # scrypt's HMAC fills its key up with zeros, so that a password with one behind it has the same hash.
    return same and len(raw) == len(whole) and len(letters) == len(password) and b"\0" not in whole


def check_hash(encoded: str) -> None:
    """Raise PasswordError unless `verify` can use this hash within bounds of memory and time."""
    if match := _SCRYPT.fullmatch(encoded):
        ln, r, p = (int(match[number]) for number in (1, 2, 3))
        right = 1 <= ln <= 23 and 1 <= r <= 32 and 1 <= p <= 16 and 128 * r * p << ln <= MEMORY_MAX_BYTES
    elif match := _ARGON2ID.fullmatch(encoded):
        memory, turns, lanes = (int(match[number]) for number in (1, 2, 3))
        right = 8 * lanes <= memory <= MEMORY_MAX_BYTES >> 10 and 1 <= turns <= 16 and 1 <= lanes <= 16
        if _argon2() is None:
            raise PasswordError('the hash is argon2id: install "request-broker[users]"')
    else:
        raise PasswordError("the hash is neither scrypt nor argon2id")
    if not right or not 8 <= len(_raw(match[4])) <= 64 or not 16 <= len(_raw(match[5])) <= 64:
        raise PasswordError("the parameters of the hash are out of range")


def stand_in(encoded: str) -> str:
    """A hash of the same cost that no password has, for names that nobody has."""
    head = encoded.rsplit("$", 2)[0]
    return f"{head}${_text(secrets.token_bytes(_SALT_BYTES))}${_text(secrets.token_bytes(_DIGEST_BYTES))}"


def _bytes_of(password: str) -> bytes:
    """What is hashed: the same for the ways in which systems compose an umlaut (RFC 8265, section 4.2.1)."""
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")


def _scrypt(raw: bytes, salt: bytes, ln: int, r: int, p: int, size: int) -> bytes:
    memory = 128 * r * ((1 << ln) + p + 2)  # OpenSSL's own account of it
    return hashlib.scrypt(raw, salt=salt, n=1 << ln, r=r, p=p, maxmem=memory, dklen=size)


def _argon2() -> Any:
    try:
        import argon2
    except ImportError:
        return None
    return argon2


def _verify_scrypt(encoded: str, raw: bytes) -> bool:
    match = _SCRYPT.fullmatch(encoded)
    if match is None:
        raise PasswordError("the hash is no scrypt hash")
    ln, r, p = (int(match[number]) for number in (1, 2, 3))
    salt, digest = _raw(match[4]), _raw(match[5])
    return hmac.compare_digest(_scrypt(raw, salt, ln, r, p, len(digest)), digest)


def _verify_argon2(encoded: str, raw: bytes) -> bool:
    argon2 = _argon2()
    if argon2 is None:
        raise PasswordError("the hash is neither scrypt nor argon2id")
    try:
        argon2.PasswordHasher().verify(encoded, raw)
    except argon2.exceptions.VerifyMismatchError:
        return False
    except argon2.exceptions.Argon2Error as error:
        raise PasswordError(f"the hash cannot be checked ({type(error).__name__})") from None
    return True


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


def _raw(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise PasswordError("the hash is no base64") from None
