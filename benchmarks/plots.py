"""The plots of the performance page, drawn from `figures.json`: `python -m benchmarks.plots [FOLDER]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.curves import CURVES
from benchmarks.processes import ROOT

NAMES = {
    "ours": "this broker", "pure": "without its C", "nats": "nats-server", "crossbar": "Crossbar", "floor": "floor",
}  # fmt: skip
COLOURS = {"ours": "#0b6e4f", "pure": "#7fb69b", "nats": "#3b6fb6", "crossbar": "#b6533b", "floor": "#999999"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "broker",  # the same figures give the same file
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "savefig.facecolor": "white",
}
PARTS_MIB = 100
BARS = ("1x1", "16x1", "16x16", "128x1", "128x16", "16KiB", "fan-out")


def draw(known: dict[str, Any], folder: Path, kind: str = "svg") -> list[Path]:
    """Draw all for which there are figures; return the files."""
    parts = {name: part["figures"] for name, part in known["parts"].items()}
    drawn: list[Path] = []
    with plt.rc_context(STYLE):
        for name, found in parts.get("curves", {}).items():
            with _plot(folder / f"{name}.{kind}", drawn) as axes:
                _curve(axes, name, found)
                if name == "bytes" and "bulk" in parts:
                    _in_parts(axes, parts["bulk"][0]["parts"])
        if "loads" in parts:
            with _plot(folder / f"loads.{kind}", drawn, width=8.0) as axes:
                _bars(axes, parts["loads"][0])
        if "table" in parts:
            with _plot(folder / f"pending.{kind}", drawn) as axes:
                _pending(axes, parts["table"])
    return drawn


@contextmanager
def _plot(file: Path, drawn: list[Path], width: float = 6.0) -> Iterator[Axes]:
    figure, axes = plt.subplots(figsize=(width, 3.4), layout="constrained")
    yield axes
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=100)
    plt.close(figure)
    drawn.append(file)


def _curve(axes: Axes, name: str, found: dict[str, list[dict[str, float]]]) -> None:
    curve = CURVES[name]
    largest = 0.0
    for system, points in found.items():
        if not points:
            continue
        at, us = [point["at"] for point in points], [point["cpu_us"] for point in points]
        axes.plot(at, us, marker="o", markersize=4, color=COLOURS[system], label=NAMES[system])
        largest = max(largest, *us)
    if curve.linear:
        axes.set_xscale("symlog", linthresh=100)
        _plain_log(axes)
    else:
        axes.set_xscale("log")
        axes.set_ylim(0, largest * 1.1)
    ticks = [point for point in curve.points if not curve.linear or point in (0, 128, 1024, 16_384, 262_144, 4 << 20)]
    axes.set_xticks(ticks, [_short(point, of_bytes=curve.axis == "bytes") for point in ticks])
    axes.minorticks_off()
    axes.set_xlabel(curve.axis)
    axes.set_ylabel(curve.unit)
    axes.set_title(curve.title, loc="left", fontsize=11)
    axes.legend()


def _in_parts(axes: Axes, found: dict[str, float]) -> None:
    """A stream beside the messages: what it would cost there and back."""
    us = found["ours_ms_per_mib"] * 1000 * 2 * PARTS_MIB
    axes.plot([PARTS_MIB << 20], [us], "D", markersize=5, color="#c08a00", label="in parts, there and back")
    axes.set_xticks([*axes.get_xticks(), PARTS_MIB << 20], [*(t.get_text() for t in axes.get_xticklabels()), "100 MiB"])
    axes.legend()


def _short(number: int, *, of_bytes: bool) -> str:
    units = ((1 << 20, " MiB"), (1 << 10, " KiB"), (0, " B")) if of_bytes else ((10**6, " M"), (1000, " k"), (0, ""))
    size, unit = next((size, unit) for size, unit in units if number >= size)
    return f"{number // max(1, size)}{unit}"


def _plain_log(axes: Axes) -> None:
    """A logarithmic scale whose ticks are numbers, not powers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _bars(axes: Axes, found: dict[str, dict[str, dict[str, float]]]) -> None:
    loads = [load for load in BARS if load in found]
    systems = [name for name in NAMES if any(name in found[load] for load in loads)]
    wide = 0.8 / len(systems)
    for number, system in enumerate(systems):
        at = [place + (number - (len(systems) - 1) / 2) * wide for place in range(len(loads))]
        us = [found[load].get(system, {}).get("cpu_us", 0) for load in loads]
        bars = axes.bar(at, us, wide * 0.92, color=COLOURS[system], label=NAMES[system])
        axes.bar_label(bars, [f"{each:.3g}" if each else "" for each in us], fontsize=6, padding=1)
    _plain_log(axes)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(loads)), [load.replace("x", "×").replace("KiB", " KiB") for load in loads])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("CPU µs per request")
    axes.set_title("Callers × in flight of each; fan-out per delivery", loc="left", fontsize=11)
    axes.legend(ncols=len(systems), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _pending(axes: Axes, rows: list[dict[str, float]]) -> None:
    columns = {
        "table match fresh": "#0b6e4f", "table match any": "#7fb69b", "router match fresh": "#3b6fb6",
        "router match any": "#9db8dd",
    }  # fmt: skip
    for column, colour in columns.items():
        points = [(row["pending"], row[column]) for row in rows if column in row]
        axes.plot(
            [at for at, _ in points], [us for _, us in points], marker="o", markersize=4, color=colour, label=column
        )
    ticks = [int(row["pending"]) for row in rows]
    axes.set_xscale("symlog", linthresh=1000)
    axes.set_xticks(ticks, [_short(tick, of_bytes=False) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pending requests")
    axes.set_ylabel("CPU µs per request")
    axes.set_title("Open and match, with so many pending", loc="left", fontsize=11)
    axes.legend()


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "performance"
    for file in draw(json.loads((folder / "figures.json").read_text()), folder):
        print(file)


if __name__ == "__main__":
    main()
