"""IPython's Session over sockets, against jupyter_client's own in both directions."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jupyter_client.session as upstream
import pytest
import zmq
from zmq.eventloop.zmqstream import ZMQStream

from broker.links.session import COPY_MAX, DONE, Session
from broker.wire.session import Message, MessageError, SignatureError
from broker.wire.signature import HASHES

KEY = b"a0436f6c-1916-498b-8eb9-e81ab9368e84"
TYPES = ("header", "parent_header", "metadata", "content")
Pair = tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A DEALER whose identity is `me`, and the ROUTER it is connected to."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        for socket in (router, dealer):
            socket.linger = 0
            socket.rcvtimeo = socket.sndtimeo = 20_000
        dealer.routing_id = b"me"
        dealer.connect(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
        yield dealer, router


def without_dates(message: dict[str, Any]) -> dict[str, Any]:
    """jupyter_client makes datetimes of the dates; ours stay text."""
    return {
        "content": message["content"],
        "metadata": message["metadata"],
        **{part: {k: v for k, v in message[part].items() if k != "date"} for part in ("header", "parent_header")},
        "buffers": [bytes(buffer) for buffer in message["buffers"]],
    }


@pytest.mark.parametrize("name", HASHES)
def test_both_directions_with_every_hash(pair: Pair, name: str) -> None:
    dealer, router = pair
    scheme = f"hmac-{name}"
    ours, theirs = Session(KEY, scheme=scheme), upstream.Session(key=KEY, signature_scheme=scheme)
    sent = ours.send(dealer, "comm_msg", {"a": [1, None, "é\U0001d11e"]}, metadata={"x": 1}, buffers=[b"\0\1", b""])
    identities, message = theirs.recv(router, mode=0)
    assert identities == [b"me"]
    assert message is not None
    assert without_dates(message) == without_dates({**sent, "buffers": [b"\0\1", b""]})
    assert message["header"]["date"].isoformat().replace("+00:00", "Z") == sent["header"]["date"]

    reply = theirs.send(router, "comm_reply", {"text": "é"}, parent=message, ident=identities, buffers=[b"raw"])
    assert reply is not None
    identities, message = ours.recv(dealer, 0)
    assert identities == []
    assert message is not None
    assert without_dates(message) == without_dates({**reply, "buffers": [b"raw"]})
    assert message["parent_header"]["msg_id"] == sent["msg_id"]


@pytest.mark.parametrize("packer", ["json", "msgpack"])
def test_both_packers(pair: Pair, packer: str) -> None:
    dealer, router = pair
    ours, theirs = Session(KEY, packer=packer), upstream.Session(key=KEY, packer=packer, unpacker=packer)
    ours.send(dealer, "status", {"state": [1.5, {"deep": None}], "n": 2**40})
    _, message = theirs.recv(router, mode=0)
    assert message is not None
    assert message["content"] == {"state": [1.5, {"deep": None}], "n": 2**40}
    theirs.send(router, "status", {"execution_state": "idle"}, ident=b"me")
    _, back = ours.recv(dealer, 0)
    assert back is not None
    assert back["content"] == {"execution_state": "idle"}


def test_unsigned(pair: Pair) -> None:
    dealer, router = pair
    Session(b"").send(dealer, "status", {"a": 1})
    _, message = upstream.Session(key=b"").recv(router, mode=0)
    assert message is not None
    assert message["content"] == {"a": 1}


def test_what_either_refuses_of_the_other(pair: Pair) -> None:
    dealer, router = pair
    ours, theirs = Session(KEY), upstream.Session(key=b"another")
    ours.send(dealer, "status")
    with pytest.raises(ValueError, match="Invalid Signature"):
        theirs.recv(router, mode=0)
    theirs.send(router, "status", ident=b"me")
    with pytest.raises(SignatureError, match="Invalid Signature"):
        ours.recv(dealer, 0)
    upstream.Session(key=b"").send(router, "status", ident=b"me")
    with pytest.raises(SignatureError, match="Unsigned Message"):
        ours.recv(dealer, 0)
    router.send_multipart([b"me", b"no", b"delimiter"])
    with pytest.raises(MessageError, match="no delimiter"):
        ours.recv(dealer, 0)


def test_a_forgery_does_not_block_the_genuine_message(pair: Pair) -> None:
    dealer, router = pair
    sender, receiver = Session(KEY), Session(KEY)
    frames = sender.serialize(sender.msg("status", {"a": 1}))
    dealer.send_multipart([*frames[:-1], b'{"a":2}'])
    with pytest.raises(SignatureError, match="Invalid Signature"):
        receiver.recv(router, 0)
    dealer.send_multipart(frames)
    assert receiver.recv(router, 0)[1] is not None
    dealer.send_multipart(frames)
    with pytest.raises(SignatureError, match="Duplicate Signature"):
        receiver.recv(router, 0)


def test_nothing_there_is_none(pair: Pair) -> None:
    assert Session(KEY).recv(pair[0]) == (None, None)


def test_raw_frames_are_signed_and_sent(pair: Pair) -> None:
    dealer, router = pair
    ours = Session(KEY)
    frames = [b'{"msg_id":"1","msg_type":"status"}', b"{}", b"{}", b'{"a":1}', b"buffer"]
    ours.send_raw(dealer, frames, identities=[b"hop"])
    identities, message = upstream.Session(key=KEY).recv(router, mode=0)
    assert identities == [b"me", b"hop"]
    assert message is not None
    assert (message["content"], bytes(message["buffers"][0])) == ({"a": 1}, b"buffer")
    ours.send_raw(router, frames, identities=b"me")
    assert Session(KEY).recv(dealer, 0)[1] is not None
    with pytest.raises(MessageError, match="3 frames"):
        ours.send_raw(dealer, frames[:3])


@pytest.mark.parametrize("size", [10, COPY_MAX])
@pytest.mark.parametrize("copy", [True, False])
def test_large_buffers_are_tracked(pair: Pair, size: int, *, copy: bool) -> None:
    dealer, router = pair
    sent = Session(KEY).send(dealer, "status", buffers=[memoryview(b"x" * size)], track=True)
    assert (sent["tracker"] is DONE) == (size < COPY_MAX)
    _, message = Session(KEY).recv(router, 0, copy=copy)
    assert message is not None
    assert bytes(message["buffers"][0]) == b"x" * size
    sent["tracker"].wait(20)
    assert sent["tracker"].done


def test_a_stream_copies_what_is_to_be_tracked(pair: Pair) -> None:
    dealer, router = pair

    async def main() -> None:
        stream = ZMQStream(dealer)
        large = bytearray(b"x" * COPY_MAX)
        sent = Session(KEY).send(stream, "status", buffers=[memoryview(large)], track=True)
        assert sent["tracker"].done, "a program that waits for it may change its buffer then"
        large[:] = b"y" * COPY_MAX
        stream.flush()
        stream.on_recv(None)
        _, message = Session(KEY).recv(router, 0)
        assert message is not None
        assert bytes(message["buffers"][0]) == b"x" * COPY_MAX

    asyncio.run(main())


def test_a_message_that_is_there_is_sent_again(pair: Pair) -> None:
    dealer, router = pair
    ours = Session(KEY)
    made = Message(ours.msg("status", {"a": 1}))
    for _ in range(2):
        ours.send(dealer, made, buffers=[b"1"])
    receiver = Session(KEY, history_max=0)
    assert receiver.recv(router, 0) == receiver.recv(router, 0)


def test_secure_by_default() -> None:
    first, second = Session(), Session()
    assert len(first.key) >= 32
    assert first.key != second.key
    assert first.session != second.session
    assert first.msg_id == f"{first.session}_{os.getpid()}_0"


def test_buffers_that_cannot_be_sent(pair: Pair) -> None:
    ours = Session(KEY)
    with pytest.raises(TypeError, match="buffer 1 has to support the buffer protocol, not be int"):
        ours.send(pair[0], "status", buffers=[b"", 7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="buffer 0 is not contiguous"):
        ours.send(pair[0], "status", buffers=[memoryview(b"abcd")[::2]])


def test_a_fork_is_noticed(pair: Pair) -> None:
    ours = Session(KEY)
    ours.process += 1
    with pytest.raises(RuntimeError, match="fork"):
        ours.send(pair[0], "status")


def test_the_package_needs_no_jupyter() -> None:
    """Everything imports where jupyter_client, ipykernel, msgpack and pexpect are not installed."""
    program = """
import importlib, pkgutil, sys
for name in ("jupyter_client", "jupyter_core", "ipykernel", "IPython", "traitlets", "msgpack", "pexpect", "paramiko"):
    sys.modules[name] = None
import broker
for found in pkgutil.walk_packages(broker.__path__, "broker."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
