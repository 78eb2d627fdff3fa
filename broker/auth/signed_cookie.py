"""Cookies whose values bear a signature of this process, so that no other broker's is taken for one of ours."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

VALUE_MAX = 512
"""characters of a value that is looked at"""


class Signer:
    """Signs values with HMAC-SHA256 under a key that lives and dies with this object."""

    __slots__ = ("_key",)

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, name: str, value: str) -> str:
        """The text of a cookie `name` that stands for `value`; visible ASCII as long as the value is."""
        return f"{value}.{self._signature(name, value)}"

    def read(self, name: str, text: str) -> str | None:
        """The value, None if this was not signed here under this name. Takes as long for any text of that length."""
        if len(text) > VALUE_MAX or not text.isascii():
            return None
        value, _, signature = text.rpartition(".")
        return value if hmac.compare_digest(signature, self._signature(name, value)) else None

    def _signature(self, name: str, value: str) -> str:
        mac = hmac.digest(self._key, f"{name}={value}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(mac).decode().rstrip("=")
