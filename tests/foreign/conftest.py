"""One broker for all tests of this folder, and each library's process started once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.foreign.harness import BrokerProcess, Library
from tests.foreign.libraries import CALLERS, WORKERS, command

Libraries = Callable[[str, str], Library]
_endpoints = itertools.count(1)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker that logs all it ever logs."""
    process = BrokerProcess(tmp_path_factory.mktemp("broker"), BROKER_LOG__LEVEL="debug")
    yield process
    process.stop()


@pytest.fixture
def endpoint() -> str:
    """A name that no other test uses."""
    return f"endpoint-{next(_endpoints)}"


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libraries]:
    """The process of a library in a role."""
    running: dict[tuple[str, str], Library] = {}

    def get(role: str, name: str) -> Library:
        if (role, name) not in running:
            language = (CALLERS if role == "caller" else WORKERS)[name].language
            folder: Path = tmp_path_factory.mktemp(f"{role}-{name}")
            running[role, name] = Library(name, command(role, language, name), folder)
        return running[role, name]

    yield get
    for library in running.values():
        library.stop()


@pytest.fixture(params=CALLERS)
def calling(request: pytest.FixtureRequest, libraries: Libraries) -> Library:
    """Each library that calls."""
    return libraries("caller", request.param)


@pytest.fixture(params=WORKERS)
def working(request: pytest.FixtureRequest, libraries: Libraries) -> Library:
    """Each library that serves."""
    return libraries("worker", request.param)
