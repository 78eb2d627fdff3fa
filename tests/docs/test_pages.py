"""What the pages say of the code is so: generated tables, names of functions, keys, metrics, links between pages."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from broker.admin.metrics import Collector, Lag, Sources
from broker.auth.authenticate import AuthCounters
from broker.cli.main import cli
from broker.config.fields import FIELDS
from broker.core import events
from broker.core.commands import CallParams
from broker.core.errors import CLOSES, KINDS
from broker.core.limits import Limits
from broker.core.options import Written
from broker.core.router import Router
from broker.peer import errors
from broker.transports.websocket.query import _Query
from broker.transports.zeromq.counters import ZmqCounters
from broker.wire.pieces import join_reply
from tests.docs.blocks import PAGES, ROOT, blocks_of, prose_of
from tests.docs.render import errors_table, outcomes_page

DOCS = ROOT / "docs"
SHOWN_WHOLE = ("call", "broadcast", "listen", "demo", "work files")
"""commands whose every option the guide names"""


def test_the_page_of_outcomes_is_the_generated_one() -> None:
    page = DOCS / "outcomes.md"
    if os.environ.get("UPDATE_DOCS") == "1":
        page.write_text(outcomes_page(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == outcomes_page(), "run: UPDATE_DOCS=1 pytest tests/docs"


def test_the_page_of_outcomes_has_them_all() -> None:
    page = outcomes_page()
    assert all(f"`{kind.name}`" in page and kind.advice in page for kind in KINDS)
    assert all(f"| {close.code} | `{close.name}` |" in page for close in CLOSES)


def test_the_errors_of_the_sdk_are_the_generated_ones() -> None:
    page = DOCS / "sdk.md"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition("<!-- errors -->\n")
    _, end, after = rest.partition("<!-- /errors -->")
    assert begin and end
    right = f"{before}{begin}{errors_table()}\n{end}{after}"
    if os.environ.get("UPDATE_DOCS") == "1":
        page.write_text(right, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == right, "run: UPDATE_DOCS=1 pytest tests/docs"


def test_the_errors_of_the_sdk_are_all_there() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BrokerError)]
    assert all(f"| `{kind.__name__}` |" in errors_table() for kind in kinds if kind is not errors.BrokerError)


# ---------------------------------------------------------------- the command line


def test_the_guide_shows_every_command() -> None:
    text = (DOCS / "guide.md").read_text(encoding="utf-8")
    code = "\n".join(block.text for block in blocks_of(DOCS / "guide.md"))
    for name, command in _commands(cli, ()):
        assert re.search(rf"\bbroker {name}\b", code), f"no example of broker {name}"
        flags = {flag for option in command.params for flag in option.opts if flag.startswith("--")}
        missing = {flag for flag in flags if flag not in text} if name in SHOWN_WHOLE else set()
        assert not missing, f"broker {name}"


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    """All commands that are no groups and not hidden, by their full names."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        elif command is not None and not command.hidden:
            yield " ".join((*path, name)), command


# ---------------------------------------------------------------- the protocol


def _protocol() -> str:
    return (DOCS / "protocol.md").read_text(encoding="utf-8")


def test_the_protocol_names_every_method_of_the_broker() -> None:
    router = Router(Limits(), join=join_reply)
    named = set(re.findall(r"^\| `(broker\.[\w.]+)`", _protocol(), re.MULTILINE))
    assert named == {"broker.call", *router.own_methods.commands}


