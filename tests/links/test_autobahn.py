"""The conformance cases of the Autobahn suite on each kind of link, where the suite is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.autobahn import LINKS, SHORT_CASES, failures, run

WSTEST = os.environ.get("BROKER_AUTOBAHN", "")


@pytest.mark.timeout(180)
@pytest.mark.skipif(not WSTEST, reason="BROKER_AUTOBAHN does not name the suite's wstest (benchmarks/autobahn.py)")
@pytest.mark.parametrize("link", LINKS)
def test_all_cases_pass(link: str) -> None:
    records = run(Path(WSTEST), link, SHORT_CASES, timeout_s=150)
    assert len(records) > 240
    assert failures(records) == {}
