"""Streams over plain HTTP: parts out as lines, events and bytes; bodies in as parts; credit that follows the socket."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.core.errors import BAD_REPLY, OK, TOO_LARGE, Outcome
from broker.core.messages import Body, End
from broker.transports.http import calls as http_calls
from broker.wire.callparts import BodyLines, BodyPieces, Events, Lines, Octets, Unfit
from broker.wire.calls import Accepts, BadCall, read_accept
from broker.wire.pieces import Cutter, join
from tests.transports.http.harness import Wire, ask, wire, written
from tests.transports.websocket.harness import (
    CALLER,
    LISTENER,
    PATIENCE_S,
    Peer,
    World,
    config,
    head,
    joined,
    run,
    serving,
    until,
)

LINES = {"Accept": "application/x-ndjson"}
EVENT_STREAM = {"Accept": "text/event-stream"}
BYTES = {"Accept": "application/octet-stream"}
PIECE = 256 * 1024 - 64


class Reader:
    """An answer in chunks, as it comes."""

    def __init__(self, connection: Wire, status: int, headers: Mapping[str, str]) -> None:
        self.connection = connection
        self.status = status
        self.headers = headers
        self._rest = b""

    async def chunk(self) -> bytes:
        """The next chunk; empty at the end. Raises IncompleteReadError where the connection was cut."""
        async with asyncio.timeout(PATIENCE_S):
            reader = self.connection.reader
            size = int((await reader.readuntil(b"\r\n")).strip(), 16)
            data = await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
            return data

    async def line(self) -> Any:
        """The next line of JSON; None at the end."""
        while b"\n" not in self._rest:
            chunk = await self.chunk()
            if not chunk:
                assert not self._rest
                return None
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    async def lines(self) -> list[Any]:
        found = []
        while (line := await self.line()) is not None:
            found.append(line)
        return found

    async def rest(self) -> bytes:
        found = b""
        while chunk := await self.chunk():
            found += chunk
        return found


@asynccontextmanager
async def asking(
    world: World, path: str, body: bytes | None = b"", headers: Mapping[str, str] = LINES, secret: str = CALLER
) -> AsyncIterator[Wire]:
    async with wire(world) as connection:
        connection.send(written(world, path, body, secret, "POST", headers))
        yield connection


async def reading(connection: Wire) -> Reader:
    return Reader(connection, *await connection.header())


async def part(worker: Peer, call: Any, seq: int, data: object = None, *buffers: bytes, **more: Any) -> None:
    params = {"id": head(call)["id"], "seq": seq, "data": data, **more}
    message = {"jsonrpc": "2.0", "method": "$/part", "params": params}
    await worker.send(joined(message, *buffers) if buffers else message)


async def pieces(worker: Peer, call: Any, seq: int, text: bytes, *attachments: bytes, size: int = 0) -> tuple[int, Any]:
    """A value in pieces; the next number, and what stands for the value. `size` cuts it smaller than usual."""
    cutter = Cutter(text, attachments)
    whole = b"".join(cutter)
    size = size or PIECE
    for at in range(0, len(whole), size):
        await part(worker, call, seq, {"$buffer": 0}, whole[at : at + size], more=True)
        seq += 1
    return seq, json.loads(cutter.mark)


def balanced(world: World) -> bool:
    """Nothing is held for anybody any more."""
    state = world.broker.router.state
    return state.budget.outboxes == 0 and state.budget.used == sum(state.held().values()) and world.books_balance()


# ---------------------------------------------------------------- out: lines and events


def test_items_come_as_lines_one_by_one() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&meta=1")
            async with asking(world, "/call/lab/rows") as connection:
                call = await worker.taken()
                assert call["meta"]["stream"] == "in"
                await part(worker, call, 0, {"a": 1})
                reader = await reading(connection)
                assert reader.status == 200 and reader.headers["content-type"] == "application/x-ndjson"
                assert reader.headers["x-accel-buffering"] == "no" and "broker-outcome" not in reader.headers
                assert await reader.line() == {"item": {"a": 1}}, "before there is a second one"
                await part(worker, call, 1, [None, "end"])
                await part(worker, call, 2, None, last=True)
                await worker.answer(call, result={"rows": 2})
                assert await reader.line() == {"item": [None, "end"]}
                end = (await reader.line())["end"]
                assert end.pop("elapsed_ms") > 0
                assert end == {"outcome": "ok", "retryable": False, "result": {"rows": 2}}
                assert await reader.line() is None
                connection.send(written(world, "/call/nobody/m", b"", CALLER, "POST", {}))
                assert (await connection.answer()).status == 403, "the connection can be used again"
            assert world.counters.ended["ok"] == 1
            await until(lambda: balanced(world), "nothing is held")

    run(main)


def test_events_with_progress() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with asking(world, "/call/lab/scan?progress=1", headers=EVENT_STREAM) as connection:
                call = await worker.taken()
                told = {"id": call["id"], "value": {"done": 1, "total": 3}}
                await worker.send({"jsonrpc": "2.0", "method": "$/progress", "params": told})
                reader = await reading(connection)
                assert reader.headers["content-type"] == "text/event-stream"
                assert await reader.chunk() == b'event: progress\ndata: {"done": 1, "total": 3}\n\n'
                text = b'{"jsonrpc":"2.0","method":"$/part","params":{"id":"%b","seq":0,"data":[1,\r\n2]}}'
                await worker.send((text % call["id"].encode()).decode())
                assert await reader.chunk() == b"event: item\ndata: [1,  2]\n\n"
                await worker.answer(call, error={"code": 5, "message": "no"})
                name, data, *_ = (await reader.rest()).decode().split("\n")
                end = json.loads(data.removeprefix("data: "))
                assert name == "event: end" and end["error"] == {"code": 5, "message": "no"}
                assert end["outcome"] == "worker_error"

    run(main)


def test_progress_as_lines_only_if_asked() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            for path, wanted in (("/call/lab/m", 0), ("/call/lab/m?progress=1", 1)):
                async with asking(world, path) as connection:
                    call = await worker.taken()
                    told = {"id": call["id"], "value": {"done": 1}}
                    await worker.send({"jsonrpc": "2.0", "method": "$/progress", "params": told})
                    await worker.answer(call, result=1)
                    lines = await (await reading(connection)).lines()
                    assert lines[:-1] == [{"progress": {"done": 1}}] * wanted
                    assert lines[-1]["end"]["result"] == 1
            answer = await ask(world, "/call/lab/m?progress=1")
            assert (answer.status, answer.outcome) == (400, "invalid")
            assert "progress= goes with Accept: application/x-ndjson" in answer.json["error"]["data"]["detail"]

    run(main)


def test_a_method_that_streams_nothing_has_an_end_only() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            for headers in (LINES, EVENT_STREAM):
                async with asking(world, "/call/lab/m", headers=headers) as connection:
                    await worker.serve_one(result={"data": {"$base64": "AAE="}})
                    reader = await reading(connection)
                    assert (
                        reader.headers["broker-outcome"] == "ok" and reader.headers["content-type"] == headers["Accept"]
                    )
                    text = (await reader.rest()).decode()
                    assert text.startswith(('{"end":{"outcome":"ok"', 'event: end\ndata: {"outcome":"ok"'))
                    assert '"result":{"data": {"$base64":"AAE="}}' in text

    run(main)


@pytest.mark.parametrize("headers", [LINES, EVENT_STREAM, BYTES])
def test_what_ends_before_the_first_part_has_its_own_status(headers: dict[str, str]) -> None:
    async def main() -> None:
        async with serving(config(limits={"start_grace_s": 0})) as world:
            answer = await ask(world, "/call/lab/m", headers=headers)
            assert (answer.status, answer.outcome) == (404, "no_endpoint")
            worker = await world.worker()
            answer = await ask(world, "/call/lab/m?timeout=0.1", headers=headers)
            assert (answer.status, answer.outcome) == (504, "deadline")
            assert answer.headers["content-type"].startswith("application/json")
            waiting = asyncio.create_task(ask(world, "/call/lab/m", headers=headers))
            await worker.taken()
            await worker.answer(await worker.taken(), error={"code": -32602, "message": "no"})
            answer = await waiting
            assert (answer.status, answer.json) == (400, {"error": {"code": -32602, "message": "no"}})

    run(main)


def test_what_ends_after_the_first_part_says_so_on_the_last_line() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with asking(world, "/call/lab/m?timeout=0.5") as connection:
                await part(worker, await worker.taken(), 0, 1)
                lines = await (await reading(connection)).lines()
                assert lines[0] == {"item": 1} and len(lines) == 2
                assert lines[1]["end"]["outcome"] == "deadline"
                assert lines[1]["end"]["error"]["data"]["phase"] == "executing"

    run(main)


def test_a_stream_that_stands_still_ends() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with asking(world, "/call/lab/m?idle=0.3") as connection:
                call = await worker.taken()
                await part(worker, call, 0, 1)
                end = (await (await reading(connection)).lines())[-1]["end"]
                assert end["outcome"] == "deadline" and "nothing came for 0.3 s" in end["error"]["data"]["detail"]
                assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]

    run(main)


def test_attachments_of_items_are_base64() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            async with asking(world, "/call/lab/m") as connection:
                call = await worker.taken()
                await part(worker, call, 0, {"x": {"$buffer": 0}, "y": {"$buffer": 1}}, b"\0\1", b"")
                await worker.answer(call, result=None)
                lines = await (await reading(connection)).lines()
                assert lines[0] == {"item": {"x": {"$base64": "AAE="}, "y": {"$base64": ""}}}
                assert lines[1]["end"]["result"] is None

    run(main)


def test_values_in_pieces_are_put_together() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            data = os.urandom(700_000)
            async with asking(world, "/call/lab/m") as connection:
                call = await worker.taken()
                seq, mark = await pieces(worker, call, 0, b'[1,{"$buffer":0}]', data, size=200_000)
                await part(worker, call, seq, mark)
                reader = await reading(connection)
                import base64

                assert await reader.line() == {"item": [1, {"$base64": base64.b64encode(data).decode()}]}
                await worker.told("$/credit")
                seq, mark = await pieces(worker, call, seq + 1, b'{"large":"%b"}' % (b"x" * 300_000))
                await worker.answer(call, result=mark)
                assert (await reader.line())["end"]["result"] == {"large": "x" * 300_000}
            await until(lambda: balanced(world), "nothing is held")

    run(main)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("why", ["too large", "damaged", "no JSON", "not one attachment"])
def test_values_that_cannot_be_put_together_end_the_request(begun: bool, why: str) -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 500_000})) as world:
            worker = await world.worker(query="&binary=1")
            async with asking(world, "/call/lab/m") as connection:
                call = await worker.taken()
                seq = 0
                if begun:
                    await part(worker, call, 0, "first")
                    seq = 1
                if why == "too large":
                    await pieces(worker, call, seq, b'{"$buffer":0}', b"x" * 700_000)
                elif why == "not one attachment":
                    await part(worker, call, seq, 1, more=True)
                else:
                    seq, mark = await pieces(
                        worker, call, seq, b'{"$buffer":0}' if why == "damaged" else b"{", b"x" * 300_000
                    )
                    if why == "damaged":
                        mark["$joined"]["crc32"] ^= 1
                    await part(worker, call, seq, mark)
                outcome, status = ("too_large", 413) if why == "too large" else ("bad_reply", 502)
                if begun:
                    lines = await (await reading(connection)).lines()
                    assert lines[0] == {"item": "first"} and lines[1]["end"]["outcome"] == outcome
                else:
                    answer = await connection.answer()
                    assert (answer.status, answer.outcome) == (status, outcome)
                assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            await until(lambda: balanced(world), "nothing is held")

    run(main)


# ---------------------------------------------------------------- out: bytes


def test_bytes_are_the_attachments_one_after_the_other() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            async with asking(world, "/call/lab/m", headers=BYTES) as connection:
                call = await worker.taken()
                await part(worker, call, 0, {"at": 0, "data": {"$buffer": 0}}, b"one,")
                reader = await reading(connection)
                assert reader.headers["content-type"] == "application/octet-stream"
                assert await reader.chunk() == b"one,"
                await part(worker, call, 1, 0, b"two", b",three,")
                seq, mark = await pieces(worker, call, 2, b'["x",{"$buffer":0}]', b"four," * 100_000, size=250_000)
                await part(worker, call, seq, mark, last=True)
                await worker.send(joined({"jsonrpc": "2.0", "id": call["id"], "result": 1}, b"five"))
                assert await reader.rest() == b"two,three," + b"four," * 100_000 + b"five"
            await until(lambda: balanced(world), "nothing is held")

    run(main)


@pytest.mark.parametrize("size", [1, 5, 12, 1000])
def test_a_large_result_is_its_bytes(size: int) -> None:
    """Pieces may be cut anywhere, within the table of offsets too."""
    form, data = Octets(), b"abc" * 50
    cutter = Cutter(b'{"name":"x","data":{"$buffer":0}}', (data, b"more"))
    whole = b"".join(cutter)
    found = b""
    for at in range(0, len(whole), size):
        found += b"".join(form.part(Body(b'{"$buffer":0}', (whole[at : at + size],)), more=True, last=False))
    found += b"".join(form.end(End(b"1", Outcome(OK), Body(cutter.mark))))
    assert found == data + b"more"


@pytest.mark.parametrize("how", ["worker_error", "worker_lost", "deadline", "damaged", "no attachment"])
def test_bytes_that_go_wrong_are_cut_off(how: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            path = "/call/lab/m?timeout=0.5" if how == "deadline" else "/call/lab/m"
            async with asking(world, path, headers=BYTES) as connection:
                call = await worker.taken()
                if how == "damaged":
                    _, mark = await pieces(worker, call, 0, b'{"$buffer":0}', b"x" * 100)
                    mark["$joined"]["bytes"] += 1
                    reader = await reading(connection)
                    await worker.answer(call, result=mark)
                else:
                    await part(worker, call, 0, 1, b"x" * 100)
                    reader = await reading(connection)
                    if how == "worker_error":
                        await worker.answer(call, error={"code": 1, "message": "no"})
                    elif how == "worker_lost":
                        worker.socket.transport.abort()
                    elif how == "no attachment":
                        await part(worker, call, 1, "text")
                assert await reader.chunk() == b"x" * 100
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.chunk()
            await until(lambda: balanced(world) and not world.broker.router.pending.count, "nothing is held")

    run(main)


def test_items_without_bytes_are_not_acceptable() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            async with asking(world, "/call/lab/m", headers=BYTES) as connection:
                call = await worker.taken()
                await part(worker, call, 0, "text")
                answer = await connection.answer()
                assert answer.status == 406 and "x-ndjson" in answer.json["error"]
                assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            async with asking(world, "/call/lab/m", headers=BYTES) as connection:
                call = await worker.taken()
                await pieces(worker, call, 0, b'"%b"' % (b"x" * 1000))
                assert (await connection.answer()).status == 406

    run(main)


def test_who_takes_json_too_gets_the_parts_gathered() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            for headers in ({}, {"Accept": "application/octet-stream, application/json"}):
                async with asking(world, "/call/lab/m", headers=headers) as connection:
                    call = await worker.taken()
                    await part(worker, call, 0, 1)
                    await part(worker, call, 1, 2)
                    await worker.answer(call, result=None)
                    assert (await connection.answer()).json == [1, 2]

    run(main)


def test_a_key_makes_one_message_of_it() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&meta=1")
            async with asking(world, "/call/lab/m", headers=LINES | {"Idempotency-Key": "k"}) as connection:
                call = await worker.taken()
                assert "stream" not in call["meta"]
                await part(worker, call, 0, 1)
                await worker.answer(call, result=None)
                (line,) = await (await reading(connection)).lines()
                assert line["end"]["result"] == [1]
            answer = await ask(world, "/call/lab/m", headers=LINES | {"Idempotency-Key": "k"}, secret=CALLER)
            assert answer.headers["broker-repeated"] == "true"

    run(main)


# ---------------------------------------------------------------- out: credit


@pytest.mark.parametrize("resumes", [False, True])
def test_a_caller_that_stalls_stops_the_worker(resumes: bool) -> None:
    """Who reads again gets it all, who leaves cancels."""

    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            reader, writer = await asyncio.open_connection("127.0.0.1", world.broker.port, limit=1 << 14)
            writer.write(written(world, "/call/lab/m", b"", CALLER, "POST", BYTES))
            call = await worker.taken()
            chunk, sent, upto, stalled = os.urandom(256_000), 0, 4, False
            while not stalled:
                while sent < upto:
                    await part(worker, call, sent, 0, chunk)
                    sent += 1
                await worker.sync()
                await asyncio.sleep(0.05)  # the socket takes what it can
                await worker.sync()
                credits = [m for m in worker.inbox if head(m).get("method") == "$/credit"]
                worker.inbox.clear()
                stalled = not credits
                upto = max([upto, *(each["params"]["upto"] for each in credits)])
            held = world.broker.router.state.budget.outboxes
            assert 0 < held <= 9 * 256_000, "no more than a window"
            if resumes:
                answer = Reader(Wire(reader, writer), *await Wire(reader, writer).header())
                rest = asyncio.create_task(answer.rest())
                await worker.told("$/credit")
                await worker.answer(call, result=None)
                assert await rest == chunk * sent
                writer.close()
                return
            assert sent < 64, "the kernel's buffers and a window"
            await part(worker, call, sent, 0, chunk)
            writer.transport.abort()
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            await until(lambda: balanced(world), "nothing is held")
            assert world.counters.ended["bad_reply"] + world.counters.ended["cancelled"] == 1

    run(main)


def test_who_takes_nothing_of_the_end_is_cut_off() -> None:
    async def main() -> None:
        async with serving(config(limits={"stall_s": 0.3})) as world:
            worker = await world.worker(query="&binary=1")
            _, writer = await asyncio.open_connection("127.0.0.1", world.broker.port, limit=1 << 14)
            writer.write(written(world, "/call/lab/m", b"", CALLER, "POST", BYTES))
            call = await worker.taken()
            budget, sent, upto = world.broker.router.state.budget, 0, 4
            while sent < upto:
                await part(worker, call, sent, 0, os.urandom(256_000))
                sent += 1
                await worker.sync()
                found = [m["params"]["upto"] for m in worker.inbox if head(m).get("method") == "$/credit"]
                worker.inbox.clear()
                upto = max([upto, *found])
            assert budget.outboxes > 0
            await worker.answer(call, result=None)
            await until(lambda: len(world.broker.router.sessions) == 1 and balanced(world), "it is gone")
            writer.close()

    run(main)


def test_progress_is_dropped_while_its_caller_is_behind() -> None:
    class Handler:
        class engine:
            class loop:
                @staticmethod
                def call_soon(call: object) -> None: ...

            class router:
                class state:
                    class budget:
                        used = outboxes = 0

        @staticmethod
        def set_header(name: str, value: str) -> None: ...

    from broker.transports.http.replies import ReplyStream

    stream = ReplyStream(Handler(), Lines(1 << 20))  # type: ignore[arg-type]
    for _ in range(10):
        stream.progress(Body(b'"%b"' % (b"x" * 10_000)))
    assert 64_000 < Handler.engine.router.state.budget.used < 80_000


def test_a_session_that_has_to_end_cuts_the_stream_off() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            admin = await world.caller()
            async with asking(world, "/call/lab/m") as connection:
                call = await worker.taken()
                await part(worker, call, 0, 1)
                reader = await reading(connection)
                assert await reader.line() == {"item": 1}
                (peer,) = [
                    each["peer"]
                    for each in (await admin.call("broker.admin.peers"))["result"]
                    if each["dialect"] == "http"
                ]
                await admin.call("broker.admin.close", {"peer": peer, "reason": "enough"})
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.chunk()
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]

    run(main)


# ---------------------------------------------------------------- in: lines


async def taken_parts(worker: Peer, call: Any, *, grant: bool = True) -> list[Any]:
    """What the caller sends, to its end."""
    found: list[Any] = []
    while True:
        message = await worker.told("$/part")
        params = head(message)["params"]
        assert params["id"] == head(call)["id"] and params["seq"] == len(found)
        found.append(message)
        if grant:
            told = {"id": params["id"], "upto": len(found) + 8}
            await worker.send({"jsonrpc": "2.0", "method": "$/credit", "params": told})
        if params.get("last"):
            return found


NDJSON_BODY = {"Content-Type": "application/x-ndjson; charset=utf-8"}


def test_lines_go_on_as_they_come() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&meta=1")
            chunked = NDJSON_BODY | {"Transfer-Encoding": "chunked"}
            async with asking(world, "/call/lab/store", None, chunked) as connection:

                def send(data: bytes) -> None:
                    connection.send(b"%x\r\n%b\r\n" % (len(data), data))

                send(b'{"name": "a"}\n[1,')
                call = await worker.taken()
                assert call["params"] == {"name": "a"} and call["meta"]["stream"] == "out"
                send(b" 2]\n\n  \n")
                assert (await worker.told("$/part"))["params"] == {"id": call["id"], "seq": 0, "data": [1, 2]}
                send(b'"x"\r\nnull\n{"b":{"$base64":"AAE="}}')
                assert (await worker.told("$/part"))["params"]["data"] == "x"
                assert (await worker.told("$/part"))["params"]["data"] is None
                connection.send(b"0\r\n\r\n")
                assert (await worker.told("$/part"))["params"]["data"] == {"b": {"$base64": "AAE="}}
                await worker.send({"jsonrpc": "2.0", "method": "$/credit", "params": {"id": call["id"], "upto": 10}})
                last = (await worker.told("$/part"))["params"]
                assert (last["data"], last["last"]) == (None, True)
                await worker.answer(call, result="stored")
                answer = await connection.answer()
                assert (answer.status, answer.json, answer.outcome) == (200, "stored", "ok")
                connection.send(written(world, "/call/nobody/m", b"", CALLER, "POST", {}))
                assert (await connection.answer()).status == 403, "the connection can be used again"
            await until(lambda: balanced(world), "nothing is held")

    run(main)


def test_both_ways_at_once() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&meta=1")
            chunked = NDJSON_BODY | LINES | {"Transfer-Encoding": "chunked"}
            async with asking(world, "/call/lab/echo", None, chunked) as connection:
                connection.send(b"2\r\n1\n\r\n")
                call = await worker.taken()
                assert call["meta"]["stream"] == "both"
                connection.send(b'4\r\n"a"\n\r\n')
                got = (await worker.told("$/part"))["params"]
                await part(worker, call, 0, got["data"])
                reader = await reading(connection)
                assert await reader.line() == {"item": "a"}, "while the body goes on"
                connection.send(b"0\r\n\r\n")
                assert (await worker.told("$/part"))["params"]["last"]
                await worker.answer(call, result=None)
                assert (await reader.line())["end"]["outcome"] == "ok"
                assert await reader.line() is None

    run(main)


@pytest.mark.parametrize(("body", "params"), [(b"", "none"), (b"\n\n", "none"), (b'{"a":1}', {"a": 1})])
def test_a_body_of_one_line_or_none(body: bytes, params: Any) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with asking(world, "/call/lab/m", body, NDJSON_BODY) as connection:
                call = await worker.taken()
                assert call.get("params", "none") == params
                (last,) = await taken_parts(worker, call)
                assert last["params"]["last"]
                await worker.answer(call, result=1)
                assert (await connection.answer()).json == 1

    run(main)


def test_a_line_larger_than_a_part_goes_in_pieces() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            large = b'{"x":"%b"}' % (b"y" * 600_000)
            async with asking(world, "/call/lab/m", b"0\n" + large + b"\n7\n", NDJSON_BODY) as connection:
                call = await worker.taken()
                *cut, mark, item, last = await taken_parts(worker, call)
                assert all(head(each)["params"]["more"] for each in cut)
                joined_mark = json.dumps(head(mark)["params"]["data"], separators=(",", ":")).encode()
                assert join([each[1][0] for each in cut], joined_mark) == (large, ())
                assert head(item)["params"]["data"] == 7 and head(last)["params"]["last"]
                await worker.answer(call, result=1)
                assert (await connection.answer()).json == 1

    run(main)


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        (b"{\n", 400, "line 1 is no JSON"),
        (b"1\n2\nNaN\n", 400, "line 3 is no JSON"),
        (b'1\n"\xff"\n', 400, "line 2 is no UTF-8"),
        (b'1\n{"$base64":"A"}\n', 400, "line 2"),
        (b"1\n" + b"x" * 70_000, 413, "line 2 is longer than 65536 bytes"),
        (b"x" * 70_000, 413, "line 1 is longer"),
    ],
)
def test_bad_lines_take_the_request_back(lines: bytes, status: int, says: str) -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 65536})) as world:
            worker = await world.worker()
            async with asking(world, "/call/lab/m", lines, NDJSON_BODY) as connection:
                answer = await connection.answer()
                assert answer.status == status and says in answer.json["error"]["data"]["detail"]
                assert answer.outcome == ("invalid" if status == 400 else "too_large")
            if b"1\n" in lines:
                call = await worker.taken()
                assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            else:
                assert await worker.silent()
            await until(lambda: balanced(world), "nothing is held")

    run(main)


def test_an_end_is_heard_while_the_body_still_comes() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            chunked = NDJSON_BODY | {"Transfer-Encoding": "chunked"}
            async with asking(world, "/call/lab/m", None, chunked) as connection:
                connection.send(b"2\r\n1\n\r\n")
                call = await worker.taken()
                await worker.answer(call, error={"code": 4, "message": "full"})
                answer = await connection.answer()
                assert answer.status == 500 and answer.json["error"]["message"] == "full"
                assert answer.headers["connection"] == "close"
                for _ in range(100):
                    connection.send(b"2\r\n1\n\r\n")
                connection.send(b"0\r\n\r\n")
                async with asyncio.timeout(5):  # at once; the connection would be kept for 10 s otherwise
                    assert await connection.rest() == b""
            assert await worker.silent()

    run(main)


def test_an_end_wakes_what_waits_for_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_calls, "LINGER_S", 1000.0)

    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            async with asking(world, "/call/lab/m", b"0\n" + b"1\n" * 100, NDJSON_BODY) as connection:
                call = await worker.taken()
                for _ in range(4):
                    await worker.told("$/part")
                await worker.answer(call, result="enough")
                assert (await connection.answer()).json == "enough"
                assert await connection.rest() == b"", "the body has been read to its end, and nothing is waited for"
            assert await worker.silent()

    run(main)


@pytest.mark.parametrize("how", ["hang up", "closed"])
def test_who_waits_for_credit_may_leave(how: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            admin = await world.caller()
            chunked = NDJSON_BODY | {"Transfer-Encoding": "chunked"}
            async with asking(world, "/call/lab/m", None, chunked) as connection:
                connection.send(b"2\r\n0\n\r\n")
                call = await worker.taken()
                connection.send(b"A\r\n1\n2\n3\n4\n5\n\r\n")
                for _ in range(4):
                    await worker.told("$/part")
                if how == "closed":
                    peers = (await admin.call("broker.admin.peers"))["result"]
                    (peer,) = [each["peer"] for each in peers if each["dialect"] == "http"]
                    await admin.call("broker.admin.close", {"peer": peer, "reason": "enough"})
                    assert (await connection.answer()).status == 403
                    await connection.rest()
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            await until(
                lambda: not any("_server_request_loop" in repr(each) for each in asyncio.all_tasks()), "it ends"
            )

    run(main)


def test_a_body_that_never_ends_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_calls, "LINGER_S", 0.2)

    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 65536})) as world:
            chunked = NDJSON_BODY | {"Transfer-Encoding": "chunked"}
            async with asking(world, "/call/nobody/m", None, chunked, CALLER) as connection:
                connection.send(b"2\r\n1\n\r\n")
                assert (await connection.answer()).outcome == "denied"
                assert await connection.rest() == b"", "in time"
            monkeypatch.setattr(http_calls, "LINGER_S", 1000.0)
            async with asking(world, "/call/nobody/m", None, chunked, CALLER) as connection:
                connection.send(b"2\r\n1\n\r\n")
                assert (await connection.answer()).outcome == "denied"
                try:
                    for _ in range(40):
                        connection.send(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
                        await connection.writer.drain()
                except ConnectionError:
                    pass
                await connection.rest()

    run(main)


def test_a_beginning_that_does_not_come_is_not_waited_for() -> None:
    async def main() -> None:
        async with serving(config(limits={"body_timeout_s": 0.3})) as world:
            chunked = NDJSON_BODY | {"Transfer-Encoding": "chunked"}
            async with asking(world, "/call/lab/m", None, chunked) as connection:
                connection.send(b"2\r\n[1\r\n")
                assert await connection.rest() == b""
            worker = await world.worker()
            async with asking(world, "/call/lab/m", None, chunked) as connection:
                connection.send(b"2\r\n1\n\r\n")
                call = await worker.taken()
                await asyncio.sleep(0.5)  # it has begun, and may take its time
                connection.send(b"0\r\n\r\n")
                await taken_parts(worker, call)
                await worker.answer(call, result=1)
                assert (await connection.answer()).json == 1

    run(main)


def test_parts_wait_for_credit() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            body = b"0\n" + b"".join(b"%d\n" % number for number in range(20))
            async with asking(world, "/call/lab/m", body, NDJSON_BODY) as connection:
                call = await worker.taken()
                for number in range(4):
                    assert (await worker.told("$/part"))["params"]["data"] == number
                assert await worker.silent()
                told = {"jsonrpc": "2.0", "method": "$/credit", "params": {"id": call["id"], "upto": 6}}
                await worker.send(told)
                assert (await worker.told("$/part"))["params"]["data"] == 4
                assert (await worker.told("$/part"))["params"]["data"] == 5
                assert await worker.silent()
                await worker.send(told | {"params": {"id": call["id"], "upto": 60}})
                for number in range(6, 20):
                    assert (await worker.told("$/part"))["params"]["data"] == number
                assert (await worker.told("$/part"))["params"]["last"]
                await worker.answer(call, result=1)
                assert (await connection.answer()).json == 1

    run(main)


def test_who_hangs_up_in_the_middle_of_the_body_cancels() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            chunked = NDJSON_BODY | {"Transfer-Encoding": "chunked"}
            async with asking(world, "/call/lab/m", None, chunked) as connection:
                connection.send(b"2\r\n1\n\r\n")
                call = await worker.taken()
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            await until(lambda: balanced(world), "nothing is held")

    run(main)


@pytest.mark.parametrize("what", ["credential", "role", "path", "option"])
def test_what_is_refused_is_refused_before_the_body_is_there(what: str) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            path = {"path": "/call/lab/..m", "option": "/call/lab/m?timout=1"}.get(what, "/call/lab/m")
            secret = {"credential": "wrong", "role": LISTENER}.get(what, CALLER)
            body = b"1\n" + b"2\n" * 1000
            async with asking(world, path, body, NDJSON_BODY, secret) as connection:
                answer = await connection.answer()
                assert answer.status == {"credential": 401, "role": 403}.get(what, 400), answer.body
            assert await worker.silent()

    run(main)


# ---------------------------------------------------------------- in: bytes


def whole(parts: list[Any]) -> tuple[Any, list[bytes]]:
    """The params that came in pieces: JSON, attachments."""
    *cut, mark = parts
    assert all(head(each)["params"]["data"] == {"$buffer": 0} for each in cut)
    text = json.dumps(head(mark)["params"]["data"], separators=(",", ":")).encode()
    raw, attachments = join([each[1][0] for each in cut], text)
    return json.loads(raw), [bytes(each) for each in attachments]


OCTETS_BODY = {"Content-Type": "application/octet-stream"}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 600_000])
def test_bytes_of_any_length_are_attachment_0(chunked: bool, size: int) -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 100_000})) as world:
            worker = await world.worker(query="&binary=1&meta=1")
            data = os.urandom(size)
            headers, body = OCTETS_BODY, data
            if chunked:
                headers = headers | {"Transfer-Encoding": "chunked"}
                body = b"".join(
                    b"%x\r\n%b\r\n" % (len(data[at : at + 9999]), data[at : at + 9999]) for at in range(0, size, 9999)
                )
            path = "/call/lab/store?params=%7B%22data%22:%7B%22$buffer%22:0%7D%7D"
            async with asking(world, path, None if chunked else body, headers) as connection:
                if chunked:
                    connection.send(body + b"0\r\n\r\n")
                call = await worker.taken()
                if not chunked and size < 100_000:
                    assert call[0]["params"] == {"data": {"$buffer": 0}} and call[1] == [data]
                else:
                    assert head(call)["params"] == {"$joined": {"bytes": 0, "crc32": 0}}
                    assert head(call)["meta"]["stream"] == "out"
                    assert whole(await taken_parts(worker, call)) == ({"data": {"$buffer": 0}}, [data])
                await worker.answer(call, result="stored")
                assert (await connection.answer()).json == "stored"
            await until(lambda: balanced(world), "nothing is held")

    run(main)


@pytest.mark.parametrize("size", [0, 1, PIECE, 600_000])
def test_bytes_that_no_params_refer_to_are_items(size: int) -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1&meta=1")
            data = os.urandom(size)
            async with asking(
                world, "/call/lab/store?params=%7B%22path%22:%22a%22%7D", data, OCTETS_BODY
            ) as connection:
                call = await worker.taken()
                assert head(call)["params"] == {"path": "a"} and head(call)["meta"]["stream"] == "out"
                *items, end = await taken_parts(worker, call)
                assert b"".join(buffer for item in items for buffer in item[1]) == data
                assert not any({"more", "last"} & head(item)["params"].keys() for item in items)
                assert len(items) == -(-size // PIECE)
                assert head(end)["params"]["data"] is None
                await worker.answer(call, result="stored")
                assert (await connection.answer()).json == "stored"
            await until(lambda: balanced(world), "nothing is held")

    run(main)


def test_without_params_the_bytes_are_the_only_one() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            async with asking(world, "/call/lab/size", b"abc", OCTETS_BODY) as connection:
                call = await worker.taken()
                assert call[0]["params"] == [{"$buffer": 0}] and call[1] == [b"abc"]
                await worker.answer(call, result=3)
                assert (await connection.answer()).json == 3

    run(main)


def test_bad_params_beside_many_bytes_are_invalid() -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 65536})) as world:
            worker = await world.worker()
            async with asking(world, "/call/lab/m?params=%7B", b"x" * 100_000, OCTETS_BODY) as connection:
                answer = await connection.answer()
                assert (answer.status, answer.outcome) == (400, "invalid")
            assert await worker.silent()

    run(main)


def test_other_bodies_and_those_with_a_key_stay_within_the_bound() -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 65536})) as world:
            keyed = OCTETS_BODY | {"Idempotency-Key": "k"}
            for headers in ({}, {"Content-Type": "text/plain"}, keyed, NDJSON_BODY | {"Idempotency-Key": "k"}):
                answer = await ask(world, "/call/lab/m", b"1" * 70_000, headers=headers)
                assert answer.status == 413, headers
            answer = await ask(world, "/broadcast/lab", b"1" * 70_000, headers=OCTETS_BODY)
            assert answer.status == 413

    run(main)


def test_json_rpc_in_one_answer_holds_no_stream() -> None:
    async def main() -> None:
        async with serving() as world:
            worker = await world.worker()
            message: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": "lab/m", "meta": {"stream": "in"}}
            answer = await ask(world, "/rpc", message)
            assert answer.json["error"]["code"] == -32600 and "no stream" in answer.json["error"]["data"]["detail"]
            params = {"endpoint": "lab", "method": "m", "stream": "in"}
            waiting = asyncio.create_task(
                ask(world, "/rpc", {"jsonrpc": "2.0", "id": 1, "method": "broker.call", "params": params})
            )
            call = await worker.taken()
            await part(worker, call, 0, 1)
            assert (await waiting).outcome == "cancelled"
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]

    run(main)


# ---------------------------------------------------------------- curl, and many bytes


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_64_mib_go_through_in_both_directions_with_flat_memory() -> None:
    """The worker and the caller are in this process too: neither keeps anything."""
    total, chunk = 64 << 20, os.urandom(1 << 16)

    async def main() -> None:
        async with serving() as world:
            worker = await world.worker(query="&binary=1")
            headers = OCTETS_BODY | BYTES | {"Content-Length": str(total)}
            async with asking(world, "/call/lab/echo", None, headers) as connection:
                sent, got = hashlib.sha256(), hashlib.sha256()
                before = resident_bytes()
                highest = before

                async def send() -> None:
                    for _ in range(total // len(chunk)):
                        connection.send(chunk)
                        sent.update(chunk)
                        await connection.writer.drain()

                async def work() -> None:
                    """Sends back the pieces as they come, within the caller's credit."""
                    nonlocal highest
                    call = await worker.taken()
                    name, seq, upto = head(call)["id"], 0, 4
                    while True:
                        while seq >= upto:
                            upto = max(upto, (await worker.told("$/credit"))["params"]["upto"])
                        message = await worker.told("$/part")
                        params = head(message)["params"]
                        if "more" not in params:
                            await worker.answer(call, result=params["data"])
                            return
                        await part(worker, call, seq, {"$buffer": 0}, message[1][0], more=True)
                        seq += 1
                        told = {"id": name, "upto": seq + 8}
                        await worker.send({"jsonrpc": "2.0", "method": "$/credit", "params": told})
                        highest = max(highest, resident_bytes())

                working, sending = asyncio.create_task(work()), asyncio.create_task(send())
                reader = await reading(connection)
                size = 0
                while data := await reader.chunk():
                    got.update(data)
                    size += len(data)
                await asyncio.gather(working, sending)
                assert size == total and got.digest() == sent.digest()
                assert highest - before < 32 << 20
            await until(lambda: balanced(world), "nothing is held")

    run(main)


