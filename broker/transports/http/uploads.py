"""The body of a call on its way to the worker: parts as they come, no faster than the worker takes them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from broker.core.events import PartSent
from broker.core.messages import EMPTY, Body
from broker.core.streams import FIRST_CREDIT
from broker.wire.callparts import UNKNOWN_MARK, BodyLines, BodyPieces
from broker.wire.calls import read_json
from broker.wire.pieces import PIECE_DATA, PIECE_MAX_BYTES, Cutter

if TYPE_CHECKING:
    from broker.transports.http.calls import CallHandler

_NO_MORE = Body(b"null")
"""ends a direction without being an item"""


class Upload(ABC):
    """A body that is not gathered. What comes is read on only when the worker has room for it."""

    def __init__(self, handler: CallHandler) -> None:
        self._handler = handler
        self._seq = 0
        self._granted = FIRST_CREDIT
        self._room: asyncio.Future[None] | None = None
        self.begun = False
        """whether the request has been asked"""
        self.over = False
        """whether anything more is of use"""
        self.read = False
        """whether all of it has been read"""

    @abstractmethod
    async def take(self, chunk: bytes) -> None:
        """A piece of the body. Raises BadCall for what cannot be sent on."""

    @abstractmethod
    async def close(self) -> None:
        """The body is complete. Raises BadCall."""

    def granted(self, upto: int) -> None:
        """The worker takes parts below this."""
        self._granted = max(self._granted, upto)
        self._wake()

    def stop(self) -> None:
        """The request has ended: nothing more is sent."""
        self.over = True
        self._wake()

    def begin(self, params: Body) -> None:
        """Ask."""
        self.begun = True
        self._handler.begin(params, sends=True)

    async def send(self, body: Body, *, more: bool = False, last: bool = False) -> None:
        """One part, when there is room for it."""
        while self._seq >= self._granted and not self.over:
            # Nothing is read now, so tornado would not notice that the caller hangs up.
            self._handler.stream.set_close_callback(self._handler.on_connection_close)
            self._room = self._handler.engine.loop.create_future()
            await self._room
        session = self._handler.session
        if self.over or session is None:
            return
        seq, self._seq = self._seq, self._seq + 1
        self._handler.engine.feed(PartSent(session, self._handler.wire_id, 0, seq, body, more, last))

    def _wake(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)


class LineUpload(Upload):
    """Newline-delimited JSON: the first line is the params, each further line an item."""

    def __init__(self, handler: CallHandler) -> None:
        super().__init__(handler)
        self._lines = BodyLines(handler.body_max_bytes)

    async def take(self, chunk: bytes) -> None:
        """The lines that are whole with this chunk."""
        for line in self._lines.add(chunk):
            await self._line(line)
        self._handler.count(self._lines.held_bytes)

    async def close(self) -> None:
        """The last line, and that no more come."""
        for line in self._lines.close():
            await self._line(line)
        if not self.begun:
            self.begin(EMPTY)
        await self.send(_NO_MORE, last=True)

    async def _line(self, body: Body) -> None:
        if not self.begun:
            self.begin(body)
            return
        size = len(body.raw) + sum(map(len, body.attachments))
        if size <= self._handler.engine.router.limits.part_max_bytes:
            await self.send(body)
            return
        cutter = Cutter(bytes(body.raw), body.attachments)
        for piece in cutter:
            await self.send(Body(PIECE_DATA, (piece,)), more=True)
        await self.send(Body(cutter.mark))


class PartsUpload(Upload):
    """Bytes that the params, which stand in the query, do not refer to: items of bytes, as large as one part may be."""

    def __init__(self, handler: CallHandler, params: str) -> None:
        super().__init__(handler)
        self._params = params
        self._rest = bytearray()

    async def take(self, chunk: bytes) -> None:
        """The parts that are full with this chunk."""
        if not self.begun:
            self.begin(Body(read_json(self._params.encode(), "params=")))
        self._rest += chunk
        while len(self._rest) >= PIECE_MAX_BYTES:
            await self._send_first(PIECE_MAX_BYTES)
        self._handler.count(len(self._rest))

    async def close(self) -> None:
        """The last part, and that no more come."""
        await self.take(b"")
        if self._rest:
            await self._send_first(len(self._rest))
        await self.send(_NO_MORE, last=True)

    async def _send_first(self, size: int) -> None:
        item = bytes(self._rest[:size])
        del self._rest[:size]
        await self.send(Body(PIECE_DATA, (item,)))


class OctetUpload(Upload):
    """Bytes of any length that are attachment 0 of the params; the JSON of these stands in the query."""

    def __init__(self, handler: CallHandler, params: str) -> None:
        super().__init__(handler)
        self._params = params
        self._pieces: BodyPieces | None = None

    async def take(self, chunk: bytes) -> None:
        """The pieces that are whole with this chunk."""
        if self._pieces is None:
            self._pieces = BodyPieces(read_json(self._params.encode(), "params="))
            self.begin(Body(UNKNOWN_MARK))
        for piece in self._pieces.add(chunk):
            await self.send(Body(PIECE_DATA, (piece,)), more=True)

    async def close(self) -> None:
        """The last piece, and what stands for the value."""
        if self._pieces is None:
            await self.take(b"")
        assert self._pieces is not None
        for piece in self._pieces.close():
            await self.send(Body(PIECE_DATA, (piece,)), more=True)
        await self.send(Body(self._pieces.mark), last=True)
