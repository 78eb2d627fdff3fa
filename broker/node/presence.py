"""Who is at an endpoint, and the functions that are told when somebody comes to it or leaves."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from broker.core.access import Role
from broker.core.router import Router
from broker.core.sessions import Session
from broker.node.local import OwnPeer

log = logging.getLogger("broker")

Hook = Callable[["Peer"], Any]
"""A function or coroutine function; runs on the event loop, and what it raises is logged."""

ENDS_S = 1.0
"""how long a coroutine of a hook may take when the broker stops"""


class Peer:
    """Somebody connected to the broker. Equal to others of the same `name`, which no peer has a second time.

    `role` is as what it is attached, `remote` its address (empty for who is gone).
    """

    __slots__ = ("name", "principal", "remote", "role")

    def __init__(self, name: str, principal: str, role: str = "", remote: str = "") -> None:
        self.name = name
        self.principal = principal
        self.role = role
        self.remote = remote

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peer) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<peer {self.name} {self.principal} {self.remote}>"


class Presence:
    """Compares where sessions are with where they were, for endpoints that are watched. Everything on the loop.

    A peer is at the endpoint it is attached to (`/ws/NAME`), at those it serves, and at those it listens to. It comes
    once and leaves once, whatever it does there meanwhile; who is turned away never came.
    """

    def __init__(self, router: Router, loop: asyncio.AbstractEventLoop) -> None:
        self._router = router
        self._loop = loop
        self._hooks: dict[str, tuple[Hook | None, Hook | None]] = {}
        self._here: dict[str, dict[Session, Peer]] = {}
        self._due: deque[Callable[[], Any]] = deque()
        self._is_telling = False
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, endpoint: str, on_connect: Hook | None, on_disconnect: Hook | None) -> None:
        """Tell from now on who comes and leaves. Raises ValueError if somebody is told already."""
        if endpoint in self._hooks:
            raise ValueError(f"{endpoint} has its handlers already; close them first")
        self._router.state.tells_places = True
        self._hooks[endpoint] = on_connect, on_disconnect
        self._here[endpoint] = {session: self.peer(session) for session in self._at(endpoint)}

    def unwatch(self, endpoint: str) -> None:
        """Tell it no more."""
        self._hooks.pop(endpoint, None)
        self._here.pop(endpoint, None)
        self._router.state.tells_places = bool(self._hooks)

    def peers(self, endpoint: str) -> list[Peer]:
        """Who is at an endpoint, in the order they came; a walk over all sessions unless it is watched."""
        here = self._here.get(endpoint)
        return [self.peer(session) for session in self._at(endpoint)] if here is None else list(here.values())

    def find(self, name: str, principal: str) -> Peer:
        """The peer of that name; what is known of it if it has gone."""
        session = self._router.state.peer(name)
        return Peer(name, principal) if session is None else self.peer(session)

    def peer(self, session: Session) -> Peer:
        """What is told of a session."""
        role = (Role(session.role).name or "").lower()
        return Peer(self._router.state.peer_name(session), session.principal, role, session.remote)

    def _at(self, endpoint: str) -> Iterator[Session]:
        return (session for session in self._router.sessions.by_id.values() if endpoint in _places(session))

    # ------------------------------------------------------------ telling

    def changed(self, session: Session) -> None:
        """A session has come to an endpoint or left one. Whoever is to be told is told in the next turn of the loop."""
        places = _places(session)
        for endpoint, here in self._here.items():
            on_connect, on_disconnect = self._hooks[endpoint]
            if endpoint in places and session not in here:
                here[session] = peer = self.peer(session)
                self._tell(on_connect, peer)
            elif endpoint not in places and session in here:
                self._tell(on_disconnect, here.pop(session))

    def _tell(self, hook: Hook | None, peer: Peer) -> None:
        if hook is not None:
            self._due.append(partial(hook, peer))
            if not self._is_telling:
                self._is_telling = True
                self._loop.call_soon(self._tell_all)

    def _tell_all(self) -> None:
        try:
            while self._due:
                self._tell_one(self._due.popleft())
        finally:
            self._is_telling = bool(self._due)
            if self._is_telling:  # a hook ends the program; if that goes on, so do the others
                self._loop.call_soon(self._tell_all)

    def _tell_one(self, hook: Callable[[], Any]) -> None:
        try:
            told = hook()
            if inspect.iscoroutine(told):
                self._run(told)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the result of a cancelled future raises CancelledError, say
            log.exception("%r failed", hook)

    def _run(self, coroutine: Any) -> None:
        task = self._loop.create_task(_guarded(coroutine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Tell what is due still, and wait a little for the coroutines that were begun."""
        self._tell_all()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=ENDS_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        self._hooks.clear()
        self._here.clear()


def _places(session: Session) -> set[str | None]:
    """The endpoints a session is at; none if it is no more, or one of the broker's own."""
    if session.link is None or isinstance(session.link, OwnPeer):
        return set()
    places: set[str | None] = {session.endpoint}
    places.update(endpoint.name for endpoint in session.registrations)
    places.update(topic.endpoint.name for topic in session.subscriptions)
    return places


async def _guarded(coroutine: Any) -> None:
    try:
        await coroutine
    except Exception:
        log.exception("%r failed", coroutine)