async def curl(world: World, *arguments: str, body: bytes = b"", secret: str = CALLER) -> tuple[int, bytes]:
    """Exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        "curl", "-sN", "--max-time", str(PATIENCE_S), "-H", f"Authorization: Bearer {secret}", *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, _ = await process.communicate(body)
    assert process.returncode is not None
    return process.returncode, printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_as_curl_does_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(config(limits={"message_max_bytes": 1 << 20})) as world:
            worker = await world.worker(query="&binary=1")
            url = f"{world.broker.url}/call/lab"

            waiting = asyncio.create_task(curl(world, "-H", "Accept: application/x-ndjson", f"{url}/rows", "-d", "{}"))
            call = await worker.taken()
            for seq in range(3):
                await part(worker, call, seq, seq)
            await worker.answer(call, result=None)
            code, printed = await waiting
            lines = [json.loads(line) for line in printed.splitlines()]
            assert code == 0 and lines[:3] == [{"item": 0}, {"item": 1}, {"item": 2}]
            assert lines[3]["end"]["outcome"] == "ok"

            file = tmp_path / "large"
            file.write_bytes(os.urandom(3 << 20))
            octets = ("-H", "Content-Type: application/octet-stream", "-X", "POST")
            for arguments, body in (
                (("--data-binary", f"@{file}"), b""),
                (("-T", str(file)), b""),
                (("-T", "-"), file.read_bytes()),
            ):
                waiting = asyncio.create_task(curl(world, *octets, *arguments, f"{url}/store", body=body))
                call = await worker.taken()
                assert whole(await taken_parts(worker, call)) == ([{"$buffer": 0}], [file.read_bytes()])
                await worker.answer(call, result="stored")
                assert await waiting == (0, b'"stored"'), arguments

            waiting = asyncio.create_task(
                curl(world, "-H", "Accept: application/octet-stream", "-d", "", f"{url}/read")
            )
            call = await worker.taken()
            await part(worker, call, 0, 0, b"x" * 1000)
            worker.socket.transport.abort()
            code, printed = await waiting
            assert code == 18 and printed == b"x" * 1000, "curl says that it is not whole"

    run(main)


# ---------------------------------------------------------------- the codec


def test_what_accept_says_of_streams() -> None:
    assert read_accept("application/x-ndjson") == Accepts(octets=False, json=True, stream="application/x-ndjson")
    assert read_accept("text/event-stream, */*").stream == "text/event-stream"
    assert read_accept("application/octet-stream, application/x-ndjson").json


def test_items_and_the_end_cannot_be_confused() -> None:
    end = End(b"1", Outcome(OK, elapsed_ms=1.5), Body(b"null"))
    for form in (Lines(1000), Events(1000)):
        fake = b'{"end":{"outcome":"ok"}}'
        item, last = (b"".join(form.part(Body(fake), more=False, last=False)), b"".join(form.end(end)))
        assert item.startswith((b'{"item":', b"event: item\n")) and last.startswith((b'{"end":', b"event: end\n"))
    assert form.part(Body(b" null "), more=False, last=True) == ()
    assert form.part(Body(b"0"), more=False, last=True) != ()


def test_line_ends_within_strings_stay() -> None:
    (text,) = Lines(1000).part(Body(b'{\r\n"a":\n"x\\ny"}'), more=False, last=False)
    assert bytes(text).count(b"\n") == 1 and json.loads(bytes(text)) == {"item": {"a": "x\ny"}}


@pytest.mark.parametrize(
    ("kind", "mark"),
    [
        (BAD_REPLY, b"1"),
        (BAD_REPLY, b'{"$joined":{"bytes":20,"crc32":0}}'),
        (BAD_REPLY, b'{"$joined":{"bytes":1,"crc32":0}}'),
    ],
)
def test_marks_that_lie(kind: object, mark: bytes) -> None:
    form = Octets()
    form.part(Body(b"{}", (bytes([0, 0, 0, 2, 0, 0, 0, 12, 0, 0, 0, 14]) + b"{}123456",)), more=True, last=False)
    with pytest.raises(Unfit) as found:
        form.part(Body(mark), more=False, last=False)
    assert found.value.kind is kind


def test_layouts_that_lie() -> None:
    for layout, kind in ((b"\0\0\0\1\0\0\0\x08{}__", None), (b"\0\0\0\2\0\0\0\x0c\0\0\0\1", BAD_REPLY)):
        with pytest.raises(Unfit) as found:
            Octets().part(Body(b"{}", (layout,)), more=True, last=False)
        assert found.value.kind is kind
    form = Octets()
    layout = bytes([0, 0, 0, 2, 0, 0, 0, 12, 0, 0, 9, 9])
    form.part(Body(b"{}", (layout,)), more=True, last=False)
    with pytest.raises(Unfit, match="shorter"):
        form.part(Body(b'{"$joined":{"bytes":12,"crc32":%d}}' % zlib.crc32(layout)), more=False, last=False)
    for form_ in (Octets(), Lines(100)):
        with pytest.raises(Unfit, match="0 attachments"):
            form_.part(Body(b"1"), more=True, last=False)


def test_an_item_that_is_too_large_as_base64() -> None:
    with pytest.raises(Unfit) as found:
        Lines(1000).part(Body(b'{"$buffer":0}', (b"x" * 900,)), more=False, last=False)
    assert found.value.kind is TOO_LARGE


def test_lines_of_a_body_however_it_is_cut() -> None:
    text = b'{"a": 1}\n\n[2]\r\n"\xc3\xa4"\n3'
    for size in range(1, len(text)):
        lines = BodyLines(100)
        found = [line for at in range(0, len(text), size) for line in lines.add(text[at : at + size])]
        found += list(lines.close())
        assert [bytes(each.raw) for each in found] == [b'{"a": 1}', b"[2]", '"ä"'.encode(), b"3"]
        assert lines.held_bytes == 0
    with pytest.raises(BadCall, match="line 1 is longer than 10 bytes"):
        list(BodyLines(10).add(b"x" * 11))


@pytest.mark.parametrize("size", [0, 1, 7, 100, PIECE - 20, PIECE, PIECE + 1, 3 * PIECE])
def test_a_body_in_pieces_is_a_value(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    body = BodyPieces(b'{"x":{"$buffer":0}}')
    cut = [piece for at in range(0, size, 50_000) for piece in body.add(data[at : at + 50_000])] + list(body.close())
    raw, attachments = join(cut, body.mark)
    assert json.loads(bytes(raw)) == {"x": {"$buffer": 0}} and [bytes(each) for each in attachments] == [data]
    assert all(len(piece) <= PIECE for piece in cut)
