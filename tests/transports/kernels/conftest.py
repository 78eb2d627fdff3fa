"""One broker with one real kernel for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.transports.kernels.harness import House


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """A broker with the kernel `k1`."""
    with House() as house:
        house.kernel("k1")
        yield house
