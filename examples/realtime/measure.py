"""What is computed of an image: where its bright part is."""

from __future__ import annotations

import re
import sys
from array import array

HEADER = re.compile(rb"P5\s+(\d+)\s+(\d+)\s+(\d+)\s")


def read_pgm(image: bytes) -> tuple[int, int, array[int]]:
    """Width, height and grey values of a binary PGM (netpbm's pgm(5), without comments). Raises ValueError."""
    header = HEADER.match(image)
    if header is None:
        raise ValueError(f"{image[:16]!r}… is no binary PGM")
    width, height, greatest = map(int, header.groups())
    grey = array("B" if greatest < 256 else "H")
    expected = width * height * grey.itemsize
    if len(image) - header.end() != expected:
        raise ValueError(f"{len(image) - header.end()} bytes of grey; {width} x {height} pixels have {expected}")
    grey.frombytes(image[header.end() :])
    if grey.itemsize > 1 and sys.byteorder == "little":
        grey.byteswap()
    return width, height, grey


def centre(image: bytes) -> tuple[float, float]:
    """The centre of what is brighter than half of the brightest, weighted by how much; in pixels from the top left.

    Raises ValueError for what is no PGM, and where nothing stands out.
    """
    width, _, grey = read_pgm(image)
    least = max(grey, default=0) / 2
    sum_x = sum_y = sum_all = 0.0
    for at, value in enumerate(grey):
        if value > least:
            weight = value - least
            sum_all += weight
            sum_x += weight * (at % width)
            sum_y += weight * (at // width)
    if not sum_all:
        raise ValueError("the image is black")
    return sum_x / sum_all, sum_y / sum_all
