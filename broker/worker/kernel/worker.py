"""`KernelWorker`: serves one Jupyter kernel, so that its sockets need never leave its machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Self

import msgspec

from broker.links.kernel_channel import Header, Received
from broker.links.session import now
from broker.peer.errors import BrokerError
from broker.peer.session import Options
from broker.peer.values import Encoded
from broker.wire.kernel import KernelMessage
from broker.wire.session import pack_json
from broker.worker.faults import BAD_PARAMS, Fault
from broker.worker.kernel.asking import Asking
from broker.worker.kernel.kernel import Kernel
from broker.worker.kernel.outputs import Outputs, as_item, as_message
from broker.worker.kernel.process import KernelError, Process
from broker.worker.requests import Request, current
from broker.worker.worker import Worker

log = logging.getLogger("broker.worker")

DEADLINE_S = 7 * 86_400.0
"""of requests whose caller names none, and how long their streams may stand still: a long cell is no error"""
CAPACITY = 1000
"""requests at a time: those that wait in the kernel's queue are among them, and must not keep an interrupt out"""
GRACE_S = 30.0
"""a broken connection ends nothing for so long: the kernel goes on, and so do its requests"""
MARK_EVERY = 32
"""messages of which the last is published with a question for the broker's word"""
MARK_EVERY_BYTES = 256 << 10
MARKS_AHEAD_MAX = 4
"""such questions that may be open; then publishing waits"""
SHOWN = frozenset(("stream", "display_data", "execute_result", "error", "update_display_data", "clear_output"))
"""the kinds of messages that plain callers of `execute` get as items"""

_PUBLISHING = Options(timeout=60.0)


