"""What holds for all tests."""

import signal
from collections.abc import Generator

import pytest

# A shell that starts the tests in the background has them ignore SIGINT, and so would every program they start and
# interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a report with a lone surrogate, as tests of bad text log and print it, pass from process to process."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
