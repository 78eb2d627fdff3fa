"""One broker and one browser for the tests of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.admin.web.webdriver import Browser
from tests.javascript.harness import BrokerProcess


@pytest.fixture(scope="package")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker process."""
    process = BrokerProcess(tmp_path_factory.mktemp("broker"))
    yield process
    process.stop()


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser with a fresh profile."""
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()
