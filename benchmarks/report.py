"""The tables of the performance page, made of `figures.json`: `python -m benchmarks.report [DOCS]`.

In the page a table stands between `<!-- figures: NAME -->` and `<!-- /figures -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.curves import CURVES
from benchmarks.processes import ROOT
from benchmarks.zeromq import GOAL_RATIO, MIXED, WAYS

Known = dict[str, Any]
LOADS = {
    "1x1": "1×1",
    "16x1": "16×1",
    "16x16": "16×16",
    "128x1": "128×1",
    "128x16": "128×16",
    "16KiB": "16×16 with 16 KiB",
    "fan-out": "broadcast to 1,000, per copy",
}
SYSTEMS = {
    "ours": "this broker",
    "pure": "without its C",
    "floor": "floor",
    "nats": "nats-server",
    "crossbar": "Crossbar",
}
GOALS = {  # at most so many times nats-server, and the floor
    "1x1": (1.0, 1.6),
    "16x1": (1.0, 2.5),
    "16x16": (1.5, 8.0),
    "128x1": (0.8, 2.5),
    "128x16": (1.5, 8.0),
    "16KiB": (0.7, 2.0),
    "fan-out": (0.7, None),
}


def _figures(known: Known, part: str) -> Any:
    return known["parts"][part]["figures"]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text + unit


def _ratio(ours: float | None, theirs: float | None, goal: float | None = None) -> str:
    if ours is None or not theirs:
        return "–"
    return f"{ours / theirs:.2f}" + (f" (≤ {goal:g})" if goal else "")


def _beside(known: Known, part: str) -> str:
    """Which load a part was measured beside; waking takes as long as others let it."""
    before, after = known["parts"][part]["load"]
    return f"\n\nThe load average was {before:g} before and {after:g} after it, its own load included."


def machine(known: Known) -> str:
    """What it was measured on, and when."""
    at, parts = known["machine"], known["parts"].values()
    loads = [load for part in parts for load in part["load"]]
    names = [f"nats-server {at['nats']}"] if at["nats"] else []
    names += [f"Crossbar {at['crossbar']}"] if at["crossbar"] else []
    commits = sorted({"`" + part["commit"] + "`" for part in parts})
    return (
        f"Measured from {min(part['at'] for part in parts)} to {max(part['at'] for part in parts)}, at "
        f"{', '.join(commits)}: {at['processors']} processors "
        f"({at['processor']}), Linux {at['kernel']}, Python {at['python']}, uvloop {at['uvloop']}, "
        f"{at['core']}. Beside it: {', '.join(names) or 'nothing'}. "
        f"The load average before and after the parts was {min(loads):g} to {max(loads):g}, their own load included."
    )


def requests(known: Known) -> str:
    """Processor time per request, side by side."""
    found = _figures(known, "loads")[0]
    systems = [name for name in SYSTEMS if any(name in found[load] for load in LOADS if load in found)]
    rows = []
    for load, title in LOADS.items():
        if load not in found:
            continue
        us = {name: found[load].get(name, {}).get("cpu_us") for name in systems}
        nats, floor = GOALS[load]
        cells = [_number(us[name]) for name in systems]
        rows.append(
            [title, *cells, _ratio(us["ours"], us.get("nats"), nats), _ratio(us["ours"], us.get("floor"), floor)]
        )
    return _table(["CPU µs", *(SYSTEMS[name] for name in systems), "÷ nats", "÷ floor"], rows)


def connections(known: Known) -> str:
    """Idle and new connections."""
    found = _figures(known, "loads")[0]
    systems = [name for name in SYSTEMS if any(name in found.get(load, {}) for load in ("idle", "accept"))]
    titles = {"kib_each": ("idle", "KiB per idle connection"), "per_cpu_s": ("accept", "accepted per CPU second")}
    rows = []
    for figure, (load, title) in titles.items():
        values = {name: found.get(load, {}).get(name, {}).get(figure) for name in systems}
        rows.append(
            [title, *(_number(value) for value in values.values()), _ratio(values.get("ours"), values.get("nats"))]
        )
    return _table(["", *(SYSTEMS[name] for name in systems), "÷ nats"], rows)


def latency(known: Known) -> str:
    """Median and 99th percentile as the generator saw them."""
    found = _figures(known, "loads")[0]
    rows = []
    for load, title in LOADS.items():
        ours, nats = found.get(load, {}).get("ours", {}), found.get(load, {}).get("nats", {})
        if load != "fan-out" and ours and nats:
            cells = [_number(one[name]) for name in ("p50_us", "p99_us") for one in (ours, nats)]
            rows.append([title, *cells, _number(ours["per_s"]), _number(nats["per_s"])])
    head = ["µs", "p50", "p50 nats", "p99", "p99 nats", "requests per s", "of nats"]
    return _table(head, rows)


def curves(known: Known) -> str:
    """First and last point of each curve."""
    rows = []
    for name, found in _figures(known, "curves").items():
        for system, points in found.items():
            if points:
                us = [point["cpu_us"] for point in points]
                ends = [f"{_number(us[at])} at {points[at]['at']:,}" for at in (0, -1)]
                lowest = min(points, key=lambda point: float(point["cpu_us"]))
                least = f"{_number(lowest['cpu_us'])} at {lowest['at']:,}"
                rows.append(
                    [CURVES[name].axis if name != "held" else "given to workers", SYSTEMS[system], *ends, least]
                )
    return _table(["CPU µs, by", "", "first", "last", "least"], rows)


def payload(known: Known) -> str:
    """What one MiB costs, by the size of the message."""
    rows = []
    for point in _figures(known, "curves")["bytes"]["ours"]:
        if point["at"] >= 4096:
            mib = 2 * point["at"] / 2**20
            cells = [_number(point["cpu_us"]), _number(point["cpu_us"] / 1000 / mib)]
            rows.append([f"{point['at'] // 1024:,} KiB, there and back", *cells])
    ms = _figures(known, "bulk")[0]["parts"]["ours_ms_per_mib"]
    rows.append(["100 MiB in parts, one way", _number(ms * 1000 * 100), _number(ms)])
    return _table(["", "CPU µs per request", "CPU ms per MiB"], rows)


def secure(known: Known) -> str:
    """TLS beside a relay."""
    found = _figures(known, "secure")[0]
    names = ("ours tls", "relay tls", "ours", "relay")
    rows = []
    for load, title in {**LOADS, "accept": "accepted connection"}.items():
        if load in found:
            us = {name: found[load].get(name, {}).get("cpu_us") for name in names}
            rows.append([title, *(_number(us[name]) for name in names), _ratio(us["ours tls"], us["relay tls"])])
    return _table(["CPU µs", "this broker, TLS", "relay, TLS", "this broker", "relay", "÷ relay, TLS"], rows)


def zeromq(known: Known) -> str:
    """ZeroMQ beside a forwarder, and with WebSocket on one side."""
    found = _figures(known, "zeromq")[0]
    rows = []
    for load, row in found["loads"].items():
        ratio = _ratio(row["zeromq"], row["forwarder"], GOAL_RATIO)
        mixed = _ratio(max(row[way] for way in MIXED), (row["zeromq"] + row["websocket"]) / 2, GOAL_RATIO)
        us = {way: _number(row[way]) for way in WAYS}
        rows.append([f"CPU µs, {LOADS.get(load, load)}", *us.values(), ratio, mixed])
    counted = found["counts"]
    for name, title in {"reads": "system calls that read, 1×1", "writes": "that write", "calls": "all"}.items():
        if all(name in counted.get(way, {}) for way in WAYS):
            rows.append([title, *(_number(counted[way][name]) for way in WAYS), "", ""])
    ways = ["ZeroMQ", "forwarder", "WebSocket", "asked by WebSocket, answered by ZeroMQ", "the other way round"]
    table = _table(["per request", *ways, "ZeroMQ ÷ forwarder", "the dearer mixed ÷ mean"], rows)
    return table + _beside(known, "zeromq")


def kernels(known: Known) -> str:
    """A cell through the broker, beside the kernel's own sockets."""
    found = _figures(known, "kernels")[0]
    ways = {"request": ("as a request", 1), "relay": ("through `kernel connect`", 2)}
    rows = []
    for way, (title, goal_ms) in ways.items():
        took, direct, more = (found[name] for name in (f"{way}_ms", f"direct_beside_{way}_ms", f"{way}_adds_ms"))
        cpu = [found.get(f"{way}_cpu_{process}_us") for process in ("broker", "worker", "connect")]
        rows.append(
            [title, _number(took), _number(direct), f"{_number(more)} (≤ {goal_ms})", *(_number(each) for each in cpu)]
        )
    head = ["`1+1`", "ms", "kernel's own sockets, ms", "ms more", "CPU µs, broker", "worker", "`kernel connect`"]
    return _table(head, rows) + _beside(known, "kernels")


