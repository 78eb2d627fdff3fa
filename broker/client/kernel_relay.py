"""A kernel behind the broker as if it ran here: five local sockets and a connection file for any Jupyter client."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Any, Self

import msgspec
import zmq

from broker.client.async_client import AsyncClient, Subscription
from broker.client.stream import Stream
from broker.links.kernel_channel import Channel, Header, Received
from broker.links.session import Session, new_key, now
from broker.links.zeromq_socket import Reader, send
from broker.peer.errors import BrokerError, RemoteError
from broker.peer.values import Encoded
from broker.wire.connection_file import ConnectionInfo
from broker.wire.kernel import KernelMessage
from broker.wire.session import DELIMITER, pack_json

log = logging.getLogger("broker.client")

MESSAGE_MAX_BYTES = 256 << 20
LISTENED_S = 1.0
"""how long requests wait for the first subscription to IOPub: what is published before it reaches nobody"""
ENDED_KEPT = 1000
"""requests that have ended, of which it is known how much of what the kernel said about them was passed on"""
QUEUE_MAX = 10_000
"""messages that wait for one local client in ZeroMQ; to one that does not read, IOPub drops"""

LOOPBACK = "127.0.0.1"
NOTHING = Received(KernelMessage("iopub", b"{}", b"{}", b"{}", b"{}"), Header(), Header())
"""the parent of a message that has none"""


class NoKernel(Exception):
    """An endpoint that is served and is no kernel."""


class KernelRelay:
    """Stands in for the kernel at an endpoint, on loopback ports of this machine, until it is closed.

        async with KernelRelay(client, "kernels.alice") as relay:
            write_connection_file(path, relay.info)

    Everything is signed with a key of its own. What clients here ask goes to the kernel as requests with the deadline
    of its endpoint; what the kernel says about them comes as their items, so that nothing of it is dropped on the way,
    and all else it says as broadcasts.
    """

    def __init__(self, client: AsyncClient, endpoint: str) -> None:
        self.endpoint = endpoint
        self._client = client
        self._session = Session(new_key())
        self._channels: dict[str, Channel] = {}
        self._heartbeat: Reader | None = None
        self._iopub: Reader | None = None
        self._publishing: zmq.Socket[bytes] | None = None
        self._heard: Subscription | None = None
        self._hearing: asyncio.Task[Any] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._passed_on: OrderedDict[str, int] = OrderedDict()
        self._asking: dict[str, Received] = {}
        self._listened = asyncio.Event()
        self._queues: dict[str, asyncio.Queue[Received]] = {}
        self._is_dead = False
        self.info: ConnectionInfo
        """where the local sockets are, and their key"""

    # ------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Open the sockets. Raises what the client does, NoKernel for an endpoint that is none."""
        name = await self._kernel_name()
        self._heard = await self._client.subscribe(self.endpoint, topic="iopub")
        try:
            self._open(name)
        except BaseException:
            await self.close()
            raise
        self._hearing = self._begin(self._broadcasts_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def wait(self) -> None:
        """Relay for as long as there is a broker. Raises ConnectionLost when there will be none any more."""
        assert self._hearing is not None
        await asyncio.shield(self._hearing)

    async def close(self) -> None:
        """Leave nothing: sockets are closed, requests under way are cancelled."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._heard is not None:
            await self._heard.close()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        for reader in (self._heartbeat, self._iopub):
            if reader is not None and reader.socket is not None:
                socket = reader.socket
                reader.close()
                socket.close(linger=0)

    async def _kernel_name(self) -> str:
        told = await self._client.describe(self.endpoint)
        infos = [worker["info"] for worker in told["workers"] if isinstance(worker["info"], dict)]
        kernels = [info for info in infos if info.get("dialect") == "jupyter"]
        if told["workers"] and not kernels:
            raise NoKernel(f"{self.endpoint} is served by no kernel; `broker work kernel` serves one")
        return str(kernels[0].get("kernel", "")) if kernels else ""

    def _open(self, kernel_name: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        ports: dict[str, Any] = {}

        def bind(name: str, kind: int) -> zmq.Socket[bytes]:
            socket: zmq.Socket[bytes] = context.socket(kind)
            socket.linger = 0
            socket.set(zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES)
            socket.set(zmq.SNDHWM, QUEUE_MAX)
            socket.set(zmq.RCVHWM, QUEUE_MAX)
            if kind == zmq.ROUTER and name != "hb":
                socket.set(zmq.ROUTER_MANDATORY, 1)
                socket.set(zmq.ROUTER_HANDOVER, 1)  # a client that comes back under its name is the same one
            ports[f"{name}_port"] = socket.bind_to_random_port(f"tcp://{LOOPBACK}")
            return socket

        for name in ("shell", "control", "stdin"):
            queue = self._queues[name] = asyncio.Queue()
            self._channels[name] = Channel(name, bind(name, zmq.ROUTER), self._session, queue.put_nowait)
            self._begin(self._ask_on(name, queue))
        loop = asyncio.get_running_loop()
        publishing = bind("iopub", zmq.XPUB)
        publishing.set(zmq.XPUB_VERBOSE, 1)
        self._iopub = Reader(loop, publishing, self._subscribed)
        self._publishing = publishing
        self._heartbeat = Reader(loop, bind("hb", zmq.ROUTER), self._beat)
        self.info = ConnectionInfo(ip=LOOPBACK, key=self._session.key.decode(), kernel_name=kernel_name, **ports)

    def _begin(self, doing: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task is not self._hearing and not task.cancelled() and task.exception() is not None:
            log.error("the relay of %s failed", self.endpoint, exc_info=task.exception())

    # ------------------------------------------------------------ what clients here say

    def _beat(self, frames: list[zmq.Frame]) -> None:
        """A heartbeat comes back as it is, unless the kernel is known to be dead."""
        if not self._is_dead and self._heartbeat is not None and self._heartbeat.socket is not None:
            send(self._heartbeat.socket, [frame.bytes for frame in frames])
            self._heartbeat.look()

    def _subscribed(self, frames: list[zmq.Frame]) -> None:
        told = frames[0].bytes
        if told[:1] == b"\x01":
            self._listened.set()
            welcome = self._own("iopub_welcome", {"subscription": told[1:].decode("utf-8", "replace")}, NOTHING)
            self._publish(welcome, topic=told[1:])

    async def _ask_on(self, name: str, queue: asyncio.Queue[Received]) -> None:
        """Pass on what comes over one channel, in its order."""
        while True:
            received = await queue.get()
            if name != "stdin" and not self._listened.is_set():
                try:
                    async with asyncio.timeout(LISTENED_S):
                        await self._listened.wait()
                except TimeoutError:
                    self._listened.set()
            try:
                await self._pass_on(name, received)
            except BrokerError as error:
                self._fail(received, error)
            except Exception:  # the others that are asked over this channel still have to be
                log.exception("a message on %s could not be passed on", name)

    async def _pass_on(self, name: str, received: Received) -> None:
        message = received.message
        if name == "stdin":
            params = Encoded(message.json())
            await self._client.call(f"{self.endpoint}/stdin", params, timeout=None)
            return
        buffers = b",".join(b'{"$buffer":%d}' % index for index in range(len(message.buffers)))
        text = b'%b,"iopub":true,"buffers":[%b]}' % (message.json()[:-1], buffers)
        params = Encoded(text, message.buffers)
        self._asking[received.header.msg_id] = received  # before its first message can come as a broadcast
        try:
            stream = await self._client.stream(f"{self.endpoint}/{name}", params, timeout=None)
        except BrokerError:
            del self._asking[received.header.msg_id]
            raise
        self._begin(self._answer(received, stream))

    async def _answer(self, received: Received, stream: Stream) -> None:
        """Pass back what the kernel says about a request, then its reply."""
        msg_id = received.header.msg_id
        has_replied = False
        try:
            async with stream:
                async for item in stream:
                    has_replied |= self._pass_back(received, item)
            if stream.result is not None and not has_replied:  # it was too large for an item
                self._reply(received, _message(received.message.channel, stream.result))
        except BrokerError as error:
            self._fail(received, error, has_replied=has_replied)
        finally:
            self._asking.pop(msg_id, None)

    def _pass_back(self, received: Received, item: dict[str, Any]) -> bool:
        """Pass on one message about a request, and say whether it was its reply."""
        message = _message(item["channel"], item)
        if message.channel != "iopub":
            self._reply(received, message)
            return message.channel != "stdin"
        self._note(received.header.msg_id, item.get("n", 0))
        self._publish(message)
        return False

    def _reply(self, received: Received, message: KernelMessage) -> None:
        """Send what the kernel says to one client alone: its reply, a question for input."""
        try:
            self._channels[message.channel].send(message, received.identities)
        except zmq.ZMQError as error:
            log.info("a reply has nobody to go to any more: %s", error)

    def _fail(self, received: Received, error: BrokerError, *, has_replied: bool = False) -> None:
        """A request that ended in no reply of the kernel's ends for its client too, as if the kernel had said so."""
        log.warning("%s", error)
        kind = received.header.msg_type
        if received.message.channel == "stdin" or not kind.endswith("_request"):
            return
        name = error.type if isinstance(error, RemoteError) else type(error).__name__
        content = {"status": "error", "ename": name, "evalue": error.detail, "traceback": [str(error)]}
        if kind == "execute_request" and not has_replied:
            shown = {key: value for key, value in content.items() if key != "status"}
            self._publish(self._own("error", shown, received))
        if not has_replied:
            reply = self._own(kind.removesuffix("_request") + "_reply", content, received)
            self._reply(received, msgspec.structs.replace(reply, channel=received.message.channel))
        self._publish(self._own("status", {"execution_state": "idle"}, received))

    # ------------------------------------------------------------ what the kernel says to everybody

    async def _broadcasts_on(self) -> None:
        assert self._heard is not None
        async for told in self._heard:
            if told.missed:
                text = f"\n[{told.missed} messages of the kernel, about what others asked, did not arrive here]\n"
                self._publish(self._own("stream", {"name": "stderr", "text": text}, NOTHING))
            try:
                self._hear(told.data)
            except (AttributeError, KeyError, TypeError, ValueError):
                log.warning("a broadcast of %s that is no message of a kernel is dropped", self.endpoint)

    def _hear(self, data: Any) -> None:
        header, parent = data["header"], data.get("parent_header", {}).get("msg_id", "")
        if header["msg_type"] == "status":
            self._is_dead = data["content"].get("execution_state") == "dead"
        if parent in self._asking or data.get("n", 0) <= self._passed_on.get(parent, -1):
            return  # it comes, or came, with the request it is about
        self._publish(_message("iopub", data))

    def _note(self, msg_id: str, number: int) -> None:
        """What was said about a request, up to this number, has been passed on."""
        self._passed_on[msg_id] = number
        self._passed_on.move_to_end(msg_id)
        if len(self._passed_on) > ENDED_KEPT:
            self._passed_on.popitem(last=False)

    def _publish(self, message: KernelMessage, topic: bytes | None = None) -> None:
        assert self._iopub is not None
        if self._publishing is None or self._iopub.socket is None:
            return
        texts = [message.header, message.parent_header, message.metadata, message.content]
        if topic is None:
            topic = b"kernel"
        signed = [DELIMITER, self._session.sign(texts), *texts, *message.buffers]
        send(self._publishing, [topic, *signed])
        self._iopub.look()

    def _own(self, msg_type: str, content: dict[str, Any], parent: Received) -> KernelMessage:
        """A message in the kernel's place."""
        header = pack_json(self._session.header(msg_type, now()))
        return KernelMessage("iopub", header, parent.message.header, b"{}", pack_json(content))


def _message(channel: str, told: dict[str, Any]) -> KernelMessage:
    """A message from what came of it through the broker."""
    return KernelMessage(
        channel, pack_json(told["header"]), pack_json(told.get("parent_header", {})),
        pack_json(told.get("metadata", {})), pack_json(told.get("content", {})), tuple(told.get("buffers", ())),
    )  # fmt: skip
