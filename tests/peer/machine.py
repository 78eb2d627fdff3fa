"""A session without a connection: what it would send, and what it is told, as plain values."""

import json
from collections.abc import Sequence
from typing import Any

from broker.peer.session import Options, Pending, Result, Session
from broker.wire.attachments import pack, unpack


class Wire:
    """Moves the outbox to a list, as a connection would, counting bytes."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.enqueued = 0
        self.sent: list[dict[str, Any]] = []
        self.rooms: list[Any] = []

    def pump(self, now: float = 0.0) -> list[dict[str, Any]]:
        new = []
        while (frame := self.session.take(now)) is not None:
            data = b"".join(frame.pieces)
            self.enqueued += len(data)
            if frame.call is not None:
                frame.call.mark = self.enqueued
            if frame.then is not None:
                self.rooms.append(frame.then.owner)
            text, attachments = unpack(data) if frame.binary else (data, ())
            message = json.loads(text)
            if attachments:
                message["attachments"] = [bytes(attachment) for attachment in attachments]
            new.append(message)
        self.sent += new
        return new


def linked() -> tuple[Session, Wire]:
    session = Session()
    session.attached(0.0)
    return session, Wire(session)


def ask(session: Session, name: str = "data/read", params: bytes = b"", now: float = 0.0, **options: Any) -> Pending:
    return session.ask(name, params, (), Options(**options), object(), now)


def told(session: Session, payload: bytes, binary: bool = False, now: float = 0.0) -> Any:
    """What one message means, if anything."""
    results = session.receive(payload, binary, now)
    assert len(results) < 2
    return results[0] if results else None


def reply(session: Session, call: Pending, now: float = 0.1, **members: Any) -> Any:
    return told(session, json.dumps({"jsonrpc": "2.0", "id": call.id} | members).encode(), now=now)


def say(
    session: Session, method: str, *attachments: bytes, now: float = 0.0, number: int = 0, **params: Any
) -> Sequence[Result]:
    """The broker says something that is no reply."""
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
    if number:
        message["meta"] = {"n": number}
    text = json.dumps(message).encode()
    if attachments:
        return session.receive(b"".join(pack([text], attachments)), True, now)
    return session.receive(text, False, now)


def part(
    session: Session, owner: Pending | str, seq: int, data: Any = None, *attachments: bytes, **flags: Any
) -> Sequence[Result]:
    """One part comes."""
    number = owner.id if isinstance(owner, Pending) else owner
    return say(session, "$/part", *attachments, id=number, seq=seq, data=data, **flags)


def credit(session: Session, owner: Pending | str, upto: int) -> None:
    """The other side takes parts below this."""
    number = owner.id if isinstance(owner, Pending) else owner
    assert say(session, "$/credit", id=number, upto=upto) == ()


def asked_for(session: Session, number: Any = "n-1-1", **members: Any) -> Any:
    """The broker gives it a request."""
    message = {"jsonrpc": "2.0", "id": number, "method": "data/read"} | members
    return told(session, json.dumps(message).encode())
