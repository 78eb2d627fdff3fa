"""Links that read and write in C: order, ends and failures, and that no byte ever goes to another's socket."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import struct
from typing import Any, cast

import pytest

from broker.core.messages import DEFAULT_OPTIONS
from broker.links.compiled import core
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.wire import native
from broker.wire.frames import CLOSE, PING, PONG, TEXT
from tests.links.harness import ENDS, LOOPS, Recorder, frame, raw_client, run, serving, until
from tests.wire.test_jsonrpc_fuzz import NoSession

both = pytest.mark.parametrize(("kind", "loop"), ENDS)
compiled = pytest.mark.skipif(core() != "compiled core", reason="there is no compiled core here")

ROUTES = {"m": ("lab", "m")}


def call(number: int) -> bytes:
    return frame(TEXT, b'{"jsonrpc":"2.0","id":%d,"method":"m","params":[]}' % number)


class Decoding(Recorder):
    """Has calls of `m` read in C, and notes what comes in which run; a call 13 is more than it can bear."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.heard: list[object] = []
        if link.reader is not None:
            link.reader.decode_for(NoSession(), b'"n-1-', ROUTES, DEFAULT_OPTIONS)

    def message(self, payload: bytes, binary: bool) -> None:
        super().message(payload, binary)
        self.heard.append(payload)

    def decoded(self, events: list[Any]) -> None:
        assert not self.closings
        assert events
        numbers = [int(cast("bytes", event.wire_id)) for event in events]
        self.heard.append(numbers)
        if 13 in numbers:
            raise RuntimeError("on purpose")
        if 99 in numbers:
            self.link.close(4400, "enough")


@compiled
@both
def test_runs_of_calls_stand_between_what_came_between_them(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, receiver=Decoding) as server:
            data = call(1) + call(2) + frame(TEXT, b"text") + call(3) + frame(PING, b"p") + call(4) + call(5)[:20]
            async with raw_client(server, data) as client:
                peer = cast("Decoding", await server.peer())
                assert await client.frame() == (PONG, b"p")
                client.writer.write(call(5)[20:] + call(6))
                await until(lambda: 6 in flat(peer.heard), "all came")
                assert flat(peer.heard) == [1, 2, b"text", 3, 4, 5, 6]
                assert any(isinstance(what, list) for what in peer.heard)

    run(main, loop)


def flat(heard: list[object]) -> list[object]:
    """What came, calls by their numbers, whether they were read in C or, cut in two, as the text they are."""
    found: list[object] = []
    for what in heard:
        if isinstance(what, list):
            found += what
        else:
            number = re.match(rb'.*"id":(\d+)', cast("bytes", what))
            found.append(int(number[1]) if number else what)
    return found


@compiled
@both
def test_nothing_is_heard_behind_a_close(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, receiver=Decoding) as server:
            farewell = frame(CLOSE, (1000).to_bytes(2, "big"))
            async with raw_client(server, call(1) + farewell + call(2)) as client:
                peer = cast("Decoding", await server.peer())
                assert await client.frame() == (CLOSE, (1000).to_bytes(2, "big"))
                assert flat(peer.heard) == [1]
            async with raw_client(server, call(99) + frame(TEXT, b"text") + call(2)) as client:
                peer = cast("Decoding", await server.peer(1))
                assert (await client.frame())[1][:2] == (4400).to_bytes(2, "big")
                assert flat(peer.heard) == [99]

    run(main, loop)