def front_ends(known: Known) -> str:
    """A notebook front end, beside jupyter_server."""
    found = _figures(known, "front_ends")[0]
    version = found.get("jupyter_server_version", "")
    rows = []
    for row in found["display"]:
        ours, theirs = row["broker"], row.get("jupyter_server")
        share = f"{ours / theirs:.2f} (≥ 0.5)" if theirs else "–"
        rows.append([f"displays of {row['kib']:,} KiB per s", _number(ours), _number(theirs), share])
        came = {name: min(row[f"{name}_came"]) for name in found["ms"]}
        if min(came.values()) < row["sent"]:
            cells = [f"{came[name]:,}" if name in came else "–" for name in ("broker", "jupyter_server")]
            rows.append([f"of {row['sent']:,} of them came at the least", *cells, ""])
    ms = found["ms"]
    rows.append(["`1+1` until idle, ms", _number(ms["broker"]), _number(ms.get("jupyter_server")), "1 ms more at most"])
    stuck, printing = found["stuck"], _figures(known, "kernels")[0]
    grown = {name: printing[f"{name}_mib_peak"] - printing[f"{name}_mib_before"] for name in ("broker", "worker")}
    rows += [
        ["a front end that does not read 120 MB costs the broker, MiB", _number(stuck["stuck_adds_mib"]), "", "≤ 64"],
        [f"{printing['printed_mb']} MB printed at once cost the broker, MiB", _number(grown["broker"]), "", "≤ 64"],
        ["and the kernel's worker, MiB", _number(grown["worker"]), "", ""],
    ]
    table = _table(["", "this broker", f"jupyter_server {version}".strip(), "goal"], rows)
    return table + _beside(known, "front_ends")


