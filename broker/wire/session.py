"""Messages of Jupyter's wire protocol: built, signed, serialised; split, verified and read again.

The frames are `identities* | <IDS|MSG> | signature | header | parent_header | metadata | content | buffers*` (Jupyter
messaging 5.4, "The Wire Protocol"). Nothing is drawn here: keys, ids and dates are arguments.
`broker.links.session.Session` draws them, and sends over sockets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from broker.wire.signature import DEFAULT_SCHEME, HISTORY_MAX, History, SignatureError, keyed, sign, verify

DELIMITER = b"<IDS|MSG>"
PROTOCOL_VERSION = "5.4"
"""of Jupyter's messages, in every header"""
SIGNED_FRAMES = 4

Frame: TypeAlias = bytes | memoryview
Pack: TypeAlias = Callable[[Any], bytes]
Unpack: TypeAlias = Callable[[bytes], Any]
Packer: TypeAlias = str | tuple[Pack, Unpack]


class MessageError(ValueError):
    """Frames that are no message. `cause` is a short name for counters (`no_delimiter`, `malformed`)."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class Message:
    """A message whose members are attributes: `Message(d).header.msg_id`; `dict(message)` gives the dict again."""

    def __init__(self, members: Mapping[str, Any] | Message) -> None:
        for name, value in dict(members).items():
            self.__dict__[name] = Message(value) if isinstance(value, dict) else value

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.__dict__.items():
            yield name, dict(value) if isinstance(value, Message) else value

    @property
    def keys(self) -> Any:
        """None: `dict` would call it. A member of that name is `message["keys"]`."""
        raise AttributeError("keys")

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, Message) else NotImplemented

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __repr__(self) -> str:
        return f"Message({dict(self)!r})"


def message_id(session: str, process: int, number: int) -> str:
    """A message's id: `number` counts those of one session in one process."""
    return f"{session}_{process}_{number}"


def extract_header(message_or_header: Mapping[str, Any] | Message | None) -> dict[str, Any]:
    """The header of a message, or the header itself, as a dict; empty for nothing.

    Raises KeyError for what is neither.
    """
    if not message_or_header:
        return {}
    known = dict(message_or_header)
    if "header" in known:
        return dict(known["header"])
    if "msg_id" not in known:
        raise KeyError("neither a message (it has no 'header') nor a header (it has no 'msg_id')")
    return known


# --- packers ---------------------------------------------------------------------------------------------------------


def pack_json(value: Any) -> bytes:
    """JSON in UTF-8, compact. Raises TypeError, ValueError for what JSON cannot say.

    NaN becomes null, bytes base64, sets and tuples arrays, dates text: as in jupyter_client, none comes back as it was.
    """
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError, msgspec.MsgspecError):
        # Lone surrogates, which Python's file names contain, and large integers: ASCII says both.
        return json.dumps(value, allow_nan=False).encode()


