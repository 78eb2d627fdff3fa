"""The front ends there are: found again by who they are, and counted."""

from __future__ import annotations

from typing import NamedTuple

from broker.auth.admission import Credential
from broker.config.model import Kernels
from broker.core.access import Principal, Role
from broker.core.events import Attached
from broker.engine.engine import Engine
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.transports.kernels.front_end import Dialect, FrontEnd
from broker.transports.kernels.pace import Pace


class Key(NamedTuple):
    """What has to be the same for a link to go on where another one was: who, at which kernel, in which session.

    A credential that differs begins anew: what was asked with the other ends, or not, with that.
    """

    principal: str
    token_id: str
    login_id: str
    expires_at: float | None
    endpoint: str
    session: str


def key_of(principal: Principal, endpoint: str, session: str) -> Key:
    """The key of a front end."""
    return Key(
        principal.name, principal.token_id, principal.login_id, principal.expires_at, endpoint, session
    )  # fmt: skip


class FrontEnds:
    """All front ends of one broker. `settings` are taken when one comes."""

    def __init__(self, engine: Engine, links: LoopLinks, settings: Kernels) -> None:
        self._engine = engine
        self._links = links
        self._settings = settings
        self._pace = Pace(engine)
        self._by_key: dict[Key, FrontEnd] = {}
        self._left_out_before = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def find(self, key: Key) -> FrontEnd | None:
        """The front end that has this key, away or not."""
        return self._by_key.get(key)

    def connect(self, key: Key, link: Link, dialect: Dialect, principal: Principal, credential: Credential) -> None:
        """Give a link to the front end it belongs to, made now if there is none."""
        front_end = self._by_key.get(key)
        if front_end is None:
            front_end = self._make(key, link.remote, principal, credential)
        front_end.connect(link, dialect)

    def _make(self, key: Key, remote: str, principal: Principal, credential: Credential) -> FrontEnd:
        engine = self._engine
        front_end = FrontEnd(engine, self._links, self._settings, self._pace, key.endpoint, lambda _: self._ended(key))
        self._by_key[key] = front_end
        number = engine.next_session()
        engine.feed(
            Attached(
                session=number, link=front_end, principal=principal.name, **credential, role=Role.CALLER,
                endpoint=key.endpoint, listen=False, remote=remote, dialect="jupyter",
            )
        )  # fmt: skip
        front_end.start(engine.router.sessions.by_id[number])
        return front_end

    def _ended(self, key: Key) -> None:
        self._left_out_before += self._by_key.pop(key).left_out

    def connections(self, endpoint: str) -> int:
        """How many are connected to a kernel now."""
        return sum(each.is_connected for key, each in self._by_key.items() if key.endpoint == endpoint)

    @property
    def connected(self) -> int:
        """How many have a link now."""
        return sum(each.is_connected for each in self._by_key.values())

    @property
    def left_out(self) -> int:
        """Messages of kernels that found no room while their front end was away or read slowly."""
        return self._left_out_before + sum(each.left_out for each in self._by_key.values())
