"""Bad input end to end: a clear answer, the connection survives what it can, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.links.harness import MASK, RawClient, frame
from tests.transports.websocket.harness import ADMIN, Peer, World, config, joined, run, serving, until


@asynccontextmanager
async def bystanders(world: World) -> AsyncIterator[Peer]:
    """A caller and a worker with a request in flight all the while; it must end well, and a new one too."""
    worker, caller = await world.worker("other"), await world.caller("other")
    wire_id = await caller.ask("m")
    call = await worker.taken()
    yield caller
    await worker.answer(call, result="untouched")
    assert (await caller.reply(wire_id))["result"] == "untouched"
    wire_id = await caller.ask("m")
    await worker.serve_one("and on")
    assert (await caller.reply(wire_id))["result"] == "and on"
    assert world.books_balance()


@asynccontextmanager
async def raw_peer(world: World, path: str = "/ws/lab") -> AsyncIterator[RawClient]:
    """A WebSocket by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{world.broker.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2tra2tra2tra2tra2traw==\r\n"
        f"Authorization: Bearer {ADMIN}\r\n\r\n".encode()
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    client = RawClient(reader, writer)
    try:
        yield client
    finally:
        await client.gone()


def close_of(payload: bytes) -> tuple[int, str]:
    return int.from_bytes(payload[:2], "big"), payload[2:].decode()


PING = b'{"jsonrpc":"2.0","id":"p","method":"broker.ping"}'


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"jsonrpc":"2.0","id":1,"method":', -32700),
        ("", -32700),
        ("\u0000", -32700),
        ("[" * 100_000, -32700),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":%s}' % ("[" * 100_000 + "]" * 100_000), -32700),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":[NaN]}', -32700),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":["\\ud800"]}', -32700),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":[],"id":7}', -32600),
        ('{"jsonrpc":"2.0","id":1.5,"method":"m"}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":5}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"m","meta":{"no":1}}', -32602),
        ("7", -32600),
    ],
)  # fmt: skip
def test_row_18_messages_that_are_none(text: str, code: int) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with bystanders(world):
                peer = await world.caller()
                for _ in range(2):  # two strikes are not three
                    await peer.send(text)
                    assert (await peer.read())["error"]["code"] == code
                await peer.sync()
                assert await worker.silent(), "the worker saw nothing of it"

    run(main)


def test_row_18_three_strikes_close_with_4400() -> None:
    async def main() -> None:
        async with serving() as world:
            async with bystanders(world):
                peer = await world.caller()
                worker = await world.worker()
                await peer.ask("m", id="in flight")
                await worker.taken()
                for _ in range(3):
                    await peer.send("{")
                code, reason = await peer.closed()
                assert code == 4400
                assert reason.startswith("3 strikes, last: ")
                assert [m["error"]["code"] for m in peer.inbox] == [-32700] * 3, "each was answered"
                await worker.told("$/cancelRequest")
            assert (world.counters.malformed, world.counters.strikes) == (3, 3)

    run(main)


def test_mistakes_that_are_no_abuse_close_nothing() -> None:
    async def main() -> None:
        async with serving() as world:
            peer = await world.caller()
            for _ in range(50):
                assert (await peer.call("a/b"))["error"]["code"] == -32600
                await peer.send({"no": "message"})
                assert (await peer.read())["error"]["code"] == -32600
            assert world.counters.strikes == 0
            await peer.sync()

    run(main)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "too short"),
        (b"{}", "too short"),
        (struct.pack(">III", 2, 12, 500) + b"{}", "part 0"),
        (struct.pack(">III", 2, 5, 14) + b"{}", "offset 0"),
        (struct.pack(">I", 2**31) + b"x" * 100, "parts"),
        (joined([]), "batch"),
        (struct.pack(">II", 1, 8) + b"\xff\xfe", "UTF-8"),
        (struct.pack(">II", 1, 8) + b"{", "malformed|truncated"),
    ],
)
def test_binary_frames_that_are_none(data: bytes, named: str) -> None:
    async def main() -> None:
        import re

        async with serving() as world, bystanders(world):
            peer = await world.caller()
            for _ in range(2):
                await peer.send(data)
                answer = await peer.read()
                assert answer["id"] is None
                assert re.search(named, answer["error"]["data"]["detail"])
            await peer.sync()

    run(main)


