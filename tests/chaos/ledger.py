"""What each caller writes down: what it asked, how that ended, and how often; and what the workers say they did."""

from __future__ import annotations

import time
import zlib
from collections import Counter, deque
from pathlib import Path
from typing import Any

from broker.peer.errors import BrokerError, ConnectionLost

UNKNOWN = "unknown"
"""the link broke before the answer; how it ended only the broker knows"""
UNTOLD_S = 2.0
"""how much later still a program without a clock of its own notices that its link is dead"""


def fingerprint(tag: str, data: bytes) -> int:
    """By which an answer shows to which question it belongs."""
    return zlib.crc32(data, zlib.crc32(tag.encode()))


class Entry:
    """One request of one caller."""

    __slots__ = (
        "asked_at", "caller", "due_at", "ended_at", "ends", "history", "idempotent", "key", "kind", "never_ran",
        "outcome", "tag",
    )  # fmt: skip

    def __init__(
        self, tag: str, caller: str, kind: str, timeout_s: float, *, idempotent: bool, key: str | None
    ) -> None:
        self.tag = tag
        self.caller = caller
        self.kind = kind
        self.asked_at = time.monotonic()
        self.due_at = self.asked_at + timeout_s
        self.ended_at = 0.0
        self.idempotent = idempotent
        self.key = key
        self.ends = 0
        self.outcome = ""
        self.never_ran = False
        """whether the caller was told that no worker ever had it"""
        self.history: list[tuple[float, str]] = []

    def say(self, text: str) -> None:
        """Something happened to it."""
        self.history.append((time.monotonic(), text))


class Ledger:
    """All entries, and every fault found so far."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.events: deque[tuple[float, str]] = deque(maxlen=5000)
        self.faults: list[str] = []
        self.began = time.monotonic()
        self.latest_s = 0.0
        """how long after its deadline the latest request ended"""

    # ------------------------------------------------------------ while it runs

    def happened(self, text: str) -> None:
        """Something befell a process or a link."""
        self.events.append((time.monotonic(), text))

    def open(
        self, tag: str, caller: str, kind: str, timeout_s: float, *, idempotent: bool = False, key: str | None = None
    ) -> Entry:
        """A request is asked."""
        entry = self.entries[tag] = Entry(tag, caller, kind, timeout_s, idempotent=idempotent, key=key)
        return entry

    def end(self, entry: Entry, outcome: str, *, never_ran: bool = False, detail: str = "") -> None:
        """A request has ended, as far as its caller knows."""
        now = time.monotonic()
        entry.ends += 1
        entry.say(f"ended {outcome} {detail}".rstrip())
        if entry.ends > 1:
            self.fault(entry, f"ended twice: {entry.outcome}, then {outcome}")
            return
        entry.outcome, entry.ended_at, entry.never_ran = outcome, now, never_ran
        self.latest_s = max(self.latest_s, now - entry.due_at)

    def raised(self, entry: Entry, error: BrokerError) -> None:
        """It ended with one of the SDK's exceptions."""
        if isinstance(error, ConnectionLost):
            self.end(entry, UNKNOWN, never_ran=not error.may_have_executed, detail=error.detail)
            return
        # Without a word of the broker nothing is known: `code` is its mark.
        told = error.code != 0
        self.end(entry, error.outcome if told else UNKNOWN, never_ran=told and not error.dispatched, detail=str(error))

    def matches(self, entry: Entry, value: Any, data: bytes) -> bool:
        """Whether an answer belongs to the question; else it is a fault."""
        wanted = fingerprint(entry.key or entry.tag, data)
        good = isinstance(value, dict) and value.get("print") == wanted
        if not good:
            self.fault(entry, f"has the answer of another: {value!r:.200}, not {wanted}")
        return good

    def fault(self, entry: Entry | None, text: str) -> None:
        """Something is wrong."""
        self.faults.append(text if entry is None else f"{entry.tag} {text}\n{self.transcript(entry)}")

    # ------------------------------------------------------------ at the end

    def judge(self, ran: Counter[str], slack_s: float) -> Counter[str]:
        """Look at all entries, beside how often workers began each; how often each outcome occurred."""
        outcomes: Counter[str] = Counter()
        allowed: Counter[str] = Counter()  # a key may run again once it has ended otherwise than well
        for entry in self.entries.values():
            allowed[entry.key or entry.tag] += entry.outcome != "ok" and entry.key is not None
        for name in {entry.key or entry.tag: None for entry in self.entries.values()}:
            allowed[name] = max(1, allowed[name])
        for entry in self.entries.values():
            outcomes[entry.outcome or "open"] += 1
            times = ran[entry.key or entry.tag]
            if entry.ends == 0:
                self.fault(entry, "has not ended")
            elif entry.ended_at > entry.due_at + slack_s + (UNTOLD_S if entry.outcome == UNKNOWN else 0.0):
                self.fault(entry, f"ended {entry.ended_at - entry.due_at:.2f} s after its deadline")
            if times > allowed[entry.key or entry.tag] and not entry.idempotent:
                self.fault(entry, f"was executed {times} times")
            if entry.outcome == "ok" and not times:
                self.fault(entry, "ended ok, and no worker did it")
            if entry.never_ran and times and entry.key is None:
                self.fault(entry, "was said never to have run, and a worker did it")
        return outcomes

    def transcript(self, entry: Entry) -> str:
        """What is known of one request, with what happened around it."""
        until = (entry.ended_at or time.monotonic()) + 1.0
        lines = [(entry.asked_at, f"{entry.tag}: asked by {entry.caller}, {entry.kind}, due {self.at(entry.due_at)}")]
        lines += [(at, f"{entry.tag}: {text}") for at, text in entry.history]
        lines += [(at, f"    {text}") for at, text in self.events if entry.asked_at - 1.0 <= at <= until]
        return "\n".join(f"  {self.at(at)} {text}" for at, text in sorted(lines))

    def at(self, moment: float) -> str:
        """A moment as seconds of the run."""
        return f"{moment - self.began:9.3f}"


def executions(journals: Path) -> Counter[str]:
    """How often each tag or key was begun by any worker."""
    ran: Counter[str] = Counter()
    for journal in sorted(journals.glob("*.journal")):
        ran.update(journal.read_text().split())
    return ran
