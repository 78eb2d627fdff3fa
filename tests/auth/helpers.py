"""Clocks that stand still and a small, complete set of doors for the tests of authentication."""

from pathlib import Path

import pytest

from broker.auth import passwords
from broker.auth.authenticate import Authenticator
from broker.auth.facts import RequestFacts
from broker.auth.guesses import Guesses
from broker.auth.origins import HostRules
from broker.auth.tickets import Tickets
from broker.auth.tokens import TokenStore, admin_principal, local_principal, new_secret

ADMIN = "an-administrator-s-token-from-outside"


def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that cost microseconds instead of a tenth of a second: scrypt, argon2 installed or not."""
    monkeypatch.setattr(passwords, "SCRYPT_LN", 4)
    monkeypatch.setattr(passwords, "_argon2", lambda: None)


class Clock:
    """A clock that moves when told."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Doors:
    """An authenticator over a real file of tokens, with its parts and clocks at hand."""

    def __init__(self, folder: Path, *, per_minute: int = 1000) -> None:
        self.wall, self.steady = Clock(), Clock(50.0)
        self.store = TokenStore(folder / "tokens.json", clock=self.wall, monotonic=self.steady)
        self.tickets = Tickets(self.steady)
        self.local = new_secret()
        self.guesses = Guesses(self.steady, per_minute=per_minute)
        self.authenticator = Authenticator(
            HostRules([("127.0.0.1", 8787)], allowed_origins=["https://page.example"]),
            tokens=self.store,
            tickets=self.tickets,
            guesses=self.guesses,
            fixed={self.local: local_principal(), ADMIN: admin_principal()},
            clock=self.wall,
        )


def request(
    *headers: tuple[str, str], ticket: str | None = None, remote: str = "127.0.0.1", host: str | None = "localhost:8787"
) -> RequestFacts:
    """The facts of a WebSocket handshake."""
    return RequestFacts(
        method="GET",
        path="/ws/data",
        headers=((("host", host),) if host is not None else ()) + headers,
        query=(("ticket", ticket),) if ticket is not None else (),
        remote=remote,
    )


def bearer(token: str) -> tuple[str, str]:
    """The Authorization header of a token."""
    return "authorization", f"Bearer {token}"