def _rows(section: str) -> set[str]:
    """The words in code style in the first column of a section's tables."""
    text = re.split(r"^#+ ", _protocol().split(f"# {section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    firsts = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {word for first in firsts for word in re.findall(r"`([^`]+)`", first)}


def test_the_protocol_names_every_option() -> None:
    assert _rows("Options") == set(Written.__struct_fields__)
    assert set(CallParams.__struct_fields__) == {"endpoint", "method", "params", *Written.__struct_fields__}


def test_the_protocol_names_every_parameter_of_the_query() -> None:
    assert _rows("Query") == {"ticket", *_Query.__struct_fields__}


# ---------------------------------------------------------------- the architecture


def _architecture() -> str:
    return (DOCS / "architecture.md").read_text(encoding="utf-8")


def _definitions(file: Path) -> set[str]:
    """The dotted names of all classes, functions and constants of a module."""
    names: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    walk(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return names


REFERENCE = re.compile(r"`((?:broker|tests|benchmarks|configs|docs|examples)/[\w./]+(?::[\w.]+)?)`")
REFERENCES = sorted({(page.name, reference) for page in PAGES for reference in REFERENCE.findall(prose_of(page))})


@pytest.mark.parametrize(("page", "reference"), REFERENCES, ids=lambda value: str(value))
def test_what_a_page_points_to_exists(page: str, reference: str) -> None:
    path, _, name = reference.partition(":")
    assert (ROOT / path).exists(), f"{page} points to {path}"
    if name:
        assert name in _definitions(ROOT / path), f"{page} points to {name} in {path}"


def test_the_way_of_a_request_is_told_by_functions() -> None:
    story = _architecture().split("# Follow one request", 1)[1].split("\n## ", 1)[0]
    assert len(re.findall(r"`broker/[\w/]+\.py:[\w.]+`", story)) >= 12


def test_the_architecture_names_every_event_and_effect() -> None:
    text = _architecture()
    for union in (events.Event, events.Effect):
        for member in union.__args__:
            assert f"| `{member.__name__}` |" in text, f"{member.__name__} stands in no table"


def test_the_architecture_names_every_layer() -> None:
    text = _architecture()
    folders = {path.parent.name for path in (ROOT / "broker").glob("*/__init__.py")}
    missing = {folder for folder in folders if f"`{folder}`" not in text}
    assert not missing


# ---------------------------------------------------------------- names of keys and metrics


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_of_the_configuration_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"`(server|auth|limits|log)\.([a-z_]+)`", text)
    found += re.findall(r"BROKER_(SERVER|AUTH|LIMITS|LOG)__([A-Z_]+)", text)
    for section, key in found:
        assert key.lower() in FIELDS[section.lower()], f"{page.name}: {section}.{key}"


def metric_names() -> set[str]:
    """The names under which samples are scraped."""
    from broker.links.acceptor import AcceptCounters
    from broker.links.limits import LinkCounters

    class Links:
        links: tuple[()] = ()
        counters = LinkCounters()
        native = True

    class Accepting:
        unauthenticated = 0
        counters = AcceptCounters()

    class Door:
        counters = ZmqCounters()
        peers = connections = topics = 0

    router = Router(Limits(), join=join_reply)
    sources = Sources(router, Links(), AuthCounters(), Lag(), Accepting, zeromq=Door)  # type: ignore[arg-type]
    names: set[str] = set()
    for family in Collector(sources).collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])(broker_[a-z_]+)(?=[\s`\[{()]|$)", text, re.MULTILINE))
    unknown = named - metric_names()
    assert not unknown, f"{page.name} names metrics that are not there: {sorted(unknown)}"


def test_the_guide_has_metrics() -> None:
    text = (DOCS / "guide.md").read_text(encoding="utf-8")
    assert len(set(re.findall(r"broker_[a-z_]+", text)) & metric_names()) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_labels_of_metrics_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outcomes = {kind.name for kind in KINDS}
    for operator, value in re.findall(r'outcome(=~?|!=|!~)"([^"]+)"', text):
        assert set(value.split("|")) <= outcomes, f"{page.name}: outcome{operator}{value}"
    for _, value in re.findall(r'result(=~?|!=|!~)"([^"]+)"', text):
        assert set(value.split("|")) <= set(AuthCounters.__slots__), f"{page.name}: result {value}"


# ---------------------------------------------------------------- links


def _anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(other), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{page.name}" in text for page in DOCS.glob("*.md"))