def bulk(known: Known) -> str:
    """Large payloads beside a relay."""
    found = _figures(known, "bulk")[0]
    titles = {"whole": "10 MiB in one message, there and back", "parts": "100 MiB in parts of 262,000 bytes"}
    rows = [
        [
            title,
            _number(found[name]["ours_ms_per_mib"]),
            _number(found[name]["relay_ms_per_mib"]),
            _ratio(found[name]["ours_ms_per_mib"], found[name]["relay_ms_per_mib"], 2),
            _number(found[name]["ours_grown_mib"]),
        ]
        for name, title in titles.items()
    ]
    return _table(["", "CPU ms per MiB", "relay", "÷ relay", "peak memory grew, MiB (≤ 64)"], rows)


def counts(known: Known) -> str:
    """What can be counted."""
    ours, pure = _figures(known, "counts")[0], _figures(known, "counts_pure")[0]
    titles = {
        "calls": "system calls",
        "reads": "of them read",
        "writes": "of them write",
        "bytes_out": "bytes written",
        "instructions": "instructions, without the kernel's",
        "blocks": "blocks of memory while it waits",
        "kib": "KiB while it waits",
        "blocks_left": "blocks left when 2,048 have ended, in all",
    }
    rows = [[title, _number(ours[name]), _number(pure[name])] for name, title in titles.items() if name in ours]
    path = [_figures(known, name)[0]["cpu_us"] for name in ("path", "path_pure")]
    rows.append(["CPU µs between bytes in and bytes out", *map(_number, path)])
    return _table(["per request", "this broker", "without its C"], rows)


