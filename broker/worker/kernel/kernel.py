"""One kernel: asked over its sockets, heard, interrupted, restarted, and told of when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import zmq

from broker.links.kernel_channel import Header, Received
from broker.links.session import now
from broker.wire.kernel import KernelMessage
from broker.wire.session import pack_json
from broker.worker.faults import BAD_PARAMS, Fault
from broker.worker.kernel.asking import Asking
from broker.worker.kernel.process import KernelError, Process
from broker.worker.kernel.sockets import BACK, Sockets

log = logging.getLogger("broker.worker")

ANSWERS_S = 60.0
"""how long a kernel that was started may take until it answers"""
CHANNELS = 4
ATTACHED_ANSWERS_S = 10.0
"""how long one that is attached to may take"""
ASK_AGAIN_S = 0.5
"""how long until a kernel that is silent is asked again whether it is there"""
SUBSCRIBED_S = 0.1
GAP_S = 0.3
"""how long after IOPub's connection broke it is looked whether the kernel lives"""
LOOK_S = 2.0
"""how often it is looked whether the process runs, beside the connection, which usually tells at once"""
ANOTHER_ANSWERS_S = 2.0
AWAY_S = 2.0
"""how long the connection to a kernel that is attached to may be away until it counts as dead"""
RESTARTS_MAX = 5
"""deaths in a row after which a kernel is not started again; jupyter_client's restarter has the same bound"""
STABLE_S = 10.0
"""a kernel that lived so long has not died in a row"""
OWN_REMEMBERED = 256
"""the worker's own requests whose messages on IOPub are nobody's matter, the last of them"""
ASKED_MAX = 2000
"""requests that wait at the kernel, those that were cancelled since included; the next is refused"""
ASKED_MAX_BYTES = 256 << 20
"""what those hold together; one alone is always taken"""
OWN_REPLY_S = 10.0
"""how long an answer to the worker's own requests is waited for: interrupt, shutdown"""


