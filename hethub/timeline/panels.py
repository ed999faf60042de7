"""What a Gantt chart of one step shows: lanes, bars and words, whoever draws them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hethub.timeline.record import COMPUTE_KINDS, Kind, Lane, Timeline
from hethub.timeline.summary import before_last_backward, sent_seconds, step_window
from hethub.timeline.trace import kind_label

__all__ = [
    "COLOURS",
    "Bars",
    "Panel",
    "bars_of",
    "first_compute",
    "hover_lines",
    "panel_of",
    "parameter_sends",
]

# Okabe and Ito's colour-blind-safe palette, with greys for the time in which nothing is computed; the parts of a split
# backward are a lighter and a darker shade of the whole one. Drawn in this order: collectives last, over the compute
# action that they are part of.
COLOURS = {
    "forward": "#0072B2",
    "backward": "#E69F00",
    "backward-input": "#FFD58A",
    "backward-weight": "#9C6500",
    "recompute": "#CC79A7",
    "reduce": "#56B4E9",
    "norm": "#999999",
    "update": "#009E73",
    "gather": "#332288",
    "bubble": "#D9D9D9",
    "idle wait": "#F0F0F0",
    "exposed communication": "#D55E00",
    "send": "#555555",
    "collective": "#D55E00",
}
_MAX_BARS = 20_000  # about what a browser draws and moves smoothly


@dataclass(slots=True)
class Bars:
    """The bars of one colour in one panel; one entry each in every list."""

    lanes: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # seconds
    lengths: list[float] = field(default_factory=list)  # seconds
    texts: list[str] = field(default_factory=list)
    hovers: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Panel:
    """One step of one timeline: `rows` hold values by column name, times counted from the step's start."""

    title: str
    lanes: list[str]
    rows: list[dict[str, Any]]
    seconds: float


def panel_of(timeline: Timeline, step: int, title: str, max_bars: int = _MAX_BARS) -> Panel:
    """One step of a timeline, its times counted from its start; where all devices would make more than `max_bars` bars
    some are left out, evenly. Raises InputError where the timeline lacks the step."""
    info = timeline.info
    begin, end = step_window(timeline, step, step)
    records = timeline.records[timeline.records["step"] == step]
    shown = _lanes_shown(len(info.devices), len(records), max_bars)
    drawn = np.isin(records["device"], shown)
    filling, sent = before_last_backward(records)[drawn], sent_seconds(records)[drawn] - begin
    lane_of = {device: lane for lane, device in enumerate(shown)}
    names = records.dtype.names or ()
    rows = []
    for values, fills, issued in zip(records[drawn].tolist(), filling.tolist(), sent.tolist(), strict=True):
        row = dict(zip(names, values, strict=True))
        row |= {"device_lane": lane_of[row["device"]], "fills": fills, "sent": issued}
        row |= {"start": row["start"] - begin, "end": row["end"] - begin}
        row |= {"device_name": info.devices[row["device"]], "device_type": info.device_types[row["device"]]}
        row["peer_name"] = info.devices[row["peer"]] if row["peer"] >= 0 else ""
        rows.append(row)
    _number_parts(rows)
    heading = f"{title}: {_seconds(end - begin)}"
    if len(shown) < len(info.devices):
        heading += f", {len(shown)} of {len(info.devices)} devices, evenly chosen"
    lanes = [f"{info.devices[device]} ({info.device_types[device]})" for device in shown]
    return Panel(heading, lanes, rows, end - begin)


