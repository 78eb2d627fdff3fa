"""Every library calls every other."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.foreign.conftest import Libraries
from tests.foreign.harness import BrokerProcess, Caller, attached
from tests.foreign.libraries import CALLERS, NODE, PYTHON, WORKERS


@pytest.mark.parametrize("serving", [PYTHON, NODE])
@pytest.mark.parametrize("calling", [PYTHON, NODE])
def test_every_library_calls_every_other(
    libraries: Libraries, broker: BrokerProcess, calling: str, serving: str
) -> None:
    with ExitStack() as stack:
        workers = [name for name, worker in WORKERS.items() if worker.language == serving]
        for name in workers:
            stack.enter_context(attached(libraries("worker", name), broker.ws(f"/ws/pair-{name}?role=worker")))
        for name in [name for name, caller in CALLERS.items() if caller.language == calling]:
            caller = stack.enter_context(Caller(libraries("caller", name), broker.ws("/ws")))
            for worker in workers:
                text = f"{name} → {worker}"
                assert caller.call(f"pair-{worker}/echo", {"value": text}) == text
                assert caller.call(f"pair-{worker}/subtract", [42, 23]) == 19
