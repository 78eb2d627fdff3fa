"""The common messages of the ZeroMQ dialect at the broker's end, without the JSON-RPC text in between.

`PlainReader` makes events of calls and good replies, `PlainWriter` frames of the broker's calls and results. Both take
over only what is common and right, as the compiled core does for WebSockets (`broker.wire.native`): whatever else comes
goes by `multipart` and `jsonrpc` as if they were not there. A request, read twice and written twice, takes 4.1 µs here
and 8.5 the long way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from broker.core.errors import ENDED_OK
from broker.core.events import Answered, Asked
from broker.core.messages import Body, Call, End
from broker.wire.attachments import BASE64_KEY
from broker.wire.jsonrpc import ABSENT, ID_MAX, ROUTES_REMEMBERED, SMALL
from broker.wire.multipart import (
    PLAIN_CALLS,
    PLAIN_REPLIES,
    decode_call,
    decode_header,
    decode_parent,
    decode_reply,
)

if TYPE_CHECKING:
    from broker.core.messages import Options
    from broker.core.sessions import Session
    from broker.wire.multipart import Frame, Multipart

ENVELOPE = b'{"jsonrpc":"2.0","id":'

_decode_text = msgspec.json.Decoder(str).decode


class PlainReader:
    """Reads the plain messages of one link, once `decode_for` has said for whom."""

    __slots__ = ("_at", "_defaults", "_known", "_prefix", "_routes", "_session", "decoded_bytes")

    def __init__(self) -> None:
        self._session: Session | None = None
        self._prefix = b""
        self._at = 0
        self._routes: dict[str, tuple[str, str]] = {}
        self._known: dict[bytes, tuple[str, str]] = {}
        self._defaults: Options
        self.decoded_bytes = 0
        """contents of the messages that became events"""

    def decode_for(
        self, session: Session, prefix: bytes, routes: dict[str, tuple[str, str]], defaults: Options
    ) -> None:  # fmt: skip
        """Read for this session. Replies are to ids that begin with `prefix`, calls by the `routes` found good."""
        self._session = session
        self._prefix, self._at = prefix, len(prefix)
        self._routes, self._defaults = routes, defaults

    def read(self, frames: Sequence[Frame]) -> Asked | Answered | None:
        """The event of four frames, verified before; None if that is for others to say. Raises nothing."""
        content = frames[3]
        if self._session is None or type(content) is not bytes or not content.isascii() or BASE64_KEY in content:
            return None
        try:
            header = decode_header(frames[0])
            if header.msg_type == "call_request":
                return self._read_call(bytes(header.msg_id), content)
            if header.msg_type == "call_reply":
                return self._read_reply(bytes(decode_parent(frames[1]).msg_id), content)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            pass  # whoever is asked next says what is wrong
        return None

    def _read_call(self, msg_id: bytes, content: bytes) -> Asked | None:
        if msg_id[:1] != b'"' or len(msg_id) > ID_MAX or b"\\" in msg_id or not msg_id.isascii():
            return None
        call = decode_call(content)
        if call.params is ABSENT or call.meta is not ABSENT:
            return None
        beside = len(content) - len(call.params) - len(call.method) - len(call.endpoint)
        if beside not in PLAIN_CALLS[call.endpoint is not ABSENT]:
            return None
        route = self._known.get(b"%b%b" % (call.endpoint, call.method)) or self._route(call.endpoint, call.method)
        if route is None:
            return None
        assert self._session is not None
        return Asked(self._session, msg_id, route[0], route[1], Body(call.params), self._defaults)

    def _route(self, endpoint: msgspec.Raw, method: msgspec.Raw) -> tuple[str, str] | None:
        """What was found good by `JsonRpc` for the same names, and from now on by their JSON texts."""
        written = _decode_text(method)
        if endpoint is not ABSENT:
            written = f"{_decode_text(endpoint)}/{written}"
        route = self._routes.get(written)
        if route is not None:
            if len(self._known) >= ROUTES_REMEMBERED:
                self._known.clear()
            self._known[b"%b%b" % (endpoint, method)] = route
        return route

    def _read_reply(self, msg_id: bytes, content: bytes) -> Answered | None:
        digits = msg_id[self._at : -1]
        if not msg_id.startswith(self._prefix) or not digits.isdigit() or len(digits) > 18:
            return None
        reply = decode_reply(content)
        if reply.status != "ok" or reply.result is ABSENT or reply.meta is not ABSENT:
            return None
        if len(content) - len(reply.result) not in PLAIN_REPLIES[0]:
            return None
        assert self._session is not None
        return Answered(self._session, int(digits), Body(reply.result))


class PlainWriter:
    """Makes the frames of plain messages for one peer, which is attached to `endpoint`.

    `prefix` is how the envelope of a call begins, as `JsonRpc.plain` tells it; `meta`: calls say what is left of their
    time, which is not plain.
    """

    __slots__ = ("_codec", "_endpoint", "_id", "_meta")

    def __init__(self, codec: Multipart, prefix: bytes, endpoint: str, meta: bool) -> None:
        self._codec = codec
        self._id = prefix.removeprefix(ENVELOPE)
        self._endpoint = endpoint
        self._meta = meta

    def frames(self, message: object) -> list[Frame] | None:
        """The four frames of a plain call or a plain result; None for everything else."""
        if type(message) is Call:
            body = message.body
            if self._meta or body.attachments or not 0 < len(body.raw) <= SMALL:
                return None
            endpoint = b"" if message.endpoint == self._endpoint else b'"endpoint":"%b",' % message.endpoint.encode()
            content = b'{%b"method":"%b","params":%b}' % (endpoint, message.method.encode(), body.raw)
            return self._codec.call(b'%b%d"' % (self._id, message.attempt.id), content)
        if type(message) is End and message.outcome is ENDED_OK and message.meta is None:
            result, wire_id = message.body, message.wire_id
            if result is None or result.attachments or len(result.raw) > SMALL or type(wire_id) is not bytes:
                return None
            return self._codec.reply(wire_id, b'{"status":"ok","result":%b}' % result.raw)
        return None
