"""What `broker` exports: there, and loaded only when it is asked for."""

import subprocess
import sys

import pytest

import broker


@pytest.mark.parametrize("name", broker.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(broker, name) is not None


def test_a_name_that_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Clients'"):
        _ = broker.Clients


def test_importing_the_package_loads_nothing_of_it() -> None:
    program = """
import sys, broker
assert not {name for name in sys.modules if name.startswith("broker.")} - {"broker._version"}
import broker.core.router
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"tornado", "zmq", "asyncio", "numpy"}, loaded
from broker import Client, errors
assert errors.DeadlineExceeded
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"tornado", "zmq", "numpy", "uvloop", "prometheus_client"}, loaded
assert not {name.split(".")[1] for name in sys.modules if name.startswith("broker.")} & {"engine", "node", "cli"}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
