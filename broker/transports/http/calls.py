"""`POST /call/{endpoint}/{method}` and `POST /broadcast[/{endpoint}]`: a call as curl writes it."""

from __future__ import annotations

import asyncio

import msgspec

from broker.core.access import is_name
from broker.core.errors import INVALID_PARAMS, INVALID_REQUEST, Kind
from broker.core.events import Asked
from broker.core.events import Refused as Unheard
from broker.core.messages import Body, End, Options
from broker.transports.http.peer import HttpPeer
from broker.transports.http.query import OPTIONS, QueryError, check_names, read_options
from broker.transports.http.session import Receiver
from broker.wire.calls import Accepts, BadCall, check_key, read_accept, read_body, read_trace, render

WIRE_ID = b"1"
"""There is one request per session."""

_PLAIN = Accepts(octets=False, json=True)


class CallHandler(Receiver):
    """`POST /call/{endpoint}/{method}`. The status and the `Broker-…` headers come from the recorded outcome."""

    accepts = _PLAIN

    def post(self, endpoint: str, method: str) -> asyncio.Future[None]:
        """Ask. What is wrong with the request is an outcome too, `invalid`, once its sender is known."""
        content = self.content()
        self.accepts = read_accept(self._header("Accept") or "*/*")
        peer = HttpPeer(self._end, self.closed, takes_binary=self.accepts.octets)
        session = self.attach(peer, self.principal, dialect="http")
        self.engine.feed(self._read(endpoint, method, content))
        assert session is self.session or self.ended.done()
        return self.ended

    def _read(self, endpoint: str, method: str, content: bytes) -> Asked | Unheard:
        session = self.session
        assert session is not None
        try:
            if not (is_name(endpoint) and is_name(method)) or method.startswith("broker."):
                raise BadCall(INVALID_REQUEST, "the path is /call/{endpoint}/{method}, both names (A-Z a-z 0-9 _ . -)")
            given = check_names(self.facts, (*OPTIONS, "params"))
            options = self._options(given)
            body = read_body(content, self._header("Content-Type") or "", given.get("params"), "params")
        except BadCall as bad:
            return self._unheard(bad.kind, str(bad), endpoint, method)
        except QueryError as bad:
            return self._unheard(INVALID_PARAMS, bad.reason, endpoint, method)
        return Asked(session, WIRE_ID, endpoint, method, body, options)

    def _unheard(self, kind: Kind, detail: str, endpoint: str, method: str) -> Unheard:
        assert self.session is not None
        return Unheard(self.session, WIRE_ID, kind, detail, endpoint[:128], method[:128])

    def _options(self, given: dict[str, str]) -> Options:
        timeout = self._header("Broker-Timeout")
        if timeout is not None:
            if "timeout" in given:
                raise QueryError("the timeout is given twice, as Broker-Timeout and as timeout=")
            given = given | {"timeout": timeout}
        key = self._header("Idempotency-Key")
        if key is not None:
            check_key(key)
            self.set_header("Broker-Idempotency-Key", "ignored")
        return read_options(given, trace=read_trace(self._header("Traceparent")))

    def _header(self, name: str) -> str | None:
        """A header's value; lines of one name are joined, as lists are (RFC 9110 section 5.2)."""
        return self.request.headers.get(name)

    def _end(self, end: End) -> None:
        self.reply(render(end, self.accepts, self.body_max_bytes))


class BroadcastHandler(CallHandler):
    """`POST /broadcast` and `POST /broadcast/{endpoint}`: the body is the data; answers as `broker.publish` does."""

    def post(self, endpoint: str = "", _: str = "") -> asyncio.Future[None]:
        """Publish."""
        return super().post(endpoint, "broker.publish")

    def _read(self, endpoint: str, method: str, content: bytes) -> Asked | Unheard:
        assert self.session is not None
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
