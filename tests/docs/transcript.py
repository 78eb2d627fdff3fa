"""Replays a transcript of the protocol against a real broker and says where the broker says something else.

The notation is explained in docs/protocol.md, under "Transcripts".
"""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from broker.config.load import load
from broker.core.access import Grant, Principal, Role
from broker.core.events import Drain
from broker.node.broker import Broker
from broker.wire.attachments import pack, unpack

PATIENCE_S = 10.0
EVERYTHING = Role.CALLER | Role.WORKER | Role.LISTENER | Role.ADMIN
PRINCIPALS = {
    "admin": Principal("admin", (Grant(EVERYTHING, ("*",)),)),
    "alice": Principal("alice", (Grant(Role.CALLER, ("data",)),)),
    "viewer": Principal("viewer", (Grant(Role.LISTENER, ("data",)),)),
}

_STEP = re.compile(r"(?P<who>\w+) (?P<what>→ B|attaches|is refused|closes|breaks)(?: (?P<rest>.*))?", re.DOTALL)
_HEARD = re.compile(r"B → (?P<who>\w+) (?P<rest>.*)", re.DOTALL)
_ATTACH = re.compile(
    r"(?P<path>/\S*)(?: as (?P<name>\w+))?(?: offering (?P<offers>\S+))?(?:: (?P<reply>.*))?", re.DOTALL
)
_SETTING = re.compile(r"broker (?P<key>[\w.]+) = (?P<value>.*)")
_PLACEHOLDER = re.compile(r"<([a-z]\w*|_)>")


class Mismatch(AssertionError):
    """The broker said something else; the text names the line."""


def steps_of(text: str) -> list[tuple[int, str]]:
    """The steps with their line numbers within the text; an indented line goes on where the one before ended."""
    steps: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line[0].isspace() and steps:
            steps[-1] = (steps[-1][0], f"{steps[-1][1]} {line.strip()}")
        else:
            steps.append((number, line.rstrip()))
    return steps


def replay(text: str) -> None:
    """Run a transcript on a broker of its own. Raises Mismatch."""
    asyncio.run(_replay(steps_of(text)))


async def _replay(steps: list[tuple[int, str]]) -> None:
    overrides: dict[str, object] = {"server.port": 0}
    while match := _SETTING.fullmatch(steps[0][1]):
        overrides[match["key"]] = json.loads(match["value"])
        steps = steps[1:]
    fixed = {_token(name): principal for name, principal in PRINCIPALS.items()}
    broker = Broker(load(overrides=overrides), fixed=fixed)
    async with broker:
        url = await broker.listen()
        player = _Player(broker, url.replace("http", "ws", 1))
        try:
            for number, step in steps:
                try:
                    await player.play(step)
                except Mismatch as mismatch:
                    raise Mismatch(f"line {number}: {step}\n{mismatch}") from None
            await player.expect_silence()
        finally:
            await player.close()
        broker.router.check()


def _token(name: str) -> str:
    return name + "-" * 40


