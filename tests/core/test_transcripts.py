"""Stories with the router, as transcripts one can read: what happens, and under it what comes of it.

A line that is not indented happens; the lines under it, indented, are the effects in their order. A line that begins
with `#` is a comment. `UPDATE_TRANSCRIPTS=1 pytest tests/core/test_transcripts.py` writes the effects anew: read the
difference before keeping it. What can happen:

    limits queue_max=2 …                     (first) bounds that differ from the defaults
    endpoint NAME policy=newest …            (first) what the configuration says of an endpoint
    PEER comes [to ENDPOINT] as caller|worker|listener [capacity=1] [listen] [only=PATTERN] [expires=60]
    PEER asks ID ENDPOINT/METHOD [JSON] [timeout=1] [idempotent] [retries=1] [wait] [meta]
    PEER asks ID broker.METHOD [JSON]
    PEER notifies ENDPOINT/METHOD
    PEER answers aN JSON   ·   PEER fails aN CODE   ·   PEER cancels ID   ·   PEER goes [flushed=N]
    PEER is congested   ·   PEER reads again   ·   PEER speaks nonsense   ·   PEER answers without a name
    written aN MARK                          how many bytes the worker's link had taken in with this attempt
    wait SECONDS   ·   drain   ·   drain now   ·   broadcasts   ·   books
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.core.access import Grant, Role
from broker.core.events import Answered, ErrorReply, StartFanout, Stray
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body
from broker.core.sessions import Session
from tests.core.harness import World, describe, describe_message

HERE = Path(__file__).parent / "transcripts"
STORIES = sorted(HERE.glob("*.txt"))


class Story:
    """Plays the lines of one transcript."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.endpoints: dict[str, EndpointLimits] = {}
        self.made: World | None = None
        self.peers: dict[str, Session] = {}

    @property
    def world(self) -> World:
        if self.made is None:
            self.made = World(self.limits, self.endpoints)
        return self.made

    def play(self, text: str) -> str:
        """The transcript as it really goes."""
        lines = []
        for line in text.splitlines():
            if line.startswith("  "):
                continue
            lines.append(line)
            if line and not line.startswith("#"):
                lines += [f"  {effect}" for effect in self.happen(line)]
        return "\n".join(lines) + "\n"

    def happen(self, line: str) -> list[str]:
        words = line.split()
        match words:
            case ["limits", *pairs]:
                self.limits = msgspec.structs.replace(self.limits, **options(pairs))
                return []
            case ["endpoint", name, *pairs]:
                self.endpoints[name] = EndpointLimits(**options(pairs))
                return []
            case ["broadcasts"]:
                names = {session: name for name, session in self.peers.items()}
                return [f"{names[to]} < {describe_message(message)}" for to, message in self.world.broadcasts()]
            case ["books"]:
                return self.books()
            case ["wait", seconds]:
                self.world.sleep(float(seconds))
            case ["written", number, mark]:
                attempt = next(
                    s.attempts[int(number[1:])] for s in self.peers.values() if int(number[1:]) in s.attempts
                )
                attempt.mark = int(mark)
            case ["drain"]:
                self.world.drain()
            case ["drain", "now"]:
                self.world.drain(now=True)
            case [name, "comes", *more]:
                self.come(name, more)
            case [name, verb, *more]:
                self.act(self.peers[name], verb, more)
            case _:
                raise ValueError(f"a line nobody understands: {line}")
        names = {session: name for name, session in self.peers.items()}
        effects = [effect for effect in self.world.take() if not isinstance(effect, StartFanout)]
        return [describe(effect, names) for effect in effects]

    def come(self, name: str, words: list[str]) -> None:
        given = options([word for word in words if "=" in word or word == "listen"])
        role = next(Role[word.upper()] for word in words if word.upper() in Role.__members__)
        endpoint = words[words.index("to") + 1] if "to" in words else None
        only = given.pop("only", "*")
        expires = given.pop("expires", None)
        # The effects of coming name the newcomer, so that its name must be known before: ids are counted from 1.
        self.peers[name] = self.world.attach(
            role, endpoint, principal=name, grants=(Grant(Role.CALLER | Role.WORKER, (str(only),)),),
            expires_at=None if expires is None else self.world.now + expires, **given,
        )  # fmt: skip

    def act(self, peer: Session, verb: str, more: list[str]) -> None:
        world = self.world
        match verb, more:
            case "asks", [wire_id, target, *rest]:
                raw = "".join(word for word in rest if word[0] in '[{"')
                given = options([word for word in rest if word[0] not in '[{"'])
                if given.get("idempotent"):
                    given.setdefault("retries", 1)
                world.ask(peer, int(wire_id) if wire_id.isdigit() else wire_id, target, raw.encode(), **given)
            case "notifies", [target]:
                world.ask(peer, None, target)
            case "answers", ["without", "a", "name"]:
                world.feed(Stray(peer, nameless=True, body=Body(b'{"code":-32600}'), error=ErrorReply(-32600)))
            case "answers", [number, *raw]:
                world.answer(peer, int(number[1:]), " ".join(raw).encode())
            case "fails", [number, code]:
                body = Body(b'{"code":%s}' % code.encode())
                world.feed(Answered(peer, int(number[1:]), body, ErrorReply(int(code))))
            case "cancels", [wire_id]:
                world.cancel(peer, int(wire_id) if wire_id.isdigit() else wire_id)
            case "goes", pairs:
                world.detach(peer, **options(pairs))
            case "is", ["congested"]:
                world.congested(peer, True)
            case "reads", ["again"]:
                world.congested(peer, False)
            case "speaks", ["nonsense"]:
                world.malformed(peer)
            case _:
                raise ValueError(f"a peer cannot {verb} {more}")

    def books(self) -> list[str]:
        counters = self.world.router.counters
        lines = [f"accepted {counters.accepted}, pending {self.world.router.pending.count}"]
        lines += [f"{name} {count}" for name, count in counters.ended.items() if count]
        names = ("attempts", "retries", "cancels", "late_replies", "nameless_replies", "strikes")
        lines += [f"{name} {getattr(counters, name)}" for name in names if getattr(counters, name)]
        return lines


def options(pairs: list[str]) -> dict[str, Any]:
    """`name=value` and `name` alone, which is true."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        found[name] = msgspec.json.decode(value) if equals and value[0] in "0123456789-" else value or True
    return found


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_the_story_goes_as_written(path: Path) -> None:
    written = path.read_text(encoding="utf-8")
    played = Story().play(written)
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        path.write_text(played, encoding="utf-8")
    assert played == written or os.environ.get("UPDATE_TRANSCRIPTS")


def test_there_are_stories_and_each_says_what_it_shows() -> None:
    assert len(STORIES) >= 8
    for path in STORIES:
        assert path.read_text(encoding="utf-8").startswith("# "), path


def test_a_line_nobody_understands_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody"):
        Story().play("nonsense\n")
    with pytest.raises(ValueError, match="cannot fly"):
        Story().play("c comes as caller\nc fly\n")


def test_a_wrong_effect_is_noticed() -> None:
    right = "c comes as caller\nc asks 1 e/m\n  c < end 1 no_endpoint\n"
    assert Story().play(right) == right
    for wrong in (
        right.replace("no_endpoint", "ok"),
        right.replace("  c < end 1 no_endpoint\n", ""),
        right + "  c < pause\n",
    ):
        assert Story().play(wrong) == right != wrong