class Kernel:
    """A kernel and the requests it has. Belongs to the running event loop.

    `heard(received, number)` gets every message on IOPub, in order, those made here included: that it restarts, or is
    dead. `changed()` is called when `kernel_info` is another's.
    """

    def __init__(
        self, process: Process, heard: Callable[[Received, int], None], changed: Callable[[], None] = lambda: None
    ) -> None:
        self.process = process
        self.state = "starting"
        """`starting`, `idle`, `busy`, `restarting`, `dead`, or what else the kernel says of itself"""
        self.kernel_info: dict[str, Any] = {}
        self.last_activity = _date()
        self.is_dead = False
        self.died = 0
        """how often it died"""
        self._heard = heard
        self._changed = changed
        self._asking: dict[str, Asking] = {}
        self._begun: str | None = None
        self._number = 0
        self._sockets: Sockets | None = None
        self._session_id = ""
        self._ready = asyncio.Event()
        self._settled = asyncio.Event()  # it is ready, or dead
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone = asyncio.Event()
        self._connected: set[str] = set()
        self._restarting = asyncio.Lock()
        self._own: dict[str, asyncio.Future[Received]] = {}
        self._own_ids: deque[str] = deque(maxlen=OWN_REMEMBERED)
        self._iopub_seen = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._began = 0.0
        self._was_away = False
        self._gap = False
        self._deaths = 0

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Start it, or attach to it, and wait until it answers. Raises KernelError."""
        try:
            await self._open()
        except BaseException:
            await self.end(now=True)
            raise
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def end(self, *, now: bool = False) -> None:
        """End it if it was started here, else leave it alone; what waits for it fails."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))
            self._watching = None
        for task in self._tasks:
            task.cancel()
        self._unsettle()
        self._fail_all("KernelGone", "the kernel has ended")
        self._close()
        self.state = "dead"
        self.is_dead = True
        self._settled.set()
        await self.process.end(now=now)

    async def restart(self) -> None:
        """Another process in its place; what it had ends. Raises KernelError."""
        async with self._restarting:
            if not self.process.can_restart:
                await self.process.restart(now=True)  # says why not
            self._deaths = 0
            await self._begin_again("KernelRestarted", "the kernel was restarted")

    async def shutdown(self) -> None:
        """End it, one that was attached to as well, and tell so. Raises KernelError."""
        async with self._restarting:
            if not self.process.can_restart and not self.is_dead:
                await self._ask_own("control", "shutdown_request", {"restart": False})
            self._tell("dead")
            await self.end()

    async def interrupt(self) -> None:
        """Interrupt what it is doing. Raises KernelError."""
        if self.is_dead:
            raise KernelError("the kernel is dead; `restart` starts it again")
        if not await self.process.interrupt():
            await self._ask_own("control", "interrupt_request", {})

    async def _open(self) -> None:
        info = await self.process.start()
        await self._connect(info, ANSWERS_S if self.process.can_restart else ATTACHED_ANSWERS_S)

    async def _connect(self, info: Any, patience_s: float) -> None:
        """Open the sockets and wait until the kernel answers. Raises KernelError."""
        self._close()
        self._gone.clear()
        self._iopub_seen.clear()
        self._connected.clear()
        try:
            self._sockets = Sockets(info, self._received, self._watched)
        except (zmq.ZMQError, ValueError) as error:
            raise KernelError(f"the sockets of {info!r} cannot be opened: {error}") from None
        await self._nudge(patience_s)
        self._began = time.monotonic()
        self._settle()

    async def _nudge(self, patience_s: float) -> None:
        """Wait until the kernel answers, is heard on IOPub, and reaches this end on all channels.

        A SUB socket that is not subscribed yet loses the first `status: idle`, and who waits for that waits for ever;
        so does who has to be asked for input over a connection that is not there yet.
        """
        assert self._sockets is not None
        until = time.monotonic() + patience_s
        info: dict[str, Any] | None = None
        while info is None or not self._iopub_seen.is_set() or len(self._connected) < CHANNELS:
            if time.monotonic() > until:
                raise KernelError(self._why_silent(patience_s, heard=info is not None))
            if await self.process.is_alive() is False:
                raise KernelError("the kernel ended before it answered; what it wrote to standard error says why")
            try:
                reply = await self._ask_own("shell", "kernel_info_request", {}, ASK_AGAIN_S)
                info = msgspec.json.decode(reply.message.content)
                self._session_id = reply.header.session
            except KernelError:
                continue
            try:
                async with asyncio.timeout(ASK_AGAIN_S):
                    await self._iopub_seen.wait()
            except TimeoutError:
                continue
        if info.get("status") in ("ok", None) and info != self.kernel_info:
            self.kernel_info = info
            self._changed()

    def _why_silent(self, patience_s: float, *, heard: bool) -> str:
        sockets = self._sockets
        assert sockets is not None
        where = f"{sockets.info.transport}://{sockets.info.ip}"
        if "shell" not in self._connected:
            return (
                f"no kernel listens at {sockets.info.url('shell')}: it has ended, or its connection file is another's"
            )
        if sockets.refused:
            return f"the kernel at {where} signs with another key: this connection file is not its own"
        if heard:
            missing = sorted({"iopub", "stdin", "control"} - self._connected) or ["iopub"]
            return f"the kernel at {where} answers, but its {missing[0]}_port in the connection file does not"
        return f"the kernel at {where} does not answer within {patience_s:g} s: it is busy, or has another key"

    def _settle(self) -> None:
        self.is_dead = False
        self._ready.set()
        self._settled.set()

    def _unsettle(self) -> None:
        self._ready.clear()
        self._settled.clear()

    def _close(self) -> None:
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None

    def _watched(self, channel: str, event: int) -> None:
        if event == BACK:
            self._connected.add(channel)
            if channel == "iopub" and self._gap:  # a little later: the kernel has to hear of the subscription
                self._gap = False
                asyncio.get_running_loop().call_later(SUBSCRIBED_S, self._tell_gap)
            return
        self._connected.discard(channel)
        if channel == "shell":
            self._gone.set()
        elif channel == "iopub" and self._ready.is_set():
            asyncio.get_running_loop().call_later(GAP_S, self._look_at_gap)

    def _look_at_gap(self) -> None:
        """IOPub's connection broke: if the kernel lives, see that it is there again, then tell."""
        if not self._ready.is_set() or self._sockets is None:
            return
        if "iopub" in self._connected:
            self._tell_gap()
        else:
            self._gap = True
            self._sockets.reopen("iopub")

    def _tell_gap(self) -> None:
        """IOPub's connection broke and that of the shell did not: what the kernel said meanwhile is lost."""
        if not self._ready.is_set():
            return
        text = "\n[output is missing: the connection to the kernel's IOPub broke; was a message above 256 MiB?]\n"
        asking = self._asking.get(self._begun or "")
        told = self._say("stream", {"name": "stderr", "text": text}, asking)
        if asking is not None:
            asking.show(told, self._number)
        for each in self._asking.values():
            each.lost_iopub()

    async def _watch(self) -> None:
        """Notice the kernel's end, and start it again if it was started here."""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._gone.wait()
            except TimeoutError:
                pass
            if self.is_dead and self.process.can_restart:
                self._gone.clear()
                await asyncio.sleep(LOOK_S)
                continue
            async with self._restarting:
                if not self.is_dead and await self._has_died():
                    await self._died()
                elif self.process.can_restart and not self.is_dead and "shell" not in self._connected:
                    await self._connect_again()
                elif not self.process.can_restart and self._was_away and await self._is_another():
                    await self._was_restarted()
                elif not self.process.can_restart and self.is_dead:
                    await self._come_back()

    async def _has_died(self) -> bool:
        """Whether it is. The process of one started here may take a moment to be gone after its sockets."""
        ends_at = time.monotonic() + AWAY_S
        while self._gone.is_set() and time.monotonic() < ends_at:
            alive = await self.process.is_alive()
            if alive is False:
                return True
            if "shell" in self._connected:
                self._was_away = True
                break  # only the connection was lost; it is there again
            await asyncio.sleep(0.02)
        lost = self._gone.is_set() and "shell" not in self._connected
        self._gone.clear()
        alive = await self.process.is_alive()
        return lost if alive is None else not alive

    async def _connect_again(self) -> None:
        """The process lives, but its connection broke and is not there again."""
        assert self._sockets is not None
        self._unsettle()
        self._fail_all("KernelUnreachable", "the connection to the kernel broke; was its reply above 256 MiB?")
        try:
            await self._connect(self._sockets.info, ANSWERS_S)
        except KernelError as error:
            log.warning("%s", error)
            self._tell("dead")

    async def _is_another(self) -> bool:
        """Whether what is there again is another process, as its session says. Control answers beside running cells."""
        try:
            reply = await self._ask_own("control", "kernel_info_request", {}, ANOTHER_ANSWERS_S)
        except KernelError:
            return False  # it is asked again
        self._was_away = False
        return reply.header.session != self._session_id

    async def _was_restarted(self) -> None:
        """Whoever has started it has put another in its place."""
        log.warning("the kernel was started again by others")
        self.died += 1
        self._unsettle()
        self._fail_all("KernelDied", "the kernel died while it had this request")
        self._tell("restarting")
        try:
            await self._nudge(ATTACHED_ANSWERS_S)
        except KernelError as error:
            log.warning("%s", error)
            self._tell("dead")
        else:
            self._settle()

    async def _died(self) -> None:
        """It is dead: whoever waits is told, and it is started again if that makes sense."""
        self.died += 1
        if time.monotonic() - self._began > STABLE_S:
            self._deaths = 0
        self._deaths += 1
        why = "the kernel died while it had this request"
        if not self.process.can_restart or self._deaths > RESTARTS_MAX:
            log.warning("the kernel died%s", "" if self._deaths == 1 else f", {self._deaths} times in a row")
            self._unsettle()
            self._fail_all("KernelDied", why)
            self._tell("dead")
            return
        log.warning("the kernel died; starting it again")
        try:
            await self._begin_again("KernelDied", why)
        except KernelError as error:
            log.warning("%s", error)

    async def _begin_again(self, kind: str, why: str) -> None:
        """Another process. If there is none it is dead, and told to be. Raises KernelError."""
        self._unsettle()
        self._fail_all(kind, why)
        self._tell("restarting")
        try:
            info = await self.process.restart(now=True)
            await self._connect(info, ANSWERS_S)
        except KernelError:
            self._close()
            self._tell("dead")
            raise

    async def _come_back(self) -> None:
        """One that is attached to may have been started again by whoever did it the first time."""
        if self._sockets is None or "shell" not in self._connected:
            return
        try:
            await self._nudge(ASK_AGAIN_S)
        except KernelError:
            return
        self._settle()
        log.info("the kernel is back")

    # ------------------------------------------------------------ asking

    async def ask(self, asking: Asking) -> None:
        """Send a request; `asking` is told what becomes of it. Raises Fault if it cannot be sent."""
        sockets = await self._until_ready()
        if asking.msg_id in self._asking:
            text = f"msg_id {asking.msg_id[:80]!r} is in flight already; each message has an id of its own"
            raise Fault(text, code=BAD_PARAMS)
        size = asking.size + sum(each.size for each in self._asking.values())
        if self._asking and (len(self._asking) >= ASKED_MAX or size > ASKED_MAX_BYTES):
            # Those that were cancelled are among them: to the broker they have ended, in the kernel's queue they wait.
            text = f"{len(self._asking)} requests wait at the kernel, as many or as large as may; come again later"
            raise Fault(text, data={"type": "KernelBusy", "message": text}, retryable=True)
        assert asking.message is not None
        _send(sockets, asking.message)
        asking.message = None
        self._asking[asking.msg_id] = asking

    async def tell(self, message: KernelMessage) -> None:
        """Send a message that has no reply. Raises Fault if it cannot be sent."""
        _send(await self._until_ready(), message)

    async def _until_ready(self) -> Sockets:
        """Wait while it starts again. Raises Fault if it is dead."""
        while not self._ready.is_set():
            if self.is_dead:
                raise _fault("KernelDied", "the kernel is dead; `restart` starts it again")
            await self._settled.wait()
        assert self._sockets is not None
        return self._sockets

    def header(self, msg_type: str) -> dict[str, Any]:
        """The header of a new message of the worker's own."""
        if self._sockets is None:
            raise _fault("KernelDied", "the kernel is dead; `restart` starts it again")
        return self._sockets.session.header(msg_type, now())

    def done(self, asking: Asking) -> None:
        """Nothing more is wanted of a request that has ended."""
        if self._asking.get(asking.msg_id) is asking:
            del self._asking[asking.msg_id]

    async def cancel(self, asking: Asking) -> None:
        """Nobody waits for it any more: it is interrupted, now or as soon as the kernel begins it."""
        if asking.has_ended or asking.has_run or asking.channel != "shell":
            self.done(asking)
            return
        asking.is_cancelled = True
        if self._begun == asking.msg_id:
            await self._interrupt_cancelled(asking)

    async def _interrupt_cancelled(self, asking: Asking) -> None:
        if asking.msg_type != "execute_request":
            return
        log.info("interrupting the kernel: nobody waits for %s any more", asking.msg_id)
        try:
            await self.interrupt()
        except KernelError as error:
            log.warning("%s", error)

    @property
    def waiting(self) -> int:
        """Requests it has and has not answered."""
        return len(self._asking)

    async def _ask_own(
        self, channel: str, msg_type: str, content: dict[str, Any], patience_s: float = OWN_REPLY_S
    ) -> Received:
        """The reply to a request of the worker's own. Raises KernelError if none comes."""
        sockets = self._sockets
        if sockets is None:
            raise KernelError("the kernel is dead")
        header = sockets.session.header(msg_type, now())
        message = KernelMessage(channel, pack_json(header), b"{}", b"{}", pack_json(content))
        msg_id = header["msg_id"]
        self._own_ids.append(msg_id)
        future: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        self._own[msg_id] = future
        try:
            sockets.send(message)
            async with asyncio.timeout(patience_s):
                return await future
        except TimeoutError:
            raise KernelError(f"the kernel does not answer a {msg_type} within {patience_s:g} s") from None
        except zmq.Again:
            raise KernelError("the kernel takes no more messages now") from None
        finally:
            del self._own[msg_id]

    # ------------------------------------------------------------ hearing

    def _received(self, received: Received) -> None:
        channel = received.message.channel
        parent = received.parent.msg_id
        if channel == "iopub":
            self._heard_iopub(received, parent)
        elif channel == "stdin":
            asking = self._asking.get(parent)
            if asking is not None:
                asking.ask_input(received)
        elif parent in self._own:
            if not self._own[parent].done():
                self._own[parent].set_result(received)
        else:
            asking = self._asking.get(parent)
            if asking is not None:
                asking.reply(received)
                if asking.is_cancelled:
                    self.done(asking)

    def _heard_iopub(self, received: Received, parent: str) -> None:
        kind = received.header.msg_type
        self._iopub_seen.set()
        self.last_activity = _date()
        self._number += 1
        asking = self._asking.get(parent)
        state = ""
        if kind == "status":
            state = msgspec.json.decode(received.message.content, type=_Status).execution_state
            self.state = state or self.state
            if state == "idle" and self._begun == parent:
                self._begun = None
        if asking is not None:
            asking.show(received, self._number)
            if state == "busy" and asking.channel == "shell":
                self._begun = parent
                if asking.is_cancelled:
                    task = asyncio.get_running_loop().create_task(self._interrupt_cancelled(asking))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            elif state == "idle":
                asking.idle()
                if asking.is_cancelled:
                    self.done(asking)
        if parent not in self._own_ids:
            self._heard(received, self._number)

    def _tell(self, state: str) -> None:
        """Tell a state of the kernel that it cannot tell itself."""
        self.state = state
        self._begun = None
        self.is_dead = state == "dead"
        if self.is_dead:
            self._settled.set()
        self._say("status", {"execution_state": state})

    def _say(self, msg_type: str, content: dict[str, Any], asking: Asking | None = None) -> Received:
        self._number += 1
        header = {
            "msg_id": f"{self._session_id}_broker_{self._number}", "msg_type": msg_type, "username": "broker",
            "session": self._session_id, "date": now(), "version": "5.4",
        }  # fmt: skip
        parent = b"{}" if asking is None else asking.header
        message = KernelMessage("iopub", pack_json(header), parent, b"{}", pack_json(content))
        told = Received(message, Header(header["msg_id"], msg_type, self._session_id), Header())
        self._heard(told, self._number)
        return told

    def _fail_all(self, kind: str, why: str) -> None:
        asking, self._asking = self._asking, {}
        for each in asking.values():
            each.fail(_fault(kind, why))
        for future in self._own.values():
            if not future.done():
                future.set_exception(KernelError(why))


class _Status(msgspec.Struct):
    execution_state: str = ""


def _send(sockets: Sockets, message: KernelMessage) -> None:
    try:
        sockets.send(message)
    except zmq.Again:
        raise _fault("KernelBusy", "the kernel takes no more messages now") from None


def _fault(kind: str, text: str) -> Fault:
    return Fault(text, data={"type": kind, "message": text})


def _date() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
