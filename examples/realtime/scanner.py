"""A scanner: a worker in a process of its own, here or on another machine, that takes an image whenever it is asked.

    BROKER_URL=http://127.0.0.1:8765/broker BROKER_TOKEN=… python -m examples.realtime.scanner

There is nobody in it but a computed phantom, a bright spot that breathes and drifts.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from array import array

from broker import Worker
from broker.worker import current

SIDE = 64
"""pixels, each way"""
PIXEL_MM = 3.0
GREATEST = 4095
SPOT_MM = 12.0
EXPOSURE_S = 0.02

worker = Worker("scanner", name="phantom")


@worker.method
def expose(number: int) -> bytes:
    """Take image `number`: a binary PGM of 64 x 64 pixels, 3 mm each, with 12 bits of grey."""
    current().wait_cancelled(EXPOSURE_S)
    return phantom(number, *spot_mm(time.time()))


def spot_mm(at_s: float) -> tuple[float, float]:
    """Where the spot is, right of and below the middle: 9 mm of breathing in 4 s, 5 mm of drift in 25 s."""
    return 5 * math.sin(math.tau * at_s / 25), 9 * math.sin(math.tau * at_s / 4)


def phantom(number: int, x_mm: float, y_mm: float) -> bytes:
    """The image of a spot with the noise that image `number` has."""
    columns, rows = (
        [math.exp(-((((at - (SIDE - 1) / 2) * PIXEL_MM - middle_mm) / SPOT_MM) ** 2)) for at in range(SIDE)]
        for middle_mm in (x_mm, y_mm)
    )
    noise = iter(random.Random(number).randbytes(SIDE * SIDE))
    grey = array("H", [int(3800 * row * column) + next(noise) for row in rows for column in columns])
    if sys.byteorder == "little":
        grey.byteswap()  # PGM: the most significant byte first
    return b"P5 %d %d %d\n" % (SIDE, SIDE, GREATEST) + grey.tobytes()


def end_with_input() -> None:
    """End in good order when standard input does: whoever started this has gone, however it went."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="A scanner for examples.realtime.")
    arguments.add_argument("--end-with-input", action="store_true", help="end when standard input does")
    if arguments.parse_args().end_with_input:
        threading.Thread(target=end_with_input, daemon=True).start()
    logging.basicConfig(level="INFO", format="scanner: %(message)s")
    worker.run()
