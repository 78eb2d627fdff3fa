"""Real DICOM images pass byte for byte in every form, and leave no trace in the broker's log."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.data import get_testdata_file
from websockets.exceptions import ConnectionClosed

from tests.foreign.conftest import Libraries
from tests.foreign.harness import PATIENCE_S, BrokerProcess, Caller, Library, PlainCaller, PlainWorker, dial

BASE64_SLICE, RAW_SLICE = 24, 16
"""bytes of a trace that is long enough to be none by accident"""


@lru_cache
def images() -> dict[str, bytes]:
    """The files that come with pydicom; what it would have to download is left out."""
    folder = Path(pydicom.data.__file__).parent / "test_files"
    found = {}
    for path in sorted(folder.glob("*.dcm")):
        packaged = get_testdata_file(path.name, download=False)
        assert isinstance(packaged, str)
        found[path.name] = Path(packaged).read_bytes()
    return found


def text(contents: bytes) -> str:
    return base64.b64encode(contents).decode()


def name_of(params: Any) -> str:
    name: str = params["name"] if isinstance(params, dict) else params[0]
    return name


def digest_of(params: Any) -> str:
    """Of the image a caller sent; what the worker gets is the text form."""
    return hashlib.sha256(base64.b64decode(params["image"]["$base64"])).hexdigest()


TEXT_METHODS = {
    "text": lambda params: text(images()[name_of(params)]),
    "image": lambda params: {"name": name_of(params), "image": {"$base64": text(images()[name_of(params)])}},
    "digest": digest_of,
}


def join(message: Any, *attachments: bytes) -> bytes:
    """A binary message: uint32 count and offsets, then the parts; the JSON padded so that what follows is aligned."""
    head = json.dumps(message).encode()
    at = 4 * (len(attachments) + 2)
    head += b" " * (-(at + len(head)) % 8)
    offsets = [at]
    for part in (head, *attachments)[:-1]:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f">{len(offsets) + 1}I", len(offsets), *offsets) + head + b"".join(attachments)


def split(frame: bytes) -> tuple[Any, list[bytes]]:
    """The JSON and the attachments of a binary message."""
    (count,) = struct.unpack_from(">I", frame)
    offsets = [*struct.unpack_from(f">{count}I", frame, 4), len(frame)]
    parts = [frame[offsets[n] : offsets[n + 1]] for n in range(count)]
    assert count < 2 or offsets[1] % 8 == 0, "attachments are aligned"
    return json.loads(parts[0]), parts[1:]


class BinaryWorker(PlainWorker):
    """Answers with attachments, and takes them."""

    def receive(self, message: str | bytes) -> None:
        request, attachments = (json.loads(message), []) if isinstance(message, str) else split(message)
        if request["method"] == "digest":
            index = request["params"]["image"]["$buffer"]
            self.reply(request["id"], result=hashlib.sha256(attachments[index]).hexdigest())
            return
        name = name_of(request["params"])
        result = {"name": name, "image": {"$buffer": 0}}
        self.socket.send(join({"jsonrpc": "2.0", "id": request["id"], "result": result}, images()[name]))


def fetch_all(caller: Caller, method: str) -> dict[str, Any]:
    """All images, in flight at the same time."""
    calls = {name: caller.submit(method, {"name": name}) for name in images()}
    return {name: call.result(PATIENCE_S) for name, call in calls.items()}


def test_there_are_images() -> None:
    assert len(images()) > 50
    assert sum(map(len, images().values())) > 2_000_000
    assert max(map(len, images().values())) > 200_000


def test_a_text_worker_to_every_library(calling: Library, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with PlainWorker(url + "?role=worker", TEXT_METHODS), Caller(calling, url) as caller:
        got = fetch_all(caller, "text")
        assert {name: base64.b64decode(result, validate=True) for name, result in got.items()} == images()
        check_images(fetch_all(caller, "image"))
        for name in ("CT_small.dcm", "rtplan.dcm"):
            digest = hashlib.sha256(images()[name]).hexdigest()
            assert caller.call("digest", {"image": {"$base64": text(images()[name])}}) == digest


def test_a_binary_worker_to_every_library(calling: Library, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with BinaryWorker(url + "?role=worker&binary=1"), Caller(calling, url) as caller:
        check_images(fetch_all(caller, "image"))
        for name in ("CT_small.dcm", "rtplan.dcm"):
            digest = hashlib.sha256(images()[name]).hexdigest()
            assert caller.call("digest", {"image": {"$base64": text(images()[name])}}) == digest


def check_images(got: dict[str, Any]) -> None:
    for name, contents in images().items():
        assert got[name] == {"name": name, "image": {"$base64": text(contents)}}


@pytest.mark.parametrize("worker", [BinaryWorker, lambda url: PlainWorker(url, TEXT_METHODS)], ids=["binary", "text"])
def test_both_kinds_of_worker_to_a_binary_caller(worker: Any, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    # the text worker declares nothing: it is sent text
    query = "?role=worker" + ("&binary=1" if worker is BinaryWorker else "")
    with worker(url + query), dial(url + "?binary=1") as caller:
        for name, contents in images().items():
            caller.send(json.dumps({"jsonrpc": "2.0", "id": name, "method": "image", "params": [name]}))
            frame = caller.recv(PATIENCE_S)
            assert isinstance(frame, bytes)
            reply, attachments = split(frame)
            assert reply == {"jsonrpc": "2.0", "id": name, "result": {"name": name, "image": {"$buffer": 0}}}
            assert attachments == [contents]
            request = {"jsonrpc": "2.0", "id": 1, "method": "digest", "params": {"image": {"$buffer": 0}}}
            caller.send(join(request, contents))
            reply = json.loads(caller.recv(PATIENCE_S))
            assert reply == {"jsonrpc": "2.0", "id": 1, "result": hashlib.sha256(contents).hexdigest()}


# ---------------------------------------------------------------- the log


def slices(contents: bytes, size: int) -> set[bytes]:
    """Cut into pieces; those that say nothing (padding, one value over and over) are left out."""
    cut = {contents[at : at + size] for at in range(0, len(contents) - size + 1, size)}
    return {piece for piece in cut if len(set(piece)) >= 8}


@lru_cache
def people() -> set[bytes]:
    """Names and ids of the patients."""
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the files are broken on purpose
        for name in images():
            path = get_testdata_file(name, download=False)
            dataset = pydicom.dcmread(str(path), stop_before_pixels=True, force=True)
            found |= {str(dataset.get(key, "")).strip() for key in ("PatientName", "PatientID")}
    return {person.encode() for person in found if len(person) >= 8}


def traces(log: bytes) -> list[bytes]:
    """What of the images is in a log."""
    found = [person for person in people() if person in log]
    joined = b"".join(images().values())
    texts = [text(contents).encode() for contents in images().values()]
    for size, cut in (
        (RAW_SLICE, slices(joined, RAW_SLICE)),
        (BASE64_SLICE, set().union(*(slices(encoded, BASE64_SLICE) for encoded in texts))),
    ):
        found += [log[at : at + size] for at in range(len(log) - size + 1) if log[at : at + size] in cut]
    return found


def test_traces_are_found_where_there_are_some() -> None:
    contents = images()["CT_small.dcm"]
    assert traces(b'{"a": "' + text(contents)[3000:3050].encode() + b'"}')
    assert traces(b"bad frame " + contents[-2000:-1950] + b"...")
    assert traces(b"patient CompressedSamples^CT1")
    assert not traces(b"2026-01-01 12:00:00 INFO broker serves on http://127.0.0.1:18765")


def test_the_log_holds_nothing_of_what_passed(libraries: Libraries, broker: BrokerProcess, endpoint: str) -> None:
    url = broker.ws(f"/ws/{endpoint}")
    with (
        PlainWorker(url + "?role=worker", TEXT_METHODS),
        Caller(libraries("caller", "jsonrpc-websocket"), url) as caller,
    ):
        check_images(fetch_all(caller, "image"))
    contents = images()["CT_small.dcm"]
    encoded = text(contents)
    broken: list[str | bytes] = [
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "digest", "params": [encoded]})[:-3],
        json.dumps({"jsonrpc": "2.0", "id": encoded, "method": "digest", "params": [encoded]}),
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": encoded}),
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "digest", "meta": {encoded[:1000]: contents.hex()}}),
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "digest", "params": {"image": {"$base64": encoded[:-1]}}}),
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "broker.publish", "params": [encoded]}),
        contents,
        join({"jsonrpc": "2.0", "id": 1, "method": "digest", "params": {"image": {"$buffer": 9}}}, contents),
    ]
    for message in broken:
        for role in ("caller", "worker"):
            with dial(f"{url}?role={role}") as peer:
                peer.send(message)
                try:
                    peer.recv(2)
                except (ConnectionClosed, TimeoutError):
                    pass  # whether and how it is answered is told elsewhere
    with PlainCaller(broker.ws("/ws")) as admin:
        assert admin.call("broker.ping")
    log = broker.log_file.read_bytes()
    assert re.search(rb"serves on", log)
    assert traces(log) == []
