"""Runs a broker as a process: event loop, signals, log, access file, systemd."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from broker._version import VERSION
from broker.auth.access_file import Access, AccessError, AccessFile, runtime_folder
from broker.auth.connection_files import ConnectionFile
from broker.auth.private_files import make_private_folder
from broker.auth.tokens import TokenStore, default_tokens_path, local_principal, new_secret
from broker.auth.users import UserStore, default_users_path
from broker.config.errors import ConfigError
from broker.config.model import Config
from broker.daemon.logs import Logs
from broker.daemon.memory import keep_freed_memory
from broker.daemon.systemd import Notifier
from broker.links.compiled import core
from broker.node.broker import Broker, ReloadError
from broker.wire.connection_file import ConnectionFileError

log = logging.getLogger("broker")


HURRY_S = 0.25
"""how long peers may take for their part of the close handshake after a second signal"""


class StartError(Exception):
    """Why the broker does not start, in one line that says what to do."""


def run(config: Config, reread: Callable[[], Config]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. `reread` loads the configuration anew, for SIGHUP.

    Raises StartError before anything is served.
    """
    logs = Logs(config.log.level, config.log.format)
    with logs, asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
        return runner.run(_Daemon(config, reread, logs).main())


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if config.server.uvloop == "off":
        return None
    try:
        import uvloop
    except ImportError:
        if config.server.uvloop == "on":
            raise StartError('uvloop is not installed; install it, or set server.uvloop = "auto"') from None
        return None
    return uvloop.new_event_loop


class _Daemon:
    """One run of the process."""

    def __init__(self, config: Config, reread: Callable[[], Config], logs: Logs) -> None:
        self._config = config
        self._reread = reread
        self._logs = logs
        self._notifier = Notifier()
        self._ending = asyncio.Event()
        self._ending_now = asyncio.Event()

    async def main(self) -> int:
        secret = new_secret()
        self._logs.hide(secret)
        if self._config.auth.admin_token:
            self._logs.hide(self._config.auth.admin_token)
        tokens = TokenStore(Path(self._config.auth.tokens_file or default_tokens_path()))
        users = UserStore(Path(self._config.auth.users_file or default_users_path()))
        broker = Broker(self._config, tokens=tokens, users=users, fixed={secret: local_principal()})
        await broker.start()
        try:
            url = await self._listen(broker)
            self._take_signals(broker)  # before the files, by which others see that it is there
            access = self._write_access(broker, url, secret)
            connection_file = self._write_connection_file(broker)
            try:
                return await self._serve(broker, url)
            finally:
                if access is not None:
                    access.remove()
                if connection_file is not None:
                    connection_file.remove()
        finally:
            await self._stop(broker)

    async def _stop(self, broker: Broker) -> None:
        """Stop in good order; after a second signal without waiting for peers that do not answer."""
        stopping = asyncio.create_task(broker.stop())
        hurried = asyncio.create_task(self._ending_now.wait())
        await asyncio.wait((stopping, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not stopping.done():
            await asyncio.wait((stopping,), timeout=HURRY_S)
            broker.abort()
        await stopping

    async def _listen(self, broker: Broker) -> str:
        server = self._config.server
        try:
            return await broker.listen()
        except OSError as error:
            where = f"{server.host}:{server.port}"
            raise StartError(
                f"cannot listen on {where}: {error.strerror or error}; is another broker running there? "
                "--port chooses another port"
            ) from None

    def _write_access(self, broker: Broker, url: str, secret: str) -> AccessFile | None:
        """So that commands of this user on this machine need no arguments. The broker serves without it too."""
        try:
            access = Access(url=url, token=secret, pid=os.getpid(), started=time.time())
            return AccessFile.write(broker.port, access)
        except AccessError as error:
            log.warning("commands on this machine will need --url and --token: %s", error)
            return None

    def _write_connection_file(self, broker: Broker) -> ConnectionFile | None:
        """Where the ZeroMQ door is, and its key. Raises StartError: without the file nobody could use the door."""
        if broker.zeromq is None:
            return None
        info = broker.zeromq.info
        self._logs.hide(info.key)
        configured = self._config.zeromq.connection_file
        path = Path(configured) if configured else runtime_folder() / f"zeromq-{broker.port}.json"
        try:
            if not configured:
                make_private_folder(path.parent)
            file = ConnectionFile.write(path, info)
        except (OSError, ConnectionFileError) as error:
            raise StartError(f"cannot write the connection file: {error}; set zeromq.connection_file") from None
        log.info("ZeroMQ on %s; connection file %s", info.url("shell"), path)
        return file

    async def _serve(self, broker: Broker, url: str) -> int:
        # What has been made until now stays: the collector need not walk over it again and again.
        gc.collect()
        gc.freeze()
        keep_freed_memory()
        log.info("broker %s (%s) serves on %s", VERSION, core(), url)
        self._notifier.ready(f"serving on {url}")
        watchdog = asyncio.create_task(self._watch()) if self._notifier.watchdog_s else None
        await self._ending.wait()
        self._notifier.stopping("draining")
        drain_s = self._config.server.drain_s
        log.info("draining: %d requests in flight, at most %g s", broker.router.pending.count, drain_s)
        drained = asyncio.create_task(broker.drain(drain_s))
        hurried = asyncio.create_task(self._ending_now.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, hurried, watchdog):
            if task is not None:
                task.cancel()
        log.info("stopping with %d requests in flight", broker.router.pending.count)
        return 0

    async def _watch(self) -> None:
        """Tell systemd that the loop turns."""
        assert self._notifier.watchdog_s is not None
        while True:
            self._notifier.watchdog()
            await asyncio.sleep(self._notifier.watchdog_s / 2)

    def _take_signals(self, broker: Broker) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._reload, broker)

    def _end(self) -> None:
        """The first time drain, the second time end."""
        if self._ending.is_set():
            self._ending_now.set()
        self._ending.set()

    def _reload(self, broker: Broker) -> None:
        """All or nothing: what is wrong is said, and everything stays as it was."""
        self._notifier.reloading()
        try:
            config = self._reread()
            broker.reload(config)
        except (ConfigError, ReloadError, ValueError) as error:
            log.error("reload refused, everything stays as it was: %s", error)
        else:
            self._config = config
            self._logs.set_level(config.log.level)
            log.info("reloaded the configuration")
        self._notifier.ready()
