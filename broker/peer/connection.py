"""Runs a session over asyncio: opens its link, opens it again when it breaks, and tells who waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import SplitResult, urlsplit, urlunsplit

from broker.core.errors import ABNORMAL, CLOSES, DRAINED, FORBIDDEN, GOING_AWAY, MESSAGE_TOO_BIG, NORMAL
from broker.links.connect import connect
from broker.links.handshake import HandshakeError
from broker.links.limits import LinkLimits
from broker.links.loop import LoopLinks
from broker.links.pair import AnyLink, PairLink
from broker.peer.backoff import Backoff
from broker.peer.calls import Tell
from broker.peer.errors import BrokerError, CannotConnect, ConnectionLost, InvalidRequest, Refused
from broker.peer.session import (
    DEFAULT_OPTIONS,
    JOINED_MAX_BYTES,
    MESSAGE_MAX_BYTES,
    Asked,
    CancelAsked,
    Ended,
    Heard,
    Item,
    ItemsEnded,
    Options,
    Pending,
    ProgressCame,
    Reader,
    Result,
    Room,
    Session,
)
from broker.peer.session import Owner as StreamOwner
from broker.peer.values import Attachments

if TYPE_CHECKING:
    from broker.links.zeromq_connect import Place

log = logging.getLogger("broker.peer")

Target = Callable[[], tuple["str | Place", str]]
"""Where the broker is and with which token, asked anew for every attempt to connect; raises OSError if unknown."""


class Near(Protocol):
    """A broker in this process: a link to it needs no socket."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it runs on. Raises RuntimeError before its start."""
        ...

    def open_link(self, links: LoopLinks) -> PairLink:
        """This end of a link, whose other end the broker holds already; on its loop. Raises Refused, CannotConnect."""
        ...


NEAR = "this process"
"""the place of a near broker, where that of another is its URL"""


def near_of(url: object, token: str | None) -> Near | None:
    """The broker of this process, if one was given in place of a URL. Raises TypeError for what is neither."""
    if url is None or isinstance(url, str):
        return None
    if not hasattr(url, "open_link"):
        raise TypeError(f"{url!r:.80} is neither the URL of a broker nor a Broker of this process")
    if token is not None:
        raise TypeError("a broker of this process takes no token; broker.local(principal) gives up rights")
    near: Near = url  # type: ignore[assignment]
    return near


OPEN_TIMEOUT_S = 10.0
TRIES_WITHIN_GRACE = 8
"""attempts to come back that a session's grace has room for, at least: a pause is no longer than its share of it"""
STEADY_S = 5.0
"""a link that held this long was a success: the next loss starts with short waits again"""

_NO_RETURN = frozenset(close.code for close in CLOSES if not close.come_back) - {MESSAGE_TOO_BIG.code}
# After 1009 it is the message that must not come back; `Session.detached` sees to that.
_ENDS_SESSION = frozenset(close.code for close in CLOSES if not close.come_back) | {GOING_AWAY.code, DRAINED.code}
"""after these the broker has nothing left of the session, with grace or without"""

QUERY = "binary=1&meta=1&stream=in"
"""what the SDK wants of its links: attachments as they are, what is said beside requests and replies, parts"""

_CLOSED_HERE = "the connection was closed on this side"


class Waiter(Protocol):
    """Who waits for the end of a call: a future of asyncio's or of `concurrent.futures`."""

    def done(self) -> bool:
        """Whether nobody needs to be told any more."""
        ...

    def set_result(self, result: Any, /) -> None:
        """It ended with this value."""

    def set_exception(self, exception: Any, /) -> None:
        """It ended with this error."""


class Owner(Protocol):
    """What a connection tells its owner, on the event loop."""

    def asked(self, request: Asked) -> None:
        """The broker gives this peer a request."""

    def cancel_asked(self, number: int | str) -> None:
        """Nobody waits for the answer to that request any more."""

    def heard(self, broadcast: Heard) -> None:
        """A broadcast came."""

    def item(self, number: int | str, value: Any) -> None:
        """The caller of that request sent an item. More come once `Connection.consumed` says that it was read."""

    def items_ended(self, number: int | str) -> None:
        """The caller of that request sends no more items."""

    def link_changed(self, up: bool, why: str) -> None:
        """There is a link (again), or none any more."""

    def standing_refused(self, key: tuple[str, ...], error: BrokerError) -> None:
        """What stood under `key` could not be repeated on a new link."""

    def gave_up(self, error: BrokerError) -> None:
        """The link is gone and there will be none again."""


