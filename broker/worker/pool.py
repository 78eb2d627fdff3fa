"""Threads for functions that block. They are daemons: one that never returns does not keep the process alive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class Pool:
    """At most `threads_max` threads, started when there is work and none is idle. Jobs must not raise."""

    __slots__ = ("_idle", "_jobs", "_name", "_threads", "_threads_max")

    def __init__(self, threads_max: int, name: str) -> None:
        self._threads_max = threads_max
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)

    def put(self, job: Job) -> None:
        """Run a job in a thread, when one is free. Called on one thread only."""
        self._jobs.put(job)
        if self._idle.acquire(blocking=False) or len(self._threads) >= self._threads_max:
            return
        thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """Let the threads end when they have done what was put; does not wait for them."""
        for _ in self._threads:
            self._jobs.put(None)

    @property
    def is_alive(self) -> bool:
        """Whether a thread runs still."""
        return any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it held is not to live until the next one comes
            self._idle.release()
