"""The Gantt chart of one step as one HTML file that needs nothing else: no network, no other file.

The predicted step stands above the measured one on one time axis; every device is a lane. The file allows
only its own two scripts (Content-Security-Policy with a nonce), and every name that people chose is escaped.
"""

from __future__ import annotations

import hashlib
import html
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hethub.errors import MachineError
from hethub.timeline.record import COMPUTE_KINDS, Kind, Lane, Timeline
from hethub.timeline.summary import before_last_backward, sent_seconds, step_window
from hethub.timeline.trace import kind_label

__all__ = ["gantt_figure", "write_gantt"]

Figure = dict[str, Any]

# Okabe and Ito's colour-blind-safe palette, with greys for the time in which nothing is computed; the parts of a split
# backward are a lighter and a darker shade of the whole one. Drawn in this order: collectives last, over the compute
# action that they are part of.
_COLOURS = {
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
_MARKS = "parameters sent"  # a send takes no time that one could see
_MAX_BARS = 20_000  # about what a browser draws and moves smoothly
_LANE_PIXELS = 26
_PANEL_GAP_PIXELS = 52
_MARGIN_PIXELS = {"t": 92, "b": 118, "l": 20, "r": 24}


@dataclass(slots=True)
class _Bars:
    """The bars of one colour in one panel; one entry each in every list."""

    lanes: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # seconds
    lengths: list[float] = field(default_factory=list)  # seconds
    texts: list[str] = field(default_factory=list)
    hovers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Panel:
    """One step of one timeline: `rows` hold values by column name, times counted from the step's start."""

    title: str
    lanes: list[str]
    rows: list[dict[str, Any]]
    seconds: float


def write_gantt(path: Path, predicted: Timeline, measured: Timeline | None, step: int, title: str) -> None:
    """Write the chart of measured `step` under the predicted one, whole or not at all.

    Raises InputError when the step is not in the timeline, MachineError without the package plotly, and
    OSError when the file cannot be written.
    """
    try:
        import plotly.graph_objects as go
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MachineError(
            "plotly: not installed, the chart needs it. Install the extra: pip install 'hethub[plots]'."
        ) from error
    figure = go.Figure(gantt_figure(predicted, measured, step, title)).to_json()
    page = _page(title, figure.replace("<", "\\u003c"), get_plotlyjs())
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def gantt_figure(predicted: Timeline, measured: Timeline | None, step: int, title: str) -> Figure:
    """Return the chart as a Plotly figure (`data` and `layout`). Raises InputError as `write_gantt` does."""
    panels = [_panel(predicted, 0, "predicted step")]
    if measured is not None:
        panels.append(_panel(measured, step, f"measured step {step}"))
    traces: list[Figure] = []
    seen: set[str] = set()
    span = max(panel.seconds for panel in panels)
    for number, panel in enumerate(panels, start=1):
        bars = _bars(panel)
        for name in _COLOURS:
            if name in bars:
                traces.append(_trace(name, bars[name], number, name not in seen, span))
                seen.add(name)
        if sends := _parameter_sends(panel):
            traces.append(_marks(sends, number, _MARKS not in seen))
            seen.add(_MARKS)
    emulated = predicted.info.emulated or (measured is not None and measured.info.emulated)
    return {"data": traces, "layout": _layout(panels, title, emulated, span)}


# --- what is drawn ----------------------------------------------------------------------------------------


def _panel(timeline: Timeline, step: int, title: str) -> _Panel:
    info = timeline.info
    begin, end = step_window(timeline, step, step)
    records = timeline.records[timeline.records["step"] == step]
    shown = _lanes_shown(len(info.devices), len(records))
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
    return _Panel(heading, lanes, rows, end - begin)


def _lanes_shown(devices: int, records: int) -> list[int]:
    """Return the devices to draw: all, or evenly chosen ones when a browser could not draw so many bars."""
    lanes = max(1, min(devices, devices * _MAX_BARS // max(records, 1)))
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


def _parameter_sends(panel: _Panel) -> list[dict[str, Any]]:
    """Sends of gradients to their updaters and of new weights to their holders (and of norms)."""
    return [row for row in panel.rows if row["kind"] == Kind.SEND and row["lane"] == Lane.PARAMETERS]


def _bars(panel: _Panel) -> dict[str, _Bars]:
    bars: dict[str, _Bars] = {}
    for row in panel.rows:
        for name, start, end in _segments(row):
            if end > start:
                group = bars.setdefault(name, _Bars())
                group.lanes.append(row["device_lane"])
                group.starts.append(start)
                group.lengths.append(end - start)
                compute = row["kind"] in COMPUTE_KINDS and row["micro_batch"] >= 0
                group.texts.append(str(row["micro_batch"]) if compute else "")
                group.hovers.append(_hover(row, name))
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


def _hover(row: dict[str, Any], name: str) -> str:
    """Return every field that is set, one a line."""
    kind = kind_label(row["kind"])
    lines = [f"<b>{kind if kind == name else f'{kind}: {name}'}</b>"]
    lines.append(f"{_escape(row['device_name'])} ({_escape(row['device_type'])})")
    named = ("step", "action", "stage", "micro_batch", "message")
    lines += [
        f"{field_name.replace('_', '-')} {row[field_name]}" for field_name in named if row[field_name] >= 0
    ]
    if row["parts"] > 1:
        lines.append(f"part {row['part']} of {row['parts']}")
    if row["peer"] >= 0:
        direction = "to" if row["kind"] == Kind.SEND else "from"
        lines.append(f"{direction} {_escape(row['peer_name'])}, {row['bytes']:,} bytes")
    if row["lane"] >= 0:
        lines.append(f"lane {Lane(row['lane']).name.lower()}")
    lines.append(f"{_seconds(row['start'])} to {_seconds(row['end'])}: {_seconds(row['end'] - row['start'])}")
    if row["kind"] == Kind.RECEIVE and row["sent"] == row["sent"]:
        lines.append(f"sent at {_seconds(row['sent'])}")
    lines.append(f"busy {_seconds(row['busy'])}")
    lines.append(f"real {_seconds(row['real'])}, overrun {_seconds(row['overrun'])} (wall)")
    return "<br>".join(lines)


def _seconds(value: float) -> str:
    """Write seconds with the prefix that suits them: `1.234 s`, `12.300 ms`, `4.500 µs`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value / 1e-6:.3f} µs" if value else "0"


def _escape(text: str) -> str:
    """Make text plain for Plotly, which reads tags and the entities &amp; &lt; &gt; in every label."""
    return html.escape(text, quote=False)


# --- how it is drawn --------------------------------------------------------------------------------------


def _trace(name: str, bars: _Bars, panel: int, in_legend: bool, span: float) -> Figure:
    thin = name == "collective"  # a strip along the foot of its compute action
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "legendgroup": name,
        "showlegend": in_legend,
        "xaxis": "x",
        "yaxis": "y" if panel == 1 else f"y{panel}",
        "y": bars.lanes,
        "base": bars.starts,
        "x": bars.lengths,
        "width": 0.2 if thin else 0.82,
        "offset": 0.21 if thin else -0.41,
        "marker": {
            "color": _COLOURS[name],
            # A border would hide a bar that is not much wider than itself.
            "line": {"color": "white", "width": [0.6 if x > span / 300 else 0.0 for x in bars.lengths]},
        },
        "text": bars.texts,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "hoverinfo": "text",
        "hovertext": bars.hovers,
    }


def _marks(sends: list[dict[str, Any]], panel: int, in_legend: bool) -> Figure:
    """Small triangles at the head of the sender's lane."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _MARKS,
        "legendgroup": _MARKS,
        "showlegend": in_legend,
        "xaxis": "x",
        "yaxis": "y" if panel == 1 else f"y{panel}",
        "x": [row["start"] for row in sends],
        "y": [row["device_lane"] - 0.36 for row in sends],
        "marker": {"symbol": "triangle-down", "size": 6, "color": _COLOURS["send"]},
        "hoverinfo": "text",
        "hovertext": [_hover(row, "send") for row in sends],
    }


def _layout(panels: list[_Panel], title: str, emulated: bool, span: float) -> Figure:
    lanes = sum(len(panel.lanes) for panel in panels)
    drawn = lanes * _LANE_PIXELS + (len(panels) - 1) * _PANEL_GAP_PIXELS
    layout: Figure = {
        "title": {"text": _escape(title) + (" (emulated: modelled time)" if emulated else ""), "x": 0.01},
        "template": "plotly_white",
        "barmode": "overlay",
        "bargap": 0,
        "height": drawn + _MARGIN_PIXELS["t"] + _MARGIN_PIXELS["b"],
        "margin": _MARGIN_PIXELS,
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"align": "left"},
        "uniformtext": {"minsize": 8, "mode": "hide"},
        "legend": {"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0.0},
        "xaxis": {
            "title": {"text": "time since the step began", "standoff": 8},
            "anchor": "y" if len(panels) == 1 else f"y{len(panels)}",
            "range": [min(0.0, _first_compute(panels)) - 0.005 * span, 1.01 * span],
            "tickformat": "~s",
            "ticksuffix": "s",
            "zeroline": False,
        },
        "annotations": [],
        "shapes": [],
    }
    top = 1.0
    for number, panel in enumerate(panels, start=1):
        axis = "y" if number == 1 else f"y{number}"
        bottom = top - len(panel.lanes) * _LANE_PIXELS / drawn
        layout["yaxis" + axis[1:]] = _lane_axis(panel, max(bottom, 0.0), top)
        layout["annotations"].append(_heading(panel, top))
        layout["shapes"].append(_step_end(panel, axis))
        top = bottom - _PANEL_GAP_PIXELS / drawn
    return layout


def _first_compute(panels: list[_Panel]) -> float:
    """The earliest compute action: a device may begin a step before the slowest ends the one before it."""
    starts = (row["start"] for panel in panels for row in panel.rows if row["kind"] in COMPUTE_KINDS)
    return float(min(starts, default=0.0))


def _lane_axis(panel: _Panel, bottom: float, top: float) -> Figure:
    return {
        "domain": [bottom, top],
        "anchor": "x",
        "range": [len(panel.lanes) - 0.5, -0.5],  # first device on top
        "tickmode": "array",
        "tickvals": list(range(len(panel.lanes))),
        "ticktext": [_escape(lane) for lane in panel.lanes],
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
    }


def _heading(panel: _Panel, top: float) -> Figure:
    position = {"xref": "paper", "x": 0.0, "xanchor": "left", "yref": "paper", "y": top, "yanchor": "bottom"}
    return {"text": f"<b>{_escape(panel.title)}</b>", "showarrow": False, **position}


def _step_end(panel: _Panel, axis: str) -> Figure:
    """A dotted line where the step ends."""
    place = {
        "xref": "x",
        "x0": panel.seconds,
        "x1": panel.seconds,
        "yref": f"{axis} domain",
        "y0": 0,
        "y1": 1,
    }
    return {"type": "line", "line": {"color": "black", "width": 1, "dash": "dot"}, **place}


def _page(title: str, figure: str, library: str) -> str:
    """Return the whole page; `figure` is JSON without `<`, `library` the text of Plotly's script."""
    nonce = hashlib.sha256((title + figure).encode()).hexdigest()[:32]
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
</head>
<body>
<noscript>This chart is drawn by the script in this file: allow scripts to see it.</noscript>
<div id="chart"></div>
<script nonce="{nonce}">{library}</script>
<script nonce="{nonce}">
const figure = {figure};
Plotly.newPlot("chart", figure.data, figure.layout, {{responsive: true, displaylogo: false}});
</script>
</body>
</html>
"""
