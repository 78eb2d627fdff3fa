"""IPython's Session over ZeroMQ sockets: what `broker.wire.session` is given there, this one draws and reads itself.

For programs that used `send` and `recv` of IPython's. The broker's own ZeroMQ door does not go through it.
"""

from __future__ import annotations

import getpass
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import zmq

from broker.wire import session as wire
from broker.wire.session import DELIMITER, SIGNED_FRAMES, Frame, Message, Packer, feed_identities
from broker.wire.signature import DEFAULT_SCHEME, HISTORY_MAX

if TYPE_CHECKING:
    from zmq.eventloop.zmqstream import ZMQStream

COPY_MAX = 65_536
"""bytes of a message's largest frame up to which copying it is cheaper than having ZeroMQ hold on to it"""
DONE = zmq.MessageTracker()
"""the tracker of what was copied: nothing waits for it"""


def new_key() -> bytes:
    """A fresh random key of 128 bits, in the form jupyter_client gives its own."""
    return new_id().encode()


def new_id() -> str:
    """A session id: 16 random bytes in hex, in two groups."""
    text = secrets.token_hex(16)
    return f"{text[:8]}-{text[8:]}"


def now() -> str:
    """The date of a header: now, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Session(wire.Session):
    """Builds, signs, sends, receives and verifies messages over pyzmq sockets.

    Without `key` a fresh random one is drawn; `key=b""` turns signing off; `broker.auth.connection_files.read_key_file`
    reads one from a file. The other arguments are those of `broker.wire.session.Session`. Use one in one process
    only: after a fork its ids would be given twice, so `send` refuses there.
    """

    def __init__(
        self, key: bytes | None = None, *, session: str | None = None, username: str | None = None,
        scheme: str = DEFAULT_SCHEME, packer: Packer = "json", metadata: Mapping[str, Any] | None = None,
        history_max: int = HISTORY_MAX,
    ) -> None:  # fmt: skip
        super().__init__(
            new_key() if key is None else key, session or new_id(), username=_user() if username is None else username,
            process=os.getpid(), scheme=scheme, packer=packer, metadata=metadata, history_max=history_max,
        )  # fmt: skip

    def msg(
        self, msg_type: str, content: Mapping[str, Any] | None = None,
        parent: Mapping[str, Any] | Message | None = None, header: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A new message as a dict, with an id and a date of its own unless a header is given."""
        return self.build(self.header(msg_type, now()) if header is None else header, content, parent, metadata)

    def send(
        self, socket: zmq.Socket[Any] | ZMQStream, msg_or_type: Mapping[str, Any] | Message | str,
        content: Mapping[str, Any] | None = None, parent: Mapping[str, Any] | Message | None = None,
        identities: bytes | Sequence[bytes] | None = None, buffers: Sequence[Frame] | None = None, *,
        track: bool = False, header: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None,
        flags: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """Send a new message, or one that is there already. Returns it, with `tracker` beside its members.

        `track`: large buffers are not copied, and `tracker` (zmq.MessageTracker) says when they may be changed; for a
        ZMQStream, which cannot track, they are copied, and may be at once.
        Raises RuntimeError after a fork, TypeError or ValueError for buffers that are none or not contiguous, ZMQError.
        """
        if os.getpid() != self.process:
            raise RuntimeError("this Session was made before a fork; the new process needs one of its own")
        if isinstance(msg_or_type, str):
            message = self.msg(msg_or_type, content, parent, header, metadata)
        else:
            message = dict(msg_or_type)
        views = [_view(buffer, index) for index, buffer in enumerate(buffers or message.get("buffers") or ())]
        frames = self.serialize({**message, "buffers": views}, identities)
        copy = max(frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames) < COPY_MAX
        if views and track and not copy and isinstance(socket, zmq.Socket):
            message["tracker"] = socket.send_multipart(frames, flags, copy=False, track=True)
        elif views and track and not copy:
            # A ZMQStream sends later and returns no tracker: with a copy the buffers may be changed at once.
            frames = [frame if isinstance(frame, bytes) else bytes(frame) for frame in frames]
            socket.send_multipart(frames, flags, copy=True)
            message["tracker"] = DONE
        else:
            socket.send_multipart(frames, flags, copy=copy)
            message["tracker"] = DONE
        return message

    def send_raw(
        self, socket: zmq.Socket[Any], frames: Sequence[Frame], flags: int = 0, *, copy: bool = True,
        identities: bytes | Sequence[bytes] = (),
    ) -> None:  # fmt: skip
        """Sign and send four packed frames and the buffers behind them. Raises MessageError for fewer, ZMQError."""
        if len(frames) < SIGNED_FRAMES:
            raise wire.MessageError("malformed", f"{len(frames)} frames are given; {SIGNED_FRAMES} belong to a message")
        before = [identities] if isinstance(identities, bytes) else list(identities)
        signed = self.sign(frames[:SIGNED_FRAMES])
        socket.send_multipart([*before, DELIMITER, signed, *frames], flags, copy=copy)

    def recv(
        self, socket: zmq.Socket[Any], flags: int = zmq.NOBLOCK, *, content: bool = True, copy: bool = True
    ) -> tuple[list[bytes], dict[str, Any]] | tuple[None, None]:
        """The next message and the identities before it; (None, None) if there is none yet.

        `copy=False` leaves large frames where ZeroMQ has them. Raises as `deserialize`, MessageError without a
        delimiter, ZMQError.
        """
        try:
            received = socket.recv_multipart(flags, copy=copy)
        except zmq.Again:
            return None, None
        frames = [frame if isinstance(frame, bytes) else _uncopied(frame) for frame in received]
        identities, signed = feed_identities(frames)
        return [bytes(identity) for identity in identities], self.deserialize(signed, content=content)


def _uncopied(frame: zmq.Frame) -> Frame:
    view = frame.buffer
    return view if len(view) >= COPY_MAX else bytes(view)


def _view(buffer: Frame, index: int) -> memoryview:
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(f"buffer {index} has to support the buffer protocol, not be {type(buffer).__name__}") from None
    if not view.contiguous:
        raise ValueError(f"buffer {index} is not contiguous, as ZeroMQ needs it; send a copy of it")
    return view


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a uid without a name, as in containers
        return "username"
