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
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit, urlunsplit

from broker.core.errors import ABNORMAL, CLOSES, MESSAGE_TOO_BIG, NORMAL
from broker.links.connect import connect
from broker.links.handshake import HandshakeError
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.peer.backoff import Backoff
from broker.peer.errors import BrokerError, CannotConnect, ConnectionLost, InvalidRequest, Refused
from broker.peer.session import (
    DEFAULT_OPTIONS,
    MESSAGE_MAX_BYTES,
    Asked,
    CancelAsked,
    Ended,
    Heard,
    Options,
    Pending,
    Result,
    Session,
)
from broker.peer.values import Attachments

log = logging.getLogger("broker.peer")

Target = Callable[[], tuple[str, str]]
"""Where the broker is and with which token, asked anew for every attempt to connect; raises OSError if unknown."""

OPEN_TIMEOUT_S = 10.0
STEADY_S = 5.0
"""a link that held this long was a success: the next loss starts with short waits again"""

_NO_RETURN = frozenset(close.code for close in CLOSES if not close.come_back) - {MESSAGE_TOO_BIG.code}
# After 1009 it is the message that must not come back; `Session.detached` sees to that.

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

    def link_changed(self, up: bool, why: str) -> None:
        """There is a link (again), or none any more."""

    def standing_refused(self, key: tuple[str, ...], error: BrokerError) -> None:
        """What stood under `key` could not be repeated on a new link."""

    def gave_up(self, error: BrokerError) -> None:
        """The link is gone and there will be none again."""


class Connection:
    """A session with the broker at `target`, on the running event loop. Not thread-safe.

    With `reconnect` a broken link is opened again, with full jitter, until `close`; without it, the first loss is the
    end. Nothing raises because the link is gone: every call's waiter is told.
    """

    __slots__ = (
        "_backoff", "_closing", "_congested", "_final", "_link", "_links", "_opened_at", "_opening", "_owner",
        "_pump_due", "_reconnect", "_ssl_context", "_target", "_task", "_timer", "_timer_at", "loop", "session", "url",
    )  # fmt: skip

    def __init__(
        self,
        target: Target,
        owner: Owner,
        *,
        reconnect: bool = True,
        ssl_context: ssl.SSLContext | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.session = Session()
        self.url = ""
        self.loop = asyncio.get_running_loop()
        soft = LinkLimits().outbox_soft_bytes
        # A message is given to the link while its outbox is below the soft bound, so this is never exceeded.
        self._links = LoopLinks(LinkLimits(outbox_hard_bytes=soft + MESSAGE_MAX_BYTES + 65_536))
        self._target = target
        self._owner = owner
        self._reconnect = reconnect
        self._ssl_context = ssl_context
        self._backoff = backoff or Backoff()
        self._link: Link | None = None
        self._final: ConnectionLost | None = None
        self._closing = False
        self._congested = False
        self._pump_due = False
        self._opened_at = 0.0
        self._opening: asyncio.Lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")

    # ------------------------------------------------------------ life

    @property
    def is_up(self) -> bool:
        """Whether there is a link now."""
        return self._link is not None

    async def open(self, *, patient: bool = False, timeout_s: float | None = None) -> None:
        """Open the first link; does nothing if there is one. `patient` goes on trying, for as long as it makes sense.

        Raises CannotConnect (after `timeout_s` seconds too), Refused, InvalidRequest for a wrong URL, ConnectionLost
        after the end.
        """
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
        waiter: Waiter | None = None,
    ) -> Pending:  # fmt: skip
        """Ask; `waiter` is told how it ended. Raises what `Session.ask` does, and ConnectionLost after the end."""
        if self._closing or self._final is not None:
            self._check_alive()
        session = self.session
        call = session.ask(name, params, attachments, options, waiter, time.monotonic())
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

    # ------------------------------------------------------------ what the link says

    def message(self, payload: bytes, binary: bool) -> None:
        """One whole message."""
        try:
            result = self.session.receive(payload, binary, time.monotonic())
        except ValueError as error:
            if self._link is not None:
                self._link.abort(ABNORMAL.code, str(error))
            return
        if result is not None:
            self._perform(result)

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
        if time.monotonic() - self._opened_at > STEADY_S:
            self._backoff.reset()
        broke = f"the connection to {self.url} broke{f': {reason}' if reason else ''}"
        why = broke if code == ABNORMAL.code else f"the broker closed the connection: {code} {reason}".rstrip()
        come_back = self._reconnect and not self._closing and code not in _NO_RETURN
        results = self.session.detached(link.flushed, why, come_back=come_back)
        if come_back:
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
        else:
            assert isinstance(result, CancelAsked)
            self._owner.cancel_asked(result.id)

    def _ended(self, ended: Ended) -> None:
        waiter: Waiter | None = ended.call.waiter
        if waiter is None:
            if ended.error is not None and ended.call.standing:
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
            link.send_parts(frame.pieces, frame.binary)
            if frame.call is not None:
                frame.call.mark = link.enqueued

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
            self.url, token = self._target()
        except OSError as error:
            raise _cannot("", str(error)) from None
        if not token.isprintable():  # as from a file with Windows line ends
            raise InvalidRequest("the token holds line breaks or other control characters; no token does")
        headers = [("Authorization", f"Bearer {token}")] if token else []
        try:
            link = await connect(
                websocket_url(self.url), self._links, headers=headers, ssl_context=self._ssl_context,
                open_timeout_s=OPEN_TIMEOUT_S,
            )  # fmt: skip
        except HandshakeError as error:
            raise _refused(self.url, error) from None
        except TimeoutError:
            hint = "; is it a TLS port?" if split_url(self.url).scheme in ("https", "wss") else ""
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
        self._link = link
        self._opened_at = time.monotonic()
        link.start(self)
        self.session.attached(self._opened_at)
        self._pump()
        self._owner.link_changed(True, "")

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
            wait_s = self._backoff.next_s()
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
            await asyncio.sleep(self._backoff.next_s())
            await self._keep_trying()
        except BrokerError as error:
            self._give_up(str(error))
            self._owner.gave_up(error)
        finally:
            if self._task is asyncio.current_task():
                self._task = None

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


def websocket_url(url: str) -> str:
    """The WebSocket of the broker at a URL, which may have a path behind a proxy. Raises ValueError."""
    parts = split_url(url)
    path = parts.path.rstrip("/").removesuffix("/ws") + "/ws"
    return urlunsplit((_SCHEMES[parts.scheme], parts.netloc, path, "binary=1&meta=1", ""))


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


def _refused(url: str, error: HandshakeError) -> BrokerError:
    """What a refused opening means: by its status, and the reason the broker gave in JSON."""
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
    refused.come_back = error.status == 429 or error.status >= 500
    return refused