def pending(known: Known) -> str:
    """Table and router alone."""
    rows = _figures(known, "table")
    columns = [name for name in rows[-1] if name != "pending"]
    return _table(
        ["pending", *columns],
        [[f"{row['pending']:,}", *(_number(row.get(column)) for column in columns)] for row in rows],
    )


def ends(known: Known) -> str:
    """HTTP, streams, SDK, embedding: each beside what it stands on."""
    http, embedding, sdk = (_figures(known, name)[0] for name in ("http", "embedding", "sdk"))
    at_16 = next(row for row in sdk["cpu_us_per_call"] if row["in_flight"] == 16)
    rows = [
        ["`POST /call`, µs", _number(http["call"]), "tornado's bare handler", _number(http["bare"]), "2.5"],
        [
            "a call of the SDK's client, 16 in flight, µs",
            _number(at_16["client"]),
            "bare `websockets`",
            _number(at_16["websockets"]),
            "2",
        ],
        ["a call in the SDK's worker, µs", _number(at_16["worker"]), "", "", "100 µs"],
        [
            "a blocking call in an embedding program, µs",
            _number(embedding["broker"]),
            "a semaphore per request",
            _number(embedding["rtcloud"]),
            "0.33",
        ],
    ]
    for row in _figures(known, "stream"):
        title = f"a stream in parts of {row['part']:,} bytes, ms per MB"
        rows.append(
            [title, _number(row["broker"]), "relay", _number(row["relay"]), "2" if row["part"] > 100_000 else ""]
        )
    return _table(["", "this broker", "beside", "", "goal"], rows)


def loop(known: Known) -> str:
    """How long the loop is held, and how long others wait."""
    expire, publish, flood, slow = (_figures(known, name)[0] for name in ("expire", "publish", "flood", "slow_reader"))
    longest = max(publish["copying_best_ms"], publish["writing_best_ms"])
    beside = f"a caller beside a slow reader of {slow['MB']:,.0f} MB, p99 (quiet {slow['quiet p99 ms']:.1f})"
    most = flood["quiet_p99_ms"] + flood["quiet_p50_ms"]
    rows = [
        [f"{expire['waiting']:,} requests expire at once: the loop is late, p99", _number(expire["lag_p99_ms"]), "50"],
        ["the last of them has ended after", _number(expire["ended_s"] * 1000), "5,250"],
        ["one publish to 10,000: longest turn of the best", _number(longest), "10"],
        ["a caller beside a flood, p99", _number(flood["flooded_p99_ms"]), f"{most:.1f}"],
        [beside, _number(slow["beside p99 ms"]), ""],
        ["memory the slow reader costs, MiB", _number(slow["growth MiB"]), "32"],
    ]
    return _table(["", "ms", "goal"], rows)


TABLES: dict[str, Callable[[Known], str]] = {
    each.__name__: each
    for each in (
        machine,
        requests,
        connections,
        latency,
        curves,
        payload,
        secure,
        zeromq,
        kernels,
        front_ends,
        bulk,
        counts,
        pending,
        ends,
        loop,
    )
}
_PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def filled(text: str, known: Known) -> str:
    """The page with its tables made anew; as it is where a part has not been measured."""

    def table(found: re.Match[str]) -> str:
        try:
            return f"{found[1]}\n{TABLES[found[2]](known)}\n\n{found[3]}"
        except KeyError:
            return found[0]

    return _PLACE.sub(table, text)


def main() -> None:
    docs = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    page = docs / "performance.md"
    known = json.loads((docs / "performance" / "figures.json").read_text())
    page.write_text(filled(page.read_text(encoding="utf-8"), known), encoding="utf-8")


if __name__ == "__main__":
    main()
