"""Tells waiting coroutines that something changed below a folder; those who wait for one folder share one watcher."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("broker.worker")

WATCHERS_MAX = 16
"""folders watched at a time; each costs a thread and an inotify instance, of which Linux gives a user 128"""
STEP_MS = 50
"""changes within so many milliseconds are told once; also how soon a watcher ends"""


class Changes:
    """Watchers of folders, each alive as long as somebody waits for it. Usable on several event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers: dict[tuple[Path, bool], _Watcher] = {}

    @property
    def watchers(self) -> int:
        """How many there are now."""
        return len(self._watchers)

    @contextmanager
    def listen(self, folder: Path, recursive: bool) -> Iterator[asyncio.Event]:
        """An event that is set at every change. It is a help, no promise: network file systems tell of nothing, and
        beyond 16 folders nothing is watched, so whoever waits looks by himself now and then.
        """
        event = asyncio.Event()
        key = folder, recursive
        with self._lock:
            watcher = self._watchers.get(key)
            if watcher is None and len(self._watchers) < WATCHERS_MAX:
                watcher = self._watchers[key] = _Watcher(folder, recursive, self._lock)
            if watcher is not None:
                watcher.waiting[event] = asyncio.get_running_loop()
        try:
            yield event
        finally:
            with self._lock:
                if watcher is not None:
                    del watcher.waiting[event]
                    if not watcher.waiting:
                        del self._watchers[key]
                        watcher.stop.set()


class _Watcher:
    """A thread that waits for changes below one folder."""

    __slots__ = ("_folder", "_lock", "_recursive", "stop", "waiting")

    def __init__(self, folder: Path, recursive: bool, lock: threading.Lock) -> None:
        self._folder = folder
        self._recursive = recursive
        self._lock = lock
        self.waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self.stop = threading.Event()
        threading.Thread(target=self._watch, name="folder-changes", daemon=True).start()

    def _watch(self) -> None:
        from watchfiles import watch

        try:
            changes = watch(
                self._folder, recursive=self._recursive, watch_filter=None, step=STEP_MS, debounce=4 * STEP_MS,
                stop_event=self.stop, raise_interrupt=False, ignore_permission_denied=True,
            )  # fmt: skip
            for _ in changes:
                self._tell()
        except Exception as error:  # the library's own errors have no common base: no instances left, the folder gone
            log.debug("changes below %s are only noticed by looking: %s", self._folder, error)

    def _tell(self) -> None:
        with self._lock:
            for event, loop in self.waiting.items():
                try:
                    loop.call_soon_threadsafe(event.set)
                except RuntimeError:
                    pass  # that loop is closed