def test_broken_json_under_an_id_in_flight_ends_nobodys_request() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, caller = await world.worker(), await world.caller()
            await caller.ask("m", id=7)
            call = await worker.taken()
            await caller.send('{"jsonrpc":"1.0","id":7,"method":"m"}')
            answer = await caller.read()
            assert (answer["id"], answer["error"]["code"]) == (None, -32600)
            await worker.answer(call, result=1)
            assert "result" in await caller.reply(7)

    run(main)


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(1, PING, masked=False), 1002),
        (b"\xc1\x80" + MASK, 1002),
        (frame(3), 1002),
        (frame(11), 1002),
        (frame(0, b"x"), 1002),
        (frame(9, b"x" * 126), 1002),
        (frame(9, b"x", final=False), 1002),
        (frame(1, b"\xff"), 1007),
        (frame(1, b"\xed\xa0\x80"), 1007),
        (frame(1, b"\xc3", final=False) + frame(0, b"("), 1007),
        (b"\x81\xff" + (1 << 40).to_bytes(8, "big") + MASK, 1009),
        (b"\x81\xff" + (1 << 63).to_bytes(8, "big") + MASK, 1002),
        (frame(8, b"\x00"), 1002),
        (frame(8, (1005).to_bytes(2, "big")), 1002),
        (frame(8, (5000).to_bytes(2, "big")), 1002),
        (frame(8, b"\x03\xe8\xff"), 1007),
    ],
)
def test_row_19_frames_against_the_rfc_are_closed_with_the_right_code(data: bytes, code: int) -> None:
    async def main() -> None:
        async with serving() as world, bystanders(world), raw_peer(world) as raw:
            raw.writer.write(data + frame(1, PING))
            opcode, payload = await raw.frame()
            assert (opcode, close_of(payload)[0]) == (8, code), payload
            assert b"jsonrpc" not in await raw.rest(), "what follows is not looked at"

    run(main)


def test_row_16_a_tebibyte_is_refused_at_its_header() -> None:
    async def main() -> None:
        settings = config(limits={"message_max_bytes": 65_536})
        async with serving(settings) as world, bystanders(world):
            for size in (65_537, 1 << 40):
                async with raw_peer(world) as raw:
                    raw.writer.write(b"\x81\xff" + size.to_bytes(8, "big") + MASK + b"x" * 100)
                    assert close_of((await raw.frame())[1])[0] == 1009
            async with raw_peer(world) as raw:
                for _ in range(5):
                    raw.writer.write(frame(1 if _ == 0 else 0, b"x" * 20_000, final=False))
                assert close_of((await raw.frame())[1])[0] == 1009

    run(main)


def test_row_16_endless_fragments_are_bounded() -> None:
    async def main() -> None:
        settings = config(limits={"fragments_max": 1000})
        async with serving(settings) as world, bystanders(world), raw_peer(world) as raw:
            raw.writer.write(frame(1, b"", final=False) + frame(0, b"", final=False) * 1000)
            assert close_of((await raw.frame())[1])[0] == 1009

    run(main)


def test_a_message_in_a_hundred_thousand_pieces_is_one_message() -> None:
    async def main() -> None:
        async with serving() as world, bystanders(world), raw_peer(world) as raw:
            text = PING[:-1] + b',"params":"%b"}' % (b"x" * (99_988 - len(PING)))
            assert len(text) == 100_000
            pieces = [frame(0, text[n : n + 1], final=False) for n in range(1, 99_999)]
            raw.writer.write(frame(1, text[:1], final=False) + b"".join(pieces) + frame(0, text[-1:]))
            opcode, payload = await raw.frame()
            assert opcode == 1
            assert json.loads(payload)["id"] == "p", payload

    run(main)


