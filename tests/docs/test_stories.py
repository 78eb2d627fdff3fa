"""All code in the README and the docs runs: each page is a story, told to real processes."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, Block, blocks_of
from tests.docs.story import Story, Wrong


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    story = Story(tmp_path)
    try:
        for block in blocks_of(page):
            if "setup" not in block.options:
                story.run(block)
    except Wrong as wrong:
        pytest.fail(str(wrong), pytrace=False)
    finally:
        story.close()


# ---------------------------------------------------------------- the two commands


def _setup_commands() -> list[str]:
    blocks = [block for block in blocks_of(ROOT / "README.md") if "setup" in block.options]
    return [line for block in blocks for line in block.text.splitlines()]


def _fresh_copy(folder: Path) -> Path:
    """The repository as it would be cloned, with an environment that sees the libraries installed here.

    So that pip has to fetch nothing but what it builds with.
    """
    copy = folder / "repository"
    unwanted = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "node_modules")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    subprocess.run([sys.executable, "-m", "venv", ".venv"], cwd=copy, check=True)
    libraries = next((copy / ".venv" / "lib").glob("python3*")) / "site-packages"
    (libraries / "here.pth").write_text(sysconfig.get_path("purelib"))
    return copy


def test_there_are_two_commands() -> None:
    assert len(_setup_commands()) == 2


@pytest.mark.timeout(300)
def test_the_two_commands_work_in_a_fresh_copy(tmp_path: Path) -> None:
    first, second = _setup_commands()
    copy = _fresh_copy(tmp_path)
    (tmp_path / "story").mkdir()
    story = Story(tmp_path / "story")
    story.folder = copy
    story.patience_s = 120.0  # pip is at work
    story.environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    story.environment |= {"PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    story.environment["PATH"] = story.environment["PATH"].partition(":")[2]
    # Not all of them again.
    story.environment["PYTEST_ADDOPTS"] = "tests/docs/test_pages.py -k test_the_page_of_outcomes"
    story.environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = "1"
    del story.environment["PYTHONPATH"]
    here = ROOT / "README.md"
    try:
        story.run(
            Block(here, 1, "console", {}, f"$ {first}\n…\n  accepted … = ended … + pending 0\n  That was all, …\n")
        )
        story.run(Block(here, 2, "bash", {}, second))
    except Wrong as wrong:
        if "No matching distribution found for setuptools" in str(wrong):
            pytest.skip("no package index is reached")
        pytest.fail(str(wrong), pytrace=False)
    finally:
        story.close()


# ---------------------------------------------------------------- the runner itself


@pytest.mark.parametrize(
    ("language", "options", "text"),
    [
        ("bash", {}, "false"),
        ("bash", {"syntax": ""}, "if"),
        ("bash", {"background": "", "until": "never"}, "echo other"),
        ("console", {}, "$ echo a\nb"),
        ("console", {}, "no command"),
        ("python", {}, "raise SystemExit(3)"),
        ("python", {"file": "a.py"}, "def"),
        ("diff", {"file": "b.py"}, "-once\n+never\n"),
        ("diff", {"file": "b.py"}, "-twice\n+never\n"),
        ("json", {}, "{"),
        ("nginx", {}, "server {\n  listen 80\n}"),
        ("caddy", {}, "a {"),
        ("js", {}, "let a = ;"),
        ("html", {}, "<script>let a = ;</script>"),
        ("cobol", {}, ""),
        ("python", {"of": "setup.py"}, "nothing_of_the_kind()\n"),
        ("python", {"of": "tests/docs/story.py"}, "import ast\nimport contextlib\n"),
        ("python", {"of": "tests/docs/story.py"}, "import contextlib\n…\nimport ast\n"),
    ],
)
def test_a_block_that_is_wrong_is_noticed(language: str, options: dict[str, str], text: str, tmp_path: Path) -> None:
    story = Story(tmp_path)
    (tmp_path / "b.py").write_text("twice\ntwice\nat_once\n")
    try:
        with pytest.raises(Wrong, match=r"README.md:7|printed|expected"):
            story.run(Block(ROOT / "README.md", 7, language, options, text))
    finally:
        story.close()


def test_a_block_that_is_right_passes(tmp_path: Path) -> None:
    story = Story(tmp_path)
    page = ROOT / "README.md"
    try:
        story.run(Block(page, 1, "bash", {"background": "", "until": "up"}, "echo up; exec sleep 60"))
        story.run(Block(page, 2, "python", {"file": "a.py"}, "import os\nimport re\nprint('12:00')\n"))
        change = "-import os\n@@\n import re\n-print('12:00')\n+print('12:30 and more')\n"
        story.run(Block(page, 2, "diff", {"file": "a.py"}, change))
        story.run(Block(page, 4, "python", {"of": "tests/docs/story.py"}, "import json\n…\nself.folder = folder\n"))
        story.run(Block(page, 3, "console", {}, "$ python a.py\n12:… and more\n$ echo 1 \\\n  2\n1 2\n"))
    finally:
        story.close()
    assert [process.returncode for process in story._background] == [-signal.SIGTERM]
