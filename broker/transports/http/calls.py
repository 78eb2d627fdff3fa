"""`POST /call/{endpoint}/{method}` and `POST /broadcast[/{endpoint}]`: a call as curl writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import msgspec

from broker.auth.facts import Refused
from broker.core.access import is_name
from broker.core.errors import BAD_REPLY, INVALID_PARAMS, INVALID_REQUEST, OK, TOO_LARGE, Kind
from broker.core.events import Asked, Cancel
from broker.core.events import Refused as Unheard
from broker.core.messages import EMPTY, REFERENCE, Body, Credit, End, Options, Part, Progress
from broker.transports.http.peer import HttpPeer
from broker.transports.http.query import OPTIONS, QueryError, check_names, read_options
from broker.transports.http.replies import ReplyStream
from broker.transports.http.session import LINGER, Receiver
from broker.transports.http.uploads import LineUpload, OctetUpload, PartsUpload, Upload
from broker.wire.callparts import Form, Unfit, form_for
from broker.wire.calls import (
    EVENTS,
    JSON,
    NDJSON,
    OCTETS,
    Accepts,
    BadCall,
    Reply,
    media_type,
    outcome_headers,
    read_accept,
    read_body,
    read_key,
    read_trace,
    render,
)

WIRE_ID = b"1"
"""There is one request per session."""
LINGER_S = 2.0
"""how long what a caller still sends is read and dropped after its request has ended, so that it gets to read that"""
ONLY = '[{"$buffer":0}]'
"""the params beside a body of bytes where none are given"""

_PLAIN = Accepts(octets=False, json=True)


class CallHandler(Receiver):
    """`POST /call/{endpoint}/{method}`. The status and the `Broker-…` headers come from the recorded outcome.

    Who takes parts (`Accept`) gets them as they come; a body of lines, or of more bytes than a message, goes on as
    parts as it comes.
    """

    wire_id = WIRE_ID
    accepts = _PLAIN
    _reply: ReplyStream | None = None
    _upload: Upload | None = None
    _fault: Unfit | BadCall | None = None
    _dropping = False
    _waiting: asyncio.TimerHandle | None = None
    _counted = 0

    def post(self, endpoint: str, method: str) -> Awaitable[None]:
        """Ask. What is wrong with the request is an outcome too, `invalid`, once its sender is known."""
        if self._upload is not None:
            return self._body_ended(self._upload)
        self._ask(endpoint, method, self.content())
        return self.ended

    def _ask(self, endpoint: str, method: str, content: bytes | Body, *, sends: bool = False) -> None:
        self.accepts = read_accept(self._header("Accept") or "*/*")
        form = self.form()
        peer = HttpPeer(self._end, self.closed, self._told, takes_binary=self.accepts.octets)
        session = self.attach(peer, self.principal, dialect="http")
        if form is not None:
            self._reply = ReplyStream(self, form)
        self.engine.feed(self._read(endpoint, method, content, sends=sends))
        assert session is self.session or self.ended.done()

    def form(self) -> Form | None:
        """How parts go to this caller."""
        return form_for(self.accepts, self.body_max_bytes)

    def _read(self, endpoint: str, method: str, content: bytes | Body, *, sends: bool) -> Asked | Unheard:
        session = self.session
        assert session is not None
        if isinstance(self._fault, BadCall):
            return self._unheard(self._fault.kind, str(self._fault), endpoint, method)
        try:
            if not (is_name(endpoint) and is_name(method)) or method.startswith("broker."):
                raise BadCall(INVALID_REQUEST, "the path is /call/{endpoint}/{method}, both names (A-Z a-z 0-9 _ . -)")
            given = check_names(self.facts, (*OPTIONS, "progress", "params"))
            options = self._options(given, sends=sends)
            if isinstance(content, Body):
                body = content
            else:
                kind, beside = self._header("Content-Type") or "", given.get("params")
                if beside is None and media_type(kind) == OCTETS:
                    beside = ONLY
                body = read_body(content, kind, beside, "params")
        except BadCall as bad:
            return self._unheard(bad.kind, str(bad), endpoint, method)
        except QueryError as bad:
            return self._unheard(INVALID_PARAMS, bad.reason, endpoint, method)
        return Asked(session, WIRE_ID, endpoint, method, body, options)

    def _unheard(self, kind: Kind, detail: str, endpoint: str, method: str) -> Unheard:
        assert self.session is not None
        return Unheard(self.session, WIRE_ID, kind, detail, endpoint[:128], method[:128])

    def _options(self, given: dict[str, str], *, sends: bool) -> Options:
        timeout = self._header("Broker-Timeout")
        if timeout is not None:
            if "timeout" in given:
                raise QueryError("the timeout is given twice, as Broker-Timeout and as timeout=")
            given = given | {"timeout": timeout}
        key = self._header("Idempotency-Key")
        options = read_options(
            given, trace=read_trace(self._header("Traceparent")), key=None if key is None else read_key(key),
            stream=_STREAM[self._reply is not None, sends],
        )  # fmt: skip
        if options.progress is not None and not self.accepts.stream:
            raise QueryError(f"progress= goes with Accept: {NDJSON} or {EVENTS}")
        return options

    def _header(self, name: str) -> str | None:
        """A header's value; lines of one name are joined, as lists are (RFC 9110 section 5.2)."""
        return self.request.headers.get(name)

    # ------------------------------------------------------------ from the router, by the engine

    def _told(self, message: Part | Credit | Progress) -> None:
        if isinstance(message, Credit):
            if self._upload is not None:
                self._upload.granted(message.upto)
            return
        if self._reply is None or self._fault is not None:
            return
        try:
            if isinstance(message, Part):
                self._reply.part(message)
            else:
                self._reply.progress(message.body)
        except Unfit as unfit:
            self._break_off(unfit)

    def _break_off(self, fault: Unfit | BadCall) -> None:
        """This side cannot go on: the request is taken back, and its caller told why."""
        self._fault = fault
        if self.session is not None:
            self.engine.feed(Cancel(self.session, WIRE_ID))

    def _end(self, end: End) -> None:
        """The request has ended."""
        if self._upload is not None:
            self._upload.stop()
        if self._fault is not None and self._fault.kind is not None:
            end = _blamed(end, self._fault.kind, str(self._fault))
        reply = self._reply
        streams = reply is not None and (reply.begun or (end.outcome.kind is OK and bool(self.accepts.stream)))
        if reply is None or not streams:
            self.reply(self._render(end))
            return
        if not reply.begun:
            for name, value in outcome_headers(end):
                self.set_header(name, value)
        try:
            reply.end(end, self.complete)
        except Unfit as unfit:
            if self._fault is None and unfit.kind in (TOO_LARGE, BAD_REPLY):
                self._fault = unfit
                self._end(end)
            else:
                self.cut()

    def _render(self, end: End) -> Reply:
        if self._fault is not None and self._fault.kind is None:
            error = {"error": str(self._fault), "status": 406}
            return Reply(406, JSON, outcome_headers(end), msgspec.json.encode(error))
        return render(end, self.accepts, self.body_max_bytes)

    def closed(self, code: int, reason: str) -> None:
        """The session has to end before its request has; an answer that has begun is cut off."""
        if self._reply is not None and self._headers_written:
            self.cut()
        else:
            super().closed(code, reason)

    def cut(self) -> None:
        """Break the connection, so that the caller sees that its answer is not whole."""
        self.stream.close()
        self.leave()

    def leave(self) -> None:
        """The session is no more."""
        if self._reply is not None:
            self._reply.stop()
        if self._upload is not None:
            self._upload.stop()
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        self.count(0)
        super().leave()

    # ------------------------------------------------------------ a body that goes on as it comes

    def streams_body(self, declared: int) -> bool:
        """Lines; bytes that no params refer to; and bytes that are more than a message, or of unknown number.

        With a key the body is one message.
        """
        kind = media_type(self._header("Content-Type"))
        chunked = "chunked" in (self._header("Transfer-Encoding") or "").lower()
        if "Idempotency-Key" in self.request.headers:
            return False
        if kind == NDJSON:
            self._upload = LineUpload(self)
        elif kind == OCTETS:
            params = dict(self.facts.query).get("params", ONLY)
            if not REFERENCE.search(params.encode()):
                self._upload = PartsUpload(self, params)
            elif chunked or declared > self.body_max_bytes:
                self._upload = OctetUpload(self, params)
        if self._upload is None:
            return False
        body_timeout_s = self.limits().body_timeout_s
        self._waiting = self.engine.loop.call_later(body_timeout_s, self._nothing_came)
        return True

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """A piece of the body; what comes after the end is dropped."""
        upload = self._upload
        if upload is None:
            return super().data_received(chunk)
        if upload.over or self._refusal is not None:
            self._taken += len(chunk)
            if self._taken > LINGER * self.body_max_bytes:
                self._stop_reading()
            return None
        return self._take(upload, upload.take(chunk))

    def begin(self, params: Body, *, sends: bool) -> None:
        """Ask, while the body still comes."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        endpoint, method = self.path_args
        self._ask(endpoint, method, params, sends=sends)

    def count(self, size: int) -> None:
        """So many bytes of the body wait here to be sent on."""
        budget = self.engine.router.state.budget
        budget.used += size - self._counted
        budget.outboxes += size - self._counted
        self._counted = size

    async def _take(self, upload: Upload, work: Awaitable[None]) -> None:
        try:
            await work
        except Refused as refused:
            self._refusal = refused
        except BadCall as bad:
            if upload.begun:
                self._break_off(bad)
            else:
                self._fault = bad
                upload.begin(EMPTY)

    async def _body_ended(self, upload: Upload) -> None:
        upload.read = True
        if not upload.over and self._refusal is None:
            await self._take(upload, upload.close())
        if self._refusal is not None:
            raise self._refusal
        if self._dropping:
            self._stop_reading()
        else:
            await self.ended

    def complete(self, last: bytes = b"") -> None:
        """Write the last of the answer. What the caller still sends is read for a while, so that it reads that."""
        upload = self._upload
        if upload is None or upload.read or self._dropping:
            self.finish(last)
            return
        self._dropping = True
        self.set_header("Connection", "close")
        if not self._headers_written and not (self._reply is not None and self._reply.begun):
            self.set_header("Content-Length", str(len(last)))
        self.write(last)
        self.flush()
        self.leave()
        self._waiting = self.engine.loop.call_later(LINGER_S, self._stop_reading)

    def _stop_reading(self) -> None:
        if self._finished:
            return
        if self._refusal is not None and not self._headers_written:
            self.refuse(self._refusal.status, self._refusal.reason, self._refusal.headers)
        else:
            stream = self.stream
            self.finish().add_done_callback(lambda _: stream.close())  # as was said with Connection: close

    def _nothing_came(self) -> None:
        """Of a body that is taken as it comes, the beginning has not come in time."""
        self.stream.close()


def _blamed(end: End, kind: Kind, detail: str) -> End:
    """The end of a request that was taken back because of this."""
    outcome = msgspec.structs.replace(end.outcome, kind=kind, detail=detail, retryable=kind.retryable, cause="")
    return End(end.wire_id, outcome, None, end.meta)


_STREAM = {(False, False): "none", (True, False): "in", (False, True): "out", (True, True): "both"}


class BroadcastHandler(CallHandler):
    """`POST /broadcast` and `POST /broadcast/{endpoint}`: the body is the data; answers as `broker.publish` does."""

    def post(self, endpoint: str = "", _: str = "") -> Awaitable[None]:
        """Publish."""
        return super().post(endpoint, "broker.publish")

    def streams_body(self, declared: int) -> bool:
        """A broadcast is one message."""
        return False

    def form(self) -> Form | None:
        """It has one answer."""
        return None

    def _read(self, endpoint: str, method: str, content: bytes | Body, *, sends: bool) -> Asked | Unheard:
        assert self.session is not None and isinstance(content, bytes)
        try:
            given = check_names(self.facts, ("topic", "to", "data"))
            body = read_body(content, self._header("Content-Type") or "", given.pop("data", None), "data")
        except BadCall as bad:
            return self._unheard(bad.kind, str(bad), endpoint, method)
        except QueryError as bad:
            return self._unheard(INVALID_PARAMS, bad.reason, endpoint, method)
        params: dict[str, object] = dict(given)
        if endpoint:
            params["endpoint"] = endpoint
        params["data"] = msgspec.Raw(body.raw or (b'{"$buffer":0}' if body.attachments else b"null"))
        return Asked(
            self.session, WIRE_ID, "", method, Body(msgspec.json.encode(params), body.attachments)
        )  # fmt: skip