def test_a_frame_cut_short_is_nothing_and_the_peer_is_gone() -> None:
    async def main() -> None:
        async with serving() as world, bystanders(world):
            async with raw_peer(world) as raw:
                raw.writer.write(frame(1, PING)[:-1])
                await until(lambda: world.counters.attached == 3, "attached")
            await until(lambda: world.counters.detached == 1, "it is gone")
            assert world.counters.malformed == 0

    run(main)


# ---------------------------------------------------------------- readers and writers


def test_row_20_and_1_silence_is_closed_and_counted() -> None:
    async def main() -> None:
        settings = config(limits={"header_timeout_s": 0.4, "unauthenticated_max": 5})
        async with serving(settings) as world:
            peer = await world.peer("/ws")
            silent = [await asyncio.open_connection("127.0.0.1", world.broker.port) for _ in range(3)]
            slow_reader, slow_writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
            slow_writer.write(b"GET /ws HTTP/1.1\r\nHost: ")
            for reader, _ in [*silent, (slow_reader, slow_writer)]:
                async with asyncio.timeout(5):
                    assert await reader.read() == b""
            for _, writer in [*silent, (slow_reader, slow_writer)]:
                writer.close()
            await peer.sync()  # who is attached may be silent as long as it likes
            crowd = [await asyncio.open_connection("127.0.0.1", world.broker.port) for _ in range(8)]
            async with asyncio.timeout(5):
                for reader, _ in crowd:
                    assert await reader.read() == b""
            assert await world.metric("broker_accept_refused_total") >= 3
            for _, writer in crowd:
                writer.close()
            await peer.sync()

    run(main)


def test_row_20_a_slow_body_is_cut_off() -> None:
    async def main() -> None:
        async with serving(config(limits={"body_timeout_s": 0.3})) as world, bystanders(world):
            reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
            writer.write(
                f"POST /ticket HTTP/1.1\r\nHost: 127.0.0.1:{world.broker.port}\r\nContent-Length: 10\r\n\r\nx".encode()
            )
            async with asyncio.timeout(5):
                assert b"200" not in await reader.read()
            writer.close()

    run(main)


def test_bodies_before_authentication_are_small() -> None:
    async def main() -> None:
        async with serving() as world, bystanders(world):
            for size in (70_000, 1 << 40):
                reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port)
                writer.write(
                    f"POST /ticket HTTP/1.1\r\nHost: 127.0.0.1:{world.broker.port}\r\n"
                    f"Content-Length: {size}\r\n\r\n".encode()
                )
                async with asyncio.timeout(5):
                    answer = await reader.read()
                assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), answer
                writer.close()

    run(main)


def test_row_21_a_reader_that_does_not_read_loses_broadcasts_then_its_link() -> None:
    async def main() -> None:
        settings = config(
            limits={"outbox_soft_bytes": 65_536, "outbox_hard_bytes": 4 << 20, "stall_s": 1, "fanouts_max": 10_000}
        )
        async with serving(settings) as world, bystanders(world):
            async with raw_peer(world, "/ws/lab"):
                good = await world.peer("/ws/lab")
                publisher = await world.caller()
                text = "x" * 30_000
                heard, rounds = 0, 400
                for number in range(rounds):
                    await publisher.ask("broker.publish", {"endpoint": "lab", "data": text})
                    await publisher.reply(number + 1)
                    heard += (await good.told("broker.message"))["params"]["seq"] == number + 1
                assert heard == rounds, "the other listener missed nothing"
                assert world.counters.copies_dropped > 0
                assert await world.metric("broker_link_broadcasts_dropped_total") > 0
                counters = world.broker.links.counters
                await until(lambda: counters.slow_closes == 1, "the one that stalled is closed")
            assert (await world.metric("broker_copies_total")) >= rounds

    run(main, "uvloop")


def test_row_21_replies_nobody_reads_end_the_link_at_the_hard_bound() -> None:
    async def main() -> None:
        bound = 4 << 20
        limits = {"outbox_soft_bytes": bound, "outbox_hard_bytes": bound, "outbox_reading_bytes": bound, "stall_s": 60}
        async with serving(config(limits=limits)) as world, bystanders(world):
            worker = await world.worker()
            async with raw_peer(world) as raw:
                for number in range(60):
                    raw.writer.write(frame(1, b'{"jsonrpc":"2.0","id":%d,"method":"m"}' % number))
                for _ in range(60):
                    await worker.serve_one("x" * 300_000)
                await until(lambda: world.broker.links.counters.slow_closes == 1, "closed")
                await until(lambda: len(world.broker.router.sessions) == 3, "its session is gone")
            await worker.sync()

    run(main)


