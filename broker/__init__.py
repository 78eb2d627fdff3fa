"""A request broker: callers ask, workers that dialled out answer, every accepted request ends exactly once.

Names are fetched when first used, so that importing one part loads no other.
"""

from typing import TYPE_CHECKING

from broker._version import VERSION as __version__

if TYPE_CHECKING:
    from broker.node.broker import Broker

__all__ = ["Broker", "__version__"]

_HOMES = {"Broker": "broker.node.broker"}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'broker' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)
