"""Who may do what where: roles, grants, principals, and the rule for names."""

import enum
import math
import re

import msgspec

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""What endpoints, methods and topics may be called; always matched in full."""
PRINCIPAL_MAX = 256
"""characters of a principal's name, which may be an address or a full name in any script"""


class Role(enum.IntFlag):
    """What a grant allows at an endpoint. CALLER and WORKER include LISTENER; ADMIN includes everything."""

    NONE = 0
    CALLER = 1
    WORKER = 2
    LISTENER = 4
    ADMIN = 8


_CALLER, _WORKER, _LISTENER, _ADMIN = (int(role) for role in (Role.CALLER, Role.WORKER, Role.LISTENER, Role.ADMIN))

ROLE_NAMES = {role.name.lower(): role for role in (Role.CALLER, Role.WORKER, Role.LISTENER, Role.ADMIN) if role.name}


class Grant(msgspec.Struct, frozen=True):
    """Roles at every endpoint whose name matches one of the patterns (a name in which `*` stands for any run).

    Making one raises TypeError for what is no Role and no tuple of texts, ValueError for a text that is no pattern.
    """

    roles: Role
    endpoints: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not isinstance(self.roles, Role):
            raise TypeError(f"the roles of a grant are {self.roles!r:.80}; expected Role.CALLER | Role.WORKER, say")
        _check_patterns(self.endpoints)


def _check_patterns(endpoints: object) -> None:
    if not isinstance(endpoints, tuple):  # a text would be taken letter by letter, and its `*` for everything
        example = f"({endpoints!r:.140},)" if isinstance(endpoints, str) else '("scanner", "plots*")'
        kind = type(endpoints).__name__
        raise TypeError(f"the endpoints of a grant are a {kind}; expected a tuple of patterns: {example}")
    for pattern in endpoints:
        if not isinstance(pattern, str):
            raise TypeError(f"a grant is for {pattern!r:.80}; expected the name of an endpoint, `*` in it or not")
        if not is_pattern(pattern):
            raise ValueError(
                f"a grant is for {pattern!r:.140}; expected the name of an endpoint, 1 to 128 of A-Z a-z 0-9 _ . - *, "
                "neither . nor - at its start"
            )


class Principal(msgspec.Struct, frozen=True):
    """Somebody who proved who they are.

    `expires_at` is wall-clock time in Unix seconds, None for never. `kind` says how they proved it
    (`token`, `curve`, `zeromq`, `user`, `ticket`, `login`, `admin`, `local`, `host`), `token_id` by which stored token,
    if by one, `login_id` by which sign-in, if by one, `user_id` by which entry among the users, if by a password.

    Making one raises TypeError for grants that are none and a moment that is no number, ValueError for a name that is
    empty, longer than PRINCIPAL_MAX characters or not printable: names stand in logs, on pages and in `meta`.
    """

    name: str
    grants: tuple[Grant, ...]
    expires_at: float | None = None
    kind: str = "token"
    token_id: str = ""
    login_id: str = ""
    user_id: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"a principal's name is {self.name!r:.80}; expected a text")
        if not (1 <= len(self.name) <= PRINCIPAL_MAX and self.name.isprintable()):
            raise ValueError(
                f"a principal's name is {self.name!r:.140}; expected 1 to {PRINCIPAL_MAX} printable characters"
            )
        if not isinstance(self.grants, tuple) or not all(isinstance(grant, Grant) for grant in self.grants):
            raise TypeError(
                f"the grants of {self.name} are {self.grants!r:.140}; expected a tuple of Grant, of one: (Grant(…),)"
            )
        if self.expires_at is not None and (
            not isinstance(self.expires_at, int | float) or math.isnan(self.expires_at)
        ):
            raise TypeError(f"{self.name} expires at {self.expires_at!r:.80}; expected Unix seconds, or None")


def role_name(role: Role) -> str:
    """A role as people write it; several are joined by "or"."""
    return " or ".join(name for name, each in ROLE_NAMES.items() if each & role)


def is_name(text: str) -> bool:
    """Whether `text` may name an endpoint, a method or a topic."""
    return NAME.fullmatch(text) is not None


def is_pattern(text: str) -> bool:
    """Whether `text` is an endpoint pattern: a name in which `*` may stand anywhere."""
    return is_name(text.replace("*", "a")) if text else False


def covers(patterns: tuple[str, ...], endpoint: str) -> bool:
    """Whether one of the patterns matches the endpoint's whole name. Linear in both lengths, whatever they hold."""
    return "*" in patterns or any(_matches(pattern.split("*"), endpoint) for pattern in patterns)


def _matches(pieces: list[str], name: str) -> bool:
    """Whether the name is the pieces in order, with anything between them."""
    if len(pieces) == 1:
        return name == pieces[0]
    first, *middle, last = pieces
    if not (name.startswith(first) and name.endswith(last) and len(name) >= len(first) + len(last)):
        return False
    at, end = len(first), len(name) - len(last)
    for piece in middle:
        at = name.find(piece, at, end)
        if at < 0:
            return False
        at += len(piece)
    return True


def roles_at(grants: tuple[Grant, ...], endpoint: str) -> Role:
    """All that the grants allow at an endpoint, implied roles included."""
    return Role(role_bits(grants, endpoint))


def role_bits(grants: tuple[Grant, ...], endpoint: str) -> int:
    """The same as a plain integer: 0.3 µs with one grant.

    It is on the way of each request of a caller who asks more endpoints in turn than are remembered for it.
    """
    bits = 0
    for grant in grants:
        if covers(grant.endpoints, endpoint):
            bits |= int(grant.roles)
    if bits & _ADMIN:
        bits |= _CALLER | _WORKER
    if bits & (_CALLER | _WORKER):
        bits |= _LISTENER
    return bits


def only_listening(grants: tuple[Grant, ...]) -> tuple[Grant, ...]:
    """What grants are worth to who attached only to listen: every role includes listening."""
    return tuple(Grant(Role.LISTENER, grant.endpoints) for grant in grants if grant.roles)


def may_speak(grants: tuple[Grant, ...]) -> bool:
    """Whether the grants allow more than to listen, somewhere."""
    return any(grant.roles & ~Role.LISTENER for grant in grants)


def is_admin(grants: tuple[Grant, ...]) -> bool:
    """Whether the grants open the broker's own administration (`broker.admin.*`)."""
    return any(grant.roles & Role.ADMIN for grant in grants)