def test_row_23_ping_floods_and_tiny_messages_leave_others_their_turn() -> None:
    async def main() -> None:
        async with serving(config(limits={"pings_per_s": 50})) as world, bystanders(world) as caller:
            async with raw_peer(world) as raw:
                raw.writer.write(frame(9, b"!") * 2000)
                pongs = 0
                while True:
                    opcode, payload = await raw.frame()
                    if opcode == 8:
                        break
                    pongs += opcode == 10
                assert close_of(payload)[0] == 4429
                assert pongs <= 101  # two seconds may have begun
            async with raw_peer(world) as raw:
                note = frame(1, b'{"jsonrpc":"2.0","method":"note"}')
                raw.writer.write(note * 50_000)
                await caller.sync()  # answered while the flood is on
                await until(lambda: world.counters.notifications == 50_000, "all were read")

    run(main, "uvloop")


def test_row_23_churn_leaves_nothing() -> None:
    async def main() -> None:
        async with serving() as world, bystanders(world):
            for _ in range(10):
                peers = await asyncio.gather(*(world.peer("/ws/lab") for _ in range(20)))
                for number, peer in enumerate(peers):
                    await peer.ask("m", meta={"wait": True})
                    if number % 2:
                        peer.socket.transport.abort()
                    else:
                        await peer.socket.close()
            await until(lambda: world.counters.detached == 200, "all have gone")
            router = world.broker.router
            assert router.pending.count == 1, "the bystanders'"
            assert len(router.sessions) == 2
            assert len(router.registry.by_name["lab"].queue) == 0
            router.check()

    run(main, "uvloop")


def test_row_24_names_end_to_end() -> None:
    async def main() -> None:
        async with serving() as world, bystanders(world):
            peer = await world.peer("/ws")
            for name in ("x" * 129, "x" * 10_000, "*", "a\n", "\u202e", "../../etc", "lab*", " ", "a\x00", ".", "-"):
                for method in (f"{name}/m", f"lab/{name}"):
                    answer = await peer.call(method)
                    assert answer["error"]["code"] == -32600
                    assert len(json.dumps(answer)) < 2000
                for params in ({"endpoint": name}, {"endpoint": "lab", "topic": name}):
                    assert (await peer.call("broker.subscribe", params))["error"]["code"] == -32602
                assert (await peer.call("broker.serve", {"endpoint": "ok", "methods": [name]}))["error"]
            for name in ("__proto__", "constructor", "__class__", "0"):
                assert "result" in await peer.call("broker.subscribe", {"endpoint": name})
            listed = (await peer.call("broker.endpoints"))["result"]
            assert [e["endpoint"] for e in listed] == ["other", "__proto__", "constructor", "__class__", "0"]

    run(main)


def test_row_24_names_per_session_are_bounded() -> None:
    async def main() -> None:
        async with serving(config(limits={"names_per_session_max": 10})) as world:
            peer = await world.peer("/ws")
            for number in range(10):
                method = "broker.serve" if number % 2 else "broker.subscribe"
                assert "result" in await peer.call(method, {"endpoint": f"e{number}"})
            for method in ("broker.serve", "broker.subscribe"):
                assert (await peer.call(method, {"endpoint": "more"}))["error"]["data"]["bound"] == "names"
                assert "result" in await peer.call(method, {"endpoint": "e1" if method == "broker.serve" else "e0"})

    run(main)


def test_a_peer_that_never_writes_costs_nothing_and_hears_everything() -> None:
    async def main() -> Any:
        async with serving() as world, bystanders(world):
            quiet = await world.peer("/ws/lab")
            publisher = await world.caller()
            await publisher.call("broker.publish", {"endpoint": "lab", "data": 1})
            assert (await quiet.told("broker.message"))["params"]["data"] == 1

    run(main)