class Connection:
    """A session with the broker at `target`, on the running event loop. Not thread-safe.

    With `reconnect` a broken link is opened again, with full jitter, until `close`; without it, the first loss is the
    end. Nothing raises because the link is gone: every call's waiter is told. For `grace_s` seconds the broker keeps
    the session of a broken link: if it comes back in time, nothing has happened. A value above `value_max_bytes` is
    neither sent nor taken. A broker that is `near` is reached without `target`, and once: such a link does not break.
    """

    __slots__ = (
        "_backoff", "_closing", "_congested", "_final", "_greeted", "_link", "_links", "_lost_at", "_near",
        "_opened_at", "_opening", "_owner", "_pump_due", "_reconnect", "_rooms", "_ssl_context", "_target", "_task",
        "_timer", "_timer_at", "loop", "session", "url",
    )  # fmt: skip

    def __init__(
        self,
        target: Target,
        owner: Owner,
        *,
        reconnect: bool = True,
        ssl_context: ssl.SSLContext | None = None,
        backoff: Backoff | None = None,
        grace_s: float = 0.0,
        value_max_bytes: int = JOINED_MAX_BYTES,
        near: Near | None = None,
    ) -> None:
        reconnect = reconnect and near is None
        self.session = Session(grace_s if reconnect else 0.0, value_max_bytes=value_max_bytes)
        self.url = ""
        self.loop = asyncio.get_running_loop()
        soft = LinkLimits().outbox_soft_bytes
        # A message is given to the link while its outbox is below the soft bound, so this is never exceeded.
        self._links = LoopLinks(LinkLimits(outbox_hard_bytes=soft + MESSAGE_MAX_BYTES + 65_536))
        self._target = target
        self._near = near
        self._owner = owner
        self._reconnect = reconnect
        self._ssl_context = ssl_context
        self._backoff = backoff or Backoff()
        self._link: AnyLink | None = None
        self._final: ConnectionLost | None = None
        self._greeted: asyncio.Future[None] | None = None
        self._rooms: dict[StreamOwner, list[asyncio.Future[None]]] = {}
        self._closing = False
        self._congested = False
        self._pump_due = False
        self._opened_at = 0.0
        self._lost_at = 0.0
        self._opening: asyncio.Lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")

    # ------------------------------------------------------------ life

    @property
    def is_up(self) -> bool:
        """Whether there is a link now, and the broker has said how the session stands."""
        return self.session.ready

    async def open(self, *, patient: bool = False, timeout_s: float | None = None) -> None:
        """Open the first link; does nothing if there is one. `patient` goes on trying, for as long as it makes sense.

        Raises CannotConnect (after `timeout_s` seconds too), Refused, InvalidRequest for a wrong URL, ConnectionLost
        after the end.
        """
        if self._near is not None:
            self.open_near()
            return
        try:
            async with asyncio.timeout(timeout_s), self._opening:
                if self._link is not None or self._task is not None:
                    return
                self._check_alive()
                if patient:
                    await self._keep_trying()
                else:
                    await self._open_link()
        except TimeoutError:
            raise _cannot(self.url, f"no answer within {timeout_s or 0.0:.3g} s") from None

    def open_near(self) -> None:
        """As `open`, at once, for a broker that is near. Raises ConnectionLost, Refused, CannotConnect."""
        if self._link is None:
            self._check_alive()
            assert self._near is not None
            self.url = NEAR
            self._begin(self._near.open_link(self._links))
            self._greet()

    async def close(self) -> None:
        """End the session: what has not ended becomes ConnectionLost; no task, timer or socket is left."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._greeted is not None and not self._greeted.done():
            self._greeted.set_exception(ConnectionLost(_CLOSED_HERE))
        self._give_up(_CLOSED_HERE)
        await self._links.close(NORMAL.code, "")

    def _check_alive(self) -> None:
        if self._closing:
            raise ConnectionLost(_CLOSED_HERE)
        if self._final is not None:
            raise ConnectionLost(self._final.detail)

    # ------------------------------------------------------------ asking

    def ask(
        self, name: str, params: bytes = b"", attachments: Attachments = (), options: Options = DEFAULT_OPTIONS,
        waiter: Waiter | None = None, *, reader: Reader | None = None, tell: Tell | None = None, sends: bool = False,
    ) -> Pending:  # fmt: skip
        """Ask; `waiter` is told how it ended, before that `reader` the items and `tell` the progress.

        Raises what `Session.ask` does, and ConnectionLost after the end.
        """
        if self._closing or self._final is not None:
            self._check_alive()
        session = self.session
        call = session.ask(
            name, params, attachments, options, waiter, time.monotonic(), reader=reader, sends=sends
        )  # fmt: skip
        call.tell = tell
        self._pump()
        if session.next_deadline() < self._timer_at:
            self._arm()
        return call

    async def request(
        self, name: str, params: bytes = b"", attachments: Attachments = (), options: Options = DEFAULT_OPTIONS
    ) -> Any:
        """Ask, and wait for the value. Cancelling the task cancels the request."""
        future = self.loop.create_future()
        call = self.ask(name, params, attachments, options, future)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(call)
            raise

    def cancel(self, call: Pending) -> None:
        """Take a call back; its waiter is told Cancelled unless it is done."""
        ended = self.session.cancel(call)
        if ended is not None:
            self._ended(ended)
            self._pump()

    def notify(self, name: str, params: bytes, attachments: Attachments) -> None:
        """Tell, without an answer. Raises ConnectionLost if there is no link."""
        self._check_alive()
        self.session.notify(name, params, attachments)
        self._pump()

    def flush(self) -> None:
        """Send what was put into the session's outbox from outside: answers."""
        self._pump()

    # ------------------------------------------------------------ streams

    def send_item(
        self, owner: StreamOwner, raw: bytes, attachments: Attachments = (), *, last: bool = False
    ) -> bool:  # fmt: skip
        """One more item of a call, or of the answer to a request, as JSON text; see `Session.send_item`.

        It is kept until it may go: wait for `room` before the next, or they pile up.
        """
        waits = self.session.send_item(owner, raw, attachments, last=last)
        if waits:
            self._pump()
        return waits

    async def room(self, owner: StreamOwner) -> bool:
        """Wait until every item given so far is on its way. False if nobody waits for them any more."""
        while not self.session.has_room(owner):
            future = self.loop.create_future()
            self._rooms.setdefault(owner, []).append(future)
            try:
                await future
            finally:
                self._leave_room(owner, future)
        return self.session.is_awaited(owner)

    def _leave_room(self, owner: StreamOwner, future: asyncio.Future[None]) -> None:
        waiting = self._rooms.get(owner, [])
        if future in waiting:
            waiting.remove(future)
            if not waiting:
                del self._rooms[owner]

    def consumed(self, owner: StreamOwner, items: int = 1) -> None:
        """So many items that came were read: more may come."""
        self.session.consumed(owner, items)
        if self.session.outbox:
            self._pump()

    def progress(self, number: int | str, done: float, total: float | None = None, text: str | None = None) -> bool:
        """Tell how far a request is. False if nobody wants to know, or there is no room for it just now."""
        self._pump()
        told = self.session.progress(number, done, total, text)
        self._pump()
        return told

    # ------------------------------------------------------------ what the link says

    def message(self, payload: bytes, binary: bool) -> None:
        """One whole message."""
        session = self.session
        try:
            for result in session.receive(payload, binary, time.monotonic()):
                self._perform(result)
        except ValueError as error:
            if self._link is not None:
                self._link.abort(ABNORMAL.code, str(error))
            return
        if self._greeted is not None and session.ready and not self._greeted.done():
            self._greeted.set_result(None)
        if session.outbox:
            self._pump()

    def congested(self, congested: bool) -> None:
        """The outbox is above its bound, or has room again."""
        self._congested = congested
        if not congested:
            self._pump()

    def closed(self, code: int, reason: str) -> None:
        """The link is gone."""
        link, self._link = self._link, None
        self._congested = False
        if link is None:
            return
        greeted = self._greeted
        if time.monotonic() - self._opened_at > STEADY_S:
            self._backoff.reset()
        broke = f"the connection to {self.url} broke{f': {reason}' if reason else ''}"
        why = broke if code == ABNORMAL.code else f"the broker closed the connection: {code} {reason}".rstrip()
        come_back = self._reconnect and not self._closing and code not in _NO_RETURN
        resumable = code not in _ENDS_SESSION
        results = self.session.detached(link.flushed, why, come_back=come_back, resumable=resumable)
        if greeted is not None:  # who opens it goes on, or does not
            if not greeted.done():
                greeted.set_exception(_unusable(self.url, why, come_back=code not in _NO_RETURN))
            for result in results:
                self._perform(result)
            return
        if come_back:
            self._lost_at = time.monotonic()
            self._task = self.loop.create_task(self._come_back())
        elif not self._closing:
            self._final = ConnectionLost(why)
        for result in results:
            self._perform(result)
        self._owner.link_changed(False, why)
        if self._final is not None and not self._closing:
            self._owner.gave_up(self._final)

    # ------------------------------------------------------------ details

    def _perform(self, result: Result) -> None:
        kind = type(result)
        if kind is Ended:
            self._ended(result)  # type: ignore[arg-type]
        elif kind is Asked:
            self._owner.asked(result)  # type: ignore[arg-type]
        elif kind is Heard:
            self._owner.heard(result)  # type: ignore[arg-type]
        elif kind is Item:
            self._item(result)  # type: ignore[arg-type]
        else:
            self._perform_rare(result)

    def _item(self, item: Item) -> None:
        if not isinstance(item.owner, Pending):
            self._owner.item(item.owner, item.value)
        elif item.owner.reader is not None:
            item.owner.reader.item(item.value)

    def _perform_rare(self, result: Result) -> None:
        if isinstance(result, CancelAsked):
            self._owner.cancel_asked(result.id)
            self._wake(result.id)
        elif isinstance(result, ProgressCame):
            call = result.call
            if call.tell is not None and not (call.waiter is not None and call.waiter.done()):
                call.tell(result.done, result.total, result.text)
        elif isinstance(result, ItemsEnded):
            self._owner.items_ended(result.owner)
        else:
            assert isinstance(result, Room)
            self._wake(result.owner)

    def _wake(self, owner: StreamOwner) -> None:
        """Whoever waits to send more may look again."""
        for future in self._rooms.pop(owner, ()):
            if not future.done():
                future.set_result(None)

    def _ended(self, ended: Ended) -> None:
        if self._rooms:
            self._wake(ended.call)
        waiter: Waiter | None = ended.call.waiter
        if waiter is None:
            if ended.call.standing and ended.error is None:
                self.session.stood(ended.call.standing, ended.value)
            elif ended.call.standing and ended.error is not None:
                self.session.unstand(ended.call.standing)
                self._owner.standing_refused(ended.call.standing, ended.error)
            return
        if waiter.done():
            return
        try:
            if ended.error is None:
                waiter.set_result(ended.value)
            else:
                waiter.set_exception(ended.error)
        except (asyncio.InvalidStateError, concurrent.futures.InvalidStateError):
            pass  # cancelled by another thread in this very moment
        except asyncio.CancelledError:
            log.exception("a done callback of a call of %s failed", ended.call.method)

    def _pump(self) -> None:
        """Give the link what waits, as far as its outbox has room."""
        link, session = self._link, self.session
        if link is None or self._congested:
            return
        soft = self._links.limits.outbox_soft_bytes
        while session.outbox:
            if link.outbox_bytes > soft:
                # The link writes at the end of this turn, and says `congested` if that was not enough.
                if not self._pump_due:
                    self._pump_due = True
                    self.loop.call_soon(self._pump_on)
                return
            frame = session.take(time.monotonic())
            if frame is None:
                return
            # The link uses the list up; a frame that is kept may be needed again.
            link.send_parts(list(frame.pieces) if frame.number else frame.pieces, frame.binary)
            if frame.call is not None:
                frame.call.mark = link.enqueued
            elif frame.then is not None:
                self._perform(frame.then)

    def _pump_on(self) -> None:
        self._pump_due = False
        self._pump()

    def _arm(self) -> None:
        due = self.session.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = due
        if due != float("inf") and not self._closing:
            self._timer = self.loop.call_later(max(0.0, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = float("inf")
        for result in self.session.expire(time.monotonic()):
            self._perform(result)
        self._pump()
        self._arm()

    async def _open_link(self) -> None:
        """One attempt. Raises CannotConnect, Refused or InvalidRequest."""
        try:
            place, token = self._target()
        except OSError as error:
            raise _cannot("", str(error)) from None
        self.url = str(place)
        if not token.isprintable():  # as from a file with Windows line ends
            raise InvalidRequest("the token holds line breaks or other control characters; no token does")
        offer = self.session.resume
        try:
            link: AnyLink
            if isinstance(place, str):
                link = await self._open_websocket(place, token, offer)
            else:
                link = await self._open_zeromq(place, token, offer)
        except HandshakeError as error:
            if offer is not None and error.status == 403:  # the session may be another's; this peer may still come
                self.session.forget()
            raise _refused(self.url, error, come_back=offer is not None) from None
        except TimeoutError:
            hint = "; is it a TLS port?" if self.url.startswith(("https:", "wss:")) else ""
            raise _cannot(self.url, f"no answer within {OPEN_TIMEOUT_S:g} s{hint}") from None
        except ssl.SSLCertVerificationError as error:
            raise _cannot(self.url, f"its certificate is not trusted: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise _cannot(self.url, f"TLS failed: {error.reason or error}; is it a TLS port?") from None
        except OSError as error:
            raise _cannot(self.url, _why(error)) from None
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if self._closing:
            link.abort()
            raise ConnectionLost(_CLOSED_HERE)
        self._begin(link)
        if not self.session.ready:
            await self._wait_greeted(link)
        self._greet()

    async def _open_websocket(self, url: str, token: str, offer: tuple[str, str, int] | None) -> AnyLink:
        """Raises what `links.connect.connect` does."""
        return await connect(
            websocket_url(url, self.session.grace_s, offer[2] if offer else 0), self._links,
            headers=[("Authorization", f"Bearer {token}")] if token else [],
            subprotocols=("jsonrpc", f"resume.{offer[0]}.{offer[1]}") if offer else (),
            ssl_context=self._ssl_context, open_timeout_s=OPEN_TIMEOUT_S,
        )  # fmt: skip

    async def _open_zeromq(self, place: Place, token: str, offer: tuple[str, str, int] | None) -> AnyLink:
        """Raises what `links.zeromq_connect.connect` does."""
        from broker.links import zeromq_connect  # pyzmq, for those alone who use it

        attachment: dict[str, Any] = {"meta": True, "stream": "in"}
        if self.session.grace_s:
            attachment["grace"] = self.session.grace_s
        if offer:
            attachment["resume"] = {"id": offer[0], "secret": offer[1], "received": offer[2]}
        return await zeromq_connect.connect(
            place, self._links, attachment=attachment, token=token, open_timeout_s=OPEN_TIMEOUT_S
        )

    def _begin(self, link: AnyLink) -> None:
        self._link = link
        self._opened_at = time.monotonic()
        link.start(self)
        self.session.attached(self._opened_at)

    def _greet(self) -> None:
        """The broker has said how the session stands, or need not."""
        self._pump()
        self._owner.link_changed(True, "")

    async def _wait_greeted(self, link: AnyLink) -> None:
        """Wait until the broker has said how the session stands. Raises CannotConnect or Refused if it does not."""
        self._greeted = self.loop.create_future()
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._greeted
        except BaseException as error:
            if self._link is link:  # else it has gone by itself
                link.abort()
                self._link = None
                self._congested = False
                self.session.detached(0, "the broker said nothing of the session", come_back=True)
            if isinstance(error, TimeoutError):
                raise _cannot(self.url, f"it says nothing of the session within {OPEN_TIMEOUT_S:g} s") from None
            raise
        finally:
            self._greeted = None

    async def _keep_trying(self) -> None:
        """Connect, however often it takes. Raises what does not pass: a refusal, a wrong URL."""
        while True:
            told = self._told()
            try:
                await self._open_link()
                return
            except Refused as error:
                if not error.come_back and self._told() == told:
                    raise
                reason = str(error)
            except CannotConnect as error:
                reason = str(error)
            wait_s = self._pause_s()
            log.info("%s; trying again in %.1f s", reason, wait_s)
            await asyncio.sleep(wait_s)

    def _told(self) -> str:
        """The token there is now: one that has changed may be accepted where the last was not."""
        try:
            return self._target()[1]
        except OSError:
            return ""

    async def _come_back(self) -> None:
        try:
            await asyncio.sleep(self._pause_s())
            await self._keep_trying()
        except BrokerError as error:
            self._give_up(str(error))
            self._owner.gave_up(error)
        finally:
            if self._task is asyncio.current_task():
                self._task = None

    def _pause_s(self) -> float:
        """How long to wait before the next attempt: several fit into the grace of a session that can go on."""
        session = self.session
        hurry = session.resume is not None and time.monotonic() - self._lost_at < session.grace_s
        return self._backoff.next_s(session.grace_s / TRIES_WITHIN_GRACE if hurry else None)

    def _give_up(self, why: str) -> None:
        """No link, and none will come: whoever waits is told."""
        if self._final is None:
            self._final = ConnectionLost(why)
        link, self._link = self._link, None
        for result in self.session.detached(link.flushed if link else 0, why, come_back=False):
            self._perform(result)
        if link is not None:
            self._owner.link_changed(False, why)


_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


def split_url(url: str) -> SplitResult:
    """The parts of a broker's URL: http (if it names none), https, ws or wss. Raises ValueError for what is none."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        good = parts.scheme in _SCHEMES and parts.hostname and parts.port != 0  # asking for the port checks it
    except ValueError:
        good = False
    if not good:
        shown = url.rpartition("@")[2].partition("?")[0]  # before and behind may stand secrets
        raise ValueError(f"{shown!r:.200} is no URL of a broker, such as http://127.0.0.1:8787")
    if parts.query or parts.username is not None:
        raise ValueError("the URL of a broker holds neither a query nor a user name; give the token apart from it")
    return parts


def websocket_url(url: str, grace_s: float = 0.0, received: int = 0) -> str:
    """The WebSocket of the broker at a URL, which may have a path behind a proxy. Raises ValueError.

    `grace_s` is for how long it shall keep the session of a broken link, `received` the last message that came.
    """
    parts = split_url(url)
    path = parts.path.rstrip("/").removesuffix("/ws") + "/ws"
    query = QUERY
    if grace_s:
        query += f"&grace={grace_s:g}"
    if received:
        query += f"&received={received}"
    return urlunsplit((_SCHEMES[parts.scheme], parts.netloc, path, query, ""))


def _why(error: OSError) -> str:
    """What the system says, without the addresses that asyncio adds."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _cannot(url: str, reason: str) -> CannotConnect:
    where = f"no broker at {url}: {reason}" if url else reason
    error = CannotConnect(where, retryable=True)
    error.url = url
    return error


def _unusable(url: str, why: str, *, come_back: bool) -> BrokerError:
    """A link that was opened and closed before the session was told of."""
    if come_back:
        return _cannot(url, why)
    return Refused(why, code=FORBIDDEN.code)


def _refused(url: str, error: HandshakeError, *, come_back: bool = False) -> BrokerError:
    """What a refused opening means: by its status, and the reason the broker gave in JSON.

    `come_back` says that a 403 may be about what was offered, which will not be offered again.
    """
    if error.status in (0, 404, 426) or error.status // 100 in (2, 3):
        reason = f"{error}" if not error.status else f"what answers there is no broker (HTTP {error.status})"
        return _cannot(url, reason)
    try:
        said = str(json.loads(error.body)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        said = f"HTTP {error.status}"
    advice = {
        401: "Give a valid token (--token, BROKER_TOKEN, or token= in code).",
        403: "Ask whoever runs the broker for a token that may.",
    }.get(error.status, "")
    refused = Refused(f"the broker at {url} does not let us in: {said}", code=error.status, advice=advice)
    refused.status = error.status
    refused.come_back = error.status == 429 or error.status >= 500 or (error.status == 403 and come_back)
    return refused
