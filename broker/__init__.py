"""A request broker: callers ask, workers that dialled out answer, every accepted request ends exactly once.

Names are fetched when first used, so that importing one part loads no other.
"""

from typing import TYPE_CHECKING

from broker._version import VERSION as __version__

if TYPE_CHECKING:
    from broker.auth.tokens import TokenStore
    from broker.auth.users import UserStore
    from broker.client.async_client import AsyncClient
    from broker.client.client import Client
    from broker.config.model import Config
    from broker.core.access import Grant, Principal, Role
    from broker.node.broker import Broker
    from broker.peer import errors
    from broker.peer.errors import BrokerError
    from broker.worker.worker import Worker

__all__ = [
    "AsyncClient", "Broker", "BrokerError", "Client", "Config", "Grant", "Principal", "Role", "TokenStore", "UserStore",
    "Worker", "__version__", "errors",
]  # fmt: skip

_HOMES = {
    "AsyncClient": "broker.client.async_client",
    "Broker": "broker.node.broker",
    "BrokerError": "broker.peer.errors",
    "Client": "broker.client.client",
    "Config": "broker.config.model",
    "Grant": "broker.core.access",
    "Principal": "broker.core.access",
    "Role": "broker.core.access",
    "TokenStore": "broker.auth.tokens",
    "UserStore": "broker.auth.users",
    "Worker": "broker.worker.worker",
    "errors": "broker.peer.errors",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'broker' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(home)
    return module if name == "errors" else getattr(module, name)
