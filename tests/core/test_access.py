"""Names, patterns, grants."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.access import (
    NAME,
    PRINCIPAL_MAX,
    Grant,
    Principal,
    Role,
    covers,
    is_admin,
    is_name,
    is_pattern,
    may_speak,
    only_listening,
    roles_at,
)
from broker.core.sessions import ROLES_REMEMBERED
from tests.core.harness import World


@pytest.mark.parametrize("name", ["a", "_", "A.b-c_9", "0", "x" * 128, "__proto__", "constructor"])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".a",
        "-a",
        "a b",
        "a\n",
        "\na",
        "a/b",
        "../a",
        "a\x00",
        "*",
        "a*",
        "é",
        "x" * 129,
        "a\r\n",
        "a" * 10**6,
        "1٣",
    ],
)
def test_row_24_what_is_no_name(name: str) -> None:
    assert not is_name(name)


@given(st.text())
def test_names_are_matched_in_full(text: str) -> None:
    plain = len(text) <= 128 and bool(text) and all(c.isascii() and (c.isalnum() or c in "_.-") for c in text)
    assert is_name(text) == (plain and text[0] not in ".-")


@given(st.from_regex(NAME, fullmatch=True), st.sampled_from(["\n", "\x00", "/", " ", "\u2028"]))
def test_row_24_a_name_with_something_behind_it_is_none(name: str, more: str) -> None:
    assert is_name(name) and not is_name(name + more)


@pytest.mark.parametrize("pattern", ["*", "a*", "*a", "a.*.b", "a", "**"])
def test_patterns(pattern: str) -> None:
    assert is_pattern(pattern)


@pytest.mark.parametrize("pattern", ["", "a b*", "*\n", "[a]", "a?", "a/*"])
def test_what_is_no_pattern(pattern: str) -> None:
    assert not is_pattern(pattern)


def plainly_covers(pattern: str, name: str) -> bool:
    """By trying: a star takes any run of characters."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(plainly_covers(pattern[1:], name[at:]) for at in range(len(name) + 1))
    return bool(name) and name[0] == pattern[0] and plainly_covers(pattern[1:], name[1:])


@given(st.text("ab.*", max_size=6), st.text("ab.", max_size=8))
def test_patterns_cover_as_a_plain_matcher_says(pattern: str, name: str) -> None:
    assert covers((pattern,), name) == plainly_covers(pattern, name)


def test_a_dot_in_a_pattern_is_a_dot() -> None:
    assert not covers(("a.b",), "axb") and covers(("x", "a.b"), "a.b") and not covers((), "a")


def test_roles_imply_others() -> None:
    everywhere = ("*",)
    assert roles_at((Grant(Role.CALLER, everywhere),), "e") == Role.CALLER | Role.LISTENER
    assert roles_at((Grant(Role.WORKER, everywhere),), "e") == Role.WORKER | Role.LISTENER
    assert roles_at((Grant(Role.LISTENER, everywhere),), "e") == Role.LISTENER
    assert roles_at((Grant(Role.ADMIN, everywhere),), "e") == Role.ADMIN | Role.CALLER | Role.WORKER | Role.LISTENER
    assert roles_at((), "e") == Role.NONE == roles_at((Grant(Role.NONE),), "e")


def test_grants_add_up_per_endpoint() -> None:
    grants = (Grant(Role.CALLER, ("a*",)), Grant(Role.WORKER, ("*b",)))
    assert roles_at(grants, "ab") == Role.CALLER | Role.WORKER | Role.LISTENER
    assert not roles_at(grants, "a") & Role.WORKER and roles_at(grants, "c") == Role.NONE


def test_is_admin() -> None:
    assert is_admin((Grant(Role.CALLER), Grant(Role.ADMIN))) and not is_admin((Grant(Role.CALLER),))


@pytest.mark.parametrize("role", [Role.CALLER, Role.WORKER, Role.LISTENER, Role.ADMIN])
def test_of_every_role_listening_is_left_to_who_only_listens(role: Role) -> None:
    (left,) = only_listening((Grant(role, ("a*",)), Grant(Role.NONE, ("b",))))
    assert left == Grant(Role.LISTENER, ("a*",)) and not may_speak((left,))
    assert may_speak((Grant(role),)) == (role is not Role.LISTENER)
    assert not may_speak(()) and not may_speak((Grant(Role.NONE),))


def test_remembered_roles_are_bounded_and_right() -> None:
    world = World()
    peer = world.attach(grants=(Grant(Role.CALLER, ("a*",)),))
    for number in range(ROLES_REMEMBERED * 2):
        assert peer.may(Role.CALLER, f"a{number}") and not peer.may(Role.CALLER, f"b{number}")
        assert len(peer.roles) <= ROLES_REMEMBERED


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ((Role.CALLER, "scan*"), r"tuple of patterns: \('scan\*',\)"),
        ((Role.CALLER, ["scan*"]), "tuple of patterns"),
        ((Role.CALLER, None), "tuple of patterns"),
        ((Role.CALLER, (3,)), "is for 3; expected the name"),
        (("caller", ("scan",)), r"are 'caller'; expected Role\.CALLER"),
        (((Role.CALLER, Role.WORKER), ("scan",)), r"expected Role\.CALLER \| Role\.WORKER"),
        ((3, ("scan",)), r"expected Role\.CALLER"),
    ],
)
def test_a_grant_of_wrong_types_is_none(arguments: Any, right: str) -> None:
    with pytest.raises(TypeError, match=right):
        Grant(*arguments)


@pytest.mark.parametrize("pattern", ["", "a b", "../a", "*/*", "a\n", "-*", "x" * 129])
def test_a_grant_for_what_is_no_pattern_is_none(pattern: str) -> None:
    with pytest.raises(ValueError, match="expected the name of an endpoint"):
        Grant(Role.CALLER, ("scan", pattern))


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (("a", Grant(Role.CALLER)), r"grants of a are .*; expected a tuple of Grant"),
        (("a", [Grant(Role.CALLER)]), "expected a tuple of Grant"),
        (("a", ("scan",)), "expected a tuple of Grant"),
        ((b"a", ()), "expected a text"),
        (("a", (), "tomorrow"), "expected Unix seconds"),
        (("a", (), float("nan")), "expected Unix seconds"),
    ],
)
def test_a_principal_of_wrong_types_is_none(arguments: Any, right: str) -> None:
    with pytest.raises(TypeError, match=right):
        Principal(*arguments)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "a\x00", "\ud800", "\u202ea", "x" * (PRINCIPAL_MAX + 1)])
def test_a_principal_has_a_name_that_can_be_shown(name: str) -> None:
    with pytest.raises(ValueError, match="printable characters"):
        Principal(name, ())
    assert Principal("Zoë O'Hara <zoe@lab.example>", ()).name
