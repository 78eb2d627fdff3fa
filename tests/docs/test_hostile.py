"""The table of attacks and faults: complete, and every test it names is there."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "hostile.md").read_text()
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \| (.*?) \|$", re.M)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
ATTACKS, FAULTS = PAGE.split("## Faults")


@lru_cache
def names_in(file: str) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", (REPOSITORY / file).read_text(), re.M))


def test_every_row_is_there_once() -> None:
    assert [int(row[0]) for row in ROW.findall(ATTACKS)] == list(range(1, 31))
    assert [int(row[0]) for row in ROW.findall(FAULTS)] == list(range(1, 17))


@pytest.mark.parametrize("part", [ATTACKS, FAULTS], ids=["attacks", "faults"])
def test_every_row_names_a_test_or_the_part_it_awaits(part: str) -> None:
    for number, _, promise, tests, _ in ROW.findall(part):
        assert promise
        assert NAMED.findall(tests) or tests.startswith("awaits "), f"row {number}"


def test_every_test_the_page_names_exists() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 60
    missing = [f"{file}::{name}" for file, name in named if name not in names_in(file)]
    assert not missing


def test_no_numbered_test_is_missing_from_its_row() -> None:
    rows = {f"row_{int(row[0]):02d}": row[3] for row in ROW.findall(ATTACKS)}
    rows |= {f"fault_{int(row[0]):02d}": row[3] for row in ROW.findall(FAULTS)}
    files = (path for path in (REPOSITORY / "tests").rglob("test_*.py") if "node_modules" not in path.parts)
    for path in files:
        file = path.relative_to(REPOSITORY).as_posix()
        for name in sorted(names_in(file)):
            numbered = re.match(r"test_((?:row|fault)_\d\d)_", name)
            if numbered:
                assert f"`{file}::{name}`" in rows[numbered[1]], f"docs/hostile.md, {numbered[1]}: {file}::{name}"
