"""Who may do what where: roles, grants, principals, and the rule for names."""

import enum
import re

import msgspec

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""What endpoints, methods and topics may be called; always matched in full."""


class Role(enum.IntFlag):
    """What a grant allows at an endpoint. CALLER and WORKER include LISTENER; ADMIN includes everything."""

    NONE = 0
    CALLER = 1
    WORKER = 2
    LISTENER = 4
    ADMIN = 8


ROLE_NAMES = {role.name.lower(): role for role in (Role.CALLER, Role.WORKER, Role.LISTENER, Role.ADMIN) if role.name}


class Grant(msgspec.Struct, frozen=True):
    """Roles at every endpoint whose name matches one of the patterns (a name in which `*` stands for any run)."""

    roles: Role
    endpoints: tuple[str, ...] = ("*",)


class Principal(msgspec.Struct, frozen=True):
    """Somebody who proved who they are.

    `expires_at` is wall-clock time in Unix seconds, None for never. `kind` says how they proved it
    (`token`, `curve`, `zeromq`, `user`, `ticket`, `login`, `admin`, `local`, `host`), `token_id` by which stored token,
    if by one, `login_id` by which sign-in, if by one, `user_id` by which entry among the users, if by a password.
    """

    name: str
    grants: tuple[Grant, ...]
    expires_at: float | None = None
    kind: str = "token"
    token_id: str = ""
    login_id: str = ""
    user_id: str = ""


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
    return any(_matches(pattern.split("*"), endpoint) for pattern in patterns)


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
    roles = Role.NONE
    for grant in grants:
        if grant.roles and covers(grant.endpoints, endpoint):
            roles |= grant.roles
    if roles & Role.ADMIN:
        roles |= Role.CALLER | Role.WORKER
    if roles & (Role.CALLER | Role.WORKER):
        roles |= Role.LISTENER
    return roles


def only_listening(grants: tuple[Grant, ...]) -> tuple[Grant, ...]:
    """What grants are worth to who attached only to listen: every role includes listening."""
    return tuple(Grant(Role.LISTENER, grant.endpoints) for grant in grants if grant.roles)


def may_speak(grants: tuple[Grant, ...]) -> bool:
    """Whether the grants allow more than to listen, somewhere."""
    return any(grant.roles & ~Role.LISTENER for grant in grants)


def is_admin(grants: tuple[Grant, ...]) -> bool:
    """Whether the grants open the broker's own administration (`broker.admin.*`)."""
    return any(grant.roles & Role.ADMIN for grant in grants)