class _Player:
    def __init__(self, broker: Broker, url: str) -> None:
        self._broker = broker
        self._url = url
        self._stopping: asyncio.Task[None] | None = None
        self._peers: dict[str, ClientConnection] = {}
        self._known: dict[str, Any] = {}

    async def play(self, step: str) -> None:
        if match := _HEARD.fullmatch(step):
            await self._hear(match["who"], match["rest"])
            return
        if step == "broker drains":
            self._broker.engine.feed(Drain())
            return
        if step == "broker stops":
            self._stopping = asyncio.create_task(self._broker.stop())
            return
        match = _STEP.fullmatch(step)
        if match is None:
            raise Mismatch("this is no step of a transcript")
        who, rest = match["who"], match["rest"] or ""
        match match["what"]:
            case "→ B":
                await self._say(who, rest)
            case "attaches":
                await self._attach(who, rest)
            case "is refused":
                await self._refused(rest)
            case "closes":
                await self._peers.pop(who).close(int(rest))
            case "breaks":
                self._peers.pop(who).transport.abort()

    async def _attach(self, who: str, rest: str) -> None:
        match = _ATTACH.fullmatch(rest)
        assert match is not None, rest
        self._peers[who] = peer = await self._open(match)
        if match["reply"] is None:  # a peer counts once the broker has answered it
            await peer.send('{"jsonrpc":"2.0","id":"here?","method":"broker.ping"}')
            await asyncio.wait_for(peer.recv(), PATIENCE_S)
        elif match["reply"] != f"choosing {peer.subprotocol}" and match["reply"] != "to be closed":
            raise Mismatch(f"the broker chose the subprotocol {peer.subprotocol}")

    async def _open(self, match: re.Match[str]) -> ClientConnection:
        return await connect(
            self._url + match["path"],
            additional_headers={"Authorization": f"Bearer {_token(match['name'] or 'admin')}"},
            subprotocols=match["offers"].split(",") if match["offers"] else None,  # type: ignore[arg-type]
            max_size=None,
            compression=None,
        )

    async def _refused(self, rest: str) -> None:
        match = _ATTACH.fullmatch(rest)
        assert match is not None and match["reply"], rest
        try:
            peer = await self._open(match)
        except InvalidStatus as refusal:
            status, _, body = match["reply"].partition(" ")
            self._compare(int(status), refusal.response.status_code)
            self._compare(json.loads(body), json.loads(refusal.response.body or b"null"))
        else:
            await peer.close()
            raise Mismatch("it was let in")

    async def _say(self, who: str, rest: str) -> None:
        text, attachments = _split(rest)
        if not attachments:
            await self._peers[who].send(self._filled(text))
            return
        pieces = pack([self._filled(text).encode()], attachments)
        await self._peers[who].send(b"".join(bytes(piece) for piece in pieces))

    async def _hear(self, who: str, rest: str) -> None:
        peer = self._peers[who]
        try:
            heard = await asyncio.wait_for(peer.recv(), PATIENCE_S)
        except ConnectionClosed as closed:
            said = closed.rcvd
            self._compare(rest, f"close {said.code} {said.reason}" if said else "broken")
            return
        except TimeoutError:
            raise Mismatch(f"nothing came within {PATIENCE_S:g} s") from None
        text, attachments = _split(rest)
        got: bytes | str = heard
        parts: tuple[bytes, ...] = ()
        if isinstance(heard, bytes):
            got, views = unpack(heard)
            parts = tuple(map(bytes, views))
        if text.startswith("close "):
            raise Mismatch(f"the link is open and said {got!r}")
        self._compare(json.loads(text), json.loads(got))
        self._compare(list(attachments), list(parts))

    async def expect_silence(self) -> None:
        """Nobody has been told more than stands in the transcript."""
        for who, peer in self._peers.items():
            try:
                await peer.send('{"jsonrpc":"2.0","id":"silence?","method":"broker.ping"}')
                heard = await asyncio.wait_for(peer.recv(), PATIENCE_S)
            except ConnectionClosed:
                continue
            if b"silence?" not in (heard if isinstance(heard, bytes) else heard.encode()):
                raise Mismatch(f"{who} was told what stands nowhere: {heard!r}")

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.close()
        if self._stopping is not None:
            await self._stopping

    def _filled(self, text: str) -> str:
        """What is to be said, with the values placeholders have been found to stand for."""
        text = re.sub(r'"<([a-z]\w*)>"', lambda match: json.dumps(self._known[match[1]]), text)
        return _PLACEHOLDER.sub(lambda match: str(self._known[match[1]]), text)

    def _compare(self, expected: Any, heard: Any) -> None:
        if not _matches(expected, heard, self._known):
            raise Mismatch(f"expected {expected!r}\nheard    {heard!r}\nknown    {self._known!r}")


def _split(rest: str) -> tuple[str, tuple[bytes, ...]]:
    """A message's text and its attachments, which stand behind it in hexadecimal, each after a plus sign."""
    text, *parts = rest.split(" + ")
    return text, tuple(map(bytes.fromhex, parts))


def _matches(expected: Any, heard: Any, known: dict[str, Any]) -> bool:
    """Whether they are equal; `<name>` stands for any value, the same name for the same one, `<_>` for any at all."""
    if isinstance(expected, Mapping):
        return (
            isinstance(heard, Mapping)
            and expected.keys() == heard.keys()
            and all(_matches(value, heard[name], known) for name, value in expected.items())
        )
    if isinstance(expected, list):
        return (
            isinstance(heard, list)
            and len(expected) == len(heard)
            and all(_matches(a, b, known) for a, b in zip(expected, heard, strict=True))
        )
    if not (isinstance(expected, str) and _PLACEHOLDER.search(expected)):
        return bool(expected == heard) and isinstance(expected, bool) == isinstance(heard, bool)
    if whole := _PLACEHOLDER.fullmatch(expected):
        return whole[1] == "_" or bool(known.setdefault(whole[1], heard) == heard)
    pieces = _PLACEHOLDER.split(expected)
    pattern = "".join(
        (".+?" if piece == "_" else f"(?P<{piece}>.+?)") if index % 2 else re.escape(piece)
        for index, piece in enumerate(pieces)
    )
    found = re.fullmatch(pattern, heard, re.DOTALL) if isinstance(heard, str) else None
    if found is None:
        return False
    return all(known.setdefault(name, value) == value for name, value in found.groupdict().items())