class KernelWorker(Worker):
    """Serves a kernel under an endpoint: messages of Jupyter's protocol as requests, IOPub as broadcasts.

    It starts the kernel with itself, or attaches to it, and is there once the kernel answers. `name`, `capacity` and
    the others are those of `Worker`. Raises from `start` KernelError beside what `Worker` raises.
    """

    def __init__(
        self, endpoint: str, process: Process, url: str | None = None, token: str | None = None, *, name: str = "",
        capacity: int = CAPACITY, grace: float = GRACE_S, wait: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            endpoint, url, token, name=name, capacity=capacity, grace=grace, wait=wait, deadline=DEADLINE_S,
            idle=DEADLINE_S,
        )  # fmt: skip
        self.kernel = Kernel(process, self._heard, self._changed)
        self._broadcasts = Outputs(as_message)
        self._publishing: asyncio.Task[None] | None = None
        self._ahead: set[asyncio.Future[Any]] = set()
        self._unmarked = self._unmarked_bytes = 0
        self._landed = asyncio.Event()
        self._leaving: asyncio.Task[None] | None = None
        for method in (
            self.shell, self.control, self.stdin, self.execute, self.complete, self.inspect, self.is_complete,
            self.history, self.kernel_info, self.comm_info, self.interrupt, self.restart, self.shutdown, self.state,
        ):  # fmt: skip
            self.add(method)

    # ------------------------------------------------------------ life

    async def start(self) -> Self:
        """Start the kernel, then serve it, on the running event loop."""
        await self.kernel.start()
        self._changed()
        try:
            await super().start()
        except BaseException:
            await self.kernel.end(now=True)
            raise
        self._publishing = asyncio.get_running_loop().create_task(self._publish_on())
        return self

    async def stop(self, *, now: bool = False) -> None:
        """Go, and end the kernel if it was started here."""
        await super().stop(now=now)
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.wait((self._publishing,))
            self._publishing = None
        await self.kernel.end(now=now)

    def _changed(self) -> None:
        """What `broker describe` shows of the kernel."""
        self.info = {
            "dialect": "jupyter",
            "kernel": self.kernel.process.name or self.kernel.kernel_info.get("implementation", ""),
            "kernelspec": self.kernel.process.spec,
            "kernel_info": self.kernel.kernel_info,
        }

    # ------------------------------------------------------------ messages as they are

    async def shell(
        self, header: dict[str, Any], content: dict[str, Any] | None = None,
        parent_header: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None,
        buffers: list[bytes] | None = None, iopub: bool = False,
    ) -> Any:  # fmt: skip
        """Send a message to the kernel's shell; the result is its reply, as a message.

        Items, to who takes them, are messages on `stdin` that ask for input, and with `iopub` everything the kernel
        says about the request. A message that has no reply, as those of comms, ends as null when the kernel is done
        with it.
        """
        return await self._relay("shell", header, content, parent_header, metadata, buffers, follows=iopub)

    async def control(
        self, header: dict[str, Any], content: dict[str, Any] | None = None,
        parent_header: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None,
        buffers: list[bytes] | None = None, iopub: bool = False,
    ) -> Any:  # fmt: skip
        """The same over the kernel's control channel, where nothing waits behind a running cell."""
        return await self._relay("control", header, content, parent_header, metadata, buffers, follows=iopub)

    async def stdin(
        self, content: dict[str, Any], header: dict[str, Any] | None = None,
        parent_header: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """What was typed: an `input_reply` with `content` `{"value": …}`, for the input that the kernel asked for."""
        made = self.kernel.header("input_reply") | (header or {})
        await self.kernel.tell(_message("stdin", made, content, parent_header, metadata, None)[0])

    # ------------------------------------------------------------ for plain callers

    async def execute(
        self, code: str, silent: bool = False, store_history: bool = True,
        user_expressions: dict[str, str] | None = None, allow_stdin: bool = False, stop_on_error: bool = False,
    ) -> Any:  # fmt: skip
        """Run code. Items are its outputs, `{type, …}`; the result is the content of the kernel's reply.

        An exception in the code is this request's error, with `type`, `message` and `traceback` in its data. With
        `stop_on_error` it ends what waits behind this, whoever has asked for it.
        """
        content = {
            "code": code, "silent": silent, "store_history": store_history, "allow_stdin": allow_stdin,
            "user_expressions": user_expressions or {}, "stop_on_error": stop_on_error,
        }  # fmt: skip
        return await self._plain("execute_request", content, follows=True)

    async def complete(self, code: str, cursor_pos: int | None = None) -> Any:
        """What could stand at the cursor, by default the end; in characters."""
        return await self._plain("complete_request", {"code": code, "cursor_pos": _cursor(code, cursor_pos)})

    async def inspect(self, code: str, cursor_pos: int | None = None, detail_level: int = 0) -> Any:
        """Documentation of what stands at the cursor, by default the end."""
        content = {"code": code, "cursor_pos": _cursor(code, cursor_pos), "detail_level": detail_level}
        return await self._plain("inspect_request", content)

    async def is_complete(self, code: str) -> Any:
        """Whether the code can be run as it is."""
        return await self._plain("is_complete_request", {"code": code})

    async def history(
        self, hist_access_type: str = "tail", n: int = 100, output: bool = False, raw: bool = True, session: int = 0,
        start: int = 0, stop: int | None = None, pattern: str | None = None, unique: bool = False,
    ) -> Any:  # fmt: skip
        """What was run before: the last `n`, a `range`, or a `search`."""
        content = {
            "hist_access_type": hist_access_type, "n": n, "output": output, "raw": raw, "session": session,
            "start": start, "stop": stop, "pattern": pattern, "unique": unique,
        }  # fmt: skip
        return await self._plain(
            "history_request", {name: value for name, value in content.items() if value is not None}
        )

    async def kernel_info(self) -> Any:
        """Language, versions and banner."""
        return await self._plain("kernel_info_request", {})

    async def comm_info(self, target_name: str | None = None) -> Any:
        """The comms that are open, by id."""
        return await self._plain("comm_info_request", {} if target_name is None else {"target_name": target_name})

    # ------------------------------------------------------------ the kernel itself

    async def interrupt(self) -> None:
        """Interrupt what the kernel is doing."""
        await _or_fault(self.kernel.interrupt())

    async def restart(self) -> None:
        """Another process in its place; what the kernel had ends."""
        await _or_fault(self.kernel.restart())

    async def shutdown(self) -> None:
        """End the kernel; its worker goes too."""
        await _or_fault(self.kernel.shutdown())
        self._leaving = asyncio.get_running_loop().create_task(self.stop())

    async def state(self) -> dict[str, Any]:
        """`{execution_state, last_activity, waiting, deaths, dropped_bytes, name}`; dropped on the way to listeners."""
        kernel = self.kernel
        return {
            "execution_state": kernel.state, "last_activity": kernel.last_activity, "waiting": kernel.waiting,
            "deaths": kernel.died, "dropped_bytes": self._broadcasts.dropped_bytes, "name": kernel.process.name,
        }  # fmt: skip

    # ------------------------------------------------------------ details

    async def _relay(
        self, channel: str, header: Any, content: Any, parent_header: Any, metadata: Any, buffers: Any, *, follows: bool
    ) -> Any:
        request = current()
        takes_items = request.asked.stream_in
        if not takes_items and isinstance(content, dict) and content.get("allow_stdin"):
            content = content | {"allow_stdin": False}  # there is no way to ask this caller
        message, read = _message(channel, header, content, parent_header, metadata, buffers)
        if read.msg_type in _LIVES:
            return await self._live(read.msg_type, header, content or {})
        received = await self._answer(request, Asking(message, read, is_followed=follows and takes_items))
        return None if received is None else as_message(received.message, 0)

    async def _live(self, msg_type: str, header: dict[str, Any], content: dict[str, Any]) -> Any:
        """A front end's `shutdown_request` and `interrupt_request`, over either channel: done here.

        The kernel's end would be taken for its death; and a kernel that is told on its shell interrupts only itself.
        """
        reply: dict[str, Any] = {"status": "ok"}
        if msg_type == "interrupt_request":
            await self.interrupt()
        else:
            reply["restart"] = bool(content.get("restart"))
            await (self.restart() if reply["restart"] else self.shutdown())
        told = header | {"msg_type": _LIVES[msg_type], "msg_id": f"{header['msg_id']}.reply", "date": now()}
        return {"header": told, "parent_header": header, "metadata": {}, "content": reply}

    async def _plain(self, msg_type: str, content: dict[str, Any], *, follows: bool = False) -> Any:
        request = current()
        if not request.asked.stream_in and content.get("allow_stdin"):
            text = "allow_stdin: the kernel's questions come as items, and this caller takes none (stream: in)"
            raise Fault(text, code=BAD_PARAMS)
        message, read = _message("shell", self.kernel.header(msg_type), content, None, None, None)
        asking = Asking(message, read, is_followed=follows, form=as_item, shows=SHOWN)
        received = await self._answer(request, asking)
        if received is None:
            return None
        reply = _REPLY.decode(received.message.content)
        if reply.status != "ok" and follows:
            kind = reply.ename or "Aborted"
            text = reply.evalue if reply.ename else "the kernel did not run it, because something before it failed"
            raise Fault(text or kind, data={"type": kind, "message": text, "traceback": reply.traceback})
        return Encoded(received.message.content)

    async def _answer(self, request: Request, asking: Asking) -> Received | None:
        """Ask the kernel; its caller gets the items meanwhile. Returns the reply."""
        kernel = self.kernel
        await kernel.ask(asking)
        try:
            while (item := await asking.outputs.get()) is not None:
                await request.send(item)
            return await asking.replied
        except BaseException:  # it was cancelled, or an item could not be sent: either way nobody waits any more
            await asyncio.shield(kernel.cancel(asking))
            raise
        finally:
            if not asking.is_cancelled:
                kernel.done(asking)

    # ------------------------------------------------------------ broadcasts

    def _heard(self, received: Received, number: int) -> None:
        self._broadcasts.put(received, number)

    async def _publish_on(self) -> None:
        """Publish what the kernel says, no faster than the broker does it."""
        while True:
            output = await self._broadcasts.get()
            assert output is not None
            while self._connection is None or not self._connection.is_up or len(self._ahead) >= MARKS_AHEAD_MAX:
                self._landed.clear()
                await self._landed.wait()
            try:
                self._publish_one(output)
            except BrokerError as error:
                log.warning("a message of the kernel was not published: %s", error)

    def _publish_one(self, output: Encoded) -> None:
        """Publish one message. The broker deals with them in order, so a word from it now and then is enough."""
        connection = self._connection
        assert connection is not None
        params = b'{"endpoint":%b,"topic":"iopub","data":%b}' % (msgspec.json.encode(self.endpoint), output.text)
        self._unmarked += 1
        self._unmarked_bytes += len(output.text) + sum(map(len, output.attachments))
        if self._unmarked < MARK_EVERY and self._unmarked_bytes < MARK_EVERY_BYTES:
            connection.notify("broker.publish", params, output.attachments)
            return
        self._unmarked = self._unmarked_bytes = 0
        mark: asyncio.Future[Any] = self._loop.create_future()
        self._ahead.add(mark)
        mark.add_done_callback(self._marked)
        connection.ask("broker.publish", params, output.attachments, _PUBLISHING, mark)

    def _marked(self, mark: asyncio.Future[Any]) -> None:
        self._ahead.discard(mark)
        self._landed.set()
        if not mark.cancelled() and mark.exception() is not None:
            log.warning("messages of the kernel were not published: %s", mark.exception())

    def link_changed(self, up: bool, why: str) -> None:
        """What the kernel has said meanwhile goes out when there is a link again."""
        super().link_changed(up, why)
        self._landed.set()


_LIVES = {"shutdown_request": "shutdown_reply", "interrupt_request": "interrupt_reply"}


class _Reply(msgspec.Struct):
    status: str = "ok"
    ename: str = ""
    evalue: str = ""
    traceback: list[str] = []


_REPLY = msgspec.json.Decoder(_Reply)


async def _or_fault(doing: Any) -> None:
    try:
        await doing
    except KernelError as error:
        raise Fault(str(error), data={"type": "KernelError", "message": str(error)}) from None


def _message(
    channel: str, header: Mapping[str, Any], content: Any, parent_header: Any, metadata: Any, buffers: Any
) -> tuple[KernelMessage, Header]:  # fmt: skip
    """A message from its parts, each checked for its kind. Raises Fault."""
    for name, value in (
        ("header", header),
        ("content", content),
        ("parent_header", parent_header),
        ("metadata", metadata),
    ):
        if not (isinstance(value, Mapping) or (value is None and name != "header")):
            raise Fault(f"{name} is no object", code=BAD_PARAMS)
    for name in ("msg_id", "msg_type"):
        text = header.get(name)
        if not isinstance(text, str) or not 0 < len(text) <= 256:
            raise Fault(f"header.{name} is no text of 1 to 256 characters", code=BAD_PARAMS)
    if not isinstance(buffers, list | None) or not all(isinstance(each, bytes) for each in buffers or ()):
        raise Fault('buffers is no list of {"$buffer": n}', code=BAD_PARAMS)
    message = KernelMessage(
        channel, pack_json(header), pack_json(parent_header or {}), pack_json(metadata or {}), pack_json(content or {}),
        tuple(buffers or ()),
    )  # fmt: skip
    return message, Header(header["msg_id"], header["msg_type"])


def _cursor(code: str, position: int | None) -> int:
    return len(code) if position is None else position
