"""Runs a worker as what a process is for: an event loop of its own, and signals that end it."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from broker.peer.errors import BrokerError
from broker.worker.answering import ENDS_S

if TYPE_CHECKING:
    from broker.worker.worker import Worker

log = logging.getLogger("broker.worker")


def run_until_signalled(worker: Worker) -> None:
    """Serve until SIGTERM or SIGINT, which drain; a second one ends at once. Raises what ended it otherwise."""
    loop = new_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_run(worker))
    finally:
        asyncio.set_event_loop(None)
        _end(loop)


async def _run(worker: Worker) -> None:
    ending = asyncio.Event()
    ending_now = asyncio.Event()

    def end() -> None:
        if ending.is_set():
            ending_now.set()
        else:
            log.info("draining: %d requests under way, at most %g s", worker.executing, worker.drain)
        ending.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    serving = loop.create_task(_serve_until_ended(worker))
    told = loop.create_task(ending.wait())
    hurried = loop.create_task(ending_now.wait())
    try:
        await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        elif not worker.peer:
            serving.cancel()
        else:
            stopping = loop.create_task(worker.stop())
            await asyncio.wait((stopping, hurried), return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                stopping.cancel()
                await worker.stop(now=True)
    finally:
        for task in (serving, told, hurried):
            task.cancel()
        await asyncio.wait((serving, told, hurried))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _serve_until_ended(worker: Worker) -> None:
    await worker.start()
    try:
        await worker.wait()
    except BrokerError:
        await worker.stop(now=True)
        raise


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop for what carries many messages: uvloop's, where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Leave nothing of the loop. Not `asyncio.Runner`: it waits for ever for a task that swallows its cancelling."""
    try:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=ENDS_S))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