@compiled
@both
def test_a_receiver_of_runs_that_raises_ends_only_its_own_link(
    kind: str, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(kind, receiver=Decoding) as server, raw_client(server) as bad, raw_client(server) as good:
            bad.writer.write(call(1) + call(13) + call(3) + frame(TEXT, b"x"))
            assert await bad.frame() == (CLOSE, (1011).to_bytes(2, "big") + b"internal error")
            good.writer.write(call(1))
            peer = cast("Decoding", await server.peer(1))
            await until(lambda: flat(peer.heard) == [1], "the other is served")
            assert server.links.counters.receiver_errors == 1

    with caplog.at_level(logging.CRITICAL):
        run(main, loop)


@compiled
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("size", [5_000, 16_384, 40_000, 65_000, 66_000])
def test_frames_that_are_cut_are_heard_whole(loop: str, size: int) -> None:
    async def main() -> None:
        async with serving("socket") as server, raw_client(server) as client:
            peer = await server.peer()
            payloads = [bytes([65 + number]) * size for number in range(20)]
            client.writer.write(b"".join(frame(TEXT, payload) for payload in payloads))
            await until(lambda: len(peer.messages) == 20, "all came")
            assert [payload for payload, _ in peer.messages] == payloads
            for at in range(0, 20_000, 7_000):  # what trickles in too
                client.writer.write(frame(TEXT, b"y" * 20_000)[at : at + 7_000])
                await client.writer.drain()
                await asyncio.sleep(0)

    run(main, loop)


# ── sockets that are written to directly ──


@pytest.mark.parametrize("loop", LOOPS)
def test_no_byte_reaches_a_socket_that_took_the_number_of_another(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links end in every way while they are written to in the same turn, and their numbers are taken again at once."""
    written = 0
    write = os.write

    def counting(descriptor: int, data: bytes) -> int:
        nonlocal written
        written += 1
        return write(descriptor, data)

    monkeypatch.setattr("broker.links.socket.os.write", counting)
    ends = ["abort", "close", "reset", "end", "violation"]

    async def main() -> None:
        async with serving("socket", limits=LinkLimits(close_timeout_s=0.2)) as server:

            async def visit(number: int) -> None:
                async with raw_client(server) as client:
                    tag = b"<%d>" % number
                    client.writer.write(frame(TEXT, tag))
                    end = ends[number % len(ends)]
                    seen = b""
                    while len(seen) < 200:
                        seen += (await client.frame())[1]
                    if end == "reset":
                        linger = struct.pack("ii", 1, 0)
                        taken = client.writer.get_extra_info("socket")
                        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        client.writer.transport.abort()
                    elif end == "end":
                        client.writer.write_eof()
                    elif end == "violation":
                        client.writer.write(b"\xff\xff")
                    else:
                        client.writer.write(frame(TEXT, end.encode()))
                    if end != "reset":
                        seen += await client.rest()
                    text = seen.replace(tag, b"")
                    assert b"<" not in text, "bytes of another link"

            writing = True

            async def write_on() -> None:
                said: dict[Recorder, bytes] = {}
                while writing:
                    for peer in server.peers[-60:]:
                        for payload, _ in peer.messages:
                            if payload.startswith(b"<"):
                                said[peer] = payload
                        if peer not in said:
                            continue
                        for _ in range(3):
                            peer.link.send(said[peer])
                        asked = {payload for payload, _ in peer.messages}
                        if b"abort" in asked:
                            peer.link.abort()
                        elif b"close" in asked:
                            peer.link.close(1000)
                        peer.link.send(said[peer])
                        peer.link.flush()
                    await asyncio.sleep(0)

            writer = asyncio.create_task(write_on())
            for first in range(0, 150, 30):
                await asyncio.gather(*(visit(first + number) for number in range(30)))
            writing = False
            await writer
            assert len(server.peers) == 150
            for peer in server.peers:
                peer.link.abort()

    run(main, loop)
    assert written > 300


@pytest.mark.parametrize("loop", LOOPS)
def test_what_the_kernel_does_not_take_comes_in_its_place(loop: str) -> None:
    async def main() -> None:
        async with serving("socket") as server, raw_client(server, limit=1 << 24) as client:
            link = (await server.peer()).link
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            sent = []
            while len(sent) < 40 and link.outbox_bytes < 4 << 20:
                sent.append(bytes([65 + len(sent) % 26]) * 200_000)
                link.send(sent[-1])
                link.flush()
            assert link.outbox_bytes > 0
            client.reader._transport.resume_reading()  # type: ignore[attr-defined]
            for payload in sent:
                assert await client.frame() == (TEXT, payload)
            await until(lambda: link.outbox_bytes == 0, "all is counted as written")

    run(main, loop)


@compiled
@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_flushed_in_c_leaves_the_link_as_its_own_flush_does(loop: str) -> None:
    async def main() -> None:
        async with serving("socket") as server, raw_client(server, limit=1 << 20) as client:
            link = (await server.peer()).link
            await until(lambda: link.outbox_bytes == 0, "the handshake is written")
            counters = server.links.counters
            for payloads in (
                [b"one"],
                [b"a", b"b" * 300, b"c"],
                [b"d" * 9_000] * 3,
                [b"e" * 60_000, b"f"],
                [b"g"] * 3_000,
            ):
                writes, before = counters.writes, counters.bytes_out
                for payload in payloads:
                    link.send(payload)
                waiting = link.outbox_bytes
                await asyncio.sleep(0)
                assert link.outbox_bytes == 0
                assert not link.dirty and not link.blocked
                assert (counters.writes - writes, counters.bytes_out - before) == (1, waiting)
                for payload in payloads:
                    assert await client.frame() == (TEXT, payload)
            link.send(b"last")
            link.close(1000)  # while it closes its own flush goes on
            assert await client.frame() == (TEXT, b"last")
            assert await client.frame() == (CLOSE, (1000).to_bytes(2, "big"))

    run(main, loop)


@compiled
def test_what_is_no_link_is_flushed_by_its_own_method() -> None:
    class Other:
        flushed = 0

        def flush(self) -> None:
            Other.flushed += 1

    assert native.flush(Other()) == 0
    assert Other.flushed == 1
    with pytest.raises(AttributeError):
        native.flush(object())