def unpack_json(data: bytes) -> Any:
    """A value from JSON, NaN and lone surrogates taken as Python's own parser takes them. Raises ValueError."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return json.loads(data.decode("utf-8", "replace"))


PACKERS: dict[str, tuple[Pack, Unpack]] = {
    "json": (pack_json, unpack_json),
    "msgpack": (msgspec.msgpack.encode, msgspec.msgpack.decode),
}
_EXECUTING = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal")


def find_packer(packer: Packer) -> tuple[Pack, Unpack]:
    """The two functions of a packer: `json`, `msgpack`, or two of your own that are each other's inverse.

    Raises ValueError for another name, for pickle in any form, and for functions that are no pair.
    """
    if isinstance(packer, str):
        if packer not in PACKERS:
            raise ValueError(f"there is no packer {packer!r}: json, msgpack, or a pair of functions (never pickle)")
        return PACKERS[packer]
    pack, unpack = packer
    for function in packer:
        module = getattr(function, "__module__", None) or ""
        if module.partition(".")[0] in _EXECUTING:
            raise ValueError(f"{module} may run what a peer sends: use json, msgpack, or functions that only read data")
    sample = {"a": [1, "hi"]}
    packed = pack(sample)
    if not isinstance(packed, bytes):
        raise ValueError(f"the packer made {type(packed).__name__} of a message; bytes are needed")
    if unpack(packed) != sample:
        raise ValueError(f"the packer's two functions are no pair: {sample!r} did not come back")
    return pack, unpack


# --- frames ----------------------------------------------------------------------------------------------------------


def feed_identities(frames: Sequence[Frame]) -> tuple[list[Frame], list[Frame]]:
    """Split what came over a socket at the delimiter: the identities, and signature, four frames, buffers.

    Raises MessageError if there is no delimiter.
    """
    frames = list(frames)
    try:
        at = frames.index(DELIMITER)
    except ValueError:
        raise MessageError("no_delimiter", f"no delimiter {DELIMITER.decode()} among {len(frames)} frames") from None
    return frames[:at], frames[at + 1 :]


def check_frames(signed: Sequence[Frame]) -> None:
    """See that there are enough frames behind the delimiter. Raises MessageError."""
    if len(signed) < SIGNED_FRAMES + 1:
        raise MessageError(
            "malformed",
            f"malformed message: {len(signed)} frames behind the delimiter, at least {SIGNED_FRAMES + 1} belong there "
            "(signature, header, parent_header, metadata, content)",
        )


class Session:
    """One end of a conversation: its key, its id, and the messages it has accepted.

    An empty key signs nothing and accepts everything. `packer` is as `find_packer` takes it, `history_max` the number
    of accepted signatures that are remembered against replay. Raises ValueError for a scheme or packer that is none,
    TypeError for a key that is no bytes.
    """

    def __init__(
        self, key: bytes, session: str, *, username: str = "", process: int = 0, scheme: str = DEFAULT_SCHEME,
        packer: Packer = "json", metadata: Mapping[str, Any] | None = None, history_max: int = HISTORY_MAX,
    ) -> None:  # fmt: skip
        self._key, self._scheme = _checked(key), scheme
        self._mac = keyed(key, scheme)
        self.session = session
        self.username = username
        self.process = process
        self.metadata = dict(metadata or {})
        self.message_count = 0
        self.history = History(history_max)
        self.pack, self.unpack = find_packer(packer)

    @property
    def key(self) -> bytes:
        """What is signed with from now on, as soon as another is assigned. Raises TypeError for what is no bytes."""
        return self._key

    @key.setter
    def key(self, key: bytes) -> None:
        self._mac = keyed(_checked(key), self._scheme)
        self._key = key

    @property
    def signature_scheme(self) -> str:
        """`hmac-HASH`; can be assigned as `key` can. Raises ValueError for one that is none; then the old one stays."""
        return self._scheme

    @signature_scheme.setter
    def signature_scheme(self, scheme: str) -> None:
        self._mac = keyed(self._key, scheme)
        self._scheme = scheme

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.session} {self.signature_scheme if self.key else 'unsigned'}>"

    @property
    def msg_id(self) -> str:
        """The next message's id; each one is given once."""
        number = self.message_count
        self.message_count += 1
        return message_id(self.session, self.process, number)

    def header(self, msg_type: str, date: str) -> dict[str, Any]:
        """A header for a new message; `date` in ISO 8601, UTC."""
        return {
            "msg_id": self.msg_id, "msg_type": msg_type, "username": self.username, "session": self.session,
            "date": date, "version": PROTOCOL_VERSION,
        }  # fmt: skip

    def build(
        self, header: Mapping[str, Any] | Message, content: Mapping[str, Any] | Message | None = None,
        parent: Mapping[str, Any] | Message | None = None, metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A message as a dict: `header`, `parent_header` (of the message or header `parent`), `metadata`, `content`,
        and `msg_id`, `msg_type` of the header.
        """
        own = dict(header)
        return {
            "header": own,
            "msg_id": own["msg_id"],
            "msg_type": own["msg_type"],
            "parent_header": extract_header(parent),
            "content": dict(content or {}),
            "metadata": {**self.metadata, **(metadata or {})},
        }

    def sign(self, frames: Sequence[Frame]) -> bytes:
        """The signature of the four frames; empty without a key."""
        return sign(self._mac, frames)

    def serialize(
        self, message: Mapping[str, Any] | Message, identities: bytes | Sequence[bytes] | None = None
    ) -> list[Frame]:
        """The frames of a message: identities, delimiter, signature, the four dicts, its `buffers`.

        Content that is bytes or str already passes as it is, as in a relayed message. Raises TypeError for content
        that is something else, and what the packer raises.
        """
        whole = dict(message)
        pack = self.pack
        signed: list[Frame] = [
            pack(whole["header"]), pack(whole["parent_header"]), pack(whole["metadata"]),
            self._pack_content(whole.get("content")),
        ]  # fmt: skip
        return [*_listed(identities), DELIMITER, sign(self._mac, signed), *signed, *(whole.get("buffers") or ())]

    def _pack_content(self, content: object) -> bytes:
        if isinstance(content, bytes):
            return content
        if isinstance(content, str):
            return content.encode()
        if content is None or isinstance(content, Mapping | Message):
            return self.pack(dict(content or {}))
        raise TypeError(f"the content of a message has to be a dict or packed already, not {type(content).__name__}")

    def verify(self, signed: Sequence[Frame], *, remember: bool = True) -> None:
        """See that the frames behind the delimiter are signed with the key and new, then remember them.

        Raises SignatureError whose text begins with Unsigned Message, Invalid Signature or Duplicate Signature,
        MessageError for too few frames. What is refused leaves no trace.
        """
        check_frames(signed)
        if self._mac is None:
            return
        signature = bytes(signed[0])
        verify(self._mac, signature, signed[1 : SIGNED_FRAMES + 1])
        self.history.check(signature)
        if remember:
            self.history.remember(signature)

    def deserialize(self, signed: Sequence[Frame], *, content: bool = True) -> dict[str, Any]:
        """The message in the frames behind the delimiter, verified first.

        `content=False` looks at it only: its content stays packed and it can be read once more. Dates stay text,
        buffers views. Raises SignatureError and MessageError as `verify`, MessageError for frames that cannot be
        unpacked or whose header is none.
        """
        self.verify(signed, remember=content)
        header, parent, metadata = (self._unpack(signed[at], name) for at, name in enumerate(_PACKED[:3], 1))
        for name in ("msg_id", "msg_type"):
            if not isinstance(header.get(name), str):
                raise MessageError("malformed", f"malformed message: its header has no text {name}")
        return {
            "header": header,
            "msg_id": header["msg_id"],
            "msg_type": header["msg_type"],
            "parent_header": parent,
            "metadata": metadata,
            "content": self._unpack(signed[4], "content") if content else bytes(signed[4]),
            "buffers": [memoryview(buffer) for buffer in signed[5:]],
        }

    def _unpack(self, frame: Frame, name: str) -> dict[str, Any]:
        try:
            value = self.unpack(bytes(frame))
        except (ValueError, RecursionError) as error:
            raise MessageError("malformed", f"malformed message: its {name} cannot be unpacked: {error}") from None
        if not isinstance(value, dict):
            raise MessageError("malformed", f"malformed message: its {name} is no object")
        return value

    unserialize = deserialize
    """IPython's name of it"""


_PACKED = ("header", "parent_header", "metadata", "content")


def _checked(key: object) -> bytes:
    if not isinstance(key, bytes):
        raise TypeError(f"the key of a Session has to be bytes, not {type(key).__name__}")
    return key


def _listed(identities: bytes | Sequence[bytes] | None) -> Sequence[bytes]:
    if identities is None:
        return ()
    return (identities,) if isinstance(identities, bytes) else identities


__all__ = [
    "DELIMITER", "PACKERS", "PROTOCOL_VERSION", "SIGNED_FRAMES", "Message", "MessageError", "Session", "SignatureError",
    "check_frames", "extract_header", "feed_identities", "find_packer", "keyed", "message_id", "pack_json", "sign",
    "unpack_json", "verify",
]  # fmt: skip
