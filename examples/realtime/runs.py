"""Runs: a thread asks the scanner for one image after the other, measures each, and tells all pages.

`Laboratory` is what is served as `realtime`, to the page's buttons and to `broker call realtime/start` alike.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from broker import Broker, BrokerError, errors
from broker.worker import Fault, current
from examples.realtime.measure import centre
from examples.realtime.scanner import PIXEL_MM

log = logging.getLogger("realtime")

NAME = "realtime"
IMAGE_TIMEOUT_S = 5.0
"""how long an image may take"""
PATIENCE_S = 60.0
"""how long a run waits for a scanner to come back"""
MISSED_MAX = 5
"""images in a row that may fail at a scanner that is there"""
REPETITION_MIN_S, REPETITION_MAX_S = 0.1, 60.0
IMAGES_MAX = 10_000

Asks = Callable[[int], tuple[str, Any]]
"""method and params with which image `number` is asked for; the result is a PGM file's bytes"""


def ask_scanner(number: int) -> tuple[str, Any]:
    """Of `scanner.py`, wherever that runs."""
    return "scanner/expose", {"number": number}


def ask_daemon(path: str) -> Asks:
    """Of rt-cloud's scanner daemon; `path` is that of a file there, with `{number}` in it."""
    return lambda number: ("data/DataInterface.getFile", {"args": [path.format(number=number)], "kwargs": {}})


class Run:
    """One run, in a thread of its own. `stop` returns when it has ended."""

    def __init__(self, broker: Broker, asks: Asks, number: int, repetition_s: float, images: int) -> None:
        self.number = number
        self.repetition_s = repetition_s
        self.images = images
        self._broker = broker
        self._asks = asks
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._asked: Future[Any] | None = None
        self._is_waiting = False
        self._missed = 0
        self._has_ended = False
        self._thread = threading.Thread(target=self._work, name=f"run {number}")

    @property
    def is_under_way(self) -> bool:
        """Whether images still come; no more from the moment on that `ended` is told."""
        return not self._has_ended

    def start(self, by: str) -> None:
        """Begin, and say who wanted it."""
        self._tell("began", repetition_s=self.repetition_s, images=self.images, by=by)
        self._thread.start()

    def stop(self) -> None:
        """Ask for no more; what is under way at the scanner is cancelled."""
        with self._lock:
            self._ending.set()
            if self._asked is not None:
                self._asked.cancel()
        self._thread.join()

    def _tell(self, kind: str, **facts: Any) -> None:
        self._broker.broadcast(NAME, {"kind": kind, "run": self.number, **facts})

    def _work(self) -> None:
        why = "a defect of this program; its log says more"
        try:
            why = self._take_all()
        except Exception:
            log.exception("run %d failed", self.number)
        finally:
            self._has_ended = True
            self._tell("ended", text=why)

    def _take_all(self) -> str:
        """Take the images, each at its time; those whose time has passed are left out. Returns why it ended."""
        begun = time.monotonic()
        number, zero = 0, None
        while number < self.images:
            if self._ending.wait(max(0.0, begun + number * self.repetition_s - time.monotonic())):
                return "stopped"
            asked = time.monotonic()
            try:
                image = self._ask(number)
                at_s = time.monotonic() - begun  # later than planned, if it waited for a scanner
                found = centre(image)
            except CancelledError:
                return "stopped"
            except (BrokerError, ValueError) as error:
                if (why := self._miss(number, error)) is not None:
                    return why
            else:
                zero = zero or found
                x_mm, y_mm = ((now - then) * PIXEL_MM for now, then in zip(found, zero, strict=True))
                took_ms = round(1000 * (time.monotonic() - asked))
                self._is_waiting, self._missed = False, 0
                place = {"x_mm": round(x_mm, 3), "y_mm": round(y_mm, 3)}
                self._tell("point", image=number, at_s=round(at_s, 3), took_ms=took_ms, **place)
            number = max(number + 1, math.ceil((time.monotonic() - begun) / self.repetition_s))
        return "all images are taken"

    def _ask(self, number: int) -> bytes:
        """Ask for one image and wait; raises CancelledError if `stop` comes meanwhile, else as every call does."""
        method, params = self._asks(number)
        timeout_s = PATIENCE_S if self._is_waiting else IMAGE_TIMEOUT_S
        with self._lock:
            if self._ending.is_set():
                raise CancelledError
            self._asked = self._broker.submit(method, params, timeout=timeout_s, wait=self._is_waiting)
        image = self._asked.result()
        if not isinstance(image, bytes):
            raise ValueError(f"the scanner gave no bytes but {image!r:.40}")
        return image

    def _miss(self, number: int, error: Exception) -> str | None:
        """An image did not come: say so, and go on; or return why that makes no sense."""
        log.warning("image %d: %s", number, error)
        if self._is_waiting and isinstance(error, errors.DeadlineExceeded):
            return f"no scanner has come within {PATIENCE_S:g} s"
        if isinstance(error, errors.WorkerLost | errors.NoWorker | errors.NoEndpoint):
            self._is_waiting = True
            self._tell("missed", image=number, text="The scanner is away; the run goes on when it is back.")
            return None
        self._missed += 1
        self._tell("missed", image=number, text=f"Image {number} did not come: {error}")
        return f"{MISSED_MAX} images in a row did not come: {error}" if self._missed >= MISSED_MAX else None


class Laboratory:
    """Images of a scanner, measured in real time; one run at a time."""

    def __init__(self, broker: Broker, asks: Asks = ask_scanner) -> None:
        self.source = asks(0)[0].partition("/")[0]
        """the endpoint that is asked for images"""
        self._broker = broker
        self._asks = asks
        self._run: Run | None = None
        self._lock = threading.Lock()

    def start(self, repetition_s: float = 1.0, images: int = 300) -> dict[str, Any]:
        """Start a run of so many images, one every `repetition_s` seconds."""
        if isinstance(repetition_s, bool) or not isinstance(repetition_s, (int, float)):
            raise Fault(f"repetition_s is {repetition_s!r:.40}; give a number of seconds")
        if isinstance(images, bool) or not isinstance(images, int):
            raise Fault(f"images is {images!r:.40}; give a whole number")
        if not REPETITION_MIN_S <= repetition_s <= REPETITION_MAX_S:
            raise Fault(f"repetition_s is {repetition_s}; it goes from {REPETITION_MIN_S} to {REPETITION_MAX_S}")
        if not 1 <= images <= IMAGES_MAX:
            raise Fault(f"images is {images}; it goes from 1 to {IMAGES_MAX}")
        _, by = current().caller or ("", "this program")
        with self._lock:
            if self._run is not None and self._run.is_under_way:
                raise Fault(f"run {self._run.number} is under way; stop it first")
            number = 1 if self._run is None else self._run.number + 1
            self._run = Run(self._broker, self._asks, number, repetition_s, images)
            self._run.start(by)
        return self.state()

    def stop(self) -> dict[str, Any]:
        """Stop the run, if there is one; returns when it has ended."""
        with self._lock:
            if self._run is not None:
                self._run.stop()
        return self.state()

    def state(self) -> dict[str, Any]:
        """Whether a run is under way, and whether a scanner is there."""
        run = self._run
        running = run is not None and run.is_under_way
        return {"running": running, "run": run.number if run else 0, "scanner": bool(self._broker.peers(self.source))}
