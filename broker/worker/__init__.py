"""What workers use: `Worker` serves functions, `current()` tells a function about its request, `Fault` is an answer."""

from broker.worker.faults import Fault
from broker.worker.requests import NoRequest, Request, current

__all__ = ["Fault", "NoRequest", "Request", "current"]
