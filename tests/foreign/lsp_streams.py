"""What python-lsp-jsonrpc reads from and writes to, made of a WebSocket: the files hold one message per frame."""

from __future__ import annotations

import logging
import threading
from typing import Any

from pylsp_jsonrpc.endpoint import Endpoint
from pylsp_jsonrpc.streams import JsonRpcStreamReader, JsonRpcStreamWriter
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

log = logging.getLogger(__name__)


class FramesIn:
    """A file of messages with the headers of the Language Server Protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._lines: list[bytes] = []
        self._body = b""
        self.closed = False

    def readline(self) -> bytes:
        if not self._lines:
            try:
                message = self._socket.recv()
            except ConnectionClosed:
                self.closed = True
                return b""
            self._body = message.encode() if isinstance(message, str) else message
            self._lines = [b"Content-Length: %d\r\n" % len(self._body), b"\r\n"]
        return self._lines.pop(0)

    def read(self, size: int) -> bytes:
        assert size == len(self._body)
        return self._body

    def close(self) -> None:
        self.closed = True


class FramesOut:
    """A file that sends what was written, without its headers, at each flush."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self._written += data

    def flush(self) -> None:
        _, _, body = self._written.partition(b"\r\n\r\n")
        self._written = b""
        self._socket.send(body.decode())

    def close(self) -> None:
        self.closed = True


def open_endpoint(url: str, token: str, dispatcher: Any) -> tuple[ClientConnection, Endpoint]:
    """A connected Endpoint whose messages are read in a thread of their own."""
    headers = {"Authorization": f"Bearer {token}"}
    socket = connect(url, additional_headers=headers, max_size=None, compression=None).__enter__()
    endpoint = Endpoint(dispatcher, JsonRpcStreamWriter(FramesOut(socket)).write)

    def consume(message: Any) -> None:
        try:
            endpoint.consume(message)
        except Exception as error:  # it raises on the answer to a request that its user cancelled
            log.info("not consumed: %r", error)

    reader = JsonRpcStreamReader(FramesIn(socket))
    threading.Thread(target=reader.listen, args=(consume,), daemon=True).start()
    return socket, endpoint
