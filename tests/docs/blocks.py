"""Finds the fenced blocks of a Markdown file, each with its language, its options and where it stands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block. `options` are the words behind the language: `name` or `name=value`."""

    file: Path
    line: int
    language: str
    options: dict[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def place(self) -> str:
        """Where it stands, as editors and terminals understand it."""
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks_of(file: Path) -> list[Block]:
    """All fenced blocks of a file, in their order."""
    return list(_blocks(file, file.read_text(encoding="utf-8")))


def _blocks(file: Path, text: str) -> Iterator[Block]:
    for match in _FENCE.finditer(text):
        language, *words = shlex.split(match["info"]) or [""]
        options = {name: value for name, _, value in (word.partition("=") for word in words)}
        yield Block(file, text.count("\n", 0, match.start()) + 1, language, options, match["text"])


def prose_of(file: Path) -> str:
    """The file without its fenced blocks."""
    return _FENCE.sub("", file.read_text(encoding="utf-8"))
