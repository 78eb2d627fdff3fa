"""Both kinds of link over real sockets, on asyncio and uvloop."""

from __future__ import annotations

import asyncio
import logging

import pytest

from broker.links.connect import connect
from broker.links.limits import LinkLimits
from broker.links.link import READING_S
from broker.links.take import take
from broker.wire.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, text_frame
from tests.links.harness import ENDS, Echoing, RawClient, Recorder, frame, opening, raw_client, run, serving, until

MIB = 1 << 20
both = pytest.mark.parametrize(("kind", "loop"), ENDS)


async def close_of(client: RawClient) -> tuple[int, str]:
    """Read until the server's close frame."""
    while True:
        opcode, payload = await client.frame()
        if opcode == CLOSE:
            return int.from_bytes(payload[:2], "big"), payload[2:].decode()


@both
def test_messages_of_all_sizes_come_back_whole_and_in_order(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, receiver=Echoing) as server:
            link = await connect(server.url, server.links, ssl_context=server.client_context)
            heard = Recorder(link)
            link.start(heard)
            sent = [(b"", False), (b"x", True), ("é" * 80).encode(), b"y" * 16_385, b"z" * 70_000]
            whole = [part if isinstance(part, tuple) else (part, False) for part in sent]
            whole += [(str(number).encode(), bool(number & 1)) for number in range(3000)]
            for payload, binary in whole:
                link.send(payload, binary)
            await until(lambda: len(heard.messages) == len(whole), "all came back")
            assert heard.messages == whole
            link.send_parts([b"a" * 10, b"", b"b" * 10])
            link.send_parts([b"c" * 100_000, b"", b"d" * 100_000], binary=True)
            link.send(b"m" * (5 * MIB), binary=True)
            await until(lambda: len(heard.messages) == len(whole) + 3, "the large ones came back")
            assert heard.messages[-3:] == [
                (b"a" * 10 + b"b" * 10, False),
                (b"c" * 100_000 + b"d" * 100_000, True),
                (b"m" * (5 * MIB), True),
            ]
            link.close(1000, "done")
            await until(lambda: bool(heard.closings), "closed")
            assert heard.closings == [(1000, "done")]
            assert (await server.peer()).closings == [(1000, "done")]

    run(main, loop)


@both
def test_what_is_sent_with_the_request_is_not_lost(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, receiver=Echoing) as server:
            first = b"".join(frame(TEXT, str(number).encode()) for number in range(2000))
            async with raw_client(server, first + frame(BINARY, b"x" * 200_000)) as client:
                client.writer.write(frame(TEXT, b"after"))
                for number in range(2000):
                    assert await client.frame() == (TEXT, str(number).encode())
                assert await client.frame() == (BINARY, b"x" * 200_000)
                assert await client.frame() == (TEXT, b"after")

    run(main, loop)


@both
def test_a_connection_that_served_http_before_can_be_taken(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, receiver=Echoing) as server:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1",
                server.port,
                ssl=server.client_context,
                server_hostname="localhost" if server.client_context else None,
            )
            writer.write(b"GET /plain HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(5) == b"plain"

            writer.write(opening() + frame(TEXT, b"x"))
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            assert await RawClient(reader, writer).frame() == (TEXT, b"x")
            await RawClient(reader, writer).gone()

    run(main, loop)


# ── bad input ──


@both
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"x", masked=False), 1002),
        (frame(11, b""), 1002),
        (frame(TEXT, b"\xff"), 1007),
        (b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"\0\0\0\0" + b"x" * 100_000, 1009),
        (frame(CLOSE, b"\x03\xec"), 1002),
    ],
    ids=["unmasked", "opcode", "text", "tebibyte", "close code"],
)
def test_a_violation_is_answered_with_its_code_and_the_end(kind: str, loop: str, data: bytes, code: int) -> None:
    async def main() -> None:
        limits = LinkLimits(close_timeout_s=0.5)
        async with serving(kind, limits=limits) as server, raw_client(server) as client:
            client.writer.write(data + frame(TEXT, b"never looked at"))
            assert (await close_of(client))[0] == code
            assert await client.rest() == b""
            peer = await server.peer()
            assert peer.messages == []
            assert [closing[0] for closing in peer.closings] == [code]
            assert server.links.counters.protocol_errors == 1

    run(main, loop)


