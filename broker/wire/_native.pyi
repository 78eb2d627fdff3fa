"""The hot path of the wire in C; see `native`."""

from collections.abc import Callable
from typing import Any, Protocol

class Marks(Protocol):
    def mark(self, link: Any) -> None: ...

class Reader:
    """Reads the plain frames of one link."""

    decoded_bytes: int
    """payloads of the messages that became events"""

    def __init__(self, masked: bool, message_max_bytes: int, events_max: int) -> None: ...
    def decode_for(
        self, session: object, prefix: bytes, routes: dict[str, tuple[str, str]], defaults: object
    ) -> None: ...
    def read(self, data: bytes | bytearray | memoryview, position: int, stop: int, events: list[Any]) -> int: ...
    def begins(self, data: bytes | bytearray | memoryview, position: int, stop: int, bytes: int) -> bool: ...

class Writer:
    """Writes the plain messages of one link."""

    def __init__(
        self, prefix: bytes, endpoint: str, outbox: object, marks: Marks, soft_bytes: int, meta: bool
    ) -> None: ...
    def write(self, message: object, n: int = 0) -> bool: ...

class Feeder:
    """Stands in the place of `Engine.feed_all`."""

    def __init__(
        self, engine: object, handlers: dict[type, Any], effects: list[Any], deadlines: object, expiry: object
    ) -> None: ...
    def __call__(self, events: list[Any], /) -> None: ...

class Matcher:
    """Takes plain requests through the tables of one router."""

    def __init__(
        self,
        requests: object,
        asked: Callable[[Any, float], None],
        answered: Callable[[Any, float], None],
        assigned: object,
        ended: object,
        done: object,
        caller: int,
        ok: str,
    ) -> None: ...
    def asked(self, event: object, now: float) -> None: ...
    def answered(self, event: object, now: float) -> None: ...

def know(
    asked: type,
    answered: type,
    body: type,
    call: type,
    end: type,
    attempt: type,
    request: type,
    options: type,
    reply_meta: type,
    ended_ok: object,
) -> None: ...
def know_core(types: tuple[type, ...], levels_max: int, small_bytes: int) -> None: ...
def know_outbox(link: type, writer: type, flush: Callable[[Any], None], links_per_slice: int) -> None: ...
def flush_all(writer: object) -> None: ...
def know_peer(session: type, peer: type) -> None: ...
def know_socket(
    socket_link: type,
    limits: type,
    links: type,
    counters: type,
    parser: type,
    get_buffer: Callable[..., memoryview],
    buffer_updated: Callable[..., None],
) -> None: ...
def get_buffer(link: object, sizehint: int) -> memoryview: ...
def buffer_updated(link: object, nbytes: int) -> None: ...
def flush(link: object) -> int: ...
def spread(frame: bytes, sessions: tuple[Any, ...]) -> list[Any]: ...