def _lanes_shown(devices: int, records: int, max_bars: int) -> list[int]:
    """Return the devices to draw: all, or evenly chosen ones when a browser could not draw so many bars."""
    lanes = max(1, min(devices, devices * max_bars // max(records, 1)))
    return sorted({int(place) for place in np.linspace(0, devices - 1, lanes)})


def _number_parts(rows: list[dict[str, Any]]) -> None:
    """Give every row `part` and `parts`: its place, by the list, among the compute actions of one kind, stage and
    micro-batch on its device. A record does not hold the part that the program's action has, and parts of a backward
    run from the last one on, so this counts them as they ran."""
    alike: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        row |= {"part": 1, "parts": 1}
        if row["kind"] in COMPUTE_KINDS:
            key = (row["device"], row["kind"], row["stage"], row["micro_batch"])
            alike.setdefault(key, []).append(row)
    for group in alike.values():
        group.sort(key=lambda row: int(row["action"]))
        for number, row in enumerate(group, start=1):
            row |= {"part": number, "parts": len(group)}


def parameter_sends(panel: Panel) -> list[dict[str, Any]]:
    """Sends of gradients to their updaters and of new weights to their holders (and of norms)."""
    return [row for row in panel.rows if row["kind"] == Kind.SEND and row["lane"] == Lane.PARAMETERS]


def bars_of(panel: Panel) -> dict[str, Bars]:
    """The bars by colour, those without a length left out."""
    bars: dict[str, Bars] = {}
    for row in panel.rows:
        for name, start, end in _segments(row):
            if end > start:
                group = bars.setdefault(name, Bars())
                group.lanes.append(row["device_lane"])
                group.starts.append(start)
                group.lengths.append(end - start)
                compute = row["kind"] in COMPUTE_KINDS and row["micro_batch"] >= 0
                group.texts.append(str(row["micro_batch"]) if compute else "")
                group.hovers.append(hover_lines(row, name))
    return bars


def _segments(row: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield (colour name, start, end) of a record: a wait splits where its message was sent."""
    start, end = row["start"], row["end"]
    if row["kind"] != Kind.RECEIVE:
        yield kind_label(row["kind"]), start, end
        return
    sent = row["sent"] if row["sent"] == row["sent"] else end  # NaN: not known to be sent
    middle = min(max(sent, start), end)
    yield ("bubble" if row["fills"] else "idle wait"), start, middle
    yield "exposed communication", middle, end


def hover_lines(row: dict[str, Any], name: str) -> list[str]:
    """Every field of a row that is set, one a line of plain text; the first says what it is."""
    kind = kind_label(row["kind"])
    lines = [kind if kind == name else f"{kind}: {name}"]
    lines.append(f"{row['device_name']} ({row['device_type']})")
    named = ("step", "action", "stage", "micro_batch", "message")
    lines += [
        f"{field_name.replace('_', '-')} {row[field_name]}" for field_name in named if row[field_name] >= 0
    ]
    if row["parts"] > 1:
        lines.append(f"part {row['part']} of {row['parts']}")
    if row["peer"] >= 0:
        direction = "to" if row["kind"] == Kind.SEND else "from"
        lines.append(f"{direction} {row['peer_name']}, {row['bytes']:,} bytes")
    if row["lane"] >= 0:
        lines.append(f"lane {Lane(row['lane']).name.lower()}")
    lines.append(f"{_seconds(row['start'])} to {_seconds(row['end'])}: {_seconds(row['end'] - row['start'])}")
    if row["kind"] == Kind.RECEIVE and row["sent"] == row["sent"]:
        lines.append(f"sent at {_seconds(row['sent'])}")
    lines.append(f"busy {_seconds(row['busy'])}")
    lines.append(f"real {_seconds(row['real'])}, overrun {_seconds(row['overrun'])} (wall)")
    return lines


def _seconds(value: float) -> str:
    """Write seconds with the prefix that suits them: `1.234 s`, `12.300 ms`, `4.500 µs`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value / 1e-6:.3f} µs" if value else "0"


def first_compute(panels: list[Panel]) -> float:
    """The earliest compute action: a device may begin a step before the slowest ends the one before it."""
    starts = (row["start"] for panel in panels for row in panel.rows if row["kind"] in COMPUTE_KINDS)
    return float(min(starts, default=0.0))