@both
def test_a_hundred_thousand_fragments_are_one_message(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server, raw_client(server) as client:
            client.writer.write(frame(TEXT, b"a", final=False))
            client.writer.write(frame(CONTINUATION, b"b", final=False) * 99_998 + frame(CONTINUATION, b"c"))
            peer = await server.peer()
            await until(lambda: bool(peer.messages), "the message came")
            assert peer.messages == [(b"a" + b"b" * 99_998 + b"c", False)]

    run(main, loop)


@both
def test_endless_empty_fragments_end_the_link(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, limits=LinkLimits(fragments_max=5000)) as server, raw_client(server) as client:
            client.writer.write(frame(TEXT, b"a", final=False) + frame(CONTINUATION, b"", final=False) * 6000)
            assert (await close_of(client))[0] == 1009

    run(main, loop)


@both
def test_pings_are_answered_and_a_flood_of_them_ends_the_link(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, limits=LinkLimits(pings_per_s_max=20)) as server, raw_client(server) as client:
            client.writer.write(frame(PING, b"one") + frame(PING))
            assert await client.frame() == (PONG, b"one")
            assert await client.frame() == (PONG, b"")
            client.writer.write(frame(PING) * 100)
            assert (await close_of(client))[0] == 4429
            assert server.links.counters.ping_floods == 1

    run(main, loop)


@both
def test_a_flood_of_tiny_messages_leaves_turns_to_others(kind: str, loop: str) -> None:
    async def main() -> None:
        turns = 0
        async with serving(kind) as server, raw_client(server) as client:
            peer = await server.peer()

            def count() -> None:
                nonlocal turns
                if len(peer.messages) < 20_000:
                    turns += 1
                    asyncio.get_running_loop().call_soon(count)

            client.writer.write(frame(TEXT, b"") * 20_000)
            count()
            await until(lambda: len(peer.messages) == 20_000, "all came")
            assert turns >= 20_000 // 512

    run(main, loop)


@both
def test_a_receiver_that_raises_ends_only_its_own_link(kind: str, loop: str, caplog: pytest.LogCaptureFixture) -> None:
    class Raising(Echoing):
        def message(self, payload: bytes, binary: bool) -> None:
            if payload == b"bad":
                raise RuntimeError("on purpose")
            super().message(payload, binary)

    async def main() -> None:
        async with serving(kind, receiver=Raising) as server, raw_client(server) as bad, raw_client(server) as good:
            bad.writer.write(frame(TEXT, b"bad") + frame(TEXT, b"x"))
            assert await bad.frame() == (CLOSE, (1011).to_bytes(2, "big") + b"internal error")
            good.writer.write(frame(TEXT, b"fine"))
            assert await good.frame() == (TEXT, b"fine")
            assert server.links.counters.receiver_errors == 1

    with caplog.at_level(logging.CRITICAL):
        run(main, loop)


# ── the outbox ──


@both
def test_a_peer_that_never_reads_is_closed_at_the_hard_bound_and_nobody_else_notices(kind: str, loop: str) -> None:
    async def main() -> None:
        limits = LinkLimits(close_timeout_s=0.5, outbox_reading_bytes=8 * MIB)
        serve = serving(kind, limits=limits, receiver=Echoing)
        async with serve as server, raw_client(server) as deaf, raw_client(server) as other:
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            peer, witness = await server.peer(0), await server.peer(1)
            sent = 0
            while not peer.closings:
                peer.link.send(b"x" * 100_000)
                sent += 1
                assert peer.link.outbox_bytes <= limits.outbox_hard_bytes + 10
                assert sent < 1000
                if sent % 10 == 0:
                    other.writer.write(frame(TEXT, b"alive"))
                    assert await other.frame() == (TEXT, b"alive")
            assert [code for code, _ in peer.closings] == [4408]
            assert peer.closings[0][1].endswith("bytes wait in the outbox, and 100010 more came")
            assert peer.congestion == [True]
            assert not peer.link.is_open
            await until(lambda: peer.link not in server.links.links, "the socket is dropped")
            assert witness.closings == []
            assert server.links.counters.slow_closes == 1

    run(main, loop)


@both
def test_large_messages_that_coincide_do_not_cost_a_reader_its_link(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server, raw_client(server) as client:
            peer = await server.peer(0)
            for _ in range(8):  # 40 MiB at once, five times the hard bound
                peer.link.send(b"x" * (5 * MIB))
            for _ in range(8):
                _, payload = await client.frame()
                assert len(payload) == 5 * MIB
            assert peer.closings == []

    run(main, loop)


@both
def test_who_has_taken_nothing_for_a_second_is_closed_above_the_hard_bound(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, limits=LinkLimits(close_timeout_s=0.5)) as server, raw_client(server) as deaf:
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            peer = await server.peer(0)
            for _ in range(4):
                peer.link.send(b"x" * (5 * MIB))
            assert peer.link.is_open
            ends_at = asyncio.get_running_loop().time() + 20 * READING_S
            while peer.link.is_open and asyncio.get_running_loop().time() < ends_at:
                await asyncio.sleep(READING_S / 5)
                peer.link.send(b"x")
            await until(lambda: bool(peer.closings), "told")
            assert peer.closings[0][0] == 4408

    run(main, loop)


@both
def test_a_peer_that_reads_again_is_told_that_it_was_slow(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, limits=LinkLimits(close_timeout_s=5)) as server, raw_client(server) as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            peer = await server.peer()
            while not peer.closings:
                peer.link.send(b"x" * 5000)
                if peer.link.outbox_bytes > MIB or not peer.link.is_open:
                    await asyncio.sleep(0)
            client.reader._transport.resume_reading()  # type: ignore[attr-defined]
            assert await close_of(client) == (4408, "slow consumer")

    run(main, loop)


@both
def test_a_stalled_outbox_is_closed_after_its_time(kind: str, loop: str) -> None:
    async def main() -> None:
        limits = LinkLimits(stall_s=0.3, close_timeout_s=0.3, outbox_hard_bytes=64 * MIB)
        async with serving(kind, limits=limits) as server, raw_client(server) as deaf:
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            peer = await server.peer()
            peer.link.send(b"x" * (20 * MIB), binary=True)
            await until(lambda: bool(peer.closings), "closed")
            assert peer.closings == [(4408, "nothing read for 0.3 s")]
            await until(lambda: not server.links.links, "the socket is dropped")

    run(main, loop)


@both
def test_congestion_is_told_once_each_way_and_nothing_is_lost(kind: str, loop: str) -> None:
    async def main() -> None:
        limits = LinkLimits(outbox_hard_bytes=64 * MIB)
        async with serving(kind, limits=limits) as server, raw_client(server) as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            peer = await server.peer()
            payloads = [bytes([number]) * 300_000 for number in range(60)]
            for payload in payloads:
                peer.link.send(payload, binary=True)
            mark = peer.link.enqueued
            assert peer.congestion == []  # never from inside send
            await until(lambda: peer.congestion == [True], "congested")
            assert peer.link.flushed < mark
            client.reader._transport.resume_reading()  # type: ignore[attr-defined]
            for payload in payloads:
                assert await client.frame() == (BINARY, payload)
            await until(lambda: peer.congestion == [True, False], "relieved")
            assert peer.link.flushed == mark
            assert peer.link.outbox_bytes == 0

    run(main, loop)


@both
def test_broadcasts_and_pongs_are_dropped_above_the_soft_bound_and_counted(kind: str, loop: str) -> None:
    async def main() -> None:
        limits = LinkLimits(outbox_hard_bytes=64 * MIB)
        async with serving(kind, limits=limits) as server, raw_client(server) as client:
            peer = await server.peer()
            news = text_frame(b"news" * 10)
            long_news = text_frame(b"long" * 10_000)
            assert peer.link.send_frame(news)
            assert peer.link.send_frame(long_news)
            assert await client.frame() == (TEXT, b"news" * 10)
            assert await client.frame() == (TEXT, b"long" * 10_000)
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            peer.link.send(b"x" * (20 * MIB), binary=True)
            assert not peer.link.send_frame(news)
            client.writer.write(frame(PING, b"?"))
            await until(lambda: server.links.counters.pongs_dropped == 1, "the pong was dropped")
            assert (peer.link.broadcasts_dropped, server.links.counters.broadcasts_dropped) == (1, 1)
            client.reader._transport.resume_reading()  # type: ignore[attr-defined]
            assert await client.frame() == (BINARY, b"x" * (20 * MIB))
            await until(lambda: peer.link.send_frame(news), "broadcasts go again")
            assert await client.frame() == (TEXT, b"news" * 10)
            assert peer.closings == []

    run(main, loop)


@both
def test_one_message_above_the_hard_bound_may_stand_alone(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, limits=LinkLimits(close_timeout_s=0.5)) as server, raw_client(server) as client:
            peer = await server.peer()
            peer.link.send(b"small")
            peer.link.send(b"x" * (30 * MIB), binary=True)
            peer.link.send(b"behind it")
            assert await client.frame() == (TEXT, b"small")
            assert await client.frame() == (BINARY, b"x" * (30 * MIB))
            assert await client.frame() == (TEXT, b"behind it")
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            peer.link.send(b"x" * (30 * MIB), binary=True)
            peer.link.send(b"x" * (30 * MIB), binary=True)
            await until(lambda: bool(peer.closings), "closed")
            assert peer.closings[0][0] == 4408

    run(main, loop)


@both
def test_writes_of_a_turn_are_joined(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server, raw_client(server) as client:
            peer = await server.peer()
            before = server.links.counters.writes
            for number in range(100):
                peer.link.send(str(number).encode())
            for number in range(100):
                assert await client.frame() == (TEXT, str(number).encode())
            assert server.links.counters.writes == before + 1

    run(main, loop)


# ── reading ──


@both
def test_a_paused_link_reads_nothing_and_loses_nothing(kind: str, loop: str) -> None:
    class Pausing(Recorder):
        def message(self, payload: bytes, binary: bool) -> None:
            super().message(payload, binary)
            if len(self.messages) == 1:
                self.link.pause_reading()

    async def main() -> None:
        async with serving(kind, receiver=Pausing) as server, raw_client(server) as client:
            total = 50_000
            client.writer.write(b"".join(frame(TEXT, b"%d" % number) for number in range(total)))
            peer = await server.peer()
            await until(lambda: bool(peer.messages), "the first came")
            reached = len(peer.messages)
            assert reached <= 512
            for _ in range(20):
                await asyncio.sleep(0.002)
            assert len(peer.messages) == reached
            peer.link.resume_reading()
            await until(lambda: len(peer.messages) == total, "all came")
            assert peer.messages == [(b"%d" % number, False) for number in range(total)]

    run(main, loop)


# ── the end ──


@both
def test_our_close_waits_for_what_is_queued_and_for_the_answer(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server, raw_client(server) as client:
            peer = await server.peer()
            peer.link.send(b"x" * MIB, binary=True)
            peer.link.close(4412, "drained")
            peer.link.close(1000, "not said any more")
            peer.link.send(b"not sent any more")
            client.writer.write(frame(TEXT, b"not looked at any more"))
            assert await client.frame() == (BINARY, b"x" * MIB)
            assert await client.frame() == (CLOSE, (4412).to_bytes(2, "big") + b"drained")
            assert peer.closings == []
            client.writer.write(frame(CLOSE, (4412).to_bytes(2, "big")))
            assert await client.rest() == b""
            assert peer.closings == [(4412, "drained")]
            assert peer.messages == []

    run(main, loop)


@both
@pytest.mark.parametrize(("payload", "code"), [(b"\x03\xe8bye", 1000), (b"", 1005)])
def test_a_close_of_the_peer_is_answered_with_its_code(kind: str, loop: str, payload: bytes, code: int) -> None:
    async def main() -> None:
        async with serving(kind, receiver=Echoing) as server, raw_client(server) as client:
            client.writer.write(frame(TEXT, b"x") + frame(CLOSE, payload) + frame(TEXT, b"y") * 1000)
            assert await client.frame() == (TEXT, b"x")
            assert await client.frame() == (CLOSE, payload[:2])
            assert await client.rest() == b""
            peer = await server.peer()
            assert peer.closings == [(code, payload[2:].decode())]

    run(main, loop)


@both
def test_a_peer_that_does_not_answer_our_close_is_dropped(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, limits=LinkLimits(close_timeout_s=0.2)) as server, raw_client(server) as client:
            peer = await server.peer()
            peer.link.close(1001, "going")
            assert (await close_of(client)) == (1001, "going")
            await until(lambda: not server.links.links, "dropped")
            assert peer.closings == [(1001, "going")]

    run(main, loop)


@both
def test_a_connection_that_breaks_is_told_as_1006(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server:
            async with raw_client(server) as client:
                peer = await server.peer()
                client.writer.write(frame(TEXT, b"last words"))
                await until(lambda: bool(peer.messages), "heard")
            await until(lambda: bool(peer.closings), "noticed")
            assert peer.closings == [(1006, "")]
            peer.link.send(b"dropped")
            assert not peer.link.send_frame(text_frame(b"dropped"))
            peer.link.close(1000)
            peer.link.abort()
            peer.link.pause_reading()
            peer.link.resume_reading()

    run(main, loop)


@both
def test_abort_drops_at_once_and_tells_its_code(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server, raw_client(server) as client:
            peer = await server.peer()
            peer.link.send(b"x" * MIB)
            peer.link.abort(4409, "replaced")
            assert peer.closings == []  # never from inside a call
            await until(lambda: bool(peer.closings), "told")
            assert peer.closings == [(4409, "replaced")]
            await client.rest()

    run(main, loop)


@both
def test_a_link_that_is_closed_before_its_start_tells_when_started(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server:
            async with raw_client(server):
                pass
            peer = await server.peer()
            await until(lambda: bool(peer.closings), "told")
            with pytest.raises(RuntimeError, match="was started before"):
                peer.link.start(peer)

    run(main, loop)


@both
def test_all_links_can_be_closed_together(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server:
            ours = []
            for _ in range(20):
                link = await connect(server.url, server.links, ssl_context=server.client_context)
                ours.append(Recorder(link))
                link.start(ours[-1])
            await server.peer(19)
            await server.links.close(4412, "drained")
            assert server.links.links == []
            assert {closing for peer in server.peers for closing in peer.closings} == {(4412, "drained")}

    run(main, loop)


def test_a_broadcast_frame_needs_a_server_end() -> None:
    async def main() -> None:
        async with serving() as server:
            link = await connect(server.url, server.links)
            with pytest.raises(ValueError, match="masked one by one"):
                link.send_frame(text_frame(b"x"))
            link.start(Recorder(link))

    run(main)


@pytest.mark.parametrize("name", ["message_max_bytes", "stall_s", "write_turn_bytes", "pings_per_s_max"])
def test_limits_that_cannot_work_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, at least"):
        LinkLimits(**{name: 0})


@both
def test_what_came_before_the_start_is_heard_though_the_peer_has_left(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, start=False) as server:
            async with raw_client(server) as client:
                peer = await server.peer()
                client.writer.write(frame(TEXT, b"last words") * 2000 + frame(CLOSE, b"\x03\xe8"))
                await client.writer.drain()
            for _ in range(20):
                await asyncio.sleep(0.002)
            peer.link.start(peer)
            await until(lambda: bool(peer.closings), "told")
            assert peer.messages == [(b"last words", False)] * 2000
            assert peer.closings == [(1000, "")]

    run(main, loop)


@both
def test_a_link_that_is_never_started_can_be_aborted(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind, start=False) as server:
            async with raw_client(server):
                peer = await server.peer()
            for _ in range(20):
                await asyncio.sleep(0.002)
            peer.link.abort()
            await until(lambda: not server.links.links, "gone")
            peer.link.start(peer)
            await until(lambda: bool(peer.closings), "told")

    run(main, loop)


@both
def test_taking_a_connection_whose_peer_has_left_is_an_error_and_leaves_nothing(kind: str, loop: str) -> None:
    async def main() -> None:
        async with serving(kind) as server:
            _, ours = await asyncio.open_connection("127.0.0.1", server.port)
            await until(lambda: server.acceptor.counters.accepted == 1, "accepted")
            stream = next(iter(server.acceptor._waiting))
            ours.close()
            stream.close()
            with pytest.raises(ConnectionError):
                await take(stream, b"HTTP/1.1 101 X\r\n\r\n", server.links)
            assert server.links.links == []

    run(main, loop)


def test_a_turn_is_bounded_and_splits_only_large_frames() -> None:
    async def main() -> None:
        async with serving(limits=LinkLimits(write_turn_bytes=65_536)) as server, raw_client(server) as client:
            peer = await server.peer()
            link = peer.link
            sizes: list[int] = []
            hand = link._hand

            def watched(pieces: list[bytes | memoryview]) -> None:
                sizes.append(sum(map(len, pieces)))
                hand(pieces)

            class Watched(type(link)):  # type: ignore[misc]
                __slots__ = ()

                def _hand(self, pieces: list[bytes | memoryview], taken: int = 0) -> None:
                    watched(pieces)

            link.__class__ = Watched
            for _ in range(20):
                link.send(b"s" * 10_000)
            link.send(b"l" * 500_000)
            link.send(b"end")
            for _ in range(20):
                assert await client.frame() == (TEXT, b"s" * 10_000)
            assert await client.frame() == (TEXT, b"l" * 500_000)
            assert await client.frame() == (TEXT, b"end")
            assert max(sizes) <= 65_536
            assert sizes[:3] == [60_024, 60_024, 60_024]
            link.__class__ = Watched.__mro__[1]

    run(main)
